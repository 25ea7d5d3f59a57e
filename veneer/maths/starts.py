"""Starting points for low-rank factors: decompositions of a weight, a simulated quantiser, principal components of inputs.

`Started` is the low-rank method that begins at one of them; the functions below it are plain maths on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear

from veneer.init import normal, zeros
from veneer.method import Call, LowRankMethod, Method, Params, replaced
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True, kw_only=True)
class Started(LowRankMethod):
    """W_eff = W + s · (B A − B0 A0), or Q + s · B A: factors A [r, in], B [out, r] that need not start at B A = 0.

    The base is never changed: a start taken from W keeps frozen copies A0, B0 and takes them off again; LoftQ keeps
    the quantised weight Q [out, in] (frozen), which stands for W.
    """

    start: str = option("kaiming", "where A and B start", choices=("kaiming", "gaussian", "pissa", "olora", "loftq", "eva"))
    niter: int = option(0, "pissa: power iterations of a randomised SVD; 0 is exact", ge=0)
    bits: int = option(4, "loftq: bits of the simulated quantiser", choices=(2, 3, 4, 8))
    spacing: str = option("normal", "loftq: levels of the quantiser; normal with 4 bits is NF4", choices=("normal", "linear"))
    loftq_iters: int = option(1, "loftq: iterations; the nearest is kept", ge=1)
    rho: float = option(2.0, "eva: a site's largest rank over r", ge=1)
    tau: float = option(0.99, "eva: cosine at which components count as settled", gt=0, le=1)
    whiten: bool = option(False, "eva: divide components by √(singular value)")
    frozen = ("A0", "B0", "Q")
    r, alpha, rslora = 8, cast("float | None", None), False  # the method's own hyper-parameters

    @property
    def scale(self) -> float:
        return (self.r if self.alpha is None else self.alpha) / (self.r**0.5 if self.rslora else self.r)

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"identity": "a quantised copy stands for the weight"} if self.start == "loftq" else {}

    @property  # type: ignore[misc]
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.start == "eva"

    def check(self, site: Site) -> None:
        most = min(site.in_features, site.out_features)
        if self.start in ("pissa", "olora", "loftq", "eva") and self.r > most:
            raise self.refuse(
                f"start={self.start!r} needs r ≤ min(in, out) = {most}, not r={self.r}, {{at}}; lower r or choose 'kaiming'.", site
            )
        if self.start in ("loftq", "eva") and site.kind != "linear":
            raise self.refuse(f"start={self.start!r} is for linear layers, not for the {site.kind} {{at}}; choose start='kaiming'.", site)

    def kept(self, A: tuple[int, ...], B: tuple[int, ...]) -> Params:
        """Room for the frozen tensors of this start, given the shapes of A and B."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "pissa": {"A0": A, "B0": B},
            "olora": {"A0": A, "B0": B},
            "loftq": {"Q": (B[0], A[1])},
        }
        return {name: zeros(shape) for name, shape in shapes.get(self.start, {}).items()}

    @property
    def reads_weight(self) -> bool:
        return self.start in ("pissa", "olora", "loftq")

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        flat = W.flatten(1)
        if self.start == "loftq":
            return p | dict(zip("QAB", loftq(flat, self.r, self.scale, self.bits, self.loftq_iters, self.spacing)))
        if self.start not in ("pissa", "olora"):
            return p
        A, B = olora(flat, self.r) if self.start == "olora" else pissa(flat, self.r, self.scale, self.niter, generator)
        return p | {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        return add_rows(state, x.flatten(0, -2), int(self.rho * self.r), self.r, self.tau)

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        first, found = eva(states, self.r, self.whiten), dict[str, tuple[Method, Params] | None]()
        for site in sites:
            A = first.get(site.name)
            if A is None:
                found[site.name] = None
                continue
            r = len(A)  # alpha follows r, so that the scale stays
            own = replaced(self, {"r": r, "alpha": self.scale * (r**0.5 if self.rslora else r)})
            found[site.name] = (own, own.init(site, Generator()) | {"A": A})
        return found

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        if "A0" not in p:
            return self.scale * p["B"], p["A"]
        return self.scale * torch.cat([p["B"], -p["B0"]], 1), torch.cat([p["A"], p["A0"]])

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None if "Q" in p else self.factors(p, site)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return super().weight(p["Q"].to(W.dtype) if "Q" in p else W, p, site)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if "Q" not in p:
            return super().forward(call, x, p, site)
        L, R = (factor.to(x.dtype) for factor in self.factors(p, site))
        return call.apply(x, weight=p["Q"]) + linear(linear(dropout(x, self.dropout, call.training), R), L)


def working(W: Tensor) -> Tensor:
    """W in at least float32: decompositions in half precision are not to be trusted."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def truncated_svd(W: Tensor, r: int, niter: int = 0, generator: Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], S [r], Vᵀ [r, in] of W [out, in]; exact for niter = 0, else from `niter` power iterations
    on r + 10 random directions."""
    W = working(W)
    width = min(r + 10, *W.shape)
    if niter == 0 or generator is None:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vt[:r]
    basis = torch.linalg.qr(W @ normal((W.shape[1], width), generator).to(W))[0]
    for _ in range(niter):
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.T @ basis)[0])[0]
    U, S, Vt = torch.linalg.svd(basis.T @ W, full_matrices=False)
    return (basis @ U)[:, :r], S[:r], Vt[:r]


def pissa(W: Tensor, r: int, scale: float, niter: int = 0, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] with scale · B A = the best rank-r approximation of W (arXiv:2404.02948)."""
    U, S, Vt = truncated_svd(W, r, niter, generator)
    root = (S / scale).sqrt()
    return root[:, None] * Vt, U * root


def olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r]: the leading part of W's reduced QR decomposition (arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(working(W))
    return R[:r].contiguous(), Q[:, :r].contiguous()


@cache
def codebook(bits: int, spacing: str = "normal") -> tuple[float, ...]:
    """The 2^bits levels in [-1, 1], ascending: quantiles of a normal distribution (NF4 for 4 bits, arXiv:2305.14314),
    or evenly spaced ("linear")."""
    if spacing == "linear":
        return tuple(torch.linspace(-1, 1, 2**bits, dtype=torch.float64).tolist())
    half = 2 ** (bits - 1)
    top = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    upper = torch.special.ndtri(torch.linspace(top, 0.5, half + 1, dtype=torch.float64))[:-1]
    lower = -torch.special.ndtri(torch.linspace(top, 0.5, half, dtype=torch.float64))[:-1]
    levels = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return tuple((levels / levels.max()).tolist())


def quantised(W: Tensor, bits: int = 4, block: int = 64, spacing: str = "normal") -> Tensor:
    """W rounded to 2^bits levels times the largest magnitude of each run of `block` entries, still in floating point."""
    W = working(W)
    levels = torch.tensor(codebook(bits, spacing), dtype=W.dtype, device=W.device)
    flat = W.reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    peak = rows.abs().amax(1, keepdim=True)
    code = torch.bucketize(rows / torch.where(peak > 0, peak, 1), (levels[1:] + levels[:-1]) / 2)
    return (levels[code] * peak).view(-1)[: len(flat)].view_as(W)


def loftq(W: Tensor, r: int, scale: float, bits: int = 4, iterations: int = 1, spacing: str = "normal") -> tuple[Tensor, Tensor, Tensor]:
    """Q [out, in], A [r, in], B [out, r] with Q + scale · B A near W (arXiv:2310.08659).

    More iterations do not always come nearer, so the nearest iterate is kept.
    """
    W = working(W)
    A, B = W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    best, nearest = (W, A, B), float("inf")
    for _ in range(iterations):
        Q = quantised(W - scale * B @ A, bits, spacing=spacing)
        A, B = pissa(W - Q, r, scale)
        distance = float((W - Q - scale * B @ A).norm())
        if distance < nearest:
            best, nearest = (Q, A, B), distance
    return best


@dataclass(frozen=True)
class Components:
    """Principal components of the rows seen so far.

    Args:
        count: rows seen. mean, square [in]: their mean and their summed squared distance from it.
        vectors [k, in], values [k]: right-singular vectors and singular values of the centred rows.
        settled: whether the leading vectors have stopped turning.
    """

    count: int
    mean: Tensor
    square: Tensor
    vectors: Tensor
    values: Tensor
    settled: bool = False

    @property
    def ratio(self) -> Tensor:
        """Share of the whole variance that each component explains, descending [k]."""
        return self.values**2 / self.square.sum().clamp_min(torch.finfo(self.values.dtype).tiny)


def add_rows(seen: Components | None, x: Tensor, k: int, lead: int, tau: float) -> Components:
    """Incremental principal components: the state after the rows x [n, in].

    k components are kept; they are settled once the first `lead` of them all have a cosine of at least tau
    with those before the update. A settled state does not change.
    """
    if seen is not None and seen.settled:
        return seen
    x = working(x.detach())
    n, mean = x.shape[0], x.mean(0)
    rows, square = x - mean, ((x - mean) ** 2).sum(0)
    if seen is not None:  # merging two centred sets adds one row along the difference of their means
        total = seen.count + n
        shift = mean - seen.mean
        rows = torch.cat([seen.values[:, None] * seen.vectors, rows, (shift * (seen.count * n / total) ** 0.5)[None]])
        square = seen.square + square + shift**2 * (seen.count * n / total)
        n, mean = total, seen.mean + shift * (n / total)
    _, S, Vt = torch.linalg.svd(rows, full_matrices=False)
    vectors = Vt[:k]
    still = False
    if seen is not None and len(seen.vectors) >= lead:
        still = bool(((vectors[:lead] * seen.vectors[:lead]).sum(1).abs() >= tau).all())
    return Components(n, mean, square, vectors, S[:k], still)


def share_ranks(ratios: Sequence[Tensor], budget: int) -> list[int]:
    """How many of the `budget` largest explained-variance ratios each layer owns (arXiv:2410.07170); ties go to the earlier layer."""
    pool = torch.cat([r.detach().cpu().double() for r in ratios])
    owner = torch.cat([torch.full((len(r),), i) for i, r in enumerate(ratios)])
    kept = torch.sort(pool, descending=True, stable=True).indices[:budget]
    return torch.bincount(owner[kept], minlength=len(ratios)).tolist()


def eva(seen: Mapping[str, Components], r: int, whiten: bool = False) -> dict[str, Tensor | None]:
    """First factor [rank, in] by layer name: its leading input components, the ranks shared out from r per layer
    (arXiv:2410.07170). None where a layer's share is nothing."""
    ranks = share_ranks([c.ratio for c in seen.values()], r * len(seen))
    first = {name: c.vectors[:rank] / (c.values[:rank, None].sqrt() if whiten else 1) for (name, c), rank in zip(seen.items(), ranks)}
    return {name: A if len(A) else None for name, A in first.items()}
