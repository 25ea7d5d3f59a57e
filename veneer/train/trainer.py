"""The glue between adapters and transformers' Trainer; works for TRL's trainers as well.

    class MyTrainer(AdapterTrainerMixin, SFTTrainer): ...

The model given to the trainer must have adapters attached (`veneer.attach`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

import veneer
from veneer.errors import Mismatch, VeneerError
from veneer.train.probe import Probe
from veneer.train.state import random_state, read_state, set_random_state, write_state

if TYPE_CHECKING:
    from veneer.tuned import Tuned

OPTIMISER = "optimizer.safetensors"
RANDOM = "random-{rank}.safetensors"
STATE = "trainer_state.json"


class VeneerCallback(TrainerCallback):
    """Drives the strategies of the attached adapters from any Trainer. `AdapterTrainerMixin` brings it along."""

    def __init__(self) -> None:
        self.resume: Any = None
        """State of the strategies to take up when training begins."""
        self.probe: Callable[[], torch.Tensor] | None = None
        self.prepared = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuned = veneer.of(model)
        tuned.begin(state.max_steps, self.probe)
        if self.resume is not None:
            tuned.load_strategy_state(self.resume)
            self.resume = None

    def before_clip(self, tuned: Tuned) -> None:
        """For loops that clip gradients: what comes before the step comes before that."""
        tuned.before_step()
        self.prepared = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.prepared:
            veneer.of(model).before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        veneer.of(model).after_step()
        self.prepared = False


class AdapterTrainerMixin:
    """Put it before a Trainer class: `class T(AdapterTrainerMixin, Trainer)`.

    Adds the strategies' loss terms in training, gives every tensor its method's learning-rate ratio, drives the strategies,
    and keeps checkpoints small and safe: adapters with their head, optimiser, schedule, random and strategy states; never
    the base, never a pickle. A checkpoint is a folder that `veneer.load` reads; it is there whole or not at all.
    """

    if TYPE_CHECKING:
        model: Any
        args: Any
        state: Any
        optimizer: Any
        lr_scheduler: Any
        accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with _with_adapters(model):
            super().__init__(*args, **kwargs)
        base: Any = self
        present = next((c for c in base.callback_handler.callbacks if isinstance(c, VeneerCallback)), None)
        self.strategies = present or VeneerCallback()
        self.probe = self.strategies.probe = Probe(lambda: iter(base.get_train_dataloader()), self._probe_loss)
        if present is None:
            base.add_callback(self.strategies)

    @property
    def tuned(self) -> Tuned:
        """The adapters of the model in training."""
        return veneer.of(self.accelerator.unwrap_model(self.model))

    def _probe_loss(self, batch: Any) -> torch.Tensor:
        model = self.accelerator.unwrap_model(self.model)
        return super().compute_loss(model, self._prepare_inputs(batch))  # type: ignore[misc, attr-defined]

    # -- loss and optimiser -------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return found
        extra = list(self.tuned.loss_terms().values())
        if not extra:
            return found
        loss, outputs = found if return_outputs else (found, None)
        loss = loss + torch.stack([term.to(loss.device, loss.dtype).reshape(()) for term in extra]).sum()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            special = {"params", "model", "optimizer_dict"} & options.keys()
            if special or not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
                return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
            self.optimizer = cls(self.tuned.param_groups(self.args.learning_rate, self.args.weight_decay), **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        """Strategies see the gradients first: what they mask does not count in the norm."""
        self.strategies.before_clip(self.tuned)
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    # -- writing checkpoints ------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        base: Any = self
        if base.is_deepspeed_enabled or base.is_fsdp_enabled:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        folder = Path(base._get_output_dir(trial))
        done = folder / f"checkpoint-{self.state.global_step}"
        work = folder / f".partial-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._note_best(folder)
        base.store_flos()
        base._save_rng_state(str(work))
        if self.args.should_save:
            base._save(str(work))
            base._save_optimizer_and_scheduler(str(work))
            self.state.save_to_json(str(work / STATE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(done, ignore_errors=True)
            work.rename(done)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _note_best(self, folder: Path) -> None:
        step = self.state.best_global_step
        if step and (step == self.state.global_step or (folder / f"checkpoint-{step}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{step}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            names = self.tuned.active
            for name in names:
                self.tuned.save(folder if len(names) == 1 else folder / name, name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        base: Any = self
        if base.is_deepspeed_enabled or base.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "strategies": self.tuned.strategy_state(),
            "probed": self.probe.taken,
            "extra": self.extra_state(),
        }
        write_state(Path(output_dir) / OPTIMISER, state)

    def _save_rng_state(self, output_dir: str) -> None:
        write_state(Path(output_dir) / RANDOM.format(rank=self.args.process_index), random_state())

    def extra_state(self) -> dict[str, Any]:
        """Further JSON values to keep with a checkpoint; for subclasses."""
        return {}

    def take_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what `extra_state` gave."""

    # -- reading checkpoints ------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        put_back(self.tuned, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        put_back(self.tuned, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        base: Any = self
        if checkpoint is None or base.is_deepspeed_enabled or base.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        state = read_state(Path(checkpoint) / OPTIMISER)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.strategies.resume = state["strategies"]
        self.probe.taken = state.get("probed", 0)
        self.take_extra_state(state["extra"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / RANDOM.format(rank=self.args.process_index)
        if checkpoint is not None and path.is_file():
            set_random_state(read_state(path))


class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer for a model with adapters."""


@contextlib.contextmanager
def _with_adapters(model: Any) -> Iterator[None]:
    """The Trainer refuses quantised models unless this mark says that something on them trains."""
    mark = "_hf_peft_config_loaded"
    if not getattr(model, "is_quantized", False) or getattr(model, mark, False):
        yield
        return
    setattr(model, mark, True)
    try:
        yield
    finally:
        setattr(model, mark, False)


def put_back(tuned: Tuned, folder: str | Path) -> None:
    """Copies the tensors of saved adapters into the attached ones of the same names.

    Raises `BadFile` for damaged files and `Mismatch` if names or shapes differ.
    """
    from veneer.store import read, tensors_of

    names = tuned.active
    for name in names:
        saved = read(Path(folder) if len(names) == 1 else Path(folder) / name).tensors
        own = tensors_of(tuned, name)
        wrong = [key for key in own.keys() | saved.keys() if key not in own or key not in saved or own[key].shape != saved[key].shape]
        if wrong:
            raise Mismatch(f"{folder}: the checkpoint does not fit the attached adapter {name!r} at {sorted(wrong)[0]}.")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(saved[key])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over, half-written ones removed."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
    steps = {int(p.name.removeprefix("checkpoint-")): p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            read_state(path / OPTIMISER)
            if (path / STATE).is_file():
                return path
        except VeneerError:
            continue
    return None
