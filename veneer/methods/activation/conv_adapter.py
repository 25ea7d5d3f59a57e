"""Conv adapter: small residual convolutions after a block or layer, on feature maps or along tokens (2025, arXiv:2506.21298)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, uniform, zeros
from veneer.maths.convolved import dilated, mapped, pointwise, squeezed
from veneer.maths.looking_back import decoding
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class ConvAdapter(Method):
    """pointwise: y ← y + up_w GELU(down_w y + down_b) + up_b, `blocks` times; deep: y ← y + up_w (gate ⊙ h) + up_b

    In "deep" h = down_w y + down_b, then h ← h + conv_w_i ∗ GELU(h) with dilation 2^i for i < blocks, and the gate is
    σ(gate_2 ReLU(gate_1 mean h)), the mean over all places. Pick "deep" where neighbours in time or space matter (audio,
    textures); "pointwise" anywhere. Not where inference must be free. In decoders "deep" wants causal=True and, as it sees only
    the tokens handed in, generation with use_cache=False.

    Tensors, C channels: pointwise down_w [blocks, m, C], Xavier-uniform; up_w [blocks, C, m], zeros: starts as the base; deep
    down_w [m, C], Kaiming-uniform(√5), up_w [C, m], zeros; conv_w [blocks, m, m, kernel…], conv_b [blocks, m], gate_1
    [⌈m/4⌉, m], gate_2 [m, ⌈m/4⌉], Kaiming-uniform(√5). Biases down_b, up_b with them: uniform in ±1/√fan_in, and zeros.
    With norm also ln_w, ln_b [C]; up_w, up_b are then Xavier-uniform and ±1/√m: no exact start, as in the authors' code.

    Args:
        m: None means C // reduction.
        dims: at blocks, sub-layers and norms 0 means tokens, channels last, and kernels run along them; 1, 2, 3: maps with channels
            at axis 1 and so many axes behind. Convolutions have their own.
    """

    form: str = option("pointwise", "convolutions of single places, or dilated ones with a gate", choices=("pointwise", "deep"))
    m: int | None = option(None, "width of the bottleneck; None: C // reduction", ge=1)
    reduction: int = option(8, "channels over the width of the bottleneck", ge=1)
    blocks: int = option(1, "residual convolutions, one after another", ge=1)
    kernel: int = option(3, "deep: side of the kernels, odd", ge=1)
    dims: int = option(0, "axes of the maps; 0: tokens", ge=0, le=3)
    causal: bool = option(False, "deep: kernels and gate see earlier tokens only: for decoders")
    norm: bool = option(False, "pointwise: normalise the channels of the result")
    dropout: float = option(0.0, "deep: dropout before the sum, in training", ge=0, lt=1)

    kinds = ("block", "branch", "norm", "conv")
    sizes = ("m",)
    default_targets = "block"
    aliases = {"k": "m", "bottleneck": "m", "reduction_factor": "reduction", "kernel_size": "kernel", "num_blocks": "blocks"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        return {"merge": "it is nonlinear", **({"identity": "the result is normalised"} if self.norm else {})}

    def validate(self) -> None:
        if self.kernel % 2 == 0:
            raise BadValue(f"{self.label}: kernel={self.kernel} has no middle; choose {self.kernel - 1} or {self.kernel + 1}.")
        if self.norm and self.form == "deep":
            raise BadValue(f"{self.label}: norm=True belongs to form='pointwise'; choose that form or norm=False.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        found = super().select(sites)
        decoders = decoding(sites) if self.form == "deep" and not self.causal else set()
        if ahead := next((s for s in found if s.name in decoders), None):
            raise self.refuse("form='deep' would look at later tokens {at}, in a decoder; choose causal=True or form='pointwise'.", ahead)
        return found

    def check(self, site: Site) -> None:
        if self.causal and self.axes(site):
            raise self.refuse("causal=True is for tokens in their order, not for maps, {at}; choose dims=0 or other targets.", site)

    def axes(self, site: Site) -> int:
        return len(site.kernel) if site.kind == "conv" else self.dims

    def width(self, site: Site) -> int:
        return max(1, site.out_features // self.reduction) if self.m is None else self.m

    def init(self, site: Site, generator: Generator) -> Params:
        C, m, n = site.out_features, self.width(site), self.blocks
        norm = {"ln_w": ones((C,)), "ln_b": zeros((C,))} if self.norm else {}
        if self.form == "pointwise":
            xavier = (6 / (C + m)) ** 0.5
            p = {"down_w": uniform((n, m, C), generator, xavier), "down_b": kaiming_uniform((n, m), generator, C)}
            if not self.norm:
                return {**p, "up_w": zeros((n, C, m)), "up_b": zeros((n, C))}
            return {**p, "up_w": uniform((n, C, m), generator, xavier), "up_b": kaiming_uniform((n, C), generator, m), **norm}
        window, gate = (self.kernel,) * (self.axes(site) or 1), -(-m // 4)
        fan_in = m * self.kernel ** len(window)
        return {
            "down_w": kaiming_uniform((m, C), generator),
            "down_b": kaiming_uniform((m,), generator, C),
            "conv_w": kaiming_uniform((n, m, m, *window), generator, fan_in),
            "conv_b": kaiming_uniform((n, m), generator, fan_in),
            "gate_1": kaiming_uniform((gate, m), generator),
            "gate_2": kaiming_uniform((m, gate), generator),
            "up_w": zeros((C, m)),
            "up_b": zeros((C,)),
        }

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        y, axes = call(x), self.axes(site)
        if y.ndim != (axes + 2 if axes else 3) or y.shape[1 if axes else 2] != site.out_features:
            way = f"dims={y.ndim - 2}" if not axes else "dims=0"
            raise self.refuse(f"dims={axes} does not fit what comes out {{at}}, of shape {tuple(y.shape)}; choose {way}.", site)
        q = {name: t.to(y.dtype) for name, t in p.items()}
        if not axes:  # [batch, C, tokens]
            y = y.movedim((site.batch_dim, 2), (0, 1))
        if self.form == "deep":
            h = dilated(mapped(y, q["down_w"], q["down_b"]), q["conv_w"], q["conv_b"], self.causal)
            h = squeezed(h, q["gate_1"], q["gate_2"], self.causal)
            y = y + F.dropout(mapped(h, q["up_w"], q["up_b"]), self.dropout, call.training)
        else:
            y = pointwise(y, q)
        if self.norm:
            y = F.layer_norm(y.movedim(1, -1), (y.shape[1],), q["ln_w"], q["ln_b"]).movedim(-1, 1)
        return y if axes else y.movedim((0, 1), (site.batch_dim, 2))
