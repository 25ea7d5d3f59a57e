"""How many positions a model has, and whether learned tokens leave room for the text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from veneer.anatomy.families import NOT_POSITION, POSITION
from veneer.errors import BadValue


@dataclass(frozen=True)
class Positions:
    """The positions of one backbone.

    Args:
        most: how many there are; None: any number.
        table: they are rows of a table, so that none may follow; else texts may go beyond on their own.
    """

    most: int | None
    table: bool

    def leave_room(self, who: str, learned: int, text: int = 1) -> None:
        """Raises `BadValue` where learned tokens push a text of `text` tokens beyond the last position."""
        if self.most is None or learned + text <= self.most or (text > self.most and not self.table):
            return
        if learned >= self.most:
            raise BadValue(
                f"{who}: {learned} learned tokens leave no room for text, as the model has {self.most} positions; choose fewer of them."
            )
        fewer = f" or at most {self.most - text} learned ones" if text < self.most else ""
        raise BadValue(
            f"{who}: {learned} learned tokens and {text} of text are more than the model's {self.most} positions; "
            f"cut the text to {self.most - learned} tokens{fewer}."
        )


def positions_of(module: nn.Module, first: int) -> Positions:
    """The positions of a backbone whose first token stands at position `first` of its table."""
    told = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    rows = [
        child.num_embeddings - first
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding) and POSITION.search(name) and not NOT_POSITION.search(name)
    ]
    known = rows + ([told] if isinstance(told, int) else [])
    return Positions(min(known, default=None), bool(rows))
