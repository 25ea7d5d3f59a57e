"""Context-PEFT: every token uses the parameters of its own domain, such as text or image (2023, arXiv:2312.08900)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear, one_hot

from veneer.contexts import NOW
from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, zeros
from veneer.kernels.gated import gated
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class ContextPEFT(Method):
    """lora: y_t = W x_t + b + s · B_c A_c x_t; bitfit: W x_t + b + d_c; ia3: (W x_t + b) ⊙ (1 + l_c), mlp.down: W (x_t ⊙ (1 + l_c)) + b

    c = c_t is the token's context, a number that `with veneer.contexts.contexts(numbers):` says for a batch (`by_token`
    makes them from placeholder ids). Pick it to let a frozen language model read image tokens, or for roles of messages,
    with little data: attention and masks stay as they are. Not where weights must be merged, unless C = 1. All contexts are
    computed, as one product with the stacked A and one with the stacked B. "context-peft + context-peft(variant=bitfit)"
    has both. A trained projector of image features is the model's own affair.

    Tensors: lora A [C, r, in], Kaiming-uniform(√5), B [C, out, r], zeros; bitfit d [C, out], zeros, beside the frozen bias;
    ia3 l [C, out], on the feed-forward's last projection [C, in], zeros. Starts as the base.

    Args:
        alpha: None is the paper's s = 1; else s = alpha / r, with rslora alpha / √r.
        unsaid: the context of tokens of which nothing is said, such as generated ones; None refuses them.
        dropout: leaves out the adapter at single tokens.
    """

    variant: str = option("lora", "what the parameters do", choices=("lora", "bitfit", "ia3"))
    C: int = option(2, "number of contexts", ge=1)
    r: int = option(64, "rank of one context's update, for lora", ge=1)
    alpha: float | None = option(None, "scale numerator; None: the scale is 1", gt=0)
    rslora: bool = option(False, "scale by alpha/√r instead of alpha/r")
    start: str = option("kaiming", "first A", choices=("kaiming", "kaiming_normal", "gaussian"))
    unsaid: int | None = option(0, "context of tokens of which nothing is said; None: refuse them", ge=0)
    dropout: float = option(0.0, "share of tokens whose adapter training leaves out", ge=0, lt=1)

    kinds = ("linear",)
    sizes = ("r",)
    default_lr = 1e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv mlp.up mlp.gate mlp.down"
    aliases = {"contexts": "C", "rank": "r", "lora_alpha": "alpha", "use_rslora": "rslora"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"merge": "every context has a weight of its own"} if self.C > 1 else {}

    def validate(self) -> None:
        if self.unsaid is not None and self.unsaid >= self.C:
            raise BadValue(f"ContextPEFT: unsaid={self.unsaid} is none of the C={self.C} contexts; choose 0 … {self.C - 1}.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        asked = self.targets or ("attn.k attn.v mlp.down" if self.variant == "ia3" else self.default_targets)
        found = choose(sites, asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        return [s for s in found if s.depth is None or s.depth not in self.leave_out]

    def input_side(self, site: Site) -> bool:
        return self.variant == "ia3" and site.role == "mlp.down"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / (self.r**0.5 if self.rslora else self.r)

    def init(self, site: Site, generator: Generator) -> Params:
        C, r, out, inside = self.C, self.r, site.out_features, site.in_features
        if self.variant != "lora":
            return {"d" if self.variant == "bitfit" else "l": zeros((C, inside if self.input_side(site) else out))}
        std = {"kaiming": 0.0, "kaiming_normal": (3 * inside) ** -0.5, "gaussian": 1 / r}[self.start]
        return {"A": normal((C, r, inside), generator, std) if std else kaiming_uniform((C, r, inside), generator), "B": zeros((C, out, r))}

    def marked(self, x: Tensor, p: Params, call: Call, site: Site) -> tuple[Tensor, Params]:
        """1 at the context of every token of x [..., in], 0 elsewhere, [..., C] in the tensors' dtype; where nothing is said, of one
        context and its parameters alone: layers that run again in backward then fail if they are told otherwise than before."""
        like, tokens = next(iter(p.values())), x.shape[:-1]
        numbers = NOW.laid_out(tokens, site.batch_dim) if self.C > 1 else None
        if numbers is not None:
            if NOW.most >= self.C:
                raise self.refuse(f"a token is of context {NOW.most}, and C={self.C}; number contexts from 0 to {self.C - 1}.", site)
            m = one_hot(numbers.to(x.device), self.C).to(like.dtype)
        elif self.unsaid is None and self.C > 1:
            raise self.refuse("of what context the tokens are was not said; run the model in `with contexts(numbers):`.", site)
        else:
            c = self.unsaid or 0
            m, p = like.new_ones(*tokens, 1), {name: t[c : c + 1] for name, t in p.items()}
        return m * dropout(m.new_ones(*tokens, 1), self.dropout, call.training) if self.dropout else m, p

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        m, p = self.marked(x, p, call, site)
        if self.input_side(site):
            return call(x + x * (m @ p["l"]).to(x.dtype))
        y = call(x)
        if self.variant != "lora":
            own = (m @ next(iter(p.values()))).to(y.dtype)
            return y + (own if self.variant == "bitfit" else y * own)
        t = linear(x, p["A"].flatten(0, 1).to(x.dtype))  # of all contexts, [..., C r]
        each = torch.eye(len(p["A"]), device=t.device).repeat_interleave(p["A"].shape[1], 1)  # [C, C r]
        return gated(y, t, m, each, self.scale * p["B"].transpose(0, 1).flatten(1))

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return (self.scale * p["B"][0], p["A"][0]) if self.variant == "lora" and self.C == 1 else None

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        """Of one context."""
        if self.variant == "lora":
            return W + self.scale * p["B"][0] @ p["A"][0], b
        if self.variant == "bitfit":
            return W, p["d"][0] + (0 if b is None else b)
        l = 1 + p["l"][0]
        return (W * l, b) if self.input_side(site) else (l[:, None] * W, None if b is None else l * b)
