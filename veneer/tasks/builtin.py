"""The data sets that are known by a short name; their files come from carrier packages (`veneer.assets`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

from veneer import assets, assets_speech
from veneer.tasks.data import Data, Table, split
from veneer.tasks.described_fashion import shoes_and_bags
from veneer.tasks.fashion_captions import fashion_captions
from veneer.tasks.fashion_forgeries import MANIPULATIONS, forgeries


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


def shapes() -> Data:
    """Pictures of shapes with masks, made by a generator: clean ones to train on, others with frequency artefacts or blurred."""
    from veneer.tasks.shapes import shapes as scenes

    return scenes()


def arithmetic() -> Data:
    """Grade-school word problems with worked answers, split by template: no template of the test is ever trained on."""
    from veneer.tasks.word_problems import problems

    rows = problems()
    hints = {"task": "word-problems", "text": "question", "label": "answer", "key": "template"}
    return Data("arithmetic", {"train": Table(rows, "arithmetic")}, hints=hints)


def prompts(language: str) -> Data:
    """Recorded telephone prompts of up to 10 s with their transcripts; equal transcripts stay in one split, always the same."""
    from veneer.tasks.audio import seconds

    name = f"asterisk-{language}"
    rows = [{"audio": file, "text": text} for file, text in assets_speech.asterisk_prompts(language) if seconds(file) <= 10]
    parts = split(Data(name, {"train": Table(rows, name)}), "text")
    tables = {part: Table(table.rows, f"{name}[{part}]") for part, table in parts.items()}
    return Data(name, tables, hints={"task": "transcription", "audio": "audio", "text": "text"})


def phenology(wheat: bool = False) -> Data:
    """Made satellite series of fields in region B in 2020, with 5 crops, or winter wheat against all others."""
    from veneer.tasks import phenology

    return phenology.phenology(wheat=wheat)


def furniture() -> Data:
    """Points on the surfaces of 820 pieces of furniture in 12 categories, with a test split of its own, always the same."""
    from veneer.assets_points import furniture_parts

    tables = {name: Table(rows, f"furniture[{name}]") for name, rows in furniture_parts().items()}
    return Data("furniture", tables, hints={"task": "point-classification", "label": "label"})


def telecom() -> Data:
    """Questions about networks with worked answers, ten use cases, drawn by simulations and split by scenario (3,000)."""
    from veneer.tasks.telecom import samples

    return Data("telecom", {"train": Table(samples(), "telecom")}, hints={"task": "chat", "key": "scenario"})


def stays() -> Data:
    """Made-up hospital stays as lines of events, with their summaries (600)."""
    from veneer.tasks.stays import stays as rows

    return Data("stays", {"train": Table(rows(), "stays")}, hints={"task": "chat"})


def stays_pairs() -> Data:
    """Made-up hospital stays with a complete summary and one that leaves out or changes a fact (300)."""
    from veneer.tasks.stays import pairs

    return Data("stays-pairs", {"train": Table(pairs(), "stays-pairs")}, hints={"task": "chat"})


def human_eval() -> Data:
    """Programming problems: instruction, function, tests (164)."""
    from veneer.assets_code import problems

    hints = {"task": "code-generation", "text": "instruction", "label": "response"}
    return Data("human-eval", _quarters(list(problems()), "human-eval"), hints=hints)


def human_eval_tests() -> Data:
    """Functions with tests made of HumanEval's assertions."""
    from veneer.assets_code import tests_for

    hints = {"task": "unit-test-generation", "text": "source", "label": "target"}
    return Data("human-eval-tests", _quarters(tests_for(), "human-eval-tests"), hints=hints)


def _quarters(rows: list[dict[str, str]], name: str) -> dict[str, Table]:
    """Every fourth row for the test, every eighth for validation, the same ones always: the set has no parts of its own."""
    at = {"test": {3, 7}, "validation": {1}, "train": {0, 2, 4, 5, 6}}
    return {part: Table([row for i, row in enumerate(rows) if i % 8 in places], f"{name}[{part}]") for part, places in at.items()}


BUILTIN: dict[str, Callable[[], Data]] = {
    "movie-sentiment": movie_sentiment,
    "fashion-mnist": fashion_mnist,
    "shapes": shapes,
    "arithmetic": arithmetic,
    "telecom": telecom,
    "stays": stays,
    "stays-pairs": stays_pairs,
    "human-eval": human_eval,
    "human-eval-tests": human_eval_tests,
    "furniture": furniture,
    "fashion-captions": fashion_captions,
    "shoes-and-bags": shoes_and_bags,
    **{f"fashion-{kind}": functools.partial(forgeries, kind) for kind in MANIPULATIONS},
    "phenology": phenology,
    "phenology-wheat": lambda: phenology(wheat=True),
    "asterisk-es": lambda: prompts("es"),
    "asterisk-en": lambda: prompts("en"),
}
"""Short names of data sets."""
