"""A compressed copy that stands for the frozen weight, made once from the weight and the inputs of its layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from veneer.maths.factor import nearest_divisors
from veneer.maths.grids import gptq, grid, off_grid, rounded_before
from veneer.method import Call, Method, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class QuantisedStart(WeightMethod):
    """W_eff of frozen codes, whatever the layer's own weight is then; give `made`

    The base is left as it is. With data the frame shows every layer's inputs X and S = Xᵀ X [in, in] is what remains of
    them, in memory for all layers until the adapter is attached. A layer whose inputs are never seen (an expert that no
    token reaches, a projection that its owner reads as a weight) starts from its weight alone.
    """

    start: str = option("weight", "what the copy is made from: the weight, or weight and inputs (batches=[…])", choices=("weight", "data"))

    kinds = ("linear", "parameter")
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down mixer.in mixer.out"
    limits: ClassVar[Mapping[str, str]] = {
        "identity": "a quantised copy stands for the weight",
        "bnb4": "it quantises the weight itself, and this one is quantised already; load the base in 16 or 32 bit",
    }

    @property  # type: ignore[misc]
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.start == "data"

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        if site.kind != "linear" or x.shape[-1] != site.in_features:
            return state
        rows = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        return rows.T @ rows if state is None else state.addmm_(rows.T, rows)

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        return {s.name: (self, {} if states.get(s.name) is None else {"S": states[s.name]}) for s in sites}

    def made(self, W: Tensor, S: Tensor | None, p: Params, site: Site) -> Params:
        """The first tensors, in place of those of `init`, from the weight [out, in] and S [in, in] or None."""
        raise NotImplementedError

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        own = {k: t for k, t in p.items() if k != "S"}
        if W.is_meta:
            return own
        refuse_twice(self, W, site)
        S = p.get("S")
        made = self.made(W, S if S is not None and bool(S.any()) else None, own, site)
        return {k: made[k].to(t.dtype) for k, t in own.items()}


@dataclass(frozen=True, kw_only=True)
class GridStart(QuantisedStart):
    """W_eff = W_Q + ΔW, W_Q = (codes − zero) · step; give `change`

    Tensors: codes [out, in] and zero [out, in/group] in uint8, step [out, in/group], all frozen.
    """

    bits: int = option(4, "bits of the frozen weight", ge=2, le=4)
    group: int = option(64, "columns that share a step", ge=1)
    quantiser: str = option("gptq", "gptq (with inputs), nearest level, or the layer as it is", choices=("gptq", "nearest", "base"))

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.quantiser == "base" else QuantisedStart.limits

    @property
    def reads_weight(self) -> bool:
        return self.quantiser != "base"

    def check(self, site: Site) -> None:
        if self.reads_weight and site.in_features % self.group:
            near = nearest_divisors(self.group, site.in_features)
            raise self.refuse(f"group={self.group} does not divide in={site.in_features} {{at}}; choose group = {near}.", site)

    def check_tensors(self, p: Params, site: Site) -> None:
        if "codes" in p and (p["codes"].dtype != torch.uint8 or bool((p["codes"] >= 2**self.bits).any())):
            raise self.refuse(f"codes must be whole numbers in 0 … {2**self.bits - 1} {{at}}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        if self.quantiser == "base":
            return {}
        shape = site.out_features, site.in_features // self.group
        codes = torch.zeros(site.out_features, site.in_features, dtype=torch.uint8)
        return {"codes": codes, "step": torch.ones(shape), "zero": torch.zeros(shape, dtype=torch.uint8)}

    def made(self, W: Tensor, S: Tensor | None, p: Params, site: Site) -> Params:
        step, zero = grid(W, self.bits, self.group)
        return {**p, "codes": gptq(W, S if self.quantiser == "gptq" else None, step, zero, self.bits), "step": step, "zero": zero}

    def stand_in(self, W: Tensor, p: Params) -> Tensor:
        """W_Q [out, in], or W where the layer is left as it is."""
        return off_grid(p["codes"], p["step"], p["zero"]) if "codes" in p else W.flatten(1)

    def change(self, p: Params, site: Site) -> Tensor:
        """What is added to W_Q, dense [out, in]."""
        raise NotImplementedError

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return (self.stand_in(W, p) + self.change(p, site or Site.bare(W))).reshape(W.shape)

    def below(self, call: Call, x: Tensor, p: Params) -> Tensor:
        """x W_Qᵀ + b."""
        return call.rebuild(x, self.stand_in, {k: p[k] for k in ("codes", "step", "zero")}) if "codes" in p else call(x)


def refuse_twice(method: Method, W: Tensor, site: Site) -> None:
    """Raises `BadValue` for a weight that a 4-bit format has rounded before."""
    if not W.is_meta and rounded_before(W):  # a weight without values is asked again when they come
        raise method.refuse(f"{method.limits['bnb4']} {{at}}.", site)
