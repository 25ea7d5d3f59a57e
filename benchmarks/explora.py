"""What going on without labels is worth: linear probes from few labels, on the model before and after.

    python benchmarks/explora.py [--set steps=160 ...] [--draws 10] [--out runs/explora-bench]

Runs recipes/explora-fashion.yaml with each objective, and with LoRA alone in its place; fits a linear probe (logistic regression on
standardised features, class token and mean of the patch tokens) to 5, 10 and 20 labelled pictures of each class, ten draws of them, and
tests it on 2,000 pictures. Every draw is the same for all models; the interval is of the paired differences over the draws.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer import assets
from veneer.train import Recipe, train
from veneer.train.use import rebuild

RECIPE = Path(__file__).parent.parent / "recipes" / "explora-fashion.yaml"
WAYS = {
    "self-distillation, ExPLoRA": {},
    "self-distillation, LoRA alone": {"method": "lora(r=16)"},
    "masked autoencoding, ExPLoRA": {"task": "self-supervised-images(objective=mae)", "steps": "200"},
}
T95 = {5: 2.776, 10: 2.262}
"""Student's t for a 95 % interval of so many draws."""


def features(model: Any, task: Any, processor: Any, pictures: Any) -> Tensor:
    with torch.inference_mode():
        parts = [model.features(task.pixels(list(pictures[i : i + 100]), processor)) for i in range(0, len(pictures), 100)]
    return torch.cat(parts)


def probe(x: Tensor, y: Tensor, test: Tensor, penalty: float = 1e-2) -> Tensor:
    """Classes that a logistic regression on x gives the test rows."""
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test = (x - mean) / scale, (test - mean) / scale
    W = torch.zeros(10, x.shape[1], requires_grad=True)
    b = torch.zeros(10, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ W.T + b, y) + penalty * W.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    return (test @ W.T + b).argmax(1)


def scores(pool: Tensor, labels: Tensor, test: Tensor, truth: Tensor, shots: int, draws: int) -> list[float]:
    """Accuracy on the test rows for every draw of so many labelled rows of each class."""
    found = []
    for draw in range(draws):
        chance = np.random.default_rng(draw)
        chosen = np.concatenate([chance.choice(np.flatnonzero(labels.numpy() == c), shots, replace=False) for c in range(10)])
        found.append(float((probe(pool[chosen], labels[chosen], test) == truth).float().mean()))
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--set", nargs="*", default=[], help="settings of the recipe, as steps=160")
    asked.add_argument("--only", nargs="*", default=list(WAYS))
    asked.add_argument("--draws", type=int, default=10, choices=T95)
    asked.add_argument("--out", type=Path, default=Path("runs/explora-bench"))
    options = asked.parse_args()
    images, labels, test_images, test_labels = assets.fashion_mnist()
    pool, truth = (
        torch.tensor(labels[-2000:].astype(int)),
        torch.tensor(test_labels[:2000].astype(int)),
    )  # rows of the pool may be trained on, unlabelled
    before: dict[int, list[float]] = {}
    print("| | trained | seconds | " + " | ".join(f"{n} labels a class" for n in (5, 10, 20)) + " |\n|---|---|---|---|---|---|")
    for way in options.only:
        changes = {
            **WAYS[way],
            **dict(s.split("=", 1) for s in options.set),
            "out": str(options.out / way.replace(", ", "-").replace(" ", "-")),
        }
        outcome = train(Recipe.read(RECIPE, changes), progress=False, say=lambda line: None)
        for adapter in (False, True) if not before else (True,):
            model, processor, task = rebuild(outcome.folder, adapter=adapter)
            seen, unseen = (features(model, task, processor, p) for p in (images[-2000:], test_images[:2000]))
            cells = []
            for shots in (5, 10, 20):
                found = scores(seen, pool, unseen, truth, shots, options.draws)
                if not adapter:
                    before[shots] = found
                    cells.append(f"{statistics.mean(found):.1%}")
                    continue
                gains = [a - b for a, b in zip(found, before[shots])]
                reach = T95[options.draws] * statistics.stdev(gains) / len(gains) ** 0.5
                cells.append(f"{statistics.mean(found):.1%} ({statistics.mean(gains) * 100:+.1f} ± {reach * 100:.1f})")
            name, cost = (way, f"{outcome.trained:,} | {outcome.seconds:.0f}") if adapter else ("before", "– | –")
            print(f"| {name} | {cost} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
