"""What a piece of work costs, counted and not timed: function calls, operations, bytes allocated, bytes alive at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the storages that operations make inside it: how many operations, bytes in all, and bytes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.made, self.peak = 0, 0, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not t.is_meta and (storage := t.untyped_storage())._cdata not in given:
                self.made += storage.nbytes()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes alive, of those made inside."""
        self.alive = {key: (ref, n) for key, (ref, n) in self.alive.items() if not ref.expired()}
        return sum(n for _, n in self.alive.values())


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list whose one number becomes the count of function calls, Python's and C's, inside the block."""
    found = [0]

    def event(frame: Any, kind: str, arg: Any) -> None:
        found[0] += kind in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(event)
    try:
        yield found
    finally:
        sys.setprofile(before)


def resident(peak: bool = False) -> int:
    """Bytes of memory this process holds, or held at most (Linux)."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
