"""WaRA: a low-rank change of the weight made in a wavelet domain (2025, arXiv:2506.24092)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.maths.starts import truncated_svd
from veneer.maths.token_grid import Gridded
from veneer.maths.wavelet import raised
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class WaRA(Gridded):
    """W_eff = W + s · S_outᵀ (I₂ ⊗ B_w A_w) S_in, s = alpha / r, S_n the wavelet transform of n features (`veneer.maths.wavelet`)

    Pick it for a multi-resolution change at half of LoRA's count for the same r, with rank up to 2r. With Haar the formula
    is (s · B_w A_w) ⊗ I₂: neighbouring features get the same small map; db2 does not collapse so. Not for odd widths.

    Tensors: A_w [r, in/2], Kaiming-uniform(√5); B_w [out/2, r], zeros: starts as the base. "weight": A_q [r_q, in/2], B_q
    [out/2, r_q] for the bands q = LL, LH, HL, HH (first letter: outputs; H: high-pass). "grid": A [r, in], B [out, r], with
    gains g [4], ones. "tiny": coef [r, r] or [r], zeros; frozen U_r [out, r] and V_r [in, r], leading singular vectors of W.

    Args:
        form: "feature" as above; "weight": s · S_outᵀ C S_in with quadrants C_q = B_q A_q, over several `levels` of LL (bands LH2 …);
            "tiny": s · U_r K V_rᵀ, K = coef; "grid": B A, or "tiny_grid": U_r K V_rᵀ, on the wavelet coefficients of the patch
            tokens on their own grid. Without act and gains a grid equals LoRA on the patch tokens: the transforms cancel.
    """

    form: str = option("feature", "where the wavelets act", choices=("feature", "weight", "tiny", "grid", "tiny_grid"))
    r: int = option(8, "rank", ge=1)
    alpha: float = option(16.0, "scale numerator", gt=0)
    wavelet: str = option("haar", "family; db2 is recommended for form='feature'", choices=("haar", "db2", "db3", "db4"))
    ranks: tuple[int, int, int, int] | None = option(None, "weight: ranks of LL, LH, HL, HH; 0 drops a band; None: all r")
    levels: int = option(1, "weight: levels of the transform", ge=1)
    coef: str = option("full", "tiny: a whole matrix of coefficients or its diagonal", choices=("full", "diag"))

    frozen = ("U_r", "V_r")
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {"rank": "r", "lora_alpha": "alpha"}

    def validate(self) -> None:
        ranks = self.ranks
        if ranks is not None and (not isinstance(ranks, tuple) or len(ranks) != 4 or min(ranks) < 0 or not any(ranks)):
            raise BadValue(f"WaRA: ranks={self.ranks!r} must be four ranks, for LL, LH, HL and HH, of which one is more than 0.")
        super().validate()

    @property
    def reads_weight(self) -> bool:
        return self.form in ("tiny", "tiny_grid")

    @property
    def on_grid(self) -> bool:  # type: ignore[override]
        return self.form in ("grid", "tiny_grid")

    def check(self, site: Site) -> None:
        super().check(site)
        out, inside, times = site.out_features, site.in_features, self.levels if self.form == "weight" else 1
        if self.form in ("feature", "weight") and (out % 2**times or inside % 2**times):
            what = f"levels={times} and wavelet={self.wavelet!r} need in={inside} and out={out} {{at}} to be multiples of {2**times}"
            raise self.refuse(f"{what}; choose other targets or form='tiny'.", site)
        if self.reads_weight and self.r > min(out, inside):
            raise self.refuse(f"r={self.r} is larger than min(in, out)={min(out, inside)} {{at}}; choose r ≤ {min(out, inside)}.", site)

    def bands(self) -> Iterator[tuple[str, int, int, int]]:
        """Form "weight": name, rank, level and quadrant (0 … 3: LL, LH, HL, HH) of every band that is there."""
        for level in range(1, self.levels + 1):
            for i, q in enumerate(("LL", "LH", "HL", "HH")):
                r = self.r if self.ranks is None else self.ranks[i]
                if r and (i or level == self.levels):
                    yield q + (str(level) if level > 1 else ""), r, level, i

    def init(self, site: Site, generator: Generator) -> Params:
        r, out, inside = self.r, site.out_features, site.in_features
        own = self.first_gains()
        if self.reads_weight:
            return {"coef": zeros((r, r) if self.coef == "full" else (r,)), "U_r": zeros((out, r)), "V_r": zeros((inside, r)), **own}
        pairs = {"feature": [("_w", r, 1)], "weight": [("_" + q, r_q, level) for q, r_q, level, _ in self.bands()]}
        for q, r_q, level in pairs.get(self.form, [("", r, 0)]):
            own |= {f"A{q}": kaiming_uniform((r_q, inside >> level), generator), f"B{q}": zeros((out >> level, r_q))}
        return own

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        U, _, Vt = truncated_svd(W.flatten(1), self.r)
        sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))  # an SVD leaves signs open: the largest entry is positive
        return {**p, "U_r": U * sign, "V_r": Vt.T * sign}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        s = self.alpha / self.r
        if self.reads_weight:
            return s * (p["U_r"] @ p["coef"] if p["coef"].ndim > 1 else p["U_r"] * p["coef"]), p["V_r"].T
        if "A" in p:
            return s * p["B"], p["A"]
        bands = [("w", 1, 0, 0), ("w", 1, 1, 1)]  # name, level, high-pass over outputs, over inputs
        if self.form == "weight":
            bands = [(q, level, i // 2, i % 2) for q, _, level, i in self.bands()]
        L = torch.cat([raised(p[f"B_{q}"].T, self.wavelet, high, level) for q, level, high, _ in bands])
        return s * L.T, torch.cat([raised(p[f"A_{q}"], self.wavelet, high, level) for q, level, _, high in bands])
