"""Days of the year as codes for a linear layer: one each, or what lies between the days that training had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import BadValue

DAYS = 366
"""Codes of a year: day 0, which stands for no picture, and days 1 … 365. The 366th day of a leap year counts as the 365th."""


def check_days(days: Tensor, what: str = "days") -> None:
    """Raises `BadValue` for a day outside 0 … 365."""
    if days.numel() and not 0 <= int(days.min()) <= int(days.max()) < DAYS:
        wrong = int(days.max() if days.max() >= DAYS else days.min())
        raise BadValue(f"TSViT: {what} hold {wrong}; a day of the year is 1 … {DAYS - 1}, and 0 where there is no picture.")


def day_codes(days: Tensor, known: Sequence[int] | None = None) -> Tensor:
    """The codes [..., n] of whole days [...]: a row of the identity [366], or weights over the known days in rising order.

    Between two known days the weights are linear; before the first and after the last they are that day's. Day 0 has a code
    of its own where it is known, and is never an end that others are drawn towards.
    """
    if known is None:
        return F.one_hot(days.long(), DAYS).float()
    dates = torch.tensor(sorted(known), device=days.device)
    empty = int(dates[0] == 0)
    real = dates[empty:]
    inside = days.clamp(int(real[0]), int(real[-1]))
    above = torch.searchsorted(real, inside)
    below = (above - 1).clamp(min=0)
    gap = (real[above] - real[below]).clamp(min=1)
    share = torch.where(above > below, (inside - real[below]).double() / gap, 1.0)[..., None]
    codes = share * F.one_hot(above, len(real)) + (1 - share) * F.one_hot(below, len(real))
    if not empty:
        return codes
    none = days[..., None] == 0
    return torch.cat([none.to(codes), codes.masked_fill(none, 0.0)], -1)
