"""A finished run in a fresh process: loads the adapter from its folder, predicts, and checks merging on the way.

`python -m veneer.study.reload FOLDER [--merge] -- TEXT…`; exit code 0 if all is well, 1 if the merged model answers differently.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from veneer.errors import VeneerError

TOLERANCE = 1e-4
"""Largest difference of logits that float32 rounding explains, as a share of the largest logit (or of 1)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the answers and, with --merge, the measured difference of the merged model."""
    parser = argparse.ArgumentParser(prog="python -m veneer.study.reload")
    parser.add_argument("folder")
    parser.add_argument("--merge", action="store_true", help="also merge, and compare the answers")
    parser.add_argument("texts", nargs="+")
    asked = parser.parse_args(arguments)
    try:
        return answer(asked.folder, asked.texts, merge=asked.merge)
    except VeneerError as error:
        print(error, file=sys.stderr)
        return error.code


def answer(folder: str, texts: Sequence[str], *, merge: bool) -> int:
    """Predicts with a run's adapter; with `merge`, merges it into the base and measures what that changed."""
    import veneer
    from veneer.train.use import rebuild

    model, processor, task = rebuild(folder)
    for text, found in zip(texts, task.predict(model, processor, texts)):
        print(f"  {found['label']:>10} {100 * found['score']:5.1f} %  {text}")
    if not merge:
        return 0
    before = _logits(model, processor, texts)
    veneer.of(model).merge()
    after = _logits(model, processor, texts)
    gap, size = float((after - before).abs().max()), float(before.abs().max())
    same = bool((after.argmax(-1) == before.argmax(-1)).all())
    agreed = same and gap <= TOLERANCE * max(1.0, size)
    print(
        f"Merged into the base: largest difference of logits {gap:.1e} (logits up to {size:.1f}), {'same' if same else 'other'} answers:",
        end=" ",
    )
    print("identical within rounding." if agreed else "NOT identical.")
    return 0 if agreed else 1


def _logits(model: Any, processor: Any, texts: Sequence[str]) -> Any:
    import torch

    with torch.inference_mode():
        return model(**processor(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.device)).logits


if __name__ == "__main__":
    sys.exit(main())
