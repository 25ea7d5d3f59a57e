"""Linear, convolution and transformer adapters in MusicGen: what they cost, and what they learn of instrument notes (arXiv:2506.21298).

    python benchmarks/music_adapters.py cost                     # MusicGen-medium's architecture, no weights needed
    python benchmarks/music_adapters.py notes [--steps 30]      # a small MusicGen and the notes of a sound font

cost: for every placement and budget the width that fits (the largest not above it), trained numbers, their share of the model, and
the operations of a forward pass over 500 steps (10 s) of music beside the base's. Where several sites are adapted they share the budget.

notes: a MusicGen of 1.2 M parameters learns the tokens of all notes but those of percussion, then stays frozen while adapters
of equal size learn those. Loss a token on percussion that was not seen, and the Fréchet distance between spectra of
notes drawn from the model and those of the unseen ones (log-mel frames in place of VGGish, whose weights are not at hand).
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

import veneer
from veneer import anatomy, assets
from veneer.assets_music import NOTES, instrument_notes
from veneer.errors import BadValue, MissingExtra
from veneer.models.note_music import Codebooks, delayed, medium, prompt, sampled, small, spectra
from veneer.study.budget import nearest
from veneer.study.sound_distances import frechet

ADAPTERS = {
    "linear": "conv-adapter(form='pointwise'",
    "convolution": "conv-adapter(form='deep', blocks=3",
    "transformer": "transformer-adapter(",
}
PLACES = {
    "between encoder and decoder": "targets='text_encoder.encoder.final_layer_norm'",
    "after each cross-attention": "targets='cross'",
    "after the decoder": "targets='decoder.model.decoder.layer_norm'",
}
SIZES = {"2M": 2e6, "8M": 8e6, "20M": 20e6, "40M": 40e6, "70M": 70e6}
PERCUSSION = (
    r"808|Snare|Hat\b|Cymb|Drum|Bongo|Tumba|Tone$|Tom$|Block|Tambourine|Clap|Cowbell|Clave|Guiro|Maracas|Cabasa|Timbale|Quica|Rim|Ride|"
    r"Castanets|Sleigh|Click|Stick|Scratch|Slap$|Snap|Vibra|Agogo|Triangle$|Kick|Sinetick|Timp|Bell Tree|Whistle"
)
"""Instruments' names in the sound font."""
WORDS, FRAMES, BATCH, NOTE_BUDGET = 64, 96, 32, 20_000


def spec(adapter: str, place: str) -> str:
    """The method without its width. Behind the decoder's own attention, mixing tokens must look back only."""
    causal = ", causal=True" if adapter != "linear" and "encoder.final" not in PLACES[place] else ""
    return f"{ADAPTERS[adapter]}{causal}, {PLACES[place]})".replace("(, ", "(")


def sized(adapter: str, place: str, sites: list[Any], budget: float, model: Any) -> tuple[str, int]:
    """The method at the largest width that is not above the budget, and how many numbers it trains."""
    from veneer.study.budget import count

    found = nearest(spec(adapter, place), sites, int(budget), model=model)
    method, step = veneer.parse(found.spec or ""), 4 if adapter == "transformer" else 1
    trained = count(method, sites, model)
    while trained > budget:
        method = veneer.method(method.slug, **{**_options(method), "m": method.m - step})  # type: ignore[attr-defined]
        trained = count(method, sites, model)
    return str(method), trained


def _options(method: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


# -- cost -------------------------------------------------------------------------------------------------------


def operations(model: Any) -> int:
    words, steps = (torch.zeros(1, 64, dtype=torch.long, device="meta"), torch.zeros(4, 500, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=words, decoder_input_ids=steps, use_cache=False)
    return counter.get_total_flops()


def cost() -> None:
    model = medium().eval()
    sites, total, base = anatomy.sites(model), sum(p.numel() for p in model.parameters()), operations(model)
    print(f"MusicGen-medium: {total / 1e9:.2f} G parameters, {base / 1e12:.2f} Tflop for 10 s of music after a prompt of 64 words")
    print("\nIn each cell: width m, trained numbers in millions, operations more than the base's.\n")
    print(f"| place | adapter | {' | '.join(SIZES)} |\n|---|---|{'---|' * len(SIZES)}")
    for place in PLACES:
        for adapter in ADAPTERS:
            cells = []
            for budget in SIZES.values():
                found, trained = sized(adapter, place, sites, budget, model)
                tuned = veneer.attach(model, found, head=False)
                more = 100 * (operations(model) / base - 1)
                tuned.detach()
                width = re.search(r"\bm=(\d+)", found)
                cells.append(f"{width[1] if width else '–'}, {trained / 1e6:.2f}, +{more:.2f} %")
            print(f"| {place} | {adapter} | {' | '.join(cells)} |", flush=True)


# -- notes ------------------------------------------------------------------------------------------------------


def batch(notes: list[tuple[Tensor, list[int]]], chosen: list[int]) -> dict[str, Tensor]:
    tokens, prompts = zip(*(notes[i] for i in chosen))
    return {"input_ids": torch.tensor(prompts), **delayed(tokens, FRAMES, WORDS)}


def learn(model: Any, parameters: Any, notes: list[tuple[Tensor, list[int]]], steps: int, seed: int = 0) -> float:
    """Adam on random notes, the rate falling to 0; seconds a step."""
    generator, optimiser = Generator().manual_seed(seed), torch.optim.AdamW(parameters, weight_decay=0.0)
    rates, started = [group["lr"] for group in optimiser.param_groups], time.perf_counter()
    model.train()
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        model(**batch(notes, torch.randint(len(notes), (BATCH,), generator=generator).tolist())).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
    model.eval()
    return (time.perf_counter() - started) / steps


def measured(model: Any, held: list[tuple[Tensor, list[int]]], books: Codebooks) -> tuple[float, float]:
    """Loss a token of notes, and the Fréchet distance between their spectra and those of as many drawn ones."""
    with torch.no_grad():
        loss = float(model(**batch(held, list(range(len(held))))).loss)
    drawn = sampled(model, torch.tensor([p for _, p in held]), FRAMES, WORDS, Generator().manual_seed(0))
    real = torch.cat([books.decode(tokens[:FRAMES]) for tokens, _ in held])
    made = torch.cat([books.decode(new[: len(tokens)]) for new, (tokens, _) in zip(drawn, held)])
    return loss, frechet(made.numpy(), real.numpy())


def prepared() -> tuple[Codebooks, list[Any], list[Any], list[Any]]:
    """Codebooks of the notes that are no percussion, these notes, percussion to learn from, and percussion kept aside."""
    notes = [(n, spectra(n.samples, n.rate)) for n in instrument_notes()]
    notes = [(n, frames) for n, frames in notes if len(frames) >= 12]
    struck = [bool(re.search(PERCUSSION, n.name)) for n, _ in notes]
    books = Codebooks(torch.cat([frames[:FRAMES] for (_, frames), own in zip(notes, struck) if not own]), words=WORDS)
    coded = [(books.encode(frames), prompt(n.pitch, len(frames))) for n, frames in notes]
    new = [c for c, own in zip(coded, struck) if own]
    return books, [c for c, own in zip(coded, struck) if not own], [c for i, c in enumerate(new) if i % 3], new[::3]


def notes(steps: int, pretraining: int) -> None:
    books, known, fresh, held = prepared()
    base = small(WORDS)
    print(f"{len(known)} notes to begin with, {len(fresh)} of percussion to learn, {len(held)} to measure; {BATCH} notes a step")
    learn(base, [{"params": base.parameters(), "lr": 2e-3}], known, pretraining)
    print("\n| place | adapter | trained | loss, unseen percussion | Fréchet | ms a step |\n|---|---|---|---|---|---|")
    loss, distance = measured(base, held, books)
    print(f"| – | none | 0 | {loss:.3f} | {distance:.2f} | – |", flush=True)
    for place in PLACES:
        for adapter in ADAPTERS:
            model = copy.deepcopy(base)
            found, trained = sized(adapter, place, anatomy.sites(model), NOTE_BUDGET, model)
            tuned = veneer.attach(model, found, head=False)
            each = learn(model, tuned.param_groups(3e-3), fresh, steps)
            loss, distance = measured(model, held, books)
            print(f"| {place} | {adapter} | {trained:,} | {loss:.3f} | {distance:.2f} | {1000 * each:.0f} |", flush=True)
    whole = copy.deepcopy(base)
    each = learn(whole, [{"params": whole.parameters(), "lr": 1e-3}], fresh, steps)
    loss, distance = measured(whole, held, books)
    print(f"| everything | none | {sum(p.numel() for p in whole.parameters()):,} | {loss:.3f} | {distance:.2f} | {1000 * each:.0f} |")


def main() -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "notes"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretraining", type=int, default=300)
    given = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if given.what == "cost":
            cost()
        elif not assets.available(NOTES):
            raise MissingExtra(f"The notes are not installed. Run: {assets.INSTALL[NOTES]}")
        else:
            notes(given.steps, given.pretraining)
    except (BadValue, MissingExtra) as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
