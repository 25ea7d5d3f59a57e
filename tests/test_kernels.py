"""Fused functions against their plain references: values, gradients, and what they keep for backward."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import SUBJECTS
from torch import Tensor
from torch.nn import functional as F

import veneer
from veneer.kernels import blocks, columns, low_rank, replay, scale_rotate, scaled


def drawn(*shape: int, seed: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def rms(h: Tensor, gain: Tensor) -> Tensor:
    """A norm as Llama-like models write it."""
    wide = h.float() if h.dtype == torch.bfloat16 else h
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


MADE = {
    "gated": lambda g, u, gain: F.silu(g) * u,
    "gelu": lambda g, u, gain: F.gelu(g, approximate="tanh"),
    "silu": lambda g, u, gain: F.silu(g),
    "layer norm": lambda g, u, gain: F.layer_norm(g, g.shape[-1:], gain, gain),
    "rms norm": lambda g, u, gain: rms(g, gain),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("how", MADE)
def test_an_input_is_made_again_from_what_the_graph_keeps(how: str, dtype: torch.dtype, seed: int) -> None:
    g, u = (2 * drawn(300, 7, seed=seed + n) for n in range(2))
    g, u = g.to(dtype), u.to(dtype)
    x = MADE[how](g, u, torch.full((7,), 1.5, dtype=dtype))
    make, sources = replay.kept(x)
    assert all(t is not x for t in sources), "the input itself is kept"
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    again = make(sources)
    assert again.dtype == dtype
    torch.testing.assert_close(again, x.detach(), atol=tolerance, rtol=tolerance)
    t = drawn(3, 300, seed=seed + 5, grad=False).to(dtype)
    torch.testing.assert_close(replay.times(t, make, sources, x.shape), t @ x.detach(), atol=300 * tolerance, rtol=tolerance)


def test_an_input_that_cannot_be_made_again_is_kept(seed: int) -> None:
    x = drawn(4, 6, seed=seed)
    for one in (x, x * 2.0, torch.tanh(x), F.layer_norm(x, (6,))):
        make, sources = replay.kept(one)
        torch.testing.assert_close(make(sources), one.detach(), rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        gated = F.silu(x) * (x + 1)
        assert replay.kept(gated)[1][0] is gated  # checkpointing and offloading decide themselves


def test_a_changed_source_is_noticed(seed: int) -> None:
    g, up = drawn(4, 6, seed=seed) * 1, drawn(4, 6, seed=seed + 1) * 1
    A, B = drawn(2, 6, seed=seed + 2), drawn(5, 2, seed=seed + 3)
    y = low_rank.low_rank_linear(F.silu(g) * up, drawn(5, 6, seed=seed + 4, grad=False), None, B, A)
    with torch.no_grad():
        up.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("count", (1, 3))
def test_blocks_are_their_reference(count: int, seed: int) -> None:
    x, C = drawn(2, 5, 12, seed=seed), drawn(count, 4, 4, seed=seed + 1)
    torch.testing.assert_close(blocks.turned_by_blocks(x, C), blocks.reference_turn(x, C))
    assert torch.autograd.gradcheck(blocks.turned_by_blocks, (x, C))
    thin = drawn(3, 4, 2, seed=seed + 2)
    torch.testing.assert_close(blocks.block_product(x, thin), blocks.reference_product(x, thin))
    assert torch.autograd.gradcheck(blocks.block_product, (x, thin))


@pytest.mark.parametrize("biased", (True, False))
def test_products_taken_apart_are_the_low_rank_layer(biased: bool, seed: int) -> None:
    x, W = drawn(2, 3, 6, seed=seed), drawn(5, 6, seed=seed + 1, grad=False)
    b = drawn(5, seed=seed + 2, grad=False) if biased else None
    R, S, L, c = (drawn(*s, seed=seed + 3 + i) for i, s in enumerate(((2, 6), (3, 6), (5, 2), (5,))))

    def together(x: Tensor, R: Tensor, S: Tensor, L: Tensor) -> Tensor:
        t, u = low_rank.inner_products(x, [R, S])
        return low_rank.outer_linear(x, W, b, t, L) + u.sum()

    torch.testing.assert_close(together(x, R, S, L), low_rank.reference(x, W, b, L, R) + (x @ S.T).sum())
    assert torch.autograd.gradcheck(together, (x, R, S, L))

    def gained(x: Tensor, R: Tensor, L: Tensor, c: Tensor) -> Tensor:
        return scaled.scaled_outer(x, W, b, c, low_rank.inner_products(x, [R])[0], L)

    torch.testing.assert_close(gained(x, R, L, c), scaled.reference_outer(x, W, b, c, L, R))
    assert torch.autograd.gradcheck(gained, (x, R, L, c))

    I = torch.tensor([4, 1])
    V = drawn(5, 2, seed=seed + 8)
    picked = columns.in_columns(V, I, 6)
    torch.testing.assert_close(columns.columns_linear(x, W, b, V, I), F.linear(x, W + picked, b))
    assert torch.autograd.gradcheck(lambda x, V: columns.columns_linear(x, W, b, V, I), (x, V))

    def onto(d: Tensor, x: Tensor) -> Tensor:
        return low_rank.linear_onto(d, x, W, b)

    d = drawn(2, 3, 5, seed=seed + 9)
    torch.testing.assert_close(onto(d, x), d + F.linear(x, W, b))
    assert torch.autograd.gradcheck(onto, (d, x))
    assert torch.autograd.gradcheck(lambda d, x: low_rank.linear_onto(2 * d, x, W, b, fresh=True), (d, x))
    torch.testing.assert_close(low_rank.linear_onto(2 * d, x, W, b, fresh=True), 2 * d + F.linear(x, W, b))


def test_a_scale_of_zero_has_its_gradient(seed: int) -> None:
    x, W, L, R = drawn(7, 6, seed=seed), drawn(5, 6, seed=seed + 1, grad=False), drawn(5, 2, seed=seed + 2), drawn(2, 6, seed=seed + 3)
    c = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    y = scaled.scaled_outer(x, W, None, c, low_rank.inner_products(x, [R])[0], L)
    (found,) = torch.autograd.grad(y.square().sum() + y.sum(), c)
    expected = torch.autograd.grad(
        scaled.reference_outer(x, W, None, c, L, R).square().sum() + scaled.reference_outer(x, W, None, c, L, R).sum(), c
    )
    torch.testing.assert_close(found, expected[0])


@pytest.mark.parametrize("spec", ("lora(r=2, targets='attn.q attn.k attn.v')", "vera(r=4, targets='attn.q attn.k attn.v')"))
def test_layers_that_read_one_input_take_their_products_together(spec: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer import reading

    counted: list[int] = []

    def counting(x: Tensor, Rs: list[Tensor]) -> tuple[Tensor, ...]:
        counted.append(len(Rs))
        return low_rank.inner_products(x, Rs)

    monkeypatch.setattr(reading, "inner_products", counting)
    monkeypatch.setattr(sys.modules["veneer.method"], "inner_products", counting)
    subject = SUBJECTS["llama"]
    model = subject.build(torch.float64, 2)
    tuned = veneer.attach(model, spec, head=False)
    with torch.no_grad():
        for n, p in enumerate(tuned.parameters()):
            p.add_(0.1 * drawn(*p.shape, seed=seed + n, grad=False))
    together = subject.answers(model, seed)
    blocks_of_model = 2
    assert len(counted) == blocks_of_model, counted
    assert not tuned.route.reading.found, "a product outlived the pass"
    for part in tuned.adapters["default"].parts:
        part.readers = []
    torch.testing.assert_close(subject.answers(model, seed), together)


def test_layers_that_turn_out_to_read_different_inputs_are_parted(seed: int) -> None:
    model = SUBJECTS["llama"].build(torch.float64, 1)
    tuned = veneer.attach(model, "lora(r=2, targets='attn.q attn.k')", head=False)
    parts = tuned.adapters["default"].parts
    width = parts[0].site.in_features
    with torch.no_grad():
        for part in parts:
            tuned.model.get_submodule(part.site.module)(drawn(1, 2, width, seed=seed, grad=False))
    assert parts[0].readers == parts[1].readers == []


@pytest.mark.parametrize("shifted", (True, False))
def test_scaling_keeps_its_result_and_has_the_plain_gradients(shifted: bool, seed: int) -> None:
    h, g = drawn(2, 5, 8, seed=seed), drawn(8, seed=seed + 1)
    b = drawn(8, seed=seed + 2) if shifted else None
    torch.testing.assert_close(scale_rotate.scale(h, g, b), scale_rotate.scale_reference(h, g, b))
    inputs = (h, g) if b is None else (h, g, b)
    assert torch.autograd.gradcheck(lambda *t: scale_rotate.scale(*t), inputs)
    gated = lambda h, *rest: scale_rotate.scale(F.silu(h) * (h + 1), *rest)  # noqa: E731  (made again in backward)
    assert torch.autograd.gradcheck(gated, inputs)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = scale_rotate.scale(h, g, b)
    assert any(t.data_ptr() == y.data_ptr() for t in kept) and not any(t.data_ptr() == h.data_ptr() for t in kept)


def test_turning_keeps_its_result_and_has_the_plain_gradients(seed: int) -> None:
    h, C, S = drawn(2, 5, 12, seed=seed), drawn(2, 1, 3, seed=seed + 1), drawn(2, 1, 3, seed=seed + 2)
    torch.testing.assert_close(scale_rotate.rotate(h, C, S), scale_rotate.rotate_reference(h, C, S))
    assert torch.autograd.gradcheck(scale_rotate.rotate, (h, C, S))
