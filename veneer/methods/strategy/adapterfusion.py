"""AdapterFusion: attention over several trained adapters wherever they act, learned for a new task (2020, arXiv:2005.00247)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue, NoMatch, UnknownName, nearest
from veneer.init import normal, zeros
from veneer.maths.residual_stream import from_stream
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site, matches, tokens_of


@dataclass(frozen=True)
class AdapterFusion(Method):
    """h + Σ_n s_n W_v δ_n, s = softmax_n((W_q h + b_q) · (W_k δ_n + b_k) / T), δ_n what adapter n adds to the layer's output h

    Pick it when adapters of several tasks are at hand and a new task, with little data, may draw on them all: they stay as they
    are, and only the attention is trained. They may be of any methods that act on layers or sub-layers, each on its own. Not for
    a small budget (3 d² a place), nor where inference must be free: all adapters run.

    Attach or load the adapters first, then attach this under a name of its own; a file of it is loaded behind theirs, under the
    same names. Places where only some of them act are mixed of those.

    Tensors: W_q, W_k [d, d], N(0, 0.02²); b_q, b_k [d], zeros; W_v [d, d], the identity: starts as a mean of the adapters'
    changes, nearly.

    Args:
        adapters: none named: all that are attached.
        targets: roles or names among the adapters' places; None: all of them.
    """

    adapters: tuple[str, ...] = option((), "names of the adapters it mixes")
    T: float = option(1.0, "temperature of the softmax", gt=0)

    mixes = True
    kinds = ("linear", "conv", "embedding", "norm", "branch")
    sizes = ()
    default_lr = 5e-4
    default_targets = "its adapters' own"
    aliases = {"temperature": "T"}
    limits = {
        "identity": "it answers as the adapters it mixes do",
        "merge": "its weights depend on the input",
    }

    @property
    def relies_on(self) -> tuple[str, ...]:
        return self.adapters

    def views(self, sites: Sequence[Site]) -> list[Site]:
        return from_stream([s for s in sites if s.kind == "branch"], sites)

    def among(self, adapters: Mapping[str, Sequence[Site]]) -> tuple[Method, list[Site]]:
        if not adapters:
            raise NoMatch(f"{self.label}: no adapter is attached to this model yet; attach or load the trained ones first, then mix them.")
        for name in self.adapters:
            if name not in adapters:
                have = ", ".join(adapters)
                raise UnknownName(f"{self.label}: no adapter named {name!r} is attached; there are: {have}.{nearest(name, adapters)}")
        named = replace(self, adapters=self.adapters or tuple(adapters))
        found: dict[str, Site] = {}
        for name in named.adapters:
            for site in (s for s in adapters[name] if s.role != "head"):
                if site.kind not in self.kinds:
                    raise BadValue(
                        f"{self.label}: adapter {name!r} acts on the {site.kind} at {site.name}, and only changes of layers and sub-layers "
                        "can be mixed; name the others with adapters=(…)."
                    )
                found.setdefault(site.name, site)
        wanted = tokens_of(self.targets or "")
        kept = [s for s in found.values() if not wanted or any(matches(token, s) or token == s.role for token in wanted)]
        if not kept:
            raise NoMatch(f"{self.label}: targets={self.targets!r} names none of the adapters' places; leave it out to mix at all of them.")
        return named, [s for s in kept if s.depth is None or s.depth not in self.leave_out]

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return self.among({})[1]

    def init(self, site: Site, generator: Generator) -> Params:
        d = site.out_features
        p = {"W_q": normal((d, d), generator, 0.02), "b_q": zeros((d,)), "W_k": normal((d, d), generator, 0.02), "b_k": zeros((d,))}
        return p | {"W_v": torch.eye(d)}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        axis = 1 if site.kind == "conv" or site.channels_first else -1  # that of the channels
        h = call(x).movedim(axis, -1)
        changes = [y.movedim(axis, -1) - h for y in call.others(x, self.adapters).values()]
        q = {name: t.to(h.dtype) for name, t in p.items()}
        delta = torch.stack(changes, -2)  # [..., N, d]
        query, key = F.linear(h, q["W_q"], q["b_q"]), F.linear(delta, q["W_k"], q["b_k"])
        s = ((key @ query[..., None]).squeeze(-1) / self.T).to(torch.promote_types(h.dtype, torch.float32)).softmax(-1)
        return (h + F.linear((s.to(h.dtype)[..., None, :] @ delta).squeeze(-2), q["W_v"])).movedim(-1, axis)
