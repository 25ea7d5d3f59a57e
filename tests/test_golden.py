"""The methods against numbers from their authors' own code, on bare tensors in float64 (tests/golden, one pair of files a method)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor
from torch.nn import functional as F

import veneer.registry as registry
from veneer.maths.starts import add_rows, share_ranks
from veneer.method import KEEP, Call, Method
from veneer.site import Site
from veneer.strategies.rank_budget import Budget, kept, smoothed, triplet_scores

HOME = Path(__file__).parent / "golden"


class Case(dict[str, Tensor]):
    """The tensors of one golden case by name, its hyper-parameters and its tolerance."""

    def __init__(self, slug: str, index: int) -> None:
        facts = json.loads((HOME / f"{slug}.json").read_text("utf-8"))
        prefix = f"case{index}/"
        tensors = load_file(HOME / f"{slug}.safetensors")
        super().__init__({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.hyper = facts["cases"][index]["hyper"]
        self.tolerance = max(facts["tolerance"], 1e-12)

    def params(self, grad: bool = False) -> dict[str, Tensor]:
        return {k.removeprefix("param."): v.clone().requires_grad_(grad) for k, v in self.items() if k.startswith("param.")}

    def agree(self, name: str, value: Tensor) -> None:
        torch.testing.assert_close(value.detach(), self[name], rtol=0, atol=self.tolerance, msg=lambda m: f"{name}: {m}")


@dataclass
class DenseCall(Call):
    """A layer of plain tensors as the layer below: linear, convolution or embedding table [dim, vocabulary]."""

    W: Tensor
    b: Tensor | None = None
    options: dict[str, Any] | None = None
    training: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x)

    def weight(self) -> Tensor:
        return self.W

    def bias(self) -> Tensor | None:
        return self.b

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        W, b = self.W if weight is KEEP else weight, self.b if bias is KEEP else bias
        if self.W.ndim == 4:
            return F.conv2d(x, W, b, **(self.options or {}))
        return F.linear(x, W, b) if x.is_floating_point() else F.embedding(x, W.T)

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        return self(x) + DenseCall((L @ R).reshape(self.W.shape), None, self.options)(x if inner is None else inner)


@dataclass
class FunctionCall(Call):
    """Anything that maps activations to activations as the layer below."""

    run: Any
    training: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        return self.run(x, weight, bias)


def site(role: str = "other", kind: str = "linear", out: int = 12, inside: int = 20, **facts: Any) -> Site:
    return Site("site", "site", role, kind, 0, out, inside, **facts)


def checked(method: Method, case: Case, W: Tensor, at: Site, x: Tensor | None = None, **options: Any) -> None:
    """Dense weight, fold and forward of one case against its W_eff and y."""
    p = case.params()
    W_eff, b_eff = method.fold(W, case.get("b"), p, at)
    case.agree("W_eff", W_eff.T if at.kind == "embedding" else W_eff)
    if "b_eff" in case:
        case.agree("b_eff", b_eff)
    call = DenseCall(W, case.get("b"), options)
    case.agree("y", method.forward(call, case["x"] if x is None else x, p, at))


# -- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "rslora"), [(0, False), (1, True)])
def test_lora_linear(index: int, rslora: bool) -> None:
    case = Case("lora", index)
    method = registry.method("lora", r=3, alpha=6, rslora=rslora)
    assert method.scale == pytest.approx(case.hyper["scale"])
    checked(method, case, case["W"], site())


def test_lora_fused_rows() -> None:
    case = Case("lora", 2)
    method, W, x, p = registry.method("lora", r=2, alpha=4), case["W"], case["x"], case.params()
    ranges = {"q": slice(0, 4), "v": slice(8, 12)}
    W_eff, y = W.clone(), F.linear(x, W, case["b"])
    for i, rows in enumerate(ranges.values()):
        own = {"A": p["A"][2 * i : 2 * i + 2], "B": p["B"][4 * i : 4 * i + 4]}
        at = site(out=4, rows=(rows.start, rows.stop))
        W_eff[rows] = method.weight(W[rows], own, at)
        y[..., rows] = method.forward(DenseCall(W[rows], case["b"][rows]), x, own, at)
    case.agree("W_eff", W_eff)
    case.agree("y", y)


def test_lora_embedding() -> None:
    case = Case("lora", 3)
    checked(registry.method("lora", r=3, alpha=6), case, case["W"].T, site(kind="embedding", out=8, inside=11), case["ids"])


def test_lora_convolution() -> None:
    case = Case("lora", 4)
    at = site(kind="conv", out=8, inside=54, kernel=(3, 3))
    p = {k: v.flatten(1) for k, v in case.params().items()}
    case.update({f"param.{k}": v for k, v in p.items()})
    checked(registry.method("lora", r=3, alpha=6), case, case["W"], at, stride=2, padding=1)


def test_lora_convolution_original_form() -> None:
    case = Case("lora", 5)
    at = site(kind="conv", out=8, inside=54, kernel=(3, 3))
    checked(registry.method("lora", r=2, alpha=4, conv_form="original"), case, case["W"], at, padding=1)


def started(start: str, case: Case) -> tuple[Method, dict[str, Tensor]]:
    method, generator = registry.method("lora", r=3, alpha=case.hyper["alpha"], start=start), Generator().manual_seed(0)
    p = method.init(site(), generator)
    return method, method.init_from_weight(case["W"], case["b"], p, site(), generator)


@pytest.mark.parametrize(("index", "start"), [(6, "pissa"), (7, "olora")])
def test_lora_starts_from_the_weight(index: int, start: str) -> None:
    case = Case("lora", index)
    method, p = started(start, case)
    case.agree("out.BA", p["B"] @ p["A"])
    case.agree("out.W_res", method.weight(case["W"], p | {"B": 0 * p["B"]}, site()))
    case.agree("y", method.forward(DenseCall(case["W"], case["b"]), case["x"], p, site()))
    if start == "pissa":
        sign = torch.sign((p["A"] * case["out.A"]).sum(1))
        case.agree("out.A", sign[:, None] * p["A"])
        case.agree("out.B", p["B"] * sign)


def test_eva_ranks_and_components() -> None:
    case = Case("lora", 8)
    ratios = list(case["score.explained_variance_ratio"])
    assert share_ranks(ratios, case.hyper["r"] * len(ratios)) == case["out.ranks"].tolist()
    x = case["x_inputs"]  # with its mirror image the mean is zero, so the centred components are the uncentred ones
    A = add_rows(None, torch.cat([x, -x]), 4, 4, 0.99).vectors
    case.agree("out.top4_projector", A.T @ A)


@pytest.mark.parametrize("exact", [False, True])
def test_dora_linear(exact: bool) -> None:
    case = Case("dora", 0)
    method, at, W = registry.method("dora", r=3, alpha=6, exact_norm=exact), site(), case["W"]
    start = method.init_from_weight(W, case["b"], method.init(at, Generator()), at, Generator())
    case.agree("m_init", start["m"])
    checked(method, case, W, at)
    p = case.params(grad=True)
    (method.forward(DenseCall(W, case["b"]), case["x"], p, at) * case["C"]).sum().backward()
    for name in ("A", "B"):
        case.agree(f"{'grad_exact' if exact else 'grad'}.{name}", p[name].grad)
    case.agree("grad.m", p["m"].grad)


def test_dora_embedding() -> None:
    case = Case("dora", 1)
    checked(registry.method("dora", r=3, alpha=6), case, case["W"].T, site(kind="embedding", out=8, inside=11), case["ids"])


def test_adalora_forward() -> None:
    case = Case("adalora", 0)
    checked(registry.method("adalora", init_r=3, target_r=2, alpha=6), case, case["W"], site())


def test_adalora_scores_and_masks() -> None:
    case = Case("adalora", 1)
    keys = {"Q": "lora_A", "P": "lora_B", "lambda": "lora_E"}
    scores = []
    for layer in ("l0", "l1"):
        I_bar = {k: torch.zeros_like(case[f"step0/{layer}.{k}.value"]) for k in keys.values()}
        U_bar = dict(I_bar)
        for t in range(case.hyper["steps"]):
            for k in keys.values():
                w, g = case[f"step{t}/{layer}.{k}.value"], case[f"step{t}/{layer}.{k}.grad"]
                I_bar[k], U_bar[k] = smoothed(I_bar[k], U_bar[k], w, g, case.hyper["beta1"], case.hyper["beta2"])
        for k in keys.values():
            case.agree(f"score.I_bar.{layer}.{k}", I_bar[k])
            case.agree(f"score.U_bar.{layer}.{k}", U_bar[k])
        s = {name: I_bar[k] * U_bar[k] for name, k in keys.items()}
        scores.append(triplet_scores({**s, "lambda": s["lambda"].squeeze(1)}))
        case.agree(f"score.S.{layer}", scores[-1])
    for layer, mask in zip(("l0", "l1"), kept(scores, case.hyper["budget"])):
        assert mask.tolist() == case[f"mask.{layer}"].bool().tolist()
        case.agree(f"out.lambda.{layer}", case[f"step2/{layer}.lora_E.value"].squeeze(1) * mask)


def test_adalora_budget() -> None:
    case = Case("adalora", 2)
    h = case.hyper
    schedule = Budget(h["T"], h["t_i"], h["t_f"], h["delta_T"])
    found = [schedule.at(t, h["b0"], h["bT"]) for t in range(1, h["T"] + 1)]
    assert [b for b, _ in found] == case["out.budget"].tolist()
    assert [m for _, m in found] == case["out.mask_now"].bool().tolist()


def test_wegeft_shared_pair() -> None:
    case = Case("wegeft", 0)
    method, p, x = registry.method("wegeft", r=3, alpha=6), case.params(), case["x"]
    for layer in ("layer0", "layer1"):
        W, b = case[f"{layer}.W"], case[f"{layer}.b"]
        case.agree(f"{layer}.W_eff", method.weight(W, p))
        case.agree(f"{layer}.y", method.forward(DenseCall(W, b), x, p, site()))
        case.agree(f"{layer}.y", method.forward(DenseCall(W, b), x, p, site(rows=(0, 12))))  # the factor form
    case.agree("layer0.x_hat", x + method.edit(x, p, site()))


@pytest.mark.parametrize("rows", [None, (0, 12)])
def test_wegeft_gradients(rows: tuple[int, int] | None) -> None:
    case = Case("wegeft", 1)
    p, x = case.params(grad=True), case["x"].clone().requires_grad_()
    y = registry.method("wegeft", r=3, alpha=6).forward(DenseCall(case["W"], case["b"]), x, p, site(rows=rows))
    case.agree("y", y)
    (y * case["C"]).sum().backward()
    case.agree("grad.phi", p["phi"].grad)
    case.agree("grad.psi", p["psi"].grad)
    case.agree("grad.x", x.grad)


def toy(case: Case, qkv: Any, proj: Any) -> Tensor:
    h = case["x"]
    for block in ("block0", "block1"):
        q, k, v = qkv(DenseCall(case[f"{block}.qkv.W"], case[f"{block}.qkv.b"]), h).chunk(3, -1)
        h = h + proj(DenseCall(case[f"{block}.proj.W"], case[f"{block}.proj.b"]), torch.tanh(q) * k + v)
    return h


def test_wegeft_toy_model() -> None:
    case = Case("wegeft", 2)
    method, p = registry.method("wegeft", r=3), case.params()
    at = site(out=8, inside=8)
    case.agree("y", toy(case, lambda call, h: call(h), lambda call, h: method.forward(call, h, p, at)))


def test_wegeft_fused_rows() -> None:
    case = Case("wegeft", 3)
    method, p = registry.method("wegeft", r=3), case.params()

    def qkv(call: DenseCall, h: Tensor) -> Tensor:
        y = call(h)
        for name, start in (("q", 0), ("v", 16)):
            rows = slice(start, start + 8)
            own = {"phi": p[f"phi.{name}"], "psi": p[f"psi.{name}"]}
            at = site(out=8, inside=8, rows=(start, start + 8))
            y[..., rows] = method.forward(DenseCall(call.W[rows], call.b[rows]), h, own, at)
        return y

    case.agree("y", toy(case, qkv, lambda call, h: call(h)))


# -- activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_bottleneck_adapter(index: int) -> None:
    case = Case("bottleneck-adapter", index)
    variant = ("houlsby", "pfeiffer", "houlsby", "parallel")[index]
    act = {2: "relu"}.get(index)
    method, p = registry.method("bottleneck-adapter", variant=variant, m=4, act=act), case.params()
    ln_w, ln_b = p.pop("ln_w", None), p.pop("ln_b", None)
    x, a = case["x"], case.get("out.residual")

    def norm(u: Tensor) -> Tensor:
        return F.layer_norm(u, (20,), ln_w, ln_b, 1e-12)

    if index == 3:
        hA = method.forward(FunctionCall(lambda _: case["out.branch"]), x, p, site("mlp", "branch", 20))
        case.agree("out.hA", hA)
        case.agree("y", norm(hA + x))
    elif index == 1:
        case.agree("out.h", norm(x + a))
        case.agree("y", method.forward(FunctionCall(norm), x + a, p, site("norm.mlp", "norm", 20, post=True)))
    else:
        hA = method.forward(FunctionCall(lambda _: x), x, p, site("mlp.down", "linear", 20))
        case.agree("y", norm(hA + a) if index == 0 else a + hA)


@pytest.mark.parametrize(("index", "role", "name"), [(0, "attn.k", "l_k"), (1, "mlp.down", "l_ff")])
def test_ia3_sides(index: int, role: str, name: str) -> None:
    case = Case("ia3", index)
    case[f"param.{name}"] = case.pop("param.l")
    checked(registry.method("ia3"), case, case["W"], site(role))


def test_ia3_attention() -> None:
    case = Case("ia3", 2)
    method, p, x = registry.method("ia3"), case.params(), case["x"]
    k = method.forward(DenseCall(case["Wk"]), x, p, site("attn.k", inside=12))
    v = method.forward(DenseCall(case["Wv"]), x, p, site("attn.v", inside=12))
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in (x @ case["Wq"].T, k, v))
    case.agree("y", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ case["Wo"].T)


def test_ia3_feed_forward() -> None:
    case = Case("ia3", 3)
    method, p, x = registry.method("ia3"), case.params(), case["x"]
    gate = F.gelu(x @ case["W_gate"].T, approximate="tanh")
    down = DenseCall(case["W_down"])
    case.agree("y", method.forward(down, gate * (x @ case["W_up"].T), p, site("mlp.down")))
    linear_branch = method.forward(DenseCall(case["W_up"]), x, {"l": p["l_ff"]}, site("mlp.up", out=20, inside=12))
    case.agree("y", down(gate * linear_branch))


def test_ssf_linear() -> None:
    case = Case("ssf", 0)
    checked(registry.method("ssf"), case, case["W"], site())


def test_ssf_norm() -> None:
    case = Case("ssf", 1)
    method, at, p = registry.method("ssf"), site("norm.attn", "norm", 20), case.params()
    W_eff, b_eff = method.fold(case["W"], case["b"], p, at)
    case.agree("W_eff", W_eff)
    case.agree("b_eff", b_eff)
    case.agree("y", method.forward(FunctionCall(lambda x: F.layer_norm(x, (20,), case["W"], case["b"])), case["x"], p, at))


def test_ssf_convolution() -> None:
    case = Case("ssf", 2)
    method, at, p = registry.method("ssf"), site("embed.patch", "conv", 12, 48, kernel=(4, 4)), case.params()
    W_eff, b_eff = method.fold(case["W"], case["b"], p, at)
    case.agree("W_eff", W_eff)
    case.agree("b_eff", b_eff)
    y = method.forward(DenseCall(case["W"], case["b"], {"stride": 4}), case["x"], p, at)
    case.agree("y", y.flatten(2).transpose(1, 2))


# -- prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "at"), [(0, 0), (1, 1)])
def test_prompt_tuning(index: int, at: int) -> None:
    from veneer.prompts import insert

    case = Case("prompt-tuning", index)
    method = registry.method("prompt-tuning", length=3)
    P = method.tokens(case.params(), site("model", "model", 8, 8))
    case.agree("y", insert(F.embedding(case["x"], case["param.E"]), P.expand(2, 3, 8), at))
    if index == 0:
        assert torch.equal(insert(case["out.mask_in"], torch.ones(2, 3, dtype=torch.long), at), case["out.mask"])


@pytest.mark.parametrize("index", [0, 1])
def test_prefix_tuning(index: int) -> None:
    from veneer.prompts import eager, widened_mask

    case = Case("prefix-tuning", index)
    method, p, x, causal = registry.method("prefix-tuning", length=4), case.params(), case["x"], case.hyper["causal"]
    PK, PV = method.keys_values(p, site("attn", "attention", 12, 12, heads=3, kv_heads=3, head_dim=4))

    def heads(t: Tensor) -> Tensor:
        return t.view(t.shape[0], -1, 3, 4).transpose(1, 2)

    q, k, v = (heads(F.linear(x, p[f"W{n}"], p[f"b{n}"])) for n in "qkv")
    pk, pv = heads(PK.expand(2, 4, 12)), heads(PV.expand(2, 4, 12))
    text = case["out.mask"].bool()[:, None, None, :].expand(2, 1, 5, 5)
    text = text & torch.ones(5, 5, dtype=torch.bool).tril() if causal else text
    mask = widened_mask(text, None, causal, (4, 5, 5), q)
    module = torch.nn.Module()
    o, weights = eager(module, q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), mask)
    case.agree("y", F.linear(o.flatten(2), p["Wo"], p["bo"]))
    mass = weights[..., :4].sum(-1)
    case.agree("out.lambda", mass)
    plain, prefix = eager(module, q, k, v, text)[0], eager(module, q, pk, pv, None)[0]
    gate = mass.transpose(1, 2)[..., None]
    torch.testing.assert_close(o, (1 - gate) * plain + gate * prefix, rtol=0, atol=1e-12)


def vit_block(case: Case, i: int, h: Tensor) -> Tensor:
    w = {k.removeprefix(f"base.{i}."): v for k, v in case.items() if k.startswith(f"base.{i}.")}
    n = F.layer_norm(h, (12,), w["n1.weight"], w["n1.bias"], 1e-6)
    q, k, v = F.linear(n, w["qkv.weight"], w["qkv.bias"]).view(*h.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
    a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    h = h + F.linear(a, w["proj.weight"], w["proj.bias"])
    n = F.layer_norm(h, (12,), w["n2.weight"], w["n2.bias"], 1e-6)
    return h + F.linear(F.gelu(F.linear(n, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])


def test_vpt_shallow() -> None:
    case = Case("vpt", 0)
    method, h, seen = registry.method("vpt", length=4, deep=False), case["x"], []

    def block(i: int) -> FunctionCall:
        return FunctionCall(lambda x: seen.append((x, vit_block(case, i, x))) or seen[-1][1])

    for i in range(3):
        h = method.forward(block(i), h, case.params() if i == 0 else {}, site("block", "block", 12, 12, index=i, length=3))
    case.agree("out.embedded", seen[0][0])
    norm = (12,), case["base.norm.weight"], case["base.norm.bias"], 1e-6
    case.agree("y", F.layer_norm(seen[-1][1], *norm))
    y = case["y"]
    torch.testing.assert_close(F.layer_norm(h, *norm), torch.cat([y[:, :1], y[:, 5:]], 1), rtol=0, atol=case.tolerance)


# -- selections -------------------------------------------------------------------------------------------------


def test_bitfit() -> None:
    case = Case("bitfit", 0)
    p, x = case.params(grad=True), case["x"].clone().requires_grad_()
    method = registry.method("bitfit")
    y = method.forward(DenseCall(case["W"], case["b"]), x, p, site())
    case.agree("y", y)
    (y * case["grad_y"]).sum().backward()
    case.agree("grad.b", p["b"].grad)
    case.agree("grad.x", x.grad)
    W, b = method.fold(case["W"], case["b"], p, site())
    assert W is case["W"] and b is p["b"]


@pytest.mark.parametrize("index", [0, 1])
def test_ln_tuning(index: int) -> None:
    case = Case("ln-tuning", index)
    eps, gamma, beta = case.hyper["eps"], case["base.gamma"], case.get("base.beta")

    def norm(x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        w, b = gamma if weight is KEEP else weight, beta if bias is KEEP else bias
        return F.layer_norm(x, (20,), w, b, eps) if index == 0 else F.rms_norm(x, (20,), w, eps)

    method, at = registry.method("ln-tuning"), site("norm.attn", "norm", 20)
    start = method.init_from_weight(gamma, beta, {}, at, Generator())
    case.agree("out.base", method.forward(FunctionCall(norm), case["x"], start, at))
    y = method.forward(FunctionCall(norm), case["x"], case.params(), at)
    case.agree("y", y)
    case.agree("out.z", F.linear(y, case["W"], case["b"]))


STUDIES = (
    "sparse-scaling-laws", "music-adapters", "clip-deepfake", "unit-test-generation", "code-generation", "meft", "winter-wheat", "note-dpo",
)  # fmt: skip


def test_every_golden_file_belongs_to_a_method() -> None:
    assert {path.stem for path in HOME.glob("*.json")} <= {*registry.cards(), *STUDIES}
