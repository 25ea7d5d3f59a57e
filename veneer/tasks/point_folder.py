"""Folders of point clouds, one folder a class, with or without splits above.

root/{train,validation,test}/chair/a.obj …
root/chair/a.obj …
"""

from __future__ import annotations

from pathlib import Path

from veneer.errors import BadFile
from veneer.tasks.data import SPLITS, Data, Table

POINTS = (".obj", ".ply", ".npy", ".xyz")
"""Suffixes of the files that are read."""


def holds_points(path: Path) -> bool:
    """Whether a folder has one of the forms above."""
    return any(_files(place) for place in _places(path).values())


def point_folder(path: Path, source: str) -> Data:
    """Rows with `points` (the file) and `label` (its folder), by split. Raises `BadFile`."""
    tables = {}
    for name, place in _places(path).items():
        rows = [{"points": str(file), "label": folder.name} for folder, file in _files(place)]
        if not rows:
            raise BadFile(f"{place} holds no point clouds ({', '.join(POINTS)}), one folder a class.")
        tables[name] = Table(rows, str(place))
    return Data(source, tables, hints={"task": "point-classification", "label": "label"})


def _places(path: Path) -> dict[str, Path]:
    """The folders of the splits; the whole as training rows where there is none for training."""
    found = {name: next((path / word for word in words if (path / word).is_dir()), None) for name, words in SPLITS.items()}
    return {name: place for name, place in found.items() if place} if found["train"] else {"train": path}


def _files(place: Path) -> list[tuple[Path, Path]]:
    """(class folder, file) of every cloud."""
    folders = sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [(folder, file) for folder in folders for file in sorted(folder.rglob("*")) if file.suffix.lower() in POINTS]
