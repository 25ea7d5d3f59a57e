"""A preference run: from a finished run, or from a base with a fresh adapter, to a run that prefers the better answers.

On from a finished run its adapter goes on training, and a frozen copy of it is the reference; without one the reference is the base.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from veneer.errors import BadValue, MissingExtra
from veneer.option import check, option
from veneer.tasks.metric import Metric, bootstrap, proportion
from veneer.tasks.preferences import Pairs, batches, for_trl
from veneer.train.outcome import RUN_FILE, read_run
from veneer.train.recipe import Recipe

LOSSES = (
    "sigmoid", "conservative", "ipo", "ipo-summed", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip
"""TRL's names, sigmoid being DPO; TRL's ipo divides by the answers' lengths. conservative (label smoothing) and ipo-summed are ours."""

SMOOTHED = ("conservative", "robust", "exo_pair", "aot")
"""Losses that use `label_smoothing`."""

REFERENCE = "reference"


@dataclass(frozen=True)
class Preference:
    """Settings of a preference run. Unknown names and values out of range raise before any model is loaded."""

    data: str = option("", "pairs: columns prompt, chosen and rejected in a file or data set, or stays-pairs")
    model: str | None = option(None, "without a run to go on from: a folder, a hub name, or a short name")
    method: str = option("lora", "without a run to go on from: method spec of a fresh adapter")
    out: str | None = option(None, "folder of the new run")
    steps: int = option(100, "optimiser steps", ge=1)
    lr: float = option(5e-5, "learning rate, far below that of supervised training", gt=0)
    batch_size: int = option(8, "pairs per step", ge=1)
    accumulate: int = option(1, "batches per optimiser step", ge=1)
    beta: float = option(0.1, "how closely the policy keeps to the reference", gt=0)
    loss: str = option("sigmoid", "TRL's loss; sigmoid is DPO", choices=LOSSES)
    label_smoothing: float = option(0.0, "share of pairs that may be the wrong way round", ge=0, lt=0.5)
    max_length: int = option(512, "longest prompt with answer in tokens", ge=8)
    warmup: float = option(0.06, "share of the steps in which the learning rate rises", ge=0, lt=1)
    train_rows: int | None = option(None, "at most so many pairs to train on", ge=1)
    validation_rows: int | None = option(None, "at most so many pairs to validate on", ge=1)
    test_rows: int | None = option(None, "at most so many pairs to test on", ge=1)
    checkpoint_every: int | None = option(None, "steps between checkpoints; a tenth of the run if not given", ge=1)
    seed: int = option(0, "seed of order and first values", ge=0)
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "number format", choices=("auto", "fp32", "bf16", "fp16"))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            limits = {k: v for k, v in f.metadata.items() if k != "help"}
            check("prefer", f.name, getattr(self, f.name), f.default, limits, str(f.type))
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise BadValue(f"prefer: loss={self.loss!r} takes no label_smoothing; it goes with {', '.join(SMOOTHED)}.")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise BadValue("prefer: loss='exo_pair' needs label_smoothing > 0, such as 0.01.")
        if not self.data:
            raise BadValue(f"prefer: data is missing. {type(self).__dataclass_fields__['data'].metadata['help'].capitalize()}.")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Preference:
        """From names and values as flags give them."""
        from veneer.train.recipe import _number

        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        return cls(**{k: _number(v) if kinds[k].startswith(("int", "float")) else v for k, v in settings.items() if v is not None})


class PreferenceRun:
    """One run; the same settings and folder go on where it stopped.

    Args:
        start: a finished run whose adapter goes on, or None: then `settings.model` and `settings.method`.

    Raises:
        BadValue: neither a run nor a model, a folder that holds another run, rows that are no pairs; BadFile: no such run.
    """

    def __init__(self, settings: Preference, start: Path | None, say: Callable[[str], None] = print) -> None:
        self.settings, self.start, self.say = settings, start, say
        if (start is None) == (settings.model is None):
            raise BadValue("prefer: give either a finished run to go on from, or --model (and --method) for a fresh adapter.")
        if start is not None and start.resolve() == self.folder.resolve():
            raise BadValue(f"--out {self.folder} is the run to go on from; choose another folder.")
        self.recipe = self._recipe()
        self.recipe.check()
        self.record = self._record()
        s = settings
        self.pairs = Pairs.read(s.data, (s.train_rows, s.validation_rows, s.test_rows)).splits

    @property
    def folder(self) -> Path:
        """Of the new run."""
        own = self.start.name if self.start else Path(str(self.settings.model)).name
        return Path(self.settings.out or f"runs/{own}-prefers")

    def _recipe(self) -> Recipe:
        s = self.settings
        if self.start is not None:
            return Recipe.of(read_run(self.start)["recipe"])
        own = {name: getattr(s, name) for name in ("model", "method", "data", "max_length", "device", "precision", "seed")}
        return Recipe.of({**own, "task": "chat", "text": "prompt", "label": "chosen"})

    def _record(self) -> dict[str, Any]:
        """What the folder's run.json says, or its beginning. Raises `BadValue` if it is another run's."""
        wanted = {"preference": dataclasses.asdict(self.settings), "start": str(self.start) if self.start else None}
        wanted = json.loads(json.dumps(wanted))
        if (self.folder / RUN_FILE).is_file():
            held = read_run(self.folder)
            if {k: held.get(k) for k in wanted} != wanted:
                raise BadValue(f"{self.folder} holds a run with other settings. Choose another folder with --out.")
            return held
        if self.start is not None:
            before = read_run(self.start)
            if before["task"]["name"] != "chat":
                raise BadValue(f"{self.start}: its task is {before['task']['name']}; preferences are between answers of the task chat.")
            return {"recipe": before["recipe"], "task": before["task"], **wanted}
        task = {"name": "chat", "options": {"text": "prompt", "label": "chosen", "max_length": self.settings.max_length}, "facts": {}}
        return {"recipe": self.recipe.identity, "task": task, **wanted}

    # -- work ---------------------------------------------------------------------------------------------------

    def go(self, progress: bool = True) -> dict[str, Any]:
        """Trains, measures on the test pairs before and after, saves. Gives the metrics; Ctrl-C keeps the last checkpoint."""
        from veneer.store import write_text

        if "outcome" in self.record:
            self.say(f"The run in {self.folder} is finished; nothing to do.")
            return dict(self.record["outcome"])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RUN_FILE, json.dumps(self.record, indent=1) + "\n")
        tuned, tokenizer, reference = self.loaded()
        for name, table in self.pairs.items():
            self.say(f"{name}: {len(table.rows)} pairs")
        before = self.record.get("before") or self.measured(tuned, tokenizer, reference)
        self.record["before"] = before
        write_text(self.folder / RUN_FILE, json.dumps(self.record, indent=1) + "\n")
        self.say(f"Before: {shown(before)}")
        self.trained(tuned, tokenizer, reference, progress)
        after = self.measured(tuned, tokenizer, reference)
        self.say(f"After: {shown(after)}")
        tuned.save(self.folder / "adapter", tuned.active[0], metrics=after, data=self.settings.data, task="chat", model=self.recipe.model)
        self.record["outcome"] = {"before": before, "after": after}
        write_text(self.folder / RUN_FILE, json.dumps(self.record, indent=1) + "\n")
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return dict(self.record["outcome"])

    def loaded(self) -> tuple[Any, Any, str | None]:
        """The model with the adapter that trains, its tokenizer, and the name of the reference adapter."""
        import veneer
        from veneer.tasks.chat import Chat
        from veneer.tasks.task import Options
        from veneer.train.run import load, pick
        from veneer.train.use import rebuild

        if self.start is None:
            device, precision = pick(self.recipe)
            model, tokenizer = load(self.recipe, Chat(Options()), device, precision)
            return veneer.attach(model, self.recipe.method, seed=self.settings.seed, head=False), tokenizer, None
        model, tokenizer, _ = rebuild(self.start)
        tuned = veneer.of(model)
        own = tuned.active[0]
        veneer.load(model, self.start / "adapter", REFERENCE)
        tuned.activate(own)
        return tuned, tokenizer, REFERENCE

    def measured(self, tuned: Any, tokenizer: Any, reference: str | None) -> dict[str, Any]:
        """On the test pairs: DPO's loss (or our own), share whose better answer is preferred more than by the reference, margin."""
        import torch

        from veneer.maths.preference import preference_loss
        from veneer.train.preference import measure

        s, rows = self.settings, self.pairs.test.rows
        parts = batches(rows, tokenizer, s.batch_size, s.max_length, next(tuned.model.parameters()).device)
        found = measure(tuned, parts, reference, s.beta)
        h = torch.tensor(found["h"], dtype=torch.float64)
        losses = preference_loss(h, s.beta, s.label_smoothing if s.loss == "conservative" else 0.0, s.loss == "ipo-summed").tolist()
        mean = lambda rows: float(rows.mean())  # noqa: E731
        metrics = {"loss": bootstrap(mean, losses), "preferred": proportion(int((h > 0).sum()), len(h))}
        metrics["margin"] = bootstrap(mean, (s.beta * h).tolist())
        for name in ("reward_chosen", "reward_rejected"):
            metrics[name] = bootstrap(mean, found[name])
        return {name: dataclasses.asdict(m) for name, m in metrics.items()}

    def own_loss(self) -> Callable[[Any], Any] | None:
        """The loss of the advantages where TRL has none."""
        from veneer.maths.preference import preference_loss

        s = self.settings
        if s.loss == "conservative":
            return partial(preference_loss, beta=s.beta, label_smoothing=s.label_smoothing)
        return partial(preference_loss, beta=s.beta, ipo=True) if s.loss == "ipo-summed" else None

    def trained(self, tuned: Any, tokenizer: Any, reference: str | None, progress: bool) -> None:
        try:
            from datasets import Dataset
            from trl import DPOConfig
        except ModuleNotFoundError as error:
            raise MissingExtra(f"Preference training needs {error.name}: pip install 'veneer[trl]'") from error
        from veneer.train.preference import PreferenceTrainer
        from veneer.train.trainer import last_checkpoint

        s, folder = self.settings, (self.folder / "checkpoints").resolve()
        device = str(next(tuned.model.parameters()).device)
        own = self.own_loss()
        args = DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=s.batch_size,
            gradient_accumulation_steps=s.accumulate,
            max_steps=s.steps,
            learning_rate=s.lr,
            warmup_steps=int(s.warmup * s.steps),
            beta=s.beta,
            loss_type=["sigmoid" if own else s.loss],
            label_smoothing=s.label_smoothing,
            max_length=s.max_length,
            seed=s.seed,
            save_strategy="steps",
            save_steps=s.checkpoint_every or max(1, s.steps // 10),
            save_total_limit=2,
            logging_steps=max(1, s.steps // 20),
            report_to="none",
            disable_tqdm=not progress,
            use_cpu=device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
        )
        rows = Dataset.from_list(for_trl(self.pairs.train.rows, bool(tokenizer.chat_template)))
        trainer = PreferenceTrainer(
            tuned.model, reference=reference, own_loss=own, args=args, train_dataset=rows, processing_class=tokenizer
        )
        checkpoint = last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is not None:
            self.say(f"Resuming after step {checkpoint.name.rpartition('-')[2]} of {s.steps}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def shown(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {Metric(**m)}" for name, m in metrics.items())
