"""The registry: finds methods by reading their source, so that names and ranges are known without importing torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue, MissingExtra, UnknownName, nearest
from veneer.names import known_as, sentence
from veneer.option import check

if TYPE_CHECKING:
    from veneer.method import Method

FAMILIES = ("weight", "activation", "prompt", "selection", "strategy")
"""Kinds of methods, each a folder of veneer/methods."""

GROUP = "veneer.methods"
"""Entry-point group by which installed packages offer methods: each entry's value is a module that holds one."""

_HOME = Path(__file__).parent
_FAMILY_OF_BASE = {
    "WeightMethod": "weight",
    "ActivationMethod": "activation",
    "PromptMethod": "prompt",
    "SelectionMethod": "selection",
    "StrategyMethod": "strategy",
}


@dataclass(frozen=True)
class Option:
    """One hyper-parameter: its name, type as written, default, one line of help and legal range."""

    name: str
    type: str
    default: Any
    help: str = ""
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def legal(self) -> str:
        """The legal values in words: "at least 1", "one of 'a', 'b'"; the type where there is no range."""
        if "choices" in self.limits:
            return "one of " + ", ".join(repr(c) for c in self.limits["choices"])
        signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        return " and ".join(f"{signs[k]} {v}" for k, v in self.limits.items() if k in signs) or self.type


@dataclass(frozen=True)
class Card:
    """What is known of a method without importing it.

    Args:
        slug: its name in specs. class_name, module: where its class is.
        family: one of `FAMILIES`. title, year, arxiv, summary: from the first line of the module's docstring.
        formula, text: first line and rest of the class docstring.
        options: its own hyper-parameters first, then those of every method.
        aliases: other spelling → option. limits: feature it cannot have → reason.
        targets: where it acts unless told otherwise.
    """

    slug: str
    family: str
    title: str
    year: int | None
    arxiv: str | None
    summary: str
    class_name: str
    module: str
    options: tuple[Option, ...]
    formula: str = ""
    text: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    targets: str = ""

    def __str__(self) -> str:
        source = ", ".join(str(part) for part in (self.year, self.arxiv and f"arXiv:{self.arxiv}") if part)
        return f"{self.slug:<20} {self.family:<11} {self.title}: {self.summary}" + (f" ({source})" if source else "")

    def option(self, name: str) -> Option:
        """The hyper-parameter of this name or alias. Raises `UnknownName` with the nearest ones."""
        known = {o.name: o for o in self.options}
        real = self.aliases.get(name, name)
        if real in known:
            return known[real]
        has = f"{nearest(name, [*known, *self.aliases])} It has: {', '.join(known)}." if known else " It has none."
        raise UnknownName(f"{self.class_name} has no option {name!r}.{has}")

    def check(self, name: str, value: Any) -> tuple[str, Any]:
        """The hyper-parameter's own name and its value. Raises `UnknownName` or `BadValue`."""
        option = self.option(name)
        value = tuple(value) if isinstance(value, list) else value
        check(self.class_name, option.name, value, option.default, dict(option.limits), option.type)
        return option.name, value


_registered: dict[str, tuple[Card, type[Method]]] = {}


def cards() -> dict[str, Card]:
    """Every method there is, by slug: the library's, those of installed packages, those a script registered."""
    return {slug: card(slug) for slug in _slugs()}


def methods() -> list[Card]:
    """Cards of all methods, sorted by family and slug; each prints as one line."""
    order = {family: i for i, family in enumerate(FAMILIES)}
    return sorted(cards().values(), key=lambda c: (order.get(c.family, len(order)), c.slug))


def card(slug: str) -> Card:
    """One method's card, by its name or by a qualified one where several papers share it ("deft-density").

    Raises `UnknownName` with the nearest slugs, or with the papers that the name may mean."""
    known = slug.lower().replace("_", "-")
    for name in (known, known_as(known)):
        if name in _registered:
            return _registered[name][0]
        if name in _places():
            return _read(name)
    raise UnknownName(
        sentence(known, _slugs()) or f"There is no method {slug!r}.{nearest(known, _slugs())} `veneer methods` lists them all."
    )


def load(slug: str) -> type[Method]:
    """The method's class; imports its module, and torch with it."""
    found = card(slug)
    if found.slug in _registered:
        return _registered[found.slug][1]
    try:
        return getattr(importlib.import_module(found.module), found.class_name)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"The method {found.slug!r} needs the package {error.name!r}, which is not installed.") from error


def method(slug: str, **hyper: Any) -> Method:
    """A method from its slug and hyper-parameters.

    Raises:
        UnknownName: no such method or hyper-parameter.
        BadValue: a value outside its range.
    """
    checked = check_options(slug, hyper)
    return load(slug)(**checked)


def head_method() -> Method:
    """The method that trains a model's own task head: the one whose class says so with `trains_heads`."""
    for found in methods():
        if found.family == "selection" and load(found.slug).trains_heads:
            return load(found.slug)()
    raise UnknownName("No installed method trains task heads.")


def check_options(slug: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters under their own names, checked without importing the method.

    Raises:
        UnknownName: no such method or hyper-parameter.
        BadValue: a value outside its range, or a hyper-parameter given twice (by name and by alias).
    """
    found, checked = card(slug), {}
    for given, value in options.items():
        name, value = found.check(given, value)
        if name in checked:
            raise BadValue(f"{found.class_name}: {name} is given twice ({given!r} is another name of it).")
        checked[name] = value
    return checked


def register(cls: Any = None, *, slug: str | None = None) -> Any:
    """Makes a method class of the user's own known by name; also as a decorator, `@register`.

    The slug is the class's name in lower case unless given. Raises `BadValue` if another method has it.
    """
    if cls is None:
        return lambda found: register(found, slug=slug)
    name = slug or cls.__name__.lower()
    if name in _places() or (name in _registered and _registered[name][1].__qualname__ != cls.__qualname__):
        raise BadValue(f"{cls.__name__}: there is a method {name!r} already; give another name: register(slug='…').")
    cls.slug = name
    _registered[name] = (_card_of_class(name, cls), cls)
    return cls


# -- where methods are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    module: str
    path: Path
    family: str | None


def _slugs() -> list[str]:
    return [*_places(), *_registered]


@cache
def _places() -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    for family in FAMILIES:
        for path in sorted((_HOME / "methods" / family).glob("[!_]*.py")):
            found[path.stem.replace("_", "-")] = _Place(f"veneer.methods.{family}.{path.stem}", path, family)
    for module in _offered():
        file = _source(module)
        if file is not None:
            found.setdefault(module.rsplit(".", 1)[-1].replace("_", "-"), _Place(module, file, None))
    return found


def _offered() -> list[str]:
    from importlib.metadata import entry_points

    return [entry.value.partition(":")[0] for entry in entry_points(group=GROUP)]


def _source(module: str) -> Path | None:
    """The module's file, found without importing its parent packages."""
    search: list[str] | None = None
    spec = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        tries = (finder.find_spec(name, search) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((s for s in tries if s is not None), None)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin else None


# -- reading a method's file ------------------------------------------------------------------------------------


@cache
def _read(slug: str) -> Card:
    place = _places()[slug]
    chain = list(_chain(place.path, _public_class(place.path, slug)))
    names = [node.name for _, node in chain]
    options: dict[str, Option] = {}
    for path, node in chain:
        for found in _options(path, node):
            options.setdefault(found.name, found)
    return Card(
        slug=slug,
        family=place.family or next((_FAMILY_OF_BASE[n] for n in names if n in _FAMILY_OF_BASE), "other"),
        class_name=names[0],
        module=place.module,
        options=tuple(options.values()),
        aliases=_constant(chain, "aliases") or {},
        limits=_constant(chain, "limits") or {},
        targets=_constant(chain, "default_targets") or "",
        **_title(ast.get_docstring(_tree(place.path)) or "", slug),
        **_prose(ast.get_docstring(chain[0][1]) or ""),
    )


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: not a Python file that can be read as a method: {error}.") from error


@cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(path).body if isinstance(node, ast.ClassDef)}


def _public_class(path: Path, slug: str) -> str:
    """The file's one public dataclass; where there are several, the one named like the file."""
    names = [
        n for n, node in _classes(path).items() if not n.startswith("_") and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    ]
    named = [n for n in names if n.lower() == slug.replace("-", "")]
    if len(named or names) != 1:
        raise BadFile(f"{path}: a method's file holds one public dataclass; found {', '.join(names) or 'none'}.")
    return (named or names)[0]


def _chain(path: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """The class and those it inherits from inside this library or its own file, each with the file it is in."""
    node = _classes(path).get(name)
    if node is None:
        imported = _imports(path).get(name)
        if imported is not None:
            yield from _chain(*imported)
        return
    yield path, node
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _chain(path, base.id)


@cache
def _imports(path: Path) -> dict[str, tuple[Path, str]]:
    """Names that the file imports from this library → file and name there."""
    found = {}
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("veneer."):
            home = _HOME.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
            if home.exists():
                found.update({alias.asname or alias.name: (home, alias.name) for alias in node.names})
    return found


def _options(path: Path, node: ast.ClassDef) -> Iterator[Option]:
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None):
            continue
        written = ast.unparse(item.annotation)
        if written.removeprefix("typing.").startswith("ClassVar"):
            continue
        try:
            yield Option(item.target.id, written, *_default(item.value))
        except ValueError as error:
            raise BadFile(f"{path}, line {item.lineno}: option {item.target.id!r} must have literal arguments.") from error


def _default(value: ast.expr) -> tuple[Any, str, dict[str, Any]]:
    """Default, help and limits of `option(default, "help", ge=…)`, of a dataclass field, or of a plain default."""
    if not isinstance(value, ast.Call):
        return ast.literal_eval(value), "", {}
    given = dict(zip(("default", "help"), (ast.literal_eval(a) for a in value.args)))
    given.update({str(k.arg): ast.literal_eval(k.value) for k in value.keywords if k.arg != "kw_only"})
    given.update(given.pop("metadata", {}))
    default, text = given.pop("default", None), given.pop("help", "")
    return default, text, {k: v for k, v in given.items() if v is not None}


def _constant(chain: list[tuple[Path, ast.ClassDef]], name: str) -> Any:
    """A class attribute written as a literal, the nearest in the chain; None where there is none."""
    for _, node in chain:
        for item in node.body:
            if not isinstance(item, ast.AnnAssign | ast.Assign) or item.value is None:
                continue
            targets = [item.target] if isinstance(item, ast.AnnAssign) else item.targets
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                try:
                    return ast.literal_eval(item.value)
                except ValueError:
                    return None
    return None


def _title(text: str, slug: str) -> dict[str, Any]:
    """Title, summary, year and arXiv id from "LoRA: a product of two thin matrices (2021, arXiv:2106.09685)."."""
    first = " ".join(text.strip().split("\n\n")[0].split())
    source = re.search(r"\s*\(([^()]*)\)\.?\s*$", first)
    said = source.group(1) if source else ""
    year = re.search(r"\b(19|20)\d\d\b(?!\.)", said)
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", said)
    if source and (year or arxiv):
        first = first[: source.start()]
    title, colon, summary = first.rstrip(".").partition(": ")
    return {
        "title": title if colon else slug,
        "summary": summary if colon else title,
        "year": int(year.group()) if year else None,
        "arxiv": arxiv.group(1) if arxiv else None,
    }


def _prose(text: str) -> dict[str, Any]:
    formula, _, rest = text.strip().partition("\n")
    return {"formula": formula, "text": rest.partition("Args:")[0].strip()}


def _card_of_class(slug: str, cls: type[Method]) -> Card:
    """The card of a class that is already there: what `_read` takes from the source."""
    module = sys.modules.get(cls.__module__)
    names = [base.__name__ for base in cls.__mro__]
    fields = sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only))
    options = [
        Option(f.name, str(f.type), f.default, f.metadata.get("help", ""), {k: v for k, v in f.metadata.items() if k != "help"})
        for f in fields
    ]
    prose = _prose(inspect.cleandoc(cls.__doc__ or ""))
    said = {**_title(inspect.getdoc(module) or "", slug), "title": cls.__name__, "summary": prose["formula"]}
    return Card(
        slug=slug,
        family=next((_FAMILY_OF_BASE[n] for n in names if n in _FAMILY_OF_BASE), "other"),
        class_name=cls.__name__,
        module=cls.__module__,
        options=tuple(options),
        aliases=dict(cls.aliases),
        limits=cls.limits if isinstance(cls.limits, Mapping) else {},
        targets=cls.default_targets if isinstance(cls.default_targets, str) else "",
        **said,
        **prose,
    )
