"""Captions of Fashion-MNIST pictures by a grammar: the kind of garment, and three things that are measured in the picture.

    caption → "A TONE KIND, SHAPE and LIGHT." | "This TONE KIND is SHAPE and LIGHT." | "SHAPE and LIGHT: a TONE KIND."
    TONE  ← mean of the pixels brighter than 25 of 255: under 145 dark, over 185 light, else grey
    SHAPE ← width / height of their bounding box: under 0.6 much taller than wide, under 0.95 taller than wide, under 1.05 as wide
            as tall, under 1.6 wider than tall, else much wider than tall
    LIGHT ← share of the light in the upper half: under 0.45 brighter at the bottom, over 0.53 brighter at the top, else evenly lit
    KIND  ← the label's class

Which of the three sentences a picture gets is drawn from its number, so that no caption follows from its picture in full.
Licence of the pictures: MIT.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from veneer import assets
from veneer.tasks.data import Data, Row, Table

if TYPE_CHECKING:
    import numpy as np

LIT = 25
SENTENCES = ("A {tone} {kind}, {shape} and {light}.", "This {tone} {kind} is {shape} and {light}.", "{Shape} and {light}: a {tone} {kind}.")


def fashion_captions() -> Data:
    """Grey 28 × 28 pictures of clothes with a caption each, with the data's own test split; the column `label` names the garment."""
    images, labels, test_images, test_labels = assets.fashion_mnist()
    parts = {"train": (images, labels, 0), "test": (test_images, test_labels, len(images))}
    tables = {name: Table(captioned(*part), f"fashion-captions[{name}]") for name, part in parts.items()}
    return Data("fashion-captions", tables, images=True, hints={"task": "image-captioning", "label": "label", "key": "number"})


def captioned(images: np.ndarray, labels: np.ndarray, first: int = 0) -> list[Row]:
    """Rows of pictures uint8 [n, 28, 28], numbered from `first`."""
    kinds = [assets.FASHION_CLASSES[int(y)] for y in labels]
    facts = zip(images, kinds, tones(images), shapes(images), lights(images))
    rows: list[Row] = []
    for number, (image, kind, tone, shape, light) in enumerate(facts, first):
        sentence = random.Random(number).choice(SENTENCES)
        said = sentence.format(tone=tone, kind=kind, shape=shape, Shape=shape.capitalize(), light=light)
        rows.append({"image": image, "caption": said, "label": kind, "number": number})
    return rows


def tones(images: np.ndarray) -> list[str]:
    lit = images > LIT
    bright = (images * lit).sum((1, 2), dtype=float) / lit.sum((1, 2)).clip(1)
    return ["dark" if b < 145 else "light" if b > 185 else "grey" for b in bright]


def shapes(images: np.ndarray) -> list[str]:
    lit = images > LIT
    ratios = extents(lit.any(1)) / extents(lit.any(2)).clip(1)
    steps = ((0.6, "much taller than wide"), (0.95, "taller than wide"), (1.05, "as wide as tall"), (1.6, "wider than tall"))
    return [next((word for limit, word in steps if r < limit), "much wider than tall") for r in ratios]


def extents(marks: Any) -> np.ndarray:
    """From the first to the last mark of each row [n, length]: their number of places [n]."""
    length = marks.shape[1]
    return (length - marks[:, ::-1].argmax(1) - marks.argmax(1)) * marks.any(1)


def lights(images: np.ndarray) -> list[str]:
    upper = images[:, : images.shape[1] // 2].sum((1, 2), dtype=float)
    shares = upper / images.sum((1, 2), dtype=float).clip(1)
    return ["brighter at the bottom" if s < 0.45 else "brighter at the top" if s > 0.53 else "evenly lit" for s in shares]
