"""What one run adds to transformers' Trainer: batches of similar length, clock and memory, Ctrl-C, a watch on the loss."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerState

from veneer.errors import VeneerError
from veneer.train.state import read_state
from veneer.train.trainer import OPTIMISER, STATE, AdapterTrainer, last_checkpoint, put_back

if TYPE_CHECKING:
    from veneer.tasks.data import Row
    from veneer.tasks.metric import Measured
    from veneer.tasks.task import Task
    from veneer.train.interrupt import Interrupt


class BadLoss(VeneerError):
    """The loss is not a number any more."""


POOL = 50
"""Batches are made of rows of similar length out of so many batches' worth of shuffled rows."""


class Rows(Dataset):
    """Encoded rows, tokenised once; `order` sorts them by length where asked, so that evaluation pads little."""

    def __init__(self, task: Task, rows: Sequence[Row], processor: Any, by_length: bool = False) -> None:
        self.rows = rows
        self.items = task.encode(rows, processor)
        self.lengths = [len(item["input_ids"]) for item in self.items] if task.grouped else [0] * len(rows)
        self.order = list(range(len(rows)))
        if by_length:
            self.order.sort(key=lambda i: -self.lengths[i])  # longest first: memory that does not suffice fails at once

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[self.order[index]]


class SimilarLengths(Sampler):
    """A shuffled order in which neighbours have similar lengths; decided by seed and epoch alone, so that a run can resume."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        pool = self.batch * POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        last = [batches.pop()] if len(batches[-1]) < self.batch else []  # a short batch stays at the end
        chance.shuffle(batches)
        return iter([i for batch in batches + last for i in batch])


class Clock:
    """Seconds, seconds of each step and peak memory of training; survives checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: list[float] = []
        self.peak = 0
        self._since: float | None = None
        self._step_since = 0.0
        self._stop = threading.Event()

    def start(self) -> None:
        self._since = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._stop.clear()
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, process.memory_info().rss)

    def stop(self) -> None:
        self.note()
        self._since = None
        self._stop.set()

    def note(self) -> None:
        """Adds the time since the last call."""
        if self._since is not None:
            now = time.perf_counter()
            self.seconds, self._since = self.seconds + now - self._since, now
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def begin_step(self) -> None:
        self._step_since = time.perf_counter()

    def end_step(self) -> None:
        self.steps.append(time.perf_counter() - self._step_since)


class RunCallback(TrainerCallback):
    """Checkpoints often, heeds Ctrl-C after each step, stops early, keeps the log and the one progress bar."""

    def __init__(
        self,
        interrupt: Interrupt,
        *,
        checkpoint_every: int,
        patience: int | None,
        main: str,
        greater: bool,
        log: Callable[..., None],
        progress: bool,
    ) -> None:
        self.interrupt, self.checkpoint_every, self.patience = interrupt, checkpoint_every, patience
        self.main, self.greater, self.log, self.progress = main, greater, log, progress
        self.clock = Clock()
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.end_step()
        if self.bar is not None:
            self.bar.update(1)
        if state.global_step % self.checkpoint_every == 0:
            control.should_save = True
        if self.interrupt.asked:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):
            self.log("step" if "loss" in logs else "validation", step=state.global_step, **logs)
            if self.bar is not None and "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.patience is None:
            return
        values = [entry[f"eval_{self.main}"] for entry in state.log_history if f"eval_{self.main}" in entry]
        best = (max if self.greater else min)(values)
        if len(values) - 1 - values.index(best) >= self.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops the clock and ends the bar's line."""
        self.clock.stop()
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class RunTrainer(AdapterTrainer):
    """The Trainer of one run."""

    def prepare_run(self, task: Task, callback: RunCallback) -> None:
        self.task, self.callback = task, callback
        self.compute_metrics = self._validation_metrics
        if not task.per_token:  # their models give the mean over the batch, whatever number of tokens they are told
            self.model_accepts_loss_kwargs = False

    @property
    def clock(self) -> Clock:
        return self.callback.clock

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.callback.close()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows: Any = train_dataset or self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        return SimilarLengths(rows.lengths, batch, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            saved = last_checkpoint(Path(self.args.output_dir))
            kept = f"The last good checkpoint is kept: {saved}" if saved else "There was no checkpoint yet"
            raise BadLoss(
                f"The loss became {float(loss)} at step {self.state.global_step + 1}. {kept}.\n"
                f"Try a lower learning rate (it was {self.args.learning_rate:g}) or --precision fp32, with --again."
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for parameter in self.tuned.parameters():
            if not torch.isfinite(parameter).all():
                return  # the next step will report it; the last good checkpoint stays the last
        super()._save_checkpoint(model, trial)

    def extra_state(self) -> dict[str, Any]:
        self.clock.note()
        return {"seconds": self.clock.seconds, "steps": self.clock.steps, "peak": self.clock.peak}

    def take_extra_state(self, state: dict[str, Any]) -> None:
        self.clock.seconds, self.clock.steps, self.clock.peak = state["seconds"], list(state["steps"]), state["peak"]

    def take_end(self, checkpoint: Path) -> None:
        """What training had come to when it was stopped after its last step: its state, its clock, its best adapter."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self.take_extra_state(read_state(checkpoint / OPTIMISER)["extra"])
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        put_back(self.tuned, best or checkpoint)

    # -- measuring ----------------------------------------------------------------------------------------------

    def _validation_metrics(self, found: Any) -> dict[str, float]:
        return {name: metric.value for name, metric in self._measured(self.eval_dataset, found.predictions).metrics.items()}

    def _measured(self, rows: Any, kept: Any) -> Measured:
        """The task's metrics, with the outputs put back into the rows' own order."""
        import numpy as np

        back = np.empty_like(kept)
        back[rows.order] = kept
        return self.task.measure(back, rows.rows)

    def measure(self, rows: Sequence[Row], processor: Any) -> Measured:
        """Metrics of the model as it is on these rows."""
        dataset = Rows(self.task, rows, processor, by_length=True)
        self.compute_metrics, before = None, self.compute_metrics
        try:
            found = self.predict(dataset)
        finally:
            self.compute_metrics = before
        return self._measured(dataset, found.predictions)
