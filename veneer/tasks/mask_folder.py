"""Folders of pictures with a mask each, of one domain or of several. Needs neither torch nor numpy.

    root/{train,val,test}/{images,masks}/name.png             one domain with its splits (val and test may be missing)
    root/{images,masks}/name.png                              one domain without
    root/<domain>/{train,val,test}/{images,masks}/name.png    several domains; also root/<domain>/{images,masks}/name.png

A domain without folders of splits, beside others that have them, is one to be tested on. `veneer.tasks.classes_file`
says what the values in masks mean.
"""

from __future__ import annotations

from pathlib import Path

from veneer.errors import BadFile
from veneer.tasks.classes_file import read_legend
from veneer.tasks.data import IMAGES, SPLITS, Data, Table

PICTURES, MASKS = "images", "masks"


def holds_masks(path: Path) -> bool:
    """Whether a folder has one of the forms above, in whole or in part."""
    inside = (path, *(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))
    return any((p / MASKS).is_dir() for p in inside) or any(_splits(p) for p in inside) or _is_part(path)


def mask_folder(path: Path, source: str) -> Data:
    """Rows with `image`, `mask` (None where there is none) and `domain`, by split. Raises `BadFile` if nothing is there to train on."""
    domains = [(path, "")] if _is_part(path) or _splits(path) else [(p, p.name) for p in sorted(path.iterdir()) if _is_domain(p)]
    split = {name: _splits(folder) for folder, name in domains}
    tables: dict[str, list] = {}
    for folder, name in domains:
        bare = "test" if any(split.values()) else "train"
        for part, place in (split[name] or {bare: folder}).items():
            tables.setdefault(part, []).extend(_pairs(place, name))
    if not tables.get("train"):
        raise BadFile(f"{path} holds no pictures to train on. Put them into {path.name}/train/{PICTURES} and {path.name}/train/{MASKS}.")
    legend = read_legend(path)
    made = {name: Table(tables[name], f"{source}[{name}]") for name in SPLITS if tables.get(name)}
    facts = {"legend": legend.facts} if legend else {}
    return Data(source, made, images=True, hints={"task": "semantic-segmentation"}, facts=facts)


def _is_part(path: Path) -> bool:
    return (path / PICTURES).is_dir() and ((path / MASKS).is_dir() or not any(p.name != PICTURES for p in path.iterdir() if p.is_dir()))


def _splits(path: Path) -> dict[str, Path]:
    """The folders of the splits that hold pictures and masks."""
    found = {name: next((path / word for word in words if _is_part(path / word)), None) for name, words in SPLITS.items()}
    return {name: place for name, place in found.items() if place}


def _is_domain(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and (_is_part(path) or bool(_splits(path)))


def _pairs(place: Path, domain: str) -> list[dict]:
    pictures, masks = _by_name(place / PICTURES), _by_name(place / MASKS)
    return [{"image": str(file), "mask": str(masks[n]) if n in masks else None, "domain": domain} for n, file in pictures.items()]


def _by_name(folder: Path) -> dict[str, Path]:
    """Picture files by their path inside the folder, without the suffix."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.suffix.lower() in IMAGES:
            name = str(file.relative_to(folder).with_suffix(""))
            if name in found:
                raise BadFile(f"{folder} holds both {found[name].name} and {file.name}; keep one of them.")
            found[name] = file
    return found
