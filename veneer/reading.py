"""What layers that read the same tensor share in one pass: their thin products with it are taken in one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from veneer.kernels.low_rank import inner_products
from veneer.part import Part

READ_TOGETHER = {"attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "mlp.gate": "mlp", "mlp.up": "mlp"}
"""Roles of layers that read the same input as others of the same module do."""


def introduce(parts: Iterable[Part]) -> None:
    """Tells the parts of one method in one adapter which of them read the same input."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        site = part.site
        if site.kind == "linear" and site.role in READ_TOGETHER and site.rows is None and not site.count:
            groups.setdefault((site.module.rpartition(".")[0], READ_TOGETHER[site.role]), []).append(part)
    for group in groups.values():
        if len(group) > 1:
            for part in group:
                part.readers = group


class Reading:
    """Products of the tensor that was read last: the first layer that reads it takes them for all."""

    def __init__(self) -> None:
        self.x: weakref.ref[Tensor] | None = None
        self.version = 0
        self.found: dict[Part, Tensor] = {}

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()  # nothing of a pass is copied

    def inner(self, part: Part, x: Tensor, R: Tensor) -> Tensor | None:
        """R xᵀ [r, N], where other layers read the same x with a tensor of the same name; else None.

        Every product is handed out once, so that nothing outlives the pass. Layers that turn out to read another tensor
        (or not to run) are parted for good.
        """
        version = 0 if x.is_inference() else x._version
        if self.x is None or self.x() is not x or self.version != version:
            self.part_those_left()
            self.x, self.version = weakref.ref(x), version
        if part not in self.found and part.readers:
            self.take(part, x, R)
        t = self.found.pop(part, None)
        return t if t is not None and len(t) == len(R) else None

    def take(self, part: Part, x: Tensor, R: Tensor) -> None:
        """The products of all layers that read x: each with its own R, or one for all with an R that is fixed and shared."""
        for name, tensor in part.tensors().items():
            if tensor is R:
                alike = [(reader, p[name]) for reader in part.readers if name in (p := reader.tensors())]
                self.found.update(zip((reader for reader, _ in alike), inner_products(x, [A for _, A in alike])))
            elif not R.requires_grad and tensor.data_ptr() == R.data_ptr():
                (product,) = inner_products(x, [R])
                self.found.update({reader: product for reader in part.readers if reader.tensors().get(name) is tensor})

    def part_those_left(self) -> None:
        for part in self.found:
            for reader in part.readers:
                reader.readers = []
        self.found = {}
