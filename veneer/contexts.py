"""What kind every token of a batch is (text, image, a message's role): a side input that layers read, set by the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from veneer.errors import BadValue


class Told:
    """The context numbers [batch, tokens] that hold now, and the largest of them."""

    numbers: Tensor | None = None
    most: int = 0

    def laid_out(self, sizes: Sequence[int], batch_dim: int = 0) -> Tensor | None:
        """The numbers as a layer sees its tokens, of these sizes: [batch, tokens], [tokens, batch] or all in one row; None where
        nothing is said, also of a single token a row, generated behind those given.

        Raises:
            BadValue: the layer sees other tokens than were told of, such as some rows of the batch alone.
        """
        if self.numbers is None:
            return None
        told = self.numbers.t() if batch_dim else self.numbers
        if list(sizes) in (list(told.shape), [told.numel()]):
            return told.reshape(sizes)
        if list(sizes) == [1 if axis != batch_dim else told.shape[axis] for axis in (0, 1)]:
            return None
        raise BadValue(f"contexts of {list(told.shape)} tokens do not fit the {list(sizes)} that a layer reads; give [batch, tokens].")


NOW = Told()
"""One for the process: backward may run in another thread, and reads it when it runs layers again."""


@contextmanager
def contexts(numbers: Tensor) -> Iterator[None]:
    """Inside the `with` block the token at [b, t] of every batch is of context numbers[b, t].

    One row for every row of the batch (with beams: of every beam). Tokens that are generated behind those given, one at a
    time, are of the context that methods take where nothing is said. Backward belongs into the block too where layers run
    again in it (gradient checkpointing).

    Raises:
        BadValue: numbers that are no whole numbers [batch, tokens] from 0 up.
    """
    if numbers.ndim != 2 or numbers.is_floating_point() or numbers.dtype == torch.bool or bool((numbers < 0).any()):
        raise BadValue(
            f"contexts: expected whole numbers from 0 up as [batch, tokens], got {numbers.dtype} of shape {list(numbers.shape)}."
        )
    before = NOW.numbers, NOW.most
    NOW.numbers, NOW.most = numbers.long(), int(numbers.max()) if numbers.numel() else 0
    try:
        yield
    finally:
        NOW.numbers, NOW.most = before


def remembered() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`, as its `context_fn`: layers that run again in backward find the contexts of the first time."""
    numbers = NOW.numbers
    return nullcontext(), nullcontext() if numbers is None else contexts(numbers)


def by_token(input_ids: Tensor, marks: Mapping[int, int]) -> Tensor:
    """Context numbers from token ids: those of `marks` (placeholder of an image → 1, say), 0 for all other tokens."""
    numbers = torch.zeros_like(input_ids, dtype=torch.long)
    for token, context in marks.items():
        numbers = numbers.masked_fill(input_ids == token, context)
    return numbers
