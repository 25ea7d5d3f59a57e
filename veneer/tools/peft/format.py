"""What this library knows of one of PEFT's types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from veneer.tools.peft.given import Given, Piece
from veneer.tools.peft.taken import Grouped, Taken


@dataclass(frozen=True)
class Format:
    """One of PEFT's types.

    Args:
        kind: its name in the config.
        slugs: the methods of ours that it holds.
        read, write: from a folder to a part of an adapter, and back.
        biases: whether it can train biases beside its own tensors.
    """

    kind: str
    slugs: tuple[str, ...]
    read: Callable[[Given], Piece]
    write: Callable[[Taken, Grouped], None]
    biases: bool = False
