"""The contract of a task: data → checked rows → batches → loss → metrics. One file a task.

Everything up to `Task.check` runs without torch, so that a mistake in the data is told before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue, UnknownName, VeneerError, nearest
from veneer.tasks.data import Data, Row, Splits, Table, read, split
from veneer.tasks.metric import Measured

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from veneer.registry import Card
    from veneer.tuned import Tuned

TASKS = {
    "text-classification": "text_classification.TextClassification",
    "text-regression": "text_regression.TextRegression",
    "causal-lm": "causal_lm.CausalLM",
    "chat": "chat.Chat",
    "word-problems": "word_problems.WordProblems",
    "code-generation": "code_generation.CodeGeneration",
    "unit-test-generation": "unit_test_generation.UnitTestGeneration",
    "multiple-choice": "multiple_choice.MultipleChoice",
    "image-classification": "image_classification.ImageClassification",
    "self-supervised-images": "self_supervised_images.SelfSupervisedImages",
    "series-segmentation": "series_segmentation.SeriesSegmentation",
    "semantic-segmentation": "semantic_segmentation.SemanticSegmentation",
    "point-classification": "point_classification.PointClassification",
    "text-to-image": "text_to_image.TextToImage",
    "image-captioning": "image_captioning.ImageCaptioning",
    "forgery-detection": "forgery_detection.ForgeryDetection",
    "transcription": "transcription.Transcription",
}
"""Tasks by name → where they are."""

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "body", "comment", "question", "input", "title", "sentence1", "premise")
PAIR_NAMES = ("text_pair", "sentence2", "hypothesis", "answer", "context")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score", "y")
PROMPTS = ("prompt", "instruction", "question", "input")
ANSWERS = ("completion", "response", "answer", "output")
CHOICES = ("choices", "options", "endings")
CAPTIONS = ("caption", "description")
SOUNDS = ("audio", "wav", "clip", "speech")


@dataclass(frozen=True)
class Settings:
    """What one task alone has to be told: subclasses give `option`s, which stand in brackets behind the task's name."""


@dataclass(frozen=True)
class Options:
    """What a user may say about the data; None means: guess, or the task's own choice.

    Args:
        text, pair, label: column names.
        max_length: longest text in tokens; longer ones are cut.
        image_size: side of the square picture that enters the model, in pixels.
        train_rows, validation_rows, test_rows: at most so many rows of each split.
        max_new_tokens: longest generated answer.
        source: the domains to train on, separated by commas, of data that have several; all are tested on.
        unlabelled: further domains whose training pictures are used without their masks.
        audio: column of the sound file. language: that of the transcripts, for speech models of several.
        max_seconds: longest clip; models that pad every clip to a fixed window pad to this many seconds instead.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: int | None = None
    image_size: int | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    max_new_tokens: int = 200
    source: str | None = None
    unlabelled: str | None = None
    audio: str | None = None
    language: str | None = None
    max_seconds: float | None = None

    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The task's own `Settings` that differ from their defaults."""


class Task(ABC):
    """One kind of problem, bound to its data. Construct it with `prepare`.

    Args:
        splits: the checked rows.
        options: with every column filled in.
        facts: what has to be known to use the trained model without the data (class names …); JSON values only.
    """

    slug: ClassVar[str]
    main: ClassVar[str]
    """The metric that chooses the best checkpoint."""
    greater: ClassVar[bool] = True
    """Whether more of it is better."""
    headline: ClassVar[str] = "accuracy"
    """The metric of finished runs that comparisons show, if they have it; else `main`."""
    per_token: ClassVar[bool] = False
    """Whether the loss is a mean over tokens, which counts the tokens of a whole step, over all processes."""
    settings: ClassVar[type[Settings]] = Settings
    """What it alone has to be told."""
    last_counts: ClassVar[bool] = False
    """Whether a run keeps its last step (also as a property), as `main` cannot tell the best one."""
    grouped: ClassVar[bool] = True
    """Whether rows differ in length, so that batches of similar length save work."""

    def __init__(self, options: Options, splits: Splits | None = None, facts: dict[str, Any] | None = None) -> None:
        self.options = options
        self.own: Any = self.settings(**options.own)
        self.facts = facts or {}
        if splits is not None:
            self.splits = splits
            for name, table in splits.items():
                self.check(table, name)

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def columns(cls, table: Table, options: Options) -> Options:
        """The options with every needed column filled in. Raises `BadValue` naming columns and flags if one is missing."""

    @abstractmethod
    def check(self, table: Table, split: str) -> None:
        """Raises `BadValue` or `BadFile` naming the place of a row that cannot be used. Called for train first."""

    @classmethod
    def key(cls, options: Options) -> str:
        """The column whose equal values must not be torn apart by a split."""
        return options.text or ""

    @classmethod
    def divide(cls, data: Data, options: Options) -> Splits:
        """The data's rows as training, validation and test rows."""
        limits = (options.train_rows, options.validation_rows, options.test_rows)
        return split(data, data.hints.get("key") or cls.key(options), limits)

    def said(self) -> str:
        """The columns in use, each with the flag that changes it, for people."""
        shown = [f"{name}={getattr(self.options, name)!r} (--{name})" for name in ("text", "pair", "label")]
        return ", ".join(s for s, name in zip(shown, ("text", "pair", "label")) if getattr(self.options, name))

    # -- model --------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        """The pretrained model with a head for this task, and its tokenizer or image processor."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        """Model inputs, one mapping a row, with `labels` if the rows have answers."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Puts encoded rows into one batch, padded to the longest."""

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """What is kept of a batch's output for `measure`: [batch, …]. By default the logits themselves."""
        return logits[0] if isinstance(logits, tuple) else logits

    # -- around training ----------------------------------------------------------------------------------------

    def before(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """What has to be done or made by the untouched model before training; gives the lines that tell of it."""
        return []

    def after(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """Leaves files for people in the run's folder, such as a sheet of pictures; gives the lines that tell of them."""
        return []

    # -- results ------------------------------------------------------------------------------------------------

    @classmethod
    def bare(cls, row: Row) -> Any:
        """What `predict` takes of a row of data."""
        return next((row[name] for name in ("image", "messages") if row.get(name) is not None), row)

    @abstractmethod
    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        """Metrics from what `reduce` kept, in the rows' order."""

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured | None:
        """Further metrics of the finished model that need generation; None for tasks without."""
        return None

    @abstractmethod
    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Answers for bare inputs, one mapping an input."""


# -- choosing ---------------------------------------------------------------------------------------------------


def task_class(name: str) -> type[Task]:
    """The task of this name. Raises `UnknownName` with the nearest ones."""
    if name not in TASKS:
        raise UnknownName(f"There is no task {name!r}.{nearest(name, TASKS)} There are: {', '.join(TASKS)}.")
    module, _, cls = TASKS[name].partition(".")
    return getattr(importlib.import_module(f"veneer.tasks.{module}"), cls)


def named(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and own settings of a task: "transcription(language=es)". Raises `UnknownName` and `BadValue` that show the place."""
    from veneer.spec import parse_one

    return parse_one(spec, card, "task")


def with_own(spec: str, settings: dict[str, Any]) -> str:
    """A task with further settings of its own; those that stand in its brackets already win."""
    name, own = named(spec)
    words = ", ".join(f"{k}={v!r}" for k, v in {**settings, **own}.items())
    return f"{name}({words})" if words else name


def card(name: str) -> Card:
    """A task's settings, as those of methods are kept. Raises `UnknownName`."""
    from veneer.registry import Card, Option

    cls = task_class(name.replace("_", "-"))
    options = tuple(
        Option(f.name, str(f.type), f.default, f.metadata["help"], {k: v for k, v in f.metadata.items() if k != "help"})
        for f in dataclasses.fields(cls.settings)
    )
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return Card(cls.slug, "task", cls.__name__, None, None, summary, cls.slug, cls.__module__, options)


def guess(data: Data) -> str:
    """The task that the columns suggest. Raises `BadValue` with the columns if none does."""
    if "task" in data.hints:
        return data.hints["task"]
    columns = data.train.columns
    if "image" in columns and _first(CAPTIONS, columns):
        return "image-captioning"
    if data.images:
        return "image-classification" if _first(LABEL_NAMES, columns) else "self-supervised-images"
    if "messages" in columns or (_first(PROMPTS, columns) and _first(ANSWERS, columns) and not _first(LABEL_NAMES, columns)):
        return "chat"
    if _first(SOUNDS, columns) and _first(TEXT_NAMES, columns):
        return "transcription"
    label = _first(LABEL_NAMES, columns)
    if label and _first(CHOICES, columns):
        return "multiple-choice"
    if label and len(columns) > 1:
        return "text-regression" if _looks_continuous([row[label] for row in data.train.rows]) else "text-classification"
    if _first(TEXT_NAMES, columns):
        return "causal-lm"
    raise BadValue(
        f"{data.source}: no task fits the columns {', '.join(columns)}. "
        f"Name it with --task ({', '.join(TASKS)}) and the columns with --text, --label."
    )


def prepare(source: str | Data, task: str | None = None, options: Options | None = None) -> tuple[Task, list[str]]:
    """Reads, guesses what was not said, splits and checks; gives the task and the lines that tell what was done.

    Needs no torch. Raises `VeneerError`s that name file, line, column and the flag to change.
    """
    if task is not None:
        named(task)
    data = read(source) if isinstance(source, str) else source
    chosen, own = named(task or guess(data))
    cls = task_class(chosen)
    options = _with(options or Options(), {"own": own})
    hinted = {k: v for k, v in data.hints.items() if k in ("text", "pair", "label") and getattr(options, k) is None}
    options = cls.columns(data.train, _with(options, hinted))
    made = cls(options, cls.divide(data, options), dict(data.facts))
    how = "" if task else " (guessed; --task changes it)" if "task" not in data.hints else " (--task changes it)"
    sizes = ", ".join(f"{len(table)} {name}" for name, table in made.splits.items())
    return made, [f"Task: {chosen}{how}; columns: {made.said() or 'messages'}", f"Data: {data.source}: {sizes} ({made.splits.note})"]


def _with(options: Options, changes: dict[str, Any]) -> Options:
    return dataclasses.replace(options, **changes)


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    lower = {c.lower(): c for c in columns}
    return next((lower[name] for name in names if name in lower), None)


def _looks_continuous(values: Sequence[Any]) -> bool:
    """Numbers that are not whole, or whole numbers of more than 50 different values."""
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        return False
    return any(n != int(n) for n in numbers if abs(n) < 1e15) or len(set(numbers)) > 50


def text_columns(table: Table, options: Options, *, label: bool) -> Options:
    """Fills in the text and label columns: by name, and else the column with the longest strings."""
    from veneer.tasks.data import column

    names = table.columns
    text = options.text or _first(TEXT_NAMES, [c for c in names if c != options.label]) or _longest(table, options)
    found = options.label or (_first(LABEL_NAMES, [c for c in names if c != text]) if label else None)
    if text is None:
        raise BadValue(f"{table.source}: none of the columns {', '.join(names)} holds text. Name it with --text.")
    if label and found is None:
        raise BadValue(
            f"{table.source}: no column is called {' or '.join(LABEL_NAMES[:3])}; there are {', '.join(names)}. Name it with --label."
        )
    pair = options.pair or _first([n for n in PAIR_NAMES if n in ("text_pair", "sentence2", "hypothesis")], names)
    for name, flag in ((text, "--text"), (found, "--label"), (pair, "--pair")):
        if name is not None:
            column(table, name, flag)
    return _with(options, {"text": text, "label": found, "pair": pair})


def _longest(table: Table, options: Options) -> str | None:
    sample = table.rows[:100]
    lengths = {
        c: sum(len(row.get(c) or "") for row in sample)
        for c in table.columns
        if c != options.label and all(isinstance(row.get(c), str) for row in sample)
    }
    return max(lengths, key=lambda c: lengths[c]) if lengths else None


def check_text(table: Table, options: Options, split: str) -> None:
    """Raises `BadValue` for a row whose text is missing, empty or not a string."""
    for name, flag in ((options.text, "--text"), (options.pair, "--pair")):
        if name is None:
            continue
        for i, row in enumerate(table.rows):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                shown = "is empty" if value in (None, "") or isinstance(value, str) else f"is {type(value).__name__}, not text"
                raise BadValue(
                    f"{table.place(i)} ({split}): the column {name!r} {shown}. Mend the row, or choose another column with {flag}."
                )


def load_failed(model: str, error: Exception) -> VeneerError:
    """The error for a model that could not be loaded, in our words."""
    from veneer.assets import MODELS

    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return UnknownName(
        f"The model {model!r} cannot be loaded: {reason}\n"
        f"Give a model folder, a hub name, or one of {', '.join(MODELS)}.{nearest(model, MODELS)}"
    )
