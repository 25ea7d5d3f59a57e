"""Which adapters act, in what weight, on which rows: one small object shared by all adapted layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.reading import Reading

Active = tuple[tuple[str, float], ...]
"""Names of the adapters that act, each with its weight."""


class Route:
    """The state of routing. Layers read it at every call; `Tuned` writes it."""

    def __init__(self) -> None:
        self.enabled = True
        self.merged = False
        self.active: Active = ()
        self.rows: tuple[str | None, ...] | None = None
        self.captured: dict[str, Tensor] = {}
        self.ragged: dict[str, Any] = {}
        self.reading = Reading()
        self._groups: dict[Any, list[tuple[Active, Tensor]]] = {}

    @property
    def on(self) -> bool:
        return self.enabled and not self.merged and (bool(self.active) or self.rows is not None)

    @contextmanager
    def narrowed(self, active: Active) -> Iterator[None]:
        """While one group of rows runs through a module whose own layers are adapted too: they see this group alone."""
        before = self.rows, self.active
        self.rows, self.active = None, active
        try:
            yield
        finally:
            self.rows, self.active = before

    def groups(self, size: int, device: torch.device) -> list[tuple[Active, Tensor]]:
        """For an input whose batch axis has `size` entries: the adapter and the indices of each group of rows.

        A layer may see every row several times in a block (beams, windows, flattened tokens): size is then a
        multiple of the number of rows, row by row.
        """
        rows = self.rows
        assert rows is not None
        if not torch.compiler.is_compiling() and (rows, size, device) in self._groups:  # the same for every layer of a pass
            return self._groups[rows, size, device]
        if size % len(rows):
            raise BadValue(f"per_row names {len(rows)} rows, but a layer received a batch of {size}; give one name (or None) per row.")
        times = size // len(rows)
        found: dict[str | None, list[int]] = {}
        for i, name in enumerate(rows):
            found.setdefault(name, []).extend(range(i * times, (i + 1) * times))
        made: list[tuple[Active, Tensor]] = [
            (() if name is None else ((name, 1.0),), torch.tensor(index, device=device))
            for name, index in found.items()
        ]  # fmt: skip
        if not torch.compiler.is_compiling():
            self._groups = {(rows, size, device): made}
        return made


def by_rows(route: Route, x: Tensor, axis: int, run: Callable[[Tensor, Active], Tensor]) -> Tensor:
    """Runs each group of rows with its own adapter and puts the results back in order."""
    groups = route.groups(x.shape[axis], x.device)
    if len(groups) == 1:
        return run(x, groups[0][0])
    results = [run(x.index_select(axis, index), active) for active, index in groups]
    return gather_rows(results, [index for _, index in groups], axis)


def gather_rows(results: Sequence[Tensor], indices: Sequence[Tensor], axis: int) -> Tensor:
    """The inverse of splitting by `indices` along `axis`."""
    order = torch.cat(list(indices))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(list(results), axis).index_select(axis, back)


def take_rows(value: Any, index: Tensor, size: int, axis: int = 0) -> Any:
    """The rows of one argument of a module, if it has a batch axis of `size`; anything else as it is."""
    if isinstance(value, Tensor):
        if axis == 1 and value.ndim >= 3 and value.shape[1] == size:
            return value.index_select(1, index)
        if value.ndim and value.shape[0] == size:
            return value.index_select(0, index)
        if value.ndim >= 3 and size > 1 and value.shape[0] % size == 0 and value.shape[0] > size:  # [rows · heads, …] masks
            return value.reshape(size, -1, *value.shape[1:]).index_select(0, index).reshape(-1, *value.shape[1:])
        return value
    if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
        return tuple(take_rows(v, index, size, axis) for v in value)
    return value


def join_rows(results: Sequence[Any], indices: Sequence[Tensor], sizes: Sequence[int], axis: int = 0) -> Any:
    """Module outputs of several row groups as one output of the same form."""
    first = results[0]
    if isinstance(first, Tensor):
        along = axis if first.ndim >= 3 and first.shape[axis] == sizes[0] else 0
        return gather_rows(results, indices, along) if first.ndim and first.shape[along] == sizes[0] else first
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(join_rows([r[i] for r in results], indices, sizes, axis) for i in range(len(first)))
    if isinstance(first, dict):
        return type(first)(**{k: join_rows([r[k] for r in results], indices, sizes, axis) for k in first})
    return first
