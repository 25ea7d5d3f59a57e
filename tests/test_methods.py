"""Laws of single methods that their papers and cards state, on bare tensors and on configurations; no training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import veneer.registry as registry
from veneer import anatomy
from veneer.errors import BadValue, Unsupported, VeneerError
from veneer.maths import starts
from veneer.method import Method
from veneer.site import Site
from veneer.strategies.rank_budget import Budget, RankBudget, kept, orthogonality

HERE = Path(__file__).parent
METHODS = Path(registry.__file__).parent / "methods"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def place(out: int = 12, inside: int = 20, role: str = "attn.q", kind: str = "linear", **facts: Any) -> Site:
    return Site(facts.pop("name", "layer"), "layer", role, kind, 0, out, inside, **facts)


def begun(method: Method, W: Tensor, site: Site | None = None, b: Tensor | None = None) -> dict[str, Tensor]:
    """First tensors of a site, in float64."""
    site, generator = site or place(*W.shape), Generator().manual_seed(0)
    p = {k: t.double() for k, t in {**method.init(site, generator), **method.init_shared([site], generator)}.items()}
    return method.init_from_weight(W, b, p, site, generator)


def test_files_are_short() -> None:
    for family in registry.FAMILIES:
        for path in (METHODS / family).glob("[!_]*.py"):
            assert len(path.read_text("utf-8").splitlines()) <= 120, path.name


# -- LoRA and its starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_starts_as_the_base_and_changes_by_its_rank(start: str, rslora: bool) -> None:
    method, W = registry.method("lora", r=3, alpha=5, start=start, rslora=rslora), draw(12, 20)
    p = begun(method, W)
    torch.testing.assert_close(method.weight(W, p, place()), W, rtol=0, atol=1e-12)
    trained = {k: t + 0.1 * draw(*t.shape) if k in "AB" else t for k, t in p.items()}
    change = method.weight(W, trained, place()) - W
    most = 6 if "A0" in p else 3  # a start taken from W changes by B A − B0 A0
    assert torch.linalg.matrix_rank(change) == most


def test_pissa_holds_the_principal_part() -> None:
    W = draw(12, 20)
    A, B = starts.pissa(W, 4, scale=0.5)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(0.5 * B @ A, (U[:, :4] * S[:4]) @ Vt[:4])


def test_randomised_svd_comes_near_the_exact_one() -> None:
    W = draw(40, 30) @ torch.diag(0.5 ** torch.arange(30, dtype=torch.float64))
    A, B = starts.pissa(W, 4, 1.0, niter=8, generator=Generator().manual_seed(0))
    exact = torch.matmul(*starts.pissa(W, 4, 1.0)[::-1])
    torch.testing.assert_close(B @ A, exact, rtol=0, atol=1e-6 * float(W.norm()))


@pytest.mark.parametrize("alpha", [2, 4, 16])
def test_loftq_beats_plain_quantisation_and_keeps_its_best_iterate(alpha: float) -> None:
    W = draw(24, 40)
    plain = (W - starts.quantised(W)).norm()
    distances = []
    for iterations in (1, 2, 3, 5):
        method = registry.method("lora", r=4, alpha=alpha, start="loftq", loftq_iters=iterations)
        distances.append(float((W - method.weight(W, begun(method, W))).norm()))
    assert distances[0] < plain
    assert all(later <= first for first, later in pairwise(distances))


def test_nf4_levels_and_rounding() -> None:
    levels = starts.codebook(4)
    known = (-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0)
    assert levels[:8] == pytest.approx(known, abs=1e-6) and len(levels) == 16 and levels[-1] == 1
    W = torch.cat([draw(3, 50).flatten(), torch.zeros(64, dtype=torch.float64)])
    Q = starts.quantised(W)
    torch.testing.assert_close(starts.quantised(Q), Q)
    assert (Q[150:] == 0).all()


def test_incremental_components_equal_those_of_all_rows() -> None:
    x = draw(90, 12) * torch.linspace(3, 0.1, 12, dtype=torch.float64) + 5
    seen = None
    for part in x.split(30):
        seen = starts.add_rows(seen, part, 12, 4, tau=1.1)  # never settled
    assert seen is not None
    centred = x - x.mean(0)
    _, S, Vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(seen.values, S)
    torch.testing.assert_close(seen.vectors[:4].T @ seen.vectors[:4], Vt[:4].T @ Vt[:4])
    torch.testing.assert_close(seen.ratio, S**2 / (S**2).sum())


def test_eva_shares_ranks_and_keeps_the_scale() -> None:
    method = registry.method("lora", r=4, alpha=8, start="eva")
    sites = [place(name="rich"), place(name="poor"), place(name="unused")]
    mixing = draw(1, 20)
    data = {"rich": draw(200, 20), "poor": draw(200, 1) @ mixing + 1e-9 * draw(200, 20)}
    plan = method.settle({name: method.observe(None, x, place()) for name, x in data.items()}, sites)
    assert plan["unused"] is None and plan["rich"] is not None and plan["poor"] is not None
    ranks = {name: found[0].r for name, found in plan.items() if found}
    assert sum(ranks.values()) == 8 and ranks["rich"] > ranks["poor"]
    for found in plan.values():
        if found:
            assert found[0].scale == pytest.approx(method.scale)
            assert found[1]["A"].shape == (found[0].r, 20) and not found[1]["B"].any()


def test_lora_plus_trains_b_faster() -> None:
    assert registry.method("lora", lr_ratio=16).lr_ratios()["B"] == 16
    assert not registry.method("lora").lr_ratios()


def test_lora_bias_is_folded() -> None:
    method, W, b = registry.method("lora", r=2, alpha=6, lora_bias=True), draw(12, 20), draw(12)
    p = begun(method, W) | {"b": draw(12)}
    torch.testing.assert_close(method.fold(W, b, p, place())[1], b + 3 * p["b"])
    torch.testing.assert_close(method.fold(W, None, p, place())[1], 3 * p["b"])


# -- DoRA -------------------------------------------------------------------------------------------------------


def test_dora_rows_have_the_trained_length() -> None:
    method, W = registry.method("dora", r=3, alpha=6), draw(12, 20)
    p = begun(method, W)
    assert torch.equal(method.weight(W, p), W)
    p = {k: t + draw(*t.shape) for k, t in p.items()}
    torch.testing.assert_close(method.weight(W, p).norm(dim=1), p["m"].abs())
    V = W + 2 * p["B"] @ p["A"]
    torch.testing.assert_close(method.row_norm(W, p), V.norm(dim=1), rtol=1e-12, atol=0)
    scaled = method.weight(3 * W, p)
    torch.testing.assert_close(scaled.norm(dim=1), p["m"].abs())


@pytest.mark.parametrize("exact", [False, True])
def test_dora_leaves_rows_of_zeros_alone(exact: bool) -> None:
    method, W = registry.method("dora", r=3, exact_norm=exact), draw(12, 20)
    W[4] = 0
    p = {k: t.requires_grad_() for k, t in begun(method, W).items()}
    y = method.weight(W, p)
    y.square().sum().backward()
    assert not y[4].any() and all(t.grad.isfinite().all() for t in p.values() if t.grad is not None)


def test_dora_magnitude_only() -> None:
    method, W = registry.method("dora", magnitude_only=True), draw(12, 20)
    p = begun(method, W)
    assert set(p) == {"m"}
    torch.testing.assert_close(method.weight(W, {"m": 2 * p["m"]}), 2 * W)


# -- AdaLoRA ----------------------------------------------------------------------------------------------------


class FakeTuned:
    """Entries of one adapter, as a strategy asks for them."""

    def __init__(self, method: Method, shapes: list[tuple[int, int]]) -> None:
        self.method, generator = method, Generator().manual_seed(0)
        self.tensors = [{k: nn.Parameter(t) for k, t in method.init(place(*shape), generator).items()} for shape in shapes]

    def entries(self, name: str) -> Any:
        return ((place(name=f"layer{i}"), self.method, p) for i, p in enumerate(self.tensors))


def stepped(strategy: RankBudget, tuned: FakeTuned, strength: list[float]) -> None:
    for p, factor in zip(tuned.tensors, strength):
        for t in p.values():
            t.data += 0.1 * factor * torch.rand_like(t)
            t.grad = factor * torch.rand_like(t)
    strategy.after_step()


def alive(tuned: FakeTuned) -> list[int]:
    return [int((p["lambda"] != 0).sum()) for p in tuned.tensors]


def test_adalora_budget_falls_to_its_target_and_stays() -> None:
    method = registry.method("adalora", target_r=2, init_r=4, T=30, t_i=5, t_f=8)
    tuned, strategy = FakeTuned(method, [(12, 20), (8, 12), (16, 8)]), method.strategy()
    strategy.start(tuned, "default")
    counts, schedule = [], method.budget(30)
    for t in range(1, 31):
        stepped(strategy, tuned, [1.0, 0.1, 0.01])
        counts.append(sum(alive(tuned)))
        assert counts[-1] <= schedule.at(t, 12, 6)[0]
    assert counts[4] == 12 and counts[-8:] == [6] * 8
    assert alive(tuned)[0] == 4  # the layer that matters keeps its rank


def test_adalora_resumes_to_the_same_masks() -> None:
    method = registry.method("adalora", target_r=1, init_r=3, T=20, t_i=2, t_f=6)
    tuned, strategy = FakeTuned(method, [(12, 20), (8, 12)]), method.strategy()
    strategy.start(tuned, "default")
    for _ in range(9):
        stepped(strategy, tuned, [1.0, 0.5])
    other = method.strategy()
    other.start(tuned, "default")
    other.load_state_dict(strategy.state_dict())
    assert other.step == 9 and other.state_dict().keys() == strategy.state_dict().keys()
    assert all(torch.equal(other.I_bar[k], v) for k, v in strategy.I_bar.items())


def test_equal_scores_fall_by_index() -> None:
    masks = kept([torch.zeros(4), torch.zeros(3)], 5)
    assert [m.tolist() for m in masks] == [[False, False, True, True], [True, True, True]]
    assert all(m.all() for m in kept([torch.zeros(4)], 4))


def test_orthogonality_vanishes_for_orthonormal_factors() -> None:
    P = torch.linalg.qr(draw(12, 3))[0]
    assert float(orthogonality([{"P": P, "lambda": draw(3), "Q": torch.linalg.qr(draw(20, 3))[0].T}])) < 1e-12


def test_adalora_needs_the_number_of_steps() -> None:
    method = registry.method("adalora")
    strategy = method.strategy()
    strategy.start(FakeTuned(method, [(12, 20)]), "default")
    with pytest.raises(BadValue, match="number of optimiser steps"):
        strategy.after_step()


def test_budget_is_monotone() -> None:
    found = [Budget(100, 10, 20).at(t, 60, 24)[0] for t in range(1, 101)]
    assert found[9] == 60 and found[79] == 24 and all(a >= b for a, b in pairwise(found))


# -- WeGeFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["input", "output"])
def test_wegeft_changes_every_layer_by_the_same_map(transform: str) -> None:
    method = registry.method("wegeft", r=3, alpha=6, transform=transform)
    width = 20 if transform == "input" else 12
    p = {"phi": draw(3, width), "psi": draw(3, width)}
    M = 2 * p["phi"].T @ p["psi"]
    for _ in range(2):
        W = draw(12, 20)
        change = method.weight(W, p) - W
        torch.testing.assert_close(change, W @ M if transform == "input" else M @ W)
        assert torch.linalg.matrix_rank(change) == 3


@pytest.mark.parametrize("start", ["psi_random", "phi_random"])
def test_wegeft_starts_as_the_base(start: str) -> None:
    method, W = registry.method("wegeft", r=3, start=start), draw(12, 20)
    assert torch.equal(method.weight(W, begun(method, W)), W)


def test_wegeft_groups() -> None:
    q, v, up = place(name="0.q"), place(role="attn.v", name="0.v"), place(role="mlp.up", inside=24, name="0.up")
    by_type, one, own = (registry.method("wegeft", share=s) for s in ("type", "all", "none"))
    assert by_type.tie(q) == "attn.q" and by_type.tie(v) == "attn.v" and by_type.tie(q) == by_type.tie(place(name="1.q"))
    assert one.tie(q) == one.tie(v) and own.tie(q) is None
    assert not by_type.init(q, Generator()) and set(own.init(q, Generator())) == {"phi", "psi"}
    with pytest.raises(BadValue, match=r"0\.q and 0\.up .* 20 and 24"):
        one.init_shared([q, v, up], Generator())


def test_wegeft_positions_cannot_be_merged() -> None:
    method = registry.method("wegeft", r=3, positions=(1, 2))
    assert not method.foldable and "positions" in method.limits["merge"]
    p = {"phi": draw(3, 20), "psi": draw(3, 20)}
    with pytest.raises(Unsupported, match="positions"):
        method.fold(draw(12, 20), None, p, place())
    edit = method.edit(draw(2, 7, 20), p, place())
    assert edit[:, [0, 5, 6]].any(-1).all() and not edit[:, 1:5].any()
    assert method.edit(draw(7, 2, 20), p, place(batch_dim=1))[1:5].any().logical_not()


# -- activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", ["no", "scalar", "channel"])
@pytest.mark.parametrize("norm", ["none", "in", "out"])
def test_bottleneck_starts_as_the_base(learned: str, norm: str) -> None:
    method = registry.method("bottleneck-adapter", m=4, learned_s=learned, norm=norm)
    p = method.init(place(20, role="mlp", kind="branch"), Generator().manual_seed(0))
    h = torch.randn(3, 20)
    assert torch.equal(h + method.f(h, p, False), h)
    doubled = {k: 2 * t if k in ("up_w", "up_b") else t for k, t in p.items()}
    twice = registry.method("bottleneck-adapter", m=4, s=2, norm="none" if norm == "out" else norm)
    if learned == "no" and norm != "out":
        torch.testing.assert_close(twice.f(h, p, False), method.f(h, doubled, False))


def test_rescaling_keeps_rows_and_columns_in_proportion() -> None:
    W, method = draw(12, 20), registry.method("ia3")
    rows = method.fold(W, None, {"l_k": draw(12)}, place(role="attn.k"))[0] / W
    columns = method.fold(W, None, {"l_ff": draw(20)}, place(role="mlp.down"))[0] / W
    assert rows.var(1).max() < 1e-20 and columns.var(0).max() < 1e-20


def test_ssf_makes_a_bias_where_there_is_none() -> None:
    method, W, p = registry.method("ssf"), draw(12, 20), {"gamma": draw(12), "beta": draw(12)}
    W_eff, b_eff = method.fold(W, None, p, place())
    x = draw(5, 20)
    torch.testing.assert_close(x @ W_eff.T + b_eff, p["gamma"] * (x @ W.T) + p["beta"])
    start = method.init_from_weight(draw(12), None, method.init(place(), Generator()), place(12, 12, "norm.attn", "norm"), Generator())
    assert set(start) == {"gamma"}
    table = method.fold(W, None, p, place(kind="embedding"))[0]
    torch.testing.assert_close(table.T, p["gamma"] * W.T + p["beta"])


# -- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_start_from_words() -> None:
    table, site = draw(11, 8), place(8, 8, "model", "model")
    labels = registry.method("prompt-tuning", length=3, start="labels", label_ids=((1, 2, 5), (7,)))
    P = begun(labels, table, site)["P"]
    torch.testing.assert_close(P[0], table[[1, 2, 5]].mean(0))
    assert torch.equal(P[1], table[7]) and any(torch.equal(P[2], row) for row in table)
    text = registry.method("prompt-tuning", length=5, start="text", text_ids=(3, 4))
    assert torch.equal(begun(text, table, site)["P"], table[[3, 4, 3, 4, 3]])
    assert float(begun(registry.method("prompt-tuning", start="uniform"), table, site)["P"].abs().max()) <= 0.5
    with pytest.raises(BadValue, match="vocabulary of 11"):
        begun(registry.method("prompt-tuning", start="text", text_ids=(40,)), table, site)


def test_prefix_network_gives_each_layer_its_own_slices() -> None:
    method = registry.method("prefix-tuning", length=4, mid=6)
    sites = [place(6, 6, "attn", "attention", heads=4, kv_heads=2, head_dim=3, ordinal=i) for i in range(3)]
    p = method.init_shared(sites, Generator().manual_seed(0))
    assert p["E"].shape == (4, 12) and p["W2"].shape == (2 * 3 * 6, 6)
    whole = torch.tanh(p["E"] @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]
    for i, site in enumerate(sites):
        PK, PV = method.keys_values(p, site)
        torch.testing.assert_close(torch.cat([PK, PV], 1), whole[:, 12 * i : 12 * (i + 1)])
    with pytest.raises(BadValue, match="equal"):
        method.init_shared([sites[0], place(9, 9, "attn", "attention", heads=4, head_dim=3)], Generator())


def test_vpt_deep_equals_shallow_in_one_block_and_replaces_in_more() -> None:
    from test_golden import FunctionCall

    x, p = draw(2, 7, 12), {"P0": draw(4, 12)}
    mixing = draw(11, 11)
    block = FunctionCall(lambda h: mixing @ h)
    one = place(12, 12, "block", "block", index=0, length=1)
    deep, shallow = (registry.method("vpt", length=4, deep=d) for d in (True, False))
    y = deep.forward(block, x, p, one)
    assert y.shape == x.shape and torch.equal(y, shallow.forward(block, x, p, one))
    first, later = place(12, 12, "block", "block", index=0, length=3), place(12, 12, "block", "block", index=1, length=3)
    assert shallow.forward(block, x, p, first).shape[1] == 11
    assert set(deep.init(later, Generator())) == {"P_deep"} and not shallow.init(later, Generator())
    bound = (6 / (3 * 16**2 + 12)) ** 0.5
    assert float(deep.init(first, Generator().manual_seed(0))["P0"].abs().max()) <= bound


# -- counts that papers report ----------------------------------------------------------------------------------


def trained(method: Method, sites: list[Site]) -> int:
    """Trained numbers by shape: of every site, and of every tie group once. Layers of one shape are drawn once."""
    generator, sizes, groups = Generator().manual_seed(0), dict[Any, int](), dict[str, list[Site]]()
    total = 0
    for site in (found := method.select(sites)):
        key = (site.role, site.kind, site.out_features, site.in_features, site.index == 0)
        if key not in sizes:
            sizes[key] = sum(t.numel() for k, t in method.init(site, generator).items() if k not in method.frozen)
        total += sizes[key]
    for site in found:
        if (group := method.tie(site)) is not None:
            groups.setdefault(group, []).append(site)
    return total + sum(t.numel() for members in groups.values() for t in method.init_shared(members, generator).values())


def sites_of(name: str) -> list[Site]:
    import transformers as hf

    bert_large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    llama = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    llama3 = dict(llama, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
    xl = dict(num_layers=24, num_decoder_layers=24, d_kv=64, feed_forward_proj="gated-gelu")
    clip = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
    configs: dict[str, tuple[Any, Any]] = {
        "roberta-base": (hf.RobertaModel, hf.RobertaConfig()),
        "roberta-large": (hf.RobertaModel, hf.RobertaConfig(**bert_large)),
        "bert-base": (hf.BertModel, hf.BertConfig()),
        "llama-7b": (hf.LlamaForCausalLM, hf.LlamaConfig(**llama)),
        "llama-3-8b": (hf.LlamaForCausalLM, hf.LlamaConfig(**llama3)),
        "t0-3b": (hf.T5ForConditionalGeneration, hf.T5Config(d_model=2048, d_ff=5120, num_heads=32, **xl)),
        "t5-xxl": (hf.T5ForConditionalGeneration, hf.T5Config(d_model=4096, d_ff=10240, num_heads=64, **xl)),
        "vit-b16": (hf.ViTModel, hf.ViTConfig()),
        "vit-b16-10": (hf.ViTForImageClassification, hf.ViTConfig(num_labels=10)),
        "clip-l14": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**clip)),
    }
    kind, config = configs[name]
    with torch.device("meta"):
        return anatomy.sites(kind(config))


ALL_SEVEN = "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down"
FIVE = "attn.q attn.k attn.v mlp.up mlp.down"
COUNTS = [
    ("roberta-base", "lora", dict(r=8), 294_912),
    ("llama-7b", "lora", dict(r=64, targets=ALL_SEVEN), 159_907_840),
    ("llama-7b", "lora", dict(r=32, targets=FIVE), 56_098_816),
    ("llama-7b", "dora", dict(r=32, targets=FIVE), 56_975_360),
    ("llama-7b", "wegeft", dict(r=64), 1_048_576),
    ("llama-7b", "wegeft", dict(r=64, targets=FIVE), 3_506_176),
    ("llama-3-8b", "wegeft", dict(r=64, targets=FIVE), 3_932_160),
    ("llama-7b", "wegeft", dict(r=128), 2_097_152),
    ("roberta-large", "wegeft", dict(r=32), 131_072),
    ("bert-base", "bottleneck-adapter", dict(variant="pfeiffer", m=48), 894_528),
    ("bert-base", "bottleneck-adapter", dict(variant="houlsby", m=48), 1_789_056),
    ("bert-base", "bottleneck-adapter + ln-tuning", dict(m=64), 2_417_664),
    ("t0-3b", "ia3", {}, 540_672),
    ("vit-b16", "ssf", {}, 205_824),
    ("t5-xxl", "prompt-tuning", dict(length=100), 409_600),
    ("bert-base", "prefix-tuning", dict(length=10), 184_320),
    ("roberta-base", "prefix-tuning", dict(length=10, mid=512), 9_857_024),
    ("vit-b16", "vpt", dict(length=5), 46_080),
    ("vit-b16-10", "vpt + probe", dict(length=5, deep=False), 11_530),
    ("bert-base", "bitfit", {}, 102_912),
    ("bert-base", "bitfit", dict(targets="attn.q mlp.up"), 46_080),
    ("bert-base", "ln-tuning", {}, 38_400),
    ("clip-l14", "ln-tuning", {}, 102_400),
]


@pytest.mark.parametrize(("model", "slugs", "hyper", "count"), COUNTS, ids=lambda v: v if isinstance(v, str) else None)
def test_counts_of_the_papers(model: str, slugs: str, hyper: dict[str, Any], count: int) -> None:
    first, *others = slugs.split(" + ")
    methods = [registry.method(first, **hyper), *map(registry.method, others)]
    assert sum(trained(m, sites_of(model)) for m in methods) == count


def test_count_of_gpt3() -> None:
    layers = [place(12288, 12288, role, name=f"{i}.{role}") for i in range(96) for role in ("attn.q", "attn.v")]
    assert trained(registry.method("lora", r=8), layers) == 37_748_736


# -- refusals ---------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lora", dict(r=0), "r=0"),
    ("lora", dict(r=2.5), "r=2.5"),
    ("lora", dict(alpha=-1), "alpha=-1"),
    ("lora", dict(dropout=1.0), "dropout=1.0"),
    ("lora", dict(start="svd"), "'pissa'"),
    ("dora", dict(r=0), "r=0"),
    ("adalora", dict(target_r=12, init_r=8), "target_r=12"),
    ("adalora", dict(beta1=1.0), "beta1=1.0"),
    ("adalora", dict(T=10, t_i=6, t_f=6), "t_i < T"),
    ("wegeft", dict(share="some"), "'type'"),
    ("wegeft", dict(positions=(0, 0)), "positions"),
    ("wegeft", dict(positions=(1, 1), dropout=0.1), "dropout"),
    ("bottleneck-adapter", dict(m=0), "m=0"),
    ("bottleneck-adapter", dict(s=0), "s=0"),
    ("bottleneck-adapter", dict(act="relo"), "'relu'"),
    ("prompt-tuning", dict(length=0), "length=0"),
    ("prompt-tuning", dict(start="text"), "text_ids"),
    ("prefix-tuning", dict(length=0), "length=0"),
    ("vpt", dict(deep=False, leave_out=(1,)), "leave_out"),
    ("ssf", dict(exact_start="yes"), "exact_start"),
]


@pytest.mark.parametrize(("slug", "hyper", "said"), BAD, ids=lambda v: str(v))
def test_bad_hyper_parameters_get_a_sentence(slug: str, hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(VeneerError) as caught:
        registry.method(slug, **hyper)
    text = str(caught.value)
    assert said in text and len(text.splitlines()) <= 3 and text.endswith(".")


@pytest.mark.parametrize(
    ("slug", "hyper", "site"),
    [
        ("lora", dict(r=16, start="pissa"), place()),
        ("lora", dict(r=4, start="eva"), place(kind="embedding")),
        ("lora", dict(lora_bias=True), place(kind="embedding")),
        ("lora", dict(conv_form="original"), place(kind="conv", kernel=(3,))),
        ("ia3", dict(feedforward="conv"), place(role="conv", kind="conv", kernel=(3, 3))),
        ("bottleneck-adapter", {}, place(role="norm.mlp", kind="norm")),
        ("wegeft", dict(positions=(1, 1)), place(kind="conv", kernel=(3, 3))),
    ],
)
def test_what_does_not_fit_a_layer_is_refused_with_its_name(slug: str, hyper: dict[str, Any], site: Site) -> None:
    with pytest.raises(BadValue, match="layer"):
        registry.method(slug, **hyper).check(site)


def test_vpt_refuses_models_of_text() -> None:
    sites = [place(role="embed.token", kind="embedding", name="embed"), place(role="block", kind="block", name="layers.0")]
    with pytest.raises(BadValue, match="prompt-tuning"):
        registry.method("vpt").select(sites)
