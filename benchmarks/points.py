"""Twelve kinds of furniture as point clouds: the two methods made for them against the head alone, LoRA and full fine-tuning.

    python benchmarks/points.py --out runs/points

About six minutes on one core. Every method has a learning rate of its own, the published 5e-4 for full fine-tuning, larger ones
for the others, as 120 steps are few; none was searched for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from veneer.study.compare import compare
from veneer.train import Recipe

RATES = {
    "probe": 1e-2,
    "full": 5e-4,
    "lora(r=8, targets='attn.* mlp.*')": 2e-3,
    "dapt(r=16)": 2e-3,
    "dapt(r=16) + full(targets='cls_token cls_position')": 2e-3,
    "point-peft": 2e-3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/points"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=[m for m in RATES if "cls_token" not in m])
    given = parser.parse_args()
    recipe = Path(__file__).parents[1] / "recipes" / "furniture.yaml"
    fixed = {"steps": given.steps, "eval_every": max(1, given.steps // 3), "seed": given.seed}
    plans = [
        Recipe.read(recipe, {**fixed, "method": method, "lr": RATES[method], "out": str(given.out / f"run{i}")})
        for i, method in enumerate(given.methods)
    ]
    found = compare(plans, out=given.out, title="Furniture as point clouds", references=("probe", "full"))
    Console(width=140).print(found.table())


if __name__ == "__main__":
    main()
