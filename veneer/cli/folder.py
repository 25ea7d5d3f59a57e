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

WEIGHTS = "adapter.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER_LIMIT = 100_000_000
"""Largest header that is read, in bytes: the limit of the safetensors format."""


def inspect(folder: Annotated[Path, Argument("FOLDER", "An adapter's folder.")]) -> Any:
    """Show what an adapter's folder holds: method, base model, sites, sizes, training."""
    folder = adapter_folder(folder)
    facts = facts_of(folder)
    if "spec" not in facts:
        return _foreign(folder, facts)
    path = folder / WEIGHTS
    tensors, _ = header(path)
    _tell(folder, path, facts, tensors)
    sizes = {name: {"dtype": t["dtype"], "shape": t["shape"]} for name, t in tensors.items()}
    return {**facts, "folder": folder, "bytes": path.stat().st_size, "tensors": sizes}


def adapter_folder(folder: Path) -> Path:
    """The adapter's folder, also from that of the run that made it. Raises `BadFile` if there is nothing."""
    existing(folder, "The folder")
    inside = folder / "adapter"
    return inside if (inside / WEIGHTS).exists() and not (folder / WEIGHTS).exists() else folder


def facts_of(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself: the content of veneer.json, or of PEFT's adapter_config.json under "peft".

    Raises `BadFile` if there is no adapter, or one that is not whole.
    """
    if not (folder / WEIGHTS).exists() and (folder / PEFT_CONFIG).exists():
        config = _json(folder / PEFT_CONFIG, (folder / PEFT_CONFIG).read_text("utf-8"))
        return {"peft": config, "base": {"name": config.get("base_model_name_or_path")}}
    if not (folder / WEIGHTS).exists():
        inside = sorted(str(p.parent) for p in folder.glob(f"*/{WEIGHTS}"))[:3]
        raise BadFile(
            f"{folder} is not an adapter: it holds no {WEIGHTS}." + (f" Perhaps you mean {' or '.join(inside)}." if inside else "")
        )
    _, metadata = header(folder / WEIGHTS)
    if "veneer" not in metadata:
        raise BadFile(f"{folder / WEIGHTS}: a safetensors file, but not an adapter of veneer: its header holds no facts.")
    facts = _json(folder / WEIGHTS, metadata["veneer"])
    if not isinstance(facts.get("spec"), str):
        raise BadFile(f"{folder / WEIGHTS}: its header names no method, so this is not an adapter of veneer.")
    return facts


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: its JSON cannot be read ({error}). Copy or save it again.") from error
    if not isinstance(found, dict):
        raise BadFile(f"{path}: its JSON is not an object. Copy or save it again.")
    return found


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


def _tell(folder: Path, path: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    base, training = facts.get("base") or {}, facts.get("training") or {}
    parameters, trained = base.get("parameters"), facts.get("trained")
    print(f"{folder}\n  method    {facts['spec']}")
    print(f"  base      {base.get('name', 'unknown')} ({base.get('class', 'unknown class')}, {format.count(parameters)} parameters)")
    print(f"  trained   {format.count(trained)} parameters ({format.share(trained, parameters)})")
    dtypes = ", ".join(sorted({t["dtype"] for t in tensors.values()}))
    print(f"  file      {format.size(path.stat().st_size)}, {len(tensors)} tensors ({dtypes})")
    print(f"  written   by veneer {facts.get('veneer', 'of unknown version')}")
    if pruned := facts.get("pruned"):
        print(f"  pruned    {len(pruned)} layers: {', '.join(f'{n} {kept}' for n, kept in list(pruned.items())[:2])} …")
    for name, value in training.items():
        print(f"  {name:<9} {_said(value)}")
    sites = facts.get("sites") or []
    kinds = Counter((s["role"], s["kind"], s["out"], s["in"]) for s in sites)
    print(f"\n{len(sites)} sites")
    table(("role", "kind", "out", "in", "count"), [(*kind, count) for kind, count in kinds.items()], right=(2, 3, 4))


def _said(value: Any) -> str:
    """A training fact on one line; metrics with their intervals."""
    if not isinstance(value, dict):
        return str(value)
    metrics = {k: v for k, v in value.items() if isinstance(v, dict) and {"value", "low", "high"} <= set(v)}
    if metrics:
        return ", ".join(f"{k} {v['value']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for k, v in metrics.items())
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + " …"


def _foreign(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """An adapter in Hugging Face PEFT's format."""
    config = facts["peft"]
    tensors, _ = header(existing(folder / PEFT_WEIGHTS, "The adapter"))
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
