"""CodeBLEU of Python: ¼ (n-grams + weighted n-grams + syntax + data flow), over a corpus (arXiv:2009.10297).

The n-gram parts are ours, so that the published brevity penalty and the right one can both be had; trees and data flow come from
the package codebleu (MIT) on tree-sitter.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import BadValue, MissingExtra

WORDS = """False None True and as assert async await break class continue def del elif else except finally for from global if import in is
lambda nonlocal not or pass raise return try while with yield"""
KEYWORDS = frozenset(WORDS.split())
SMOOTHING = 0.1
"""Stands for a numerator of zero."""

OTHERS = 0.2
"""Weight of words that are no keywords."""

Tokens = Sequence[str]


@dataclass(frozen=True)
class CodeBLEU:
    """The four parts, each in 0 … 1, and their mean."""

    ngram: float
    weighted_ngram: float
    syntax: float
    dataflow: float

    @property
    def score(self) -> float:
        return (self.ngram + self.weighted_ngram + self.syntax + self.dataflow) / 4


def codebleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str], published: bool = True) -> CodeBLEU:
    """Scores of Python sources against one or more references each.

    Args:
        published: as the numbers in papers were made: the weighted n-grams' brevity penalty takes every reference to be 2 tokens
            long, and references without data flow count as met. False: the true length, and no data flow counts 0.

    Raises:
        MissingExtra: the package codebleu is not installed. BadValue: another number of references than hypotheses.
    """
    if len(references) != len(hypotheses) or not hypotheses:
        raise BadValue(f"CodeBLEU: {len(hypotheses)} hypotheses and {len(references)} sets of references; give one set for each.")
    needed()
    from codebleu.dataflow_match import corpus_dataflow_match
    from codebleu.syntax_match import corpus_syntax_match
    from codebleu.utils import AVAILABLE_LANGS, get_tree_sitter_language

    assert "python" in AVAILABLE_LANGS
    told = [[r.split() for r in several] for several in references]
    made = [h.split() for h in hypotheses]
    language = get_tree_sitter_language("python")
    flow = corpus_dataflow_match(references, hypotheses, "python", tree_sitter_language=language)
    return CodeBLEU(
        bleu(told, made),
        weighted_bleu(told, made, published=published),
        corpus_syntax_match(references, hypotheses, "python", tree_sitter_language=language),
        1.0 if published and not flow else float(flow or 0.0),
    )


def needed() -> None:
    """Raises `MissingExtra` if the package for trees and data flow is not installed."""
    if importlib.util.find_spec("codebleu") is None:
        raise MissingExtra("CodeBLEU needs the package codebleu: pip install 'veneer[code]'")


def bleu(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """Corpus BLEU-4 of token lists."""
    matches, totals = [0.0] * 4, [0.0] * 4
    for several, made in zip(references, hypotheses):
        for n in range(4):
            have = _ngrams(made, n + 1)
            most: Counter[tuple[str, ...]] = Counter()
            for one in several:
                most |= _ngrams(one, n + 1)
            matches[n] += (have & most).total()
            totals[n] += max(1, have.total())
    lengths = sum(min((abs(len(r) - len(h)), len(r)) for r in several)[1] for several, h in zip(references, hypotheses))
    return _combined(matches, totals, lengths, sum(map(len, hypotheses)))


def weighted_bleu(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens], published: bool = True) -> float:
    """Recall of the references' n-grams, single words weighted: 1 a keyword, 0.2 any other."""
    matches, totals = [0.0] * 4, [0.0] * 4
    for several, made in zip(references, hypotheses):
        for n in range(4):
            have = _ngrams(made, n + 1)
            for one in several:  # of several references all count, the unmet ones too
                want = _ngrams(one, n + 1)
                weigh = {gram: (1.0 if gram[0] in KEYWORDS else OTHERS) if n == 0 else 1.0 for gram in want}
                matches[n] += sum(min(count, have[gram]) * weigh[gram] for gram, count in want.items())
                totals[n] += max(1.0, sum(count * weigh[gram] for gram, count in want.items()))
    lengths = sum(2 if published else min((abs(len(r) - len(h)), len(r)) for r in several)[1] for several, h in zip(references, hypotheses))
    return _combined(matches, totals, lengths, sum(map(len, hypotheses)))


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _combined(matches: Sequence[float], totals: Sequence[float], reference: int, made: int) -> float:
    """Geometric mean of the orders' shares times the brevity penalty; 0 if no single word is met."""
    if matches[0] == 0 or made == 0:
        return 0.0
    brevity = 1.0 if made > reference else math.exp(1 - reference / made)
    return brevity * math.exp(sum(math.log((m or SMOOTHING) / t) for m, t in zip(matches, totals)) / 4)
