"""veneer: parameter-efficient fine-tuning, every method in one frame.

    import veneer
    tuned = veneer.attach(model, "lora(r=8)")
    ...                                  # train tuned.parameters() with any loop
    tuned.save("my-adapter")

Names are loaded on first use, so that importing veneer costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "methods": "registry",
    "method": "registry",
    "register": "registry",
    "parse": "spec",
    "attach": "adapt",
    "of": "adapt",
    "fill": "filling",
    "pack": "filling",
    "Tuned": "tuned",
    "load": "store",
    "slim": "pruned.slim",
    "reversible": "streams.wrap",
    "Method": "method",
    "WeightMethod": "method",
    "AdditiveMethod": "method",
    "InputMethod": "method",
    "LowRankMethod": "method",
    "OutputMethod": "method",
    "ActivationMethod": "method",
    "PromptMethod": "method",
    "SelectionMethod": "method",
    "Stack": "method",
    "Strategy": "strategy",
    "Site": "site",
    "VeneerError": "errors",
}

if TYPE_CHECKING:
    from veneer.adapt import attach, of
    from veneer.errors import VeneerError
    from veneer.filling import fill, pack
    from veneer.method import (
        ActivationMethod,
        AdditiveMethod,
        InputMethod,
        LowRankMethod,
        Method,
        OutputMethod,
        PromptMethod,
        SelectionMethod,
        Stack,
        WeightMethod,
    )
    from veneer.pruned.slim import slim
    from veneer.registry import method, methods, register
    from veneer.site import Site
    from veneer.spec import parse
    from veneer.store import load
    from veneer.strategy import Strategy
    from veneer.streams.wrap import reversible
    from veneer.tuned import Tuned

__all__ = [
    "ActivationMethod", "AdditiveMethod", "InputMethod", "LowRankMethod", "Method", "OutputMethod", "PromptMethod", "SelectionMethod",
    "Site", "Stack", "Strategy", "Tuned", "VeneerError", "WeightMethod", "attach", "fill", "load", "method", "methods", "of", "pack",
    "parse", "register", "reversible", "slim",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    if name == "method":  # a submodule of the same name would shadow the function once imported
        import_module("veneer.method")
    value = getattr(import_module(f"veneer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
