"""Masks as pictures for people: a colour for each class."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.tasks.data import Row
from veneer.tasks.domains import domain_of
from veneer.tasks.image_classification import open_picture
from veneer.tasks.legend import IGNORED, Legend


def sheet(rows: Sequence[Row], masks: Sequence[np.ndarray], found: Sequence[np.ndarray], labels: Sequence[str]) -> Any:
    """One PIL picture: in each line a row's picture, its mask and the predicted one, both of class indices [height, width]."""
    from veneer.study.contact_sheet import contact_sheet

    lines = []
    for row, *pair in zip(rows, masks, found):
        file = Path(row["image"]).name if isinstance(row["image"], str) else ""
        pictures = [open_picture(row["image"]), *(painted(mask, len(labels)) for mask in pair)]
        lines.append((f"{domain_of(row)} {file}".strip(), pictures))
    lines[0][1].append(swatches(labels, max(144, *(picture.width for picture in lines[0][1]))))
    return contact_sheet(lines, ("picture", "truth", "prediction", "classes"))


def answer(picture: Any, mask: np.ndarray, legend: Legend) -> dict[str, Any]:
    """What a predicted mask says: the commonest class, all classes' shares of the pixels, and the mask in the data's own values."""
    shares = np.bincount(mask.ravel(), minlength=len(legend.labels)) / mask.size
    named = Path(picture).stem if isinstance(picture, str | Path) else ""
    said = {"label": legend.labels[int(shares.argmax())], "score": float(shares.max())}
    return {**said, "scores": dict(zip(legend.labels, shares.tolist())), "mask": legend.picture(mask), "file": named}


def painted(mask: np.ndarray, classes: int) -> Any:
    """A PIL picture of a mask of class indices [height, width]; what does not count is grey."""
    from PIL import Image

    colours = palette(classes)
    return Image.fromarray(np.where((mask == IGNORED)[..., None], 128, colours[mask % classes]).astype(np.uint8))


def swatches(labels: Sequence[str], side: int) -> Any:
    """A PIL picture [side, side] that names the colours, as many of them as find room."""
    from PIL import Image, ImageDraw

    out = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(out)
    for k, (label, colour) in enumerate(zip(labels, palette(len(labels)).tolist())):
        draw.rectangle((2, 14 * k + 2, 12, 14 * k + 12), fill=tuple(colour), outline="black")
        draw.text((16, 14 * k), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return out


def palette(n: int) -> np.ndarray:
    """n colours far from one another, uint8 [n, 3]; the first is black."""
    turns = (0.61803398875 * k % 1 for k in range(n - 1))  # the golden ratio spreads hues evenly for any n
    rest = [colorsys.hsv_to_rgb(h, 0.55 + 0.4 * (k % 2), 1.0 - 0.25 * (k // 2 % 2)) for k, h in enumerate(turns)]
    return (255 * np.array([(0.0, 0.0, 0.0), *rest])).astype(np.uint8)
