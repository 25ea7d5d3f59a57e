"""Commands from plain functions: parameters annotated with `Argument` or `Flag` become the command line.

Built on argparse because a start has to take less than 0.3 s, parser and all.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from veneer.errors import UnknownName, VeneerError, nearest


@dataclass(frozen=True)
class Argument:
    """A positional argument: how it is shown, and one line of help."""

    metavar: str
    help: str


@dataclass(frozen=True)
class Flag:
    """A flag: one line of help; its name is the parameter's, with dashes, unless given."""

    help: str
    metavar: str | None = None
    name: str | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """On `**settings`: every field of a dataclass made with `veneer.option` is a flag; only those given arrive, as text.

    The dataclass checks them itself, so that a flag and a line in a file are refused in the same words.
    """

    of: type
    without: tuple[str, ...] = ()


COMMON = {
    "as_json": Flag("one JSON document on stdout; all else goes to stderr", name="--json"),
    "debug": Flag("show the traceback of an error"),
}
"""Flags that every command has."""


class Parser(argparse.ArgumentParser):
    """Raises mistakes as `VeneerError` instead of printing the usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        message = message[0].upper() + message[1:]
        raise VeneerError(f"`{self.prog}`: {message}. `{self.prog} --help` shows what it takes.")

    def read(self, args: Sequence[str]) -> dict[str, Any]:
        """The given values by parameter name. Raises `UnknownName` with the nearest flag, or `VeneerError`."""
        flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        given = [a.partition("=")[0] for a in itertools.takewhile(lambda a: a != "--", args) if a.startswith("--")]
        wrong = next((name for name in given if name not in flags), None)
        if wrong is not None:
            raise UnknownName(f"`{self.prog}` has no flag {wrong!r}.{nearest(wrong, flags)} `{self.prog} --help` lists them all.")
        return vars(self.parse_intermixed_args(args))


def parser(name: str, function: Callable[..., Any]) -> Parser:
    """The command line of a function: its docstring is the help, its annotations the arguments and flags."""
    built = Parser(prog=f"veneer {name}", description=inspect.getdoc(function), allow_abbrev=False, formatter_class=_Help)
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, said = typing.get_args(hints[parameter.name])[:2]
        if isinstance(said, Settings):
            _add_settings(built, said)
        else:
            _add(built, parameter, kind, said)
    for dest, flag in COMMON.items():
        built.add_argument(flag.name or f"--{dest}", dest=dest, action="store_true", help=flag.help)
    return built


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def _add(built: Parser, parameter: inspect.Parameter, kind: Any, said: Argument | Flag) -> None:
    many, single = _parts(kind)
    needed = parameter.default is inspect.Parameter.empty
    help = said.help.replace("%", "%%")
    if isinstance(said, Argument):
        count: Any = ("+" if needed else "*") if many else (None if needed else "?")
        default = None if needed else parameter.default
        built.add_argument(parameter.name, metavar=said.metavar, help=help, type=_reader(single), nargs=count, default=default)
        return
    name = said.name or "--" + parameter.name.replace("_", "-")
    if single is bool:
        built.add_argument(name, dest=parameter.name, action="store_true", help=help)
        return
    shown = f" (default {parameter.default})" if not needed and parameter.default not in (None, (), []) else ""
    built.add_argument(
        name,
        dest=parameter.name,
        metavar=said.metavar or {int: "N", float: "X", Path: "PATH"}.get(single, "TEXT"),
        type=_reader(single),
        nargs="+" if many else None,
        choices=said.choices,
        required=needed,
        default=None if needed else parameter.default,
        help=help + shown,
    )


def _add_settings(built: Parser, said: Settings) -> None:
    for field in dataclasses.fields(said.of):
        if field.name in said.without:
            continue
        name, kind = "--" + field.name.replace("_", "-"), str(field.type)
        help = field.metadata["help"].replace("%", "%%")
        plain = field.default is None or field.default == "" or isinstance(field.default, bool)
        shown = "" if plain else f" (default {field.default})"
        if kind == "bool":
            flag, on = (f"--no-{name[2:]}", False) if field.default else (name, True)
            text = f"do not {help}" if field.default else help
            built.add_argument(flag, dest=field.name, action="store_const", const=on, default=argparse.SUPPRESS, help=text)
            continue
        choices = field.metadata.get("choices")
        built.add_argument(
            name,
            dest=field.name,
            metavar="|".join(str(c).lower() for c in choices) if choices else _METAVARS.get(kind.partition(" ")[0], "TEXT"),
            type=_switch if kind.startswith("bool") else str,
            default=argparse.SUPPRESS,
            help=help + shown,
        )


_METAVARS = {"int": "N", "float": "X"}


def _switch(text: str) -> bool | str:
    """true and false as such, other words as they are."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _parts(kind: Any) -> tuple[bool, Any]:
    """Whether a parameter takes several values, and the type of one: list[str] | None → (True, str)."""
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is list:
        return True, typing.get_args(kind)[0]
    return False, kind


def _reader(kind: Any) -> Callable[[str], Any]:
    """How one value is read; the name is what argparse puts into its message."""

    def read(text: str) -> Any:
        return kind(text)

    read.__name__ = {int: "whole number", float: "number"}.get(kind, getattr(kind, "__name__", "value"))
    return read
