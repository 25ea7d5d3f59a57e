"""What a module inside a block tells the method around that block, in the same call: point coordinates, an adapter's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class Told:
    """A place for one tensor: the module inside fills it, where a method around it listens.

    What is told belongs to the very call that is listened to, so rows with adapters of their own, layers that run again in
    backward and passes within passes each hear their own. Nothing is kept afterwards."""

    value: Tensor | None = None
    listeners: int = 0

    def tell(self, value: Tensor | None) -> None:
        """For the module inside."""
        if self.listeners:
            self.value = value

    def listen(self, call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """call(x), and what was told last during it; None if nothing was."""
        self.value = None
        self.listeners += 1
        try:
            return call(x), self.value
        finally:
            self.listeners -= 1
            if not self.listeners:
                self.value = None


class Flag:
    """Whether something holds now."""

    on: bool = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """On inside the `with` block."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before


COORDINATES = Told()
"""Where the tokens of a block stand: point centres [batch, points, 3]; the last tokens of the block are theirs."""
