"""Single entries of a weight and of its bias, trained while all others stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from veneer.init import zeros
from veneer.kernels.sparse import denser, placed, sparse_linear
from veneer.method import AdditiveMethod, Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class Entries(AdditiveMethod):
    """W_eff[rows, columns[places]] = W[…] + v, b_eff[bias_indices] = b[…] + vb, and W, b elsewhere; indices [2, n] = rows, places

    `columns` [c] are the inputs that the entries meet: backward keeps these alone, and 2·N·n operations make the product.
    """

    entries: int = option(0, "decided: single entries of the weight", ge=0)
    columns: int = option(0, "decided: columns of the weight with such entries", ge=0)
    bias_entries: int = option(0, "decided: entries of the bias", ge=0)

    kinds = ("linear", "conv", "embedding", "parameter", "norm")
    frozen: ClassVar[tuple[str, ...]] = ("indices", "columns", "bias_indices")

    def init(self, site: Site, generator: Generator) -> Params:
        p: Params = {}
        if self.entries:
            at = torch.zeros(2, self.entries, dtype=torch.int64)
            p |= {"v": zeros((self.entries,)), "indices": at, "columns": torch.arange(self.columns)}
        if self.bias_entries:
            p |= {"vb": zeros((self.bias_entries,)), "bias_indices": torch.arange(self.bias_entries)}
        return p

    @staticmethod
    def positions(at: Tensor, inside: int) -> Params:
        """indices and columns of the entries at these flat positions of [out, inside], row by row."""
        at = at.sort().values
        columns, places = (at % inside).unique(return_inverse=True)
        return {"indices": torch.stack([at // inside, places]), "columns": columns}

    def check_tensors(self, p: Params, site: Site) -> None:
        out, inside = site.out_features, 1 if site.kind == "norm" else site.in_features
        lists = (
            [(p["columns"], inside), (p["indices"][0] * len(p["columns"]) + p["indices"][1], out * len(p["columns"]))] if "v" in p else []
        )
        lists += [(p["bias_indices"], out)] if "vb" in p else []
        for at, end in lists:  # each ascending
            if at.dtype != torch.int64 or bool((at < 0).any() or (at >= end).any() or (at.diff() <= 0).any()):
                raise self.refuse(f"positions must lie inside of [{out}, {inside}], row by row, each once {{at}}.", site)
        if "v" in p and bool((p["indices"] < 0).any() or (p["indices"][1] >= len(p["columns"])).any()):
            raise self.refuse(f"positions must lie inside of [{out}, {inside}] {{at}}.", site)
        if any(len(p[k]) != p[i].shape[-1] for k, i in (("v", "indices"), ("vb", "bias_indices")) if k in p):
            raise self.refuse("there are not as many positions as numbers {at}.", site)

    def change(self, p: Params, site: Site) -> Tensor:
        rows, places = p["indices"]
        inside = 1 if site.kind == "norm" else site.in_features
        return placed(p["v"], torch.stack([rows, p["columns"][places]]), site.out_features, inside)

    def shift(self, p: Params, site: Site) -> Tensor:
        """The change of the bias, [out]."""
        return p["vb"].new_zeros(site.out_features).index_put((p["bias_indices"],), p["vb"])

    def shifted(self, y: Tensor, p: Params, site: Site) -> Tensor:
        """An output with the change of the bias added."""
        return y + self.shift(p, site).to(y.dtype).reshape(-1, *(1,) * len(site.kernel)) if "vb" in p else y

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return self.weight(W, p, site), self.shift(p, site) + (0 if b is None else b) if "vb" in p else b

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return super().weight(W, p, site) if len(p) > 2 * ("vb" in p) else W

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        if "v" not in p:
            return self.shifted(x.new_zeros(*x.shape[:-1], site.out_features), p, site)
        return self.shifted(sparse_linear(x.index_select(-1, p["columns"]), p["v"], p["indices"], site.out_features), p, site)

    def adds(self, site: Site) -> bool:
        return site.kind == "linear"

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind != "linear":
            W, b = self.fold(call.weight(), call.bias(), p, site)
            return call.apply(x, weight=W, bias=b)
        if "v" not in p:
            return self.shifted(call(x), p, site)
        if denser(self.entries, site.out_features, site.in_features):
            own = {k: p[k] for k in ("v", "indices", "columns")}
            return self.shifted(call.rebuild(x, lambda W, p: self.weight(W, p, site), own), p, site)
        return call(x) + self.delta(x, p, site)
