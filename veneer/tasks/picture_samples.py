"""Pictures that a text-to-image run makes itself: those of the prior, and those of the test prompts before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.models.diffusion import Prior
from veneer.models.sampling import pixels, sample, shown
from veneer.store import write_text
from veneer.study.contact_sheet import contact_sheet, save_png
from veneer.tasks.described_pictures import watched
from veneer.tasks.image_classification import open_picture
from veneer.tasks.latent_rows import LatentRows, stacked
from veneer.tasks.text_to_image import Painting
from veneer.tuned import Tuned

SHEET, SAMPLES, PRIOR = "contact-sheet.png", "samples", "prior"
SHOWN = 8
"""Test prompts that pictures are made of."""
PRIOR_SEED = 1_000_000
"""Seeds of the prior's pictures begin here: they share none with the samples."""


def give_prior(tuned: Tuned, own: Painting, folder: Path) -> str:
    """Makes the prior's pictures with the untouched model, as files that an interrupted run finds again, and gives them to it."""
    model: Any = tuned.model
    prompt, files = str(own.prior_prompt), [folder / PRIOR / f"{i:03}.png" for i in range(own.prior_pictures)]
    for i in watched([i for i, file in enumerate(files) if not file.is_file()], "pictures of the prior"):
        with tuned.disabled():
            picture = sample(model, [prompt], PRIOR_SEED + i, own.sample_steps, own.guidance)[0]
        save_png(picture, files[i])
    rows = LatentRows(files, lambda file: (file, prompt), model)
    batch = stacked([rows[i] for i in range(len(rows))])
    model.prior = Prior(batch.pop("latents"), {k: v for k, v in batch.items() if k != "labels"}, own.prior_weight)
    return f"Prior: {len(files)} pictures of {prompt!r} by the untouched model, weight {own.prior_weight:g}, in {folder / PRIOR}"


def write_samples(tuned: Tuned, own: Painting, given: Sequence[tuple[str, Any]], folder: Path) -> str:
    """Pictures of prompts by the untouched and the adapted model, same seeds, beside the true ones: files, a list, a contact sheet.

    `samples/samples.jsonl` has one line a prompt: id, text, seed, method, and the files of reference, before and after.

    Args:
        given: prompts and their true pictures; of equal prompts the first counts, unless all are equal; at most eight in all.
    """
    model: Any = tuned.model
    different = list({prompt: picture for prompt, picture in reversed(given)}.items())[::-1]
    chosen = (different if len(different) > 1 else given)[:SHOWN]
    facts, rows = [], []
    for i, (prompt, picture) in enumerate(watched(chosen, "pictures of test prompts")):
        wanted = ([prompt], i, own.sample_steps, own.guidance)
        with tuned.disabled():
            before = sample(model, *wanted)[0]
        true = shown(pixels(open_picture(picture, under="white"), model.size))
        made = {"reference": true, "before": before, "after": sample(model, *wanted)[0]}
        files = {kind: f"{kind}/{i:03}.png" for kind in made}
        for kind, file in files.items():
            save_png(made[kind], folder / SAMPLES / file)
        rows.append((prompt, list(made.values())))
        facts.append({"id": i, "text": prompt, "seed": i, "method": tuned.summary().spec, **files})
    write_text(folder / SAMPLES / "samples.jsonl", "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts))
    save_png(contact_sheet(rows, ("test picture", "before", "after")), folder / SHEET)
    return f"Test prompts, before and after: {folder / SHEET}"
