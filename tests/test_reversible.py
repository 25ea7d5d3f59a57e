"""Reversible blocks: the two equations, gradients without cached activations, files, undoing, and what is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import Case
from test_train import reviews, tiny_bert  # noqa: F401
from tiny import SUBJECTS, exact_norms, loss, moved, output, spread, tokens
from torch import Tensor, nn

import veneer
from veneer.cli.main import main
from veneer.errors import BadValue, Mismatch, NoMatch, UnknownName, Unsupported
from veneer.streams.scheme import Scheme

VARIANTS = ("meft1", "meft2", "meft3")
INSIDE = "bottleneck-adapter(variant='parallel', m=3, act='gelu', s=1, start='bert')"
BESIDE = "bottleneck-adapter(targets='stream', m=3, act='gelu', start='bert')"
AFTER = "bottleneck-adapter(targets='attn', m=3, act='gelu', start='bert')"


def method(variant: str) -> str:
    return f"{INSIDE} + {AFTER if variant == 'meft3' else BESIDE}"


# -- families ---------------------------------------------------------------------------------------------------


def roberta(depth: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=4, vocab_size=48)
    return RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=66, pad_token_id=0, num_labels=3, **sizes))


def bart(depth: int) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes: dict[str, Any] = dict(d_model=16, encoder_layers=depth, decoder_layers=depth, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    return BartForConditionalGeneration(BartConfig(vocab_size=48, max_position_embeddings=64, use_cache=False, **heads, **sizes))


def opt(depth: int, before: bool = True) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=depth, num_attention_heads=4, word_embed_proj_dim=16)
    return OPTForCausalLM(OPTConfig(vocab_size=48, max_position_embeddings=64, do_layer_norm_before=before, use_cache=False, **sizes))


MODELS: dict[str, Any] = {
    "bert": SUBJECTS["bert"].make, "roberta": roberta, "bart": bart, "opt": opt, "opt-post": lambda depth: opt(depth, False),
    "vit": SUBJECTS["vit"].make, "llama": SUBJECTS["llama"].make, "gpt2": SUBJECTS["gpt2"].make, "encoder": SUBJECTS["encoder"].make,
}  # fmt: skip


def make(family: str, depth: int = 2, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spread(MODELS[family](depth)).to(dtype).eval()
    if dtype == torch.float64:
        exact_norms(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    return model


def batch(family: str, seed: int) -> dict[str, Tensor]:
    return SUBJECTS[family].batch(seed) if family in ("vit", "encoder") else tokens(torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss(model, fed).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert float((a[name] - b[name]).norm()) <= rtol * float(b[name].norm()) + 1e-12, name


# -- numbers ----------------------------------------------------------------------------------------------------

PLACES = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense",
    "1": "intermediate.dense", "2": "output.dense", "ln1": "attention.output.LayerNorm", "ln2": "output.LayerNorm",
}  # fmt: skip


@pytest.mark.parametrize(("index", "variant"), [(0, "meft1"), (1, "meft2")])
def test_two_layers_are_the_papers(index: int, variant: str) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    case = Case("meft", index)
    sizes: dict[str, Any] = dict(hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=2, layer_norm_eps=1e-12)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager", **sizes)
    encoder = BertEncoder(config).double()
    p = case.params()
    for i, layer in enumerate(encoder.layer):
        for short, path in PLACES.items():
            module: Any = layer.get_submodule(path)
            names = (f"{short}.w", f"{short}.b") if short.startswith("ln") else (f"W{short}", f"b{short}")
            module.weight.data, module.bias.data = (p[f"L{i}.{name}"] for name in names)
    made = veneer.reversible(encoder, variant)
    assert made.scheme.shares == (case.hyper["lambda"], case.hyper["beta"])
    tuned = veneer.attach(encoder, method(variant))
    own = {f"L{site.depth}.{'rev' if site.role == 'stream' else 'ffn'}": q for site, _, q in tuned.entries()}
    for place, q in own.items():
        for name, tensor in q.items():
            tensor.data = p[f"{place}.{name}"].clone()
    pairs: list[tuple[Tensor, Tensor]] = []
    chain = made.chains[0]
    finished = chain.finished

    def watched(passing: Any, post: bool) -> Tensor:
        pairs.append((passing.other, passing.main) if variant == "meft1" else (passing.main, passing.other))
        return finished(passing, post)

    chain.finished = watched  # type: ignore[method-assign]
    x = case["x"].clone().requires_grad_()
    y = encoder(x).last_hidden_state
    case.agree("y", y)
    for name, value in zip(("out.s1", "out.s2"), pairs[0]):
        case.agree(name, value)
    value = (y * case["out.w"]).sum()
    case.agree("loss", value.reshape(case["loss"].shape))
    value.backward()
    assert x.grad is not None
    case.agree("out.dx", x.grad)
    for place, q in own.items():
        for name, tensor in q.items():
            assert tensor.grad is not None
            case.agree(f"out.grad.{place}.{name}", tensor.grad)
    assert made.error is not None and made.error < 1e-8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_those_of_autograd(family: str, variant: str, seed: int) -> None:
    """Also with dropout, which backward has to repeat, and with an adapter that shares tensors between blocks."""
    model = make(family, dropout=0.2).train()
    made = veneer.reversible(model, variant)
    tuned = moved(veneer.attach(model, f"{method(variant)} + vera(r=3)"), seed)
    fed = batch(family, seed)
    rebuilt = gradients(model, fed)
    assert made.error is not None and made.error < 1e-8
    state = torch.get_rng_state()
    made.cached = True
    kept = gradients(model, fed)
    assert torch.equal(state, torch.get_rng_state()), "backward must leave the generator alone"
    same(rebuilt, kept, 1e-7)
    assert len(rebuilt) >= len(tuned.parameters()) - 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_passes_may_come_before_their_backwards(variant: str, seed: int) -> None:
    model = make("bart").train()
    made = veneer.reversible(model, variant)
    moved(veneer.attach(model, method(variant)), seed)
    fed = [{k: t[: 2 + i] for k, t in batch("bart", seed + i).items()} for i in range(2)]  # batches of different sizes
    found = []
    for made.cached in (False, True):
        model.zero_grad()
        first, second = (loss(model, one) for one in fed)
        (first + 2 * second).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    same(*found, 1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_anything_may_stand_inside_and_beside(variant: str, seed: int) -> None:
    """Methods of every family, rows with adapters of their own, unfrozen weights below and above the blocks."""
    beside = "" if variant == "meft3" else " + dora(r=2, targets='stream') + ia3(targets='stream')"
    model = make("bert", 3)
    made = veneer.reversible(model, variant, layers=2, anchors=1)
    for name, spec in (
        ("default", "lora(r=2) + prefix-tuning(length=2) + full(targets='norm.embed norm.attn')" + beside),
        ("other", "ssf"),
    ):
        moved(veneer.attach(model, spec, name), seed, name=name)
    tuned = veneer.of(model).activate(per_row=["default", None, "other", "default"])
    found = []
    for made.cached in (False, True):
        found.append(gradients(model, batch("bert", seed)))
    same(*found, 1e-7)
    assert any("embeddings" in name for name in found[0]) and len(found[0]) > 20
    alone = tuned.activate("other")
    assert not torch.equal(output(model, batch("bert", seed)), output(alone.activate("default").model, batch("bert", seed)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_shares_come_near_the_base(variant: str) -> None:
    for family in MODELS:
        model = make(family)
        fed = batch(family, 0)
        base = output(model, fed)
        veneer.reversible(model, variant, **({} if variant == "meft2" else {"lambda_": 1e-7}), beta=1.0 if variant == "meft1" else 1e-7,
                          output="sum")  # fmt: skip
        veneer.attach(model, "lora(r=2)")  # starts as nothing
        torch.testing.assert_close(output(model, fed), base, rtol=0, atol=1e-5)


def saved(model: nn.Module, fed: dict[str, Tensor]) -> int:
    """Bytes kept for backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = loss(model, fed)
    assert held.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_does_not_grow_with_depth(variant: str) -> None:
    kept = {}
    for depth in (2, 8):
        model = make("llama", depth, dtype=torch.float32).train()
        made = veneer.reversible(model, variant)
        veneer.attach(model, "lora(r=2)")
        kept[depth] = saved(model, batch("llama", 0))
        made.cached = True
        assert saved(model, batch("llama", 0)) > 2 * kept[depth]
    assert kept[8] == kept[2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_of_rebuilding_are_told_and_anchors_hold_them(variant: str, seed: int) -> None:
    def error(**options: Any) -> float:
        model = make("bert", 10, dtype=torch.float32).train()
        made = veneer.reversible(model, variant, streams="float32", **options)
        moved(veneer.attach(model, method(variant)), seed, 0.02)
        gradients(model, batch("bert", seed))
        assert made.error is not None
        return made.error

    with pytest.warns(UserWarning, match="rebuilt with a relative error of .* Give anchors"):
        wild = error()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = error(anchors=2)
        assert held < 1e-2 and held < wild / 10
        assert error(layers=2) < 1e-2


def test_wide_streams_round_to_what_half_precision_blocks_read_before(seed: int) -> None:
    found = {}
    for streams in ("float64", "float32", "own"):
        model = make("llama", 3, dtype=torch.bfloat16).train()
        made = veneer.reversible(model, "meft1", streams=streams, tolerance=1e9)
        moved(veneer.attach(model, f"lora(r=2) + {BESIDE}"), seed, 0.02)
        assert output(model, batch("llama", seed)).dtype == torch.bfloat16
        gradients(model, batch("llama", seed))
        found[streams] = made.error
    assert found["float64"] < 1e-9 and min(found["float32"], found["own"]) > 1e-3


def test_autocast_is_the_same_backwards(seed: int) -> None:
    model = make("bert", dtype=torch.float32).train()
    made = veneer.reversible(model, "meft3", anchors=1)
    moved(veneer.attach(model, method("meft3")), seed)
    found = []
    for made.cached in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            held = loss(model, batch("bert", seed))
        held.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    same(*found, 0.05)


def test_generation_runs_forwards_with_a_cache(seed: int) -> None:
    for family in ("llama", "opt"):
        model: Any = make(family, 3)
        veneer.reversible(model, "meft3" if family == "llama" else "meft1")
        moved(veneer.attach(model, "lora(r=2)"), seed)
        ids = batch(family, seed)["input_ids"]
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(with_cache, without)


def test_backward_runs_what_forward_ran(seed: int) -> None:
    """Whatever acts by then: another adapter, or none."""
    model, fed = make("bert"), batch("bert", seed)
    veneer.reversible(model, "meft1")
    tuned = moved(veneer.attach(model, f"lora(r=2) + {BESIDE}"), seed)
    expected = gradients(model, fed)
    model.zero_grad()
    held = loss(model, fed)
    with tuned.disabled():
        held.backward()
    same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 1e-9)


# -- files and undoing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_bring_the_network_back(variant: str, tmp_path: Path, seed: int) -> None:
    model, fed = make("bert"), batch("bert", seed)
    veneer.reversible(model, f"{variant}(lambda=0.5)", beta=0.25)
    expected = output(moved(veneer.attach(model, method(variant)), seed).model, fed)
    veneer.of(model).save(tmp_path / "adapter")
    other = make("bert")
    tuned = veneer.load(other, tmp_path / "adapter")
    assert tuned.reversible is not None and tuned.reversible.scheme.shares == (0.5, 0.25)
    torch.testing.assert_close(output(other, fed), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(output(copy.deepcopy(other), fed), expected, rtol=0, atol=1e-12)
    third = make("bert")
    veneer.reversible(third, "meft2" if variant == "meft1" else "meft1")
    with pytest.raises(Mismatch, match="trained as"):
        veneer.load(third, tmp_path / "adapter")
    fourth = make("bert")
    veneer.attach(fourth, "ssf")
    with pytest.raises(Mismatch, match="ordinary network"):
        veneer.load(fourth, tmp_path / "adapter", "second")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_never_far(variant: str, seed: int) -> None:
    model, fed = make("bert"), batch("bert", seed)
    base, keys, classes = output(model, fed), list(model.state_dict()), [type(m) for m in model.modules()]
    made = veneer.reversible(model, variant)
    assert torch.equal(output(model, fed), base), "without an adapter nothing acts"
    tuned = veneer.attach(model, "lora(r=2)" if variant == "meft3" else f"lora(r=2) + {BESIDE}")
    assert not torch.equal(output(model, fed), base)
    with tuned.disabled():
        assert torch.equal(output(model, fed), base)
    with pytest.raises(Unsupported, match="not the base with other weights"):
        tuned.merge()
    if variant != "meft3":
        with pytest.raises(Unsupported, match=r"'default' acts on the streams; call remove\('default'\)"):
            made.undo()
    tuned.detach()
    assert torch.equal(output(model, fed), base) and list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    made = veneer.reversible(model, variant)
    tuned = moved(veneer.attach(model, "lora(r=2)"), seed)
    plain = moved(veneer.attach(make("bert"), "lora(r=2)"), seed).model
    made.undo()
    assert torch.equal(output(model, fed), output(plain, fed)) and tuned.reversible is None
    assert not any(s.role == "stream" for s in veneer.anatomy.sites(model))


def test_a_failed_attach_leaves_the_network() -> None:
    model = make("bert")
    made = veneer.reversible(model, "meft1")
    with pytest.raises(NoMatch):
        veneer.attach(model, "lora(targets='q_porj')")
    assert veneer.of(model).reversible is made and any(s.role == "stream" for s in veneer.anatomy.sites(model))
    veneer.attach(model, method("meft1"))


def test_the_count_is_the_papers() -> None:
    """Two adapters of m = 8 in each of twelve blocks of width 768."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    veneer.reversible(model, "meft1")
    spec = "bottleneck-adapter(variant='parallel', m=8) + bottleneck-adapter(targets='stream', m=8)"
    assert veneer.attach(model, spec).summary().trained == 313_536


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "error", "words"),
    [
        ("meft4", {}, UnknownName, ["'meft4'", "'meft1'", "meft2, meft3"]),
        ("", {}, BadValue, ["the name of a variant"]),
        ("meft1(anchors", {}, BadValue, ["meft1(anchors", "^"]),
        ("meft1(3)", {}, BadValue, ["an option of meft1"]),
        ("meft1(__import__('os'))", {}, UnknownName, ["'__import__'"]),
        ("meft1", {"anchor": 2}, UnknownName, ["'anchor'", "'anchors'"]),
        ("meft1(lamda=0.5)", {}, UnknownName, ["'lamda'", "'lambda'"]),
        ("meft1(lambda=0)", {}, BadValue, ["lambda=0", "more than 0"]),
        ("meft2", {"beta": 0.0}, BadValue, ["beta=0.0", "more than 0"]),
        ("meft1", {"anchors": 0}, BadValue, ["anchors=0", "at least 1"]),
        ("meft1", {"output": "max"}, BadValue, ["'max'", "'mean'"]),
        ("meft1", {"streams": "bf16"}, BadValue, ["'bf16'", "'own'"]),
        ("meft1", {"layers": 3}, BadValue, ["layers=3", "2 blocks"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(spec: str, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    model = make("bert")
    with pytest.raises(error) as told:
        veneer.reversible(model, spec, **options)
    assert all(word in str(told.value) for word in words), told.value
    assert "veneer" not in model._modules


def test_specs_are_read_as_they_are_written() -> None:
    for scheme in (Scheme("meft2"), Scheme("meft3", lambda_=0.5, anchors=2, output="sum"), Scheme(streams="own", layers=3, tolerance=1e-3)):
        assert Scheme.of(scheme.spec) == scheme
    assert Scheme.of("MEFT1(output=mean, lambda=0.2)") == Scheme("meft1", lambda_=0.2, output="mean")


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=48)
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=True, use_cache=False, **sizes)))


class Narrowing(nn.Module):
    """A block that gives every second token."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.fc2(self.fc1(x).relu()))[:, ::2]


class Stacked(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.blocks, self.scale = nn.ModuleList(Narrowing() for _ in range(2)), scale

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.scale == 1.0 else (block(torch.cat([x, x], 1)) * self.scale)[:, : x.shape[1]]
        return x


def test_blocks_that_cannot_be_are_refused_by_name() -> None:
    fed = batch("llama", 0)
    model = neox()
    veneer.reversible(model, "meft3")
    veneer.attach(model, "lora(r=2)")
    with pytest.raises(Unsupported, match=r"gpt_neox.layers.0 \(GPTNeoXLayer\) cannot be cut .*side by side.*meft1 or meft2"):
        model(**fed)
    narrowing = Stacked()
    with pytest.raises(Unsupported, match=r"blocks.0 \(Narrowing\) .*0 attention and 1 feed-forward"):
        veneer.reversible(narrowing, "meft3")
    veneer.reversible(narrowing, "meft1")
    veneer.attach(narrowing, "lora(r=2, targets='mlp.up')")
    with pytest.raises(Unsupported, match=r"the block blocks.0 makes \[2, 3, 16\] of \[2, 6, 16\]"):
        narrowing(torch.randn(2, 6, 16))
    with pytest.raises(Unsupported, match="has no repeated blocks"):
        veneer.reversible(nn.Linear(4, 4), "meft1")


def test_what_would_break_the_chain_is_told() -> None:
    model: Any = make("bart")
    model.model.encoder.layerdrop = 0.1
    with pytest.raises(Unsupported, match=r"model.encoder leaves blocks out at random \(layerdrop=0.1\)"):
        veneer.reversible(model, "meft1")
    model = make("bert").train()
    made = veneer.reversible(model, "meft1")
    with pytest.raises(Unsupported, match=r"is meft1 already; call undo\(\)"):
        veneer.reversible(model, "meft2")
    veneer.attach(model, "lora(r=2)")
    model.gradient_checkpointing_enable()
    with pytest.raises(Unsupported, match="gradient_checkpointing_disable"):
        loss(model, batch("bert", 0))
    model.gradient_checkpointing_disable()
    middle: list[Tensor] = []
    model.bert.encoder.layer[0].register_forward_hook(lambda _m, _i, out: middle.append(out))
    loss(model, batch("bert", 0))
    with pytest.raises(Unsupported, match="output of the last block for the loss"):
        middle[0].sum().backward()
    assert made.error is None
    model.bert.encoder.layer[0].register_forward_hook(lambda _m, _i, out: 2 * out)
    with pytest.raises(Unsupported, match=r"bert.encoder.layer.1 is not given what the block before it gave"):
        model(**batch("bert", 0))
    llama: Any = make("llama")
    veneer.reversible(llama, "meft1")
    veneer.attach(llama, "lora(r=2)")
    with torch.no_grad():
        cache = llama(**batch("llama", 0), use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="leave past_key_values out"):
        llama(input_ids=batch("llama", 0)["input_ids"][:, :1], past_key_values=cache)


# -- training ---------------------------------------------------------------------------------------------------


def test_a_run_trains_in_it_and_predicts_with_it(
    tiny_bert: Path,  # noqa: F811
    reviews: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    run = ["--model", str(tiny_bert), "--data", str(reviews), "--method", method("meft1"), "--steps", "3", "--batch-size", "4"]
    flags = [*run, "--out", str(out)]
    assert main(["train", *flags, "--reversible", "meft1(anchors=1)"]) == 0
    assert "Reversible(meft1(anchors=1), " in capsys.readouterr().out
    assert main(["predict", str(out), "fine words"]) == 0
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 2
    assert "reversible blocks (meft1(anchors=1))" in capsys.readouterr().err
    for wrong, words in (("meft7", "'meft7'"), ("meft1(beta=0)", "beta=0")):
        assert main(["train", *flags, "--reversible", wrong]) == 2
        assert words in capsys.readouterr().err
    assert main(["train", *flags, "--reversible", "meft1", "--checkpointing"]) == 2
    assert "checkpointing exclude each other" in capsys.readouterr().err
