"""Errors that say what was wrong, where, and what would work. No torch here: they come before work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Something the caller can mend. The message is one to three lines; the command line prints it and exits with `code`."""

    code = 2


class UnknownName(VeneerError):
    """A method, role, option or adapter that does not exist; the message offers the nearest names."""


class BadValue(VeneerError):
    """A value out of its legal range; the message gives the range."""


class NoMatch(VeneerError):
    """A target that matches nothing in the model."""


class Unsupported(VeneerError):
    """Something a method or a layer cannot do by its nature; the message gives the reason."""


class BadFile(VeneerError):
    """A file that is missing, truncated, oversized or not what it says it is."""


class Mismatch(VeneerError):
    """An adapter that does not fit the model it is loaded into."""


class MissingExtra(VeneerError):
    """An optional library that is not installed; the message gives the install line."""

    code = 3


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """The closest legal names as a phrase: " Nearest: 'lora', 'dora'." or "" when nothing is close."""
    close = difflib.get_close_matches(name, list(options), n=count, cutoff=0.5)
    return f" Nearest: {', '.join(repr(c) for c in close)}." if close else ""
