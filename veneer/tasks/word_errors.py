"""Word and character errors of a transcript, counted by jiwer on plain words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.tasks.audio import sound_extra
from veneer.tasks.metric import Metric, bootstrap

if TYPE_CHECKING:
    import numpy as np


def plain_words(text: str) -> str:
    """Lower-case words with single blanks between them; punctuation and symbols are gone, apostrophes inside words stay."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in folded)
    return " ".join(word for word in (w.strip("'") for w in kept.split()) if word)


def errors(reference: str, answer: str) -> tuple[int, int, int, int]:
    """Word errors, words, character errors, characters; errors are substitutions, deletions and insertions, the sizes the reference's.

    The reference must hold a word."""
    jiwer = sound_extra("jiwer")
    said, heard = plain_words(reference), plain_words(answer)
    words, letters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
    wrong = [found.substitutions + found.deletions + found.insertions for found in (words, letters)]
    return wrong[0], len(said.split()), wrong[1], len(said)


def rates(references: Sequence[str], answers: Sequence[str]) -> dict[str, Metric]:
    """Word and character error rate of all clips together (`wer`, `cer`), with bootstrap intervals over clips."""
    counts = [errors(str(reference), answer) for reference, answer in zip(references, answers)]

    def words(c: np.ndarray) -> float:
        return float(c[:, 0].sum() / c[:, 1].sum())

    return {"wer": bootstrap(words, counts), "cer": bootstrap(lambda c: words(c[:, 2:]), counts)}
