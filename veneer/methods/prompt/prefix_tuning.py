"""Prefix tuning: every attention layer sees learned keys and values before the text's own (2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.errors import BadValue
from veneer.init import normal, uniform
from veneer.method import Params, PromptMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class PrefixTuning(PromptMethod):
    """Attn(q) = softmax(q [PK ; K]ᵀ / √d_head + mask) [PV ; V]; the prefix is visible to every token

    Pick it for generation and understanding when no weight may be touched; far more expressive than prompt tuning.
    Not when the start must equal the base, or rows must stay short: it adds `length` cache entries to every layer.

    Tensors, flat: PK, PV [length, kv_heads · d_head] a layer, N(0, std²) (P-tuning v2, arXiv:2110.07602). With mid,
    shared by all layers: E [length, D], N(0, 1); W1 [mid, D], b1 [mid]; W2 [2 · layers · kv, mid], b2 [2 · layers · kv],
    uniform in ±1/√fan_in: tanh(E W1ᵀ + b1) W2ᵀ + b2 holds keys and values of layer l in slices 2l and 2l + 1.

    Args:
        shift_positions: start the text at position `length` instead of 0; None does so in decoders.
    """

    length: int = option(10, "number of learned keys and values a layer", ge=1)
    mid: int | None = option(None, "width of the network that makes them; None trains them directly", ge=1)
    std: float = option(0.02, "standard deviation of the flat start", ge=0)
    shift_positions: bool | None = option(None, "start the text behind the prefix; None: in decoders")

    default_lr = 1e-2
    sizes = ("length",)
    default_targets = "attn"
    kinds = ("attention",)
    aliases = {"P": "length", "num_virtual_tokens": "length", "prefix_length": "length", "encoder_hidden_size": "mid"}
    limits = {
        "identity": "learned keys take attention from the start",
        "merge": "keys and values are added to attention; no weight holds them",
    }

    def init(self, site: Site, generator: Generator) -> Params:
        if self.mid is not None:
            return {}
        shape = (self.length, site.out_features)
        return {"PK": normal(shape, generator, self.std), "PV": normal(shape, generator, self.std)}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        if self.mid is None:
            return {}
        first, D, mid = sites[0], sites[0].heads * sites[0].head_dim, self.mid
        for site in sites:
            if site.out_features != first.out_features:
                sizes = f"{first.out_features} and {site.out_features}"
                raise BadValue(
                    f"PrefixTuning: {first.name} and {site.name} have keys of widths {sizes}; mid=… needs equal ones, use mid=None."
                )
        rows = 2 * len(sites) * first.out_features
        return {
            "E": normal((self.length, D), generator),
            "W1": uniform((mid, D), generator, D**-0.5),
            "b1": uniform((mid,), generator, D**-0.5),
            "W2": uniform((rows, mid), generator, mid**-0.5),
            "b2": uniform((rows,), generator, mid**-0.5),
        }

    def keys_values(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        if "PK" in p:
            return p["PK"], p["PV"]
        kv = site.out_features
        own = slice(2 * site.ordinal * kv, 2 * (site.ordinal + 1) * kv)
        PK, PV = linear(torch.tanh(linear(p["E"], p["W1"], p["b1"])), p["W2"][own], p["b2"][own]).split(kv, -1)
        return PK, PV
