"""Bottleneck adapter: a small two-layer network after, or beside, every sub-layer (2019, arXiv:1902.00751).

Houlsby et al. put one after attention and one after the feed-forward; Pfeiffer et al. (arXiv:2005.00247) one after the
feed-forward; He et al. (arXiv:2110.04366) one beside it, reading what the sub-layer reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, ones, zeros
from veneer.method import ActivationMethod, Call, Params
from veneer.option import option
from veneer.site import Site, choose

ACTS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "silu": F.silu, "tanh": F.tanh}


@dataclass(frozen=True)
class BottleneckAdapter(ActivationMethod):
    """f(h) = s · (act(h down_wᵀ + down_b) up_wᵀ + up_b); o + f(o) after a sub-layer's output o, or o + f(x) beside it

    Pick it for a strong nonlinear adapter in encoders and small data; "parallel" is the best of the three at a given
    budget. Not when inference must cost nothing: it cannot be merged. Houlsby et al. train the norms too: add ln-tuning.

    Tensors: down_w [m, D], Kaiming-uniform(√5); up_w [D, m], zeros: starts as the base; down_b [m], up_b [D], zeros.
    start="bert": both N(0, 0.02²); "houlsby": both truncated N(0, 0.001²); these start near the base.
    Options: s [] or [D], a learned scale; ln_w, ln_b [D], a norm on f's input or output.

    Args:
        variant: "houlsby" after attention and feed-forward (and cross-attention with targets="attn.o mlp.down cross.o");
            "pfeiffer" after the feed-forward, in post-norm blocks as LN(o + f(LN(o + a)) + a) with the block's own norm;
            "parallel" beside the feed-forward (targets="mlp attn" for both).
        m: width of the bottleneck; None means max(1, D // reduction).
    """

    variant: str = option("houlsby", "place and form", choices=("houlsby", "pfeiffer", "parallel"))
    m: int | None = option(None, "width of the bottleneck; None: D // reduction", ge=1)
    reduction: float = option(16, "D over the width of the bottleneck", gt=0)
    act: str | None = option(None, "nonlinearity; None: the variant's own", choices=(None, "relu", "gelu", "gelu_tanh", "silu", "tanh"))
    s: float | None = option(None, "scale of the output; None: 4 beside a sub-layer, 1 after it")
    learned_s: str = option("no", "train the scale: one number or one per channel", choices=("no", "scalar", "channel"))
    norm: str = option("none", "a norm of its own on the adapter's input or output", choices=("none", "in", "out"))
    dropout: float = option(0.0, "dropout after the nonlinearity, in training", ge=0, lt=1)
    start: str = option("zero_up", "first values", choices=("zero_up", "bert", "houlsby"))

    kinds = ("linear", "norm", "branch")
    aliases = {"bottleneck": "m", "reduction_factor": "reduction", "non_linearity": "act", "scaling": "s", "init": "start"}
    limits = {
        "merge": "the bottleneck is nonlinear",
        "unmerge": "the bottleneck is nonlinear, so there is nothing to unmerge",
        "conv2d": "it follows the sub-layers of a transformer block",
        "embedding": "it follows the sub-layers of a transformer block",
    }

    def validate(self) -> None:
        if self.s == 0:
            raise BadValue("BottleneckAdapter: s=0 switches the adapter off; the default is 4 for parallel and 1 otherwise.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        if self.targets is not None or self.variant == "parallel":
            kinds = {"houlsby": ("linear", "branch"), "pfeiffer": self.kinds, "parallel": ("branch",)}[self.variant]
            found = choose(sites, self.targets or "mlp", kinds=kinds, who=self.label)
        else:
            found = [s for s in sites if (s.role, s.kind) == ("attn.o", "linear") and self.variant == "houlsby"]
            for depth in dict.fromkeys(s.depth for s in sites if s.role == "mlp" or s.role == "mlp.down"):
                here = [s for s in sites if s.depth == depth]
                norms = [s for s in here if s.role == "norm.mlp" and s.post and self.variant == "pfeiffer"]
                downs = [s for s in here if s.role == "mlp.down" and s.kind == "linear"]  # none in a mixture of experts
                found += norms or downs or [s for s in here if s.role == "mlp"]
            found = choose([s for s in sites if s in found], ".*", kinds=self.kinds, who=self.label) if False else [s for s in sites if s in found]
        return [s for s in found if s.depth is None or s.depth not in self.leave_out]
