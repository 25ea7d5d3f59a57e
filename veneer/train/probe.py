"""The task loss on further training batches, for strategies that score by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Probe:
    """`probe()` is the loss on the next batch of a loader of its own, `probe.again()` the loss on the same one once more.

    Args:
        batches: begins the batches anew. loss: the loss of one batch.
    """

    def __init__(self, batches: Callable[[], Iterator[Any]], loss: Callable[[Any], Tensor]) -> None:
        self.batches, self.loss = batches, loss
        self.taken = 0
        """Batches taken so far; set it before the first one to go on where a run was interrupted."""
        self.batch: Any = None
        self._left: Iterator[Any] | None = None

    def __call__(self) -> Tensor:
        if self._left is None:
            self._left = self._from(self.taken)
        self.batch = next(self._left)
        self.taken += 1
        return self.again()

    def again(self) -> Tensor:
        return self() if self.batch is None else self.loss(self.batch)

    def _from(self, skip: int) -> Iterator[Any]:
        while True:
            for batch in self.batches():
                if skip:
                    skip -= 1
                    continue
                yield batch
