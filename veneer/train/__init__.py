"""Training on transformers' Trainer: recipes, runs that resume, and the glue for anyone's own Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Recipe": "recipe",
    "Outcome": "outcome",
    "train": "run",
    "predict": "use",
    "evaluate": "use",
    "rebuild": "use",
    "Interrupted": "interrupt",
    "VeneerCallback": "trainer",
    "AdapterTrainerMixin": "trainer",
    "AdapterTrainer": "trainer",
}

if TYPE_CHECKING:
    from veneer.train.interrupt import Interrupted
    from veneer.train.outcome import Outcome
    from veneer.train.recipe import Recipe
    from veneer.train.run import train
    from veneer.train.trainer import AdapterTrainer, AdapterTrainerMixin, VeneerCallback
    from veneer.train.use import evaluate, predict, rebuild

__all__ = [
    "AdapterTrainer", "AdapterTrainerMixin", "Interrupted", "Outcome", "Recipe", "VeneerCallback",
    "evaluate", "predict", "rebuild", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.train' has no attribute {name!r}")
    return getattr(import_module(f"veneer.train.{_HOME[name]}"), name)
