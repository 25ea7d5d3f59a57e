"""Checks of pictures and their masks before training: both there, of one size, with known values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadValue
from veneer.tasks.classes_file import legend_of_values
from veneer.tasks.data import Row, Table
from veneer.tasks.image_classification import open_picture
from veneer.tasks.legend import IGNORED, Legend, mask_values, named, opened

MANY = 500
"""So many masks are read with a progress bar."""


def classes_of(table: Table, column: str) -> Legend:
    """The classes that occur in the masks of these rows. Raises what `mask_of` raises, and `BadValue` for less than 2 classes."""
    import numpy as np

    masks = [mask_of(row, column, "train") for row in table.rows]
    values = {int(v) for mask in _watched(masks, "finding the classes") for v in np.unique(mask_values(mask))}
    return legend_of_values(sorted(values), table.source)


def check_masks(table: Table, column: str, legend: Legend, split: str) -> None:
    """Raises `BadFile` or `BadValue` for the first row whose mask is missing, of another size, or holds unknown values or nothing."""
    for row in _watched(table.rows, f"checking the {split} masks"):
        mask = mask_of(row, column, split)
        indices = legend.indices(mask)
        if split == "train" and bool((indices == IGNORED).all()):  # a batch of such would have no loss
            raise BadValue(f"{named(mask)} ({split}) holds nothing but ignored pixels. Take the picture and its mask away.")


def mask_of(row: Row, column: str, split: str) -> Any:
    """The row's mask. Raises `BadFile` if it is missing, `BadValue` if it is of another size than its picture."""
    picture, mask = row["image"], row.get(column)
    file = picture if isinstance(picture, str) else ""
    if mask is None:
        wanted = f"masks/{Path(file).stem}.png" if file else "one"
        raise BadFile(f"{file or 'A picture'} ({split}) has no mask. Add {wanted}, or take the picture away.")
    own, right = _size(mask), _size(picture)
    if own != right:
        raise BadValue(
            f"{named(mask)} ({split}) is {own[0]} × {own[1]} pixels, its picture {file or ''} {right[0]} × {right[1]}. "
            "Save the mask in the picture's size, without smoothing."
        )
    return mask


def _size(picture: Any) -> tuple[int, int]:
    """Width and height, from the file's header where it is a file."""
    if hasattr(picture, "shape"):
        return int(picture.shape[1]), int(picture.shape[0])
    if isinstance(picture, dict):
        return open_picture(picture).size
    with opened(picture) as header:
        return header.size


def _watched(rows: Sequence[Any], what: str) -> Any:
    """The rows, with a progress bar where there are many."""
    if len(rows) < MANY:
        return rows
    from tqdm.auto import tqdm

    return tqdm(rows, desc=what, unit="mask", leave=False, dynamic_ncols=True)
