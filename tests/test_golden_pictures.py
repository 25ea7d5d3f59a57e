"""Adapters of image and music models (AdaptFormer, DVPT, Earth-Adapter, Rein, Conv adapter): golden numbers and their own laws."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_golden import HOME, Case, FunctionCall, site
from tiny import SUBJECTS, WIDTH, images, vit
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer import anatomy
from veneer.errors import BadValue
from veneer.maths.frequency import cut_off, low_pass
from veneer.maths.residual_stream import from_stream
from veneer.method import Method, Params
from veneer.methods.prompt.dvpt import quick_gelu
from veneer.site import Site

SAME = FunctionCall(lambda x: x)
NOTHING = FunctionCall(torch.zeros_like)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def first(method: Method, at: Site) -> Params:
    """First tensors of one site, shared ones too, in float64."""
    generator = Generator().manual_seed(0)
    return {k: t.double() for k, t in {**method.init(at, generator), **method.init_shared([at], generator)}.items()}


def moved(method: Method, at: Site, size: float = 0.3) -> Params:
    return {k: t + size * draw(*t.shape) for k, t in first(method, at).items()}


def refusal(action: Any) -> str:
    with pytest.raises(BadValue) as said:
        action()
    assert "\n" not in str(said.value)
    return str(said.value)


def trained_on(model: nn.Module, spec: str) -> int:
    return veneer.attach(model, spec, head=False).summary().trained


def vit_b(width: int = 768, depth: int = 12) -> nn.Module:
    """The skeleton of a vision transformer of this size, without storage."""
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        config = ViTConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64)
        return ViTModel(config, add_pooling_layer=False)


def counted(spec: str, width: int = 768, depth: int = 12) -> int:
    """Trained parameters on such a model, from the shapes of `init` and `init_shared` alone."""
    method, groups, total = veneer.parse(spec), {}, 0
    for at in method.select(anatomy.sites(vit_b(width, depth))):
        method.check(at)
        total += sum(t.numel() for t in method.init(at, Generator()).values())
        groups.setdefault(method.tie(at), []).append(at)
    return total + sum(t.numel() for members in groups.values() for t in method.init_shared(members, Generator()).values())


def published(slug: str, index: int) -> int:
    return json.loads((HOME / f"{slug}.json").read_text("utf-8"))["counts"][index]["trainable"]


# -- AdaptFormer --------------------------------------------------------------------------------------------------

BESIDE = site("mlp", "branch", 12, 12)


@pytest.mark.parametrize(("m", "index"), [(64, 0), (8, 1)])
def test_adaptformer_counts(m: int, index: int) -> None:
    assert counted(f"adaptformer(m={m})") == published("adaptformer", index)


@pytest.mark.parametrize(("m", "count"), [(4, 82_992), (1, 27_660)])
def test_adaptformer_small_counts(m: int, count: int) -> None:
    assert counted(f"adaptformer(m={m})") == count


def test_adaptformer_reads_the_stream_before_the_norm() -> None:
    model = SUBJECTS["vit"].build(depth=1)
    block, seen = model.vit.layers[0], {}
    tuned = veneer.attach(model, "adaptformer(m=3)", head=False)
    [(_, _, p)] = tuned.entries()
    with torch.no_grad():
        for t in p.values():
            t += draw(*t.shape)
    block.layernorm_after.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    block.mlp.register_forward_hook(lambda _, args, out: seen.update(m=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    SUBJECTS["vit"].answers(model)
    h = seen["h"]
    a = 0.1 * (F.relu(h @ p["W_down"].T + p["b_down"]) @ p["W_up"].T + p["b_up"])
    with tuned.disabled():
        frozen = block.mlp(block.layernorm_after(h))
        near(seen["y"], h + frozen + a)


def test_adaptformer_stands_beside_an_adapter_that_reads_the_normed_input() -> None:
    model = SUBJECTS["vit"].build(depth=1)
    tuned = veneer.attach(model, "adaptformer(m=3) + bottleneck-adapter(variant='parallel', m=3)", head=False)
    block, seen = model.vit.layers[0], {}
    for _, _, p in tuned.entries():
        with torch.no_grad():
            for t in p.values():
                t += draw(*t.shape)
    (_, _, p), (_, _, q) = tuned.entries()
    block.layernorm_after.register_forward_hook(lambda _, args, out: seen.update(h=args[0], n=out))
    block.register_forward_hook(lambda _, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    SUBJECTS["vit"].answers(model)
    a = 0.1 * (F.relu(seen["h"] @ p["W_down"].T + p["b_down"]) @ p["W_up"].T + p["b_up"])
    b = 4 * (F.relu(seen["n"] @ q["down_w"].T + q["down_b"]) @ q["up_w"].T + q["up_b"])
    with tuned.disabled():
        near(seen["y"], seen["h"] + block.mlp(seen["n"]) + a + b)


def test_adaptformer_scale_dropout_and_first_gradients() -> None:
    x, twice = draw(2, 5, 12), registry.method("adaptformer", m=3, s=0.2)
    once, p = registry.method("adaptformer", m=3), moved(registry.method("adaptformer", m=3), BESIDE)
    near(twice.forward(NOTHING, x, p, BESIDE), 2 * once.forward(NOTHING, x, p, BESIDE))
    assert torch.equal(registry.method("adaptformer", m=3, s=0.0).forward(SAME, x, p, BESIDE), x)
    start = {k: t.requires_grad_() for k, t in first(once, BESIDE).items()}
    (once.forward(SAME, x, start, BESIDE) * draw(2, 5, 12)).sum().backward()
    assert {k for k, t in start.items() if t.grad.abs().max() > 0} == {"W_up", "b_up"}
    dropped = registry.method("adaptformer", m=3, dropout=0.5)
    near(dropped.forward(SAME, x, p, BESIDE), once.forward(SAME, x, p, BESIDE))
    assert (dropped.forward(replace(SAME, training=True), x, p, BESIDE) - once.forward(SAME, x, p, BESIDE)).abs().max() > 1e-6


def test_adaptformer_options() -> None:
    x, o = draw(2, 5, 12), draw(2, 5, 12)
    after = registry.method("adaptformer", m=3, sequential=True, learned_s=True)
    p = moved(after, BESIDE)
    u = F.relu(o @ p["W_down"].T + p["b_down"])
    near(after.forward(FunctionCall(lambda _: o), x, p, BESIDE), o + p["s"] * (u @ p["W_up"].T + p["b_up"]))
    assert float(first(after, BESIDE)["s"]) == 1
    for norm in ("in", "out"):
        method = registry.method("adaptformer", m=3, norm=norm)
        p = moved(method, BESIDE)
        h = F.layer_norm(x, (12,), p["ln_w"], p["ln_b"]) if norm == "in" else x
        a = 0.1 * (F.relu(h @ p["W_down"].T + p["b_down"]) @ p["W_up"].T + p["b_up"])
        a = F.layer_norm(a, (12,), p["ln_w"], p["ln_b"]) if norm == "out" else a
        near(method.forward(NOTHING, x, p, BESIDE), a)
    with pytest.warns(UserWarning, match="no bottleneck"):
        registry.method("adaptformer", m=12).check(BESIDE)


@pytest.mark.parametrize(("subject", "module"), [("vit", "layernorm_after"), ("llama", "post_attention_layernorm"), ("gpt2", "ln_2")])
def test_the_stream_begins_before_the_norm(subject: str, module: str) -> None:
    sites = anatomy.sites(SUBJECTS[subject].build())
    branches = [s for s in sites if s.kind == "branch" and s.role == "mlp"]
    assert all(s.entry.endswith(module) for s in from_stream(branches, sites))


def test_the_stream_of_post_norm_blocks_is_what_the_sub_layer_reads() -> None:
    for subject in ("bert", "encoder"):
        sites = anatomy.sites(SUBJECTS[subject].build())
        branches = [s for s in sites if s.kind == "branch"]
        assert [s.entry for s in from_stream(branches, sites)] == [s.entry for s in branches]


def test_norms_of_outputs_read_no_stream() -> None:
    from transformers import Gemma2Config, Gemma2Model, Olmo2Config, Olmo2Model

    small: dict[str, Any] = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    small |= dict(num_key_value_heads=2, head_dim=8, pad_token_id=0)
    entries = []
    for model in (Gemma2Model(Gemma2Config(**small)), Olmo2Model(Olmo2Config(**small))):
        sites = anatomy.sites(model)
        entries.append([s.entry.split(".", 2)[2] for s in from_stream([s for s in sites if s.kind == "branch"], sites)])
    assert entries == [["input_layernorm", "pre_feedforward_layernorm"], ["self_attn.q_proj", "mlp.gate_proj"]]


# -- DVPT ---------------------------------------------------------------------------------------------------------


def test_dvpt_canonical() -> None:
    """The file's parameters are those of another case (case 2), not the ones its outputs were made with: what holds for any is checked."""
    case = Case("dvpt", 0)
    delta, other = case["out.delta"], Case("dvpt", 2)
    assert all(torch.equal(t, other[k]) for k, t in case.items() if k.startswith("param."))
    case.agree("y", case["x"] + delta)
    near(delta[:, :3], case["out.attn"] @ delta[:, 3:])
    method, p, x = registry.method("dvpt", L=3, r=20), case.params(), case["x"]
    Z = quick_gelu(F.linear(x, p["W_d"], p["b_d"]))
    A = torch.softmax(Z[:, :3] @ Z[:, 3:].transpose(1, 2) / 20**0.5, -1)
    Z = torch.cat([A @ Z[:, 3:], Z[:, 3:]], 1)
    ours = method.forward(NOTHING, x, p, BESIDE)
    near(ours, p["g"] * (Z @ p["W_u"].T + p["b_u"]))
    near(ours[:, :3], A @ ours[:, 3:])


def test_dvpt_port() -> None:
    case = Case("dvpt", 1)
    method = registry.method("dvpt", L=3, r=20, form="port")
    case.agree("out.delta", method.forward(NOTHING, case["x"], case.params(), BESIDE))


def test_dvpt_released_vision_transformer() -> None:
    case = Case("dvpt", 2)
    b = {k.removeprefix("base."): t for k, t in case.items() if k.startswith("base.")}
    layers = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 2, batch_first=True), "ln_1": nn.LayerNorm(12), "ln_2": nn.LayerNorm(12)})
    layers["mlp"] = nn.ModuleDict({"c_fc": nn.Linear(12, 48), "c_proj": nn.Linear(48, 12)})
    layers.double().load_state_dict(b)
    x = case["x"]
    n = layers["ln_1"](x)
    h = x + layers["attn"](n, n, n, need_weights=False)[0]
    up = layers["mlp"]["c_fc"](layers["ln_2"](h))
    o = layers["mlp"]["c_proj"](up * torch.sigmoid(1.702 * up))
    method = registry.method("dvpt", L=3, r=20, form="vit")
    case.agree("y", h + method.forward(FunctionCall(lambda _: o), h, case.params(), BESIDE))


def test_dvpt_counts() -> None:
    assert counted("dvpt") == published("dvpt", 0) == 202_836
    assert counted("dvpt(share=1)") == 454_908


@pytest.mark.parametrize("form", ["segformer", "swin"])
def test_dvpt_prompts_on_the_first_tokens(form: str) -> None:
    method, at = registry.method("dvpt", L=3, r=4, form=form), site("attn", "branch", 12, 12)
    p, x, o = moved(method, at), draw(2, 7, 12), draw(2, 7, 12)
    h = o if form == "swin" else x + o
    P = torch.softmax(p["P"] @ h.transpose(1, 2) / 12**0.5, -1) @ h * (p["g2"] if form == "segformer" else 1)
    y = method.forward(FunctionCall(lambda _: o), x, p, at)
    near(y, o + F.pad(P, (0, 0, 0, 4)))
    assert (P[0] - P[1]).abs().max() > 1e-6
    assert "choose L ≤ 2" in refusal(lambda: method.forward(FunctionCall(lambda _: o[:, :2]), x[:, :2], p, at))
    if form == "segformer":
        assert "choose form='swin'" in refusal(lambda: method.forward(FunctionCall(lambda _: o[:, :6]), x, p, at))
        near(method.forward(SAME, o, first(method, at), at), o)


def test_dvpt_starts_at_a_gate_and_follows_the_image() -> None:
    method = registry.method("dvpt", L=3, r=4)
    p, x = {k: t.requires_grad_() for k, t in first(method, BESIDE).items()}, draw(2, 9, 12)
    y = method.forward(NOTHING, x, p, BESIDE)
    assert torch.equal(y, torch.zeros_like(y))
    (y * draw(2, 9, 12)).sum().backward()
    assert {k for k, t in p.items() if t.grad.abs().max() > 0} == {"g"}
    p, order = moved(method, BESIDE), torch.randperm(6)
    y, turned = (method.delta(u, p) for u in (x, torch.cat([x[:, :3], x[:, 3:][:, order]], 1)))
    near(turned[:, :3], y[:, :3])
    near(turned[:, 3:], y[:, 3:][:, order])
    assert (y[0, :3] - y[1, :3]).abs().max() > 1e-6


def test_dvpt_puts_prompts_in_front_and_takes_them_away() -> None:
    method, x = registry.method("dvpt", L=3, r=4), draw(2, 5, 12)
    last = site("block", "block", 12, 12, index=2, length=3)
    p = moved(method, replace(last, index=0))
    y = method.forward(SAME, x, p, replace(last, index=0))
    near(y, torch.cat([(p["P0"] + p["P_pos"]).expand(2, 3, 12), x], 1))
    assert torch.equal(method.forward(SAME, y, p, replace(last, index=1)), y)
    assert torch.equal(method.forward(SAME, y, p, last), x)
    ahead = method.forward(SAME, x.transpose(0, 1), p, replace(last, index=0, batch_dim=1))
    near(ahead.transpose(0, 1), y)


def test_dvpt_shares_modules_within_a_stack() -> None:
    sites = anatomy.sites(vit_b(64, 7))
    method = registry.method("dvpt", share=3)
    groups = [method.tie(s) for s in method.select(sites) if s.kind == "branch"]
    assert groups == ["mlp0"] * 3 + ["mlp3"] * 3 + ["mlp6"]
    assert "choose targets='block mlp'" in refusal(lambda: registry.method("dvpt", targets="mlp").select(sites))
    from transformers import SwinConfig, SwinModel

    stages = anatomy.sites(SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)))
    assert "names 2; choose form='swin'" in refusal(lambda: method.select(stages))
    assert len(registry.method("dvpt", form="swin").select(stages)) == 8
    assert "reads tokens, not images" in refusal(lambda: method.select(anatomy.sites(SUBJECTS["bert"].build())))


# -- Earth-Adapter ------------------------------------------------------------------------------------------------

BLOCK = site("block", "block", 8, 8, length=1)


def test_earth_adapter_without_frequencies() -> None:
    case = Case("earth-adapter", 0)
    method = registry.method("earth-adapter", m=3, frequency=0)
    case.agree("y", method.forward(SAME, case["x"], case.params(), BLOCK))


def test_earth_adapter_with_frequencies() -> None:
    case = Case("earth-adapter", 1)
    method, f = registry.method("earth-adapter", m=3, frequency=1, rho=0.7), case["x"][:, 1:]
    assert cut_off((6, 6), 0.7, method, BLOCK) == case.hyper["cutoff"]
    low = low_pass(f, (6, 6), 2)
    case.agree("out.low", low)
    case.agree("out.high", f - low)
    case.agree("out.router", method.router(f, case.params()))
    case.agree("y", method.forward(SAME, case["x"], case.params(), BLOCK))
    turned = method.forward(SAME, case["x"].transpose(0, 1), case.params(), replace(BLOCK, batch_dim=1))
    case.agree("y", turned.transpose(0, 1))


@pytest.mark.parametrize(("m", "index"), [(16, 0), (64, 1)])
def test_earth_adapter_counts(m: int, index: int) -> None:
    assert counted(f"earth-adapter(m={m})", 1024, 24) == published("earth-adapter", index)


@pytest.mark.parametrize(("m", "blocks", "count"), [(32, 6, 2_415_786), (32, -6, 2_415_786), (32, -3, 2_007_009)])
def test_earth_adapter_more_counts(m: int, blocks: int, count: int) -> None:
    assert counted(f"earth-adapter(m={m}, frequency={blocks})", 1024, 24) == count


@pytest.mark.parametrize("sides", [(6, 6), (5, 7), (8, 3)])
def test_low_frequencies_are_those_of_the_fourier_transform(sides: tuple[int, int]) -> None:
    h, w = sides
    z = draw(2, h * w, 3)
    for c in range(1, min(sides) // 2 + 1):
        S = torch.fft.fftshift(torch.fft.fft2(z.view(2, h, w, 3), dim=(1, 2), norm="ortho"), dim=(1, 2))
        M = torch.zeros(h, w, 1)
        M[h // 2 - c : h // 2 + c, w // 2 - c : w // 2 + c] = 1
        low = torch.fft.ifft2(torch.fft.ifftshift(S * M, dim=(1, 2)), dim=(1, 2), norm="ortho").real
        near(low_pass(z, sides, c), low.reshape(2, h * w, 3))
    constant = draw(2, 1, 3).expand(2, h * w, 3)
    near(low_pass(constant, sides, 1), constant)


def test_earth_adapter_as_its_definition() -> None:
    """Experts on the filtered patches, as written; with one weight on the spatial one it is the plain layer."""
    method = registry.method("earth-adapter", m=3, frequency=1, rho=0.6, grid=(4, 6), t=2, prefix_tokens=2, exact_start=False)
    p, x = moved(method, BLOCK), draw(2, 26, 8)
    f = x[:, 2:]
    low = low_pass(f, (4, 6), 1)
    inputs = {"spatial": torch.cat([f, p["T"].expand(2, 24, 2)], -1), "low": low, "high": f - low}

    def expert(n: str) -> Tensor:
        return F.relu(inputs[n] @ p[f"{n}.W_d"].T + p[f"{n}.b_d"]) @ p[f"{n}.W_u"].T + p[f"{n}.b_u"]

    w = torch.softmax(f @ p["W_r"].T + p["b_r"], -1)
    mixed = sum(w[..., i, None] * expert(n) for i, n in enumerate(inputs))
    near(method.forward(SAME, x, p, BLOCK), torch.cat([x[:, :2], f + p["alpha"] * mixed], 1))
    p |= {"W_r": 0 * p["W_r"], "b_r": torch.tensor([1e3, 0, 0], dtype=torch.float64)}
    plain = method.forward(SAME, x, p, replace(BLOCK, index=0, length=2))
    near(method.forward(SAME, x, p, BLOCK), plain)


def test_earth_adapter_refuses_what_is_no_grid() -> None:
    method = registry.method("earth-adapter", m=3, frequency=1)
    p = first(method, BLOCK)
    assert "35 patches at site are no grid of 5 × 5" in refusal(lambda: method.forward(SAME, draw(2, 36, 8), p, BLOCK))
    assert "choose rho ≥ 0.5" in refusal(lambda: method.forward(SAME, draw(2, 17, 8), p, BLOCK))
    assert "no patch tokens" in refusal(lambda: method.forward(SAME, draw(2, 8, 4, 4), p, BLOCK))
    assert "choose at most ±1" in refusal(lambda: registry.method("earth-adapter", frequency=-2).check(BLOCK))
    assert "give grid=" in refusal(lambda: registry.method("earth-adapter", t=4))
    assert "two whole numbers" in refusal(lambda: registry.method("earth-adapter", grid=(4,)))
    assert registry.method("earth-adapter", frequency=-3).experts(replace(BLOCK, index=2, length=24)) == ("spatial", "low", "high")


# -- Rein ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, None])
def test_rein_as_its_definition(r: int | None) -> None:
    method = registry.method("rein", m=5, r=r, prefix_tokens=2)
    p, x = moved(method, BLOCK), draw(2, 9, 8)
    f, T = x[:, 2:], p["T"] if r is None else p["A"] @ p["B"]
    S = torch.softmax(f @ T.T / 8**0.5, -1)
    delta = (S[..., 1:] @ (T[1:] @ p["W_T"].T + p["b_T"]) + f) @ p["W_f"].T + p["b_f"]
    near(method.forward(SAME, x, p, BLOCK), torch.cat([x[:, :2], f + p["s"] * delta], 1))
    near(method.forward(SAME, x, first(method, BLOCK), BLOCK), x)


def test_rein_sink_takes_attention_and_gives_nothing() -> None:
    method = registry.method("rein", m=5, r=None)
    p, f = moved(method, BLOCK), draw(2, 6, 8)
    away = p | {"T": torch.cat([1e3 * f[0, :1], p["T"][1:]])}
    only = F.linear(f[:1, :1], p["s"] * p["W_f"], p["s"] * p["b_f"])
    near(method.delta(f[:1, :1], away), only)  # the sink has all the attention of this patch


def test_rein_counts_and_first_values() -> None:
    assert counted("rein(query=256)", 1024, 24) == published("earth-adapter", 2)
    method = registry.method("rein", exact_start=False)
    at = replace(BLOCK, out_features=64, in_features=64)
    p = first(method, at)
    bound = (6 / (3 * 16**2 + (64 * 16) ** 0.5)) ** 0.5
    assert 0.9 * bound < float(p["A"].abs().max()) <= bound and float(p["s"]) == pytest.approx(1e-3)
    assert "choose r ≤ 5" in refusal(lambda: registry.method("rein", m=5, r=6).check(BLOCK))


def test_rein_object_queries() -> None:
    method = registry.method("rein", m=5, r=2, query=4)
    shared = {k: t for k, t in moved(method, BLOCK).items() if k not in "AB"}
    blocks = [{**shared, **{k: moved(method, BLOCK)[k] for k in "AB"}} for _ in range(3)]
    Q = [(p["A"] @ p["B"]) @ p["W_Q"].T + p["b_Q"] for p in blocks]
    most, mean = torch.maximum(torch.maximum(Q[0], Q[1]), Q[2]), (Q[0] + Q[1] + Q[2]) / 3
    columns = [each[:, c] for c in range(4) for each in (most, mean, Q[2])]
    near(method.queries(blocks), torch.stack(columns, 1) @ shared["W_M"].T + shared["b_M"])
    assert "choose query=256" in refusal(lambda: registry.method("rein").queries(blocks))


# -- Conv adapter -------------------------------------------------------------------------------------------------


def test_conv_adapter_released_stack() -> None:
    case = Case("conv-adapter", 0)
    given, p = case.params(), {}
    for ours, theirs in (("down", "adapter_proj_down"), ("up", "adapter_proj_up")):
        p[f"{ours}_w"] = torch.stack([given[f"blocks.{i}.{theirs}.weight"].flatten(1) for i in (0, 1)])
        p[f"{ours}_b"] = torch.stack([given[f"blocks.{i}.{theirs}.bias"] for i in (0, 1)])
    p |= {"ln_w": given["norm.weight"], "ln_b": given["norm.bias"]}
    method, at = registry.method("conv-adapter", m=2, blocks=2, norm=True), site("conv", "conv", 8, 72, kernel=(3, 3))
    assert {k: t.shape for k, t in method.init(at, Generator()).items()} == {k: t.shape for k, t in p.items()}
    case.agree("y", method.forward(SAME, case["x"], p, at))
    case.agree("y", replace(method, dims=2).forward(SAME, case["x"], p, replace(at, kind="block", kernel=())))
    tokens = case["x"].flatten(2)
    y = method.forward(SAME, tokens.transpose(1, 2), p, replace(at, kind="branch", kernel=()))
    case.agree("y", y.transpose(1, 2).view_as(case["x"]))
    y = method.forward(SAME, tokens.permute(2, 0, 1), p, replace(at, kind="branch", kernel=(), batch_dim=1))
    case.agree("y", y.permute(1, 2, 0).view_as(case["x"]))


def test_conv_adapter_counts() -> None:
    released = registry.method("conv-adapter", norm=True)
    widths = (320, 640, 1280, 1280, 1280, 640, 320)
    made = [released.init(site("block", "block", C, C), Generator()) for C in widths]
    assert sum(t.numel() for p in made for t in p.values()) == 1_502_800
    music = registry.method("conv-adapter", m=32).init(site("block", "block", 32_000, 32_000), Generator())
    assert sum(t.numel() for t in music.values()) == published("conv-adapter", 0)


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_conv_adapter_deep_as_its_definition(axes: int) -> None:
    method, at = registry.method("conv-adapter", form="deep", m=6, blocks=3, dims=axes), replace(BLOCK, kind="branch")
    p, shape = moved(method, at), (7, 5, 4)[: axes or 1]
    y = draw(2, 8, *shape)
    conv = (F.conv1d, F.conv2d, F.conv3d)[max(axes, 1) - 1]
    ones = (1,) * max(axes, 1)
    h = conv(y, p["down_w"].view(6, 8, *ones), p["down_b"])
    for i in range(3):
        h = h + conv(F.gelu(h), p["conv_w"][i], p["conv_b"][i], padding=2**i, dilation=2**i)
    gate = torch.sigmoid(F.relu(h.flatten(2).mean(-1) @ p["gate_1"].T) @ p["gate_2"].T)
    expected = y + conv(h * gate.view(2, 6, *ones), p["up_w"].view(8, 6, *ones), p["up_b"])
    if axes:
        near(method.forward(SAME, y, p, at), expected)
    else:
        near(method.forward(SAME, y.transpose(1, 2), p, at), expected.transpose(1, 2))
    start = first(method, at)
    x = y if axes else y.transpose(1, 2)
    near(method.forward(SAME, x, start, at), x)


def test_conv_adapter_refusals() -> None:
    assert "choose 3 or 5" in refusal(lambda: registry.method("conv-adapter", kernel=4))
    assert "norm=False" in refusal(lambda: registry.method("conv-adapter", form="deep", norm=True))
    deep, model = registry.method("conv-adapter", form="deep"), SUBJECTS["llama"].build()
    assert "choose causal=True or form='pointwise'" in refusal(lambda: veneer.attach(model, deep, head=False))
    method = registry.method("conv-adapter", m=2)
    p = first(method, BLOCK)
    assert "choose dims=2" in refusal(lambda: method.forward(SAME, draw(2, 8, 4, 4), p, BLOCK))
    assert "choose dims=0" in refusal(lambda: replace(method, dims=2).forward(SAME, draw(2, 5, 8), p, BLOCK))
    assert trained_on(SUBJECTS["convnet"].build(), "conv-adapter(dims=2)") == 2 * (2 * 8 + 1 + 8)


# -- gradients of the fast paths ----------------------------------------------------------------------------------

PASSES: dict[str, tuple[Site, tuple[int, ...]]] = {
    "adaptformer(m=3, norm='out', learned_s=True)": (BESIDE, (2, 4, 12)),
    "dvpt(L=2, r=3)": (BESIDE, (2, 5, 12)),
    "dvpt(L=2, r=3, form='port')": (BESIDE, (2, 5, 12)),
    "dvpt(L=2, r=3, form='segformer')": (site("attn", "branch", 12, 12), (2, 5, 12)),
    "earth-adapter(m=2, frequency=1, rho=0.5, grid=(4, 4), t=2)": (BLOCK, (1, 17, 8)),
    "rein(m=3, r=2)": (BLOCK, (2, 4, 8)),
    "conv-adapter(m=2, norm=True)": (BLOCK, (2, 4, 8)),
    "conv-adapter(form='deep', m=4, blocks=2)": (BLOCK, (2, 6, 8)),
}


@pytest.mark.parametrize("spec", PASSES)
def test_gradients_are_those_of_finite_differences(spec: str) -> None:
    method, (at, shape) = veneer.parse(spec), PASSES[spec]
    p = {k: t.requires_grad_() for k, t in moved(method, at).items()}
    x = draw(*shape).requires_grad_()

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return method.forward(FunctionCall(torch.tanh), x, dict(zip(p, tensors)), at)

    assert torch.autograd.gradcheck(run, (x, *p.values()), fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("spec", PASSES)
def test_half_precision_inputs_over_full_precision_tensors(spec: str) -> None:
    method, (at, shape) = veneer.parse(spec), PASSES[spec]
    p = {k: t.float() for k, t in moved(method, at).items()}
    x = draw(*shape)
    exact = method.forward(SAME, x.float(), p, at)
    half = method.forward(SAME, x.bfloat16(), p, at)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_larger_picture_with_frequencies_in_a_model() -> None:
    model = vit(8, WIDTH, image_size=16).double().eval()
    tuned = veneer.attach(model, "earth-adapter(m=3, rho=0.5)", head=False)
    assert [s.depth for s, _, p in tuned.entries() if "W_r" in p] == [7]
    picture = {"pixel_values": F.interpolate(images(Generator().manual_seed(0))["pixel_values"], 16).double()}
    plain = model(**picture).logits
    with tuned.disabled():
        near(plain, model(**picture).logits)
