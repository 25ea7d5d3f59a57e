"""How sparse a task lets a model be: accuracy against activation density under DEFT's loss, on a small ReLU encoder (arXiv:2402.01911).

    python benchmarks/density.py [--method "lora(r=8, targets='attn.* mlp.*')"] [--lams 0 0.1 1 10] [--eps 0.01] [--seeds 3] [--steps 300]

The encoder of four layers is first trained whole to name the most frequent of three groups of words; its classifier then stays
as it is and the method adapts the layers to groups of which a third of the words has changed, once for every lam. The table has
test accuracy, the share of activations that are not exactly zero (float32, padding left out), its reduction against lam = 0, and
bars for the layers, first to last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

WORDS, LENGTH, GROUPS, BATCH, TEST = 60, 24, 3, 32, 512
BARS = " ▁▂▃▄▅▆▇█"


def words_of(seed: int, moved: int = 0) -> Tensor:
    """The group of every word; so many of them in a group drawn anew."""
    generator = Generator().manual_seed(seed)
    groups = torch.randint(GROUPS, (WORDS,), generator=generator)
    at = torch.randperm(WORDS, generator=generator)[:moved]
    groups[at] = torch.randint(GROUPS, (moved,), generator=generator)
    return groups


def batches(groups: Tensor, count: int, size: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
    """Sentences of random words and lengths; the label is the group that most of their words belong to (of equal ones the first)."""
    for _ in range(count):
        ids = torch.randint(2, WORDS, (size, LENGTH), generator=generator)
        mask = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (size, 1), generator=generator)).long()
        votes = torch.nn.functional.one_hot(groups[ids], GROUPS) * mask[..., None]
        yield {"input_ids": ids * mask, "attention_mask": mask, "labels": votes.sum(1).argmax(1)}


def encoder(seed: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_labels=GROUPS,
        max_position_embeddings=LENGTH, hidden_act="relu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def pretrained(seed: int, steps: int) -> Any:
    """The encoder, trained whole on groups of its own."""
    model, generator = encoder(seed).train(), Generator().manual_seed(seed)
    groups = words_of(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for batch in batches(groups, steps, BATCH, generator):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    return model.eval()


def adapted(base: Any, spec: str, seed: int, steps: int) -> tuple[float, list[float]]:
    """Test accuracy in percent after adapting a copy to the changed groups, and the density in percent of each layer."""
    import veneer
    from veneer.strategies.density import densities

    model = copy.deepcopy(base)
    tuned = veneer.attach(model, spec, seed=seed, head=False)
    generator = Generator().manual_seed(seed + 1000)
    groups = words_of(seed, moved=WORDS // 3)
    optimiser = torch.optim.AdamW(tuned.param_groups(3e-3))
    tuned.begin(steps)
    model.train()
    for batch in batches(groups, steps, BATCH, generator):
        optimiser.zero_grad()
        sum([model(**batch).loss, *tuned.loss_terms().values()]).backward()  # type: ignore[union-attr]
        tuned.before_step()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimiser.step()
        tuned.after_step()
    test = list(batches(groups, TEST // BATCH, BATCH, Generator().manual_seed(seed + 2000)))
    with torch.no_grad():
        right = sum(int((model.eval()(**b).logits.argmax(1) == b["labels"]).sum()) for b in test)
    return 100 * right / TEST, list(densities(model, test).layers.values())


def curve(lams: Sequence[float], method: str, eps: float, seeds: int, steps: int) -> list[tuple[float, list[float], list[float]]]:
    """lam, accuracies by seed, and each layer's density in the mean over seeds."""
    bases = [pretrained(seed, 2 * steps) for seed in range(seeds)]
    rows = []
    for lam in lams:
        runs = [adapted(base, f"{method} + deft(lam={float(lam)}, eps={eps})", seed, steps) for seed, base in enumerate(bases)]
        rows.append((lam, [accuracy for accuracy, _ in runs], [statistics.mean(layer) for layer in zip(*(layers for _, layers in runs))]))
    return rows


def table(rows: Sequence[tuple[float, list[float], list[float]]]) -> str:
    """Markdown; the reduction is against the first row."""
    lines = ["| lam | accuracy % | density % | reduction % | layers |", "|---|---|---|---|---|"]
    first = statistics.mean(rows[0][2])
    for lam, accuracies, layers in rows:
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        density = statistics.mean(layers)
        bars = "".join(BARS[min(round(layer / 100 * (len(BARS) - 1)), len(BARS) - 1)] for layer in layers)
        shown = ", ".join(f"{layer:.0f}" for layer in layers)
        lines.append(
            f"| {lam:g} | {statistics.mean(accuracies):.1f}{spread} | {density:.1f} | {100 * (first - density) / first:.1f} "
            f"| `{bars}` {shown} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora(r=8, targets='attn.* mlp.*')")
    parser.add_argument("--lams", type=float, nargs="+", default=[0.0, 0.1, 1.0, 10.0])
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    rows = curve(options.lams, options.method, options.eps, options.seeds, options.steps)
    print(f"{options.method}, eps={options.eps}, {options.seeds} seeds, {options.steps} steps; torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    main()
