"""One batch of 64 rows with 32 different adapters, against the same batch with one: training step and inference.

    python benchmarks/mixed.py [--rows 64] [--adapters 32] [--length 16] [--rounds 12] [--method "lora(r=8)"]

Llama-shaped, hidden 512 × 4 layers, random weights, all linear layers adapted. Rounds are interleaved, ratios are taken within
a round, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from speed import ALL, SHAPES, VOCABULARY

import veneer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default=f"lora(r=8, targets='{ALL}')")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model: Any = SHAPES["llama"].build()
    model.config.use_cache = False
    names = [f"a{i}" for i in range(options.adapters)]
    for seed, name in enumerate(names):
        tuned = veneer.attach(model, options.method, name, seed=seed, head=False)
    ids = torch.randint(VOCABULARY, (options.rows, options.length))
    per_row = [names[i % len(names)] for i in range(options.rows)]

    def train() -> float:
        model.train()
        for p in tuned.parameters():
            p.grad = None
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        return time.perf_counter() - start

    @torch.no_grad()
    def infer() -> float:
        model.eval()
        start = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - start

    for what, run in (("training step", train), ("inference", infer)):
        ratios = []
        for n in range(options.rounds + 1):
            tuned.activate(names[0])
            one = run()
            tuned.activate(per_row=per_row)
            ratios.append(run() / one)
            if n == 0:
                ratios.clear()  # warm up
        print(f"{what}: {options.rows} rows with {options.adapters} adapters take {statistics.median(ratios):.2f} of one adapter's time")


if __name__ == "__main__":
    main()
