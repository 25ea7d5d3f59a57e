"""Strategies on bare tensors against the authors' numbers, and their laws on tiny models: unmasking and layer sampling."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import Case, site
from tiny import SUBJECTS, Subject, dtype_of, loss
from torch import Generator, Tensor, nn

import veneer
from veneer import registry
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported
from veneer.strategies.layer_sampling import LayerSampling, candidates, damped, draw, rescored, share
from veneer.strategies.probing import agreed, undisturbed
from veneer.strategies.unmasking import Unmasking, chosen, d3, largest, quota
from veneer.tools.sparse import load_sparse, save_sparse
from veneer.tuned import Tuned

# -- unmasking: bare tensors ------------------------------------------------------------------------------------


@dataclass
class Bare:
    """Tensors without a model, as one adapter: what a strategy asks a `Tuned` for."""

    given: dict[str, Tensor]
    adapters: dict[str, Any] = field(init=False)
    model: nn.Module = field(default_factory=nn.Module)

    def __post_init__(self) -> None:
        self.p = {name: nn.Parameter(t.clone()) for name, t in self.given.items()}
        part = SimpleNamespace(index=0, site=site(), method=registry.method("lora"), tensors=lambda: self.p)
        self.adapters = {"default": SimpleNamespace(parts=[part])}


def unmasking(bare: Bare, total: int | None = None, probe: Callable[[], Tensor] | None = None, **hyper: Any) -> Unmasking:
    strategy = registry.method("id3", **hyper).strategy()
    assert isinstance(strategy, Unmasking)
    strategy.probe = probe
    strategy.start(bare, "default", total)  # type: ignore[arg-type]
    return strategy


def step(bare: Bare, strategy: Unmasking, optimiser: torch.optim.Optimizer, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step with these gradients; the masks used in it."""
    for name, p in bare.p.items():
        p.grad = grads[name].clone() if name in grads else None
    strategy.before_step()
    masks = {name: strategy.masks[f"0/site/{name}"].clone() for name in bare.p}
    optimiser.step()
    strategy.after_step()
    return masks


SGD: Any = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
ADAMW: Any = lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.0)  # noqa: E731


@pytest.mark.parametrize(
    ("index", "optimiser", "hyper"),
    [
        (0, SGD, {"B": 11, "T": 4, "exp": 1.0, "eps": 0.001}),
        (1, SGD, {"B": 10, "T": 5, "exp": 0.0}),
        (2, ADAMW, {"B": 12, "T": 4, "exp": 0.5, "eps": 0.01}),
        (3, SGD, {"B": 9, "score": "smallest"}),
        (4, SGD, {"B": 4, "score": "bitfit"}),
    ],
)
def test_id3_masks_and_steps(index: int, optimiser: Any, hyper: dict[str, Any]) -> None:
    case = Case("id3", index)
    bare = Bare({k.removeprefix("W."): v for k, v in case.items() if k.startswith("W.")})
    strategy, optimiser = unmasking(bare, **hyper), optimiser(bare.p.values())
    steps = sum(k.startswith("grad.w1.") for k in case)
    counts = []
    for t in range(steps):
        masks = step(bare, strategy, optimiser, {name: case[f"grad.{name}.{t}"] for name in bare.p})
        counts.append(sum(int(m.sum()) for m in masks.values()))
        for name, mask in masks.items():
            assert torch.equal(mask.to(torch.uint8), case[f"mask.{name}.{t}"]), (name, t)
    for name, p in bare.p.items():
        case.agree(f"out.{name}", p)
    if "unmask_per_step" in case.hyper:
        assert [b - a for a, b in zip([0, *counts], counts)] == case.hyper["unmask_per_step"]


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 9))
@settings(deadline=None)
def test_id3_schedule(B: int, T: int, k: int) -> None:
    """Exact at the end, never falling, ⌊B/T⌋ or one more each step; an interval gives its steps' worth at its first step."""
    counts = [quota(t, B, T) for t in range(T + 3)]
    steps = [b - a for a, b in zip([0, *counts], counts)]
    assert steps[:T] == [B // T + (t < B % T) for t in range(T)] and counts[T:] == [B] * 3
    assert [quota(t, B, T, k) for t in range(T)] == [counts[min((t // k + 1) * k, T) - 1] for t in range(T)]
    if B % T == 0:  # scalar updates: half of a static mask's B · T
        assert sum(counts[:T]) == B * (T + 1) // 2


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(0, 70))
@settings(deadline=None)
def test_id3_chooses_like_one_stable_sort(values: list[list[int]], k: int) -> None:
    """Two levels give what sorting all scores at once gives, ties by tensor and place; what is −inf is never taken."""
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    tensors = [t.masked_fill(t == 0, -torch.inf) for t in tensors]
    everything = torch.cat(tensors)
    order = torch.sort(everything, descending=True, stable=True).indices[: min(k, int((everything > -torch.inf).sum()))]
    found, at = chosen([(str(i), t) for i, t in enumerate(tensors)], k), 0
    for i, t in enumerate(tensors):
        assert found[str(i)].tolist() == sorted(int(j) - at for j in order if at <= j < at + len(t))
        at += len(t)
    assert largest(everything, 0).tolist() == [] and len(largest(everything, 10**6)) == len(everything)


def test_id3_score_between_gradients_and_small_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    theta, grad = torch.randn(40), torch.rand(40) + 0.5
    grad[3:20] *= -1
    assert torch.equal(largest(d3(theta, grad, 0.0, 1e-3), 7), largest(grad.abs(), 7))
    assert torch.equal(largest(d3(theta.double(), grad.double(), 60.0, 1e-9), 7), largest(-theta.abs(), 7))
    assert d3(theta.bfloat16(), grad.bfloat16(), 0.5, 1e-3).dtype == torch.float32
    zeros = d3(torch.zeros(5), torch.arange(5.0), 1.0, 1e-3)
    torch.testing.assert_close(zeros, torch.arange(5.0) / 1e-3)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.3),
    ],
)
def test_id3_masked_numbers_stay_bit_for_bit(optimiser: Any, seed: int) -> None:
    """Whatever the optimiser does with them; masks only grow, to the budget, and stand afterwards."""
    torch.manual_seed(seed)
    bare = Bare({"a": torch.randn(5, 7), "b": torch.randn(3), "c": torch.randn(4, 4)})
    strategy, optimiser = unmasking(bare, 5, B=17, exp=0.5), optimiser(bare.p.values())
    last = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in bare.p.items()}
    for t in range(8):
        masks = step(bare, strategy, optimiser, {name: torch.randn_like(p) for name, p in bare.p.items()})
        assert sum(int(m.sum()) for m in masks.values()) == quota(t, 17, 5)
        for name, p in bare.p.items():
            assert bool((last[name] <= masks[name]).all())
            assert torch.equal(p[~masks[name]], bare.given[name][~masks[name]])
        last = masks
    assert all(bool((p != bare.given[name])[last[name]].all()) for name, p in bare.p.items())


def test_id3_static_repeat_and_baselines(seed: int) -> None:
    torch.manual_seed(seed)
    first = {"a": torch.randn(6, 5), "b": torch.randn(8)}
    grads = [{name: torch.randn_like(t) for name, t in first.items()} for _ in range(3)]

    def masks(**hyper: Any) -> list[Tensor]:
        bare = Bare(first)
        strategy, optimiser = unmasking(bare, 3, B=9, **hyper), SGD(bare.p.values())
        return [torch.cat([m.flatten() for m in step(bare, strategy, optimiser, g).values()]) for g in grads]

    def top(scores: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([s.flatten() for s in scores.values()])
        return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, largest(flat, 9), True)

    for t, mask in enumerate(masks(mask="repeat")):
        assert torch.equal(mask, top({k: g.abs() for k, g in grads[t].items()}))
    for mask in masks(mask="static"):
        assert torch.equal(mask, top({k: g.abs() for k, g in grads[0].items()}))
    for mask in masks(score="largest"):
        assert torch.equal(mask, top({k: t.abs() for k, t in first.items()}))
    random, again, other = (masks(score="random", seed=s) for s in (seed, seed, seed + 1))
    assert torch.equal(random[0], again[0]) and torch.equal(random[0], random[2]) and int(random[0].sum()) == 9
    assert not torch.equal(random[0], other[0])
    every = masks(interval=2)
    assert [int(m.sum()) for m in every] == [6, 6, 9]


def test_id3_fisher_is_the_mean_of_squares(seed: int) -> None:
    torch.manual_seed(seed)
    bare = Bare({"w": torch.randn(4, 6)})
    xs, calls = torch.randn(5, 6), iter(range(5))
    strategy = unmasking(bare, probe=lambda: (bare.p["w"] @ xs[next(calls)]).square().sum(), B=7, score="fisher", samples=5)
    F = torch.stack([2 * (bare.given["w"] @ x)[:, None] * x for x in xs]).square().mean(0)
    mask = step(bare, strategy, SGD(bare.p.values()), {"w": torch.ones(4, 6)})["w"]
    assert torch.equal(mask.flatten().nonzero().flatten(), largest(F.flatten(), 7))
    strategy = unmasking(bare, B=7, score="fisher")
    bare.p["w"].grad = torch.ones(4, 6)
    with pytest.raises(BadValue, match="probe"):
        strategy.before_step()


def test_id3_leaves_out_tensors_without_gradients_and_catches_up() -> None:
    bare = Bare({"a": torch.ones(2, 2), "b": torch.ones(8)})
    strategy, optimiser = unmasking(bare, 2, B=10), SGD(bare.p.values())
    assert [int(m.sum()) for m in step(bare, strategy, optimiser, {"a": torch.ones(2, 2)}).values()] == [4, 0]
    masks = step(bare, strategy, optimiser, {"b": torch.arange(8.0), "a": torch.full((2, 2), torch.nan)})
    assert [int(m.sum()) for m in masks.values()] == [4, 6] and masks["b"].tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"B": 0}, "more than 0"),
        ({"B": 1.5}, "a share up to 1.0"),
        ({"B": 13}, "choose B from 1 to 12"),
        ({"T": 0}, "at least 1"),
        ({"exp": 0.5, "eps": 0}, "eps more than 0"),
        ({"score": "random", "mask": "repeat"}, "mask='static'"),
        ({"interval": 0}, "at least 1"),
        ({"score": "bitfit", "B": 1}, "choose another score"),
        ({"B": 3}, "tuned.begin"),
    ],
)
def test_id3_refusals(hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        unmasking(Bare({"w": torch.ones(3, 4)}), **hyper).before_step()


def test_id3_budgets() -> None:
    method = registry.method
    assert method("id3", B=0.25).budget(10) == 2 and method("id3", B=1e-6).budget(10) == 1 and method("id3", B=1.0).budget(10) == 10
    assert method("id3", B=1).budget(10) == 1 and method("id3", budget=1e1).budget(10) == 10
    with pytest.raises(Unsupported, match="outside the budget"):
        method("id3").budget(0)


# -- models -----------------------------------------------------------------------------------------------------


def attached(spec: str, subject: str = "llama", depth: int = 2, **options: Any) -> tuple[Subject, nn.Module, Tuned]:
    case = SUBJECTS[subject]
    model = case.build(depth=depth)
    return case, model, veneer.attach(model, spec, **{"head": False, **options})


def trained(subject: Subject, tuned: Tuned, seed: int, steps: int = 4, decay: float = 0.1) -> Iterator[dict[str, Tensor]]:
    """The plain loop with AdamW; after each step the tensors as they are."""
    model = tuned.model.train()
    optimiser = torch.optim.AdamW(tuned.parameters(), 1e-2, weight_decay=decay)
    probed = [0]

    def probe() -> Tensor:
        probed[0] += 1
        return loss(model, subject.batch(seed + probed[0], dtype_of(model)))

    tuned.begin(steps, probe)
    for t in range(steps):
        optimiser.zero_grad()
        loss(model, subject.batch(seed + t, dtype_of(model)), seed).backward()
        tuned.before_step()
        optimiser.step()
        tuned.after_step()
        yield {key: p.detach().clone() for key, p in tuned.named_parameters()}


@pytest.mark.parametrize("spec", ["full + id3(B=40)", "lora(r=2) + id3(B=40, exp=1.0)", "bottleneck-adapter + id3(B=40)"])
def test_id3_changes_no_more_than_the_budget_and_saves_it_sparsely(spec: str, seed: int, tmp_path: Path) -> None:
    subject, model, tuned = attached(spec, seed=seed)
    first = {key: p.detach().clone() for key, p in tuned.named_parameters()}
    *_, last = trained(subject, tuned, seed)
    assert sum(int((t != first[key]).sum()) for key, t in last.items()) == 40
    flags = [p.requires_grad for p in model.parameters()]
    save_sparse(tuned, tmp_path, seed=seed)
    assert [p.requires_grad for p in model.parameters()] == flags and tuned.active == ["default"] and len(tuned.adapters) == 1
    again = load_sparse(subject.build(), tmp_path)
    assert torch.equal(subject.answers(again.model, seed), subject.answers(model.eval(), seed))
    assert again.adapters["default"].method == tuned.adapters["default"].method
    tuned.save(tmp_path / "whole")
    if spec.startswith("full"):
        assert 3 * (tmp_path / "sparse.safetensors").stat().st_size < (tmp_path / "whole" / "adapter.safetensors").stat().st_size
        other = subject.build()
        next(other.parameters()).data.add_(1.0)
        with pytest.raises(Mismatch, match="starts differently"):
            load_sparse(other, tmp_path)
        assert not veneer.of(other).adapters
    if spec.startswith("lora"):
        with pytest.raises(BadValue, match="seed it was attached with"):
            save_sparse(tuned, tmp_path / "other", seed=seed + 1)
    with pytest.raises(BadFile):
        load_sparse(subject.build(), tmp_path / "whole")


def test_id3_trains_the_head_outside_the_budget(seed: int, tmp_path: Path) -> None:
    for spec in ("lora(r=2) + id3(B=10)", "full + id3(B=10)"):
        subject, model, tuned = attached(spec, "bert", head="auto")
        first = {key: p.detach().clone() for key, p in tuned.named_parameters()}
        *_, last = trained(subject, tuned, seed)
        changed = {key: int((t != first[key]).sum()) for key, t in last.items()}
        head = {key for key in changed if key.startswith("classifier")}
        assert head and all(changed[key] == first[key].numel() for key in head)
        assert sum(n for key, n in changed.items() if key not in head) == 10
        save_sparse(tuned, tmp_path / spec[:4])
        again = load_sparse(subject.build(), tmp_path / spec[:4])
        assert torch.equal(subject.answers(again.model), subject.answers(model.eval()))


# -- layer sampling: the scores ---------------------------------------------------------------------------------


def test_ist_scores() -> None:
    case = Case("ist", 0)
    I, p = case["param.I"], torch.sigmoid(case["param.I"])
    case.agree("out.p_suppress", p / p.sum())
    case.agree("out.p_update", torch.sigmoid(-I) / torch.sigmoid(-I).sum())
    reward = torch.exp(-case["loss"])
    case.agree("out.reward", reward)
    case.agree("out.advantage", reward - reward.mean())
    new = rescored(I, case["out.selected"].tolist(), case["loss"], case.hyper["mu"])
    case.agree("out.I_new", new)
    case.agree("out.p_update_new", torch.sigmoid(-new) / torch.sigmoid(-new).sum())
    assert share(0.5, case.hyper["layers"]) == case.hyper["suppressed"]
    assert [share(0.25, L) for L in (1, 3, 4, 11)] == [1, 1, 1, 2]


def test_ist_draws_follow_the_weights(seed: int) -> None:
    generator = Generator().manual_seed(seed)
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    counts = Counter(i for _ in range(4000) for i in draw(weights, 1, generator))
    assert all(abs(counts[i] / 4000 - float(w) / 8) < 0.05 for i, w in enumerate(weights))
    sets = candidates(weights, 2, 6, generator)
    assert sorted(sets) == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert len(candidates(weights, 2, 50, generator)) == 6 and candidates(weights[:1], 1, 3, generator) == [[0]]
    assert len(candidates(torch.tensor([1.0, 0.0]).double(), 1, 2, generator)) >= 1  # no end is no choice


# -- layer sampling: models -------------------------------------------------------------------------------------


def sampling(tuned: Tuned) -> LayerSampling:
    (found,) = tuned.adapters["default"].strategies
    assert isinstance(found, LayerSampling)
    return found


@pytest.mark.parametrize("method", ["lora(r=2)", "dora(r=2)", "bottleneck-adapter", "ssf"])
def test_ist_trains_the_drawn_layers_and_no_others(method: str, seed: int) -> None:
    """AdamW's moments and decay included; tensors outside the layers train at every step."""
    subject, _, tuned = attached(f"{method} + ln-tuning(targets='norm.final') + ist(N_u=0.5, T_u=2, seed={seed})", depth=4)
    strategy = sampling(tuned)
    depth = {f"{p.site.name}/{key}": p.site.depth for p in tuned.adapters["default"].parts for key in p.keys}
    last, steps = {key: p.detach().clone() for key, p in tuned.named_parameters()}, trained(subject, tuned, seed, 6)
    seen: Counter[int] = Counter()
    while True:
        on = list(strategy.on)  # drawn by now for the next step; before the first one, at `begin`
        now = next(steps, None)
        if now is None:
            break
        on = on or strategy_first(seed)
        changed = {depth[key] for key, t in now.items() if not torch.equal(t, last[key])}
        assert changed == {*on, None}
        seen.update(on)
        last = now
    assert len(strategy.on) == 2 and sum(seen.values()) == 2 * 6 and bool(strategy.I.any())
    assert all(part.respond is None for part in tuned.adapters["default"].parts)
    assert all(p.requires_grad == (depth[key] is None or depth[key] in strategy.on) for key, p in tuned.named_parameters())


def strategy_first(seed: int) -> list[int]:
    return draw(torch.full((4,), 0.5, dtype=torch.float64), 2, Generator().manual_seed(seed))


def test_ist_damps_by_beta(seed: int) -> None:
    """y = W x + beta · s · B A x: what LoRA with beta times its B answers; layers that are not damped are left as they are."""
    subject, model, tuned = attached("lora(r=2, alpha=3)")
    for p in tuned.parameters():
        p.data.normal_(0, 0.3, generator=Generator().manual_seed(seed))
    parts = [part for part in tuned.adapters["default"].parts if part.site.depth == 1]
    with damped(parts, 0.25):
        found = subject.answers(model, seed)
    plain = subject.answers(model, seed)
    for part in parts:
        part.tensors()["B"].data.mul_(0.25)
    torch.testing.assert_close(found, subject.answers(model, seed), rtol=0, atol=1e-10)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("options", ["beta=1.0", "K=1"])
def test_ist_without_a_difference_learns_nothing(options: str, seed: int) -> None:
    subject, model, tuned = attached(f"lora(r=2) + ist(T_u=1, {options})", depth=4)

    def probe() -> Tensor:
        return loss(model, subject.batch(seed))

    tuned.begin(9, probe)
    for p in tuned.parameters():
        p.data.normal_(0, 0.3)
    for _ in range(3):
        sampling(tuned).after_step()
    assert float(sampling(tuned).I.abs().max()) < 1e-12 and sampling(tuned).step == 3


def test_ist_shows_all_candidates_one_batch_where_the_probe_can(seed: int) -> None:
    subject, model, tuned = attached("lora(r=2) + ist(T_u=1, beta=1.0)", depth=4)

    class Probe:
        at = 0

        def __call__(self) -> Tensor:
            self.at += 1
            return self.again()

        def again(self) -> Tensor:
            assert not model.training and not torch.is_grad_enabled()
            torch.rand(3)  # as a data loader may
            return loss(model, subject.batch(seed + self.at))

    probe = Probe()
    tuned.begin(9, probe)
    model.train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    for _ in range(3):
        sampling(tuned).after_step()
    assert probe.at == 3 and float(sampling(tuned).I.abs().max()) < 1e-12
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_ist_finds_the_layer_that_matters(seed: int) -> None:
    """Only layer 2's adapter carries the solution: damping it hurts, so −I is the largest there and it is drawn most often."""
    subject, model, tuned = attached(f"lora(r=2) + ist(T_u=1, K=4, seed={seed})", depth=5)
    batch = subject.batch(seed)
    for part in tuned.adapters["default"].parts:
        part.tensors()["B"].data.normal_(0, 3.0 if part.site.depth == 2 else 1e-3, generator=Generator().manual_seed(seed))
    with torch.no_grad():
        wanted = model(**batch).logits

    def probe() -> Tensor:
        return (model(**batch).logits - wanted).square().mean()

    tuned.begin(100, probe)
    drawn: Counter[int] = Counter()
    for _ in range(40):
        sampling(tuned).after_step()
        drawn.update(sampling(tuned).on)
    assert int(sampling(tuned).I.argmin()) == 2 and float(sampling(tuned).I[2]) < 0
    assert drawn.most_common(1)[0][0] == 2


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[list[list[tuple[int, ...]]]]:
    """Shapes of what each block keeps for backward, weights (which are there anyway) left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    blocks: Any = model.model.layers  # type: ignore[union-attr]
    found: list[list[tuple[int, ...]]] = [[] for _ in blocks]
    inside: list[Any] = []

    def enter(block: nn.Module, *_: Any) -> None:
        into = found[list(blocks).index(block)]

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                into.append(tuple(t.shape))
            return t

        inside.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        inside[-1].__enter__()

    with contextlib.ExitStack() as undo:
        for block in blocks:
            undo.callback(block.register_forward_pre_hook(enter).remove)
            undo.callback(block.register_forward_hook(lambda *_: inside.pop().__exit__(None, None, None)).remove)
        yield found


@pytest.mark.parametrize("method", ["lora(r=2, targets='attn.q attn.v mlp.down')", "dora(r=2)", "ssf", "bottleneck-adapter"])
def test_ist_layers_that_are_off_keep_nothing(method: str, seed: int) -> None:
    """Below the lowest layer drawn nothing is kept, base included; off layers above it keep what they keep without an adapter.

    The last holds for LoRA, whose branch is linear in x: it keeps factors (two axes), no activations (three)."""
    subject, model, tuned = attached(f"{method} + ist(scored=False)", depth=4)
    tuned.begin()
    sampling(tuned).on = [2]
    sampling(tuned).switch()
    model.train()
    with kept(model) as found:
        loss(model, subject.batch(seed)).backward()
    assert found[:2] == [[], []] and found[2] and found[3]
    for part in tuned.adapters["default"].parts:
        assert all((p.grad is not None) == p.requires_grad == (part.site.depth in (2, None)) for p in part.tensors().values())
    if method.startswith("lora"):
        plain = subject.build(depth=4)
        veneer.attach(plain, f"{method[:-1]}, leave_out=(0, 1, 3))", head=False)
        with kept(plain.train()) as alone:
            loss(plain, subject.batch(seed)).backward()
        for ours, bare in zip(found, alone):
            assert [shape for shape in ours if len(shape) > 2] == [shape for shape in bare if len(shape) > 2]


def test_ist_leaves_shared_tensors_alone(seed: int) -> None:
    subject, _, tuned = attached("lora(r=2) + lorta + ist(scored=False)", "bert", depth=4)
    list(trained(subject, tuned, seed, 3))
    for part in tuned.adapters["default"].parts:
        on = part.method.slug == "lorta" or part.site.depth in sampling(tuned).on
        assert all(t.requires_grad == on for t in part.tensors().values() if isinstance(t, nn.Parameter))
    with pytest.raises(Unsupported, match="share every tensor"):
        attached("lorta + ist(scored=False)", "bert")[2].begin()


def test_ist_refusals_and_rst() -> None:
    with pytest.raises(BadValue, match=r"probe=….*scored=False"):
        attached("lora + ist")[2].begin(10)
    for spec, subject, words in (
        ("prefix-tuning + ist", "llama", "keys and values"),
        ("prompt-tuning + ist", "llama", "none of its tensors lies in a layer"),
        ("lora + ist", "encoder", "read from outside"),
    ):
        with pytest.raises(Unsupported, match=words):
            attached(spec, subject)[2].begin(10, lambda: torch.zeros(()))
    for spec, subject in (("prefix-tuning + ist(scored=False)", "llama"), ("lora + ist(scored=False)", "encoder")):
        tuned = attached(spec, subject)[2]
        tuned.begin()
        assert len(sampling(tuned).on) == 1
    for bad in ({"N_u": 0}, {"N_u": 1.5}, {"K": 0}, {"T_u": 0}, {"beta": -1}):
        with pytest.raises(BadValue, match="out of range"):
            registry.method("ist", **bad)


def test_nothing_disturbs_and_one_process_agrees_with_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    with contextlib.suppress(KeyError), undisturbed(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]
    assert math.isclose(float(agreed(torch.tensor(2.0))), 2.0)


# -- Trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "lora(r=2) + id3(B=60, exp=0.5)",
        "full(targets='attn.q mlp.down') + id3(B=0.1)",
        "lora(r=2) + ist(T_u=2)",
        "lora(r=2) + ist(scored=False)",
    ],
)
def test_resumed_runs_equal_uninterrupted_ones(spec: str, tmp_path: Path) -> None:
    """With dropout, weight decay and a schedule: checkpoint in the middle, another process's model, the same numbers at the end."""
    from transformers import TrainingArguments

    from veneer.train import AdapterTrainer

    subject = SUBJECTS["bert"]
    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(torch.randint(2, 48, (24, 6)))]

    class Mine(AdapterTrainer):
        def probe(self) -> Tensor:
            """On rows that the step decides, so that a resumed run sees the same."""
            at = self.state.global_step % 20
            batch = {k: torch.stack([r[k] for r in rows[at : at + 4]]) for k in ("input_ids", "labels")}
            return self.model(**batch).loss

    def run(resume: bool) -> dict[str, Tensor]:
        model = subject.build(torch.float32, depth=4)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.1
        tuned = veneer.attach(model, spec)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, save_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
            report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        Mine(model=model, args=args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resume else None)
        return {key: p.detach().clone() for key, p in tuned.named_parameters()}

    whole, again = run(False), run(True)
    assert all(torch.equal(t, again[key]) for key, t in whole.items())
