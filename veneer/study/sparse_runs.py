"""The runs behind a sparse scaling law: language models of several sizes, each pruned while it trains, for several lengths.

Every length is a run of its own, with its own pruning and learning-rate schedule; all see the same data in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue, VeneerError
from veneer.maths.scaling_law import LEAST_RUNS, c_mul
from veneer.option import check, option

if TYPE_CHECKING:
    from torch import Tensor, nn

RUNS = "runs.jsonl"
HEAD = 16
"""Width of an attention head of the models built here."""
BYTES = 256
LEAST_STEPS = 20
COOLDOWN = 0.25
"""Share of the steps in which the learning rate falls: those with fixed masks."""
HELD_OUT = 65_536
"""At most so many held-out tokens measure a run."""


@dataclass(frozen=True)
class Design:
    """What is trained: every size at every sparsity for every length. Values out of range raise before any work.

    Args:
        widths: of decoders built here, which read bytes; models: folders or names of pretrained causal language models instead.
        sparsities: shares of zeros, as text, or n:m.
        lengths: tokens of training (bytes, for models built here); for pretrained models those of fine-tuning.
    """

    data: str = option("movie-sentiment", "text to train on: a file, a folder, movie-sentiment, or a `datasets` name")
    text: str | None = option(None, "column of the text")
    layers: int = option(2, "blocks of the models built here", ge=1)
    context: int = option(64, "tokens in a row", ge=2)
    batch_size: int = option(8, "rows of an optimiser step", ge=1)
    lr: float | None = option(None, "highest learning rate; 0.32 / width, or 3e-4 for pretrained models, if not given", gt=0)
    pretrain: int = option(0, "tokens that the models built here are trained on first, dense, once for each size", ge=0)
    tables: str = option("auto", "embedding and output tables: auto prunes them to 1 − √(1 − S)", choices=("auto", "dense"))
    nm: str = option("groups", "how n:m comes about: group by group, or entry by entry", choices=("groups", "iterative"))
    seed: int = option(0, "seed of first values and order", ge=0)
    widths: tuple[int, ...] = (16, 32, 64)
    models: tuple[str, ...] = ()
    sparsities: tuple[str, ...] = ("0", "0.5", "0.75", "0.875", "2:4")
    lengths: tuple[int, ...] = (240_000, 480_000, 960_000)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if "help" in f.metadata:
                limits = {k: v for k, v in f.metadata.items() if k != "help"}
                check("scaling-law", f.name, getattr(self, f.name), f.default, limits, str(f.type))
        from veneer.strategies.gradual_pruning import Goal

        goals = [Goal.of(s) for s in self.sparsities]
        for width in () if self.models else self.widths:
            if width < HEAD or width % HEAD:
                raise BadValue(f"scaling-law: width {width} is out of range; it must be a multiple of {HEAD}, {HEAD} or more.")
            for goal in goals:
                for inputs in (width, mlp_width(width)):
                    if goal.m and inputs % goal.m:
                        raise BadValue(
                            f"scaling-law: {goal.pattern} does not fit width {width}: m={goal.m} does not divide the {inputs} inputs of a "
                            f"layer; choose an m that divides {HEAD}."
                        )
        step = self.context * self.batch_size
        for length in self.lengths:
            if length < LEAST_STEPS * step:
                raise BadValue(
                    f"scaling-law: {length} tokens are {length // step} steps of {step}; a pruning schedule needs at least {LEAST_STEPS} "
                    f"steps, {LEAST_STEPS * step} tokens."
                )
        counts = len(self.sizes), len(set(self.sparsities)), len(set(self.lengths))
        if math.prod(counts) < LEAST_RUNS:
            raise BadValue(
                f"scaling-law: {counts[0]} sizes × {counts[1]} sparsities × {counts[2]} lengths are {math.prod(counts)} runs; the seven "
                f"coefficients of the law need at least {LEAST_RUNS}."
            )

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes."""
        return tuple(dict.fromkeys(self.models or (f"width {w}" for w in self.widths)))

    @property
    def identity(self) -> dict[str, Any]:
        """What runs have to have in common to belong to one law."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("widths", "models", "sparsities", "lengths")}

    def grid(self) -> list[tuple[str, str, int]]:
        """(size, sparsity, length) of every run, small ones first."""
        return [(m, s, d) for m in self.sizes for d in sorted(set(self.lengths)) for s in dict.fromkeys(self.sparsities)]

    def steps(self, length: int) -> int:
        return max(1, round(length / (self.context * self.batch_size)))


def mlp_width(width: int) -> int:
    """Channels of the feed-forward layers: about 8/3 of the width, a multiple of 16."""
    return max(16, round(width * 8 / 3 / 16) * 16)


# -- runs on disk -----------------------------------------------------------------------------------------------


def finished(folder: Path, design: Design) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The runs that a folder holds, by (size, sparsity, length).

    Raises `BadFile` with the line of what cannot be read, and `BadValue` if they were made with other settings.
    """
    path = folder / RUNS
    found = {}
    if not path.is_file():
        return {}
    now = json.loads(json.dumps(design.identity))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            run = json.loads(line)
            key, before = (run["model"], run["sparsity"], int(run["length"])), dict(run["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(
                f"{path}, line {number}: not a run ({type(error).__name__}: {error}). Remove the line; it is trained again."
            ) from None
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            shown = ", ".join(f"{name} {before.get(name)!r} → {now[name]!r}" for name in other[:3])
            raise BadValue(
                f"{path} holds runs with other settings ({shown}). Choose another folder with --out, or start anew with --again."
            )
        found[key] = run
    return found


def record(folder: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Writes all finished runs, one a line; the file is whole at any time."""
    from veneer.store import write_text

    write_text(folder / RUNS, "".join(json.dumps(run) + "\n" for run in runs))


# -- training ---------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """Token ids of the training and the held-out text."""

    train: Tensor
    held_out: Tensor


class Trainer:
    """Trains single runs of a design. Text and tokenizer are read once."""

    def __init__(self, design: Design, folder: Path, device: str = "cpu") -> None:
        from veneer.tasks.task import Options, prepare

        self.design, self.folder, self.device = design, folder, device
        task, self.lines = prepare(design.data, "causal-lm", Options(text=design.text))
        column = task.options.text or "text"
        self.rows = {name: [row[column] for row in table.rows] for name, table in task.splits.items()}
        random.Random(design.seed).shuffle(self.rows["train"])
        self.base = cache(self.pretrained)
        self.words = cache(self.tokens)

    def check(self) -> None:
        """Raises `BadValue` before any training for a sparsity that does not fit a model, or for models that cannot be compared."""
        from veneer.strategies.gradual_pruning import Goal, GradualPruning

        words = {}
        for size in self.design.sizes:
            model = self.skeleton(size)
            words[size] = model.config.vocab_size
            for sparsity in self.design.sparsities:
                GradualPruning.of(model, Goal.of(sparsity), tables=self.design.tables)
        if len(set(words.values())) > 1:
            shown = ", ".join(f"{n} ({size})" for size, n in words.items())
            raise BadValue(
                f"scaling-law: the models have vocabularies of {shown}; losses per token can be compared only within one tokenizer. "
                "Choose models of one family."
            )

    def skeleton(self, size: str) -> Any:
        """The model's shape, without weights."""
        import torch

        if not self.design.models:
            with torch.device("meta"):
                return self.fresh(size)
        from transformers import AutoConfig, AutoModelForCausalLM

        from veneer.assets import resolve
        from veneer.tasks.task import load_failed

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(size)))
        except (OSError, ValueError) as error:
            raise load_failed(size, error) from error

    def run(self, size: str, sparsity: str, length: int, tick: Callable[[int], None] = lambda tokens: None) -> dict[str, Any]:
        """One run, whole: trains, prunes, measures → what stands in the file. `tick` gets the tokens of every step."""
        from veneer.strategies.gradual_pruning import Goal, GradualPruning, prunable

        design, started = self.design, time.monotonic()
        goal, steps = Goal.of(sparsity), design.steps(length)
        model = self.model(size)
        pruning = GradualPruning.of(model, goal, steps, design.tables, iterative=design.nm == "iterative")
        text = self.words(size)
        self.trained(model, size, text.train, steps, design.seed, pruning.after_step, tick)
        loss = self.measured(model, text.held_out)
        matrices = prunable(model)[0].values()
        N, total = sum(int(w.count_nonzero()) for w in matrices), sum(w.numel() for w in matrices)
        D = steps * design.context * design.batch_size
        S = 1 - N / total
        return {
            "S": S, "N": N, "D": D, "L": loss, "pattern": goal.pattern, "model": size, "sparsity": sparsity, "length": length,
            "total": total, "steps": steps, "flops": 6 * N * D * float(c_mul(S)), "seconds": round(time.monotonic() - started, 2),
            "settings": json.loads(json.dumps(design.identity)),
        }  # fmt: skip

    # -- parts --------------------------------------------------------------------------------------------------

    def model(self, size: str) -> Any:
        """The dense model that a run starts from, the same every time."""
        import torch

        if self.design.models:
            from transformers import AutoModelForCausalLM

            from veneer.assets import resolve

            loaded: Any = AutoModelForCausalLM.from_pretrained(resolve(size), dtype=torch.float32)
            return loaded.to(self.device)
        model = self.fresh(size)
        if self.design.pretrain:
            model.load_state_dict(self.base(size))
        return model.to(self.device)

    def fresh(self, size: str) -> Any:
        """A decoder of this width with random first values."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        width = int(size.removeprefix("width "))
        config = LlamaConfig(
            vocab_size=BYTES, hidden_size=width, intermediate_size=mlp_width(width), num_hidden_layers=self.design.layers,
            num_attention_heads=width // HEAD, max_position_embeddings=self.design.context, initializer_range=0.5 / math.sqrt(width),
            tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(self.design.seed)
        return LlamaForCausalLM(config)

    def pretrained(self, size: str) -> dict[str, Tensor]:
        """Weights after dense training on text in another order; made once and kept in the folder."""
        from safetensors.torch import load_file

        from veneer.store import write_tensors

        settings = json.dumps([size, self.design.identity])
        path = self.folder / "bases" / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            model, steps = self.fresh(size).to(self.device), self.design.steps(self.design.pretrain)
            self.trained(model, size, self.words(size).train, steps, self.design.seed + 1)
            write_tensors(path, {k: v.cpu().contiguous() for k, v in model.state_dict().items()}, {"settings": settings})
        return load_file(path)

    def tokens(self, size: str) -> Text:
        """The text as one long row of ids: bytes, or a pretrained model's own tokens."""
        import torch

        def ids(rows: Sequence[str]) -> Tensor:
            if not self.design.models:
                return torch.frombuffer(bytearray("\n".join(rows).encode()), dtype=torch.uint8).long()
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            return torch.tensor([i for row in tokenizer(list(rows))["input_ids"] for i in (*row, *end)])

        if self.design.models:
            from transformers import AutoTokenizer

            from veneer.assets import resolve

            tokenizer = AutoTokenizer.from_pretrained(resolve(size))
        text = Text(ids(self.rows["train"]), ids(self.rows["validation"])[: HELD_OUT + 1])
        if min(len(text.train), len(text.held_out)) <= self.design.context:
            raise BadValue(f"{self.design.data} is too short: it needs more than {self.design.context} tokens (--context) in each part.")
        return text

    def batches(self, ids: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
        """Rows of context + 1 tokens in an order that depends on the seed alone; the text is gone through again when it ends."""
        import torch

        context, size = self.design.context, self.design.batch_size
        rows = (len(ids) - 1) // context
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < size:
                order += torch.randperm(rows, generator=generator).tolist()
            starts, order = order[:size], order[size:]
            yield torch.stack([ids[i * context : (i + 1) * context + 1] for i in starts]).to(self.device)

    def trained(
        self,
        model: nn.Module,
        size: str,
        ids: Tensor,
        steps: int,
        seed: int,
        after_step: Callable[[], None] = lambda: None,
        tick: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """AdamW with a rate that rises over a twentieth of the steps, stays while masks change, and falls to zero with the last."""
        import torch

        config: Any = model.config
        rate = self.design.lr or (3e-4 if self.design.models else 0.32 / config.hidden_size)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
        warm = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: min((k + 1) / warm, 1.0, (steps - k) / (COOLDOWN * steps)))
        model.train()
        for rows in self.batches(ids, steps, seed):
            loss = self.loss(model, rows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            after_step()
            optimiser.zero_grad()
            schedule.step()
            tick(rows[:, 1:].numel())
        if not torch.isfinite(loss):
            raise VeneerError(f"scaling-law: the loss of {size} is not a number after {steps} steps; choose a lower --lr than {rate:g}.")

    def measured(self, model: nn.Module, ids: Tensor) -> float:
        """Mean loss for each token of the held-out text."""
        import torch

        model.eval()
        context = self.design.context
        rows = torch.stack([ids[i : i + context + 1] for i in range(0, len(ids) - context, context)])
        with torch.no_grad():
            losses = [self.loss(model, part.to(self.device)).double().cpu() for part in rows.split(4 * self.design.batch_size)]
        return float(torch.cat(losses).mean())

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Loss of every token after the first."""
        import torch

        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
