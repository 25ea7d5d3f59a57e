"""Specs: methods written as text, "lora(r=8, targets='attn.q attn.v') + ssf", checked without importing torch."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, NoReturn

from veneer.errors import BadValue, VeneerError
from veneer.registry import Card, card, load

if TYPE_CHECKING:
    from veneer.method import Method

_SLUG = re.compile(r"[A-Za-z0-9][\w-]*")
_NAME = re.compile(r"[A-Za-z_]\w*")
_WORDS = re.compile(r"[A-Za-z_*][\w.*?/:-]*( +[A-Za-z_*][\w.*?/:-]*)*")
_SWITCHES = {"true": True, "false": False}
_WIDTH = 100


def parse(text: str) -> Method:
    """The method that a spec describes; several joined by "+" give a stack, applied in order.

    Raises `VeneerError`s that show the place in the text.
    """
    found = [load(slug)(**options) for slug, options in parse_spec(text)]
    return reduce(operator.add, found)


def parse_spec(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Slugs and checked hyper-parameters of a spec, without importing any method.

    Values are Python literals or bare words (`start=pissa`); nothing is evaluated.

    Raises:
        UnknownName: no such method or hyper-parameter; the nearest names are offered.
        BadValue: a value out of range, or text that is not a spec. Both show the place with a caret.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadValue("The method spec is empty. Write for example lora(r=8), or lora + ssf.")
    reader = _Reader(text)
    parts = [reader.part()]
    while not reader.at_end():
        reader.expect("+", "between methods")
        parts.append(reader.part())
    return parts


def parse_one(text: str, lookup: Callable[[str], Card], kind: str) -> tuple[str, dict[str, Any]]:
    """Slug and checked options of a spec of one part, whose cards `lookup` gives: "text-to-image(prior_pictures=20)".

    Raises as `parse_spec` does.
    """
    reader = _Reader(text, lookup, kind)
    found = reader.part()
    if not reader.at_end():
        reader.fail(reader.at, f"Nothing may follow a {kind}.")
    return found


class _Reader:
    def __init__(self, text: str, lookup: Callable[[str], Card] = card, kind: str = "method") -> None:
        self.text, self.at, self.lookup, self.kind = text, 0, lookup, kind

    def part(self) -> tuple[str, dict[str, Any]]:
        start = self.skip()
        slug = self.take(_SLUG, f"the name of a {self.kind}")
        found = self.placed(start, self.lookup, slug)
        options: dict[str, Any] = {}
        if self.peek() != "(":
            return found.slug, options
        self.at += 1
        while self.peek() != ")":
            start = self.skip()
            such = f" such as {found.options[0].name}=…" if found.options else ""
            given = self.take(_NAME, f"an option of {found.slug}{such}, or ')'")
            self.placed(start, found.option, given)
            self.expect("=", f"after {given!r}")
            place = self.skip()
            name, value = self.placed(place, found.check, given, self.value())
            if name in options:
                self.fail(start, f"{found.class_name}: {name} is given twice.")
            options[name] = value
            if self.peek() != ")":
                self.expect(",", "between options")
        self.at += 1
        return found.slug, options

    def value(self) -> Any:
        start = self.skip()
        end = self.value_end(start)
        written = self.text[start:end].strip()
        if not written:
            self.fail(start, "A value is missing.")
        self.at = end
        try:
            return ast.literal_eval(written)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        if _WORDS.fullmatch(written):
            return _SWITCHES.get(written.lower(), written)
        joined = re.search(r"\s+(?=[A-Za-z_]\w*\s*=)", written)
        if joined:
            self.fail(start + joined.end(), "A comma is missing between options.")
        self.fail(start, f"{written} is not a number, a word, a quoted string or a tuple of those.")

    def value_end(self, start: int) -> int:
        """Where the value ends: at a comma or closing bracket outside quotes and brackets of its own."""
        depth, quote, i = 0, "", start
        while i < len(self.text):
            c = self.text[i]
            if quote:
                i += c == "\\"
                quote = "" if c == quote else quote
            elif c in "'\"":
                quote = c
            elif c in "([{":
                depth += 1
            elif c in ")]}" or (c == "," and not depth):
                if not depth:
                    return i
                depth -= 1
            i += 1
        self.fail(start, f"A quote ({quote}) is not closed." if quote else "A closing bracket ')' is missing.")

    def placed(self, place: int, action: Any, *args: Any) -> Any:
        try:
            return action(*args)
        except VeneerError as error:
            raise type(error)(f"{error}\n{self.caret(place)}") from None

    def take(self, pattern: re.Pattern[str], wanted: str) -> str:
        found = pattern.match(self.text, self.skip())
        if found is None:
            self.fail(self.at, f"Expected {wanted}.")
        self.at = found.end()
        return found.group()

    def expect(self, mark: str, where: str) -> None:
        if self.peek() != mark:
            missing = " A closing bracket ')' may be missing." if self.at_end() else ""
            self.fail(self.at, f"Expected {mark!r} {where}.{missing}")
        self.at += 1

    def skip(self) -> int:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at

    def peek(self) -> str:
        return self.text[self.skip() : self.at + 1]

    def at_end(self) -> bool:
        return self.skip() >= len(self.text)

    def fail(self, place: int, message: str) -> NoReturn:
        raise BadValue(f"{message}\n{self.caret(place)}")

    def caret(self, place: int) -> str:
        """The spec (or the part of it around the place) with a caret under the place: two lines."""
        first = max(0, min(place - _WIDTH // 2, len(self.text) - _WIDTH))
        shown = re.sub(r"\s", " ", self.text[first : first + _WIDTH])
        return f"  {shown}\n  {' ' * (place - first)}^"
