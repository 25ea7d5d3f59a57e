"""One folder: from PEFT's files to an adapter in a model, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import Unsupported, nearest
from veneer.method import Method, Params, Stack
from veneer.part import Part
from veneer.site import Site
from veneer.slot import Slot
from veneer.source import Source
from veneer.store import CannotWrite, write_tensors, write_text
from veneer.tools.peft.as_lora import write_as_lora
from veneer.tools.peft.formats import FORMATS, OF_METHOD
from veneer.tools.peft.given import Piece, check_options, read_config, read_given
from veneer.tools.peft.modules import EXTRAS, read_saved_modules, write_extras
from veneer.tools.peft.names import CONFIG, PROMPTS, WEIGHTS, Places
from veneer.tools.peft.taken import Taken, finish, grouped
from veneer.tuned import Tuned, check_name, tuned_of


class FromPiece(Source):
    """Tensors that are there already."""

    def __init__(self, piece: Piece) -> None:
        self.groups = piece.shared
        self.tensors = {site.name: p for _, site, p in piece.at}

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        return self.groups.get(group, {})

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
    facts = {"peft": config, "peft_tables": given.tables, "peft_copies": given.copies, "own_fixed": given.own_fixed}
    adapter = Adapter(name, method, [], facts={key: fact for key, fact in facts.items() if fact})
    for piece in pieces:
        for special, site, _ in piece.at:
            special.check(site)
    planned = [(p.method, [(m, s) for m, s, _ in p.at], FromPiece(p)) for p in pieces]
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
        write_extras(taken, {i: p for i, p in parts.items() if i not in main}, FORMATS[taken.config["peft_type"]].biases)
    finish(taken)
    folder = Path(folder)
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in taken.tensors.items()}
    text = json.dumps(dict(sorted(taken.config.items())), indent=2) + "\n"
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"Could not write {folder}: it is a file; choose another folder.")
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, text)
    return folder


def write_method(taken: Taken, parts: Mapping[int, list[Part]]) -> set[int]:
    """Writes the one part that is a PEFT method, and returns its index."""
    methods = taken.tuned.adapters[taken.name].method.parts
    found = [i for i, m in enumerate(methods) if m.slug in OF_METHOD]
    strange = [m.slug for m in methods if m.slug not in OF_METHOD and m.slug not in EXTRAS]
    way = "Save it in veneer's own format, or export it as LoRA (as_lora=True, with rank=… where it is not of low rank)."
    if strange:
        raise Unsupported(f"PEFT has no {strange[0]} that this could be written as. {way}")
    if len(found) != 1:
        what = " + ".join(methods[i].slug for i in found) or " + ".join(m.slug for m in methods)
        raise Unsupported(f"A PEFT adapter holds exactly one method; this is {what}. {way}")
    how = OF_METHOD[methods[found[0]].slug]
    taken.config["peft_type"] = how.kind
    own = parts[found[0]]
    if bare := next((p for p in own if p.site.kind == "parameter" or p.site.parameter.endswith("_proj_weight")), None):
        raise Unsupported(f"{bare.site.name} is a bare parameter, which PEFT's format has no place for. {way}")
    how.write(taken, grouped(own))
    return {found[0]}
