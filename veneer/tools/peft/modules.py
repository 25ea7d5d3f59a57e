"""Whole modules and biases that PEFT saves beside a method's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from veneer import registry
from veneer.errors import Unsupported
from veneer.forms import form_of
from veneer.method import Params
from veneer.part import Part
from veneer.site import Site
from veneer.tools.peft.given import Given, Piece
from veneer.tools.peft.names import CLASSIFIERS, LAYERS, PROMPTS, TUNED, WEIGHTS, Places, split_key, stored_shape, turned
from veneer.tools.peft.taken import Taken, grouped

EXTRAS = {"full": "module", "probe": "module", "bitfit": "bias"}
"""Methods that PEFT has as options of another one."""


def read_saved_modules(given: Given) -> tuple[list[Piece], list[Piece]]:
    """Whole modules and biases that PEFT saved beside its own tensors: what acts before the adapter, and what after."""
    full, bitfit, head = Piece(registry.method("full")), Piece(registry.method("bitfit")), Piece(registry.head_method())
    for path, slots in given.modules.items():
        under = {slot.removeprefix("base_layer."): slot for slot in list(slots)}
        if unknown := [slot for name, slot in under.items() if name not in ("weight", "bias") and not given.places.bare(path, name)]:
            raise Unsupported(
                f"{given.folder / WEIGHTS}: {path or 'the model'} has {unknown[0]}, which no known part of the format explains."
            )
        for name in [n for n in under if given.places.bare(path, n)]:
            site = given.places.bare(path, name)
            assert site is not None
            full.at.append((full.method, site, {"weight": given.need(path, under.pop(name), stored_shape(given.places, site))}))
        if not under:
            continue
        site = given.places.whole(path)
        if "weight" not in under:
            bias = given.need(path, under["bias"], (site.out_features,))
            bitfit.at.append((bitfit.method, site, {"beta" if site.kind == "norm" else "b": bias}))
            continue
        p = saved_module(given, path, site, under)
        if under["weight"].startswith("base_layer.") and same_as_base(given.places, site, p):
            given.tables.append(path)
            continue
        piece = head if site.trainable_head and site.role == "head" else full
        piece.at.append((piece.method, site, p))
    for piece in (full, bitfit):
        if piece.at:
            names = " ".join(re.escape(s.name) for _, s, _ in piece.at)
            piece.method = replace(piece.method, targets=names)
            piece.at = [(piece.method, s, p) for _, s, p in piece.at]
    return [full, bitfit], [head]


def saved_module(given: Given, path: str, site: Site, under: Mapping[str, str]) -> Params:
    """A module's own weight and bias as [out, in] and [out]."""
    W = given.need(path, under["weight"], stored_shape(given.places, site))
    form = form_of(given.places.model.get_submodule(path), site.kind, site.parameter)
    W = W.t().contiguous() if turned(form) else W
    p = {"weight": W.flatten(1) if W.ndim > 1 else W}
    if "bias" in under:
        p["bias"] = given.need(path, under["bias"], (site.out_features,))
    return p


def same_as_base(places: Places, site: Site, p: Params) -> bool:
    module = places.model.get_submodule(site.module)
    W = form_of(module, site.kind, site.parameter).weight(module)
    return torch.equal(W.cpu(), p["weight"].to(W.dtype).reshape(W.shape))


def write_extras(taken: Taken, parts: Mapping[int, list[Part]], biases: bool) -> None:
    """Trained heads and whole modules as `modules_to_save`, trained biases (where the type has them) under `bias`."""
    targets, roots = grouped_targets(taken), []
    for own in sorted((o for o in parts.values() if o), key=lambda own: EXTRAS[own[0].method.slug]):
        if EXTRAS[own[0].method.slug] == "bias":
            if not biases:
                raise Unsupported(
                    f"PEFT's {taken.config['peft_type']} cannot train biases beside its own tensors; take bitfit out of the stack, "
                    "or save in veneer's own format."
                )
            write_biases(taken, own, targets)
            continue
        for path, group in grouped(own).items():
            if path in targets:
                taken.put(path, "base_layer.weight", stored_weight(taken, group)["weight"])
            else:
                roots.append(root_of(path, group[0].site))
    for path in taken.tuned.adapters[taken.name].facts.get("peft_tables") or ():
        if path in targets:
            taken.put(path, "base_layer.weight", taken.tuned.model.get_submodule(path)._parameters["weight"])  # type: ignore[arg-type]
    prompt = taken.config["peft_type"] in PROMPTS
    if prompt and not roots and taken.task() in CLASSIFIERS:  # PEFT saves and expects the head there, trained or not
        roots += [s.module.split(".")[0] for s in taken.places.sites if s.trainable_head]
    for root in dict.fromkeys(roots):
        write_module(taken, root, [p for own in parts.values() for p in own], prompt)
    taken.config["modules_to_save"] = list(dict.fromkeys(roots)) or None


def grouped_targets(taken: Taken) -> set[str]:
    return {split_key(key)[0] for key in taken.tensors if TUNED.search(key)}


def root_of(path: str, site: Site) -> str:
    """The module that PEFT copies: a task head as a whole, else the layer."""
    return path.split(".")[0] if site.trainable_head else path


def stored_weight(taken: Taken, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Parameters of a trained module in its own layout, in the adapter's precision."""
    module, _, form = taken.layer(parts)
    W, b = taken.folded(parts)
    out = {form.parameter: W.t() if turned(form) else W.reshape(stored_shape(taken.places, parts[0].site))}
    return out if b is None or form.bias_name not in module._parameters else {**out, form.bias_name: b}


def write_module(taken: Taken, root: str, parts: Sequence[Part], prompt: bool) -> None:
    trained: dict[str, Tensor] = {}
    for path, group in grouped(p for p in parts if p.site.kind in (*LAYERS, "parameter")).items():
        for parameter in dict.fromkeys(p.site.parameter for p in group):
            new = stored_weight(taken, [p for p in group if p.site.parameter == parameter])
            trained.update({f"{path}.{key}": t for key, t in new.items()})
    prefix = "base_model." if prompt else "base_model.model."
    for path, module in taken.tuned.model.get_submodule(root).named_modules(prefix=root):
        if "veneer" in path.split("."):
            continue
        own = {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        for key, t in own.items():
            if key not in module._non_persistent_buffers_set:
                taken.tensors[f"{prefix}{path}.{key}"] = trained.get(f"{path}.{key}", t)
            if key == "bias" and taken.config.get("bias") == "all":  # then PEFT writes its two copies, too
                inside = f"{path}.{key}".removeprefix(root)
                taken.put(root, f"modules_to_save{'.default' * (path != root)}{inside}", trained.get(f"{path}.{key}", t))
                taken.put(root, f"original_module{inside}", t)


def write_biases(taken: Taken, parts: Sequence[Part], targets: set[str]) -> None:
    for path, group in grouped(p for p in parts if p.tensors()).items():
        b = stored_weight(taken, group).get("bias")
        if b is None:
            raise Unsupported(f"bitfit gives {path} a bias, which it has not in the base; PEFT's format has no place for it.")
        taken.put(path, "base_layer.bias" if path in targets else "bias", b)
    taken.config["bias"] = f"{taken.config['peft_type'].lower()}_only" if {p.site.module for p in parts} <= targets else "all"
