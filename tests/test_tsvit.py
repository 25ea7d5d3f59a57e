"""TSViT and the study's ways of tuning it against numbers of the released code, the counts of the study, and the model's laws."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_golden import HOME, Case
from torch import Tensor

import veneer
from veneer import anatomy
from veneer.errors import BadValue, Mismatch, VeneerError
from veneer.models.days import DAYS, day_codes
from veneer.models.tsvit import TSViTConfig, TSViTForSemanticSegmentation
from veneer.models.tsvit_published import load_published, our_name

SLUG = "winter-wheat"
TEMPORAL, SPATIAL = "tsvit.temporal_encoder.layers.", "tsvit.spatial_encoder.layers."
QKV = "attn.q attn.k attn.v"
LINEAR = "embed.patch embed.other attn.q attn.k attn.v attn.o mlp.up mlp.down head.projection"
BIASES = "embed.patch attn.o mlp.up norm.attn norm.mlp"
CHANGE = "full(targets='classifier')"
SMALL: dict[str, Any] = dict(
    image_size=4, patch_size=2, num_channels=3, num_classes=3, hidden_size=8, num_attention_heads=2, head_dim=4, mlp_ratio=2,
    temporal_layers=2, spatial_layers=2, max_dates=5,
)  # fmt: skip


def released(case: Case) -> TSViTForSemanticSegmentation:
    """The case's base model with the released weights in it."""
    h, params = case.hyper, base_params(case)
    outputs = params.get("mlp_change.weight", torch.empty(0)).shape[0] or None
    config = TSViTConfig(
        image_size=h["img_res"], patch_size=h["patch_size"], num_classes=h["num_classes"], max_dates=h["max_seq_len"],
        hidden_size=h["dim"], temporal_layers=h["temporal_depth"], spatial_layers=h["spatial_depth"], num_attention_heads=h["heads"],
        head_dim=h["dim_head"], mlp_ratio=h["scale_dim"], num_channels=h["num_channels"] - 1, num_outputs=outputs, raster_runs=True,
    )  # fmt: skip
    model = TSViTForSemanticSegmentation(config).double().eval()
    load_published(model, params)
    return model


def base_params(case: Case) -> dict[str, Tensor]:
    return {n: t for n, t in case.params().items() if not any(x in n for x in ("lora_", "mlp_down", "mlp_up", "prompt", "to_qkv.bias"))}


def added(case: Case, part: str) -> dict[str, Tensor]:
    """What a way of tuning adds, by our name of the layer: `part` is its last name in the released code."""
    return {our_name(n.removesuffix(part)).removesuffix("."): t for n, t in case.params().items() if n.endswith(part)}


def series(case: Case) -> dict[str, Tensor]:
    return {"pixel_values": case["x"][..., :-1].permute(0, 1, 4, 2, 3), "days": case["doy"].long()}


def put(tuned: Any, site: str, **tensors: Tensor) -> None:
    """Writes a site's trained tensors."""
    part = next(p for a in tuned.adapters.values() for p in a.parts if p.site.name == site)
    with torch.no_grad():
        for name, value in tensors.items():
            part.tensors()[name].copy_(value)


# -- released numbers -------------------------------------------------------------------------------------------


def test_the_base() -> None:
    case = Case(SLUG, 0)
    case.agree("y", released(case)(**series(case)).logits)


def test_adaptformer() -> None:
    case = Case(SLUG, 1)
    model = released(case)
    spec = "adaptformer(m=3, s=1.0, leave_out=(2,)) + adaptformer(m=2, s=1.0, leave_out=(0, 1))"
    tuned = veneer.attach(model, spec, head=False)
    names = {"W_down": "mlp_down.weight", "b_down": "mlp_down.bias", "W_up": "mlp_up.weight", "b_up": "mlp_up.bias"}
    found = {ours: added(case, f"2.{theirs}") for ours, theirs in names.items()}
    for layer in found["W_down"]:
        put(tuned, f"stream.{layer}.mlp", **{ours: values[layer] for ours, values in found.items()})
    case.agree("y", model(**series(case)).logits)


def test_prompts_behind_the_norm() -> None:
    case = Case(SLUG, 2)
    model = released(case)
    spec = "vpt(length=2, inside=True, leave_out=(2,)) + vpt(length=3, inside=True, leave_out=(0, 1))"
    tuned = veneer.attach(model, spec, head=False)
    for layer, P in added(case, "0.fn.prompt").items():
        put(tuned, f"{layer}.attention_norm", P=P[0])
    case.agree("y", model(**series(case)).logits)


def test_learned_keys_and_values_in_the_first_blocks() -> None:
    case = Case(SLUG, 3)
    model = released(case)
    spec = "prefix-tuning(length=2, leave_out=(1, 2)) + prefix-tuning(length=3, leave_out=(0, 1))"
    tuned = veneer.attach(model, spec, head=False)
    keys, values = added(case, "0.fn.prompt_k"), added(case, "0.fn.prompt_v")
    for layer in keys:
        flat = [t[0].transpose(0, 1).flatten(1) for t in (keys[layer], values[layer])]  # [heads, m, e] → [m, heads · e]
        put(tuned, f"{layer}.attention", PK=flat[0], PV=flat[1])
    case.agree("y", model(**series(case)).logits)


@pytest.mark.parametrize("fused", [True, False], ids=["as released, one pair for q, k and v", "a pair each"])
def test_lora(fused: bool) -> None:
    case = Case(SLUG, 4)
    model = released(case)
    roles = {"qkv": "attn.qkv"} if fused else {}
    spec = (
        "lora(r=2, alpha=1.0, targets='embed.patch embed.other head.projection')"
        r" + lora(r=3, alpha=1.0, targets='tsvit\.temporal_encoder\.layers\.\d\.(attention|mlp)\..*')"
        r" + lora(r=2, alpha=1.0, targets='tsvit\.spatial_encoder\.layers\.\d\.(attention|mlp)\..*')"
    )
    tuned = veneer.attach(model, spec, head=False, roles=roles)
    A, B = added(case, "lora_A"), added(case, "lora_B")
    for layer in A:
        if layer.endswith("qkv") and not fused:
            for part, rows in zip("qkv", B[layer].chunk(3)):
                put(tuned, f"{layer}.{part}", A=A[layer], B=rows)
        else:
            put(tuned, layer, A=A[layer], B=B[layer])
    case.agree("y", model(**series(case)).logits)
    tuned.merge()
    case.agree("y", model(**series(case)).logits)


def test_bitfit() -> None:
    case = Case(SLUG, 5)
    model = released(case)
    tuned = veneer.attach(model, f"bitfit(create=True, targets='{BIASES} {QKV} mlp.down embed.other head.projection')", head=False)
    for layer, bias in added(case, "to_qkv.bias").items():
        for part, rows in zip("qkv", bias.chunk(3)):
            put(tuned, f"{layer.replace('0.fn', 'attention.qkv')}.{part}", b=rows)
    case.agree("y", model(**series(case)).logits)


def test_days_between_known_days() -> None:
    case = Case(SLUG, 6)
    known, table = case.hyper["train_dates"], case["param.table"]
    torch.testing.assert_close(day_codes(torch.arange(1, DAYS), known) @ table, case["eval_table"], rtol=0, atol=case.tolerance)
    case.agree("y", day_codes(case["query_doy"], known) @ table)
    torch.testing.assert_close(day_codes(torch.tensor(known), known), torch.eye(len(known), dtype=torch.float64))
    apart = day_codes(torch.tensor([0, 3]), known[1:])  # without a code for no picture, day 0 is the first known day
    assert torch.equal(apart[0], apart[1])


# -- counts -----------------------------------------------------------------------------------------------------


STUDY = {
    "all parameters": (None, False),
    "head tuning: mlp_head + mlp_change(19->1)": ("full(targets='head head.norm')", False),
    "BitFit partial + mlp_change": (f"bitfit(targets='{BIASES}') + {CHANGE}", False),
    "AdaptFormer 4/4 + temporal tokens + head + mlp_change": (
        "adaptformer(m=4, s=1.0) + full(targets='class_tokens.tokens head head.norm')", False,
    ),
    "LoRA r=rt=rs=4 + mlp_change": (f"lora(r=4, alpha=1.0, targets='{LINEAR.replace(QKV, 'attn.qkv')}') + {CHANGE}", True),
    "VPT external shallow 0/8 + head + mlp_change": (
        "vpt(length=8, inside=True, deep=False, leave_out=(0, 1, 2, 3)) + full(targets='head head.norm')", False,
    ),
}  # fmt: skip
FURTHER = {
    f"bitfit(create=True, targets='{BIASES} {QKV} mlp.down embed.other head.projection') + {CHANGE}": 11_544,
    "adaptformer(m=8, s=1.0) + full(targets='class_tokens.tokens head head.norm')": 20_696,
    "vpt(length=8, inside=True) + full(targets='head head.norm')": 8_984,
    "prefix-tuning(length=8) + full(targets='head head.norm')": 17_176,
}


def meta(**changes: Any) -> TSViTForSemanticSegmentation:
    with torch.device("meta"):
        return TSViTForSemanticSegmentation(TSViTConfig(**changes))


@pytest.mark.parametrize("row", json.loads((HOME / f"{SLUG}.json").read_text())["counts"], ids=lambda row: row["setting"])
def test_the_counts_of_the_study(row: dict[str, Any]) -> None:
    spec, fused = STUDY[row["setting"]]
    if spec is None:
        assert sum(p.numel() for p in meta().parameters()) == row["trainable"]
        return
    tuned = veneer.attach(meta(num_outputs=1), spec, head=False, roles={"qkv": "attn.qkv"} if fused else None)
    assert tuned.summary().trained == row["trainable"]


@pytest.mark.parametrize("spec", FURTHER)
def test_further_counts_of_the_study(spec: str) -> None:
    assert veneer.attach(meta(num_outputs=1), spec, head=False).summary().trained == FURTHER[spec]


def test_the_small_model_of_the_study() -> None:
    assert sum(p.numel() for p in meta(hidden_size=64, head_dim=16).parameters()) == 435_524


# -- the model --------------------------------------------------------------------------------------------------


def small(**changes: Any) -> TSViTForSemanticSegmentation:
    return TSViTForSemanticSegmentation(TSViTConfig(**SMALL | changes)).double().eval()


def batch(rows: int = 2, dates: int = 5) -> dict[str, Tensor]:
    days = torch.stack([torch.randperm(DAYS - 1)[:dates].sort().values + 1 for _ in range(rows)])
    return {"pixel_values": torch.randn(rows, dates, 3, 4, 4, dtype=torch.float64), "days": days}


def test_a_series_is_a_set_of_dated_pictures() -> None:
    model, given = small(), batch()
    order = torch.randperm(5)
    turned = {k: v[:, order] for k, v in given.items()}
    torch.testing.assert_close(model(**turned).logits, model(**given).logits, rtol=0, atol=1e-10)
    moved = model(**{**given, "pixel_values": turned["pixel_values"]}).logits
    assert torch.equal(order, torch.arange(5)) or (moved - model(**given).logits).abs().max() > 1e-3


def test_masked_dates_do_not_count() -> None:
    model, given = small(), batch()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    filled = {**given, "date_mask": mask}
    other = {**filled, "pixel_values": given["pixel_values"].clone(), "days": given["days"].clone()}
    other["pixel_values"][0, 3:], other["days"][0, 3:] = 7.0, 0
    short = model(given["pixel_values"][:1, :3], given["days"][:1, :3]).logits
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(**filled).logits, model(**other).logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(**filled).logits[:1], short, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", ["vpt(length=3)", "vpt(length=3, inside=True)", "prefix-tuning(length=3)", "lora", "adaptformer(m=2)"])
def test_masked_dates_do_not_count_with_methods(spec: str) -> None:
    model, given = small(), batch()
    tuned = veneer.attach(model, spec)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    short = model(given["pixel_values"][1:, :2], given["days"][1:, :2]).logits
    torch.testing.assert_close(model(**given, date_mask=mask).logits[1:], short, rtol=0, atol=1e-10)


def test_each_pixel_comes_from_its_own_patch() -> None:
    model = small(spatial_layers=0)
    given = batch(1)
    other = {**given, "pixel_values": given["pixel_values"].clone()}
    other["pixel_values"][..., 2:, :2] += 1.0  # the patch at the lower left
    changed = (model(**given).logits != model(**other).logits).any(1)[0]
    assert changed[2:, :2].all() and changed.sum() == 4


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForSemanticSegmentation

    model = small(num_outputs=2, train_days=[0, 10, 200], band_means=[0.1, 0.2, 0.3], band_stds=[1.0, 2.0, 3.0])
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.float64).eval()
    given = batch()
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_adapted_biases_are_saved_in_the_merged_model(tmp_path: Path) -> None:
    model, given = small(), batch()
    tuned = veneer.attach(model, "bitfit(create=True, leave_out=(1,))")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    expected = model(**given).logits
    tuned.merge().detach()
    model.save_pretrained(tmp_path)
    again = TSViTForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(**given).logits, expected, rtol=0, atol=1e-10)


def test_the_input_is_normalised() -> None:
    plain, given = small(), batch()
    own = small(band_means=[1.0, 2.0, 3.0], band_stds=[2.0, 3.0, 4.0])
    own.load_state_dict(plain.state_dict())
    shape = (3, 1, 1)
    raw = given["pixel_values"] * torch.tensor([2.0, 3.0, 4.0]).view(shape) + torch.tensor([1.0, 2.0, 3.0]).view(shape)
    torch.testing.assert_close(own(raw, given["days"]).logits, plain(**given).logits)


def test_half_precision_reads_float32_pictures() -> None:
    model, given = small(band_means=[0.0] * 3, band_stds=[1.0] * 3), batch()
    exact = model(**given).logits
    rounded = model.bfloat16()(given["pixel_values"].float(), given["days"]).logits
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("outputs", [None, 1, 4])
def test_ignored_pixels_do_not_count_in_the_loss(outputs: int | None) -> None:
    model, given = small(num_outputs=outputs), batch()
    n = 2 if outputs == 1 else outputs or 3
    labels = torch.randint(n, (2, 4, 4))
    labels[0, :2] = 255
    logits, kept = model(**given).logits.movedim(1, -1), labels != 255
    if outputs == 1:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[kept][:, 0], labels[kept].double())
    else:
        expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(model(**given, labels=labels).loss, expected)
    assert model(**given, labels=torch.full_like(labels, 255)).loss.item() == 0


def test_the_roles_are_found() -> None:
    sites = anatomy.sites(small(num_outputs=1))
    roles = {s.name: s.role for s in sites}
    assert roles["tsvit.embeddings.patch_embedding"] == "embed.patch" and roles["tsvit.positions.position"] == "embed.position"
    assert roles["head.projection"] == roles["classifier"] == "head" and roles["tsvit.temporal_encoder.norm"] == "norm.final"
    blocks = [s for s in sites if s.kind == "block"]
    assert [(s.depth, s.index, s.length) for s in blocks] == [(0, 0, 2), (1, 1, 2), (2, 0, 2), (3, 1, 2)]
    assert {s.heads for s in sites if s.kind == "attention"} == {2}
    assert all(s.trainable_head for s in sites if s.role == "head")


# -- every method -----------------------------------------------------------------------------------------------

NATURE = "one stack|does not read token ids"
"""Why a method may refuse it: it passes through all blocks of one stack, and here are two; or it adds words."""
SLUGS = [card.slug for card in veneer.methods() if card.family != "strategy"]


def fitted(slug: str, model: torch.nn.Module) -> Any:
    """The method with its whole-number sizes halved until they fit the small layers."""
    import dataclasses
    import warnings

    from veneer import registry
    from veneer.method import replaced

    method, sites = veneer.parse(slug), anatomy.sites(model)
    for _ in range(8):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for part in method.parts:
                    for site in part.select(sites):
                        part.check(site)
            return method
        except BadValue as error:
            if re.search(NATURE, str(error)):
                raise
            sizes = {
                f.name: getattr(method, f.name)
                for f in dataclasses.fields(registry.load(slug))
                if f.name not in ("targets", "seed", "bits")
            }
            halves = {n: v // 2 for n, v in sizes.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
            method = replaced(method, halves)
    raise AssertionError(f"{slug} fits no layer")


@pytest.mark.parametrize("slug", SLUGS)
def test_every_method_adapts_it(slug: str) -> None:
    model = TSViTForSemanticSegmentation(TSViTConfig(**SMALL | dict(hidden_size=16, head_dim=8, num_outputs=1))).eval()
    given = {k: v.float() if v.is_floating_point() else v for k, v in batch(rows=3).items()}
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    given |= {"date_mask": mask, "labels": torch.randint(2, (3, 4, 4))}
    try:
        tuned = veneer.attach(model, fitted(slug, model), batches=[given])
    except VeneerError as error:
        assert re.search(NATURE, str(error)), error
        return
    tuned.begin(2, lambda: model(**given).loss)
    optimizer = torch.optim.SGD(tuned.param_groups(lr=0.05))
    before = [p.detach().clone() for p in tuned.parameters()]
    for _ in range(2):
        (model(**given).loss + sum(tuned.loss_terms().values())).backward()
        tuned.before_step()
        optimizer.step()
        tuned.after_step()
    assert any(not torch.equal(a, b) for a, b in zip(before, tuned.parameters()))
    with tuned.disabled():
        base = model(**given).logits
    assert torch.isfinite(model(**given).logits).all() and base.shape == (3, 1, 4, 4)


@pytest.mark.parametrize("spec", ["lora(r=2)", "vpt(length=2, inside=True)", "prefix-tuning(length=2)", "full(targets='.*')"])
def test_rows_of_one_batch_may_have_adapters_of_their_own(spec: str) -> None:
    model, given = small(num_outputs=1), batch(rows=3)
    for name in ("one", "two"):
        tuned = veneer.attach(model, spec, name)
        with torch.no_grad():
            for p in tuned.parameters(name):
                p.add_(0.2 * torch.randn_like(p))
    tuned.activate(per_row=["one", None, "two"])
    together = model(**given).logits
    for i, name in enumerate(["one", None, "two"]):
        with tuned.disabled() if name is None else contextlib.nullcontext():
            if name:
                tuned.activate(name)
            alone = model(**{k: v[i : i + 1] for k, v in given.items()}).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)


# -- wrong input ------------------------------------------------------------------------------------------------


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(BadValue, match="patch_size=3 does not divide image_size=4; choose one of 1, 2, 4"):
        TSViTConfig(**SMALL | dict(patch_size=3))
    with pytest.raises(BadValue, match="band_stds has 2 numbers for num_channels=3"):
        TSViTConfig(**SMALL, band_means=[0.0] * 3, band_stds=[1.0] * 2)
    model, given = small(), batch()
    with pytest.raises(BadValue, match=r"pixel_values must be \[batch, dates, 3, 4, 4\]"):
        model(given["pixel_values"][:, :, :2], given["days"])
    with pytest.raises(BadValue, match=r"days must be \[2, 5\], one a picture; they are \[2, 4\]"):
        model(given["pixel_values"], given["days"][:, :4])
    with pytest.raises(BadValue, match="6 dates are more than max_dates=5"):
        model(**batch(dates=6))
    with pytest.raises(BadValue, match="days hold 366; a day of the year is 1 … 365"):
        model(given["pixel_values"], given["days"] * 0 + 366)


def test_published_weights_of_another_model_are_refused() -> None:
    case = Case(SLUG, 0)
    params = base_params(case)
    name = next(iter(params))
    model = released(case)
    with pytest.raises(Mismatch, match="lack"):
        load_published(model, {k: v for k, v in params.items() if k != name})
    with pytest.raises(Mismatch, match="beyond"):
        load_published(model, {**params, "surplus": torch.zeros(1)})
    with pytest.raises(Mismatch, match="make the model with those sizes"):
        load_published(model, {**params, name: torch.zeros(1)})


def test_all_released_numbers_are_used() -> None:
    assert {key.split("/")[0] for key in load_file(HOME / f"{SLUG}.safetensors")} == {f"case{i}" for i in range(7)}
