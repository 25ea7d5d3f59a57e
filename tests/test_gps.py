"""GPS: which weights of a neuron it trains, and what they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SUBJECTS, loss
from torch import Generator, nn

import veneer
import veneer.registry as registry
from veneer.errors import BadValue, Unsupported
from veneer.site import Site
from veneer.tuned import Tuned


def attach(name: str, spec: str, batches: int = 2) -> tuple[nn.Module, Tuned]:
    """A plain copy, and the method attached on some batches."""
    subject = SUBJECTS[name]
    fed = [subject.batch(i) for i in range(batches)]
    return subject.build(), veneer.attach(subject.build(), spec, batches=fed, loss=loss, head=False)


@pytest.mark.parametrize(("name", "K"), [("bert", 1), ("llama", 3), ("gpt2", 2), ("vit", 2), ("convnet", 4)])
def test_every_neuron_trains_its_largest_gradients(name: str, K: int) -> None:
    plain, tuned = attach(name, f"gps(K={K})")
    for i in range(2):
        loss(plain, SUBJECTS[name].batch(i)).backward()
    sites = 0
    for site, method, p in tuned.entries():
        module: Any = plain.get_submodule(site.module)
        grad = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad.flatten(1)
        grad = grad if site.rows is None else grad[slice(*site.rows)]
        moved = method.weight(torch.zeros(site.out_features, site.in_features).double(), {**p, "v": torch.ones_like(p["v"])}, site)
        assert set(moved.unique().tolist()) <= {0.0, 1.0} and bool((moved.sum(1) == K).all())
        least = torch.where(moved > 0, grad.abs(), torch.inf).amin(1)
        most = torch.where(moved > 0, 0.0, grad.abs()).amax(1)
        assert bool((least >= most).all()), site.name
        assert ("vb" in p) == (module.bias is not None) and p["v"].numel() == K * site.out_features
        sites += 1
    assert sites == len(tuned.sites()) > 3


def test_neurons_without_biases_and_norms() -> None:
    _, tuned = attach("vit", "gps(biases=False)")
    assert {key.rpartition("/")[2] for key, _ in tuned.named_parameters()} == {"v"}
    assert not any("norm" in s.role for s in tuned.sites())
    assert any(s.role == "embed.patch" for s in tuned.sites())


def test_counts() -> None:
    """K weights and a bias of each neuron: of twelve layers of width 768 and the patch embedding, 0.2 % of the model at K = 1."""
    sizes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    neurons = 12 * sum(out for out, _ in sizes) + 768
    method = registry.method("gps", K=3, entries=3 * 768, columns=10, bias_entries=768)
    made = method.init(Site("q", "q", "attn.q", "linear", 0, 768, 768), Generator())
    assert sum(made[name].numel() for name in ("v", "vb")) == 4 * 768
    assert 2 * neurons == 167_424 and 2 * neurons / 85_800_000 < 0.002


def test_refusals() -> None:
    with pytest.raises(BadValue, match="K=17 is more than the 16 inputs of a neuron"):
        attach("bert", "gps(K=17)")
    with pytest.raises(BadValue, match=r"pass batches=\[…\]"):
        veneer.attach(SUBJECTS["bert"].build(), "gps")
    with pytest.raises(Unsupported, match="decided on data"):
        registry.method("gps").init(Site("q", "q", "attn.q", "linear", 0, 4, 4), Generator())
