"""RED, Compacter, DePT, UniPELT and MAM: numbers from their authors' code, laws and counts of their papers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, FunctionCall, checked, site
from tiny import SUBJECTS, t5, tokens
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer import anatomy
from veneer.errors import BadValue, NoMatch
from veneer.maths.hypercomplex import dense, hypercomplex
from veneer.method import Method
from veneer.site import Site


@functools.cache
def sites_of(kind: str, **config: Any) -> list[Site]:
    """Sites of a published configuration, without its weights."""
    import transformers

    name, _, head = kind.partition(" ")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config))
    return anatomy.sites(model)


def roberta() -> list[Site]:
    return sites_of("Roberta ForMaskedLM", vocab_size=50265)


def t5_base() -> list[Site]:
    facts = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64}
    return sites_of("T5 ForConditionalGeneration", **facts)


def gpt2_medium() -> list[Site]:
    return sites_of("GPT2 LMHeadModel", n_embd=1024, n_layer=24, n_head=16)


def llama2_7b() -> list[Site]:
    return sites_of("Llama ForCausalLM", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def count(method: Method, sites: list[Site]) -> int:
    """Trained numbers from the shapes of first tensors alone."""
    chosen, generator = method.select(sites), Generator()
    tied = [s for s in chosen if method.tie(s) is not None]
    made = [method.init(s, generator) for s in chosen] + ([method.init_shared(tied, generator)] if tied else [])
    return sum(t.numel() for p in made for t in p.values())


def drawn(method: Method, at: Site) -> dict[str, Tensor]:
    """First tensors of one site and the shared ones, in float64, every one of them moved."""
    p = {**method.init(at, Generator()), **method.init_shared([at], Generator())}
    return {k: (t + 0.3 * torch.randn(t.shape)).double() for k, t in p.items()}


def moved(tuned: veneer.Tuned) -> veneer.Tuned:
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return tuned


def method(slug: str, **hyper: Any) -> Any:
    return registry.method(slug, **hyper)


# -- RED --------------------------------------------------------------------------------------------------------


def test_red() -> None:
    case = Case("red", 0)
    checked(method("red"), case, case["W"], site("mlp.down"))


def test_red_forms() -> None:
    at, h = site("mlp.down", inside=12), torch.randn(2, 5, 12, dtype=torch.float64)
    identity = DenseCall(torch.eye(12, dtype=torch.float64))
    for form, names in {"all": "l_scaling l_bias", "scaling": "l_scaling", "bias": "l_bias", "ln": "l_scaling l_bias ln_w ln_b"}.items():
        red = method("red", form=form)
        p = drawn(red, at)
        assert list(p) == names.split()
        edited = p.get("l_scaling", 1) * h + p.get("l_bias", 0)
        wanted = F.layer_norm(edited, (12,), p["ln_w"], p["ln_b"]) if form == "ln" else edited
        torch.testing.assert_close(red.forward(identity, h, p, at), wanted)


def test_red_acts_on_the_feed_forward_alone() -> None:
    names = {s.name for s in method("red").select(roberta())}
    assert len(names) == 12 and all(n.endswith("output.dense") and "attention" not in n for n in names)


@pytest.mark.parametrize(
    ("sites", "targets", "trained"),
    [
        (roberta, None, 18_432),
        (gpt2_medium, None, 49_152),
        (t5_base, None, 36_864),
        (llama2_7b, None, 262_144),
        (roberta, "attn.q attn.k attn.v attn.o mlp.down", 92_160),
    ],
)
def test_red_counts(sites: Any, targets: str | None, trained: int) -> None:
    assert count(method("red", targets=targets), sites()) == trained
    left = method("red", targets=targets, leave_out=(0,))
    assert count(left, sites()) < trained


# -- Compacter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_compacter_layer(index: int) -> None:
    case = Case("compacter", index)
    p = case.params()
    A, L, R = p["A"], p["W_left"], p["W_right"]
    case.agree("W_eff", dense(A, L, R))
    case.agree("y", hypercomplex(case["x"], A, L, R) + case["b"])
    rank = int(torch.linalg.matrix_rank(dense(A, L, R)))
    assert rank <= min(*case["W_eff"].shape, A.shape[0] ** 2 * L.shape[2])


@pytest.mark.parametrize("hyper", [{}, {"r": 2}, {"r": None}, {"factorised": True}, {"shared_rules": False}, {"norm": "both"}])
def test_compacter_is_a_bottleneck_of_dense_products(hyper: dict[str, Any]) -> None:
    compacter, at = method("compacter", m=8, **hyper), site("mlp", "branch", 24, 24)
    p, o = drawn(compacter, at), torch.randn(2, 5, 24, dtype=torch.float64)

    def layer(way: str, x: Tensor) -> Tensor:
        own = "" if compacter.shared_rules else f"{way}_"
        A = p[f"{own}a"] @ p[f"{own}c"] if compacter.factorised else p[f"{own}A"]
        W = dense(A, p[f"{way}_L"], p[f"{way}_R"]) if compacter.r else dense(A, p[f"{way}_W"])
        return F.linear(x, W, p[f"{way}_b"])

    h = F.layer_norm(o, (24,), p["ln_in_w"], p["ln_in_b"]) if hyper.get("norm") else o
    u = layer("up", F.gelu(layer("down", h), approximate="tanh"))
    u = F.layer_norm(u, (24,), p["ln_out_w"], p["ln_out_b"]) if hyper.get("norm") else u
    torch.testing.assert_close(compacter.forward(FunctionCall(lambda x: x), o, p, at), o + u)


def test_compacter_starts() -> None:
    at, o = site("mlp", "branch", 64, 64), torch.randn(3, 64)
    for exact, least in ((True, 0.0), (False, 1e-12)):
        compacter = method("compacter", exact_start=exact)
        p = {**compacter.init(at, Generator().manual_seed(0)), **compacter.init_shared([at], Generator().manual_seed(0))}
        off = float((compacter.forward(FunctionCall(lambda x: x), o, p, at) - o).abs().max())
        assert (off == 0) if exact else (least < off < 1e-6)
    assert float(method("compacter", exact_start=False, n=32).rules(Generator())["A"].std()) == pytest.approx(1e-4, rel=0.1)


def test_compacter_shares_its_rules_across_the_model() -> None:
    tuned = moved(veneer.attach(SUBJECTS["bert"].build(), "compacter", head=False))
    before = SUBJECTS["bert"].answers(tuned.model)
    rules = {id(p["A"]) for _, _, p in tuned.entries()}
    assert len(rules) == 1 and len(tuned.sites()) == 4
    with torch.no_grad():
        next(iter(tuned.entries()))[2]["A"].zero_()
        for _, _, p in tuned.entries():
            p["up_b"].zero_()
    assert not torch.equal(SUBJECTS["bert"].answers(tuned.model), before)
    torch.testing.assert_close(SUBJECTS["bert"].answers(tuned.model), SUBJECTS["bert"].answers(SUBJECTS["bert"].build()))


def test_compacter_counts() -> None:
    assert count(method("compacter"), t5_base()) == 114_112
    assert count(method("compacter"), t5_base()) + sum(s.out_features for s in t5_base() if s.kind == "norm") == 161_728
    assert count(method("compacter", targets="mlp"), t5_base()) == 57_088


def test_compacter_refuses_blocks_that_do_not_fit() -> None:
    with pytest.raises(BadValue, match=r"n=12 does not divide D=1024 and the bottleneck m=32 at site; choose n = 8 or 16"):
        method("compacter", n=12).check(site("mlp", "branch", 1024, 1024))


# -- DePT -------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A model that only looks its tokens up, and keeps what it was given."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.seen: dict[str, Any] = {}

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None) -> tuple[Tensor]:
        embeds = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        self.seen = {"embeds": embeds, "mask": attention_mask}
        return (embeds,)


def dept_on(case: Case, **hyper: Any) -> veneer.Tuned:
    tuned = veneer.attach(Reader(case["embedding"]), method("dept", length=3, s=7, r=4, after_first=False, start="uniform", **hyper))
    with torch.no_grad():
        for _, _, p in tuned.entries():
            for name, t in case.params().items():
                p[name].copy_(t)
    return tuned


def test_dept_inputs() -> None:
    case = Case("dept", 0)
    model = dept_on(case).model
    for given in ({"input_ids": case["input_ids"]}, {"inputs_embeds": case["embedding"][case["input_ids"]]}):
        model(attention_mask=case["attention_mask"], **given)
        case.agree("out.inputs_embeds", model.seen["embeds"])  # type: ignore[union-attr]
        assert torch.equal(model.seen["mask"], case["out.attention_mask"])  # type: ignore[union-attr]


def test_dept_shifts_follow_the_text_behind_padding_on_either_side() -> None:
    case = Case("dept", 0)
    model, text = dept_on(case).model, torch.tensor([[5, 9, 2]])
    pads = torch.zeros(1, 4, dtype=torch.long)
    shown = []
    for ids, mask, at in (
        (torch.cat([text, pads], 1), [1] * 3 + [0] * 4, slice(3, 6)),
        (torch.cat([pads, text], 1), [0] * 4 + [1] * 3, slice(7, 10)),
        (text, [1] * 3, slice(3, 6)),
    ):
        model(input_ids=ids, attention_mask=torch.tensor([mask]))
        shown.append(model.seen["embeds"][:, at])  # type: ignore[union-attr]
    torch.testing.assert_close(shown[0], shown[1])
    torch.testing.assert_close(shown[0], shown[2])


def test_dept_refuses_longer_texts() -> None:
    model = dept_on(Case("dept", 0)).model
    with pytest.raises(BadValue, match="the text has 8 tokens and s=7 rows"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))


def test_dept_without_a_prompt_starts_as_the_base_and_without_a_shift_is_prompt_tuning() -> None:
    bert = SUBJECTS["bert"]
    plain = bert.answers(bert.build())
    tuned = veneer.attach(bert.build(), "dept(length=0)", head=False)
    torch.testing.assert_close(bert.answers(tuned.model), plain)
    moved(tuned)
    assert (bert.answers(tuned.model) - plain).abs().max() > 1e-3
    with pytest.raises(BadValue, match="leave nothing to train"):
        method("dept", length=0, r=0)
    short = bert.answers(veneer.attach(bert.build(), "dept(length=5, r=0)", head=False).model)
    assert torch.equal(short, bert.answers(veneer.attach(bert.build(), "prompt-tuning(length=5)", head=False).model))


def test_dept_generation_with_a_cache_is_generation_without() -> None:
    model = moved(veneer.attach(SUBJECTS["llama"].build(), "dept(length=4, r=2, s=8)")).model.eval()
    ids = torch.tensor([[0, 0, 5, 9], [7, 3, 8, 4]])
    options = {"attention_mask": (ids != 0).long(), "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(ids, max_new_tokens=3, use_cache=True, **options)  # type: ignore[operator]
    for row in range(2):  # a text behind padding is continued as if it stood alone, later tokens unshifted
        alone = ids[row][ids[row] != 0][None]
        own = model.generate(alone, max_new_tokens=3, use_cache=True, do_sample=False)  # type: ignore[operator]
        assert torch.equal(own[0, alone.shape[1] :], made.sequences[row, 4:])


def test_dept_changes_only_the_encoder_of_an_encoder_decoder() -> None:
    model = t5().double().eval()
    fed = tokens(Generator().manual_seed(0))
    start = torch.zeros(4, 1, dtype=torch.long)
    before = model(**fed, decoder_input_ids=start).logits
    tuned = moved(veneer.attach(model, "dept(length=0, r=2, s=8)"))
    after = model(**fed, decoder_input_ids=start).logits
    assert (after - before).abs().max() > 1e-3
    longer = model(**fed, decoder_input_ids=torch.zeros(4, 12, dtype=torch.long)).logits  # s limits the encoder's text alone
    assert longer.shape[1] == 12 and len(tuned.sites()) == 1


@pytest.mark.parametrize(("m", "r", "s"), [(60, 30, 256), (40, 45, 256), (80, 15, 256), (60, 24, 512), (100, 0, 256), (0, 75, 256)])
def test_dept_counts(m: int, r: int, s: int) -> None:
    assert count(method("dept", length=m, r=r, s=s), t5_base()) == 76_800


def test_dept_trains_its_parts_at_two_rates() -> None:
    tuned = veneer.attach(SUBJECTS["bert"].build(), "dept(length=4, lr_ratio=50)", head=False)
    groups = {len(g["params"]): g["lr"] for g in tuned.param_groups(1e-3)}
    assert groups == {1: pytest.approx(0.05), 2: pytest.approx(1e-3)}


# -- UniPELT ----------------------------------------------------------------------------------------------------


def test_unipelt_gated_lora() -> None:
    case, at = Case("unipelt", 0), site("attn.q", out=8, inside=8)
    unipelt = method("unipelt", r=2)
    case.agree("out.gate", unipelt.gate(case["x"], case.params(), at))
    case.agree("y", unipelt.forward(DenseCall(case["W"], case["b"]), case["x"], case.params(), at))


def test_unipelt_gated_adapter_in_a_post_norm_block() -> None:
    case, at = Case("unipelt", 1), site("norm.mlp", "norm", 8, 8, post=True)
    p = case.params()
    norm = FunctionCall(lambda x: F.layer_norm(x, (8,), p["ln_w"], p["ln_b"], 1e-12))
    unipelt, total = method("unipelt", m=3), case["x"] + case["out.residual"]
    case.agree("out.gate", unipelt.gate(norm(total), p, at))
    case.agree("y", unipelt.forward(norm, total, p, at))


def test_unipelt_gated_prefix() -> None:
    case = Case("unipelt", 2)
    at = site("attn", "attention", 8, 8, heads=2, kv_heads=2, head_dim=4)
    unipelt, p, x = method("unipelt", length=3, mid=6), case.params(), case["x"]
    gate = unipelt.gate(x, p, at)
    case.agree("out.gate", gate)

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, 4)).movedim(-2, -3)

    PK, PV = unipelt.keys_values(p, at)
    case.agree("out.PK", heads(PK))
    case.agree("out.PV", heads(PV))
    q, k, v = (F.linear(x, p[f"W{n}"], p[f"b{n}"]) for n in "qkv")
    seen = torch.cat([torch.ones(2, 3), case["out.mask"]], 1).bool()[:, None, None]
    keys, values = (torch.cat([gate * t, own], 1) for t, own in ((PK, k), (PV, v)))
    y = F.scaled_dot_product_attention(heads(q), heads(keys), heads(values), seen)
    case.agree("y", y.movedim(1, 2).flatten(-2))


def test_unipelt_constant_gates_scale_the_prefix() -> None:
    """With gate_w = 0 the gated prefix in the model is prefix tuning with its tables times σ(gate_b)."""
    bert = SUBJECTS["bert"]
    gated = moved(veneer.attach(bert.build(), "unipelt(modules='p', mid=None, length=3)", head=False))
    plain = veneer.attach(bert.build(), "prefix-tuning(length=3)", head=False)
    with torch.no_grad():
        for (_, _, p), (_, _, q) in zip(gated.entries(), plain.entries()):
            p["gate_w"].zero_()
            for name in ("PK", "PV"):
                q[name].copy_(torch.sigmoid(p["gate_b"]) * p[name])
    torch.testing.assert_close(bert.answers(gated.model), bert.answers(plain.model))


def test_unipelt_reads_the_attention_input() -> None:
    """The prefix's gate in the model is the mean over the sequence of what attention reads."""
    bert = SUBJECTS["bert"]
    tuned = moved(veneer.attach(bert.build(depth=1), "unipelt(modules='p', mid=None, length=3)", head=False))
    read: list[Tensor] = []
    attention = tuned.model.get_submodule(tuned.sites()[0].module)
    attention.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    answers = bert.answers(tuned.model)
    _, unipelt, p = next(iter(tuned.entries()))
    gate = torch.sigmoid(read[0] @ p["gate_w"].T + p["gate_b"]).mean(1, keepdim=True)
    torch.testing.assert_close(unipelt.gate(read[0], p, tuned.sites()[0]), gate)  # type: ignore[attr-defined]
    alone = []
    for row in range(4):  # with the gate of its own row frozen into its prefix every row answers as in the batch
        other = veneer.attach(bert.build(depth=1), "prefix-tuning(length=3)", head=False)
        with torch.no_grad():
            q = next(iter(other.entries()))[2]
            for name in ("PK", "PV"):
                q[name].copy_(gate[row] * p[name])
        alone.append(bert.answers(other.model)[row])
    torch.testing.assert_close(answers, torch.stack(alone))


def test_unipelt_closed_gates_leave_the_base_but_for_the_prefix() -> None:
    bert = SUBJECTS["bert"]
    plain = bert.answers(bert.build())
    for modules in ("al", "p"):
        tuned = moved(veneer.attach(bert.build(), f"unipelt(modules='{modules}')", head=False))
        with torch.no_grad():
            for _, _, p in tuned.entries():
                p["gate_w"].zero_()
                p["gate_b"].fill_(-50)
        off = float((bert.answers(tuned.model) - plain).abs().max().detach())
        assert off < 1e-10 if modules == "al" else off > 1e-4  # zero keys still take attention


def test_unipelt_half_open_lora_is_lora_of_half_the_scale() -> None:
    bert = SUBJECTS["bert"]
    gated = moved(veneer.attach(bert.build(), "unipelt(modules='l', r=2)", head=False))
    plain = veneer.attach(bert.build(), "lora(r=2, alpha=1)", head=False)
    with torch.no_grad():
        for (_, _, p), (_, _, q) in zip(gated.entries(), plain.entries()):
            p["gate_w"].zero_(), p["gate_b"].zero_()
            q["A"].copy_(p["A"]), q["B"].copy_(p["B"])
    torch.testing.assert_close(bert.answers(gated.model), bert.answers(plain.model))


def test_unipelt_does_not_look_ahead_in_causal_models() -> None:
    llama = SUBJECTS["llama"]
    model = moved(veneer.attach(llama.build(), "unipelt")).model.eval()
    ids = torch.randint(2, 48, (2, 6))
    other = ids.clone()
    other[:, 4:] = 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :4], model(other).logits[:, :4])
        step = model(ids[:, :5], use_cache=True)
        last = model(ids[:, 5:], past_key_values=step.past_key_values, use_cache=True).logits
        torch.testing.assert_close(last[:, 0], model(ids).logits[:, 5])


@pytest.mark.parametrize(
    ("hyper", "trained"),
    [
        ({}, 11_083_376),
        ({"modules": "p", "mid": None, "gated": False}, 184_320),
        ({"modules": "l", "gated": False}, 294_912),
        ({"modules": "a", "gated": False}, 894_528),
    ],
)
def test_unipelt_counts(hyper: dict[str, Any], trained: int) -> None:
    assert count(method("unipelt", **hyper), roberta()) == trained


def test_unipelt_with_a_prompt_in_front() -> None:
    prompt, union = veneer.parse("prompt-tuning(length=10, start=uniform) + unipelt").parts
    assert count(prompt, roberta()) + count(union, roberta()) == 11_091_056


def test_unipelt_stacks() -> None:
    bert = SUBJECTS["bert"]
    one = veneer.attach(bert.build(), "unipelt(mid=4)", head=False).summary().trained
    assert veneer.attach(bert.build(), "unipelt(mid=4) + unipelt(mid=4) + unipelt(mid=4)", head=False).summary().trained == 3 * one
    with pytest.raises(NoMatch):
        method("unipelt", targets="no.such.place").select(anatomy.sites(bert.build()))


# -- MAM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mid", [None, 6])
def test_mam_is_a_prefix_and_a_parallel_adapter(mid: int | None) -> None:
    for name in ("bert", "llama"):
        subject, prefix = SUBJECTS[name], f"prefix-tuning(length=3, mid={mid})"
        together = veneer.attach(subject.build(), f"mam(length=3, m=5, mid={mid})", head=False)
        stack = veneer.attach(subject.build(), f"{prefix} + bottleneck-adapter(variant='parallel', m=5)", head=False)
        assert [p.shape for p in together.parameters()] == [p.shape for p in stack.parameters()]
        moved(together)
        with torch.no_grad():
            for p, q in zip(together.parameters(), stack.parameters()):
                q.copy_(p)
        torch.testing.assert_close(subject.answers(together.model), subject.answers(stack.model))


def test_mam_scale_is_a_scale_of_the_up_projection() -> None:
    at, x = site("mlp", "branch", 8, 8), torch.randn(2, 5, 8, dtype=torch.float64)
    one, two = method("mam", m=4, s=2.0), method("mam", m=4, s=4.0)
    p = drawn(one, at)
    scaled = {**p, "up_w": p["up_w"] / 2, "up_b": p["up_b"] / 2}
    call = FunctionCall(torch.tanh)
    torch.testing.assert_close(one.forward(call, x, p, at), two.forward(call, x, scaled, at))
