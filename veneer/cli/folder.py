"""`veneer inspect FOLDER`: what an adapter's folder holds, read from its headers; nothing is loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Argument
from veneer.cli.output import existing, table
from veneer.errors import BadFile
from veneer.study import format

HEADER_LIMIT = 100_000_000
"""Largest header that is read, in bytes: the limit of the safetensors format."""


def inspect(folder: Annotated[Path, Argument("FOLDER", "An adapter's folder.")]) -> Any:
    """Show what an adapter's folder holds: method, base model, sites, sizes, training."""
    existing(folder, "The folder")
    if (folder / "adapter_config.json").exists():
        return _foreign(folder)
    path = existing(folder / "adapter.safetensors", "The adapter")
    tensors, metadata = header(path)
    facts = _facts(folder, metadata)
    _tell(folder, path, facts, tensors)
    sizes = {name: {"dtype": t["dtype"], "shape": t["shape"]} for name, t in tensors.items()}
    return {**facts, "folder": folder, "bytes": path.stat().st_size, "tensors": sizes}


def header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file, from its first bytes only.

    Raises `BadFile` if the file is truncated, oversized or not safetensors.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 0 < length <= min(HEADER_LIMIT, total - 8):
            raise BadFile(f"{path}: not a safetensors file, or cut off in its header. Copy or save it again.")
        try:
            entries = json.loads(file.read(length).decode("utf-8"))
            metadata = entries.pop("__metadata__", {})
            end = max((int(t["data_offsets"][1]) for t in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadFile(f"{path}: its safetensors header cannot be read. Copy or save it again.") from error
    if end + 8 + length != total:
        word = "cut off" if end + 8 + length > total else "longer than it should be"
        raise BadFile(f"{path}: the file is {word}: {total} bytes instead of {end + 8 + length}. Copy or save it again.")
    return entries, metadata


def _facts(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """veneer.json, or the copy of it in the tensor file where it is missing."""
    path = folder / "veneer.json"
    text = path.read_text("utf-8") if path.exists() else metadata.get("veneer", "")
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise BadFile(f"{path}: not readable as JSON ({error}). The same facts stand in adapter.safetensors; delete the file.") from error
    if not isinstance(facts, dict) or "spec" not in facts:
        raise BadFile(f"{path}: holds no method spec, so this is not an adapter of veneer.")
    return facts


def _tell(folder: Path, path: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    base, training = facts.get("base") or {}, facts.get("training") or {}
    parameters, trained = base.get("parameters"), facts.get("trained")
    print(f"{folder}\n  method    {facts['spec']}")
    print(f"  base      {base.get('name', 'unknown')} ({base.get('class', 'unknown class')}, {format.count(parameters)} parameters)")
    print(f"  trained   {format.count(trained)} parameters ({format.share(trained, parameters)})")
    dtypes = ", ".join(sorted({t["dtype"] for t in tensors.values()}))
    print(f"  file      {format.size(path.stat().st_size)}, {len(tensors)} tensors ({dtypes})")
    print(f"  written   by veneer {facts.get('veneer', 'of unknown version')}")
    for name, value in training.items():
        print(f"  {name:<9} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value}")
    sites = facts.get("sites") or []
    kinds = Counter((s["role"], s["kind"], s["out"], s["in"]) for s in sites)
    print(f"\n{len(sites)} sites")
    table(("role", "kind", "out", "in", "count"), [(*kind, count) for kind, count in kinds.items()], right=(2, 3, 4))


def _foreign(folder: Path) -> dict[str, Any]:
    """An adapter in Hugging Face PEFT's format."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except ValueError as error:
        raise BadFile(f"{folder / 'adapter_config.json'}: not readable as JSON ({error}).") from error
    tensors, _ = header(existing(folder / "adapter_model.safetensors", "The adapter"))
    count = sum(_elements(t["shape"]) for t in tensors.values())
    print(f"{folder}\n  format    Hugging Face PEFT, {config.get('peft_type', 'of unknown type')}")
    print(f"  base      {config.get('base_model_name_or_path')}\n  stored    {format.count(count)} numbers in {len(tensors)} tensors")
    return {
        "folder": folder,
        "format": "peft",
        "config": config,
        "tensors": {n: {"dtype": t["dtype"], "shape": t["shape"]} for n, t in tensors.items()},
    }


def _elements(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
