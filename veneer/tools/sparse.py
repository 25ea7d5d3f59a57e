"""Sparse files: of an adapter that changed few numbers, only those with their places; the others come again from its start.

save_sparse(tuned, folder)            # after training `full + id3(B=100000)`, say
tuned = load_sparse(model, folder)    # attaches the same method to the same base and puts the changed numbers in
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt import attach
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported
from veneer.spec import parse
from veneer.store import checksum, describe, tensors_of, write_tensors
from veneer.tuned import Tuned

FILE = "sparse.safetensors"


def save_sparse(tuned: Tuned, folder: str | Path, name: str | None = None, *, seed: int = 0) -> Path:
    """Writes what differs from a fresh attach with this seed: places [n] and values [n] of each tensor, whole or not at all.

    A task's own head, and any tensor of which half or more changed, is written whole.

    Raises:
        BadValue: half or more of an adapter's numbers changed; the seed is probably not the one it was attached with.
        Unsupported: methods that start from data, or at one site with other hyper-parameters than those of a spec.
    """
    name = name or tuned.active[0]
    adapter, out, changed, numbers = tuned.adapters[name], dict[str, Tensor](), 0, 0
    if any(part.calibrates or part.reads_gradients for part in adapter.method.parts):
        raise Unsupported(f"save_sparse: {adapter.method.label} starts from data, which a file does not hold; use save.")
    now = {key: t.detach().cpu() for key, t in tensors_of(tuned, name).items()}
    heads = {f"{p.index}/{p.site.name}/" for p in adapter.parts if p.method.trains_heads or p.site.trainable_head}
    with fresh(tuned, name, seed) as start:
        for key, tensor in now.items():
            at = (tensor.flatten() != start[key].flatten()).nonzero().flatten()
            if not key.startswith(tuple(heads) or ("\0",)):
                changed, numbers = changed + len(at), numbers + tensor.numel()
            if 2 * len(at) >= tensor.numel():
                out[f"{key}/whole"] = tensor.contiguous()
            elif len(at):
                out[f"{key}/at"] = at if tensor.numel() > 2**31 else at.int()
                out[f"{key}/values"] = tensor.flatten()[at]
    if numbers and 2 * changed >= numbers:
        raise BadValue(
            f"save_sparse: {changed} of {numbers} numbers differ from a fresh start with seed={seed}. "
            "Give the seed it was attached with, or use save: the change is not sparse."
        )
    sums = {key: checksum(t) for key, t in now.items()}
    about = describe(tuned, name) | {"seed": seed, "changed": changed, "sums": sums, "overrides": adapter.overrides}
    write_tensors(Path(folder) / FILE, out, {"sparse": json.dumps(about)})
    return Path(folder)


def load_sparse(model: nn.Module, folder: str | Path, name: str | None = None) -> Tuned:
    """Attaches the adapter of a sparse file and activates it.

    Raises:
        BadFile: missing, damaged or foreign files.
        Mismatch: another base, or another version's first values; nothing is attached then.
    """
    path = Path(folder) / FILE
    about, held = _read(path)
    name = name or str(about["adapter"])
    tuned = attach(model, parse(about["spec"]), name, seed=about["seed"], head=False, overrides=about["overrides"])
    try:
        with torch.no_grad():
            for key, t in tensors_of(tuned, name).items():
                _fill(t, key, held)
                if checksum(t) != about["sums"].get(key):
                    raise Mismatch(
                        f"{path}: made for {about['base']['name'] or about['base']['class']}; on this base {key} starts differently."
                    )
    except (RuntimeError, IndexError):
        tuned.remove(name)
        raise Mismatch(f"{path}: its tensors do not fit this {type(model).__name__}.") from None
    except Mismatch:
        tuned.remove(name)
        raise
    return tuned


def _fill(tensor: Tensor, key: str, held: dict[str, Tensor]) -> None:
    if f"{key}/whole" in held:
        tensor.copy_(held[f"{key}/whole"])
    elif f"{key}/at" in held:
        at = held[f"{key}/at"].long()
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < tensor.numel():
            raise IndexError
        tensor.view(-1)[at.to(tensor.device)] = held[f"{key}/values"].to(tensor)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["sparse"])
            if {"spec", "seed", "sums", "adapter", "base", "overrides"} - set(about):
                raise KeyError
            return about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise BadFile(f"{path}: not a whole sparse adapter file ({type(error).__name__}).") from None


@contextmanager
def fresh(tuned: Tuned, name: str, seed: int) -> Iterator[dict[str, Tensor]]:
    """An adapter's tensors as a fresh attach with this seed gives them; afterwards everything is as it was, training too."""
    adapter, beside = tuned.adapters[name], f"{name}_at_its_start"
    route, started = (tuned.route.active, tuned.route.rows), tuned._started
    flags = [(p, p.requires_grad) for a in tuned.adapters.values() for p in a.trained().values()]
    try:
        attach(tuned.model, adapter.method, beside, seed=seed, head=False, overrides=adapter.overrides)
        yield {key: t.detach().cpu() for key, t in tensors_of(tuned, beside).items()}
    finally:
        if beside in tuned.adapters:
            tuned.remove(beside)
        (tuned.route.active, tuned.route.rows), tuned._started = route, started
        for p, flag in flags:
            p.requires_grad_(flag)
