"""Matching methods by size: how many numbers one trains on a model, and the hyper-parameters that land nearest to a budget.

Counting needs shapes only. Tensors are made on the meta device from the sites, nothing is attached and no weight is read,
except for methods that say that their shapes depend on it (`weighs`).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Generator, nn
from torch.overrides import TorchFunctionMode

from veneer import registry
from veneer.errors import BadValue, Unsupported, VeneerError
from veneer.maths.factor import divisors
from veneer.method import Method, Params
from veneer.place import trained
from veneer.positions import positions_of
from veneer.prompts import backbone_of, first_position, read_tokens
from veneer.site import ROLES, Site
from veneer.source import Fresh
from veneer.spec import parse_spec

FEWER = "attn.q attn.v"
"""Targets tried where a method's own are too many for the budget even at its smallest sizes."""
REACH = 2.0
"""A budget counts as met by a method's own targets if the count is within this factor of it."""
CLOSE = 0.2
"""If the main size alone comes this near, as a part of the budget, no other hyper-parameter is touched."""
ALL_UP_TO = 64
"""Whole numbers up to here are all tried; larger ones are divisors of the layers' sizes, or found by halving."""
RANKS = ("r", "init_r")
"""Names of ranks: none is tried beyond the widest layer, and alpha is measured by them."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def budget_of(text: str, total: int) -> int:
    """A number of parameters from "300k", "1.2M", "250000", or from "0.05%" of the model's `total`.

    Raises `BadValue` for anything else, and for more than the model has.
    """
    found = re.fullmatch(r"\s*([\d,_]*\.?\d+(?:e\d+)?)\s*(%|[kmgb]?)\s*", text.lower())
    if found is None:
        raise BadValue(f"{text!r} is no number of parameters. Write 300k, 1.2M, 250000, or 0.05% of the model.")
    number, unit = float(found[1].replace(",", "").replace("_", "")), found[2]
    budget = round(number * total / 100) if unit == "%" else round(number * _UNITS[unit])
    if budget < 1:
        raise BadValue(f"{text} of {total:,} parameters is less than one. Write 300k, 1.2M, 250000, or 0.05% of the model.")
    if budget > total:
        raise BadValue(f"{text.strip()} is more than the model has: {total:,} parameters. Give less, such as 0.5%.")
    return budget


# -- counting ---------------------------------------------------------------------------------------------------


def count(method: Method, sites: Sequence[Site], model: nn.Module | None = None) -> int:
    """How many numbers a method trains at its sites; tensors that layers share count once.

    Args:
        sites: all sites of the model (`anatomy.sites`).
        model: the model they belong to; weights on the meta device do. It tells which layers lack a bias; without it all
            are taken to have one. Methods with `weighs` need it with its weights.

    Raises:
        BadValue, NoMatch: hyper-parameters or targets that do not fit the model.
        Unsupported: a method whose count depends on weights that are not there.
    """
    total = 0
    for part in method.parts:
        found = part.select(sites)
        for site in found:
            part.check(site)
        total += _count(part, found, model)[0]
    return total


def _count(part: Method, found: Sequence[Site], model: nn.Module | None, by_shape: bool = False) -> tuple[int, bool]:
    """The count of one method at its sites, and whether sites of one shape have equally many numbers.

    With `by_shape` that is taken for granted: one site of each shape stands for all.
    """
    found = [replace(site, ordinal=n) for n, site in enumerate(found)]
    if part.weighs:
        if model is None or any(p.device.type == "meta" for p in model.parameters()):
            raise Unsupported(f"{part.label}: how much it trains depends on the weights, and the model is here without them.")
        return _numbers(part, found, model, False)
    try:
        with _shapes_only(type(part)):
            return _numbers(part, found, model, by_shape)
    except VeneerError:
        raise
    except Exception:  # it reads values of what it draws
        return _numbers(part, found, model, by_shape)


def _numbers(part: Method, found: Sequence[Site], model: nn.Module | None, by_shape: bool) -> tuple[int, bool]:
    source = Fresh(Generator().manual_seed(0), 0, {})
    groups: dict[str, list[Site]] = {}
    for site in found:
        if (group := part.tie(site)) is not None:
            groups.setdefault(group, []).append(site)
    reads = model is not None and part.reads_weight
    seen: dict[tuple, set[int]] = {}
    with torch.no_grad():
        shared = {group: source.shared(part, group, members) for group, members in groups.items()}
        total = sum(_size(part, p) for p in shared.values())
        for site in found:
            module: Any = _module(model, site) if model is not None and (reads or site.kind == "model") else None
            shape = replace(site, name="", module="", entry="", depth=None, index=0, ordinal=0), getattr(module, "bias", None) is None
            alike = seen.setdefault(shape, set())
            if by_shape and alike:
                total += next(iter(alike))
                continue
            common = shared.get(cast(str, part.tie(site)), {})
            if reads:
                slot: Any = None  # reading a weight needs none
                p = source.own(part, site, module, slot, torch.empty(0), common)
            else:
                p = part.init(site, source.generator)
            if site.kind == "model" and module is not None:
                _leave_room(part, module, {**common, **p}, site)
            n = _size(part, p) * (1 if reads else site.count or 1)
            alike.add(n)
            total += n
    return total, all(len(sizes) == 1 for sizes in seen.values())


def _leave_room(part: Any, backbone: nn.Module, p: Params, site: Site) -> None:
    """Raises `BadValue` where learned tokens leave no position for text, as attaching them would."""
    places = positions_of(backbone, first_position(backbone))
    places.leave_room(part.label, part.tokens(p, site).shape[-2])


def _module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose weight stands for the site; for learned tokens the one that holds the table of those there are."""
    if site.kind != "model":
        return model.get_submodule(site.module)
    backbone: Any = backbone_of(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        backbone = backbone.get_encoder()
    read_tokens(backbone)
    return backbone


def _size(part: Method, p: Params) -> int:
    return sum(t.numel() for name, t in p.items() if trained(part, name))


@contextmanager
def _shapes_only(cls: type[Method]) -> Iterator[None]:
    """Tensors made inside have shapes but no values; what formulas keep for later calls is forgotten afterwards."""
    try:
        with torch.device("meta"):
            yield
    finally:
        for one in _kept(cast(Any, cls)):
            one.cache_clear()


@cache
def _kept(cls: Any) -> tuple[Any, ...]:
    """Functions with a cache that a method's module, or one of the library's that it takes functions from, can reach."""
    own = {c.__module__ for c in cls.__mro__ if c.__module__ in sys.modules} - {"builtins"}
    used = {str(getattr(v, "__module__", "")) for name in own for v in list(vars(sys.modules[name]).values())}
    modules = own | {name for name in used if name.startswith("veneer.") and name in sys.modules} - {__name__, registry.__name__}
    places = [*(vars(sys.modules[name]) for name in modules), *(vars(c) for c in cls.__mro__)]
    return tuple({id(v): v for place in places for v in list(place.values()) if hasattr(v, "cache_clear")}.values())


class _Spectra(TorchFunctionMode):
    """Takes the singular values of each of a model's weights once; its singular vectors are there by shape only."""

    @staticmethod
    def of(model: nn.Module) -> _Spectra:
        """The model's, kept while it lives."""
        return _spectra.setdefault(model, _Spectra())

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, tuple[Any, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linalg.svd and args:
            shapes = func(torch.empty(args[0].shape, device="meta"), *args[1:], **kwargs)
            values = self.__torch_function__(torch.linalg.svdvals, types, args[:1])
            kinds: Any = torch.return_types
            return kinds.linalg_svd((shapes[0], values, shapes[2]))
        if func not in (torch.linalg.svdvals, torch.Tensor.any) or len(args) != 1 or kwargs:
            return func(*args, **kwargs)
        key = func, args[0].data_ptr(), args[0]._version, tuple(args[0].shape)
        if key not in self.known:
            self.known[key] = args[0], func(*args)  # the argument is kept, so that no other takes its place in memory
        return self.known[key][1]


_spectra: WeakKeyDictionary[nn.Module, _Spectra] = WeakKeyDictionary()


# -- searching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """The hyper-parameters of one method that come nearest to a budget.

    Args:
        spec: the method with them, as `veneer train` takes it; None where nothing can be counted, and `why` says why.
    """

    slug: str
    budget: int
    spec: str | None = None
    trained: int | None = None
    why: str | None = None

    @property
    def distance(self) -> float | None:
        """How far off, as a part of the budget: 0.02 is 2 % too many."""
        return None if self.trained is None else (self.trained - self.budget) / self.budget

    def within(self, factor: float) -> bool:
        """Whether the count is within this factor of the budget, either way."""
        return self.trained is not None and self.budget <= self.trained * factor and self.trained <= self.budget * factor


def nearest(
    spec: str, sites: Sequence[Site], budget: int, *, model: nn.Module | None = None, targets: str | None = None, reach: float = REACH
) -> Nearest:
    """The hyper-parameters of a method that land nearest to a budget of trained parameters.

    What varies are the method's `sizes`, the first of them before the others; those given in the spec stay. A scale
    numerator alpha with a number for its default keeps its ratio to a rank. Sizes whose start is no longer the base, where
    the defaults' is, are left out. If the method's own targets stay further than `reach` from the budget, all linear
    layers, or fewer, are tried.

    Args:
        spec: a slug, or a spec of one method whose hyper-parameters stay as they are.
        sites, model: as for `count`. targets: instead of the method's own.
    """
    ((slug, given), *more) = parse_spec(spec)
    if more:
        raise BadValue(f"{spec!r} is a stack; a budget is found for one method at a time.")
    if registry.card(slug).family == "strategy":
        raise BadValue(f"{slug} trains nothing by itself; a budget is found for the method it is added to.")
    if targets is not None:
        given = {**given, "targets": targets}
    best = _Search(slug, given, sites, model, budget).best()
    if best.within(reach) or "targets" in given or registry.load(slug).trains_heads:
        return best
    if best.trained is None:
        return best
    other = everywhere(sites) if best.trained < budget else FEWER if registry.load(slug).sizes else ""
    if other:
        tried = _Search(slug, {**given, "targets": other}, sites, model, budget).best()
        if tried.distance is not None and best.distance is not None and abs(tried.distance) < abs(best.distance):
            return tried
    return best


def everywhere(sites: Sequence[Site]) -> str:
    """Targets that name every linear layer inside the blocks, such as "attn.* mlp.*"; "" where no role is known."""
    parents = dict.fromkeys(s.role.partition(".")[0] for s in sites if s.kind == "linear" and "." in s.role and s.depth is not None)
    return " ".join(f"{parent}.*" for parent in parents if any(r.startswith(f"{parent}.") for r in ROLES))


Setting = dict[str, Any]


class _Search:
    """The search over one method's sizes, with everything else given."""

    def __init__(self, slug: str, given: Mapping[str, Any], sites: Sequence[Site], model: nn.Module | None, budget: int):
        self.card, self.cls = registry.card(slug), registry.load(slug)
        self.given, self.sites, self.model, self.budget = dict(given), sites, model, budget
        self.options = {o.name: o for o in self.card.options}
        self.sizes = [name for name in self.cls.sizes if name in self.options and name not in given]
        self.found: list[Site] = []
        self.counts: dict[tuple, int | None] = {}
        self.refused: VeneerError | None = None
        self.kept_start = False
        self.by_shape = False

    def best(self) -> Nearest:
        try:
            first = self.cls(**self.given)
            self.found = first.select(self.sites)
        except VeneerError as error:
            return self.none(error)
        self.kept_start = "identity" not in first.limits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a size may be legal and unwise
            if not self.cls.weighs or self.model is None:
                return self.found_best()
            try:
                with _Spectra.of(self.model):
                    return self.found_best()
            except (RuntimeError, NotImplementedError):  # it reads values of singular vectors
                return self.found_best()

    def found_best(self) -> Nearest:
        setting = self.search()
        if setting is None:
            return self.none(self.refused)
        method = self.made(setting)
        return Nearest(self.card.slug, self.budget, method.spec, count(method, self.sites, self.model))

    def none(self, error: VeneerError | None) -> Nearest:
        return Nearest(self.card.slug, self.budget, why=str(error).splitlines()[0] if error else "no sizes fit this model")

    def search(self) -> Setting | None:
        """The sizes that come nearest: the main one alone if that comes close, else another as well, one after the other."""
        if not self.sizes:
            return {} if self.count({}) is not None else None
        main, *rest = self.sizes
        best = self.over(main, {})
        if rest and not self.close(best):
            best = self.nearer(best, self.over(main, {}, self.in_proportion))
        for name in rest:
            if self.close(best):
                break
            if best is None:  # the main size is refused everywhere: find values of this one that it goes with
                for value in self.values(name, coarse=True):
                    best = self.nearer(best, self.over(main, {name: value}))
            else:
                there = self.over(name, best)
                best = self.nearer(self.nearer(best, there), self.over(main, there or best))
        return best

    def close(self, setting: Setting | None) -> bool:
        return setting is not None and self.off(setting) <= CLOSE

    def nearer(self, first: Setting | None, second: Setting | None) -> Setting | None:
        """The one that comes nearer, the first of equals."""
        return min((s for s in (first, second) if s is not None), key=self.off, default=None)

    def in_proportion(self, setting: Setting) -> Setting:
        """The other sizes in the ratio to the main one that they have by default."""
        main, *rest = self.sizes
        base, value = self.options[main].default, setting[main]
        numbers = {n: self.options[n].default for n in rest if _whole(self.options[n].default) and self.options[n].default > 0}
        return {n: max(1, round(d * value / base)) for n, d in numbers.items()} if _whole(base) and _whole(value) else {}

    def over(self, name: str, others: Setting, follows: Callable[[Setting], Setting] = lambda setting: {}) -> Setting | None:
        """The best value of one size, with others given, or following from it."""

        def setting(value: Any) -> Setting:
            return {**others, name: value, **follows({name: value})}

        values = self.values(name)
        if all(map(_number, values)):
            values = self.bracket([v for v in values if self.fits(setting(v))], lambda v: self.count(setting(v)))
        tried = [setting(v) for v in values]
        return min((s for s in tried if self.count(s) is not None), key=self.off, default=None)

    def bracket(self, values: list[Any], counted: Callable[[Any], int | None]) -> list[Any]:
        """Values worth comparing, out of ascending ones: both sides of the budget if counts rise or fall, else all."""
        sample: list[Any] = []
        for value in dict.fromkeys([*values[:: max(1, len(values) // 10)], *values[-1:]]):
            n = counted(value)
            if n is None:
                continue
            sample.append(value)
            if len(sample) > 1 and n > 4 * self.budget and n > cast(int, counted(sample[-2])):
                break  # rising: what follows is larger still
        counts = [cast(int, counted(v)) for v in sample]
        rising, falling = (all(a <= b for a, b in pairwise(x)) for x in (counts, counts[::-1]))
        if len(sample) < 2 or not (rising or falling):
            return values
        sides = [
            (a, b) for (a, m), (b, n) in zip(zip(sample, counts), zip(sample[1:], counts[1:])) if min(m, n) <= self.budget <= max(m, n)
        ]
        if not sides:
            return sample
        low, high = sides[0][0], sides[-1][1]
        low, high = self.halve([v for v in values if low <= v <= high], counted, rising)
        return [low, high, *self.refine(low, high, counted, rising)]

    def halve(self, values: list[Any], counted: Callable[[Any], int | None], rising: bool) -> tuple[Any, Any]:
        """The two neighbours among the values that the budget lies between."""
        left, right = 0, len(values) - 1
        while right - left > 1:
            middle = (left + right) // 2
            n = counted(values[middle])
            if n is None:
                del values[middle]
                right -= 1
            elif (n < self.budget) == rising:
                left = middle
            else:
                right = middle
        return values[left], values[right]

    def refine(self, low: Any, high: Any, counted: Callable[[Any], int | None], rising: bool) -> list[Any]:
        """Values between two neighbours, by halving, while they are legal."""
        seen: list[Any] = []
        while len(seen) < 20:
            middle = (low + high) // 2 if _whole(low) and _whole(high) else _rounded((low + high) / 2)
            n = counted(middle) if low < middle < high else None
            if n is None:
                break
            seen.append(middle)
            low, high = (middle, high) if (n < self.budget) == rising else (low, middle)
        return seen

    def values(self, name: str, coarse: bool = False) -> list[Any]:
        """Values of a hyper-parameter to try: all choices, or numbers within its limits, ascending."""
        option = self.options[name]
        limits, default = option.limits, option.default
        if "choices" in limits:
            return list(limits["choices"])
        if isinstance(default, bool) or option.type == "bool":
            return [default, not default]
        if _whole(default) or "int" in option.type.replace("|", " ").split():
            least = int(limits["gt"]) + 1 if "gt" in limits else int(limits.get("ge", 1))
            wide = max((max(s.out_features, s.in_features) for s in self.found), default=1)
            most = limits.get("le", limits.get("lt", wide if name in RANKS else None))
            return self.whole(max(least, 0), most, default, coarse)
        if _number(default):
            return _grid(float(default), limits, coarse)
        return [default]

    def whole(self, least: int, most: float | None, default: Any, coarse: bool) -> list[int]:
        shapes = {(s.out_features, s.in_features) for s in self.found}
        top = max((a * b for a, b in shapes), default=ALL_UP_TO) if most is None else int(most)
        grid = {step << k for k in range(top.bit_length()) for step in (2, 3)}
        dividing = {d for shape in shapes for size in shape for d in divisors(size)}
        small = {d for d in dividing if d <= 32} | {2**k for k in range(6)} if coarse else set(range(least, ALL_UP_TO + 1))
        known = {default} if _whole(default) else set()
        return sorted({v for v in small | known | (set() if coarse else grid | dividing) if least <= v <= top} | known)

    def fits(self, setting: Setting) -> bool:
        """Whether the sizes are legal on this model, and the start is still the base where the defaults' is."""
        try:
            method = self.made(setting)
            for site in self.found:
                method.check(site)
        except VeneerError as error:
            self.refused = self.refused or error
            return False
        return not (self.kept_start and "identity" in method.limits)

    def count(self, setting: Setting) -> int | None:
        """The count with these sizes, None where the method refuses them."""
        key = tuple(sorted((k, repr(v)) for k, v in setting.items()))
        if key not in self.counts:
            self.counts[key] = None
            if self.fits(setting):
                try:
                    self.counts[key], self.by_shape = _count(self.made(setting), self.found, self.model, self.by_shape)
                except VeneerError as error:
                    self.refused = self.refused or error
        return self.counts[key]

    def made(self, setting: Setting) -> Method:
        return self.cls(**{**self.given, **setting, **self.scales(setting)})

    def scales(self, setting: Setting) -> Setting:
        """alpha in the ratio to the rank that it has by default, where the scale is alpha over the rank."""
        alpha = self.options.get("alpha")
        rank = next((n for n in RANKS if n in setting and _whole(self.options[n].default)), None)
        if alpha is None or rank is None or "alpha" in self.given or not _number(alpha.default) or not _whole(setting[rank]):
            return {}
        return {"alpha": _rounded(alpha.default * setting[rank] / self.options[rank].default)}

    def off(self, setting: Setting) -> float:
        return abs(cast(int, self.count(setting)) - self.budget) / self.budget


def _grid(default: float, limits: Mapping[str, float], coarse: bool) -> list[float]:
    """Numbers around a default by powers of √2 and, where there is an upper limit, even steps up to it."""
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    reach = 4 if coarse else 20
    found = {_rounded(default * 2 ** (k / 2)) for k in range(-reach, reach + 1)} | {default}
    if low is not None and high is not None and not coarse:
        found |= {_rounded(low + (high - low) * k / 20) for k in range(21)}
    below, above = ("gt" in limits), ("lt" in limits)
    return sorted(
        v for v in found if (low is None or v > low or (v == low and not below)) and (high is None or v < high or (v == high and not above))
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
