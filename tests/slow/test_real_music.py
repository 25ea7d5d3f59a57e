"""The instrument notes as they arrive in a package, and a small MusicGen that learns them; skipped where the package is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import veneer
from veneer import assets
from veneer.assets_music import NOTES, instrument_notes
from veneer.models.note_music import Codebooks, delayed, prompt, small, spectra

pytestmark = pytest.mark.slow
WORDS, FRAMES = 64, 48


@pytest.fixture(scope="module")
def notes() -> tuple[list[Tensor], Tensor]:
    if not assets.available(NOTES):
        pytest.skip(f"needs: {assets.INSTALL[NOTES]}")
    every = instrument_notes()
    assert len(every) == 520 and every[0].name == "FluteG6" and every[0].pitch == 79
    frames = [(n.pitch, spectra(n.samples, n.rate)) for n in every[::4]]
    frames = [(pitch, f) for pitch, f in frames if len(f) >= 12]
    books = Codebooks(torch.cat([f[:FRAMES] for _, f in frames]), words=WORDS, rounds=8)
    return [books.encode(f) for _, f in frames], torch.tensor([prompt(pitch, len(f)) for pitch, f in frames])


@pytest.mark.parametrize(
    "spec",
    [
        "conv-adapter(m=16, targets='cross')",
        "conv-adapter(form='deep', m=24, causal=True, targets='decoder.model.decoder.layer_norm')",
        "transformer-adapter(m=24, causal=True, targets='block', leave_out=(0, 1))",
        "transformer-adapter(m=24, targets='text_encoder.encoder.final_layer_norm')",
    ],
)
def test_adapters_learn_notes_in_a_frozen_decoder(spec: str, notes: tuple[list[Tensor], Tensor]) -> None:
    tokens, prompts = notes
    model, generator = small(WORDS, width=64, layers=2), Generator().manual_seed(0)

    def loss(chosen: Tensor) -> Tensor:
        return model(input_ids=prompts[chosen], **delayed([tokens[int(i)] for i in chosen], FRAMES, WORDS)).loss

    def learn(parameters: object, rate: float, steps: int) -> None:
        optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.0)  # type: ignore[arg-type]
        for _ in range(steps):
            optimiser.zero_grad()
            loss(torch.randint(len(tokens), (16,), generator=generator)).backward()
            optimiser.step()

    learn(model.parameters(), 2e-3, 40)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = veneer.attach(model, spec, head=False)
    with torch.no_grad():
        before = float(loss(torch.arange(len(tokens))))
    learn(tuned.parameters(), 3e-3, 40)
    with torch.no_grad():
        after = float(loss(torch.arange(len(tokens))))
    assert after < before
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
