"""Submodules that share their name with a public function: `veneer.method` is the contract and also makes a method."""

from __future__ import annotations

import sys
import types
from importlib import import_module
from typing import Any


class CallableModule(types.ModuleType):
    """A module that can be called; Python binds a submodule over a function of the same name, so it must answer for both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("veneer.registry"), self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    sys.modules[name].__class__ = CallableModule
