"""PaCA and S2FT against numbers from their authors' code, and against the laws of trained columns, rows, heads and channels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_golden import HOME, Case, DenseCall, checked, site
from tiny import SUBJECTS, loss
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer import anatomy
from veneer.errors import BadFile, BadValue, NoMatch, Unsupported
from veneer.kernels import columns
from veneer.maths.units import drawn
from veneer.method import Method
from veneer.site import Site
from veneer.tools.peft import save_peft

SIDES = {"attn.v": True, "mlp.up": True, "attn.o": False, "mlp.down": False}
"""Roles with a slice, and whether it is of rows."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def chance(below: int) -> int:
    return int(torch.randint(below, ()))


def blocks_of(role: str, depth: int = 4, out: int = 16, inside: int = 16, heads: int = 4, kv: int = 2) -> list[Site]:
    """The sites of one role in a stack of equal blocks."""
    facts = {"heads": heads, "kv_heads": kv, "head_dim": 4} if role.startswith("attn") else {}
    return [Site(f"layers.{i}.{role}", "", role, "linear", i, out, inside, index=i, length=depth, **facts) for i in range(depth)]


def linear_layer(inside: int, out: int, spec: str, dtype: torch.dtype = torch.float64) -> veneer.Tuned:
    model = nn.Sequential(nn.Linear(inside, out, dtype=dtype))
    return veneer.attach(model, f"{spec[:-1]}, targets='0')", head=False)


def stir(tuned: veneer.Tuned, name: str | None = None, size: float = 0.2) -> veneer.Tuned:
    with torch.no_grad():
        for p in tuned.parameters(name):
            p += size * torch.randn_like(p)
    return tuned


def slices(tuned: veneer.Tuned, name: str | None = None) -> dict[str, Tensor]:
    """Chosen features by site."""
    return {s.name: p["I"] for s, _, p in tuned.entries(name)}


# -- against other code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["columns", "difference"])
def test_paca(form: str) -> None:
    case = Case("paca", 0)
    s, I = case.hyper["s"], case["mask.index"]
    method = registry.method("paca", r=3, alpha=6, form=form)
    W_I = case["W"][:, I]
    P = case.pop("param.P"), case.pop("param.P_init")
    case.update({"param.I": I, **({"param.P": P[0], "param.W_I": W_I} if form == "columns" else {"param.Delta": P[0] - W_I / s})})
    checked(method, case, case["W"], site())
    p = {k: t.requires_grad_() if k in ("P", "Delta") else t for k, t in case.params().items()}
    case.agree("out.delta", method.values(p))  # type: ignore[attr-defined]
    x = case["x"].clone().requires_grad_()
    for run in (
        lambda: method.forward(DenseCall(case["W"], case["b"]), x, p, site()),
        lambda: F.linear(x, method.weight(case["W"], p, site()), case["b"]),
    ):
        x.grad = p["P" if form == "columns" else "Delta"].grad = None
        run().backward(case["grad_y"])
        case.agree("grad.x", x.grad)
        case.agree("grad.P", p["P" if form == "columns" else "Delta"].grad)
    if form == "columns":
        case["out.P"] = P[1]
        first = method.init_from_weight(case["W"], case["b"], {**method.init(site(), Generator()), "I": I}, site(), Generator())
        case.agree("out.P", first["P"])
        assert torch.equal(method.weight(case["W"], first, site()), case["W"])


@pytest.mark.parametrize(("index", "role"), [(0, "attn.o"), (0, "mlp.down"), (1, "attn.v"), (1, "mlp.up")])
def test_s2ft_both_sides(index: int, role: str) -> None:
    case, at, method = Case("s2ft", index), site(role, heads=2, kv_heads=2), registry.method("s2ft")
    case["param.I"] = case["mask.index"]
    checked(method, case, case["W"], at)
    x, V = case["x"].clone().requires_grad_(), case["param.V"].clone().requires_grad_()
    for run in (
        lambda: method.forward(DenseCall(case["W"], case["b"]), x, {"V": V, "I": case["mask.index"]}, at),
        lambda: F.linear(x, case["W"], case["b"]) + method.delta(x, {"V": V, "I": case["mask.index"]}, at),  # type: ignore[attr-defined]
    ):
        x.grad = V.grad = None
        y = run()
        case.agree("y", y)
        y.backward(case["grad_y"])
        case.agree("grad.x", x.grad)
        case.agree("grad.V", V.grad)


class Block(nn.Module):
    """Attention without masks and a gated feed-forward layer, of a case's weights."""

    def __init__(self, W: dict[str, Tensor], heads: int):
        super().__init__()
        self.heads = heads
        for name, w in W.items():
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
            layer.weight.data = w.clone()
            setattr(self, name, layer)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self, n)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_s2ft_attention_and_feed_forward() -> None:
    case, method = Case("s2ft", 2), registry.method("s2ft")
    width, names = case.hyper["hidden"] // case.hyper["heads"], ("v", "o", "up", "down")
    model = Block({k.removeprefix("W."): t for k, t in case.items() if k.startswith("W.")}, case.hyper["heads"])
    case.agree("out.attn_base", model.attend(case["x"]))
    case.agree("out.mlp_base", model.feed(case["x"]))
    for name in names:
        unit = width if name in "vo" else 1
        I = (case[f"mask.{name}"][:, None] * unit + torch.arange(unit)).flatten()
        W, p = getattr(model, name).weight.data, {"V": case[f"param.V.{name}"], "I": I}
        at = replace(site(("attn." if unit > 1 else "mlp.") + name, out=len(W), inside=W.shape[1]), heads=4, kv_heads=4)
        assert torch.equal(method.indices(case[f"mask.{name}"], at), I)  # type: ignore[attr-defined]
        case.agree(f"W_eff.{name}", method.weight(W, p, at))
        layer = DenseCall(W)
        getattr(model, name).forward = lambda x, layer=layer, p=p, at=at: method.forward(layer, x, p, at)
    case.agree("out.attn", model.attend(case["x"]))
    case.agree("out.mlp", model.feed(case["x"]))


# -- counts -----------------------------------------------------------------------------------------------------


def llama_sites(depth: int, hidden: int, inner: int, heads: int, kv: int) -> list[Site]:
    d = hidden // heads
    shapes = {
        "attn.q": (hidden, hidden),
        "attn.k": (kv * d, hidden),
        "attn.v": (kv * d, hidden),
        "attn.o": (hidden, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }
    return [s for role, (out, inside) in shapes.items() for s in blocks_of(role, depth, out, inside, heads, kv)]


LLAMA2_7B, LLAMA3_8B = (32, 4096, 11008, 32, 32), (32, 4096, 14336, 32, 8)


def trained(method: Method, sites: list[Site]) -> int:
    with torch.device("meta"):
        made = [method.init(s, Generator()) for s in method.select(sites)]
    return sum(p[k].numel() for p in made for k in ("P", "V") if k in p)


@pytest.mark.parametrize(
    ("spec", "model", "count"),
    [
        ("paca(r=8)", LLAMA2_7B, 10_878_976),
        ("paca(r=64)", LLAMA3_8B, 88_080_384),
        ("s2ft", LLAMA2_7B, 56_643_584),
        ("s2ft(v=0, o=0.052, u=0, d=0.02)", LLAMA2_7B, 27_787_264 + 28_856_320),
        ("s2ft(v_ratio=0, o_ratio=0, u_ratio=0, d_ratio=0.03)", LLAMA3_8B, 56_369_152),
        ("s2ft(selection='weight', smallest=True)", LLAMA2_7B, 56_643_584),
        ("s2ft(v=0.1, o=0, u=0.01, d=0)", LLAMA3_8B, (25 * 128 + 4587) * 4096),  # 256 key-value heads, 458,752 channels
    ],
)
def test_published_counts(spec: str, model: tuple[int, ...], count: int) -> None:
    assert trained(veneer.parse(spec), llama_sites(*model)) == count
    stated = {c["trainable"] for slug in ("paca", "s2ft") for c in json.loads((HOME / f"{slug}.json").read_text())["counts"]}
    assert {10_878_976, 56_643_584} <= stated


@pytest.mark.parametrize("role", SIDES)
@pytest.mark.parametrize("selection", ["random", "weight"])
def test_s2ft_counts_are_shares_of_all_blocks(role: str, selection: str) -> None:
    for _ in range(20):
        depth, ratio = 1 + chance(9), 0.05 + 0.95 * float(torch.rand(()))
        letter = role.split(".")[1][0]
        shares = {**dict.fromkeys("voud", 0.0), letter: ratio}
        method = registry.method("s2ft", selection=selection, seed=chance(10**6), **shares)
        sites = blocks_of(role, depth)
        units = {"v": 2, "o": 4}.get(letter, 16)
        if not int(ratio * depth * units):
            with pytest.raises(BadValue, match=f"{letter}=.* is less than one"):
                method.select(sites)
            continue
        made = {s.name: method.init(s, Generator()) for s in method.select(sites)}
        assert all(len(p["I"]) and p["V"].shape == ((len(p["I"]), 16) if SIDES[role] else (16, len(p["I"]))) for p in made.values())
        assert sum(len(p["I"]) for p in made.values()) * units // 16 == int(ratio * depth * units)
        if selection == "weight":  # equal shares
            per_block = [len(made[s.name]["I"]) if s.name in made else 0 for s in sites]
            assert max(per_block) - min(per_block) <= 16 // units


# -- what is chosen ---------------------------------------------------------------------------------------------


def test_random_choices_are_the_seeds_alone() -> None:
    for slug, at in (("paca", site(out=12, inside=40)), ("s2ft", blocks_of("mlp.down", inside=400)[0])):
        first, again = (registry.method(slug, seed=3).init(at, Generator().manual_seed(n))["I"] for n in (0, 1))
        other = registry.method(slug, seed=4).init(at, Generator())["I"]
        assert first.dtype == torch.int64 and torch.equal(first, again) and not torch.equal(first, other)
        assert len(first.unique()) == len(first) and int(first.min()) >= 0 and int(first.max()) < at.in_features


def test_paca_draws_columns_uniformly_and_by_layer() -> None:
    hits = Counter(i for seed in range(2000) for i in registry.method("paca", r=3, seed=seed).init(site(), Generator())["I"].tolist())
    assert len(hits) == 20 and all(abs(n - 300) < 6 * 300**0.5 for n in hits.values())
    chosen = slices(veneer.attach(SUBJECTS["bert"].build(), "paca(r=4)", head=False))
    assert len({tuple(I.tolist()) for I in chosen.values()}) > 0.8 * len(chosen)


def test_paca_draws_the_same_in_a_model_with_another_prefix() -> None:
    method = registry.method("paca", r=4)
    a, b = (replace(site(), name=n, depth=1).name for n in ("model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj"))
    assert torch.equal(*(method.init(replace(site(), name=n, depth=1), Generator())["I"] for n in (a, b)))


def test_s2ft_draws_out_of_all_blocks_at_once() -> None:
    """Every set of units of the whole stack is as likely as any other, so blocks differ in number and some have none."""
    sites, counts, hits = blocks_of("attn.o", 3, heads=2), Counter[int](), Counter[tuple[int, int]]()
    for seed in range(3000):
        found = [drawn(s, [0, 1, 2], 3, seed) for s in sites]
        assert sum(map(len, found)) == 3
        counts[len(found[0])] += 1
        hits.update((i, unit) for i, units in enumerate(found) for unit in units)
    assert all(abs(n - 1500) < 6 * 1500**0.5 for n in hits.values()) and len(hits) == 6
    for k, share in {0: 0.2, 1: 0.6, 2: 0.2}.items():  # hypergeometric: 3 of 6, 2 of them in this block
        assert abs(counts[k] - 3000 * share) < 6 * (3000 * share) ** 0.5


def test_s2ft_draws_values_and_outputs_independently() -> None:
    method = registry.method("s2ft", v=0.5, o=0.5, u=0.5, d=0.5)
    chosen = [
        [tuple(method.init(s, Generator())["I"].tolist()) for s in blocks_of(role, 8, 64, 64, heads=16, kv=16) if s in method.select([s])]
        for role in SIDES
    ]
    assert chosen[0] != chosen[2] and chosen[1] != chosen[3]


def test_s2ft_leaves_out_blocks_and_draws_from_the_others() -> None:
    sites = [replace(s, depth=s.index + 5) for s in blocks_of("mlp.down", 4)]
    method = registry.method("s2ft", d=0.5, leave_out=(6, 7))
    chosen = method.select(sites)
    assert {s.depth for s in chosen} <= {5, 8}
    assert sum(len(method.init(s, Generator())["I"]) for s in chosen) == 16


def test_s2ft_takes_whole_heads_and_minds_grouped_queries() -> None:
    tuned = veneer.attach(SUBJECTS["llama"].build(), "s2ft(v=0.5, o=0.4, u=0, d=0)", head=False)
    total = Counter[str]()
    for at, _, p in tuned.entries():
        I, kind = p["I"].view(-1, 4), at.role[-1]
        assert torch.equal(I, I[:, :1] + torch.arange(4)) and (I[:, 0] % 4 == 0).all()
        assert p["V"].shape == ((len(p["I"]), 16) if kind == "v" else (16, len(p["I"])))
        assert int(I.max()) < (8 if kind == "v" else 16)
        total[kind] += len(I)
    assert total == {"v": 2, "o": 3}  # of 2 · 2 key-value heads, of 2 · 4 query heads


def test_s2ft_acts_where_it_has_shares_and_targets_name() -> None:
    def roles(spec: str, subject: str = "llama") -> set[str]:
        return {s.role for s in veneer.attach(SUBJECTS[subject].build(), spec, head=False).sites()}

    assert roles("s2ft") == {"attn.o", "mlp.down"}
    assert roles("s2ft(o=0)") == {"mlp.down"}
    assert roles("s2ft(v=1, u=1)") == {"attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert roles("s2ft(v=1, u=1, targets='attn.*')") == {"attn.v", "attn.o"}
    for targets in ("attn.q mlp.gate", "attn.v", "lm_head"):
        with pytest.raises(BadValue, match=r"train nothing of .*; target attn\.v, attn\.o, mlp\.up or mlp\.down"):
            veneer.attach(SUBJECTS["llama"].build(), registry.method("s2ft", targets=targets), head=False)
    with pytest.raises(NoMatch):
        veneer.attach(SUBJECTS["llama"].build(), "s2ft(targets='norm')", head=False)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("role", SIDES)
def test_scores_of_weights(role: str, smallest: bool) -> None:
    letter = role.split(".")[1][0]
    at = blocks_of(role, 1, 12, 24, heads=6, kv=3)[0]
    method = registry.method("s2ft", **{**dict.fromkeys("voud", 0.0), letter: 0.5}, selection="weight", smallest=smallest)
    W = draw(12, 24)
    p = method.init_from_weight(W, None, method.init(at, Generator()), at, Generator())
    units = {"v": 3, "o": 6}.get(letter, 12 if SIDES[role] else 24)
    parts = W.chunk(units, 0 if SIDES[role] else 1)
    order = sorted(range(units), key=lambda i: float(parts[i].norm()), reverse=not smallest)
    width = (12 if SIDES[role] else 24) // units
    assert p["I"].tolist() == [i * width + j for i in sorted(order[: units // 2]) for j in range(width)]
    if role == "mlp.down":
        paca = registry.method("paca", r=12, selection="weight", smallest=smallest)
        first = paca.init_from_weight(W, None, paca.init(at, Generator()), at, Generator())
        assert torch.equal(first["I"], p["I"]) and torch.equal(first["W_I"], W[:, p["I"]])


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("selection", ["activation", "product"])
@pytest.mark.parametrize("slug", ["paca", "s2ft"])
def test_scores_of_activations(slug: str, selection: str, smallest: bool) -> None:
    model = SUBJECTS["llama"].build()
    seen: dict[str, list[Tensor]] = {}
    for at in anatomy.sites(model):
        if at.role in ("attn.o", "mlp.down"):
            model.get_submodule(at.module).register_forward_pre_hook(lambda m, a, at=at: seen.setdefault(at.name, []).append(a[0]))
    batches = [SUBJECTS["llama"].batch(n) for n in range(2)]
    spec = {"paca": "paca(r=5, targets='attn.o mlp.down'", "s2ft": "s2ft(v=0.5, o=0.5, u=0.25, d=0.25"}[slug]
    tuned = veneer.attach(model, f"{spec}, selection={selection}, smallest={smallest})", head=False, batches=batches)
    assert {s.role for s in tuned.sites()} == ({"attn.o", "mlp.down"} if slug == "paca" else set(SIDES))
    for at, _, p in tuned.entries():
        W = model.get_submodule(at.module).weight.detach()
        source = next(n for n in seen if n.startswith(f"model.layers.{at.depth}.{'self_attn' if at.role.startswith('attn') else 'mlp'}."))
        flow = torch.cat([x.flatten(0, 1) for x in seen[source][: len(batches)]]).abs().mean(0)
        rows = slug == "s2ft" and SIDES[at.role]
        units = {"attn.v": 2, "attn.o": 4}.get(at.role, 32) if slug == "s2ft" else at.in_features
        score = flow.reshape(units, -1).mean(1)
        if selection == "product":
            score = score * torch.stack([w.norm() for w in W.chunk(units, 0 if rows else 1)])
        width = (at.out_features if rows else at.in_features) // units
        best = score.topk(len(p["I"]) // width, largest=not smallest).indices.sort().values
        assert torch.equal(p["I"], (best[:, None] * width + torch.arange(width)).flatten())


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("slug", ["paca", "s2ft"])
def test_scores_of_gradients(slug: str, smallest: bool, tmp_path: Path) -> None:
    subject = SUBJECTS["llama"]
    model, batches = subject.build(), [subject.batch(n) for n in range(2)]
    before = {n: p.clone() for n, p in model.named_parameters()}
    weights = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
    gradients = [dict(zip(weights, torch.autograd.grad(loss(model, batch), list(weights.values())))) for batch in batches]
    spec = {"paca": "paca(r=5, targets='attn.o mlp.up'", "s2ft": "s2ft(v=0.5, o=0.5, u=0.25, d=0.25"}[slug]
    tuned = veneer.attach(model, f"{spec}, selection=gradient, smallest={smallest})", head=False, batches=batches, loss=loss)
    for at, _, p in tuned.entries():
        rows = slug == "s2ft" and SIDES[at.role]
        units = {"attn.v": 2, "attn.o": 4}.get(at.role, 32) if slug == "s2ft" else at.in_features
        squares = torch.stack([sum(part.norm() ** 2 for part in parts) for parts in zip(
            *(one[f"{at.module}.weight"].chunk(units, 0 if rows else 1) for one in gradients)
        )])  # fmt: skip
        width = (at.out_features if rows else at.in_features) // units
        best = squares.sqrt().topk(len(p["I"]) // width, largest=not smallest).indices.sort().values
        assert torch.equal(p["I"], (best[:, None] * width + torch.arange(width)).flatten())
    held = {n: p for n, p in model.named_parameters() if n in before}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in held.items())
    stir(tuned).save(tmp_path)
    again = veneer.load(subject.build(), tmp_path)  # without data
    assert slices(again) and all(torch.equal(I, slices(tuned)[n]) for n, I in slices(again).items())
    assert torch.equal(subject.answers(again.model), subject.answers(model.eval()))


@pytest.mark.parametrize(("spec", "role"), [("paca(r=2", ""), ("s2ft(d=0.25, o=0", "mlp.down"), ("s2ft(u=0.25, d=0, o=0", "mlp.up")])
def test_planted_gradients_are_found(spec: str, role: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    G, wanted = 0.1 * torch.rand(8, 8), sorted(torch.randperm(8)[:2].tolist())
    if role == "mlp.up":
        G[wanted] += 1
    else:
        G[:, wanted] += 1

    def planted(model: Any, batch: Tensor) -> Tensor:
        return (model[0].weight * G).sum() + 0 * model(batch).sum()

    targets = role or "0"
    roles = {"0": role} if role else None
    tuned = veneer.attach(
        model, f"{spec}, selection=gradient, targets='{targets}')", head=False, roles=roles, batches=[torch.randn(2, 8)], loss=planted
    )
    ((_, _, p),) = tuned.entries()
    assert p["I"].tolist() == wanted


def test_scores_from_data_need_what_they_score() -> None:
    with pytest.raises(BadValue, match=r"starts from gradients: give batches with labels, or loss="):
        veneer.attach(nn.Sequential(nn.Linear(8, 8)), "paca(r=2, selection='gradient', targets='0')", batches=[torch.randn(2, 8)])
    with pytest.raises(BadValue, match=r"starts from data: pass batches"):
        veneer.attach(SUBJECTS["llama"].build(), "paca(selection='activation')", head=False)
    with pytest.raises(BadValue, match=r"S2FT: selection='activation' saw nothing of what flows through the units at .*; choose 'weight'"):
        spec = "s2ft(u=0.5, d=0, o=0, selection='activation')"  # down is not looked at
        veneer.attach(SUBJECTS["llama"].build(), spec, head=False, batches=[SUBJECTS["llama"].batch()])
    with pytest.raises(BadValue, match=r"needs the inputs of a linear layer, not of the parameter at"):
        registry.method("paca", selection="product").check(site("expert.down", "parameter", count=2))


# -- identity, rank, merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["paca(r=7, alpha=3)", "paca(r=3, alpha=10, form=difference)", "s2ft(v=1, u=0.5)"])
def test_starts_as_the_base_to_the_last_bit(spec: str, dtype: torch.dtype) -> None:
    subject = SUBJECTS["llama"]
    plain = subject.answers(subject.build(dtype))
    assert torch.equal(subject.answers(veneer.attach(subject.build(dtype), spec, head=False).model), plain)


@pytest.mark.parametrize("role", SIDES)
def test_s2ft_changes_its_slice_and_no_more(role: str) -> None:
    at, W = blocks_of(role)[0], draw(16, 16)
    method = registry.method("s2ft", v=0.5, o=0.25, u=0.25, d=0.25)
    at = method.select(blocks_of(role))[0]
    p = method.init(at, Generator())
    assert torch.equal(method.weight(W, {**p, "V": p["V"].double()}, at), W)
    p["V"] = draw(*p["V"].shape)
    W_eff = method.weight(W, p, at)
    moved = (W_eff != W).any(1 if SIDES[role] else 0)
    assert moved.nonzero().flatten().tolist() == sorted(p["I"].tolist())
    assert torch.linalg.matrix_rank(W_eff - W) == min(len(p["I"]), 16)
    L, R = method.low_rank(W, p, at)  # type: ignore[misc]
    assert torch.equal(L @ R, method.change(p, at))  # type: ignore[attr-defined]


def test_paca_replaces_its_columns_and_no_more() -> None:
    method, W = registry.method("paca", r=4, alpha=6), draw(12, 20)
    p = method.init_from_weight(W, None, method.init(site(), Generator()), site(), Generator())
    p["P"] = p["P"] + draw(12, 4)
    W_eff, rest = method.weight(W, p, site()), [i for i in range(20) if i not in p["I"].tolist()]
    near(W_eff[:, p["I"]], 1.5 * p["P"])
    assert torch.equal(W_eff[:, rest], W[:, rest]) and torch.linalg.matrix_rank(W_eff - W) == 4
    L, R = method.low_rank(W, p, site())  # type: ignore[misc]
    near(L, 1.5 * p["P"] - W[:, p["I"]])
    assert torch.equal(R, F.one_hot(p["I"], 20).double())


@pytest.mark.parametrize("spec", ["paca(r=3, alpha=6)", "s2ft(v=0.5, o=0.25, u=0.1, d=0.1)"])
def test_as_lora_without_loss(spec: str, tmp_path: Path) -> None:
    subject = SUBJECTS["llama"]
    tuned = stir(veneer.attach(subject.build(), spec, head=False))
    said: list[str] = []
    save_peft(tuned, tmp_path, as_lora=True, tell=said.append)
    again = veneer.load(subject.build(), tmp_path)
    near(subject.answers(again.model), subject.answers(tuned.model))
    assert again.adapters["default"].method.slug == "lora"


def test_s2ft_is_a_dense_slice_of_permuted_weights() -> None:
    """Chosen channels first, on both sides: the same function, with the trained part contiguous."""
    method, W_up, W_down, x = registry.method("s2ft", u=0.3, d=0.3), draw(24, 16), draw(16, 24), draw(2, 5, 16)
    up, down = (method.select([replace(blocks_of(r, 1, o, i)[0])])[0] for r, o, i in (("mlp.up", 24, 16), ("mlp.down", 16, 24)))
    p, q = ({k: t.double() if k == "V" else t for k, t in method.init(s, Generator()).items()} for s in (up, down))
    p["V"], q["V"] = draw(*p["V"].shape), draw(*q["V"].shape)
    plain = method.forward(DenseCall(W_down), method.forward(DenseCall(W_up), x, p, up).tanh(), q, down)
    both = [i for i in p["I"].tolist() if i in q["I"].tolist()]
    only_u, only_d = ([i for i in s["I"].tolist() if i not in both] for s in (p, q))
    order = [*only_u, *both, *only_d, *(i for i in range(24) if i not in (*only_u, *both, *only_d))]
    A, B = W_up[order], W_down[:, order]
    prefix, inner = slice(0, len(only_u) + len(both)), slice(len(only_u), len(only_u) + len(both) + len(only_d))
    near(F.linear(F.linear(x, A).tanh(), B), F.linear(F.linear(x, W_up).tanh(), W_down))
    place = {i: n for n, i in enumerate(order)}
    A[prefix] += p["V"][sorted(range(len(p["I"])), key=lambda n: place[int(p["I"][n])])]
    B[:, inner] += q["V"][:, sorted(range(len(q["I"])), key=lambda n: place[int(q["I"][n])])]
    near(F.linear(F.linear(x, A).tanh(), B), plain)


# -- training ---------------------------------------------------------------------------------------------------


def test_paca_has_s_times_the_gradient_of_a_full_fine_tune() -> None:
    method, W, x, g = registry.method("paca", r=4, alpha=10), draw(12, 20).requires_grad_(), draw(2, 5, 20), draw(2, 5, 12)
    F.linear(x, W).backward(g)
    p = method.init_from_weight(W.detach(), None, method.init(site(), Generator()), site(), Generator())
    p["P"] = p["P"].requires_grad_()
    method.forward(DenseCall(W.detach()), x, p, site()).backward(g)
    near(p["P"].grad, 2.5 * W.grad[:, p["I"]])  # type: ignore[index]


def descended(spec: str, rate: float, decay: float = 0.0, steps: int = 5) -> Tensor:
    """The weight of a layer after some steps of AdamW."""
    torch.manual_seed(3)
    tuned = linear_layer(20, 12, spec)
    x, target = draw(40, 20), draw(40, 12)
    optimiser = torch.optim.AdamW(tuned.parameters(), rate, weight_decay=decay, eps=0)
    for _ in range(steps):
        optimiser.zero_grad()
        (tuned.model(x) - target).square().mean().backward()
        optimiser.step()
    tuned.merge()
    return tuned.model[0].weight.detach()  # type: ignore[index, union-attr]


def test_s_multiplies_the_learning_rate_and_both_forms_agree_but_for_weight_decay() -> None:
    plain = descended("paca(r=4)", 4e-2)
    for same in (descended("paca(r=4, alpha=16)", 1e-2), descended("paca(r=4, alpha=16, form=difference)", 1e-2)):
        torch.testing.assert_close(same, plain, rtol=1e-8, atol=1e-8)
    columns_, difference = (descended(f"paca(r=4, form={form})", 1e-2, decay=5.0) for form in ("columns", "difference"))
    assert not torch.allclose(columns_, difference, atol=1e-3)


def kept(tuned: veneer.Tuned, x: Tensor) -> int:
    """Bytes kept for backward besides parameters, buffers and the input itself."""
    own = {t.untyped_storage().data_ptr() for t in (*tuned.model.parameters(), *tuned.model.buffers(), x)}
    seen: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tuned.model(x)
    return sum(seen.values())


@pytest.mark.parametrize("form", ["columns", "difference"])
def test_paca_keeps_r_numbers_a_token_whatever_the_input(form: str) -> None:
    tokens, r = 50, 4
    found = []
    for inside in (16, 64, 256):
        tuned = stir(linear_layer(inside, 12, f"paca(r={r}, form={form})", torch.float32))
        x = torch.randn(tokens, inside, requires_grad=True)
        found.append(kept(tuned, x))
        assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved(lambda: tuned.model(x)))  # noqa: B023
    assert found == [found[0]] * 3 and found[0] <= 4 * (tokens * r + 12 * r)


def saved(run: Callable[[], Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        run()
    return tensors


@pytest.mark.parametrize("s", [1, 5, 20])
def test_what_slices_keep(s: int) -> None:
    x, y, I = draw(3, 7, 40).requires_grad_(), draw(3, 7, 30).requires_grad_(), torch.randperm(30)[:s]
    V, U = draw(30, s).requires_grad_(), draw(s, 40).requires_grad_()
    assert sorted(t.numel() for t in saved(lambda: columns.add_columns(y, x, V, I))) == sorted([21 * s, 30 * s, s])
    assert sorted(t.data_ptr() for t in saved(lambda: columns.add_rows(y, x, U, I))) == sorted([x.data_ptr(), U.data_ptr(), I.data_ptr()])
    assert [t.numel() for t in saved(lambda: columns.add_columns(y, x, V.detach(), I))] == [30 * s, s]


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("rows", [False, True])
def test_kernels_are_their_reference(rows: bool, shape: tuple[int, ...]) -> None:
    lead, s = shape[:-1], shape[-1]
    x, y = draw(*lead, 9).requires_grad_(), draw(*lead, 8).requires_grad_()
    V, I = draw(*((s, 9) if rows else (8, s))).requires_grad_(), torch.randperm(8)[:s]
    add, place = (columns.add_rows, columns.in_rows) if rows else (columns.add_columns, columns.in_columns)
    size = 8 if rows else 9
    fast, plain = add(y, x, V, I), columns.reference(y, x, place(V, I, size))
    near(fast, plain)
    g = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, (y, x, V), g), torch.autograd.grad(plain, (y, x, V), g)):
        near(a, b)
    if x.numel():
        assert torch.autograd.gradcheck(lambda y, x, V: add(y, x, V, I), (y, x, V))
        wide = draw(*lead[:-1], *(lead[-1:] or (1,)), 18)[..., ::2] if lead else draw(18)[::2]  # not contiguous
        near(add(y, wide, V, I), columns.reference(y, wide, place(V, I, size)))
    assert torch.equal(place(V, I, size), place(V.flip(0 if rows else 1), I.flip(0), size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("role", ["attn.o", "attn.v"])
def test_half_precision_inputs_give_half_precision_outputs(role: str, dtype: torch.dtype) -> None:
    at, method = site(role, heads=4, kv_heads=4), registry.method("s2ft")
    p = {"V": torch.randn(*((12, 6) if role == "attn.o" else (6, 20)), requires_grad=True), "I": torch.randperm(12)[:6]}
    x, W = torch.randn(2, 5, 20).to(dtype).requires_grad_(), torch.randn(12, 20).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        y, d = method.forward(DenseCall(W), x, p, at), method.delta(x, p, at)  # type: ignore[attr-defined]
    assert y.dtype == d.dtype == dtype
    exact = method.change(p, at)  # type: ignore[attr-defined]
    torch.testing.assert_close(d.float(), x.float() @ exact.T, rtol=0.05, atol=0.05)
    torch.testing.assert_close(y.float(), x.float() @ (W.float() + exact).T, rtol=0.05, atol=0.1)
    (y + d).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and p["V"].grad.dtype == torch.float32  # type: ignore[union-attr]


def test_paca_over_four_bits_begins_at_the_columns_that_are_there() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, True, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    model = nn.Sequential(layer.to("cpu")).train()
    x = torch.randn(6, 64)
    plain = model(x)
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    tuned = veneer.attach(model, "paca(r=5, alpha=10, targets='0')", head=False)
    ((_, _, p),) = tuned.entries()
    assert torch.equal(p["W_I"], W[:, p["I"]]) and torch.equal(p["P"], W[:, p["I"]] / 2) and torch.equal(model(x), plain)
    stir(tuned)
    W[:, p["I"]] = 2 * p["P"].detach()
    torch.testing.assert_close(model(x), F.linear(x, W, layer.bias), rtol=1e-4, atol=1e-4)


def test_columns_trained_over_four_bits_are_written_into_the_full_weight_and_taken_out_again(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 32)
    packed = bnb.nn.Linear4bit(64, 32, True, compute_dtype=torch.float32, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
    packed.bias = plain.bias
    model = nn.Sequential(packed.to("cpu")).train()
    tuned = stir(veneer.attach(model, "paca(r=5, alpha=10, targets='0')", head=False))
    x = torch.randn(6, 64)
    with pytest.raises(Unsupported, match="16 or 32 bit"):
        tuned.merge()
    tuned.save(tmp_path)
    unpacked = nn.Linear(64, 32)
    unpacked.weight.data = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
    unpacked.bias = plain.bias
    W = unpacked.weight.detach().clone()
    again = veneer.load(nn.Sequential(unpacked), tmp_path)
    ((_, _, p),) = again.entries()
    merged: Any = again.merge().model
    torch.testing.assert_close(merged[0].weight[:, p["I"]], 2 * p["P"].detach(), rtol=1e-6, atol=1e-6)
    rest = [i for i in range(64) if i not in p["I"].tolist()]
    assert torch.equal(merged[0].weight[:, rest], W[:, rest])
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
    again.unmerge()
    assert torch.equal(merged[0].weight, W) and merged[0].weight is unpacked.weight


# -- several adapters -------------------------------------------------------------------------------------------

FULL = "s2ft(v=0.5, o=0.25, u=0.1, d=0.1, seed={})"


def two(a: str, b: str) -> tuple[veneer.Tuned, Tensor]:
    subject = SUBJECTS["llama"]
    model = subject.build()
    plain = subject.answers(model)
    for name, spec in (("a", a), ("b", b)):
        stir(veneer.attach(model, spec, name, head=False), name)
    return veneer.of(model), plain


def weights(tuned: veneer.Tuned, active: Any) -> dict[str, Tensor]:
    tuned.activate(active).merge()
    found = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if "veneer" not in n}
    tuned.unmerge()
    return found


@pytest.mark.parametrize("specs", [(FULL.format(0), FULL.format(1)), ("paca(r=3, seed=0)", "paca(r=4, alpha=6, seed=1)")])
def test_fusion_is_the_weighted_sum_of_scattered_slices(specs: tuple[str, str]) -> None:
    tuned, _ = two(*specs)
    base = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if "veneer" not in n}
    fused = weights(tuned, {"a": 0.5, "b": 0.5})
    for name, W in base.items():
        expected = W.clone()
        for adapter in "ab":
            for at, method, p in tuned.entries(adapter):
                if name == f"{at.module}.weight":
                    V = 0.5 * method.values(p).detach()  # type: ignore[attr-defined]
                    expected.index_add_(0 if method.rows(at) else 1, p["I"], V)  # type: ignore[attr-defined]
        near(fused[name], expected)


def test_disjoint_slices_do_not_interact() -> None:
    tuned, _ = two(*(f"s2ft(o=0.5, d=0.5, selection=weight, smallest={smallest})" for smallest in (False, True)))
    mine, theirs = slices(tuned, "a"), slices(tuned, "b")
    each, fused = {n: weights(tuned, n) for n in "ab"}, weights(tuned, ["a", "b"])
    for at in tuned.sites():
        name = f"{at.module}.weight"
        assert sorted([*mine[at.name].tolist(), *theirs[at.name].tolist()]) == list(range(at.in_features))
        for adapter, I in (("a", mine[at.name]), ("b", theirs[at.name])):
            near(fused[name][:, I], each[adapter][name][:, I])


def test_switching_back_and_forth_is_exact() -> None:
    tuned, plain = two(FULL.format(0), FULL.format(1))
    subject, model = SUBJECTS["llama"], tuned.model
    first = {n: subject.answers(tuned.activate(n).model) for n in "ab"}
    assert not torch.allclose(first["a"], first["b"]) and not torch.allclose(first["a"], plain)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in "abab":
        assert torch.equal(subject.answers(tuned.activate(name).model), first[name])
        tuned.merge().unmerge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with tuned.disabled():
        assert torch.equal(subject.answers(model), plain)


@pytest.mark.parametrize("specs", [(FULL.format(0), FULL.format(1)), (FULL.format(2), "paca(r=4)"), ("lora(r=2)", FULL.format(1))])
def test_rows_of_one_batch_with_adapters_of_their_own(specs: tuple[str, str]) -> None:
    tuned, plain = two(*specs)
    subject = SUBJECTS["llama"]
    alone = {n: subject.answers(tuned.activate(n).model) for n in "ab"}
    names = ["b", None, "a", "b"]
    together = subject.answers(tuned.activate(per_row=names).model)
    for row, name in enumerate(names):
        near(together[row], plain[row] if name is None else alone[name][row])
    loss(tuned.model, subject.batch()).backward()
    assert all(p.grad is not None and p.grad.any() for n in "ab" for p in tuned.parameters(n))


# -- files and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("paca(r=3)", {"P", "W_I"}),
        ("paca(r=3, form=difference)", {"Delta"}),
        ("paca(r=3, selection='weight')", {"P", "W_I", "I"}),
        ("s2ft(v=0.5, u=0.2)", {"V"}),
        ("s2ft(v=0.5, u=0.2, selection='weight')", {"V", "I"}),
    ],
)
def test_files_leave_out_what_a_seed_gives_again(spec: str, names: set[str], tmp_path: Path) -> None:
    subject = SUBJECTS["llama"]
    tuned = stir(veneer.attach(subject.build(), spec, head=False))
    tuned.save(tmp_path)
    assert {key.rpartition("/")[2] for key in load_file(tmp_path / "adapter.safetensors")} == names
    again = veneer.load(subject.build(), tmp_path)
    assert torch.equal(subject.answers(again.model), subject.answers(tuned.model))
    assert {key.rpartition("/")[2] for key, _ in again.named_parameters()} == names & {"P", "Delta", "V"}


@pytest.mark.parametrize("broken", ["outside", "twice", "negative", "a float"])
@pytest.mark.parametrize(
    "spec", ["paca(r=3, selection=weight)", "s2ft(o=0.5, d=0.2, selection=weight)", "s2ft(v=1, o=0, u=0.2, d=0, selection=weight)"]
)
def test_positions_outside_the_weight_are_not_read(spec: str, broken: str, tmp_path: Path) -> None:
    veneer.attach(SUBJECTS["llama"].build(), spec, head=False).save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    key = next(k for k in tensors if k.endswith("/I") and len(tensors[k]) > 1)
    I = tensors[key].clone()
    I[-1] = {"outside": 32 if "mlp" in key else 16, "twice": int(I[0]), "negative": -1}.get(broken, int(I[-1]))
    tensors[key] = I.float() if broken == "a float" else I
    save_file(tensors, tmp_path / "adapter.safetensors", metadata={"veneer": (tmp_path / "veneer.json").read_text()})
    with pytest.raises(BadFile, match="positions"):
        veneer.load(SUBJECTS["llama"].build(), tmp_path)


@pytest.mark.parametrize(("slug", "role"), [("paca", "attn.q"), ("s2ft", "attn.o"), ("s2ft", "mlp.up")])
def test_slices_of_another_size_than_their_positions_are_refused(slug: str, role: str) -> None:
    at, method = blocks_of(role, 1)[0], registry.method(slug, **({"u": 0.5, "o": 0.5} if slug == "s2ft" else {}))
    p = method.init(at, Generator())
    method.check_tensors(p, at)
    for bad in ({"I": p["I"][:-1]}, {"I": p["I"][None]}):
        with pytest.raises(BadValue, match="do not fit a slice"):
            method.check_tensors({**p, **bad}, at)


REFUSED: list[tuple[str, Site, str]] = [
    ("paca(r=21)", site(), "PaCA: r=21 is more than the 20 columns at site; choose r ≤ 20."),
    ("s2ft(o=0.1)", blocks_of("attn.o", 2)[0], "S2FT: o=0.1 of 8 heads is less than one at layers.0.attn.o; choose o ≥ 0.125."),
    ("s2ft(u=0.01)", blocks_of("mlp.up", 3)[1], "S2FT: u=0.01 of 48 channels is less than one at layers.1.mlp.up; choose u ≥ 0.0209."),
    ("s2ft", site("attn.o"), "S2FT: the number of heads is not known at site; choose other targets."),
    ("s2ft", site("attn.o", heads=3), "S2FT: 3 heads do not divide the 20 features at site; choose other targets."),
    ("s2ft(v=0.5)", site("attn.v", heads=5, kv_heads=5), "S2FT: 5 heads do not divide the 12 features at site; choose other targets."),
    ("s2ft", site("attn.q", heads=4), "S2FT: role 'attn.q' has no slice at site; target attn.v, attn.o, mlp.up or mlp.down."),
]


@pytest.mark.parametrize(("spec", "at", "said"), REFUSED)
def test_refuses_what_does_not_fit(spec: str, at: Site, said: str) -> None:
    with pytest.raises(BadValue) as refused:
        veneer.parse(spec).check(at)
    assert str(refused.value) == said


def test_refused_shares_name_one_that_fits() -> None:
    for depth in range(1, 40):
        at = blocks_of("attn.o", depth, heads=4)[0]
        with pytest.raises(BadValue) as refused:
            registry.method("s2ft", o=1e-4).check(at)
        registry.method("s2ft", o=float(str(refused.value).rpartition("≥ ")[2].rstrip("."))).check(at)


def test_the_usual_shares_are_one_unit_at_least() -> None:
    for role in ("attn.o", "mlp.down"):
        assert sum(len(registry.method("s2ft").init(s, Generator())["I"]) for s in blocks_of(role, 1)) == (4 if role == "attn.o" else 1)


@pytest.mark.parametrize("hyper", [{"d": 1.5}, {"o": -0.1}, {"v": 0, "o": 0, "u": 0, "d": 0}])
def test_refuses_shares_that_are_none(hyper: dict[str, float]) -> None:
    with pytest.raises(BadValue, match=r"S2FT: .*(out of range|leave nothing to train)"):
        registry.method("s2ft", **hyper)


@pytest.mark.parametrize("targets", ["embed.token", "norm"])
@pytest.mark.parametrize("slug", ["paca", "s2ft"])
def test_refuses_layers_that_are_not_linear(slug: str, targets: str) -> None:
    with pytest.raises(NoMatch):
        veneer.attach(SUBJECTS["bert"].build(), registry.method(slug, targets=targets), head=False)


@pytest.mark.parametrize(
    "spec",
    [
        "paca(r=3, alpha=5, targets='expert.*')",
        "s2ft(u=0.2, d=0.2, targets='expert.*')",
        "paca(r=3, targets='expert.*', selection=gradient)",
        "s2ft(u=0.2, d=0.2, targets='expert.*', selection=gradient)",
    ],
)
def test_stacked_experts_have_a_slice_each(spec: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model, ids = tiny.spread(MixtralForCausalLM(config)).eval(), torch.randint(48, (2, 5))
    with torch.no_grad():
        plain = model(ids).logits
        tuned = veneer.attach(model, spec, head=False, batches=[{"input_ids": ids, "labels": ids}])
        assert torch.equal(model(ids).logits, plain)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "veneer" not in n}
        adapted = stir(tuned).model(ids).logits
        torch.testing.assert_close(tuned.merge().model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
        for at, method, p in tuned.entries():
            held = dict(model.named_parameters())[f"{at.module}.{at.parameter}"]
            changed = (held != before[f"{at.module}.{at.parameter}"])[slice(None), slice(*at.rows) if at.rows else slice(None)]
            rows = method.rows(at)  # type: ignore[attr-defined]
            for e in range(4):
                assert changed[e].any(1 if rows else 0).nonzero().flatten().tolist() == sorted(p["I"][e].tolist())
