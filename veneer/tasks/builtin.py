"""The data sets that are known by a short name; their files come from carrier packages (`veneer.assets`)."""

from __future__ import annotations

from collections.abc import Callable

from veneer import assets
from veneer.tasks.data import Data, Table


def movie_sentiment() -> Data:
    """Sentences of film reviews, positive or negative (10,568; the 37 rated exactly 0 are left out)."""
    rows = [
        {"text": text, "label": "positive" if rating > 0 else "negative", "rating": rating}
        for text, rating in assets.movie_snippets()
        if rating != 0
    ]
    hints = {"task": "text-classification", "text": "text", "label": "label"}
    return Data("movie-sentiment", {"train": Table(rows, "movie-sentiment")}, hints=hints)


def fashion_mnist() -> Data:
    """Grey 28 × 28 pictures of clothes in 10 classes, with the data's own test split."""
    images, labels, test_images, test_labels = assets.fashion_mnist()
    parts = {"train": (images, labels), "test": (test_images, test_labels)}
    tables = {
        name: Table([{"image": x, "label": assets.FASHION_CLASSES[int(y)]} for x, y in zip(*pair)], f"fashion-mnist[{name}]")
        for name, pair in parts.items()
    }
    return Data("fashion-mnist", tables, images=True, hints={"task": "image-classification", "label": "label"})


def arithmetic() -> Data:
    """Grade-school word problems with worked answers, split by template: no template of the test is ever trained on."""
    from veneer.tasks.word_problems import problems

    rows = problems()
    hints = {"task": "word-problems", "text": "question", "label": "answer", "key": "template"}
    return Data("arithmetic", {"train": Table(rows, "arithmetic")}, hints=hints)


BUILTIN: dict[str, Callable[[], Data]] = {
    "movie-sentiment": movie_sentiment,
    "fashion-mnist": fashion_mnist,
    "arithmetic": arithmetic,
}
"""Short names of data sets."""
