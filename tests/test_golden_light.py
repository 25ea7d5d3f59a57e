"""Light-PEFT: masks, importances and what is kept, against numbers from its authors' code; and the laws of really pruned models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import Case
from test_train import recipe, reviews, tiny_bert  # noqa: F401
from tiny import LABELS, SUBJECTS, VOCABULARY, Subject, images, loss, output, spread, tokens
from torch import Tensor, nn

import veneer
from veneer import anatomy, registry
from veneer.errors import BadFile, BadValue, Mismatch, NoMatch, Unsupported
from veneer.pruned.base import kept_of, prune
from veneer.pruned.choice import kept_heads, kept_modules, kept_neurons, strongest
from veneer.pruned.modules import FACT
from veneer.pruned.shrinking import axes, resized
from veneer.site import Site
from veneer.strategies.early_pruning import EarlyPruning
from veneer.tuned import Tuned

ALL = "lora(r=4, alpha=8, targets='attn.* mlp.*')"


# -- against the authors' numbers --------------------------------------------------------------------------------


def test_kept_heads_and_neurons_and_the_penalty() -> None:
    case = Case("light-peft", 0)
    m_attn, m_ffn, rho = case["param.m_attn"], case["param.m_ffn"], case.hyper["attn_pruning_ratio"]
    heads = torch.stack([kept_heads(m, rho) for m in m_attn])
    neurons = kept_neurons({str(i): m for i, m in enumerate(m_ffn)}, case.hyper["ffn_pruning_ratio"], "global")
    assert torch.equal(heads.byte(), case["mask.heads"])
    assert torch.equal(torch.stack(list(neurons.values())).byte(), case["mask.neurons"])
    model = bert(depth=3, num_attention_heads=8, intermediate_size=24)
    tuned = veneer.attach(model, f"light-peft(lam={case.hyper['l1']}, T=2)", head=False)
    tuned.begin()
    set_masks(tuned, list(m_attn), list(m_ffn))
    case.agree("loss", sum(tuned.loss_terms().values(), torch.zeros(())))


def set_masks(tuned: Tuned, m_attn: list[Tensor], m_ffn: list[Tensor]) -> None:
    left = {"m_attn": list(m_attn), "m_ffn": list(m_ffn)}
    for _, _, p in tuned.entries():
        for name, t in p.items():
            if name in left:
                t.data.copy_(left[name].pop(0))
    assert not left["m_attn"] and not left["m_ffn"]


class Toy(nn.Module):
    """One layer that is told which tokens are real."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*W.T.shape, dtype=W.dtype)
        self.layer.weight.data, self.layer.bias.data = W.clone(), b.clone()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


def weighed(case: Case, steps: list[int], by_place: bool) -> list[float]:
    """The worth of the module and its ranks after these estimation steps."""
    method = registry.method("lora", r=case.hyper["r"], alpha=case.hyper["r"] * case.hyper["scaling"], targets=".*")
    tuned = veneer.attach(Toy(case["W"], case["b"]), method)
    for _, _, p in tuned.entries():
        for name, t in p.items():
            t.data.copy_(case[f"param.{name}"])
    strategy = EarlyPruning(0.0, None)
    strategy.start(tuned, "default", len(steps))
    model, mask = tuned.model.train(), case["out.attention_mask"]
    for i in steps:
        x = case[f"x.{i}"]
        y = model(x, mask) if by_place else model(x, attention_mask=mask)
        y.backward(case[f"grad_y.{i}"])
        strategy.before_step()
        strategy.after_step()
        model.zero_grad()
        model.eval()(x)  # an evaluation in between changes nothing
        model.train()
    assert all(part.respond is None for part in tuned.adapters["default"].parts) and not model._forward_pre_hooks
    ((_, found),) = strategy.worth().items()
    rounded = tuned.adapters["default"].facts[FACT]["0/layer"]
    assert rounded == pytest.approx(found, rel=1e-5)
    return found


def test_importance_of_modules_and_ranks() -> None:
    case = Case("light-peft", 1)
    for i in range(case.hyper["steps"]):
        module, *ranks = weighed(case, [i], by_place=bool(i % 2))
        assert module == pytest.approx(float(case["score.module_steps"][i]), abs=case.tolerance)
        assert ranks == pytest.approx(case["score.rank_steps"][i].tolist(), abs=case.tolerance)
    module, *ranks = weighed(case, list(range(case.hyper["steps"])), by_place=False)
    case.agree("score.module", torch.tensor(module, dtype=torch.float64))
    case.agree("score.rank", torch.tensor(ranks, dtype=torch.float64))


def test_kept_modules_and_ranks() -> None:
    case = Case("light-peft", 2)
    worth = {str(i): [float(m), *r.tolist()] for i, (m, r) in enumerate(zip(case["score.module"], case["score.rank"]))}
    found = kept_modules(worth, case.hyper["module_pruning_ratio"], case.hyper["rank_pruning_ratio"], "global")
    stays = case["mask.module"].nonzero()[:, 0].tolist()
    expected = {str(i): mask for i, mask in zip(stays, case["mask.rank"].bool()) if mask.any()}
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


# -- the rule ---------------------------------------------------------------------------------------------------


def test_what_stays_is_strictly_above_the_quantile_and_of_equal_ones_the_last() -> None:
    for n in range(1, 40):
        for ratio in (0.1, 1 / 3, 0.29, 0.5, 0.75, 0.99):
            values = torch.randn(n, dtype=torch.float64)
            mask = strongest(values, ratio)
            above = values > torch.quantile(values, ratio)
            assert torch.equal(mask, above) or n == 1 or abs(ratio * (n - 1) - round(ratio * (n - 1))) < 1e-9
            assert int(mask.sum()) == max(1, n - 1 - int(ratio * (n - 1) + 1e-9))
            tied = strongest(torch.ones(n), ratio)
            assert int(tied.sum()) == int(mask.sum()) and tied.tolist() == sorted(tied.tolist())
        assert strongest(torch.randn(n), 0.0).all()
    assert int(kept_heads(torch.randn(16), 1 / 3).sum()) == 10
    assert kept_heads(torch.tensor([3.0, -1, 1, 0]), 0.5, group=2).tolist() == [True, True, False, False]


def test_every_layer_keeps_a_neuron_and_a_model_a_module() -> None:
    m = {"a": torch.rand(9) + 5, "b": torch.rand(9)}
    kept = kept_neurons(m, 0.7, "global")
    assert int(kept["b"].sum()) == 1 and kept["b"][m["b"].argmax()]
    assert {int(mask.sum()) for mask in kept_neurons(m, 0.7, "layer").values()} == {3}
    worth = {str(i): [float(i), 0.0, 0.0] for i in range(3)}
    found = kept_modules(worth, 0.99, 0.99, "global")
    assert list(found) == ["2"] and found["2"].tolist() == [False, True]
    assert len(kept_modules({"a": [2.0], "b": [1.0]}, 0.5, 0.5, "module")["a"]) == 0  # without ranks it stays whole


def test_mask_scalars_of_roberta_large() -> None:
    method = registry.method("light-peft")
    sites = [
        Site("o", "o", "attn.o", "linear", 0, 1024, 1024, heads=16, kv_heads=16, head_dim=64),
        Site("down", "down", "mlp.down", "linear", 0, 1024, 4096),
    ]
    assert 24 * sum(t.numel() for s in sites for t in method.init(s, torch.Generator()).values()) == 98_688


def test_how_tensors_follow_a_smaller_layer() -> None:
    for spec, what, expected in (
        ("lora", "in", {"A": 1}), ("lora", "out", {"B": 0}), ("lora", "size", {"A": 0, "B": 1}), ("lora(r=400)", "in", {"A": 1}),
        ("lora(start='eva')", "size", {"A": 0, "B": 1}), ("lora(lora_bias=True)", "out", {"B": 0, "b": 0}), ("dora", "in", None),
        ("bottleneck-adapter", "size", {"down_w": 0, "down_b": 0, "up_w": 1}), ("ia3", "out", {"l": 0}), ("oft", "in", None),
        ("bottleneck-adapter(variant='parallel')", "size", {"down_w": 0, "down_b": 0, "up_w": 1}), ("prefix-tuning", "out", None),
    ):  # fmt: skip
        found = axes(veneer.parse(spec), what)
        assert (None if found is None else dict(found)) == expected, (spec, what)
    for spec in ("lora(r=8, alpha=16)", "lora(r=8)", "lora(r=8, rslora=True)", "lora(r=8, alpha=3, rslora=True)"):
        method: Any = veneer.parse(spec)
        smaller: Any = resized(method, 3)
        assert smaller.r == 3 and smaller.scale == pytest.approx(method.scale)


# -- really pruned models -----------------------------------------------------------------------------------------


def bert(depth: int = 2, **changes: Any) -> nn.Module:
    return spread(SUBJECTS["bert"].make(depth, **changes)).double().eval()


def roberta(depth: int = 2, width: int = 16) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=4,
            max_position_embeddings=64, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
        )
    )  # fmt: skip


def dinov2(depth: int = 2, width: int = 16) -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(
        Dinov2Config(
            image_size=8, patch_size=4, hidden_size=width, mlp_ratio=2, num_hidden_layers=depth, num_attention_heads=4, num_labels=LABELS
        )
    )


FAMILIES = {**{name: SUBJECTS[name] for name in ("bert", "llama", "vit", "gpt2")}, "roberta": Subject("roberta", roberta, tokens),
            "dinov2": Subject("dinov2", dinov2, images)}  # fmt: skip


def base_of(subject: Subject) -> nn.Module:
    if subject.name in SUBJECTS:
        return subject.build(depth=3)
    with torch.random.fork_rng():
        return spread(subject.make(3)).double().eval()


def stirred(model: nn.Module, spec: str, seed: int) -> Tuned:
    """An adapter of random numbers with random masks and random worth."""
    tuned = veneer.attach(model, spec)
    generator = torch.Generator().manual_seed(seed)
    for p in tuned.parameters():
        p.data += 0.3 * torch.empty(p.shape).normal_(generator=generator)
    strategy: Any = tuned.adapters["default"].strategies[-1]
    strategy.start(tuned, "default", 2)
    strategy.sums = torch.rand(sum(1 + 4 * bool(a) for a in strategy.axes.values()), generator=generator, dtype=torch.float64)
    strategy.count, strategy.step = 1, 2
    tuned.adapters["default"].facts[FACT] = strategy.worth()
    strategy.watch()
    return tuned


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "veneer" not in n.split("."))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_is_the_whole_one_with_zeros(family: str, seed: int, tmp_path: Path) -> None:
    subject = FAMILIES[family]
    plain = base_of(subject)
    tuned = stirred(copy.deepcopy(plain), f"{ALL} + light-peft(rho_f=0.4, rho_m=0.6)", seed)
    alive = kept_modules(tuned.adapters["default"].facts[FACT], 0.6, 0.5, "global")
    whole = copy.deepcopy(tuned.model)
    before = numbers(tuned.model)
    small = veneer.slim(tuned)
    kept, model = kept_of(small.model), small.model
    sites = {s.name: s for s in anatomy.sites(plain)}
    with torch.no_grad():
        for part in veneer.of(whole).adapters["default"].parts:
            p = part.tensors()
            if part.method.slug == "light-peft":
                for m in p.values():
                    m.copy_(kept.get(part.site.name, torch.ones(m.shape)))
            elif part.method.slug == "lora":
                p["A"] *= alive.get(f"{part.index}/{part.site.name}", torch.zeros(4))[:, None]
    got, expected = subject.answers(model, seed), subject.answers(whole, seed)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # shapes and counts
    hidden, base, lora = 16, before, 0
    for name, mask in kept.items():
        site, gone, d = sites[name], int((~mask).sum()), 0
        near = [s for s in sites.values() if s.depth == site.depth and s.kind == "linear"]
        if site.role == "attn.o":
            assert int(mask.sum()) == 2 and mask.view(site.kv_heads, -1).any(1).equal(mask.view(site.kv_heads, -1).all(1))
            d = site.head_dim * (2 * gone + 2 * gone * site.kv_heads // site.heads) * hidden
            rows = site.head_dim * (gone + 2 * gone * site.kv_heads // site.heads)
        else:
            ways = [s for s in near if s.role in ("mlp.up", "mlp.gate")]
            d, rows = gone * hidden * (len(ways) + 1), gone * len(ways)
        base -= d + (rows if family != "llama" else 0)  # biases
    assert numbers(model) == base < before and base == small.base_size()
    shapes = {s.name: s for s in anatomy.sites(model)}
    for key, ranks in alive.items():
        s = shapes[key.partition("/")[2]]
        lora += int(ranks.sum()) * (s.in_features + s.out_features)
    assert lora == sum(p.numel() for n, p in small.named_parameters() if n.endswith(("/A", "/B")))
    assert all(method.scale == pytest.approx(2) for _, method, _ in small.entries() if method.slug == "lora")  # type: ignore[attr-defined]
    assert {s.heads for s in shapes.values() if s.role == "attn.o"} == {2}
    # files
    small.save(tmp_path)
    again = veneer.load(copy.deepcopy(plain), tmp_path)
    assert torch.equal(subject.answers(again.model, seed), got)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    other = veneer.load(again.detach(), tmp_path)  # on a base that is pruned already
    assert torch.equal(subject.answers(other.model, seed), got)
    # it goes on training
    optimiser = torch.optim.Adam(small.param_groups(1e-2))
    model.train()
    losses = []
    for _ in range(8):
        value = loss(model, subject.batch(seed))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert min(losses[4:]) < losses[0]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ratios_of_zero_change_nothing(family: str, seed: int) -> None:
    subject = FAMILIES[family]
    model = base_of(subject)
    tuned = stirred(model, f"{ALL} + light-peft(rho_a=0, rho_f=0, rho_m=0, rho_r=0)", seed)
    base = {n: p.clone() for n, p in model.named_parameters() if "veneer" not in n}
    before = {n: p.clone() for n, p in tuned.named_parameters() if "/m_" not in n}
    small = veneer.slim(tuned, batch=subject.batch(seed))
    assert not kept_of(model) and all(torch.equal(p, base[n]) for n, p in model.named_parameters() if "veneer" not in n)
    after = dict(small.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert small.adapters["default"].method.spec.startswith("lora(r=4") and "light" not in small.adapters["default"].method.spec


def test_other_modules_follow_too(seed: int, tmp_path: Path) -> None:
    subject = FAMILIES["bert"]
    spec = "bottleneck-adapter(m=4) + dora(r=4, targets='attn.q mlp.up') + ia3 + lora(r=4, start='pissa', targets='attn.o') + bitfit"
    tuned = stirred(base_of(subject), f"{spec} + light-peft(rho_m=0.3)", seed)
    small = veneer.slim(tuned, batch=subject.batch(seed), rho_m=0.2)  # compares by itself
    assert {m.slug for _, m, _ in small.entries()} > {"bottleneck-adapter", "ia3", "probe"}
    got = subject.answers(small.model)
    small.save(tmp_path)
    assert torch.equal(subject.answers(veneer.load(base_of(subject), tmp_path).model), got)


def test_pruning_twice_is_remembered_over_the_whole_base(seed: int, tmp_path: Path) -> None:
    subject = FAMILIES["gpt2"]
    model = base_of(subject)
    small = veneer.slim(stirred(model, f"{ALL} + light-peft(rho_a=0.1, rho_m=0.1)", seed))
    small.detach()
    smaller = veneer.slim(stirred(model, f"{ALL} + light-peft(rho_a=0.1, rho_m=0.1)", seed + 1), batch=subject.batch())
    assert {(len(mask), int(mask.sum())) for name, mask in kept_of(model).items() if "attn" in name} == {(4, 2)}
    got = subject.answers(model)
    smaller.save(tmp_path)
    assert torch.equal(subject.answers(veneer.load(base_of(subject), tmp_path).model), got)


def test_the_penalty_pulls_a_head_that_does_nothing_to_zero(seed: int) -> None:
    """The task asks for the base's own answers, so that all masks but the idle head's and neuron's are held at 1."""
    model = bert(num_attention_heads=4)
    layer = model.bert.encoder.layer[0]  # type: ignore[union-attr, index]
    with torch.no_grad():
        layer.attention.self.value.weight[4:8] = 0
        layer.attention.self.value.bias[4:8] = 0
        layer.output.dense.weight[:, 5] = 0
    batch = SUBJECTS["bert"].batch(seed)
    wanted = output(model, batch).detach()
    tuned = veneer.attach(model, "lora(r=2) + light-peft(lam=1e-4, rho_m=0, rho_r=0)", head=False)
    masks = {n: p for n, p in tuned.named_parameters() if "/m_" in n}
    optimiser = torch.optim.Adam(masks.values(), lr=0.02)
    tuned.begin(50)
    for _ in range(50):
        optimiser.zero_grad()
        (((output(model, batch) - wanted) ** 2).sum() + sum(tuned.loss_terms().values())).backward()
        tuned.before_step()
        optimiser.step()
        tuned.after_step()
    m_attn, m_ffn = (next(p for n, p in masks.items() if "layer.0." in n and n.endswith(kind)) for kind in ("m_attn", "m_ffn"))
    m_attn, m_ffn = m_attn.detach(), m_ffn.detach()
    assert float(m_attn[1]) < 0.3 and m_attn[[0, 2, 3]].min() > m_attn[1] + 0.2
    assert float(m_ffn[5]) < 0.3 < float(m_ffn.mean())
    small = veneer.slim(tuned, rho_a=0.25, rho_f=0.0)
    assert kept_of(small.model)["bert.encoder.layer.0.attention.output.dense"].tolist() == [True, False, True, True]


# -- training -----------------------------------------------------------------------------------------------------


def test_gradient_accumulation_and_checkpointing_weigh_the_same(seed: int) -> None:
    found = []
    for checkpointing in (False, True):
        model = SUBJECTS["bert"].build()
        tuned = veneer.attach(model, f"{ALL} + light-peft(T=2)")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        tuned.begin()
        for part in tuned.adapters["default"].parts:
            if "B" in part.keys:
                part.tensors()["B"].data += 0.1
        for _ in range(2):
            for k in range(2):
                loss(model, SUBJECTS["bert"].batch(seed + k)).backward()
            tuned.before_step()
            tuned.after_step()
        found.append(tuned.adapters["default"].strategies[0].worth())  # type: ignore[attr-defined]
    assert found[0].keys() == found[1].keys()
    assert all(found[0][k] == pytest.approx(found[1][k]) for k in found[0])
    assert all(v[0] > 0 and max(v[1:]) > 0 for v in found[0].values())


def test_two_commands_do_the_whole_and_an_interrupted_one_goes_on(
    tiny_bert: Path,  # noqa: F811
    reviews: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from veneer.cli.export import merge
    from veneer.cli.folder import inspect
    from veneer.store import read
    from veneer.train import Interrupted, Outcome, Recipe, loop, train
    from veneer.train.use import rebuild

    masked = tmp_path / "masked"
    spec = f"{ALL} + light-peft(rho_a=0.5, lam=0.01)"
    train(recipe(tiny_bert, reviews, masked, method=spec, steps=8), say=_quiet, progress=False)
    facts = read(masked / "adapter").about["training"]
    assert len(facts[FACT]) == 12
    settings = {"slim": str(masked), "steps": 9, "method": spec.replace("lam", "rho_m=0.6, lam")}
    said: list[str] = []
    whole = train(Recipe.of({**settings, "out": str(tmp_path / "whole")}), say=said.append, progress=False)
    assert any(line.startswith("Pruned:") for line in said)
    assert whole.base_metrics == Outcome.load(masked).base_metrics and whole.total < Outcome.load(masked).total
    step_end, stopped = loop.RunCallback.on_step_end, [False]

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and not stopped[0]:
            self.interrupt.asked = stopped[0] = True
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(loop.RunCallback, "on_step_end", interrupted)
    wanted = Recipe.of({**settings, "out": str(tmp_path / "parts")})
    with pytest.raises(Interrupted, match="step 5 of 9 is saved"):
        train(wanted, say=_quiet, progress=False)
    parts = train(wanted, say=_quiet, progress=False)
    assert parts.curve == whole.curve and parts.metrics == whole.metrics
    one, two = read(tmp_path / "whole" / "adapter"), read(tmp_path / "parts" / "adapter")
    assert one.tensors.keys() == two.tensors.keys() and all(torch.equal(t, two.tensors[k]) for k, t in one.tensors.items())
    masked.rename(tmp_path / "gone")  # a finished run stands by itself
    model, _, _ = rebuild(tmp_path / "parts")
    assert numbers(model) == whole.total - whole.trained and "pruned" in inspect(tmp_path / "parts")
    with pytest.raises(Unsupported, match="pruned base"):
        merge(tmp_path / "parts", tmp_path / "merged")


def _quiet(line: str) -> None:
    pass


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_second_command_that_cannot_work_is_refused(tiny_bert: Path, reviews: Path, tmp_path: Path) -> None:  # noqa: F811
    from veneer.train import Recipe, train

    with pytest.raises(BadFile, match="not the folder of a run"):
        Recipe.of({"slim": str(tmp_path)})
    train(recipe(tiny_bert, reviews, tmp_path / "plain", steps=1, base=False), say=_quiet, progress=False)
    with pytest.raises(BadValue, match="trained no masks"):
        Recipe.of({"slim": str(tmp_path / "plain")}).check()
    train(recipe(tiny_bert, reviews, tmp_path / "masked", method="lora + light-peft", steps=1, base=False), say=_quiet, progress=False)
    with pytest.raises(BadValue, match="its modules go on"):
        Recipe.of({"slim": str(tmp_path / "masked"), "method": "lora(r=4) + light-peft"}).check()
    Recipe.of({"slim": str(tmp_path / "masked"), "method": "lora + light-peft(rho_a=0.9)"}).check()


def test_ratios_and_places() -> None:
    for name in ("rho_a", "rho_f", "rho_m", "rho_r"):
        for value in (1.0, -0.1):
            with pytest.raises(BadValue, match=f"{name}={value}"):
                registry.method("light-peft", **{name: value})
    with pytest.raises(BadValue, match=r"not on the attn\.q"):
        veneer.attach(bert(), "light-peft(targets='attn.q')")
    method = registry.method("light-peft")
    with pytest.raises(BadValue, match="16 inputs are not 3 heads of width 4"):
        method.check(Site("o", "o", "attn.o", "linear", 0, 16, 16, heads=3, kv_heads=3, head_dim=4))
    with pytest.raises(BadValue, match="must come last: write lora"):
        veneer.attach(bert(), "light-peft + lora(targets='attn.o')").begin(4)
    veneer.attach(bert(), "light-peft + bottleneck-adapter(m=4)").begin(4)  # after the layer, whatever the order
    with pytest.raises(BadValue, match="number of optimiser steps"):
        tuned = veneer.attach(bert(), "lora + light-peft")
        tuned.before_step()


def refused(tuned: Tuned, error: type[Exception], match: str, **changes: Any) -> None:
    """It is refused with this sentence, and nothing has changed."""
    before = {n: p.clone() for n, p in tuned.model.named_parameters()}
    with pytest.raises(error, match=match):
        veneer.slim(tuned, **changes)
    after = dict(tuned.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in after.items())


def test_what_cannot_be_slimmed_is_refused_and_left_as_it_was(seed: int) -> None:
    refused(veneer.attach(bert(), "lora"), BadValue, "no masks to prune by")
    refused(veneer.attach(bert(), "lora + light-peft"), BadValue, "were not weighed.*rho_m=0, rho_r=0")
    refused(veneer.attach(bert(), "light-peft"), BadValue, "no modules to go on with")
    refused(veneer.attach(bert(), "lora + light-peft"), BadValue, "no adapter 'other'", name="other")
    free = {"rho_m": 0.0, "rho_r": 0.0}
    tuned = veneer.attach(bert(), "lora + light-peft")
    veneer.attach(tuned.model, "lora", "second")
    refused(tuned, Unsupported, "remove all but one", **free)
    refused(veneer.attach(bert(), "dora(targets='attn.o') + light-peft"), BadValue, "cannot follow when some inputs", **free)
    refused(veneer.attach(bert(), "wegeft(r=4) + light-peft"), BadValue, "cannot follow when some outputs", **free)
    refused(veneer.attach(bert(), "prefix-tuning(length=2) + lora + light-peft"), BadValue, "keys and values for heads that go", **free)
    tuned = stirred(bert(), "vera(r=4, targets='attn.q mlp.up') + light-peft(rho_a=0, rho_f=0)", seed)
    refused(tuned, BadValue, "share tensors")


def test_models_that_cannot_be_cut_are_refused(seed: int) -> None:
    from transformers import BloomConfig, BloomForCausalLM, Phi3Config, Phi3ForCausalLM, T5Config, T5EncoderModel

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 48,
        "pad_token_id": 0,
    }
    free = {"rho_m": 0.0, "rho_r": 0.0}
    for model, why in (
        (BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=16, n_layer=1, n_head=4)), "interleaved"),
        (T5EncoderModel(T5Config(vocab_size=48, d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=1)), "relative_attention_bias"),
        (Phi3ForCausalLM(Phi3Config(**sizes)), "splits its fused projection"),
        (SUBJECTS["encoder"].build(), "not a plain linear layer"),
    ):
        tuned = veneer.attach(model, "lora(targets='mlp.up') + light-peft")
        refused(tuned, Unsupported, why, **free)
        if why != "not a plain linear layer":
            before = numbers(model)
            assert veneer.slim(tuned, rho_a=0.0, **free).base_size() < before


def test_files_of_pruned_models_and_wrong_bases(seed: int, tmp_path: Path) -> None:
    small = veneer.slim(stirred(bert(), f"{ALL} + light-peft", seed))
    small.save(tmp_path / "small")
    veneer.attach(bert(), "lora").save(tmp_path / "plain")
    with pytest.raises(Mismatch, match=r"base with 32 units at .*this model has 24"):
        veneer.load(bert(intermediate_size=24), tmp_path / "small")
    with pytest.raises(Mismatch, match="cannot be pruned the same way"):
        veneer.load(SUBJECTS["llama"].build(), tmp_path / "small")
    with pytest.raises(Mismatch, match="made for a whole base"):
        veneer.load(small.detach(), tmp_path / "plain")
    other = bert()
    veneer.slim(stirred(other, f"{ALL} + light-peft", seed + 1)).detach()
    with pytest.raises(Mismatch, match="pruned in another way"):
        veneer.load(other, tmp_path / "small")
    with_one = veneer.attach(bert(), "ssf")
    with pytest.raises(Unsupported, match="adapters are attached"):
        veneer.load(with_one.model, tmp_path / "small", "second")
    name = "bert.encoder.layer.0.attention.output.dense"
    with pytest.raises(BadFile, match="does not fit its 4 units"):
        prune(bert(), {name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(NoMatch, match="no output projection"):
        prune(bert(), {"elsewhere": torch.ones(3, dtype=torch.bool)})
    assert veneer.attach(small.model, "lora", "again").save(tmp_path / "again")  # other adapters of the pruned model say so too
    veneer.load(bert(), tmp_path / "again")


def test_a_model_that_reads_its_heads_elsewhere_is_found_out_on_a_batch(seed: int) -> None:
    model = bert()
    tuned = stirred(model, f"{ALL} + light-peft", seed)
    core = model.bert.encoder.layer[0].attention.self  # type: ignore[union-attr, index]
    core.register_forward_hook(lambda module, args, out: (out[0] * (1 + module.num_attention_heads), *out[1:]))
    with pytest.raises(Mismatch, match="in a way that is not known"):
        veneer.slim(tuned, batch=SUBJECTS["bert"].batch())
