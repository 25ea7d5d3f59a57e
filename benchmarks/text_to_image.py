"""Methods at about equal counts on the text-to-image recipe; prints a Markdown table.

python benchmarks/text_to_image.py --out runs/text-to-image --rates 4e-3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from veneer.train import Outcome, Recipe, train

METHODS = (
    "lora(r=4, targets='attn.* cross.*')",
    "dora(r=4, targets='attn.* cross.*')",
    "wara(r=8, wavelet='db2', targets='attn.* cross.*')",
    "tlora(R_T=2, R_res=3)",
    "nera(r=1, K=3)",
    "lora(r=1, targets='attn.* cross.* conv')",
)
"""Each with 19,000 to 26,000 trained numbers."""

RECIPE = Path(__file__).parent.parent / "recipes" / "text-to-image.yaml"


def best(method: str, rates: Sequence[float], out: Path) -> tuple[float, Outcome]:
    """The run with the lower loss on the validation pictures."""
    runs = []
    for rate in rates:
        folder = out / f"{method.split('(')[0]}-{len(method)}-{rate:g}"
        changes = {"method": method, "lr": rate, "steps": 100, "eval_every": 100, "sample_steps": 2, "out": str(folder)}
        outcome = train(Recipe.read(RECIPE, changes), progress=False, say=lambda line: None)
        runs.append((outcome.curve[-1]["eval_loss"], rate, outcome))
    return min(runs, key=lambda run: run[0])[1:]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--out", type=Path, default=Path("runs/text-to-image"))
    flags.add_argument("--rates", type=float, nargs="+", default=[4e-3], help="learning rates; the best on the validation pictures counts")
    given = flags.parse_args()
    print("| method | trained | learning rate | loss before | loss after, 95 % | seconds a step |\n|---|---|---|---|---|---|")
    for method in METHODS:
        rate, outcome = best(method, given.rates, given.out)
        before, after = outcome.base_metrics["loss"].value, outcome.metrics["loss"]
        shown = f"{after.value:.4f} ({after.low:.4f}–{after.high:.4f})"
        print(f"| `{method}` | {outcome.trained:,} | {rate:g} | {before:.4f} | {shown} | {outcome.seconds_per_step:.2f} |", flush=True)


if __name__ == "__main__":
    main()
