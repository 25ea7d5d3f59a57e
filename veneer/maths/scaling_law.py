"""The scaling law of sparse models: loss from sparsity, non-zero weights and data (2023, arXiv:2309.08520).

    L(S, N, D) = (a_S (1 − S)^b_S + c_S) · N^−b_N + e · D^−b_D + c        with e = a_D^b_D

S is the share of zeros in [0, 1), N the number of NON-ZERO weights of the pruned matrices, D the training data (tokens,
images or steps). All numbers are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from veneer.errors import BadValue

Array = Any
"""A float or a numpy array of float64."""

COEFFICIENTS = ("a_S", "b_S", "c_S", "b_N", "e", "b_D", "c")
LEAST_RUNS = 8
"""One more than the coefficients: with fewer runs any law fits."""
COSTS = ("dense", "gradual")
_LIMITS = np.array([1e6, *[30.0] * 6])
"""What is fitted is a_S itself and the natural logarithms of the other coefficients; they stay within ± this."""


@dataclass(frozen=True)
class Law:
    """The seven coefficients, for N counted in `N_unit` and D in `D_unit`; calling it and its methods take plain counts.

    `law(S, N, D)` is the loss. All coefficients are positive but a_S, which is negative where, at equal non-zeros, sparse models
    were worse than dense ones.
    """

    a_S: float
    b_S: float
    c_S: float
    b_N: float
    e: float
    b_D: float
    c: float
    N_unit: float = 1.0
    D_unit: float = 1.0

    def __call__(self, S: Array, N: Array, D: Array) -> Array:
        return self.capacity(S) * (np.asarray(N) / self.N_unit) ** -self.b_N + self.e * (np.asarray(D) / self.D_unit) ** -self.b_D + self.c

    def capacity(self, S: Array) -> Array:
        """a_S (1 − S)^b_S + c_S: what sparsity does to the loss at a fixed number of non-zeros."""
        return self.a_S * (1 - np.asarray(S, np.float64)) ** self.b_S + self.c_S

    @property
    def coefficients(self) -> np.ndarray:
        """The seven in the order of `COEFFICIENTS`."""
        return np.array([getattr(self, name) for name in COEFFICIENTS])

    @property
    def a_D(self) -> float:
        """e^(1/b_D), in units of `D_unit`; infinite where b_D is too small for a number."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.log(self.e) / self.b_D))

    @property
    def raw(self) -> Law:
        """The same law for N and D as plain counts."""
        scale = self.N_unit**self.b_N
        e = self.e * self.D_unit**self.b_D
        return replace(self, a_S=self.a_S * scale, c_S=self.c_S * scale, e=e, N_unit=1.0, D_unit=1.0)

    def factor(self, S: Array) -> Array:
        """How many times the non-zeros a dense model of the same loss has: N_dense / N; not a number where no model is as good."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return (self.capacity(0.0) / self.capacity(S)) ** (1 / self.b_N)

    def dense_size(self, S: Array, N: Array) -> Array:
        """Weights of the dense model that reaches the loss of N non-zeros at sparsity S."""
        return N * self.factor(S)

    @property
    def most(self) -> float:
        """The factor's limit as S goes to 1."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return float((self.capacity(0.0) / self.c_S) ** (1 / self.b_N))


# -- cost and the best sparsity ---------------------------------------------------------------------------------


def c_mul(S: Array) -> Array:
    """Cost of gradual pruning over that of a model that is sparse throughout: 25 % dense, 50 % on the cubic, 25 % sparse."""
    S = np.asarray(S, np.float64)
    return (0.25 + 0.5 * (1 - 0.75 * S)) / (1 - S) + 0.25


def data_for(S: Array, D0: Array, cost: str = "dense") -> Array:
    """Data that N non-zeros at sparsity S can see for the training cost of N dense weights on D0."""
    return D0 * (1 - np.asarray(S)) if _known(cost) == "dense" else D0 / c_mul(S)


def optimal_sparsity(law: Law, N: Array, D0: Array, cost: str = "dense") -> np.ndarray:
    """The sparsity of least loss for N non-zeros and the training cost 6 N D0, 0 where dense is best.

    Args:
        cost: "dense", where every step costs as much as one of the dense parent, D = D0 (1 − S), which has a closed form;
            "gradual", where zeros are never computed and D = D0 / c_mul(S).
    """
    N, D0 = np.asarray(N, np.float64) / law.N_unit, np.asarray(D0, np.float64) / law.D_unit
    if law.a_S <= 0:
        return np.zeros_like(N * D0)
    with np.errstate(divide="ignore", over="ignore"):
        # at the optimum the pull of capacity, a_S b_S (1 − S)^(b_S − 1) N^−b_N, equals that of data
        pull = np.log(law.e) - law.b_D * np.log(D0) + law.b_N * np.log(N)
        if _known(cost) == "dense":
            return np.maximum(0.0, -np.expm1((pull + np.log(law.b_D / (law.a_S * law.b_S))) / (law.b_D + law.b_S)))
        return _bisected(lambda S: _log_pull(law, S), pull)


def contour(law: Law, S: float, N: Array, cost: str = "dense") -> np.ndarray:
    """D0 at which S is the best sparsity for N non-zeros: a straight line of slope b_N / b_D in (log N, log D0).

    Infinite where no amount of data makes it the best (a_S ≤ 0).
    """
    if law.a_S <= 0:
        return np.full(np.shape(N), np.inf)
    if _known(cost) == "dense":
        pull = (law.b_D + law.b_S) * np.log1p(-S) - np.log(law.b_D / (law.a_S * law.b_S))
    else:
        pull = _log_pull(law, S)
    with np.errstate(over="ignore"):
        return law.D_unit * np.exp((np.log(law.e) + law.b_N * np.log(np.asarray(N) / law.N_unit) - pull) / law.b_D)


def _log_pull(law: Law, S: Array) -> Array:
    """ln(e D0^−b_D N^b_N) for which S is best under gradual pruning; falls in S, since c_mul'(S) = 0.375 / (1 − S)²."""
    left = 1 - np.asarray(S)
    return np.log(law.a_S * law.b_S / (0.375 * law.b_D)) + (law.b_S + 1) * np.log(left) + (1 - law.b_D) * np.log(c_mul(S))


def _bisected(falling: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """S in [0, 1) where a falling function has the wanted value; 0 where it lies below that at once. Halves ln(1 − S)."""
    low, high = np.zeros_like(wanted), np.full_like(wanted, 36.0)
    for _ in range(80):
        middle = (low + high) / 2
        above = falling(-np.expm1(-middle)) > wanted
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(falling(np.zeros_like(wanted)) > wanted, -np.expm1(-high), 0.0)


def _known(cost: str) -> str:
    if cost not in COSTS:
        raise BadValue(f"cost={cost!r} is not one of {', '.join(map(repr, COSTS))}.")
    return cost


# -- fitting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A fitted law and how well it fits.

    Args:
        loss: mean Huber loss of the residuals. log, delta: what the residuals were, and where the Huber loss turns linear.
        agreeing: of `starts` random starts, how many ended within 1 % of the best loss.
        residuals: predicted − measured, of the logarithms if `log`. most_S: the largest sparsity measured.
    """

    law: Law
    loss: float
    log: bool
    delta: float
    agreeing: int
    starts: int
    residuals: np.ndarray
    most_S: float


def huber(r: Array, delta: float) -> Array:
    """r² / 2 up to |r| = delta, then delta (|r| − delta / 2)."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def residuals(predicted: Array, measured: Array, log: bool) -> Array:
    """Predicted − measured, of the logarithms for language."""
    return np.log(predicted) - np.log(measured) if log else np.asarray(predicted) - measured


def fit(
    S: Array,
    N: Array,
    D: Array,
    L: Array,
    *,
    log: bool = True,
    delta: float | None = None,
    N_unit: float | None = None,
    D_unit: float | None = None,
    starts: int = 25,
    seed: int = 0,
) -> Fit:
    """The law that fits measured losses best, by BFGS from `starts` points drawn from [0, 1]^7.

    Args:
        S, N, D, L: one entry a run.
        log: residuals of logarithms (language) instead of plain ones (vision).
        delta: of the Huber loss; 0.001 with `log`, else 0.01.
        N_unit, D_unit: what N and D are divided by before; the power of ten nearest to their means unless given.
    Raises:
        BadValue: fewer than 8 runs, or a value out of its range.
    """
    S, N, D, L = check_runs(S, N, D, L)
    delta = delta or (0.001 if log else 0.01)
    units = N_unit or _unit(N), D_unit or _unit(D)
    x = S, N / units[0], D / units[1]
    theta = _theta(np.random.default_rng(seed).uniform(size=(starts, 7)))
    theta, loss = _minimised(_objective(x, L, log, delta), theta)
    best = int(np.argmin(loss))
    law = _law(theta[best], units)
    agreeing = int((loss <= 1.01 * loss[best] + 1e-12).sum())
    return Fit(law, float(loss[best]), log, delta, agreeing, starts, residuals(law(S, N, D), L, log), float(S.max()))


def resampled(found: Fit, S: Array, N: Array, D: Array, L: Array, *, times: int = 200, seed: int = 0) -> list[Law]:
    """Laws fitted to as many samples of the runs, drawn with replacement; each fit starts from the one of all runs."""
    S, N, D, L = check_runs(S, N, D, L)
    law, n = found.law, len(S)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=times)
    start = _theta(law.coefficients)
    x = S, N / law.N_unit, D / law.D_unit
    theta, _ = _minimised(_objective(x, L, found.log, found.delta, counts / n), np.tile(start, (times, 1)))
    return [_law(t, (law.N_unit, law.D_unit)) for t in theta]


def largest_left_out(S: Array, N: Array, D: Array, L: Array, **settings: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Extrapolation: fits without the runs of the largest N → (which they are, their predicted losses).

    None if fewer than 8 runs would be left. Settings as for `fit`.
    """
    S, N, D, L = check_runs(S, N, D, L)
    out = 0.99 * N.max() < N  # rounding makes counts of equal models differ by a few
    if (~out).sum() < LEAST_RUNS:
        return None
    law = fit(S[~out], N[~out], D[~out], L[~out], **settings).law
    return out, law(S[out], N[out], D[out])


def check_runs(S: Array, N: Array, D: Array, L: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The runs as float64 arrays. Raises `BadValue` for too few, or for a value out of its range, with the run's place."""
    arrays = [np.asarray(v, np.float64).reshape(-1) for v in (S, N, D, L)]
    if len({len(a) for a in arrays}) > 1:
        raise BadValue(f"S, N, D and L have {', '.join(str(len(a)) for a in arrays)} entries; each run has one of each.")
    if len(arrays[0]) < LEAST_RUNS:
        raise BadValue(
            f"{len(arrays[0])} runs are too few to fit the seven coefficients of the law; give at least {LEAST_RUNS}, "
            "of 3 or more sizes, sparsities and lengths."
        )
    for i, (s, *rest) in enumerate(zip(*arrays)):
        if not 0 <= s < 1:
            raise BadValue(f"Run {i + 1}: S={s:g} is not a sparsity; it must be at least 0 and less than 1.")
        for name, value in zip("NDL", rest):
            if not 0 < value < np.inf:
                raise BadValue(f"Run {i + 1}: {name}={value:g} is out of range; it must be more than 0 and finite.")
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _unit(values: np.ndarray) -> float:
    return float(10.0 ** np.round(np.log10(values).mean()))


def _theta(coefficients: np.ndarray) -> np.ndarray:
    """Coefficients [..., 7] as they are fitted."""
    return np.concatenate([coefficients[..., :1], np.log(np.maximum(coefficients[..., 1:], np.exp(-_LIMITS[1:])))], -1)


def _law(theta: np.ndarray, units: tuple[float, float]) -> Law:
    return Law(**dict(zip(COEFFICIENTS, [float(theta[0]), *map(float, np.exp(theta[1:]))])), N_unit=units[0], D_unit=units[1])


Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Coefficients as they are fitted [B, 7] and the numbers of their problems [B] → losses [B] and gradients [B, 7]."""


def _objective(
    x: tuple[np.ndarray, np.ndarray, np.ndarray], L: np.ndarray, log: bool, delta: float, weights: np.ndarray | None = None
) -> Objective:
    """The mean Huber loss of a law, with its gradient; `weights` [problems, runs] in place of 1/n for each run."""
    dense, size, data = np.log1p(-x[0]), np.log(x[1]), np.log(x[2])
    share = np.full((1, len(L)), 1 / len(L)) if weights is None else weights

    def at(theta: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a_S, _, lc_S, _, le, _, lc = theta.T[:, :, None]
        b_S, b_N, b_D = np.exp(theta.T[[1, 3, 5], :, None])
        w = share if weights is None else weights[which]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            unit, kept = np.exp(b_S * dense - b_N * size), np.exp(lc_S - b_N * size)
            pruned = a_S * unit
            seen, rest = np.exp(le - b_D * data), np.exp(lc)
            P = pruned + kept + seen + rest
            r = residuals(P, L, log)
            slope = w * np.clip(r, -delta, delta) / (P if log else 1.0)
            parts = unit, pruned * b_S * dense, kept, -b_N * size * (pruned + kept), seen, -b_D * data * seen, rest
            loss = (w * huber(r, delta)).sum(-1)
            gradient = np.stack([(slope * part).sum(-1) for part in parts], -1)
        return np.where(np.isfinite(loss), loss, np.inf), np.nan_to_num(gradient)

    return at


def _minimised(f: Objective, theta: np.ndarray, steps: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """BFGS from every row of theta at once → where each ended, and the values there."""
    theta = theta.copy()
    everyone, eye = np.arange(len(theta)), np.eye(7)
    value, gradient = f(theta, everyone)
    H = np.tile(eye, (len(theta), 1, 1))
    fresh, live = np.ones(len(theta), bool), np.isfinite(value)
    for _ in range(steps):
        rows = everyone[live]
        if not len(rows):
            break
        g = gradient[rows]
        d = -(H[rows] @ g[:, :, None])[:, :, 0]
        plain = fresh[rows] | (_dot(d, g) >= 0)
        d = np.where(plain[:, None], -g / (np.sqrt(_dot(g, g)) + 1e-300)[:, None], d)
        d /= np.maximum(1.0, np.sqrt(_dot(d, d)) / 2)[:, None]
        new, lower, ng, found = _line(f, theta[rows], value[rows], g, d, rows)
        s, y = new - theta[rows], ng - g
        curved = found & (_dot(s, y) > 1e-12 * np.sqrt(_dot(s, s) * _dot(y, y)))
        gain = value[rows] - lower
        theta[rows], value[rows], gradient[rows] = new, lower, ng
        first = np.where(fresh[rows][:, None, None], eye * (_dot(s, y) / (_dot(y, y) + 1e-300))[:, None, None], H[rows])
        H[rows[curved]] = _updated(first[curved], s[curved], y[curved])
        # where a step gains nothing the plain gradient is tried once more before the row is done
        stuck = ~found | (gain <= 1e-10 * lower + 1e-22)
        live[rows[stuck & fresh[rows]]] = False
        fresh[rows] = stuck
    return theta, value


def _line(
    f: Objective, theta: np.ndarray, value: np.ndarray, g: np.ndarray, d: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first of 1, 1/2, 1/4 … along d that lowers the value enough → point, value, gradient, and whether there was one."""
    new, v, ng = theta.copy(), value.copy(), g.copy()
    found, t = np.zeros(len(theta), bool), 1.0
    descent = _dot(g, d)
    for _ in range(40):
        left = ~found
        if not left.any():
            break
        at = np.clip(theta[left] + t * d[left], -_LIMITS, _LIMITS)
        tried, gradient = f(at, rows[left])
        good = tried <= value[left] + 1e-4 * t * descent[left]
        where = np.flatnonzero(left)[good]
        new[where], v[where], ng[where] = at[good], tried[good], gradient[good]
        found[where] = True
        t /= 2
    return new, v, ng, found


def _updated(H: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Inverse Hessians [B, 7, 7] after steps s [B, 7] that changed the gradients by y."""
    rho = 1 / _dot(s, y)[:, None, None]
    V = np.eye(7) - rho * s[:, :, None] * y[:, None, :]
    return V @ H @ V.swapaxes(1, 2) + rho * s[:, :, None] * s[:, None, :]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1)
