"""What becomes of a method's tensors when its layer loses inputs or outputs, or the method some of its own ranks.

Nothing is known here of any method: it is tried on a small layer, once, whether leaving an index out of its tensors is
the same as leaving that input or output out of the layer, or as zeros at that rank.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from veneer import anatomy
from veneer.adapter import Adapter
from veneer.errors import VeneerError
from veneer.method import Method, Params, replaced
from veneer.source import Fresh
from veneer.tuned import Tuned

if TYPE_CHECKING:
    from veneer.part import Part

Axes = Mapping[str, int]
"""Tensor → the axis that shrinks."""

OUT, IN, SIZE = 5, 7, 3
NONE: Axes = {}


@functools.cache
def axes(method: Method, what: str, role: str = "other") -> Axes | None:
    """Tensor → its axis along the layer's "in" or "out", or along the method's own "size"; those without one are not in it.

    None if the method does not shrink that way at layers of this role.
    """
    if what == "size" and not method.sizes:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        own = replaced(method, {"targets": None, "leave_out": ()})
        for size in (None, SIZE) if method.sizes else (None,):
            try:
                found = _tried(own if size is None else resized(own, size), what, role)
            except (VeneerError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
                continue  # too small a layer for it, or not one that it takes
            if found is not None:
                return found
    return None


def rank_axes(part: Part) -> Axes:
    """Tensor → axis of the ranks of one part, each of which can go by itself; {} if there are none."""
    if part.shared_keys or part.site.count:
        return NONE
    found, p = axes(part.method, "size", part.site.role) or NONE, part.tensors()
    size = getattr(part.method, part.method.sizes[0]) if found else None
    lengths = {p[name].shape[axis] for name, axis in found.items() if name in p}
    whole = len(lengths) == 1 and found.keys() <= p.keys() and size in (None, *lengths)
    whole = whole and any(p[name].ndim > 1 and p[name].requires_grad for name in found)
    return found if whole else NONE


def resized(method: Method, n: int) -> Method:
    """The method with its size (rank, width …) at n and the scale it had."""
    changed = replaced(method, {method.sizes[0]: n})
    before, after = getattr(method, "scale", None), getattr(changed, "scale", None)
    if before == after or not isinstance(before, int | float) or not isinstance(after, int | float):
        return changed
    alpha = n if changed.alpha is None else changed.alpha  # type: ignore[attr-defined]
    return replaced(changed, {"alpha": float(alpha * before / after)})


def shrunk(p: Params, cuts: Mapping[str, Mapping[int, Tensor]]) -> Params:
    """Copies of tensors with only the kept indices: cuts gives, by tensor and axis, a mask of what stays."""
    out = {}
    for name, t in p.items():
        t = t.detach()
        for axis, mask in cuts.get(name, {}).items():
            t = t.index_select(axis, mask.nonzero()[:, 0].to(t.device))
        out[name] = t.clone()
    return out


def _tried(method: Method, what: str, role: str) -> Axes | None:
    if what == "size":  # a square layer: some methods read its input and its output with the same tensors
        (whole, p), (less, q) = _small(resized(method, SIZE), role, IN, IN), _small(resized(method, SIZE - 1), role, IN, IN)
    else:
        (whole, p) = _small(method, role, OUT, IN)
        (less, q) = _small(method, role, OUT, IN - 1) if what == "in" else _small(method, role, OUT - 1, IN)
    length = {"in": IN, "out": OUT, "size": SIZE}[what]
    found = _shorter(p, q, length)
    if found is None or (what == "size" and not found):
        return None
    mask = torch.arange(length) != 1
    for t in p.values():
        if t.is_floating_point():
            t.normal_()
    if what == "size":
        for name, axis in found.items():
            p[name].index_fill_(axis, torch.tensor([1]), 0)
    for name, t in shrunk(p, {name: {axis: mask} for name, axis in found.items()}).items():
        q[name].copy_(t)
    W, b = whole.weight.detach(), whole.bias.detach()
    less.weight.data, less.bias.data = (W[:, mask], b) if what == "in" else (W[mask], b[mask]) if what == "out" else (W, b)
    x = torch.randn(4, IN, dtype=torch.float64)
    if what == "in":
        x[:, ~mask] = 0
    y, z = whole(x), less(x[:, mask] if what == "in" else x)
    return found if torch.allclose(y[:, mask] if what == "out" else y, z, rtol=1e-9, atol=1e-9) else None


@torch.no_grad()
def _small(method: Method, role: str, out: int, inside: int) -> tuple[nn.Linear, Params]:
    """A random layer with the method on it, in float64, and the live tensors."""
    layer = nn.Linear(inside, out, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    site = replace(next(s for s in anatomy.sites(model) if s.kind == "linear"), role=role)
    method.check(site)
    tuned = Tuned(model).add(Adapter("tried", method, []), [(method, [(method, site)], Fresh(Generator().manual_seed(0), 0, {}))])
    ((_, _, p),) = tuned.entries("tried")
    return layer, {name: t.detach() for name, t in p.items()}


def _shorter(p: Params, q: Params, length: int) -> dict[str, int] | None:
    """Tensor → the one axis at which q is one index shorter than p; None if they differ in another way."""
    found = {}
    if p.keys() != q.keys():
        return None
    for name in p:
        if p[name].ndim != q[name].ndim:
            return None
        differ = [i for i, (a, b) in enumerate(zip(p[name].shape, q[name].shape)) if a != b]
        if len(differ) > 1 or any((p[name].shape[i], q[name].shape[i]) != (length, length - 1) for i in differ):
            return None
        if differ:
            found[name] = differ[0]
    return found
