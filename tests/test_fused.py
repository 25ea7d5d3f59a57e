"""Fused weights: adapters of row ranges and of the whole layer, side by side."""

from __future__ import annotations

import torch
from tiny import SUBJECTS, output

import veneer
from veneer import anatomy
from veneer.adapter import Adapter
from veneer.site import whole_sites
from veneer.source import Fresh


def test_whole_and_row_adapters_add_up() -> None:
    """An adapter of a whole fused layer (as other libraries place them) beside one of its query rows: routed equals merged."""
    model, batch = SUBJECTS["gpt2"].build(), SUBJECTS["gpt2"].batch()
    tuned = veneer.attach(model, "lora(r=2, targets='attn.q')", "ranges")
    method = veneer.method("lora", r=2)
    whole = [(method, site) for site in whole_sites(anatomy.sites(model)) if site.role == "attn.qkv"]
    assert whole
    tuned.add(Adapter("fused", method, []), [(method, whole, Fresh(torch.Generator().manual_seed(1), 0, {}))])
    for name in ("ranges", "fused"):
        for parameter in tuned.parameters(name):
            parameter.data.normal_(0, 0.2)
    base = output(tuned.activate("ranges").model, batch)
    routed = output(tuned.activate({"ranges": 0.5, "fused": 2.0}).model, batch)
    assert (routed - base).abs().max() > 1e-3
    torch.testing.assert_close(output(tuned.merge().model, batch), routed)
