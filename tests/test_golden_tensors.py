"""LoRTA, LoRETTA and TLoRA against numbers from other code, and against their own laws."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_golden import HOME, Case, DenseCall, checked, site
from tiny import SUBJECTS, loss, t5
from torch import Generator, Tensor

import veneer
import veneer.registry as registry
from veneer.errors import BadValue, Mismatch, Unsupported
from veneer.maths import tensor_ring, tensor_train
from veneer.method import Method, Params
from veneer.site import Site
from veneer.tuned import Tuned


@pytest.fixture(autouse=True)
def _doubles(_global_seed: None) -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def moved(method: Method, *sites: Site, size: float = 0.3, grad: bool = False) -> Params:
    """First tensors of these sites, all moved by random numbers."""
    p = {**method.init_shared(sites, Generator()), **method.init(sites[0], Generator())}
    return {k: (t.double() + size * torch.randn(t.shape)).requires_grad_(grad) for k, t in p.items()}


def counted(method: Method, *sites: Site) -> int:
    tied = {method.tie(s): s for s in sites} if method.init_shared(sites, Generator()) else {}
    shared = sum(
        t.numel() for group in tied for t in method.init_shared([s for s in sites if method.tie(s) == group], Generator()).values()
    )
    return shared + sum(t.numel() for s in sites for t in method.init(s, Generator()).values() if not tied)


def published(slug: str) -> dict[str, int]:
    return {c["model"]: c["trainable"] for c in json.loads((HOME / f"{slug}.json").read_text())["counts"][:2]}


def stirred(tuned: Tuned, size: float = 0.15) -> Tuned:
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape).to(p)
    return tuned


def refused(method: Method, at: Site, words: str) -> None:
    with pytest.raises(BadValue, match=words) as error:
        method.check(at)
    assert "\n" not in str(error.value) and at.name in str(error.value)


# -- LoRTA ------------------------------------------------------------------------------------------------------


def projection(matrix: str, layer: int = 0, layers: int = 2, d: int = 12, heads: int = 3, wide: int | None = None) -> Site:
    wide = wide or d
    out, inside = (d, wide) if matrix == "o" else (wide, d)
    facts: dict[str, Any] = {"index": layer, "length": layers, "heads": heads, "kv_heads": heads, "head_dim": wide // heads}
    return replace(site(f"attn.{matrix}", out=out, inside=inside, **facts), depth=layer)


@pytest.mark.parametrize("index", [0, 1])
def test_lorta_golden(index: int) -> None:
    case = Case("lorta", index)
    method = registry.method("lorta", r=3, alpha=6, layout=case.hyper["layout"])
    for layer in range(2):
        for matrix in "qkvo":
            own = Case("lorta", index)
            own.update({"W_eff": case[f"W_eff.{layer}.{matrix}"], "y": case[f"y.{layer}.{matrix}"]})
            at, W = projection(matrix, layer), case[f"W.{layer}.{matrix}"]
            checked(method, own, W, at)
            own.agree("y", F.linear(case["x"], W) + method.delta(case["x"], case.params(), at))
            L, R = method.low_rank(W, case.params(), at)
            close(W + L @ R, case[f"W_eff.{layer}.{matrix}"])


def test_lorta_layouts() -> None:
    paper, outside, inside = (registry.method("lorta", r=3, alpha=6, layout=name) for name in ("paper", "heads_out", "heads_in"))
    p, x = moved(paper, projection("q")), torch.randn(2, 5, 12)
    for matrix in "qkvo":
        at = projection(matrix, 1)
        close(paper.change(p, at), (inside if matrix == "o" else outside).change(p, at))
        close(outside.change(p, at), inside.change(p, at).T)
        for method in (paper, outside, inside):
            close(method.delta(x, p, at), x @ method.change(p, at).T)
    tensor = torch.einsum("ik,kj,hk,lk,mk->ijhlm", *(p[name] for name in ("A", "B", "C_H", "C_L", "C_M")))
    for m, matrix in enumerate("qkvo"):
        D = 2 * tensor[..., 1, m].permute(0, 2, 1).flatten(1)  # heads side by side
        close(inside.change(p, projection(matrix, 1)), D)


def test_lorta_scales_and_ranks() -> None:
    method = registry.method("lorta", r=2, alpha=6, rslora=True)
    p, at = moved(method, projection("q")), projection("v")
    change = method.change(p, at)
    assert all(torch.linalg.matrix_rank(block) <= 2 for block in change.split(4))
    both = torch.cat([method.change(p, projection(m, layer)).T for m in "qkv" for layer in (0, 1)], 1)
    assert torch.linalg.matrix_rank(both) == 2  # one column space: that of A
    close(method.change({**p, "C_M": p["C_M"] * torch.tensor([1.0, 1, -3, 1])[:, None]}, at), -3 * change)
    same = {**p, "C_L": p["C_L"][:1].repeat(2, 1)}
    close(method.change(same, projection("v", 0)), method.change(same, projection("v", 1)))
    assert method.scale == pytest.approx(6 / 2**0.5) and registry.method("lorta").scale == 1


@pytest.mark.parametrize("untie", ["layers", "matrices"])
def test_lorta_untied(untie: str) -> None:
    method, sites = registry.method("lorta", r=3, untie=untie), [projection(m, layer) for layer in (0, 1) for m in "qkvo"]
    p, n = moved(method, *sites), 2 if untie == "layers" else 4
    assert counted(method, *sites) == n * 3 * (12 + 4 + 3 + (4 if untie == "layers" else 2))
    tied, missing = registry.method("lorta", r=3), "C_L" if untie == "layers" else "C_M"
    for at in sites:
        own = {k: t[at.index if untie == "layers" else "qkvo".index(at.role[-1])] for k, t in p.items()}
        own[missing] = torch.ones(n, 3)
        close(method.change(p, at), tied.change(own, at))


def test_lorta_start() -> None:
    sites = [projection(m) for m in "qkvo"]
    for init_scale, bound in ((0.0, (6 / 8) ** 0.5), (1.0, 8**-0.5)):
        method = registry.method("lorta", init_scale=init_scale)
        p = method.init_shared(sites, Generator().manual_seed(int(torch.randint(99, ()))))
        assert all(0.6 * bound < float(p[name].abs().max()) <= bound for name in ("C_H", "C_L", "C_M"))
        assert not p["B"].any() and 0.8 * 8**-0.5 < float(p["A"].abs().max()) <= 8**-0.5
    p = {k: t.double().requires_grad_() for k, t in p.items()}
    method.forward(DenseCall(torch.randn(12, 12)), torch.randn(5, 12), p, sites[0]).square().sum().backward()
    assert {k for k, t in p.items() if t.grad.any()} == {"B"}


def test_lorta_counts() -> None:
    counts = published("lorta")
    for model, r, d, heads, layers in (("RoBERTa-base", 4, 768, 12, 12), ("LLaMA-2-7B", 4, 4096, 32, 32)):
        sites = [projection(m, 0, layers, d, heads) for m in "qkvo"]
        assert counted(registry.method("lorta", r=r), *sites) == counts[model]
        assert counted(registry.method("lorta", r=r), sites[0]) == counts[model]  # whatever is targeted
    assert counted(registry.method("lorta", r=8), projection("q", 0, 24, 1024, 16)) == 9056
    assert counted(registry.method("lorta", r=1), projection("q", 0, 32, 4096, 32)) == 4292


def test_lorta_refuses() -> None:
    method = registry.method("lorta")
    refused(method, site("mlp.down"), "not for the .mlp.down. at site")
    refused(method, site("attn.qkv", heads=3), "interleaved at site; target 'attn.o'")
    refused(method, site("attn.q"), "heads is not known")
    refused(
        method, site("attn.k", heads=4, kv_heads=2, head_dim=4), "4 query heads share 2 key and value heads at site; target 'attn.q attn.o'"
    )
    refused(registry.method("lorta", layout="heads_in"), site("attn.q", 12, inside=20, heads=3, kv_heads=3), "3 heads do not divide 20")
    wide = [projection(m, wide=24) for m in "qkvo"]  # heads wider than d / H: legal in the paper's layout
    assert method.init_shared(wide, Generator())["B"].shape == (8, 8)
    with pytest.raises(BadValue, match=r"share tensors.*\(24, 4, 3, 2\) and \(12, 8, 3, 2\); choose layout='paper'"):
        registry.method("lorta", layout="heads_in").init_shared(wide, Generator())
    with pytest.raises(BadValue, match="give the site of an attention projection"):
        method.weight(torch.randn(12, 12), moved(method, projection("q")))
    with pytest.raises(BadValue, match=r"LoRTA: 4 query heads share 2 .* target 'attn.q attn.o'"):
        veneer.attach(SUBJECTS["llama"].build(), method)


def test_lorta_on_a_model_with_grouped_heads() -> None:
    model = SUBJECTS["llama"].build()
    tuned = stirred(veneer.attach(model, "lorta(targets='attn.q attn.o')", head=False))
    before = SUBJECTS["llama"].answers(model)
    close(SUBJECTS["llama"].answers(tuned.merge().model), before)


def test_lorta_has_one_set_for_each_stack(tmp_path: Path) -> None:
    model = t5().double().eval()
    plain, batch = copy.deepcopy(model), {"input_ids": torch.randint(2, 48, (4, 6)), "decoder_input_ids": torch.randint(2, 48, (4, 6))}
    targets = "attn.q attn.k attn.v attn.o cross.q cross.k cross.v cross.o"
    tuned = stirred(veneer.attach(model, registry.method("lorta", targets=targets), head=False))
    with torch.no_grad():
        before = model(**batch).logits
    names = {key.rpartition("/")[0] for key in load_file(tuned.save(tmp_path) / "adapter.safetensors")}
    assert names == {"0/@encoder", "0/@decoder", "0/@decoder.cross"}
    assert tuned.summary().trained == 3 * 8 * (16 + 4 + 4 + 2 + 4)
    with torch.no_grad():
        close(veneer.load(plain, tmp_path).model(**batch).logits, before)
        close(tuned.merge().model(**batch).logits, before)


def test_lorta_refuses_a_model_of_another_depth(tmp_path: Path) -> None:
    tuned = stirred(veneer.attach(SUBJECTS["vit"].build(), "lorta(r=3)", head=False))
    tuned.save(tmp_path)
    with pytest.raises(Mismatch, match=r"'C_L', shared by 12 sites, is \[2, 3\], and this model needs \[3, 3\].* depth or width"):
        veneer.load(SUBJECTS["vit"].build(depth=3), tmp_path)
    with pytest.raises(Mismatch, match="has no site"):
        veneer.load(SUBJECTS["vit"].build(depth=1), tmp_path)
    with pytest.raises(Mismatch, match=r"expects \[16, 16\]"):
        veneer.load(SUBJECTS["vit"].build(width=32), tmp_path)
    again = veneer.load(SUBJECTS["vit"].build(), tmp_path)
    assert torch.equal(SUBJECTS["vit"].answers(again.model), SUBJECTS["vit"].answers(tuned.model))


# -- LoRETTA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_loretta_rep_golden(index: int) -> None:
    case = Case("loretta", index)
    h = case.hyper
    method = registry.method("loretta", **{k: h[k] for k in ("variant", "r", "tt_rank", "shape_A", "shape_B", "alpha")})
    method.check(site())
    checked(method, case, case["W"], site())
    case.agree("y", F.linear(case["x"], case["W"], case["b"]) + method.delta(case["x"], case.params(), site()))
    assert {k: t.shape for k, t in method.init(site(), Generator()).items()} == {k: t.shape for k, t in case.params().items()}


def test_loretta_adp_golden() -> None:
    case = Case("loretta", 2)
    h = case.hyper
    names = ("variant", "bottleneck", "tt_rank", "shape_down", "shape_up", "activation", "scaling")
    options = {"gamma" if k == "scaling" else k: h[k] for k in names}
    method = registry.method("loretta", **options)
    case.agree("y", method.forward(DenseCall(case["W"], case["b"]), case["x"], case.params(), site()))
    assert {k: t.shape for k, t in method.init(site(), Generator()).items()} == {k: t.shape for k, t in case.params().items()}


def adapter(z: Tensor, p: Params, method: Any) -> Tensor:
    """The adapter from full matrices, entry by entry of the trains."""
    down, up = (full([p[f"{name}{d}"] for d in range(9) if f"{name}{d}" in p]) for name in ("G_down", "G_up"))
    u = getattr(torch, method.act)(z @ down.reshape(z.shape[-1], -1) + p["b_down"])
    return p.get("gamma", method.gamma) * (u @ up.reshape(len(p["b_down"]), -1) + p["b_up"])


def full(cores: list[Tensor]) -> Tensor:
    out = cores[0][0]
    for G in cores[1:]:
        out = torch.tensordot(out, G, 1)
    return out.squeeze(-1)


@pytest.mark.parametrize("placement", ["output", "input", "parallel"])
@pytest.mark.parametrize("learned", [False, True])
def test_loretta_adp_placements(placement: str, learned: bool) -> None:
    options: dict[str, Any] = {"variant": "adp", "act": "tanh", "gamma": 0.7, "bottleneck": 8, "tt_rank": 3, "learned_gamma": learned}
    method, at, W, b = registry.method("loretta", placement=placement, **options), site(), torch.randn(12, 20), torch.randn(12)
    method.check(at)
    p, x = moved(method, at), torch.randn(2, 5, 20)
    y = F.linear(x, W, b)
    wanted = {
        "output": lambda: y + adapter(y, p, method),
        "input": lambda: F.linear(x + adapter(x, p, method), W, b),
        "parallel": lambda: y + adapter(x, p, method),
    }[placement]()
    close(method.forward(DenseCall(W, b), x, p, at), wanted)


@pytest.mark.parametrize(("rows", "shape"), [(20, (4, 5, 4)), (20, (8, 5, 2)), (12, (3, 4, 4)), (7, (7, 8)), (3, (12,))])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_trains(rows: int, shape: tuple[int, ...], rank: int) -> None:
    cores = tensor_train.random_cores(shape, tensor_train.bonds(shape, rank, False), 1.0, Generator().manual_seed(rank))
    cores = [G.double() for G in cores]
    M = full(cores).reshape(rows, -1)
    close(tensor_train.matrix(cores, rows, -1), M)
    close(tensor_train.matrix(cores, -1, M.shape[1]), M)
    x = torch.randn(2, 5, rows)
    close(tensor_train.through(x, cores, rows), x @ M)


def test_a_train_across_an_aligned_thin_bond_keeps_only_the_bond() -> None:
    cores = [torch.randn(*shape, requires_grad=True) for shape in ((1, 8, 2), (2, 8, 2), (2, 4, 2), (2, 4, 1))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tensor_train.through(torch.randn(5, 64), cores, 64)
    assert not any(t.numel() == 64 * 16 for t in kept)


def test_loretta_first_values() -> None:
    method, at = registry.method("loretta", variant="adp", tt_rank=3), site(out=768, inside=768)
    p = method.init(at, Generator().manual_seed(int(torch.randint(999, ()))))
    assert float(p["b_down"].abs().max()) <= 64**-0.5 and float(p["b_up"].abs().max()) <= 768**-0.5
    spread = []
    for seed in range(60):
        cores = tensor_train.random_cores((4, 5, 4), [1, 3, 3, 1], 0.2, Generator().manual_seed(seed + int(torch.randint(999, ()))))
        spread.append(full(cores).square().mean())
    assert 0.7 < float(torch.stack(spread).mean().sqrt()) / 0.2 < 1.3
    for variant in ("rep", "adp"):
        zero = registry.method("loretta", variant=variant, start="zero_last", bottleneck=8)
        W, x, p = torch.randn(12, 20), torch.randn(5, 20), zero.init(site(), Generator())
        assert torch.equal(zero.forward(DenseCall(W), x, {k: t.double() for k, t in p.items()}, site()), F.linear(x, W))
        assert "identity" not in zero.limits and "identity" in registry.method("loretta", variant=variant).limits


def test_loretta_bonds_can_be_clipped() -> None:
    wide, clipped = (registry.method("loretta", tt_rank=8, clip=clip) for clip in (False, True))
    assert counted(wide, site(out=4096, inside=4096)) == 2 * 1952
    assert [p.shape[2] for p in clipped.init(site(out=4096, inside=4096), Generator()).values()] == 2 * [8, 8, 8, 4, 1]


def test_loretta_counts() -> None:
    counts = published("loretta")
    square = site(out=4096, inside=4096)
    assert 64 * counted(registry.method("loretta", tt_rank=8), square) + 65 * 4096 == 516_096
    adp = registry.method("loretta", variant="adp", tt_rank=8)
    assert 64 * counted(adp, square) + 65 * 4096 == counts["LLaMA-2-7B"]
    adp = registry.method("loretta", variant="adp")
    head = tensor_train.usual_shape(768, 768)
    train = sum(math.prod(G.shape) for G in tensor_train.random_cores(head, tensor_train.bonds(head, 5, False), 1.0, Generator()))
    assert 24 * counted(adp, site(out=768, inside=768)) + 25 * 2 * 768 + train + 768 + 2 * 768 + 2 == counts["DeBERTa-base"]


def test_loretta_shapes() -> None:
    for n in (1, 3, 16, 18, 20, 128, 6144, 16 * 7 * 16, 2048 * 8, 14336 * 8, 13824 * 8):
        shape = tensor_train.even_shape(n)
        assert shape is not None and math.prod(shape) == n and max(shape) <= 16, (n, shape)
        assert min(shape) >= 4 or n < 20, (n, shape)
    assert tensor_train.even_shape(11008 * 8) is None and tensor_train.usual_shape(8, 768) == (8, 8, 12, 8)


def test_loretta_refuses() -> None:
    method = registry.method("loretta")
    refused(method, site(inside=11008), r"11008·8 at site has no factors from 4 to 16; choose shape_A=\(.*\) there")
    refused(
        registry.method("loretta", shape_A=(4, 5)),
        site(),
        r"shape_A=\(4, 5\) does not multiply to 20·8 at site; choose shape_A=\(\d+, \d+\)",
    )
    refused(registry.method("loretta", shape_up=(4, -4, -6)), site(), r"shape_B=\(4, -4, -6\) does not multiply to 8·12")
    adp = registry.method("loretta", variant="adp", bottleneck=4)
    refused(adp, site(kind="conv"), "output of a conv at site is not defined")
    refused(registry.method("loretta", variant="adp", placement="input"), site("mlp", "branch", 16, 16), "input of a branch at site")
    with pytest.raises(Unsupported, match="cannot be folded into a weight: the bottleneck is nonlinear"):
        adp.weight(torch.randn(12, 20), moved(adp, site()))
    assert not adp.foldable and adp.low_rank(torch.randn(12, 20), {}, site()) is None and not adp.adds(site())


@pytest.mark.parametrize("targets", [None, "attn.q mlp.down"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_loretta_adp_in_models(family: str, targets: str | None, tmp_path: Path) -> None:
    subject = SUBJECTS[family]
    method = registry.method("loretta", variant="adp", bottleneck=8, act="tanh", start="zero_last", learned_gamma=True, targets=targets)
    model, plain = subject.build(), subject.answers(subject.build()).detach()
    tuned = veneer.attach(model, method, head=False)
    assert len(tuned.sites()) == 4 and torch.equal(subject.answers(model), plain)
    before = subject.answers(stirred(tuned).model).detach()
    assert float((before - plain).abs().max()) > 1e-6
    again = veneer.load(subject.build(), tuned.save(tmp_path))
    assert torch.equal(subject.answers(again.model), before)
    with pytest.raises(Unsupported, match="nonlinear"):
        tuned.merge()
    mixed = subject.answers(tuned.activate(per_row=["default", None, "default", None]).model)
    close(mixed[::2], before[::2])
    close(mixed[1::2], plain[1::2])
    tuned.activate("default")
    found = torch.autograd.grad(loss(model.train(), subject.batch()), tuned.parameters())
    assert all(g.abs().max() > 0 for g in found)
    if family == "bert":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        again_found = torch.autograd.grad(loss(compiled, subject.batch()), tuned.parameters())  # type: ignore[arg-type]
        for a, b in zip(again_found, found):
            close(a, b, 1e-8)
    half = veneer.attach(subject.build(torch.bfloat16), method, head=False)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert subject.answers(half.model).dtype == torch.bfloat16


# -- TLoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_tlora_golden(index: int) -> None:
    case = Case("tlora", index)
    h, p = case.hyper, case.params()
    method = registry.method("tlora", **h)
    method.check(site())
    checked(method, case, case["W"], site())
    A = tensor_ring.cores_of(p, "A")
    case.agree("T", tensor_ring.dense(A))
    case.agree("T", tensor_ring.along(torch.eye(20), A).T)
    case.agree("delta_res", torch.matmul(*method.factors(p)))
    case.agree("loss.R_I", tensor_ring.from_identity(A).reshape(case["loss.R_I"].shape))
    case.agree("loss.R_O", tensor_ring.from_orthogonal(A).reshape(case["loss.R_O"].shape))
    assert {k: t.shape for k, t in method.init(site(), Generator()).items()} == {k: t.shape for k, t in p.items()}


@pytest.mark.parametrize("residual", ["tr", "lora"])
@pytest.mark.parametrize("options", [{}, {"D": 1}, {"D": 2, "R_T": 3}, {"D": 4, "R_T": 1}, {"in_dims": (2, 2, 5), "out_dims": (12,)}])
def test_tlora_paths_agree(options: dict[str, Any], residual: str) -> None:
    method, at, W, b = registry.method("tlora", residual=residual, R_res=3, **options), site(), torch.randn(12, 20), torch.randn(12)
    method.check(at)
    p, x = moved(method, at, grad=True), torch.randn(2, 5, 20, requires_grad=True)
    A, towards = tensor_ring.cores_of(p, "A"), torch.randn(2, 5, 12)
    close(tensor_ring.along(x, A), x @ tensor_ring.dense(A).T)
    fast = method.forward(DenseCall(W, b), x, p, at)
    dense = F.linear(x, method.weight(W, p, at), b)
    close(fast, dense)
    inputs = [x, *p.values()]
    for mine, theirs in zip(torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(dense, inputs, towards)):
        close(mine, theirs, 1e-8)


def test_tlora_entries_by_brute_force() -> None:
    method, at = registry.method("tlora", in_dims=(2, 3, 2), out_dims=(3, 2), R_res=2), site(out=6, inside=12)
    p = moved(method, at)
    T, change = tensor_ring.dense(tensor_ring.cores_of(p, "A")), torch.matmul(*method.factors(p))
    i, j, o = ([int(torch.randint(n, ())) for n in dims] for dims in ((2, 3, 2), (2, 3, 2), (3, 2)))
    flat = lambda index, dims: sum(k * math.prod(dims[d + 1 :]) for d, k in enumerate(index))  # noqa: E731
    entry = torch.eye(2)
    for d in range(3):
        entry = entry @ p[f"A{d + 1}"][i[d], j[d]]
    close(T[flat(i, (2, 3, 2)), flat(j, (2, 3, 2))], entry.trace())
    entry = torch.eye(2)
    for name, index in (("B", o), ("C", i)):
        for d, k in enumerate(index, 1):
            entry = entry @ p[f"{name}{d}"][k]
    close(change[flat(o, (3, 2)), flat(i, (2, 3, 2))], entry.trace())


def test_tlora_few_tokens_go_through_the_cores_and_many_keep_no_transform() -> None:
    method, at = registry.method("tlora", R_res=2), site(out=64, inside=64)
    p, W = moved(method, at, size=0.1, grad=True), torch.randn(64, 64)
    for tokens, through_cores in ((2, True), (40, False)):
        x, kept = torch.randn(tokens, 64, requires_grad=True), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            turned = method.turn(x, p)
        assert not any(t.shape == (64, 64) for t in kept)
        assert any(t.numel() == tokens * 64 * 4 for t in kept) == through_cores
        close(turned, x @ tensor_ring.dense(tensor_ring.cores_of(p, "A")).T)
        close(method.forward(DenseCall(W), x, p, at), F.linear(x, method.weight(W, p, at)))


def test_ring_matrices() -> None:
    sizes = (3, 2, 4)
    one = [torch.randn(n, n, 1, 1) for n in sizes]
    close(tensor_ring.dense(one), torch.kron(torch.kron(one[0][..., 0, 0], one[1][..., 0, 0]), one[2][..., 0, 0]))
    A = [torch.randn(n, n, 2, 2) for n in sizes]
    T = tensor_ring.dense(A)
    close(tensor_ring.dense([core.repeat(1, 1, 2, 2) / 2 for core in A]), T)
    close(tensor_ring.from_identity(A), (T - torch.eye(24)).square().sum(), 1e-7)
    close(tensor_ring.from_orthogonal(A) / T.square().sum() ** 2, (T.T @ T - torch.eye(24)).square().sum() / T.square().sum() ** 2)


@pytest.mark.parametrize("R_T", [1, 2, 3, 4])
@pytest.mark.parametrize("D", [1, 2, 3, 4])
def test_tlora_starts_as_the_base(R_T: int, D: int) -> None:
    method, at = registry.method("tlora", R_T=R_T, D=D), site()
    p = {k: t.double() for k, t in method.init(at, Generator().manual_seed(int(torch.randint(999, ())))).items()}
    T = tensor_ring.dense(tensor_ring.cores_of(p, "A"))
    close(T, torch.eye(20), 1e-6 if R_T == 3 else 1e-15)  # thirds are not binary fractions
    assert float(torch.linalg.det(T)) > 0.9
    W = torch.randn(12, 20)
    close(method.weight(W, p, at), W, 1e-6 if R_T == 3 else 1e-14)
    loose = registry.method("tlora", R_T=R_T, D=D, noise="gaussian")
    p = loose.init(at, Generator())
    far = float((tensor_ring.dense(tensor_ring.cores_of(p, "A")) - torch.eye(20)).abs().max())
    assert 0 < far < 0.1 and "identity" in loose.limits and not method.limits


def trained(method: Method, W: Tensor, target: Tensor, steps: int, rate: float = 1e-2) -> tuple[Params, float, int]:
    """Fits W_eff to a target; the tensors, what is left of the distance, and how many numbers did it."""
    at = Site.bare(W)
    p = {k: t.double().requires_grad_() for k, t in method.init(at, Generator().manual_seed(1)).items()}
    optimiser = torch.optim.Adam(p.values(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        left = (method.weight(W, p, at) - target).square().sum()
        left.backward()
        optimiser.step()
    return p, float(left.detach() / (W - target).square().sum()), sum(t.numel() for t in p.values())


@pytest.mark.parametrize("noise", ["silent", "gaussian", "none"])
@pytest.mark.parametrize("D", [2, 3, 4])
def test_tlora_slices_do_not_train_alike(D: int, noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ring index of every core matters after some steps; without noise none would."""
    if noise == "none":
        monkeypatch.setattr(tensor_ring, "NOISE", 0.0)
    W = torch.randn(6, 16)
    method = registry.method("tlora", D=D, R_res=1, noise="silent" if noise == "none" else noise)
    p, _, _ = trained(method, W, W @ torch.randn(16, 16), 10)
    for core in tensor_ring.cores_of(p, "A"):
        for axis in (2, 3):
            apart = float(core.detach().diff(dim=axis).abs().max())
            assert apart < 1e-12 if noise == "none" else apart > 1e-7


def test_tlora_learns_a_rotation_that_lora_cannot() -> None:
    turns = [torch.linalg.matrix_exp(s - s.T) for s in (0.3 * torch.randn(4, 4) for _ in range(3))]
    W = torch.randn(64, 64) / 8
    target = W @ torch.kron(torch.kron(turns[0], turns[1]), turns[2])
    _, ours, count = trained(registry.method("tlora", R_res=3), W, target, 600)
    _, theirs, more = trained(registry.method("lora", r=4), W, target, 600)
    assert count < more and ours < 0.05 * theirs


def unet(method: Method) -> int:
    """All attention projections of a Stable Diffusion 1.5 UNet: 16 blocks, self- and cross-attention."""
    sites = []
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        for inside in (width, width, width, width, width, 768, 768, width):
            sites += blocks * [site(out=width, inside=inside)]
    for at in sites:
        method.check(at)
    each = {(s.out_features, s.in_features): counted(method, s) for s in sites}
    return sum(each[s.out_features, s.in_features] for s in sites)


def test_tlora_counts() -> None:
    facts = json.loads((HOME / "tlora.json").read_text())["counts"]
    assert unet(registry.method("tlora")) == facts[0]["trainable"] == 394_528
    assert unet(registry.method("tlora", residual="lora", R_res=4)) == 938_200
    assert unet(registry.method("lora", r=4)) == facts[1]["trainable"]
    widths = {320: (5, 8, 8), 640: (8, 8, 10), 1280: (8, 10, 16), 768: (8, 8, 12)}
    assert all(registry.method("tlora").dims(site(out=n, inside=n))[0] == dims for n, dims in widths.items())


def test_tlora_refuses() -> None:
    method = registry.method("tlora")
    refused(method, site(inside=1733), r"1733 features at site have no 3 factors of similar size.*in_dims=\(1, 1, 1733\)")
    refused(method, site(out=50257), "50257 features at site have no 3 factors")
    registry.method("tlora", residual="lora").check(site(out=50257))
    refused(registry.method("tlora", in_dims=(4, 4)), site(), r"in_dims=\(4, 4\) does not multiply to 20 at site; choose in_dims=\(4, 5\)")
    refused(registry.method("tlora", out_dims=(-3, -4)), site(), r"out_dims=\(-3, -4\) does not multiply to 12")
    tied = registry.method("tlora", share="type")
    with pytest.raises(BadValue, match=r"site and site share tensors but are \[12, 20\] and \[12, 16\]; choose share='none'"):
        tied.init_shared([site(), site(inside=16)], Generator())


def test_tlora_shared_by_role(tmp_path: Path) -> None:
    subject = SUBJECTS["llama"]
    tuned = stirred(veneer.attach(subject.build(), "tlora(share='type')", head=False), 0.05)
    alone = veneer.attach(subject.build(), "tlora", head=False)
    assert 2 * tuned.summary().trained == alone.summary().trained
    before = subject.answers(tuned.model)
    again = veneer.load(subject.build(), tuned.save(tmp_path))
    assert torch.equal(subject.answers(again.model), before)
    with pytest.warns(UserWarning, match="another shape of base"):
        deeper = veneer.load(subject.build(depth=3), tmp_path)  # nothing depends on the depth
    assert len(deeper.sites()) == 12
    close(subject.answers(tuned.merge().model), before)


@pytest.mark.parametrize("share", ["none", "type"])
@pytest.mark.parametrize("penalty", ["identity", "orthogonal"])
def test_tlora_penalty(penalty: str, share: str) -> None:
    assert registry.method("tlora").strategy() is None
    method = registry.method("tlora", penalty=penalty, penalty_weight=0.3, share=share, targets="attn.q attn.v")
    tuned = stirred(veneer.attach(SUBJECTS["bert"].build(), method, head=False))
    tuned.begin()
    (term,) = tuned.loss_terms().values()
    each = {id(p["A1"]): tensor_ring.dense(tensor_ring.cores_of(p, "A")) for _, _, p in tuned.entries()}
    assert len(each) == (4 if share == "none" else 2)
    gaps = [(T if penalty == "identity" else T.T @ T) - torch.eye(16) for T in each.values()]
    wanted = 0.3 * sum(gap.square().sum() for gap in gaps)
    close(term / wanted, torch.ones(()), 1e-9)
    grads = torch.autograd.grad(term, [p["A2"] for _, _, p in tuned.entries()][:1])
    assert grads[0].abs().max() > 0


def test_tlora_in_half_precision_moves_by_small_steps() -> None:
    method, at = registry.method("tlora"), site(out=64, inside=64)
    p = {k: t.float() for k, t in moved(method, at, size=1e-4).items()}
    x, off = torch.randn(500, 64).bfloat16(), tensor_ring.less_identity(tensor_ring.cores_of(p, "A"))
    assert float(off.abs().max()) < 2**-9  # 1 + off is 1 in bfloat16
    step = method.turn(x, p) - x
    assert step.dtype == torch.bfloat16 and float(step.abs().max()) > 0
