"""Hugging Face PEFT's adapter folders, `adapter_config.json` and `adapter_model.safetensors`: read and written bit-exactly.

The file's keys say which modules are adapted, the shapes their ranks; the config says scales and switches. What a config
asks for and this library does not compute is refused by name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import Unsupported, nearest
from veneer.method import Method, Params, Stack
from veneer.site import Site
from veneer.slot import Slot
from veneer.source import Source
from veneer.store import CannotWrite, write_tensors, write_text
from veneer.tools.peft_names import CONFIG, PROMPTS, WEIGHTS, Places
from veneer.tools.peft_read import READERS, Given, Piece, check_options, read_config, read_given, read_saved_modules
from veneer.tools.peft_write import WRITERS, Grouped, Taken, finish, write_as_lora, write_extras, write_method
from veneer.tuned import Tuned, check_name, tuned_of


@dataclass(frozen=True)
class Format:
    """How one of PEFT's types is read, and written."""

    read: Callable[[Given], Piece]
    write: Callable[[Taken, Grouped], None]


FORMATS = {kind: Format(READERS[kind], WRITERS[kind]) for kind in READERS}
"""PEFT's types by their names in the config: how each is read, and written."""


class FromTensors(Source):
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Params]) -> None:
        self.tensors = tensors

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        return {}

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        return self.tensors[site.name]


def load_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> Tuned:
    """Loads a folder that PEFT's `save_pretrained` wrote into the model, under `name` ("default"), and activates it.

    Raises:
        BadFile: missing, truncated or pickled files.
        Mismatch: an adapter for another model.
        Unsupported: a kind of adapter, or an option, that this library does not compute.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = str(config.get("peft_type"))
    if kind not in FORMATS:
        raise Unsupported(f"{folder}: PEFT's {kind} cannot be read.{nearest(kind, FORMATS)} Those that can: {', '.join(FORMATS)}.")
    check_options(folder, config)
    tuned = tuned_of(model)
    name = name or "default"
    check_name(name, tuned)
    given = read_given(folder, config, Places(model), kind in PROMPTS)
    with torch.no_grad():
        main = FORMATS[kind].read(given)
        before, after = read_saved_modules(given)
    pieces = [p for p in (*before, main, *after) if p.at]
    method = pieces[0].method if len(pieces) == 1 else Stack(methods=tuple(p.method for p in pieces))
    adapter = Adapter(name, method, [], facts={"peft": config, **({"peft_tables": given.tables} if given.tables else {})})
    for piece in pieces:
        for special, site, _ in piece.at:
            special.check(site)
    planned = [(p.method, [(m, s) for m, s, _ in p.at], FromTensors({s.name: t for _, s, t in p.at})) for p in pieces]
    return tuned.add(adapter, planned)


def save_peft(
    tuned: Tuned,
    folder: str | Path,
    name: str | None = None,
    *,
    as_lora: bool = False,
    rank: int | None = None,
    tell: Callable[[str], object] = print,
) -> Path:
    """Writes one adapter as PEFT's `save_pretrained` would, whole or not at all, and returns the folder.

    Args:
        name: the adapter; the first active one by default.
        as_lora: write plain LoRA whatever the method: exact for low-rank methods, else the best product of this rank.
        rank: with as_lora, the rank for methods that are not of low rank.
        tell: where the error of an inexact conversion is reported, as a sentence.

    Raises:
        Unsupported: a method that PEFT does not have; the message says what can be done instead.
    """
    name = name if name is not None else (tuned.active or list(tuned.adapters))[0]
    taken = Taken(tuned, name, Places(tuned.model))
    parts = {i: [p for p in tuned.adapters[name].parts if p.index == i] for i in range(len(tuned.adapters[name].method.parts))}
    with torch.no_grad():
        main = write_as_lora(taken, parts, rank, tell) if as_lora else write_method(taken, parts)
        write_extras(taken, {i: p for i, p in parts.items() if i not in main})
    finish(taken)
    folder = Path(folder)
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in taken.tensors.items()}
    text = json.dumps(dict(sorted(taken.config.items())), indent=2) + "\n"
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"Could not write {folder}: it is a file; choose another folder.")
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, text)
    return folder
