"""Counts of trained parameters in closed form, as the methods' cards give them: the second opinion on `init`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from veneer.maths.factor import balanced
from veneer.maths.tensor_train import usual_shape
from veneer.site import Site

Formula = Callable[[Any, Sequence[Site]], int]


def _low_rank(m: Any, sites: Sequence[Site]) -> int:
    return sum(m.r * (s.in_features + s.out_features) for s in sites)


def _groups(m: Any, sites: Sequence[Site]) -> int:
    return sum(2 * m.r * width for width in {s.role: s.in_features for s in sites}.values())


def _bottlenecks(m: Any, sites: Sequence[Site]) -> int:
    width = {s.name: max(1, int(s.out_features // m.reduction)) if m.m is None else m.m for s in sites}
    return sum(2 * width[s.name] * s.out_features + width[s.name] + s.out_features for s in sites)


def _ladder(m: Any, sites: Sequence[Site]) -> int:
    D = sites[0].out_features
    w = m.w or max(1, int(D // m.reduction))
    rung = w * D + w + 1 + 2 * w + 2 * m.ratio * w * w + m.ratio * w + w + (4 * w * w + 2 * w if m.heads else 0)
    return w * D + w + sum(rung for s in sites if s.depth not in m.leave_out) + D * w + D + 2 * w


def _kronecker_bottlenecks(m: Any, sites: Sequence[Site]) -> int:
    width = {s.name: max(m.n, int(s.out_features // m.reduction)) if m.m is None else m.m for s in sites}
    return m.n**3 + sum(2 * m.r * (s.out_features + width[s.name]) + width[s.name] + s.out_features for s in sites)


def _prefixes(m: Any, sites: Sequence[Site]) -> int:
    attention = [s for s in sites if s.kind == "attention"]
    if not attention or m.mid is None:
        return sum(2 * m.length * s.out_features for s in attention)
    D, rows = attention[0].heads * attention[0].head_dim, 2 * len(attention) * attention[0].out_features
    return m.length * D + D * m.mid + m.mid + rows * m.mid + rows


def _mix_and_match(m: Any, sites: Sequence[Site]) -> int:
    return _prefixes(m, sites) + sum(2 * m.m * s.out_features + m.m + s.out_features for s in sites if s.kind == "branch")


def _beside(m: Any, sites: Sequence[Site]) -> int:
    return sum(2 * m.m * s.out_features + m.m + s.out_features for s in sites)


def _frequencies(m: Any, sites: Sequence[Site]) -> int:
    mixed = [s for s in sites if len(m.experts(s)) > 1]
    return _beside(m, sites) + 2 * _beside(m, mixed) + sum(3 * s.out_features + 3 for s in mixed) + len(sites)


def _refined(m: Any, sites: Sequence[Site]) -> int:
    D = sites[0].out_features
    return len(sites) * m.r * (m.m + D) + 2 * (D * D + D) + 1


def _prompted(m: Any, sites: Sequence[Site]) -> int:
    d, modules = sites[0].out_features, -(-sites[0].length // m.share)
    return 2 * m.L * d + modules * (2 * d * m.r + m.r + d + 1)


def _convolved(m: Any, sites: Sequence[Site]) -> int:
    return sum(m.blocks * (2 * m.width(s) * s.out_features + m.width(s) + s.out_features) for s in sites)


def _small_transformers(m: Any, sites: Sequence[Site]) -> int:
    total = 0
    for s in sites:
        D, k, f = s.out_features, m.width(s), m.ratio
        total += 2 * D * k + k + D + m.blocks * (4 * k * k + 4 * k + 2 * f * k * k + f * k + k + 4 * k)
    return total


def _gated_union(m: Any, sites: Sequence[Site]) -> int:
    D, layers = sites[0].heads * sites[0].head_dim, [s for s in sites if s.kind == "linear"]
    width = m.m or max(1, D // 16)
    adapters = sum(2 * width * D + width + D + D + 1 for s in sites if s.kind in ("norm", "branch"))
    prefixes = _prefixes(m, sites) + sum(1 if s.causal else D + 1 for s in sites if s.kind == "attention")
    return adapters + prefixes + sum(m.r * (s.in_features + s.out_features) + s.in_features + 1 for s in layers)


def _rescaled(m: Any, sites: Sequence[Site]) -> int:
    return sum(s.in_features if s.role == "mlp.down" else s.out_features for s in sites)


def _turned(m: Any, site: Site) -> int:
    return site.out_features if site.kind == "embedding" else site.in_features


def _bases(m: Any, sites: Sequence[Site]) -> int:
    least = [min(s.in_features, s.out_features) for s in sites]
    return sum(-(-d // m.r) * (m.r + d) for d in least)


def _kron(m: Any, sites: Sequence[Site]) -> int:
    total = 0
    for s in sites:
        k = math.prod(s.kernel)
        (o1, o2), (i1, i2) = (
            max((a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a) for n in (s.out_features, s.in_features // k)
        )
        total += m.r * (o1 + i1) if m.decompose_both and 2 * m.r < max(o1, i1) else o1 * i1
        total += m.r * (o2 + i2 * k) if 2 * m.r < max(o2, i2) else o2 * i2 * k
    return total


def _modules(m: Any, sites: Sequence[Site]) -> int:
    widths = {f"{s.depth}.{'mlp' if s.role.startswith('mlp') else 'attn'}": s.in_features for s in sites}
    return sum(m.n**3 + 2 * m.r * d for d in widths.values())


def _trains(m: Any, sites: Sequence[Site]) -> int:
    total = 0
    for a, b in ((a, b) for s in sites for a, b in ((s.in_features, m.r), (m.r, s.out_features))):
        n = usual_shape(a, b) or ()
        total += sum(m.tt_rank ** ((d > 0) + (d < len(n) - 1)) * k for d, k in enumerate(n))
    return total


def _rings(m: Any, sites: Sequence[Site]) -> int:
    factors = [(balanced(s.in_features, m.D), balanced(s.out_features, m.D)) for s in sites]
    return sum(m.R_T**2 * sum(i * i for i in ins) + m.R_res**2 * (sum(ins) + sum(outs)) for ins, outs in factors)


def _shares(m: Any, sites: Sequence[Site]) -> int:
    total = 0
    for s in {s.role: s for s in sites}.values():
        inside, outside = (s.out_features, s.in_features) if s.role.endswith((".v", ".up")) else (s.in_features, s.out_features)
        units = {"v": s.kv_heads, "o": s.heads}.get(s.role.rpartition(".")[2], inside)
        share = {"v": m.v, "o": m.o, "up": m.u, "down": m.d}[s.role.rpartition(".")[2]]
        total += max(1, int(s.length * units * share)) * inside // units * outside
    return total


def _dynamic(m: Any, sites: Sequence[Site]) -> int:
    beside = sum(3 * s.out_features + 1 + 2 * m.r * s.out_features + m.r + s.out_features for s in sites if s.kind == "branch")
    return beside + sum(2 * s.out_features for s in sites if s.kind != "branch" and (s.kind != "block" or s.index + 1 < s.length or m.keep))


def _neighbours(m: Any, sites: Sequence[Site]) -> int:
    d, blocks = sites[0].out_features, [s for s in sites if s.kind == "block" and s.depth is not None]
    prompted = sum(m.prompts(s) > 0 for s in blocks)
    adapters = 2 * len(blocks) * (2 * d * m.m + m.m + d) + prompted * (m.L * d + 2 * d * m.b + m.b + d)
    return adapters + 2 * len(blocks) * d + 4 * m.inner * d + 3 * d + 3 * m.L


FORMULAS: dict[str, Formula] = {
    "lora": _low_rank,
    "dora": lambda m, sites: _low_rank(m, sites) + sum(s.out_features for s in sites),
    "adalora": lambda m, sites: sum(m.init_r * (s.in_features + s.out_features + 1) for s in sites),
    "melora": _low_rank,
    "gralora": lambda m, sites: sum((m.r + m.hybrid_r) * (s.in_features + s.out_features) for s in sites),
    "1lora": lambda m, sites: sum(s.out_features for s in sites),
    "vera": lambda m, sites: sum(m.r + s.out_features for s in sites),
    "randlora": _bases,
    "delora": lambda m, sites: _low_rank(m, sites) + len(sites),
    "wegeft": _groups,
    "oft": lambda m, sites: sum(n // k * (k * (k - 1) // 2) for s in sites for n in [_turned(m, s)] for k in [n // m.r if m.r else m.k]),
    "boft": lambda m, sites: sum(m.m * (_turned(m, s) // m.k) * m.k**2 + s.out_features for s in sites),
    "hra": lambda m, sites: sum(m.r * _turned(m, s) for s in sites),
    "road": lambda m, sites: sum({"road_1": 1, "road_2": 2, "road_4": 4}[m.variant] * s.out_features for s in sites),
    "c3a": lambda m, sites: sum(s.out_features * s.in_features // m.b for s in sites),
    "shira": _low_rank,
    "loha": lambda m, sites: 2 * _low_rank(m, sites),
    "lokr": _kron,
    "hut": _low_rank,
    "bone": lambda m, sites: sum(m.r * s.out_features for s in sites),
    "miss": lambda m, sites: sum(m.r * (m.mini_r or s.out_features) for s in sites),
    "alore": _modules,
    "lorta": lambda m, sites: m.r * (sites[0].in_features + sites[0].head_dim + sites[0].heads + sites[0].length + 4),
    "loretta": _trains,
    "tlora": _rings,
    "mola": lambda m, sites: sum(m.experts(s) * (m.r * (s.in_features + s.out_features) + s.in_features) for s in sites),
    "s2-lora": lambda m, sites: m.r * (len(sites) + sum(map(sum, {(s.in_features, s.out_features) for s in sites}))),
    "wara": lambda m, sites: sum(m.r * (s.in_features + s.out_features) // 2 for s in sites),
    "fourierft": lambda m, sites: m.n * len(sites),
    "waveft": lambda m, sites: m.n * len(sites),
    "quantum-adapter": lambda m, sites: sum(m.P * m.N * s.groups * m.base(s)[1] ** 2 for s in sites),
    "nera": lambda m, sites: sum(s.in_features * m.K * (m.r + 1) + s.in_features + m.r * s.out_features + 1 for s in sites),
    "snell": _low_rank,
    "snella": lambda m, sites: _low_rank(m, sites) + 3 * len(sites),
    "qwha": _low_rank,
    "l4q": lambda m, sites: sum(
        m.r * (s.in_features + s.out_features) + (1 + m.train_offset) * s.out_features * s.in_features // m.group for s in sites
    ),
    "sketchtune": lambda m, sites: sum(s.out_features * m.gpr * 2**m.bits for s in sites),
    "pst": lambda m, sites: sum((m.weight_rank + m.mask_rank + 1) * (s.in_features + s.out_features) for s in sites),
    "bottleneck-adapter": _bottlenecks,
    "compacter": _kronecker_bottlenecks,
    "red": lambda m, sites: sum(2 * s.out_features for s in sites),
    "adaptformer": _beside,
    "conv-adapter": _convolved,
    "transformer-adapter": _small_transformers,
    "earth-adapter": _frequencies,
    "rein": _refined,
    "dvpt": _prompted,
    "dapt": _dynamic,
    "point-peft": _neighbours,
    "paca": lambda m, sites: sum(m.r * s.out_features for s in sites),
    "s2ft": _shares,
    "ia3": _rescaled,
    "prompt-tuning": lambda m, sites: m.length * sites[0].in_features,
    "prefix-tuning": lambda m, sites: sum(2 * m.length * s.kv_heads * s.head_dim for s in sites),
    "dept": lambda m, sites: m.length * sites[0].in_features + m.r * (m.s + sites[0].in_features),
    "mam": _mix_and_match,
    "unipelt": _gated_union,
    "ada-deft": lambda m, sites: len(sites),
    "light-peft": lambda m, sites: sum(s.heads if s.role == "attn.o" else s.in_features for s in sites),
    "context-peft": lambda m, sites: m.C * sum(m.r * (s.in_features + s.out_features) for s in sites),
    "ladder-side-tuning": _ladder,
    "p-tuning": lambda m, sites: m.length * sites[0].in_features + 3 * (sites[0].in_features ** 2 + sites[0].in_features),
    "adamix": lambda m, sites: sum((m.N + 1) * m.m * s.out_features + m.N * m.m + s.out_features for s in sites),
    "gps": lambda m, sites: m.K * sum(s.out_features for s in sites),  # at home there are no biases
    "explora": lambda m, sites: sum(  # at home there are no biases
        s.out_features if s.kind == "norm" else s.out_features * s.in_features if m.whole(s) else m.r * (s.in_features + s.out_features)
        for s in sites
    ),
    "vpt": lambda m, sites: len(sites) * m.length * sites[0].in_features,
    "pyra": lambda m, sites: sum(r + 3 * sites[0].out_features for r in m.gone(sites[0]) if r),
    "llama-adapter": lambda m, sites: sum(m.length * s.in_features + s.heads for s in sites),
    "mona": lambda m, sites: sum(2 * m.m * s.out_features + 5 * s.out_features + m.m * (m.m + 88) for s in sites),
    "noah": lambda m, sites: sum(
        m.length * s.in_features
        if s.kind == "block"
        else m.r * (s.in_features + s.out_features)
        if s.kind == "linear"
        else 2 * m.m * s.out_features + m.m + s.out_features
        for s in sites
    ),
    "lora-fa": lambda m, sites: sum(m.r * s.out_features for s in sites),
}
