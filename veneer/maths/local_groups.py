"""Tokens that talk with their neighbours in space: groups around far-apart centres, attention inside them, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, ones, uniform, zeros
from veneer.maths.patches import quick_gelu
from veneer.maths.point_sets import farthest, nearest, nearness, places, taken, wide
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.running_statistics import NOTE, RunningStatistics
from veneer.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Neighbourly(Method):
    """x_n ← x_n + propagate · Σ_s w_ns pooled_s, then x ← x + A_geo(x); pooled_s = GELU(BN(max U_s)) + centre · x_s

    U_s = x + attention(LN_g x) among the k tokens nearest to centre s; w_ns goes by inverse squared distance.
    """

    m: int = option(16, "width of the adapters' bottlenecks", ge=1)
    inner: int = option(18, "width of the attention inside groups, over all heads", ge=1)
    heads: int = option(6, "its heads", ge=1)
    k: int = option(16, "tokens of a group; half of the points of a patch", ge=1)
    propagate: float = option(0.3, "factor of what comes back from the centres; 0.2 on Point-M2AE")
    centre: float = option(0.3, "factor of the centre's own token")
    pooling: str = option("max", "how a group becomes one token", choices=("max", "max+mean"))
    start: str = option("xavier", "first W_u and b_u", choices=("xavier", "zero"))
    class_token: bool = option(True, "the first token is a class token and stands for no point")
    dropout: float = option(0.0, "dropout on prompts and in bottlenecks, in training; the authors train with 0.1", ge=0, lt=1)

    def adapted(self, x: Tensor, xyz: Tensor | None, prompts: int, p: Params, call: Call, site: Site) -> Tensor:
        """The whole step on a block's output x [batch, tokens, D]; xyz as in `talked`."""
        c = int(self.class_token)
        x = torch.cat([x[:, :c], self.talked(x[:, c:], xyz, prompts, p, call, site)], 1)
        return x + self.adapter(x, p, "A_geo", call.training)

    def validate(self) -> None:
        if self.inner % self.heads:
            raise BadValue(f"{self.label}: heads={self.heads} does not divide inner={self.inner}; choose another of them.")

    def check(self, site: Site) -> None:
        if site.batch_dim:
            raise self.refuse("its tokens must come as [batch, tokens, width] {at}, not tokens first.", site)

    def fits(self, tokens: int, prompts: int, site: Site) -> None:
        """Raises `BadValue` where tokens of points [tokens − prompts] cannot be grouped."""
        points = tokens - prompts
        if points % 2 or points < 2:
            raise self.refuse(f"{points} point tokens {{at}} are no even number; choose class_token to fit the model.", site)
        if self.k > tokens:
            raise self.refuse(f"k={self.k} neighbours are more than the {tokens} tokens {{at}}; choose k ≤ {tokens}.", site)

    def geometry(self, D: int, generator: Generator) -> Params:
        """A block's own tensors."""
        norm = {"BN.w": ones((D,)), "BN.b": zeros((D,)), "BN.mean": zeros((D,)), "BN.var": ones((D,))}
        return {**self.bottleneck("A_geo", D, self.m, generator), **norm}

    def shared(self, D: int, generator: Generator) -> Params:
        """The attention that all blocks share."""
        w = self.inner
        p = {"SA.qkv": kaiming_uniform((3 * w, D), generator), "SA.o": kaiming_uniform((D, w), generator)}
        return {**p, "SA.b": kaiming_uniform((D,), generator, w), "LN_g.w": ones((D,)), "LN_g.b": zeros((D,))}

    def bottleneck(self, name: str, D: int, m: int, generator: Generator) -> Params:
        bound, still = (6 / (D + m)) ** 0.5, self.start == "zero"
        down = {f"{name}.W_d": uniform((m, D), generator, bound), f"{name}.b_d": normal((m,), generator, 1e-6)}
        up, b_u = uniform((D, m), generator, bound), normal((D,), generator, 1e-6)
        return {**down, f"{name}.W_u": torch.zeros_like(up) if still else up, f"{name}.b_u": torch.zeros_like(b_u) if still else b_u}

    def adapter(self, x: Tensor, p: Params, name: str, training: bool) -> Tensor:
        """W_u q(W_d x + b_d) + b_u, q QuickGELU."""
        W_d, b_d, W_u, b_u = (p[f"{name}.{part}"].to(x.dtype) for part in ("W_d", "b_d", "W_u", "b_u"))
        return F.linear(F.dropout(quick_gelu(F.linear(x, W_d, b_d)), self.dropout, training), W_u, b_u)

    def pooled(self, x: Tensor, xyz: Tensor, S: int, p: Params, call: Call) -> tuple[Tensor, Tensor]:
        """One token for each of S groups [batch, S, D], and the indices of their centres [batch, S]."""
        centres = farthest(xyz, S)
        U = taken(x, nearest(xyz, taken(xyz, centres), self.k))
        U = U + group_attention(U, {name: t.to(x.dtype) for name, t in p.items() if name[:2] in ("SA", "LN")}, self.heads)
        largest = U.amax(2) + U.mean(2) if self.pooling == "max+mean" else U.amax(2)
        m, seen = batch_norm(largest, p, call.training)
        if seen is not None:
            call.note(NOTE, seen)
        return F.gelu(m) + self.centre * taken(x, centres), centres

    def talked(self, x: Tensor, xyz: Tensor | None, prompts: int, p: Params, call: Call, site: Site) -> Tensor:
        """Tokens x [batch, n, D], those of the points with what came from their neighbours; prompts stand first, at p_cor.

        xyz [batch, points, 3] are the points' places; None: tokens that have none, which then stand on a grid or a line.
        """
        points = x.shape[1] - prompts
        self.fits(x.shape[1], prompts, site)
        at = places(points, x).expand(len(x), -1, -1) if xyz is None or xyz.shape[1] != points else wide(xyz)
        if prompts:
            at = torch.cat([p["p_cor"].to(at.dtype).expand(len(x), -1, -1), at], 1)
        pooled, centres = self.pooled(x, at, points // 2, p, call)
        w = nearness(at[:, prompts:], taken(at, centres)).to(x.dtype)
        return torch.cat([x[:, :prompts], x[:, prompts:] + self.propagate * (w @ pooled)], 1)

    def strategy(self) -> Strategy:
        return RunningStatistics()


def group_attention(U: Tensor, q: Params, heads: int) -> Tensor:
    """What attention inside each group adds to its tokens U [batch, groups, k, D].

    q holds the norm LN_g.w, LN_g.b, the fused projection SA.qkv [3·inner, D], and SA.o [D, inner], SA.b of the output; scores are
    divided by the root of the inner width, all heads together.
    """
    u = F.linear(F.layer_norm(U, U.shape[-1:], q["LN_g.w"], q["LN_g.b"]), q["SA.qkv"])
    query, key, value = u.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    inner = query.shape[-1] * heads
    scores = (query @ key.transpose(-2, -1) * inner**-0.5).softmax(-1)
    return F.linear((scores @ value).transpose(-3, -2).flatten(-2), q["SA.o"], q["SA.b"])


def batch_norm(m: Tensor, p: Params, training: bool, eps: float = 1e-5) -> tuple[Tensor, Tensor | None]:
    """m [batch, n, D] normalised by channel with gain BN.w and shift BN.b, and in training the batch's mean and variance [2, D].

    Training uses these, evaluation the running ones, BN.mean and BN.var; nothing is changed here.
    """
    mean, var, seen = p["BN.mean"], p["BN.var"], None
    if training:
        flat = m.flatten(0, 1).to(mean.dtype)
        mean, var = flat.mean(0), flat.var(0, unbiased=False)
        seen = torch.stack([mean, var * len(flat) / max(len(flat) - 1, 1)]).detach()
    gain = p["BN.w"] * torch.rsqrt(var + eps)
    return m * gain.to(m.dtype) + (p["BN.b"] - mean * gain).to(m.dtype), seen
