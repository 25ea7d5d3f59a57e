"""A recipe: everything that decides a training run, checked without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadValue, UnknownName, nearest
from veneer.option import check, option
from veneer.tasks.task import Options, card, named, with_own
from veneer.train import packed_base
from veneer.train.packed_base import FORMATS, OPTIMIZERS

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Recipe:
    """What to train on what, and how. Unknown names and values out of range raise before any model is loaded."""

    model: str = option("", "model: a folder, a hub name, or minilm, smollm2, dinov2-small, whisper-tiny.en")
    data: str = option("", "data: a file, a folder, movie-sentiment, fashion-mnist, arithmetic, asterisk-es, or a `datasets` name")
    method: str = option("lora", "method spec, such as lora(r=8) + ssf")
    slim: str | None = option(None, "a finished run with light-peft: prune its model and train on; its settings are the defaults")
    task: str | None = option(None, "kind of problem, with its own settings in brackets (veneer tasks); guessed from the data")
    out: str | None = option(None, "folder of the run; runs/<model>-<data>-<method>-<digest> if not given")
    epochs: float | None = option(None, "passes over the training rows (3 if steps is not given)", gt=0)
    steps: int | None = option(None, "optimiser steps, instead of epochs", ge=1)
    lr: float | None = option(None, "learning rate; the method's own default if not given", gt=0)
    batch_size: int = option(32, "rows per optimiser step and device", ge=1)
    accumulate: int = option(1, "batches per optimiser step", ge=1)
    eval_batch_size: int | None = option(None, "rows per batch in evaluation; twice batch_size if not given", ge=1)
    weight_decay: float = option(0.0, "weight decay of the trained matrices", ge=0)
    warmup: float = option(0.06, "share of the steps in which the learning rate rises", ge=0, lt=1)
    schedule: str = option("linear", "how the learning rate falls", choices=("linear", "cosine", "constant"))
    clip: float = option(1.0, "largest norm of the gradient; 0 turns clipping off", ge=0)
    seed: int = option(0, "seed of first values, order and dropout", ge=0)
    eval_every: int | None = option(None, "steps between evaluations on the validation rows; a fifth of the run if not given", ge=1)
    checkpoint_every: int | None = option(None, "steps between checkpoints; a twentieth of the run if not given", ge=1)
    base_dropout: float | None = option(None, "dropout of the base in training, 0 saves time; the model's own if not given", ge=0, lt=1)
    patience: int | None = option(None, "stop after so many evaluations without a better one", ge=1)
    precision: str = option("auto", "number format", choices=PRECISIONS)
    quantise: str = option("none", "store the frozen base in 4 or 8 bits, through bitsandbytes", choices=FORMATS)
    double_quant: bool = option(True, "with nf4 and fp4: the blocks' scales in 8 bits, too")
    optimizer: str = option("adamw", "AdamW with states in 32 or 8 bits, paged to host memory or not", choices=tuple(OPTIMIZERS))
    device: str = option("auto", "where to train", choices=DEVICES)
    head: bool | str = option("auto", "train the task head too", choices=("auto", True, False))
    allow_unmatched: bool = option(False, "let single targets of the method match nothing")
    checkpointing: bool = option(False, "recompute activations to save memory")
    reversible: str | None = option(None, "rebuild activations backwards: meft1, meft2, meft3, with options as in meft1(anchors=4)")
    base: bool = option(True, "evaluate the untouched base model first")
    text: str | None = option(None, "column of the text")
    pair: str | None = option(None, "column of the second text")
    label: str | None = option(None, "column of the label or answer")
    max_length: int | None = option(None, "longest text in tokens", ge=2)
    image_size: int | None = option(None, "side of the picture in pixels", ge=8)
    train_rows: int | None = option(None, "at most so many training rows", ge=1)
    validation_rows: int | None = option(None, "at most so many validation rows", ge=1)
    test_rows: int | None = option(None, "at most so many test rows", ge=1)
    max_new_tokens: int = option(200, "longest generated answer in tokens", ge=1)
    source: str | None = option(None, "domains to train on, separated by commas, of data that have several; all are tested on")
    unlabelled: str | None = option(None, "domains whose training pictures are used without masks, with '+ self-training'")
    audio: str | None = option(None, "column of the sound file")
    language: str | None = option(None, "language of the transcripts, such as es, for speech models of several")
    max_seconds: float | None = option(None, "longest clip; Whisper then pads to this instead of 30 s, which saves time", gt=0)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            limits = {k: v for k, v in f.metadata.items() if k != "help"}
            check("recipe", f.name, getattr(self, f.name), f.default, limits, str(f.type))
        for name in ("model", "data"):
            if not getattr(self, name):
                raise BadValue(f"recipe: {name} is missing. {type(self).__dataclass_fields__[name].metadata['help'].capitalize()}.")
        if self.epochs is not None and self.steps is not None:
            raise BadValue(f"recipe: epochs={self.epochs} and steps={self.steps} exclude each other; give one of them.")

    # -- making -------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Recipe:
        """A recipe from names and values; names may be written with hyphens.

        Raises:
            UnknownName: a setting that does not exist, with the nearest ones; BadValue: a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = {str(name).replace("-", "_"): value for name, value in settings.items()}
        if isinstance(given.get("task"), str):  # a task's own settings may also stand beside it
            own = {name: given.pop(name) for name in [*given] if name not in known and name in _own(given["task"])}
            given["task"] = with_own(given["task"], own) if own else given["task"]
        for name in given:
            if name not in known:
                raise UnknownName(f"recipe: there is no setting {name!r}.{nearest(name, known)} There are: {', '.join(sorted(known))}.")
        if given.get("slim") and not known - {"out"} <= given.keys():  # the record of a run has them all
            given = {**_begun_by(str(given["slim"])), **given}
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        return cls(**{name: _number(value) if kinds[name].startswith(("float", "int")) else value for name, value in given.items()})

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML file; `changes` (flags) override it. Raises `BadFile` with the line of a mistake."""
        import yaml

        path = Path(path)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise BadFile(f"There is no recipe {path}.{nearest(path.name, others)}")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            raise BadFile(f"{where}: not YAML ({getattr(error, 'problem', error)}).") from None
        if not isinstance(settings, dict):
            raise BadFile(f"{path}: a recipe is a list of `setting: value` lines.")
        return cls.of({**settings, **(changes or {})})

    # -- reading ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks the method's spec, the task's name and the model's, without torch. Raises `VeneerError`s with nearest names."""
        from veneer.spec import parse_spec

        spec = parse_spec(self.method)
        if self.slim is not None:
            _check_slim(self.slim, spec)
        if self.reversible is not None:
            _check_reversible(self)
        if bool(self.unlabelled) != any(slug == "self-training" for slug, _ in spec):
            raise BadValue("--unlabelled DOMAIN and '+ self-training' at the end of --method go together: give both or neither.")
        if self.task is not None:
            named(self.task)
        check_model(self.model)
        packed_base.check(self)

    @property
    def options(self) -> Options:
        """The part of the recipe that is the task's."""
        return Options(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Options) if f.name != "own"})

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, as JSON values."""
        return dataclasses.asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: all but the folder."""
        return {name: value for name, value in self.settings.items() if name != "out"}

    @property
    def folder(self) -> Path:
        """Where the run is kept: `out`, or a name made from the recipe, the same each time."""
        if self.out:
            return Path(self.out)
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:6]
        words = [Path(self.model).name, Path(self.data).stem, re.split(r"[(\s]", self.method)[0]]
        return Path("runs") / "-".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in (*words, digest))


def _own(task: str) -> set[str]:
    """Names of the settings that a task alone has."""
    return {option.name for option in card(named(task)[0]).options}


def check_model(name: str) -> None:
    """Refuses a model name that can only be a mistake; hub names pass. Raises `BadFile`, `UnknownName` or `MissingExtra`."""
    from veneer.assets import INSTALL, MODELS, available
    from veneer.errors import MissingExtra

    path = Path(name).expanduser()
    if name in MODELS:
        if not available(name):
            raise MissingExtra(f"The model {name!r} is not installed. Run `make carriers`, or:\n{INSTALL[name]}")
    elif path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "model_index.json")):
            raise BadFile(f"{name} is no model folder: it holds no config.json.")
    elif name.startswith((".", "/", "~")) or path.exists():
        raise BadFile(f"There is no model folder {name}.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ("/" not in name and nearest(name, MODELS)):
        raise UnknownName(
            f"There is no model {name!r}.{nearest(name, MODELS)} Give a folder, a hub name (owner/name), or one of {', '.join(MODELS)}."
        )


def _begun_by(folder: str) -> dict[str, Any]:
    """The settings of a run that another one goes on from, but for how long and where."""
    from veneer.train.outcome import read_run

    return {name: value for name, value in read_run(folder)["recipe"].items() if name not in ("out", "slim", "steps", "epochs")}


def _check_slim(folder: str, spec: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses a run that cannot be pruned, and methods other than its own: only what it is pruned by may change."""
    from veneer import registry
    from veneer.spec import parse_spec
    from veneer.train.outcome import Outcome

    before = parse_spec(Outcome.load(folder).method)
    pruning = {slug for slug, _ in before if registry.load(slug).prunes}
    if not pruning:
        raise BadValue(f"--slim {folder}: that run trained no masks to prune by. Its method has to end in '+ light-peft'.")
    trained, given = ([part for part in parts if part[0] not in pruning] for parts in (before, spec))
    if given != trained or len(spec) != len(before):
        raise BadValue(f"--slim {folder}: its modules go on; give --method only to change what stands in {', '.join(pruning)}(…).")


def _check_reversible(recipe: Recipe) -> None:
    """Refuses a spec that is none, and what does not go with reversible blocks."""
    from veneer.streams.scheme import Scheme

    Scheme.of(recipe.reversible or "")
    if recipe.checkpointing or recipe.slim:
        other = "checkpointing" if recipe.checkpointing else "slim"
        raise BadValue(f"recipe: reversible={recipe.reversible!r} and {other} exclude each other; leave one of them out.")


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text; flags may be text, too."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
