"""PYRA and token merging: against numbers of the authors' code, and the laws of sequences that get shorter block by block."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_golden import Case
from tiny import SUBJECTS, images, moved, output, spread, vit
from torch import Generator, Tensor, nn

import veneer
from veneer import anatomy
from veneer.errors import BadFile, BadValue, NoMatch, Unsupported
from veneer.maths.token_merging import alike, counted, merged, packed, taken, unpacked
from veneer.methods.activation.pyra import PYRA
from veneer.site import Site

SIDE, PATCHES = 16, 16


def block(tokens: int = 0, length: int = 12, index: int = 0, width: int = 768) -> Site:
    return Site(f"blocks.{index}", f"blocks.{index}", "block", "block", index, width, width, index=index, length=length, tokens=tokens)


# -- against the authors' numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_authors_numbers(index: int) -> None:
    case = Case("pyra", index)
    r, x = case.hyper["r"], case["x"]
    pairs = alike(case["metric"], r, 1)
    assert torch.equal(pairs.source, 2 * case["out.src_idx"].flatten(1))
    assert torch.equal(pairs.target, 2 * case["out.dst_idx"].flatten(1) + 1)
    kept = case["out.unm_idx"].flatten(1)
    assert torch.equal(pairs.kept[:, : kept.shape[1]], 2 * kept)
    y, where = PYRA(r=r).merge(x, torch.ones(x.shape[:2]), case["metric"], r, case.params())
    case.agree("y", y)
    case.agree("out.size", counted(where, y.shape[1])[..., None].to(x.dtype))


def by_hand(x: Tensor, size: Tensor, keys: Tensor, r: int, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One picture's tokens [n, D], class token first, merged by loops."""
    n = len(x)
    unit = keys / keys.norm(dim=1, keepdim=True)
    best = []
    for a in range(2, n, 2):
        score, b = max((float(unit[a] @ unit[b]), b) for b in range(1, n, 2))
        best.append((score, a, b))
    going = sorted(best, key=lambda found: -found[0])[:r]
    X = [x[i] * size[i] for i in range(n)]
    D = torch.stack([F.layer_norm(X[a] + X[b], (x.shape[1],), p["ln_w"], p["ln_b"]) for _, a, b in going])
    w_c = 2 * torch.sigmoid((p["W_r"] * D).sum(0))
    total = size.tolist()
    for row, (_, a, b) in enumerate(going):
        w_t = 2 * torch.sigmoid(D[row] @ p["W_D"][0]) - 1
        X[b] = X[b] + X[a] + X[a] * w_c * w_t
        total[b] += float(size[a])
    gone = {a for _, a, _ in going}
    rows = [i for i in range(0, n, 2) if i not in gone] + list(range(1, n, 2))
    return torch.stack([X[i] / total[i] for i in rows]), torch.tensor([total[i] for i in rows])


def test_sizes_weigh_the_mean_and_the_features(seed: int) -> None:
    made = Generator().manual_seed(seed)
    x, keys = (torch.randn(3, 11, d, dtype=torch.float64, generator=made) for d in (8, 4))
    where = torch.randint(11, (3, 20), generator=made)
    where[:, :11] = torch.arange(11)
    size = counted(where, 11)
    p = {k: torch.randn(s, dtype=torch.float64, generator=made) for k, s in dict(W_r=(4, 1), W_D=(1, 8), ln_w=(8,), ln_b=(8,)).items()}
    y, to = PYRA().merge(x, size, keys, 4, p)
    for i in range(3):
        rows, sizes = by_hand(x[i], size[i].double(), keys[i], 4, p)
        torch.testing.assert_close(y[i], rows)
        assert torch.equal(counted(to.gather(1, where), 7)[i].double(), sizes)


# -- the maths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [9, 12])
def test_pairs(n: int, protected: int, seed: int) -> None:
    """Protected tokens stay first; every row is kept or goes to one that is; equal tokens stay equal; sizes add up to n."""
    made = Generator().manual_seed(seed)
    r = (n - protected) // 2
    pairs = alike(torch.randn(2, n, 3, generator=made), r, protected)
    assert torch.equal(pairs.kept[:, :protected], torch.arange(protected).expand(2, -1))
    assert torch.equal(torch.cat([pairs.kept, pairs.source], 1).sort(1).values, torch.arange(n).expand(2, -1))
    assert (pairs.source >= protected).all() and (pairs.target >= protected).all()
    assert torch.equal(pairs.where.gather(1, pairs.kept), torch.arange(n - r).expand(2, -1))
    assert torch.equal(pairs.kept.gather(1, pairs.where.gather(1, pairs.source)), pairs.target)
    assert (counted(pairs.where, n - r).sum(1) == n).all()
    x, one = torch.randn(2, 1, 4, generator=made).expand(2, n, 4), torch.ones(2, n, 1)
    mean = merged(x, taken(x, pairs.source), pairs) / merged(one, taken(one, pairs.source), pairs)
    torch.testing.assert_close(mean, x[:, : n - r])


def test_a_scale_of_zero_is_plain_merging(seed: int) -> None:
    made = Generator().manual_seed(seed)
    x, keys, size = torch.randn(2, 9, 8, generator=made), torch.randn(2, 9, 4, generator=made), torch.ones(2, 9)
    fresh = PYRA(r=3).init(block(197, width=8), made)
    assert len(fresh["W_r"]) == 3
    assert torch.equal(PYRA().merge(x, size, keys, 3, fresh)[0], PYRA().merge(x, size, keys, 3, {})[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [16, 7])
def test_places_travel_exactly(dtype: torch.dtype, D: int) -> None:
    for n0, gone in ((300, 40), (17, 1), (1370, 700)):
        h, where = torch.randn(2, n0 - gone, D).to(dtype), torch.randint(n0 - gone, (2, n0))
        h2, where2 = unpacked(packed(h, where), gone)
        assert torch.equal(h2, h) and torch.equal(where2, where)


def test_counts() -> None:
    """sum r_l + 3 d L: 27,840 at high compression of ViT-B/16, 27,834 at low."""
    high = PYRA(schedule=(40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3))
    for method, total, gone in ((high, 27_840, 192), (PYRA(), 27_834, 186), (PYRA(leave_out=(3,)), 11 * 2304 + 176, 176)):
        sites = [block(197, index=i) for i in range(12)]
        tensors = [t for s in sites for t in method.init(s, Generator()).values()]
        assert (sum(t.numel() for t in tensors), sum(method.gone(sites[0]))) == (total, gone)
    assert PYRA().gone(block(197)) == (16,) * 11 + (10,)
    assert PYRA(r=8).gone(block(197, length=24)) == (8,) * 23 + (6,)


# -- inside models ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """timm's, by names and order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2))


class Maskless(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential()
        for name, layer in (("fc1", nn.Linear(width, 2 * width)), ("act", nn.GELU()), ("fc2", nn.Linear(2 * width, width))):
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)


class Timm(nn.Module):
    """timm's VisionTransformer by names and order."""

    def __init__(self, depth: int = 2, width: int = 16, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, PATCHES + 1, width))
        self.patch_embed = Patches(width)
        self.blocks = nn.Sequential(*[Block(width, 4, attention) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def hub(name: str, depth: int = 2, **options: Any) -> nn.Module:
    import transformers

    known = dict(image_size=SIDE, patch_size=4, hidden_size=16, num_hidden_layers=depth, num_attention_heads=4, num_labels=3)
    if "Dinov2" not in name:
        known["intermediate_size"] = 32
    config = getattr(transformers, name.replace("ForImageClassification", "").replace("Model", "") + "Config")
    return getattr(transformers, name)(config(**known | options))


MODELS = {
    "vit": functools.partial(vit, image_size=SIDE),
    "eager": functools.partial(vit, image_size=SIDE, attn_implementation="eager"),
    "dinov2": functools.partial(hub, "Dinov2ForImageClassification"),
    "clip": functools.partial(hub, "CLIPVisionModel"),
    "siglip": functools.partial(hub, "SiglipVisionModel"),
    "timm": Timm,
}


def model_of(name: str, depth: int = 2) -> nn.Module:
    return spread(MODELS[name](depth)).double().eval()


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    given = model(pixels)
    return given if isinstance(given, Tensor) else given["logits"] if "logits" in given else given["last_hidden_state"]


def pictures(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, dtype=torch.float64, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_twins_merge_without_a_trace(name: str, seed: int) -> None:
    """Pictures of which patches come in equal pairs, in a model without positions: merging pairs of them changes nothing,
    as attention counts a pair twice; and every patch stands at its old place in the output."""
    model = model_of(name, depth=3)
    for key, p in model.named_parameters():
        if "pos" in key:
            p.data.zero_()
    single = torch.randn(2, 3, SIDE, SIDE // 8, 4, dtype=torch.float64, generator=Generator().manual_seed(seed))
    pixels = torch.stack([single, single], 4).flatten(3)
    before = answers(model, pixels)
    first = int(name != "siglip")
    tuned = moved(veneer.attach(model, f"lora(targets='mlp.up') + pyra(schedule=(4,), protected={first}, reactivate=False)", head=False))
    with torch.no_grad():
        for _, p in tuned.named_parameters():
            p.zero_()
    torch.testing.assert_close(answers(model, pixels), before, rtol=0, atol=1e-5 if name == "eager" else 1e-10)  # its softmax is float32


@pytest.mark.parametrize("name", MODELS)
def test_sequences_get_shorter(name: str, seed: int) -> None:
    """The feed-forward of block l reads n − r_1 … − r_l tokens, in training as well; the output keeps its shape; the
    model without the adapter is the old one, without hooks."""
    model = model_of(name, depth=3)
    before = answers(model, pictures(seed))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    modules = [model.get_submodule(s.module) for s in anatomy.sites(model) if s.role == "mlp.up"]
    tuned = moved(veneer.attach(model, "lora(targets='attn.k') + pyra(schedule=(5, 3, 2))", head=False), seed)
    seen: list[int] = []
    watching = [m.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1])) for m in modules]
    n = PATCHES + int(name != "siglip")
    for training in (False, True):
        seen.clear()
        assert answers(model.train(training), pictures(seed)).shape == before.shape
        assert seen == [n - 5, n - 8, n - 10]
    for hook in watching:
        hook.remove()
    plain = tuned.detach().eval()
    assert torch.equal(answers(plain, pictures(seed)), before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()) == hooks


def test_the_model_is_its_definition(seed: int) -> None:
    """timm's transformer with the merging written out between its sub-layers gives the same numbers, LoRA on the keys included."""
    model = model_of("timm")
    tuned = moved(veneer.attach(model, "pyra(schedule=(5, 3)) + lora(targets='attn.k')", head=False), seed)
    found = answers(model, pictures(seed))
    pyra = {site.index: p for site, method, p in tuned.entries() if method.slug == "pyra"}
    folded = {site.name: method.weight(model.get_submodule(site.module).weight.detach()[16:32], p, site)
              for site, method, p in tuned.entries() if method.slug == "lora"}  # fmt: skip
    method = tuned.adapters["default"].method.parts[0]
    plain = tuned.detach()
    x = plain.patch_embed.proj(pictures(seed)).flatten(2).transpose(1, 2)
    x = torch.cat([plain.cls_token.expand(len(x), -1, -1), x], 1) + plain.pos_embed
    size = torch.ones(x.shape[:2], dtype=torch.float64)
    for i, r in enumerate((5, 3)):
        block = plain.blocks[i]
        with torch.no_grad():
            block.attn.qkv.weight[16:32] = folded[f"blocks.{i}.attn.qkv.k"]
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2 + size.log()[:, None, None]
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x, where = method.merge(x, size, k.mean(1), r, pyra[i])
        size = torch.zeros(len(x), x.shape[1], dtype=torch.float64).scatter_add(1, where, size)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(plain.head(plain.norm(x)[:, 0]), found)


def test_the_first_gradients(seed: int) -> None:
    """From W_D = 0 the token weights learn first, as LoRA's second factor does."""
    model = model_of("dinov2")
    tuned = veneer.attach(model, "pyra(r=3)", head=False)
    output(model.train(), {"pixel_values": pictures(seed)}).sum().backward()
    grads = {key.rpartition("/")[2]: p.grad for key, p in tuned.named_parameters() if "layer.0" in key}
    assert grads["W_D"].abs().max() > 0 and grads["W_r"].abs().max() == 0


# -- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, said",
    [
        ("pyra(schedule=(9,))", "PYRA: 9 tokens should merge and the block vit.layers.0 reads 17, of which 8 can"),
        ("pyra(schedule=(8, 5))", "5 tokens should merge and the block at vit.layers.1 reads 9, of which 4 can"),
        ("pyra(schedule=(1, 1, 1))", "schedule names 3 blocks, and the stack at vit.layers.0 has 2"),
        ("pyra(protected=16)", "no two of 17 tokens may merge"),
        ("pyra(schedule=3)", "must be one number a block, such as (16, 16, 10)"),
        ("pyra(targets='layers.0')", "matches no site"),
        ("vpt + pyra(r=2)", "VPT + PYRA: one of them changes the number of tokens inside blocks"),
        ("pyra(r=2) + pyra(r=2)", "PYRA + PYRA: one of them changes the number of tokens"),
        ("pyra(r=2) + ladder-side-tuning(w=2)", "PYRA + LadderSideTuning: one of them changes the number"),
        ("pyra(r=2, reactivate=False)", "nothing to train"),
    ],
)
def test_what_does_not_fit(spec: str, said: str) -> None:
    model = vit(image_size=SIDE)
    with pytest.raises((BadValue, Unsupported, NoMatch)) as refused:
        veneer.attach(model, spec, head=False)
    assert said.replace("block vit", "block at vit") in str(refused.value)
    assert not any("veneer" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "model, said",
    [
        (SUBJECTS["bert"].build, "this model reads tokens, not images"),
        (SUBJECTS["convnet"].build, "has no norm before its feed-forward"),
        (SUBJECTS["encoder"].build, "has no norm before its feed-forward"),
        (
            functools.partial(Timm, attention=Maskless),
            "takes no mask, so merged tokens cannot count by their size; choose proportional=False",
        ),
        (functools.partial(hub, "DINOv3ViTModel"), "is told its tokens' places (position_embeddings)"),
    ],
)
def test_other_models(model: Any, said: str) -> None:
    with pytest.raises((BadValue, Unsupported, NoMatch)) as refused:
        veneer.attach(model(), "pyra(r=1, tokens=9)", head=False)
    assert said in str(refused.value)


def test_attention_without_a_mask_merges_unweighted(seed: int) -> None:
    model = spread(Timm(attention=Maskless)).double().eval()
    before = model(pictures(seed))
    veneer.attach(model, "pyra(r=3, proportional=False)", head=False)
    assert (model(pictures(seed)) - before).abs().max() > 1e-4


def test_biases_by_position(seed: int) -> None:
    model = hub("BeitForImageClassification", use_relative_position_bias=True).double()
    veneer.attach(model, "pyra(r=2)", head=False)
    with pytest.raises(Unsupported, match="biases by position already, which do not fit merged tokens"):
        model(pictures(seed))


def test_a_smaller_picture_than_at_attach(seed: int) -> None:
    """What was fitted to 17 tokens meets 5: one sentence, at the block where it cannot go on."""
    model = model_of("dinov2")
    veneer.attach(model, "pyra(r=4)", head=False)
    with pytest.raises(
        BadValue, match=r"4 tokens should merge and the block at dinov2.encoder.layer.0 reads 5, of which 2 can; .* tokens="
    ):
        model(images(Generator().manual_seed(seed))["pixel_values"].double())
    assert answers(model, pictures(seed)).shape == (2, 3)


def test_a_file_for_other_pictures(tmp_path: Any) -> None:
    tuned = veneer.attach(vit(image_size=SIDE), "pyra(r=7)", head=False)
    tuned.save(tmp_path)
    with pytest.raises(BadFile, match=r"W_r was trained to merge 7 tokens, and 2 would merge at vit.layers.0; give tokens= as in training"):
        veneer.load(vit(), tmp_path)
