"""Fashion-MNIST's pictures with descriptions: what the class is, in words, and what can be measured on the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer import assets
from veneer.tasks.data import Data, Row, Table

if TYPE_CHECKING:
    import numpy as np

GARMENTS = {
    "T-shirt": ("a t-shirt with short sleeves", {"type": "top"}),
    "trouser": ("long trousers", {"type": "trousers"}),
    "pullover": ("a pullover with long sleeves", {"type": "top"}),
    "dress": ("a dress", {"type": "dress"}),
    "coat": ("a coat with long sleeves and a collar", {"type": "coat"}),
    "sandal": ("a sandal with a strap", {"type": "shoe"}),
    "shirt": ("a shirt with a collar", {"type": "top"}),
    "sneaker": ("a sneaker", {"type": "shoe"}),
    "bag": ("a handbag with a handle", {"type": "bag"}),
    "ankle boot": ("an ankle boot", {"type": "shoe"}),
}
"""Class of Fashion-MNIST → description, attributes."""

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "shirt")
SHOES_AND_BAGS = ("sandal", "sneaker", "bag", "ankle boot")


def described(picture: np.ndarray, kind: str) -> Row:
    """One row: the picture [28, 28] uint8, its description, and attributes: type, shade and shape.

    The shade is the mean of the garment's own pixels (light from 150, dark below 90), the shape its width over its height.
    """
    description, own = GARMENTS[kind]
    inside = picture > 24
    rows, columns = inside.max(1).nonzero()[0], inside.max(0).nonzero()[0]
    ratio = (columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1) if len(rows) else 1.0
    tone = float(picture[inside].mean()) if len(rows) else 0.0
    shade = "dark" if tone < 90 else "grey" if tone < 150 else "light"
    shape = "narrow" if ratio < 0.6 else "tall" if ratio < 0.95 else "wide"
    return {"image": picture, "description": description, "attributes": {**own, "shade": shade, "shape": shape}}


def captioned(classes: tuple[str, ...], name: str, train: int, held: int) -> Data:
    """Described pictures of some classes: `train` for training and `held` each for validation and test, evenly over the classes."""
    images, labels, test_images, test_labels = assets.fashion_mnist()
    parts: dict[str, Any] = {
        "train": _first(images, labels, classes, 0, train),
        "validation": _first(test_images, test_labels, classes, 0, held),
        "test": _first(test_images, test_labels, classes, held, held),
    }
    return Data(name, {part: Table(rows, f"{name}[{part}]") for part, rows in parts.items()}, hints={"task": "text-to-image"})


def _first(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], skip: int, count: int) -> list[Row]:
    """`count` pictures, each class in turn, after as many as `skip`."""
    start, each = skip // len(classes), -(-count // len(classes))
    numbers = [(labels == assets.FASHION_CLASSES.index(kind)).nonzero()[0][start : start + each] for kind in classes]
    mixed = [(kind, number) for n in range(each) for kind, own in zip(classes, numbers) for number in own[n : n + 1]]
    return [described(images[number], kind) for kind, number in mixed[:count]]


def shoes_and_bags() -> Data:
    """640 pictures of shoes and bags for training, 40 each for validation and test."""
    return captioned(SHOES_AND_BAGS, "shoes-and-bags", 640, 40)
