"""Words of the contract that no single method owns: additive, input-side and output-side changes, rebuilt weights, fixed tensors, notes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SUBJECTS, loss
from torch import Generator, Tensor, nn

import veneer
from veneer import registry
from veneer.errors import BadFile, Mismatch
from veneer.init import normal, zeros
from veneer.kernels import low_rank, rebuilt, recomputed, scaled
from veneer.kernels.low_rank import inner_products
from veneer.method import AdditiveMethod, Call, InputMethod, LowRankMethod, Method, OutputMethod, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class Shared(LowRankMethod):
    """W_eff = W + diag(d) B A with A and B drawn from a seed and shared; d [out] of each site, zeros."""

    r: int = option(3, "rank", ge=1)
    seed: int = option(0, "of A and B", ge=0)
    fixed = ("A", "B")

    def init(self, site: Site, generator: Generator) -> Params:
        return {"d": zeros((site.out_features,))}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        own = Generator().manual_seed(self.seed)
        out, inside = max(s.out_features for s in sites), max(s.in_features for s in sites)
        return {"A": normal((self.r, inside), own), "B": normal((out, self.r), own)}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        return p["d"][:, None] * p["B"][: len(p["d"])], p["A"][:, : site.in_features] if site else p["A"]


@dataclass(frozen=True)
class ByDepth(LowRankMethod):
    """W_eff = W + diag of a shared [depth, out] table's row: everything is shared."""

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        return {"table": zeros((sites[0].length, sites[0].out_features))}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        assert site is not None
        return p["table"][site.index][:, None], p["table"].new_ones(1, site.in_features)


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    """Files name methods by slug; other tests must not meet these."""
    veneer.register(Shared, slug="contract-shared")
    veneer.register(ByDepth, slug="contract-depth")
    yield
    for slug in ("contract-shared", "contract-depth"):
        registry._registered.pop(slug)


def attached(method: Method | str, family: str = "vit", depth: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    return veneer.attach(SUBJECTS[family].build(dtype, depth), method, head=False)


def stirred(tuned: Any) -> Any:
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned


# -- fixed tensors ----------------------------------------------------------------------------------------------


def test_fixed_tensors_are_not_trained_and_not_stored_unless_asked(tmp_path: Path) -> None:
    tuned = stirred(attached("contract-shared"))
    before = SUBJECTS["vit"].answers(tuned.model)
    tuned.save(tmp_path / "seed")
    tuned.save(tmp_path / "whole", fixed=True)
    names = {folder: {k.rpartition("/")[2] for k in load_file(tmp_path / folder / "adapter.safetensors")} for folder in ("seed", "whole")}
    assert names == {"seed": {"d"}, "whole": {"d", "A", "B"}}
    for folder in names:
        again = veneer.load(SUBJECTS["vit"].build(), tmp_path / folder)
        assert torch.equal(SUBJECTS["vit"].answers(again.model), before)
        assert all(k.endswith("/d") for k, _ in again.named_parameters())


def test_another_stream_of_random_numbers_is_told(tmp_path: Path) -> None:
    attached("contract-shared").save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    about = json.loads((tmp_path / "veneer.json").read_text())
    assert set(about["fixed"]) == {"0/@all/A", "0/@all/B"}
    about["fixed"]["0/@all/B"] = "0" * 16
    save_file(tensors, tmp_path / "adapter.safetensors", metadata={"veneer": json.dumps(about)})
    with pytest.raises(BadFile, match=r"draws other numbers.*fixed=True"):
        veneer.load(SUBJECTS["vit"].build(), tmp_path)


def test_fixed_tensors_do_not_depend_on_the_adapters_seed() -> None:
    one, two = (veneer.attach(SUBJECTS["vit"].build(), "contract-shared", seed=s, head=False) for s in (1, 2))
    for (_, _, p), (_, _, q) in zip(one.entries(), two.entries()):
        assert torch.equal(p["A"], q["A"]) and torch.equal(p["B"], q["B"])


def test_shared_tensors_of_another_depth_are_refused_with_both_shapes(tmp_path: Path) -> None:
    attached("contract-depth").save(tmp_path)
    with pytest.raises(Mismatch, match=r"'table', shared by .* is \[2, 16\], and this model needs \[3, 16\]"):
        veneer.load(SUBJECTS["vit"].build(depth=3), tmp_path)


# -- input side, output side, additive --------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap(InputMethod):
    """x M with a trained M = I + N."""

    def init(self, site: Site, generator: Generator) -> Params:
        return {"N": zeros((site.in_features, site.in_features))}

    def turn(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return x + x @ p["N"].to(x.dtype)


@dataclass(frozen=True)
class Turn(OutputMethod):
    """h Q with a trained Q = I + N."""

    def init(self, site: Site, generator: Generator) -> Params:
        return {"N": zeros((site.out_features, site.out_features))}

    def turn(self, h: Tensor, p: Params, site: Site) -> Tensor:
        return h + h @ p["N"]


@dataclass(frozen=True)
class TurnAll(Turn):
    """The bias is turned too."""

    turns_bias = True


@dataclass(frozen=True)
class Added(AdditiveMethod):
    """W + D, dense."""

    def init(self, site: Site, generator: Generator) -> Params:
        return {"D": zeros((site.out_features, site.in_features))}

    def change(self, p: Params, site: Site) -> Tensor:
        return p["D"]


@pytest.mark.parametrize("targets", ["attn.q mlp.down", "embed.patch"])
@pytest.mark.parametrize("cls", [Swap, Turn, TurnAll, Added])
def test_forward_is_the_dense_weight_on_every_layer_kind(cls: type[Method], targets: str) -> None:
    tuned = stirred(attached(cls(targets=targets)))
    before = SUBJECTS["vit"].answers(tuned.model)
    torch.testing.assert_close(SUBJECTS["vit"].answers(tuned.merge().model), before, rtol=0, atol=1e-10)


def test_weights_of_the_two_sides() -> None:
    W, N, b = torch.randn(5, 7).double(), torch.randn(7, 7).double(), torch.randn(5).double()
    p = {"N": N}
    torch.testing.assert_close(Swap().weight(W, p), W @ (torch.eye(7) + N).T)
    q = {"N": torch.randn(5, 5).double()}
    torch.testing.assert_close(Turn().weight(W, q), (torch.eye(5) + q["N"]).T @ W)
    assert Turn().fold(W, b, q, Site.bare(W))[1] is b
    torch.testing.assert_close(TurnAll().fold(W, b, q, Site.bare(W))[1], b @ (torch.eye(5) + q["N"]))


# -- kernels ----------------------------------------------------------------------------------------------------


def build(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    return W * (1 + p["a"] @ p["b"])


def test_a_rebuilt_weight_gives_the_plain_gradients_and_keeps_nothing_of_its_size() -> None:
    W, b = torch.randn(6, 9).double(), torch.randn(6).double()
    p = {"a": torch.randn(6, 2).double().requires_grad_(), "b": torch.randn(2, 9).double().requires_grad_()}
    x, kept = torch.randn(3, 4, 9).double().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast = rebuilt.rebuilt_linear(x, lambda: W, b, build, p)
    assert sorted(tuple(t.shape) for t in kept) == [(2, 9), (3, 4, 9), (6, 2)]
    plain, towards = rebuilt.reference(x, W, b, build, p), torch.randn(3, 4, 6).double()
    torch.testing.assert_close(fast, plain)
    inputs = [x, *p.values()]
    for mine, theirs in zip(torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(plain, inputs, towards)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("train_L", "train_R", "saved"), [(True, True, "xt"), (True, False, "t"), (False, True, "x")])
def test_a_low_rank_layer_keeps_what_its_gradients_need(train_L: bool, train_R: bool, saved: str) -> None:
    W, x = torch.randn(6, 9).double(), torch.randn(5, 9).double().requires_grad_()
    L, R = torch.randn(6, 2).double().requires_grad_(train_L), torch.randn(2, 9).double().requires_grad_(train_R)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = low_rank.low_rank_linear(x, W, None, L, R)
    assert ("x" in saved) == any(t.shape == x.shape for t in kept)
    assert ("t" in saved) == any(t.shape == (2, 5) for t in kept)
    towards, inputs = torch.randn(5, 6).double(), [t for t in (x, L, R) if t.requires_grad]
    plain = low_rank.reference(x, W, None, L, R)
    for mine, theirs in zip(torch.autograd.grad(y, inputs, towards), torch.autograd.grad(plain, inputs, towards)):
        torch.testing.assert_close(mine, theirs)


def test_an_edited_input_has_the_plain_gradients() -> None:
    x = torch.randn(2, 3, 7).double().requires_grad_()
    L, R = torch.randn(7, 2).double().requires_grad_(), torch.randn(2, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(low_rank.edit_low_rank, (x, L, R))
    torch.testing.assert_close(low_rank.edit_low_rank(x, L, R), x @ (torch.eye(7) + L @ R).T)


# -- notes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noting(WeightMethod):
    """Leaves the mean of its input for whoever asks."""

    def init(self, site: Site, generator: Generator) -> Params:
        return {"s": zeros((1,))}

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return W * (1 + p["s"])

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        call.note("mean", x.mean() * (1 + p["s"]))
        return super().forward(call, x, p, site)


def test_notes_are_of_the_last_training_pass_and_copies_leave_them_behind() -> None:
    tuned = attached(Noting())
    model: nn.Module = tuned.model
    assert not list(tuned.notes("default", "mean"))
    loss(model.train(), SUBJECTS["vit"].batch(0))
    first = [t for _, _, t in tuned.notes("default", "mean")]
    assert len(first) == len(tuned.sites()) and all(t.requires_grad for t in first)
    loss(model, SUBJECTS["vit"].batch(1))
    second = [t for _, _, t in tuned.notes("default", "mean")]
    assert len(second) == len(first) and not any(torch.equal(a, b) for a, b in zip(first, second))
    assert not list(veneer.of(copy.deepcopy(model)).notes("default", "mean"))
    SUBJECTS["vit"].answers(model.eval(), 2)
    assert all(a is b for a, (_, _, b) in zip(second, tuned.notes("default", "mean")))


# -- rows of one batch ------------------------------------------------------------------------------------------


def four_rows(family: str, specs: dict[str, str], rows: list[str | None]) -> tuple[Any, Tensor, Tensor]:
    """Several adapters on one model: its answers to one mixed batch, and row by row."""
    model = SUBJECTS[family].build()
    for i, (name, spec) in enumerate(specs.items()):
        tuned = veneer.attach(model, spec, name, seed=i, head=False)
        stirred(tuned)
    alone = []
    for row, name in enumerate(rows):
        if name is None:
            with tuned.disabled():
                alone.append(SUBJECTS[family].answers(model)[row])
        else:
            alone.append(SUBJECTS[family].answers(tuned.activate(name).model)[row])
    return tuned, SUBJECTS[family].answers(tuned.activate(per_row=rows).model), torch.stack(alone)


@pytest.mark.parametrize(
    "specs",
    [
        {"a": "lora(r=2)", "b": "lora(r=3)"},
        {"a": "lora(r=2) + adalora(init_r=3, target_r=1, targets='attn.q')", "b": "wegeft(r=2)"},
        {"a": "lora(r=2, lora_bias=True)", "b": "contract-shared"},
    ],
    ids=["two ranks", "a stack and another kind", "a bias and shared factors"],
)
def test_rows_of_different_adapters_answer_as_alone(specs: dict[str, str]) -> None:
    _, together, alone = four_rows("vit", specs, ["b", "a", None, "a"])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_the_frozen_product_runs_once_for_all_rows() -> None:
    tuned, _, _ = four_rows("vit", {"a": "lora(r=2)", "b": "lora(r=3)"}, ["b", "a", None, "a"])
    calls: list[int] = []
    layer = tuned.model.get_submodule(tuned.sites("a")[0].module)
    frozen = layer.veneer.base_forward
    layer.veneer.base_forward = lambda module, x, *rest: calls.append(len(x)) or frozen(module, x, *rest)
    SUBJECTS["vit"].answers(tuned.model)
    assert calls == [4]


def test_a_mixed_batch_compiles_whole() -> None:
    torch._dynamo.reset()
    tuned, _, _ = four_rows("llama", {"a": "lora(r=2)", "b": "wegeft(r=2)"}, ["b", "a", None, "a"])
    batch, parameters = SUBJECTS["llama"].batch(), tuned.parameters()
    plain = loss(tuned.model, batch)
    compiled = loss(torch.compile(tuned.model, fullgraph=True, backend="aot_eager"), batch)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled, plain)
    for mine, theirs in zip(torch.autograd.grad(compiled, parameters), torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(mine, theirs)


# -- files from strangers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["outside", "twice", "negative", "a float"])
def test_positions_outside_the_weight_are_not_read(broken: str, tmp_path: Path) -> None:
    veneer.attach(SUBJECTS["vit"].build(), "shira(r=1, mask='magnitude')", head=False).save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    key = next(k for k in tensors if k.endswith("indices"))
    at = tensors[key].clone()
    at[0, -1] = {"outside": 10**6, "twice": at[0, -2], "negative": -5}.get(broken, at[0, -1])
    at[1, -1] = at[1, -2] if broken == "twice" else at[1, -1]
    tensors[key] = at.float() if broken == "a float" else at
    save_file(tensors, tmp_path / "adapter.safetensors", metadata={"veneer": (tmp_path / "veneer.json").read_text()})
    with pytest.raises(BadFile, match="positions must lie in"):
        veneer.load(SUBJECTS["vit"].build(), tmp_path)


def test_scaled_random_matrices_have_the_plain_gradients() -> None:
    x, A, B = torch.randn(2, 3, 7).double().requires_grad_(), torch.randn(4, 7).double(), torch.randn(5, 4).double()
    d, b = torch.randn(4).double().requires_grad_(), torch.randn(5).double().requires_grad_()

    def random(x: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return scaled.scaled_random(inner_products(x, [A])[0], d, B, b).view(2, 3, 5)

    assert torch.autograd.gradcheck(random, (x, d, b))
    torch.testing.assert_close(random(x, d, b), scaled.reference(x, A, d, B, b))


def test_a_recomputed_run_keeps_its_input_and_tensors_alone() -> None:
    x, a = torch.randn(3, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed.recomputed(x, lambda x, p: torch.tanh(torch.tanh(x * p["a"])), {"a": a})
    assert len(kept) == 2
    plain, towards = torch.tanh(torch.tanh(x * a)), torch.randn(3, 5).double()
    for mine, theirs in zip(torch.autograd.grad(y, (x, a), towards), torch.autograd.grad(plain, (x, a), towards)):
        torch.testing.assert_close(mine, theirs)


def test_fixed_tensors_of_stacked_experts_come_back(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def model() -> nn.Module:
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=48)
        return MixtralForCausalLM(MixtralConfig(num_local_experts=3, num_key_value_heads=2, **sizes)).eval()

    ids = torch.tensor([[3, 9, 11, 5]])
    tuned = stirred(veneer.attach(model(), "shira(r=1, targets='expert.down')", head=False))
    tuned.save(tmp_path)
    before = tuned.model(input_ids=ids).logits
    assert torch.equal(veneer.load(model(), tmp_path).model(input_ids=ids).logits, before)
