"""One run, from recipe to outcome: it resumes by itself, says what it does, and leaves whole files behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadValue, MissingExtra
from veneer.tasks.metric import Measured, Metric
from veneer.tasks.task import Task, prepare
from veneer.train import packed_base
from veneer.train.interrupt import Interrupt, Interrupted
from veneer.train.outcome import RUN_FILE, Outcome, read_run
from veneer.train.recipe import Recipe

if TYPE_CHECKING:
    from veneer.method import Method
    from veneer.train.loop import RunTrainer
    from veneer.tuned import Tuned

LOG_FILE = "log.jsonl"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
DEFAULT_EPOCHS = 3.0
DEFAULT_LR = 1e-3
"""For methods that name no `default_lr` of their own."""

Say = Callable[[str], None]


def train(recipe: Recipe, *, again: bool = False, progress: bool = True, say: Say = print, command: str | None = None) -> Outcome:
    """Trains, evaluates on the test rows and saves the adapter; goes on where an interrupted run of the same recipe stopped.

    Args:
        again: start anew although the run is finished or begun.
        progress: show a progress bar.
        say: takes the lines that tell what is done.
        command: what the user typed, for the advice on how to go on.

    Raises:
        Interrupted: Ctrl-C; everything up to the last step is saved.
        VeneerError: a mistake in recipe or data (before any model is loaded), or a loss that is not a number.
    """
    recipe.check()
    if os.environ.get("RANK", "0") != "0":
        say = _nothing
    folder = recipe.folder
    record = _begun(folder, recipe, again)
    if record.get("outcome") and not again:
        say(f"The run in {folder} is finished; nothing to do. To start anew: --again")
        return Outcome.load(folder)
    task, lines = prepare(recipe.data, recipe.task, recipe.options)
    with _claimed(folder), Interrupt() as interrupt:
        run = Run(recipe, task, folder, interrupt, progress, say, command)
        if again:
            run.forget()
        for line in lines:
            say(line)
        try:
            return run.go(_begun(folder, recipe, False))
        except KeyboardInterrupt:
            raise run.interrupted() from None


def _nothing(line: str) -> None:
    pass


def _begun(folder: Path, recipe: Recipe, again: bool) -> dict[str, Any]:
    """The record of an earlier run in the folder, {} if there is none. Raises `BadValue` if it had other settings."""
    if not (folder / RUN_FILE).is_file():
        return {}
    record = read_run(folder)
    before = {**{f.name: f.default for f in dataclasses.fields(Recipe)}, **record["recipe"]}  # settings that are newer than the run
    now = json.loads(json.dumps(recipe.identity))
    other = [name for name in now if before.get(name) != now[name]]
    if other and not again:
        shown = ", ".join(f"{name} {before.get(name)!r} → {now[name]!r}" for name in other[:3])
        raise BadValue(f"{folder} holds a run with other settings ({shown}). Choose another folder with --out, or start anew with --again.")
    return record


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it while this one runs; the claim ends with the process."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  (held open for the whole run)
    except OSError as error:
        raise BadValue(f"The folder {folder} cannot be written: {error.strerror}. Choose another with --out.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadValue(f"Another process is training in {folder}. Wait for it, or choose another folder with --out.") from None
        yield


class Run:
    """The steps of `train`, sharing folder and recipe."""

    def __init__(
        self, recipe: Recipe, task: Task, folder: Path, interrupt: Interrupt, progress: bool, say: Say, command: str | None
    ) -> None:
        self.recipe, self.task, self.folder, self.interrupt = recipe, task, folder, interrupt
        self.progress, self.say, self.command = progress, say, command
        self.main = os.environ.get("RANK", "0") == "0"
        self.step = 0

    def go(self, record: dict[str, Any]) -> Outcome:
        recipe, task = self.recipe, self.task
        device, precision = pick(recipe)
        self.say(f"Device: {device}; precision: {precision}")
        model, processor = load(recipe, task, device, precision)
        record = record or {"recipe": recipe.identity, "task": about(task), "device": device, "precision": precision}
        self.write(record)
        tuned, lr = self.attach(model, processor)
        for line in task.before(tuned, processor, self.folder):
            self.say(line)
        trainer = self.trainer(tuned, processor, lr, device, precision)
        if recipe.base and "base" not in record:
            record.update(self.base(tuned, trainer, processor))
            self.write(record)
        if "base" in record:
            self.say(f"Untouched base on {len(task.splits.test)} test rows: {_shown(_metrics(record['base']))}")
        self.run(trainer)
        found = self.test(trainer, processor, "adapted")
        self.say(f"Adapted: {_shown(found.metrics)}")
        for line in task.after(tuned, processor, self.folder) if self.main else ():
            self.say(line)
        outcome = self.outcome(tuned, trainer, found, _metrics(record.get("base", {})))
        if self.main:
            self.write({**record, "outcome": outcome.as_json()})
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        self.log("finished", metrics=_as_json(found.metrics))
        self.say(f"Adapter: {self.folder / ADAPTER} ({outcome.adapter_bytes / 1e3:.0f} kB)")
        return outcome

    # -- parts --------------------------------------------------------------------------------------------------

    def attach(self, model: Any, processor: Any) -> tuple[Tuned, float]:
        """Attaches the method; says how many sites it found."""
        import veneer

        recipe = self.recipe
        method = veneer.parse(recipe.method)
        wanted = max((part.batches_wanted for part in method.parts if part.calibrates or part.reads_gradients), default=0)
        model.train(False)
        if recipe.slim:
            tuned = self.slimmed(model, method, self.batches(processor, 1, model)[0])
        else:
            batches = self.batches(processor, wanted, model) if wanted else None
            if recipe.reversible:
                self.say(str(veneer.reversible(model, recipe.reversible)))
            tuned = veneer.attach(
                model, method, seed=recipe.seed, head=recipe.head, allow_unmatched=recipe.allow_unmatched, batches=batches
            )
        lr = recipe.lr or default_rate(method)
        self.say(str(tuned.summary()))
        self.say(f"Learning rate: {lr:g}{'' if recipe.lr else ' (the default; --lr changes it)'}; seed {recipe.seed}")
        return tuned, lr

    def batches(self, processor: Any, count: int, model: Any) -> list[dict[str, Any]]:
        """The first training rows, in batches, where the model is."""
        rows, size = self.task.splits.train.rows, self.recipe.batch_size
        encoded = self.task.encode(rows[: count * size], processor)
        collate = self.task.collator(processor)
        device = next(model.parameters()).device
        parts = ([encoded[k] for k in range(i, min(i + size, len(encoded)))] for i in range(0, len(encoded), size))
        return [{k: v.to(device) for k, v in collate(part).items()} for part in parts]

    def slimmed(self, model: Any, method: Method, batch: dict[str, Any]) -> Tuned:
        """The model and adapter of the run that this one goes on from, pruned as this one's method says."""
        import veneer

        assert self.recipe.slim is not None
        before = veneer.load(model, Path(self.recipe.slim) / ADAPTER)
        rule = next(part for part in method.parts if part.prunes)
        size = before.base_size()
        tuned = veneer.slim(before, batch=batch, **{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})
        self.say(f"Pruned: {tuned.base_size():,} of the base's {size:,} parameters are left")
        return tuned

    def base(self, tuned: Tuned, trainer: RunTrainer, processor: Any) -> dict[str, Any]:
        """The untouched base's metrics, for the record; where it is pruned already, those of the run before if it had the same rows."""
        recipe = self.recipe
        if not recipe.slim:
            with tuned.disabled():
                return {"base": _as_json(self.test(trainer, processor, "base").metrics)}
        before = read_run(recipe.slim)
        other = Recipe.of(before["recipe"])
        same = (other.data, other.options) == (recipe.data, recipe.options)
        return {"base": before["base"]} if same and "base" in before else {}

    def trainer(self, tuned: Tuned, processor: Any, lr: float, device: str, precision: str) -> RunTrainer:
        from transformers import PrinterCallback, ProgressCallback, TrainingArguments
        from transformers.training_args import OptimizerNames

        from veneer.train.loop import Rows, RunCallback, RunTrainer

        recipe, task = self.recipe, self.task
        total = self.total()
        every = min(recipe.eval_every or max(1, total // 5), total)
        folder = (self.folder / CHECKPOINTS).resolve()
        args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.eval_batch_size or 2 * recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulate,
            max_steps=total,
            learning_rate=lr,
            weight_decay=recipe.weight_decay,
            warmup_steps=int(recipe.warmup * total),
            lr_scheduler_type=recipe.schedule,
            max_grad_norm=recipe.clip,
            seed=recipe.seed,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=not self.last_counts(),
            metric_for_best_model=task.main,
            greater_is_better=task.greater,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=device.startswith("cuda"),
            use_cpu=device == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
        )
        optimizer, note = packed_base.optimizer(recipe, device)
        if optimizer is not None:
            args.optim = OptimizerNames(optimizer)
        if note:
            self.say(note)
        if recipe.checkpointing:
            # set on the arguments only when wanted: the Trainer renames this setting and warns about it in every run
            setattr(args, "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing", True)
        if os.environ.get("WORLD_SIZE") is None:
            args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used under torchrun or accelerate, not by threads
        callback = RunCallback(
            self.interrupt,
            checkpoint_every=recipe.checkpoint_every or max(1, total // 20),
            patience=recipe.patience,
            main=task.main,
            greater=task.greater,
            log=self.log,
            progress=self.progress and self.main,
        )
        made = RunTrainer(
            model=tuned.model,
            args=args,
            train_dataset=Rows(task, task.splits.train.rows, processor),
            eval_dataset=Rows(task, task.splits.validation.rows, processor, by_length=True),
            data_collator=task.collator(processor),
            preprocess_logits_for_metrics=task.reduce,
            callbacks=[callback],
        )
        for loud in (PrinterCallback, ProgressCallback):
            made.remove_callback(loud)
        made.prepare_run(task, callback)
        return made

    def last_counts(self) -> bool:
        """Whether the last step is what is kept, not the best one."""
        import veneer

        return self.task.last_counts or (not self.recipe.slim and any(part.last_counts for part in veneer.parse(self.recipe.method).parts))

    def total(self) -> int:
        """Number of optimiser steps."""
        recipe = self.recipe
        if recipe.steps:
            return recipe.steps
        each = recipe.batch_size * recipe.accumulate * int(os.environ.get("WORLD_SIZE", 1))
        return max(1, math.ceil((recipe.epochs or DEFAULT_EPOCHS) * math.ceil(len(self.task.splits.train) / each)))

    def run(self, trainer: RunTrainer) -> None:
        """Trains from the last checkpoint, or from the start."""
        from transformers import set_seed

        from veneer.train.trainer import last_checkpoint

        folder = self.folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = last_checkpoint(folder.resolve())
        if checkpoint is not None:
            self.say(f"Resuming after step {checkpoint.name.rpartition('-')[2]} of {self.total()}")
        self.log("resumed" if checkpoint else "started", checkpoint=checkpoint.name if checkpoint else None)
        set_seed(self.recipe.seed)  # whatever came before must not change the run
        self.interrupt.patient = True
        try:
            if checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) >= self.total():
                trainer.take_end(checkpoint)  # the Trainer would take one step more
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.interrupt.patient = False
        if self.interrupt.asked:
            raise KeyboardInterrupt

    def test(self, trainer: RunTrainer, processor: Any, what: str) -> Measured:
        """The metrics on the test rows."""
        task = self.task
        rows = task.splits.test.rows
        found = trainer.measure(rows, processor)
        further = task.generate(trainer.model, processor, rows, trainer.args.per_device_eval_batch_size)
        if further is not None:
            found = Measured({**further.metrics, **found.metrics}, found.correct if further.correct is None else further.correct)
        self.log("test", model=what, metrics=_as_json(found.metrics))
        return found

    def outcome(self, tuned: Tuned, trainer: RunTrainer, found: Measured, base: dict[str, Metric]) -> Outcome:
        """Saves the adapter and puts the numbers together."""
        summary, clock = tuned.summary(), trainer.clock
        folder = self.folder / ADAPTER
        if self.main:
            facts = {"model": self.recipe.model, "data": self.recipe.data, "task": self.task.slug, "steps": trainer.state.global_step}
            tuned.save(folder, metrics=_as_json(found.metrics), **facts)
        main = self.task.headline if self.task.headline in found.metrics else self.task.main
        return Outcome(
            folder=self.folder,
            method=self.recipe.method,
            trained=summary.trained,
            total=summary.total,
            metrics=found.metrics,
            base_metrics=base,
            seconds=clock.seconds,
            seconds_per_step=statistics.median(clock.steps) if clock.steps else 0.0,
            peak_memory=clock.peak,
            adapter_bytes=sum(f.stat().st_size for f in folder.glob("*") if f.is_file()),
            main=main,
            steps=trainer.state.global_step,
            best_step=trainer.state.best_global_step,
            curve=_curve(trainer.state.log_history),
            correct=found.correct,
        )

    # -- files --------------------------------------------------------------------------------------------------

    def write(self, record: dict[str, Any]) -> None:
        from veneer.store import write_text

        if self.main:
            write_text(self.folder / RUN_FILE, json.dumps(record, indent=1) + "\n")

    def log(self, event: str, **facts: Any) -> None:
        """One more line of the run's log."""
        if self.main:
            line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def forget(self) -> None:
        """Removes what an earlier run left, except its log."""
        if self.main:
            for name in (CHECKPOINTS, ADAPTER):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            self.log("started anew")

    def interrupted(self) -> Interrupted:
        """The error that tells what was saved and how to go on."""
        from veneer.train.trainer import last_checkpoint

        saved = last_checkpoint(self.folder / CHECKPOINTS)
        what = f"step {saved.name.rpartition('-')[2]} of {self.total()} is saved in {self.folder}" if saved else "no step was done yet"
        self.log("interrupted", checkpoint=saved.name if saved else None)
        return Interrupted(f"Interrupted: {what}.\nTo go on: {self.command or f'veneer train {_flags(self.recipe)}'}")


# -- device, model, numbers -------------------------------------------------------------------------------------


def pick(recipe: Recipe) -> tuple[str, str]:
    """The device and the number format: what was asked for if it can be had, else what works here.

    Raises `BadValue` for a device or format that this machine lacks.
    """
    _quiet()
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    device = recipe.device if recipe.device != "auto" else "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise BadValue(f"There is no {device} device here. Leave --device out: it would be {'cuda' if cuda else 'cpu'}.")
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    precision = recipe.precision if recipe.precision != "auto" else "bf16" if half else "fp32"
    if precision == "fp16" and device == "cpu":
        raise BadValue("precision='fp16' cannot train on a CPU; use fp32 or bf16.")
    return device, precision


def load(recipe: Recipe, task: Task, device: str, precision: str) -> tuple[Any, Any]:
    """The pretrained model with its task head, on the device, and its tokenizer or image processor; the same every time."""
    _quiet()
    import torch
    from transformers import set_seed

    set_seed(recipe.seed)  # a fresh head is drawn here
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model, processor = task.load(recipe.model, dtype=dtype, **packed_base.loading(recipe, dtype, device))
    if recipe.base_dropout is not None:
        _set_dropout(model, recipe.base_dropout)
    config: Any = model.config
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return (model if recipe.quantise != "none" else model.to(device)), processor


def default_rate(method: Method) -> float:
    """The lowest rate of its own that a part of the method has; strategies that name none go along with the others."""
    from veneer.method import StrategyMethod

    silent = (part for part in method.parts if isinstance(part, StrategyMethod) and "default_lr" not in vars(type(part)))
    skipped = {id(part) for part in silent}
    return min((type(part).default_lr for part in method.parts if id(part) not in skipped), default=DEFAULT_LR)


def _set_dropout(model: Any, p: float) -> None:
    """One dropout for all of the base: its dropout layers, and the probabilities that attention modules hold as numbers."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p


def _quiet() -> None:
    """Keeps the libraries' reports off the screen; what matters is said by us."""
    import logging

    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from transformers.utils import logging as library
    except ModuleNotFoundError as error:
        raise MissingExtra(f"Training needs the package {error.name!r}. Run: pip install veneer") from None
    library.set_verbosity_error()
    library.disable_progress_bar()


def about(task: Task) -> dict[str, Any]:
    """What has to be kept of a task to use the trained model without its data."""
    return {"name": task.slug, "options": dataclasses.asdict(task.options), "facts": task.facts}


def _curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log as one row a step, without clock readings."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        kept = {
            name: value
            for name, value in entry.items()
            if name in ("loss", "learning_rate", "grad_norm", "epoch")
            or (name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time")))
        }
        if "loss" in kept or any(name.startswith("eval_") for name in kept):
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return [rows[step] for step in sorted(rows)]


def _as_json(metrics: dict[str, Metric]) -> dict[str, Any]:
    return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}


def _metrics(found: dict[str, Any]) -> dict[str, Metric]:
    return {name: Metric(**values) for name, values in found.items()}


def _shown(metrics: dict[str, Metric], most: int = 16) -> str:
    said = [f"{name} {metric}" for name, metric in metrics.items()]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more in {RUN_FILE}" if len(said) > most else "")


def _flags(recipe: Recipe) -> str:
    """The recipe as command-line flags."""
    defaults = {f.name: f.default for f in dataclasses.fields(Recipe)}
    changed = {name: value for name, value in recipe.settings.items() if value != defaults[name]}
    return " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in changed.items())
