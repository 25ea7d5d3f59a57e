"""LoRA-FA: LoRA with a frozen first factor, half the numbers, and nothing of the input's size kept for backward (arXiv:2308.03303)."""

from __future__ import annotations

import torch
from tiny import SUBJECTS, moved
from torch import Tensor, nn

import veneer

TARGETS = "attn.q attn.k attn.v mlp.up"


def test_it_is_lora_with_a_frozen_factor(seed: int) -> None:
    """With LoRA's factors set to its own, output and gradient of B are LoRA's; A has no gradient and is drawn anew from the seed."""
    batch = SUBJECTS["vit"].batch(seed)
    ours = moved(veneer.attach(SUBJECTS["vit"].build(), f"lora-fa(r=3, alpha=6, targets='{TARGETS}')", head=False), seed)
    lora = veneer.attach(SUBJECTS["vit"].build(), f"lora(r=3, alpha=6, targets='{TARGETS}')", head=False)
    for (_, _, p), (_, _, q) in zip(ours.entries(), lora.entries()):
        q["A"].data, q["B"].data = p["A"].clone(), p["B"].detach().clone()
        assert not p["A"].requires_grad
    outs = [tuned.model.train()(**batch)["logits"] for tuned in (ours, lora)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for (_, _, p), (_, _, q) in zip(ours.entries(), lora.entries()):
        torch.testing.assert_close(p["B"].grad, q["B"].grad)
    again = veneer.attach(SUBJECTS["vit"].build(), f"lora-fa(r=3, alpha=6, targets='{TARGETS}')", head=False, seed=seed)
    first = [p["A"] for _, _, p in again.entries()]
    assert all(torch.equal(a, p["A"]) for a, (_, _, p) in zip(first, ours.entries()))
    assert not torch.equal(first[0], first[1]), "layers of one shape share their directions"
    assert ours.summary().trained == sum(t.numel() for _, _, p in lora.entries() for n, t in p.items() if n == "B")


def kept(spec: str) -> int:
    """Bytes that one wide layer keeps for backward, its own parameters left out."""
    layer = nn.Sequential()
    layer.add_module("first", nn.Linear(256, 8))
    tuned = veneer.attach(layer, spec)
    own = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), *(t for _, _, q in tuned.entries() for t in q.values())]}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer.train()(torch.randn(100, 256))
    return sum(found.values())


def test_the_input_is_not_kept() -> None:
    assert kept("lora(r=4, targets='first')") >= 100 * 256 * 4
    assert 100 * 4 * 4 <= kept("lora-fa(r=4, targets='first')") < 2 * 100 * 4 * 4
