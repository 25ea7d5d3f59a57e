"""Adapters over quantised bases on the CPU: bitsandbytes nf4 and int8, torchao int4 and int8 weight-only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from tiny import loss, output
from torch import nn

import veneer
from veneer import anatomy
from veneer.errors import Unsupported
from veneer.tuned import Tuned

SPECS = ["lora(r=4)", "dora(r=4)", "wegeft(r=4)", "ssf", "bottleneck-adapter(m=4)", "prompt-tuning(length=2)"]


def llama() -> nn.Module:
    return tiny.SUBJECTS["llama"].build(torch.float32, width=64)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "layers" in n}


def swap(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, layer in linears(model).items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, make(layer))
    return model


def nf4() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        return packed.to("cpu")

    return swap(llama(), make)


def int8() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        packed = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return packed.to("cpu")

    return swap(llama(), make)


def torchao_int8() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model, names = llama(), set(linears(llama()))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, n: n in names)
    return model


def torchao_int4() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    model, names = llama(), set(linears(llama()))
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(32),
    )
    quantization.quantize_(model, config, filter_fn=lambda m, n: n in names)
    return model


BASES = {"nf4": nf4, "int8": int8, "torchao-int8": torchao_int8, "torchao-int4": torchao_int4}
TOLERANCE = {"nf4": 1e-4, "int8": 0.1, "torchao-int8": 1e-3, "torchao-int4": 1e-3}
"""How far a dense product with the read weight may be from the layer's own kernel; int8 kernels round activations too."""


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, BASES[request.param]().train()


def stirred(model: nn.Module, spec: str) -> Tuned:
    tuned = veneer.attach(model, spec)
    with torch.no_grad():
        for i, p in enumerate(tuned.parameters()):
            p.add_(0.05 * torch.empty(p.shape).normal_(generator=torch.Generator().manual_seed(i)))
    return tuned


BATCH = tiny.SUBJECTS["llama"].batch(0, torch.float32)


@pytest.mark.parametrize("spec", SPECS)
def test_training_lowers_the_loss(base: tuple[str, nn.Module], spec: str) -> None:
    _, model = base
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = veneer.attach(model, spec)
    assert all(p.dtype == torch.float32 for p in tuned.parameters())
    optimiser = torch.optim.Adam(tuned.param_groups(3e-3))
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        value = loss(model, BATCH)
        value.backward()
        losses.append(float(value.detach()))
        optimiser.step()
    assert losses[-1] < losses[0], losses
    for name, p in model.named_parameters():
        if name in before and not isinstance(p, torch.nn.parameter.UninitializedParameter) and "torchao" not in type(p).__module__:
            assert torch.equal(p.detach(), before[name]), f"training changed {name}"


def test_the_start_is_the_base(base: tuple[str, nn.Module]) -> None:
    _, model = base
    with torch.no_grad():
        before = output(model, BATCH)
        veneer.attach(model, "lora(r=4)")
        after = output(model, BATCH)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_the_weight_that_methods_read_is_the_one_the_layer_uses(base: tuple[str, nn.Module]) -> None:
    from veneer.forms import form_of, is_quantised

    name, model = base
    layer = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr, index]
    assert is_quantised(layer)
    W = form_of(layer, "linear", "weight").weight(layer)
    assert tuple(W.shape) == (64, 128)
    x = torch.randn(5, 128)
    with torch.no_grad():
        wanted = layer(x)
    assert float((x @ W.float().T - wanted).abs().max()) <= TOLERANCE[name] * float(wanted.abs().max())


@pytest.mark.parametrize("spec", ["lora(r=4)", "dora(r=4)"])
def test_an_evaluation_first_does_not_stop_the_gradient(base: tuple[str, nn.Module], spec: str) -> None:
    _, model = base
    model.eval()
    with torch.no_grad():
        output(model, BATCH)  # before anything is attached
    tuned = stirred(model, spec)
    with torch.no_grad():
        output(model, BATCH)
    loss(model.train(), BATCH).backward()
    first = [p for n, p in tuned.named_parameters() if "layers.0" in n]  # only reached through the layers above
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in first)


def test_merging_is_refused_with_what_to_do(base: tuple[str, nn.Module]) -> None:
    _, model = base
    tuned = stirred(model, "lora(r=4)")
    before = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(Unsupported, match="quantised") as caught:
        tuned.merge()
    said = str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in said and "16 or 32 bit" in said and "veneer export" in said
    assert all(torch.equal(p, q) for p, q in zip(tuned.parameters(), before))


def test_saved_here_and_loaded_into_the_full_precision_base(base: tuple[str, nn.Module], tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, model = base
    tuned = stirred(model, "lora(r=4)")
    tuned.save(tmp_path)
    plain = veneer.load(llama(), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), tuned.parameters()))
    plain.merge()
    with torch.no_grad():
        near = output(plain.model, BATCH) - output(model.eval(), BATCH)
        far = output(llama(), BATCH) - output(model, BATCH)
    assert float(near.norm()) < float(far.norm())


def test_rows_and_switching(base: tuple[str, nn.Module]) -> None:
    name, model = base
    tuned = stirred(model, "lora(r=4)")
    veneer.attach(model, "ssf", "b")
    with torch.no_grad():
        for p in tuned.parameters("b"):
            p.add_(0.1)
        tuned.activate("default")
        one = output(model, BATCH)[0]
        tuned.activate("b")
        two = output(model, BATCH)[1]
        tuned.activate(per_row=["default", "b", None, None])
        both = output(model, BATCH)
        with tuned.disabled():
            none = output(model, BATCH)[2]
    near = 0.1 if name == "int8" else 1e-4
    for found, wanted in zip(both, (one, two, none)):
        assert float((found - wanted).abs().max()) <= near * float(wanted.abs().max())


@pytest.mark.parametrize("spec", ["quantum-adapter(targets='attn.q mlp.up')", "ssf(targets='attn.q')", "boft(targets='attn.q mlp.up')"])
def test_a_packed_layer_with_a_bias_answers_as_its_dense_weight_would(spec: str) -> None:
    """Changes that leave the bias alone take it off a packed layer's output and put it back."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.SUBJECTS["vit"].build(torch.float32, width=64)
    for site in [s for s in anatomy.sites(model) if s.role in ("attn.q", "mlp.up")]:
        layer = model.get_submodule(site.module)
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, True, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        packed.bias = nn.Parameter(layer.bias.data.clone())
        parent, _, key = site.module.rpartition(".")
        setattr(model.get_submodule(parent), key, packed.to("cpu"))
    tuned = stirred(model.train(), spec)
    for part in tuned.adapters["default"].parts:
        module = model.get_submodule(part.site.module)
        x = torch.randn(3, 64)
        W, b = part.fold(module.veneer.forms["weight"].weight(module), module.bias.detach())
        assert float(module.bias.abs().max()) > 0.01
        torch.testing.assert_close(module(x), nn.functional.linear(x, W, b), rtol=1e-4, atol=1e-4)
