"""LoRA: a frozen weight plus a trained product of two thin matrices (2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import kaiming_uniform, normal, zeros
from veneer.maths.starts import Started
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class LoRA(Started):
    """W_eff = W + s · B A, s = alpha / r (rslora: alpha / √r); y = x W_effᵀ + b

    Pick it first: the strongest baseline for its cost, mergeable, understood by every server. Not for very small
    budgets, where methods with fewer numbers per layer (WeGeFT, IA3, SSF) do better.

    Tensors: A [r, in], Kaiming-uniform(√5) or N(0, 1/r²) with start="gaussian"; B [out, r], zeros: starts as the base.
    Embedding tables: A [r, vocabulary], zeros; B [dim, r], N(0, 1). Convolutions: A [r, in/groups · kernel]. With
    lora_bias: b [out], zeros. The other starts (PiSSA arXiv:2404.02948, OLoRA arXiv:2406.01775, LoftQ arXiv:2310.08659,
    EVA arXiv:2410.07170) are in `veneer.maths.starts`; all but LoftQ start as the base, PiSSA and OLoRA to rounding.

    Args:
        r: rank; may exceed min(in, out) except with a start taken from the weight or from data.
        alpha: scale numerator. The usual choices are r and 2 r.
        lr_ratio: LoRA+ (arXiv:2402.12354) trains B, and b, this many times faster than A.
        conv_form: "factored" as above; "original": A [r·k, in·k], B [out·k, r·k], the product reshaped to the kernel.
    """

    r: int = option(8, "rank of the update", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    dropout: float = option(0.0, "dropout on the input of A, in training", ge=0, lt=1)
    rslora: bool = option(False, "scale by alpha/√r instead of alpha/r (arXiv:2312.03732)")
    lr_ratio: float = option(1.0, "learning rate of B over that of A; LoRA+ uses 16", gt=0)
    lora_bias: bool = option(False, "train a bias on B's output")
    conv_form: str = option("factored", "shape of a convolution's factors", choices=("factored", "original"))

    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {
        "init": "start",
        "init_lora_weights": "start",
        "rank": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "loraplus_lr_ratio": "lr_ratio",
    }

    def check(self, site: Site) -> None:
        super().check(site)
        if self.lora_bias and site.kind not in ("linear", "conv"):
            raise self.refuse(f"lora_bias=True needs a linear layer or a convolution, not the {site.kind} {{at}}.", site)
        k = site.kernel
        if self.original(site) and (len(k) != 2 or k[0] != k[1] or site.groups > 1 or self.start not in ("kaiming", "gaussian")):
            raise self.refuse("conv_form='original' needs a square 2-d kernel, one group, start kaiming or gaussian {at}.", site)

    def original(self, site: Site | None) -> int:
        """The kernel size where the original form is in use, else 0."""
        return site.kernel[0] if self.conv_form == "original" and site is not None and site.kind == "conv" else 0

    def init(self, site: Site, generator: Generator) -> Params:
        k = self.original(site) or 1
        A, B = (self.r * k, site.in_features // k), (site.out_features * k, self.r * k)
        bias = {"b": zeros((site.out_features,))} if self.lora_bias else {}
        if site.kind == "embedding":  # a table is only looked up, so the factor on the tokens' side is the zero one
            return {"A": zeros(A), "B": normal(B, generator), **self.kept(A, B)}
        first = normal(A, generator, 1 / self.r) if self.start == "gaussian" else kaiming_uniform(A, generator)
        return {"A": first, "B": zeros(B), **bias, **self.kept(A, B)}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        k = self.original(site)
        if not k:
            return super().factors(p, site)
        A, B = p["A"], self.scale * p["B"]  # (B A) reshaped is the kernel's k rows of products side by side
        return B.reshape(-1, k * A.shape[0]), torch.kron(torch.eye(k).to(A), A)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None if "b" in p else super().low_rank(W, p, site)

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and not (self.lora_bias or self.dropout or self.start == "loftq")

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        y = super().forward(call, x, p, site)
        return y + (self.scale * p["b"]).to(y.dtype).reshape(-1, *(1,) * len(site.kernel)) if "b" in p else y

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        if "b" in p:
            b = self.scale * p["b"] + (0 if b is None else b)
        return self.weight(W, p, site), b

    def lr_ratios(self) -> Mapping[str, float]:
        return {} if self.lr_ratio == 1 else {"B": self.lr_ratio, "b": self.lr_ratio}
