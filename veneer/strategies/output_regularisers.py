"""Output regularisers: logits that stay near the base's, varied, and in few directions (2024, arXiv:2408.04556)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from veneer import anatomy
from veneer.errors import BadValue, Unsupported
from veneer.maths.logits import correlation, direction_gap, divergence, entropy, leading_energy, leading_share
from veneer.strategies.passes import Lasting, mask_in, named_inputs, trains
from veneer.strategies.probing import undisturbed
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.ba_lora import BALoRA
    from veneer.tuned import Tuned


class LastPass:
    """Inputs and output of the last training pass, until they are taken."""

    def __init__(self, model: nn.Module, acts: Callable[[], bool]) -> None:
        self.acts = acts
        self.kept: tuple[tuple, dict[str, Any], Any, Any] | None = None
        self.handles = [model.register_forward_hook(self.keep, with_kwargs=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def keep(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.acts():
            kind = next(model.parameters()).device.type
            precision = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            self.kept = args, kwargs, output, precision

    def take(self) -> tuple[tuple, dict[str, Any], Any, Any] | None:
        kept, self.kept = self.kept, None
        return kept


def logits_of(output: Any) -> Tensor:
    """The logits [N, D] or [N, T, D] of a model's output."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple):
        found = next((t for t in found if isinstance(t, Tensor) and t.ndim > 1), None)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        raise Unsupported("BA-LoRA: the model gives no logits [rows, classes] or [rows, tokens, vocabulary].")
    return found


def reads_ahead(model: nn.Module) -> bool:
    """Whether the logits at a token stand for the next one: in models whose one stack is causal."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and any(s.causal and not s.side for s in anatomy.sites(model))


def counted_tokens(inputs: Mapping[str, Any], rows: torch.Size) -> Tensor:
    """Which tokens have a label that is not ignored [N, T]; without labels, which are no padding."""
    labels, mask = mask_in(inputs, "labels"), mask_in(inputs, "attention_mask")
    if labels is not None and labels.shape == rows:
        return labels != -100
    return mask.bool() if mask is not None and mask.shape == rows else torch.ones(rows, dtype=torch.bool)


def token_rows(Z: Tensor, counted: Tensor, shift: bool) -> Tensor:
    """Logits [M, V] at the tokens that count; with a shift, those from which they are predicted, one before."""
    counted = counted.to(Z.device)
    return Z[:, :-1][counted[:, 1:]] if shift else Z[counted]


def progress_factors(schedule: str, progress: float) -> tuple[float, float]:
    """Factors on l1 and on l2 and l3 after this share of the steps."""
    if schedule == "constant":
        return 1.0, 1.0
    later = {"two_phase": min(max((progress - 0.2) / 0.05, 0.0), 1.0), "linear": progress, "quadratic": progress**2}[schedule]
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2, later


class OutputRegularisers(Strategy):
    """l1 · consistency + l2 · diversity + l3 · svd of the last training pass, the base's answers from a second pass without adapters.

    `values` has the three terms without their weights."""

    def __init__(self, how: BALoRA) -> None:
        self.how, self.step = how, 0
        self.steps: int | None = how.steps
        self.values: dict[str, Tensor] = {}
        self.tuned: Tuned | None = None
        self.last: LastPass | None = None
        self.hooks: Lasting | None = None
        self.ahead, self.warned = False, False

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.hooks = self.last = None
        for method in {part.method for part in tuned.adapters[name].parts}:
            if getattr(method, "start", "") == "pissa" and getattr(method, "dropout", 0):
                raise BadValue(f"BA-LoRA: {method.spec} drops out principal directions; use dropout=0 with start='pissa'.")
        self.steps = self.how.steps or total_steps or self.steps
        if self.how.off:
            return
        self.tuned, self.ahead = tuned, reads_ahead(tuned.model)
        self.last = LastPass(tuned.model, partial(trains, tuned, name))
        self.hooks = Lasting(self.last.handles)

    def loss_terms(self) -> dict[str, Tensor]:
        kept = self.last.take() if self.last is not None else None
        if kept is None:
            return {}
        args, kwargs, output, precision = kept
        student = logits_of(output)
        task = self.how.task_of(student.ndim)
        (l1, l2, l3, k), (decay, grow) = self.how.numbers(task), self.factors()
        weights: dict[str, Any] = {"consistency": l1 * decay, "diversity": l2 * grow, "svd": l3 * grow}
        teacher = self.teacher(args, kwargs, precision) if weights["consistency"] else None
        if teacher is not None and teacher.shape != student.shape:
            raise Unsupported(f"BA-LoRA: {self.how.limits['tokens']}.")
        if self.selects(task):
            assert self.tuned is not None
            counted = counted_tokens(named_inputs(self.tuned.model, args, kwargs), student.shape[:2])
            shift = self.how.shift and self.ahead
            student = token_rows(student, counted, shift)
            teacher = None if teacher is None else token_rows(teacher, counted, shift)
        terms = self.terms(task, teacher, student, k, [name for name, weight in weights.items() if weight])
        self.values = {name: term.detach() for name, term in terms.items()}
        if self.how.adaptive and teacher is not None and "consistency" in terms:
            weights["consistency"] = weights["consistency"] * certainty(teacher)
        return {name: weights[name] * term for name, term in terms.items()}

    def selects(self, task: str) -> bool:
        """Whether only the tokens that have labels count."""
        return self.how.version == "v2" and task == "nlg"

    def factors(self) -> tuple[float, float]:
        if self.how.plan == "constant":
            return progress_factors("constant", 0.0)
        if not self.steps:
            raise BadValue(
                f"BA-LoRA: schedule={self.how.plan!r} needs the number of optimiser steps: give steps=…, call tuned.begin(total_steps), "
                "or use schedule='constant'."
            )
        return progress_factors(self.how.plan, min(self.step / self.steps, 1.0))

    @torch.no_grad()
    def teacher(self, args: tuple, kwargs: dict[str, Any], precision: Any) -> Tensor:
        """The base's logits on the same batch, in evaluation mode."""
        assert self.tuned is not None
        with undisturbed(self.tuned.model), self.tuned.disabled() as model, precision:
            return logits_of(model(*args, **kwargs))

    def terms(self, task: str, teacher: Tensor | None, student: Tensor, k: int, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The terms wanted, without weights, of all logits or of the rows that count."""
        found: dict[str, Tensor] = {}
        if "consistency" in wanted and teacher is not None and len(student):
            found["consistency"] = self.consistency(task, teacher, student)
        if "diversity" in wanted and len(student):
            found["diversity"] = self.diversity(task, student)
        if "svd" in wanted and len(student) >= (2 if self.selects(task) else 1):
            found["svd"] = self.spectral(task, student, k)
        return found

    def consistency(self, task: str, teacher: Tensor, student: Tensor) -> Tensor:
        if self.how.version == "v2":
            return divergence(teacher, student, self.how.T)
        if task == "nlu":
            return direction_gap(teacher, student)
        return student.shape[1] * divergence(teacher, student)  # a sum over tokens, a mean over samples

    def diversity(self, task: str, student: Tensor) -> Tensor:
        if task == "nlg":
            return -entropy(student, self.how.top_k if self.how.version == "v2" else None)
        if len(student) < 2:
            raise BadValue(
                "BA-LoRA: a batch of one sample has no covariance for the diversity term; use larger batches (drop the last one) or l2=0."
            )
        return correlation(student)

    def spectral(self, task: str, student: Tensor, k: int) -> Tensor:
        Z = student.flatten(1)
        most = min(Z.shape)
        if k > most and not self.warned:
            what = f"BA-LoRA: k={k} is more than the {most} singular values of {Z.shape[0]} × {Z.shape[1]} logits; all are taken."
            warnings.warn(what, stacklevel=2)
            self.warned = True
        if self.selects(task):
            generator = Generator().manual_seed(self.how.seed + self.step)
            return -leading_energy(Z, min(k, most), self.how.svd, generator)
        return -leading_share(Z, min(k, most))

    def after_step(self) -> None:
        self.step += 1
        if self.last is not None:
            self.last.take()  # a loop that adds no loss terms must not keep the pass's graph

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.steps = state["step"], state["steps"]


@torch.no_grad()
def certainty(teacher: Tensor) -> Tensor:
    """0.1 + 0.9 · (1 − H / ln V), H the mean entropy of the teacher: less consistency where it does not know."""
    return 0.1 + 0.9 * (1 - entropy(teacher) / max(math.log(teacher.shape[-1]), 1e-12))
