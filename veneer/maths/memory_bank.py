"""A memory of features of the training rows, read by likeness alone, and the frozen pass that gives a row's own (arXiv:2310.03059)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.maths.point_sets import taken, wide
from veneer.maths.told import Flag, Told
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site

FIRST, PRIOR = Flag(), Told()
"""Whether the frozen pass before the adapted one runs now, and the prior that it ends with."""


@dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """A method of prompts with a bank [rows, D] at the last norm of an encoder: unit features of the rows it was shown at the start."""

    L: int = option(10, "number of prompts; 16 on Point-M2AE", ge=3)
    D_p: int | None = option(None, "how many blocks have prompts, from the first on; None: half of them", ge=0)
    b: int = option(8, "width of the prior's bottleneck", ge=1)
    prior: bool = option(True, "fill the prompts from the memory bank; False: learned prompts alone")
    skip_best: bool = option(False, "in training, leave out the nearest row of the bank: the row itself")

    class_token = True  # for the method to say: whether the first token is one, no point

    @property
    def K(self) -> int:
        """How many rows of the bank are read."""
        return self.L - 2

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.prior and self.D_p != 0

    def prompts(self, site: Site, ahead: int = 0) -> int:
        """Prompts of a block, or of one ahead of it."""
        return self.L if site.index + ahead < ((site.length + 1) // 2 if self.D_p is None else self.D_p) else 0

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        return [*(state or ()), extremes(x[:, self.class_token :])] if site.kind == "norm" else state

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        norm = next(s for s in sites if s.kind == "norm")
        found = torch.cat(states[norm.name])
        if self.K + self.skip_best > len(found):
            raise self.refuse(
                f"{self.K} rows of the memory bank are read, and the data has {len(found)}; choose a smaller L or more data", norm
            )
        return {s.name: (self, {"bank": found} if s is norm else {}) for s in sites}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return {"bank": bank_of(p["bank"], W, b)} if "bank" in p else p

    def noted(self, y: Tensor, p: Params, training: bool) -> Tensor:
        """The last norm's output y [batch, tokens, D]; in the frozen pass the prior is made of it."""
        if FIRST.on:
            PRIOR.tell(read_out(feature(y[:, self.class_token :]), p["bank"], self.K, int(self.skip_best and training)))
        return y

    def twice(self, call: Call, x: Tensor) -> Tensor:
        """The encoder's output for tokens x: its sites do nothing first, then the prior [batch, K + 2, D] stands behind the tokens."""
        with FIRST.raised(), torch.no_grad():
            _, z = PRIOR.listen(call, x)
        assert z is not None
        return call(torch.cat([x, z.to(x.dtype)], 1))


def feature(tokens: Tensor) -> Tensor:
    """A row's feature [batch, D]: the maximum over its tokens [batch, n, D]."""
    return wide(tokens).amax(1)


def extremes(x: Tensor) -> Tensor:
    """Largest and smallest values [batch, 2, D] of a norm's input [batch, n, D] once it is normalised, before gain and shift."""
    plain = F.layer_norm(wide(x), x.shape[-1:])
    return torch.stack([plain.amax(1), plain.amin(1)], 1)


def bank_of(found: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
    """Unit features [rows, D] behind a norm, from what `extremes` gave: a negative gain turns the smallest into the largest."""
    largest = (gain * found).amax(1)
    return F.normalize(largest if shift is None else largest + shift, dim=-1)


def read_out(f: Tensor, bank: Tensor, K: int, skip: int = 0) -> Tensor:
    """Rows [batch, K + 2, D]: the feature f [batch, D], the mean of its K nearest of the bank [rows, D], and these, nearest first.

    The mean is weighted by the softmax of the cosines. `skip` leaves out the nearest ones.
    """
    f, bank = wide(f), bank.to(wide(f).dtype)
    cosines, index = (F.normalize(f, dim=-1) @ bank.T).topk(K + skip)
    near = taken(bank.expand(len(f), *bank.shape), index[:, skip:])
    mean = (cosines[:, skip:].softmax(-1)[..., None] * near).sum(1)
    return torch.cat([f[:, None], mean[:, None], near], 1)
