"""Light-PEFT: prunes the frozen model and the modules trained on it, early in training (2024, arXiv:2406.03792)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from veneer.init import ones
from veneer.method import InputMethod, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.early_pruning import EarlyPruning


@dataclass(frozen=True)
class LightPEFT(InputMethod):
    """y = (x ⊙ m) Wᵀ + b at attn.o (one m a head) and mlp.down (one a neuron), with lam · Σ|m| in the loss; then x, W lose their least

    Pick it when a big base is more than the task needs: the pruned model trains and answers faster and takes less memory.
    Not when the base must stay whole for other adapters: what is trained afterwards fits the pruned base only.

    It comes last in a stack and works in two phases. `lora(r=8, targets="attn.* mlp.*") + light-peft` trains masks and
    modules for some hundred steps and notes in their second half how much each module, and each of its ranks, matters.
    `veneer.slim(tuned)` then leaves out heads, neurons, modules and ranks, really: shapes shrink; what is left goes on
    from the values it has, without masks. Saved, it holds the list of what was kept, and `veneer.load` prunes the whole
    base the same way. On the command line: `veneer train … --method "lora(…) + light-peft" --steps 300 --out runs/masked`,
    then `veneer train --slim runs/masked --out runs/slim`.

    A ratio rho leaves out what is not strictly above the rho quantile of its kind (linear interpolation), of equal ones
    the first; 0 leaves out nothing; one head and one neuron of a layer always stay. Heads that share keys and values go
    together, by the mean of their masks.

    Tensors: m_attn [heads] at attn.o, m_ffn [neurons] at mlp.down, ones: starts as the base.

    Args:
        absolute: weigh |m|; the authors' code weighs m, so that a strongly negative mask counts as unimportant.
    """

    lam: float = option(1e-4, "weight of the sum of all |m| in the loss", ge=0)
    rho_a: float = option(0.3333333333333333, "share of the heads of each layer that go", ge=0, lt=1)
    rho_f: float = option(0.3333333333333333, "share of the neurons that go", ge=0, lt=1)
    rho_m: float = option(0.75, "share of the trained modules that go", ge=0, lt=1)
    rho_r: float = option(0.5, "share of the ranks of the remaining modules that go", ge=0, lt=1)
    ffn_scope: str = option("global", "what a neuron competes with: those of all layers, or of its own", choices=("global", "layer"))
    rank_scope: str = option("global", "what a rank competes with: those of all modules, or of its own", choices=("global", "module"))
    absolute: bool = option(False, "weigh |m| instead of m")
    lr_ratio: float = option(1.0, "learning rate of the masks over that of the rest", gt=0)
    T: int | None = option(None, "optimiser steps with masks; None: as many as the loop makes", ge=1)

    default_targets = "attn.o mlp.down"
    kinds = ("linear",)
    sizes = ()
    aliases = {
        "lambda": "lam",
        "l1": "lam",
        "attn_pruning_ratio": "rho_a",
        "ffn_pruning_ratio": "rho_f",
        "module_pruning_ratio": "rho_m",
        "rank_pruning_ratio": "rho_r",
    }
    last_counts: ClassVar[bool] = True
    prunes: ClassVar[bool] = True
    """A training loop that keeps the best of its steps should keep the last one instead: masks settle late."""

    def check(self, site: Site) -> None:
        if site.role not in ("attn.o", "mlp.down"):
            raise self.refuse(f"masks act on what enters attn.o and mlp.down, not on the {site.role} {{at}}; choose from those.", site)
        if site.role == "attn.o" and (not site.heads or site.heads * site.head_dim != site.in_features):
            raise self.refuse(
                f"{site.in_features} inputs are not {site.heads} heads of width {site.head_dim} {{at}}; choose targets='mlp.down'.", site
            )

    def init(self, site: Site, generator: Generator) -> Params:
        return {"m_attn": ones((site.heads,))} if site.role == "attn.o" else {"m_ffn": ones((site.in_features,))}

    def turn(self, x: Tensor, p: Params, site: Site) -> Tensor:
        ((_, m),) = p.items()
        return x + x * (m - 1).to(x.dtype).repeat_interleave(x.shape[-1] // len(m))

    def lr_ratios(self) -> Mapping[str, float]:
        return {} if self.lr_ratio == 1 else {"m_attn": self.lr_ratio, "m_ffn": self.lr_ratio}

    def strategy(self) -> EarlyPruning:
        return EarlyPruning(self.lam, self.T)
