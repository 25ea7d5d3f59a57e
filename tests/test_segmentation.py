"""Semantic segmentation: folders of masks, models with and without a head, metrics by domain, runs, and refusals."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import veneer
from veneer.errors import BadFile, BadValue, Unsupported, VeneerError
from veneer.tasks import confusion
from veneer.tasks.classes_file import read_legend
from veneer.tasks.legend import IGNORED, Legend
from veneer.tasks.segmentation_scores import measured
from veneer.tasks.shapes import CLASSES, DOMAINS, degraded, scene, shapes
from veneer.tasks.task import Options, prepare
from veneer.train.recipe import Recipe
from veneer.train.run import train
from veneer.train.use import evaluate, predict

SIDE = 32
VIT = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=8)


def pair(folder: Path, name: str = "0", mask: np.ndarray | None = None, size: tuple[int, int] = (8, 8)) -> Path:
    """A picture and its mask in folder/images and folder/masks."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (50, 60, 70)).save(folder / "images" / f"{name}.png")
    own = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1]) % 3 if mask is None else mask
    Image.fromarray(own).save(folder / "masks" / f"{name}.png")
    return folder


def written(root: Path, sizes: dict[str, int], side: int = SIDE, domains: tuple[str, ...] = DOMAINS) -> Path:
    """The generator's shapes as a folder of domains."""
    for split, table in shapes(sizes, side).tables.items():
        for i, row in enumerate(table.rows):
            if row["domain"] in domains:
                part = root / row["domain"] / {"validation": "val"}.get(split, split)
                for kind in ("image", "mask"):
                    (part / f"{kind}s").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(row[kind]).save(part / f"{kind}s" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def model_folder(folder: Path, kind: str = "dinov2") -> Path:
    """A tiny model with random weights and its preparation of pictures."""
    from transformers import (
        BeitConfig,
        BeitForSemanticSegmentation,
        BeitModel,
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SwinConfig,
        SwinModel,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(0)
    tiny = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
    }
    made: dict[str, Any] = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT, mlp_ratio=2)),
        "vit": lambda: ViTModel(ViTConfig(**VIT, intermediate_size=32)),
        "beit": lambda: BeitModel(BeitConfig(**VIT, intermediate_size=32)),
        "beit head": lambda: BeitForSemanticSegmentation(
            BeitConfig(**VIT, intermediate_size=32, out_indices=[1, 2, 3, 4], num_labels=7, auxiliary_channels=8)
        ),
        "segformer": lambda: SegformerForSemanticSegmentation(
            SegformerConfig(**tiny, num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=9)
        ),
        "swin": lambda: SwinModel(SwinConfig(image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)),
    }
    made[kind]().save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("shapes"), {"train": 8, "validation": 4, "test": 4})


# -- folders ----------------------------------------------------------------------------------------------------


def test_one_domain_with_splits_and_a_file_of_classes(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for i in range(3):
            pair(tmp_path / split, str(i))
    (tmp_path / "classes.txt").write_text("sea\nland\nice\n")
    task, lines = prepare(str(tmp_path))
    assert task.slug == "semantic-segmentation" and task.facts["legend"]["labels"] == ["sea", "land", "ice"]
    assert [len(table) for _, table in task.splits.items()] == [3, 3, 3] and "sea, land, ice" in lines[0] and "--source" not in lines[0]


def test_a_folder_without_splits_is_cut_and_its_values_are_the_classes(tmp_path: Path) -> None:
    for i in range(20):
        pair(tmp_path, str(i), np.array([[0, 4], [9, IGNORED]], np.uint8), (2, 2))
    task, _ = prepare(str(tmp_path))
    assert task.facts["legend"]["labels"] == ["0", "4", "9"] and [len(t) for _, t in task.splits.items()] == [16, 2, 2]


def test_sources_are_trained_on_and_every_domain_is_tested_on(data: Path) -> None:
    task, lines = prepare(str(data), None, Options(source="clean", test_rows=3))
    domains = [[row["domain"] for row in table.rows] for _, table in task.splits.items()]
    assert set(domains[0]) == set(domains[1]) == {"clean"} and [domains[2].count(d) for d in DOMAINS] == [3, 3, 3]
    assert "trained on clean, tested also on artefacts, blurred (--source)" in lines[0]
    task, _ = prepare(str(data))
    assert {row["domain"] for row in task.splits.train.rows} == set(DOMAINS)
    task, _ = prepare(str(data), None, Options(source="clean, blurred"))
    assert task.facts["sources"] == ["blurred", "clean"]


def test_a_domain_without_splits_beside_others_is_only_tested_on(tmp_path: Path) -> None:
    for i in range(10):
        pair(tmp_path / "city" / "train", str(i))
        pair(tmp_path / "farm", str(i))
    task, _ = prepare(str(tmp_path))
    assert task.facts["sources"] == ["city"] and len(task.splits.train) == 8
    assert sum(row["domain"] == "farm" for row in task.splits.test.rows) == 10


def test_an_unlabelled_domain_is_never_tested_on_what_it_was_trained_on(tmp_path: Path) -> None:
    """With masks and no splits some rows are held out; without any mask there is nothing to test on."""
    for i in range(20):
        for domain in ("city/train", "farm/train", "moon/train"):
            pair(tmp_path / domain, str(i))
    for mask in (tmp_path / "moon" / "train" / "masks").iterdir():
        mask.unlink()
    (tmp_path / "moon" / "train" / "masks").rmdir()
    task, _ = prepare(str(tmp_path), None, Options(source="city", unlabelled="farm, moon"))
    train, test = task.splits.train.rows, task.splits.test.rows
    bare = [row for row in train if row.get("unlabelled")]
    assert len(train) - len(bare) == 16 and len(bare) == 8 and {row["domain"] for row in bare} == {"farm", "moon"}
    assert {row["domain"] for row in test} == {"city", "farm"}
    assert not {row["image"] for row in train} & {row["image"] for row in test}
    assert [item["labels"] for item in task.encode(bare, None)] == [None] * 8


def test_classes_of_other_values_and_of_colours(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"names": {"0": "ground", "255": "road"}, "ignored": None}))
    legend = read_legend(tmp_path)
    assert legend is not None and legend.indices(np.array([[0, 255]], np.uint8)).tolist() == [[0, 1]]
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["none", "ground", "road"], "ignored": 0}))
    legend = read_legend(tmp_path)
    assert legend is not None and legend.indices(np.array([[0, 1, 2]])).tolist() == [[IGNORED, 0, 1]]
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["ground", "road"], "palette": [[0, 0, 0], [255, 0, 0]]}))
    legend = read_legend(tmp_path)
    assert legend is not None and legend.coloured
    picture = np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8)
    assert legend.indices(Image.fromarray(picture)).tolist() == [[0, 1]]
    assert np.array_equal(np.array(legend.picture(np.array([[0, 1]]))), picture)
    assert Legend.of(json.loads(json.dumps(legend.facts))) == legend


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 254), min_size=2, max_size=8), st.integers(0, 2**20))
def test_a_mask_survives_the_way_to_indices_and_back(values: set[int], seed: int) -> None:
    own = sorted(values, key=lambda v: hash((v, seed)))  # not in the order of the values
    legend = Legend(tuple(map(str, own)), tuple(own))
    mask = np.random.default_rng(seed).choice(own, (5, 7)).astype(np.uint8)
    assert np.array_equal(np.array(legend.picture(legend.indices(mask))), mask)


def test_palette_files_and_single_bit_files_are_read_as_indices(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indexed.save(tmp_path / "p.png")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    legend = Legend(("a", "b", "c"), (0, 1, 2))
    assert legend.indices(str(tmp_path / "p.png")).tolist() == [[0, 1, 2]]
    assert legend.indices(str(tmp_path / "b.png")).tolist() == [[1, 0]]


# -- refusals ---------------------------------------------------------------------------------------------------


def spoil(tmp_path: Path, how: str) -> tuple[Path, Options]:
    """A folder of good pairs with one thing wrong."""
    for i in range(20):
        pair(tmp_path / "train", str(i))
    (tmp_path / "classes.txt").write_text("sea\nland\nice")
    masks, source = tmp_path / "train" / "masks", None
    if how == "size":
        Image.new("L", (4, 8)).save(masks / "3.png")
    elif how == "missing":
        (masks / "3.png").unlink()
    elif how == "no masks":
        import shutil

        shutil.rmtree(masks)
    elif how == "beyond":
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(masks / "3.png")
    elif how == "colours":
        Image.new("RGB", (8, 8)).save(masks / "3.png")
    elif how == "lossy":
        Image.new("L", (8, 8)).save(masks / "3.jpg")
        (masks / "3.png").unlink()
    elif how == "ignored":
        Image.new("L", (8, 8), IGNORED).save(masks / "3.png")
    elif how == "broken":
        (masks / "3.png").write_bytes(b"no picture")
    elif how == "twice":
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / "images" / "3.jpg")
    elif how == "source":
        source = "moon"
    elif how == "same names":
        (tmp_path / "classes.txt").write_text("sea\nsea\nice")
    elif how == "bad json":
        (tmp_path / "classes.txt").unlink()
        (tmp_path / "classes.json").write_text("{")
    elif how == "palette":
        (tmp_path / "classes.txt").unlink()
        (tmp_path / "classes.json").write_text('{"names": ["a", "b"], "palette": [[0, 0, 0]]}')
    elif how == "one value":
        (tmp_path / "classes.txt").unlink()
        for file in masks.iterdir():
            Image.fromarray(np.array([[0, 255]] * 8, np.uint8).repeat(4, 1)).save(file)
    return tmp_path, Options(source=source)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("size", r"masks/3\.png \(\w+\) is 4 × 8 pixels, its picture .*images/3\.png 8 × 8\. Save the mask"),
        ("missing", r"images/3\.png \(\w+\) has no mask\. Add masks/3\.png, or take the picture away"),
        ("no masks", r"images/\d+\.png \(\w+\) has no mask"),
        ("beyond", r"masks/3\.png holds the value 7 in row 0, column 0\. The classes are value 0 = sea, .* 255 is ignored\. Mend"),
        ("colours", r"masks/3\.png is a coloured picture; .*palette"),
        ("lossy", r"masks/3\.jpg: this kind of file changes pixel values .*PNG"),
        ("ignored", r"masks/3\.png \(train\) holds nothing but ignored pixels"),
        ("broken", r"masks/3\.png cannot be read as a picture"),
        ("twice", r"holds both 3\.jpg and 3\.png; keep one"),
        ("source", r"--source moon: .*no such domain"),
        ("same names", r"classes\.txt: the name 'sea' stands there twice"),
        ("bad json", r"classes\.json cannot be read"),
        ("palette", r"2 names, but 1 colours"),
        ("one value", r"hold only the value 0 besides 255, which is ignored; .*classes\.json"),
    ],
)
def test_wrong_folders_are_refused_in_a_sentence(tmp_path: Path, how: str, words: str) -> None:
    folder, options = spoil(tmp_path, how)
    with pytest.raises(VeneerError, match=words) as error:
        prepare(str(folder), "semantic-segmentation", options)
    assert isinstance(error.value, BadFile | BadValue | VeneerError) and "\n" not in str(error.value)


def test_a_colour_that_is_no_class_is_named() -> None:
    legend = Legend(("a", "b"), (0, 255 << 16), None, coloured=True)
    with pytest.raises(BadValue, match=r"the colour \[0, 9, 0\] in row 0, column 1"):
        legend.indices(np.array([[[0, 0, 0], [0, 9, 0]]], np.uint8))
    with pytest.raises(BadValue, match="has no colours"):
        legend.indices(np.zeros((2, 2), np.uint8))


def test_sides_that_patches_do_not_divide(tmp_path: Path, data: Path) -> None:
    model = model_folder(tmp_path / "m")
    task, _ = prepare(str(data), None, Options(image_size=44))
    with pytest.raises(BadValue, match=r"side 44 do not divide into the patches of .*8 × 8 pixels; use --image-size 40 or 48"):
        task.load(str(model))


def test_image_classification_refuses_them_too(tmp_path: Path) -> None:
    from veneer.tasks.data import Data, Table

    rows = [{"image": np.zeros((8, 8), np.uint8), "label": name} for name in "ab" * 10]
    task, _ = prepare(Data("d", {"train": Table(rows, "d")}, images=True), "image-classification", Options(image_size=44))
    with pytest.raises(BadValue, match=r"side 44 do not divide .* use --image-size 40 or 48"):
        task.load(str(model_folder(tmp_path / "dinov2")))
    task, _ = prepare(Data("d", {"train": Table(rows, "d")}, images=True), "image-classification", Options(image_size=48))
    with pytest.raises(BadValue, match=r"cannot read pictures of side 48: .*use --image-size 32"):
        task.load(str(model_folder(tmp_path / "vit", "vit")))


def test_models_without_patch_tokens_are_refused(tmp_path: Path, data: Path) -> None:
    task, _ = prepare(str(data))
    with pytest.raises(Unsupported, match=r"SwinModel gives .* no token for each of .* patches; choose a plain vision transformer"):
        task.load(str(model_folder(tmp_path / "m", "swin")))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "config.json").write_text('{"model_type": "mask2former"}')
    from transformers import BitImageProcessor

    BitImageProcessor().save_pretrained(tmp_path / "sets")
    with pytest.raises(Unsupported, match="answers with sets of masks"):
        task.load(str(tmp_path / "sets"))


# -- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "vit", "beit", "beit head", "segformer"])
def test_models_give_classes_of_pixels_and_adapt(tmp_path: Path, data: Path, kind: str) -> None:
    """Any size that patches divide where positions are interpolated; the head trains; saved and loaded, it answers the same."""
    fixed = kind == "beit head"
    folder = model_folder(tmp_path / "m", kind)
    task, _ = prepare(str(data), None, Options(image_size=None if fixed else 48))
    model, processor = task.load(str(folder))
    rows = task.splits.train.rows[:2]
    batch = task.collator(processor)(list(task.encode(rows, processor)))
    side = SIDE if fixed else 48
    assert batch["pixel_values"].shape == (2, 3, side, side) and batch["labels"].shape == (2, side, side)
    tuned = veneer.attach(model, "lora(r=2)")
    assert any(site.role == "head" for site, *_ in tuned.entries()), "the head has to train"
    optimizer = torch.optim.AdamW(tuned.param_groups(1e-2))
    first = last = 0.0
    for step in range(8):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < first
    tuned.save(tmp_path / "adapter")
    torch.manual_seed(1)
    again, _ = task.load(str(folder))
    veneer.load(again, tmp_path / "adapter")
    with torch.no_grad():
        answers = [m.eval()(pixel_values=batch["pixel_values"]).logits for m in (model, again)]
    assert answers[0].shape[1] == len(CLASSES)
    assert torch.allclose(*answers, atol=1e-5)


def test_the_backbone_keeps_its_weights_and_every_tap_sees_its_block(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    from veneer.models.segmenters import segmenter

    folder = str(model_folder(tmp_path / "m"))
    model, bare = segmenter(folder, list("abc")).eval(), Dinov2Model.from_pretrained(folder).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.state_dict().values(), bare.state_dict().values()))
    x = torch.randn(1, 3, SIDE, SIDE)
    seen: list[Any] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: seen.append([t.clone() for t in args[0]]))
    tuned = veneer.attach(model, "earth-adapter(m=2, frequency=0, exact_start=False, grid=(4, 4))")
    with torch.no_grad():
        for name in ("base", "adapted"):
            for site, _, p in tuned.entries():
                if site.role == "block":
                    p["alpha"].fill_(0.0 if name == "base" or site.index != 2 else 1.0)
            model(x)
    handle.remove()
    same = [torch.allclose(a, b) for a, b in zip(*seen)]
    assert same == [True, True, False, False], "a change after block 2 is seen by taps 2 and 3 alone"
    expected = bare(x, output_hidden_states=True).hidden_states[1][:, 1:].unflatten(1, (4, 4))
    assert torch.allclose(seen[0][0], expected, atol=1e-5)


def test_a_saved_segmenter_is_loaded_like_any_other(tmp_path: Path) -> None:
    from veneer.models.segmenters import segmenter

    model = segmenter(str(model_folder(tmp_path / "m", "vit")), list("abc")).eval()
    model.save_pretrained(tmp_path / "saved")
    again = segmenter(str(tmp_path / "saved"), list("abc")).eval()
    x = torch.randn(1, 3, SIDE, SIDE)
    assert torch.allclose(model(x).logits, again(x).logits, atol=1e-6)


def test_ignored_pixels_do_not_count_in_the_loss(tmp_path: Path) -> None:
    from veneer.models.segmenters import segmenter

    model = segmenter(str(model_folder(tmp_path / "m")), list("abc")).eval()
    x, y = torch.randn(1, 3, SIDE, SIDE), torch.randint(0, 3, (1, SIDE, SIDE))
    half = y.clone()
    half[:, : SIDE // 2] = IGNORED
    other = half.clone()
    logits = torch.nn.functional.interpolate(model(x).logits, (SIDE, SIDE), mode="bilinear")
    expected = torch.nn.functional.cross_entropy(logits[:, :, SIDE // 2 :], y[:, SIDE // 2 :])
    assert torch.allclose(model(x, labels=other).loss, expected, atol=1e-6)


# -- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_pixels_put_together_and_the_unseen_domains_lead() -> None:
    rng = np.random.default_rng(0)
    domains = ["clean"] * 3 + ["fog"] * 4
    pairs = [(rng.integers(0, 3, 50), rng.integers(0, 3, 50)) for _ in domains]
    tallies = np.stack([confusion.tallies(confusion.count(t, f, 3)) for t, f in pairs]).astype(np.float32)
    found = measured(tallies, domains, ["clean"], "abc").metrics
    for domain, chosen in (("clean", pairs[:3]), ("fog", pairs[3:])):
        c = confusion.Confusion("abc").add(*map(np.concatenate, zip(*chosen)))
        assert found[f"{domain}/mean_iou"].value == pytest.approx(c.means()["mean_iou"])
        assert found[f"{domain}/pixel_accuracy"].value == pytest.approx(c.means()["accuracy"])
    assert found["mean_iou"] == found["fog/mean_iou"] and found["iou/b"].value == pytest.approx(c.per_class()["b"]["iou"])
    assert all(m.low <= m.value <= m.high for m in found.values())
    alone = measured(tallies[:3], domains[:3], ["clean"], "abc").metrics
    assert alone["mean_iou"].n == 3 and not any("/" in name and not name.startswith("iou/") for name in alone)


# -- the generator ----------------------------------------------------------------------------------------------


def test_shapes_are_the_same_every_time_and_domains_differ_only_in_frequencies() -> None:
    data, again = shapes({"train": 2, "test": 3}), shapes({"train": 2, "test": 3})
    for name in data.tables:
        for a, b in zip(data.tables[name].rows, again.tables[name].rows):
            assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["mask"], b["mask"])
    rows = data.tables["test"].rows
    by_domain = {d: [r for r in rows if r["domain"] == d] for d in DOMAINS}
    for clean, *others in zip(*by_domain.values()):
        assert all(np.array_equal(clean["mask"], other["mask"]) for other in others)
        assert not any(np.array_equal(clean["image"], other["image"]) for other in others)

    def fine(image: np.ndarray) -> float:
        """Energy in the upper half of the frequencies."""
        power = np.abs(np.fft.fftshift(np.fft.fft2(image.mean(-1)))) ** 2
        power[28:84, 28:84] = 0
        return float(power.sum())

    energy = {d: sum(fine(r["image"]) for r in part) for d, part in by_domain.items()}
    assert energy["artefacts"] > 5 * energy["clean"] and energy["clean"] > 1.5 * energy["blurred"]


def test_every_class_occurs_and_unknown_domains_are_refused() -> None:
    masks = [scene((0, i), 48)[1] for i in range(40)]
    assert set(np.unique(masks)) == set(range(len(CLASSES)))
    with pytest.raises(BadValue, match="no domain 'fog'; there are clean, artefacts, blurred"):
        degraded(np.zeros((8, 8, 3), np.uint8), "fog", (0,))


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["probe", "lora(r=2)", "rein(m=4, r=2)", "earth-adapter(m=2, frequency=2, rho=0.5)"])
def test_a_run_measures_every_domain_and_leaves_pictures(tmp_path: Path, data: Path, method: str) -> None:
    model = model_folder(tmp_path / "m")
    plan = Recipe.of(
        dict(
            model=str(model), data=str(data), method=method, source="clean", steps=3, batch_size=4, out=str(tmp_path / "run"), device="cpu"
        )
    )
    said: list[str] = []
    outcome = train(plan, progress=False, say=said.append)
    assert outcome.main == "mean_iou" and outcome.metrics["mean_iou"].n == 8
    assert {f"{d}/{m}" for d in DOMAINS for m in ("mean_iou", "mean_f1", "pixel_accuracy")} <= outcome.metrics.keys()
    assert {f"{d}/mean_iou" for d in DOMAINS} <= outcome.base_metrics.keys()
    rows = list(csv.DictReader((tmp_path / "run" / "classes.csv").open()))
    assert [(r["domain"], r["class"]) for r in rows] == [(d, c) for d in DOMAINS for c in CLASSES] or len(rows) == len(DOMAINS) * len(
        CLASSES
    )
    assert Image.open(tmp_path / "run" / "predictions.png").size[1] > 12 * 96
    assert any("predictions.png" in line for line in said)
    again = evaluate(tmp_path / "run")
    assert again["mean_iou"].value == pytest.approx(outcome.metrics["mean_iou"].value)
    other = evaluate(tmp_path / "run", str(data / "blurred"))
    assert other["mean_iou"].n == 4


def test_self_training_uses_pictures_without_masks_and_goes_on_where_it_stopped(tmp_path: Path, data: Path) -> None:
    """Interrupted after a checkpoint and taken up again, a run ends in the same numbers: the slow copy is kept."""
    model = model_folder(tmp_path / "m")
    settings = dict(
        model=str(model), data=str(data), method="lora(r=2) + self-training(start=0.0)", source="clean", device="cpu", base=False
    )
    settings |= dict(unlabelled="artefacts", steps=6, batch_size=4, eval_every=6, checkpoint_every=3)
    task, lines = prepare(str(data), None, Recipe.of(settings).options)
    rows = task.splits.train.rows
    assert [bool(row.get("unlabelled")) for row in rows] == [False] * 8 + [True] * 4 and {r["domain"] for r in rows[8:]} == {"artefacts"}
    assert "without masks on artefacts (--unlabelled)" in lines[0] and task.facts["sources"] == ["clean"]
    whole = train(Recipe.of({**settings, "out": str(tmp_path / "whole")}), progress=False, say=lambda line: None)
    stopped = Recipe.of({**settings, "out": str(tmp_path / "stopped")})

    def stop(line: str) -> None:
        if line.startswith("Learning rate"):
            import os
            import signal
            import threading

            def watch() -> None:
                import time

                while not (tmp_path / "stopped" / "checkpoints" / "checkpoint-3").is_dir():
                    time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=watch, daemon=True).start()

    from veneer.train.interrupt import Interrupted

    with contextlib.suppress(Interrupted):
        train(stopped, progress=False, say=stop)
    again = train(stopped, progress=False, say=lambda line: None)
    assert [p.get("loss") for p in again.curve] == pytest.approx([p.get("loss") for p in whole.curve], rel=1e-5)
    assert again.metrics["mean_iou"].value == pytest.approx(whole.metrics["mean_iou"].value)


def test_rows_without_masks_get_labels_and_half_the_classes_of_others(tmp_path: Path) -> None:
    from veneer.models.segmenters import segmenter

    model = segmenter(str(model_folder(tmp_path / "m")), list("abcd"))
    tuned = veneer.attach(model, "lora(r=2) + self-training(start=0.5)")
    seen: list[dict[str, Any]] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append({"grad": torch.is_grad_enabled(), "pixels": args[0]}))
    tuned.begin(4)
    x = torch.randn(3, 3, SIDE, SIDE)
    y = torch.full((3, SIDE, SIDE), IGNORED)
    y[0], y[1] = torch.arange(4).repeat_interleave(8), torch.arange(4).repeat_interleave(8)[:, None]
    asked = x.clone(), y.clone()
    model.train()(pixel_values=x, labels=y)
    assert len(seen) == 1 and torch.equal(seen[0]["pixels"], x), "before its start it changes nothing"
    for _ in range(2):
        tuned.before_step(), tuned.after_step()
    model(pixel_values=x, labels=y)
    assert [s["grad"] for s in seen[1:]] == [False, True] and model.training
    mixed = seen[-1]["pixels"]
    assert torch.equal(mixed[:2], x[:2]) and torch.equal(x, asked[0]) and torch.equal(y, asked[1])
    pasted = [(mixed[2] == x[k]).all(0) for k in (0, 1)]
    giver = 0 if pasted[0].sum() > pasted[1].sum() else 1
    own = pasted[giver]
    assert len(y[giver][own].unique()) == 2 and own.sum() == SIDE * SIDE // 2, "two of the four classes, whole"
    assert torch.equal(mixed[2][:, ~own], x[2][:, ~own])
    seen.clear()
    model.eval()(pixel_values=x, labels=y)
    assert len(seen) == 1 and torch.equal(seen[0]["pixels"], x), "evaluation is as it is"
    seen.clear()
    plain = tuned.remove("default").detach()
    plain.train()(pixel_values=x, labels=y)
    assert len(seen) == 1, "nothing is left of it"


def test_the_slow_copy_follows_by_its_formula(tmp_path: Path) -> None:
    from veneer.models.segmenters import segmenter

    model = segmenter(str(model_folder(tmp_path / "m")), list("ab"))
    tuned = veneer.attach(model, "lora(r=1) + self-training(decay=0.6)")
    tuned.begin(10)
    p = tuned.parameters()[0]
    expected = p.detach().clone()
    labeller = tuned.adapters["default"].strategies[0].labeller
    for k in range(5):
        with torch.no_grad():
            p.add_(torch.randn_like(p))
        decay = min(1 - 1 / (k + 1), 0.6)
        expected = decay * expected + (1 - decay) * p.detach()
        tuned.before_step(), tuned.after_step()
        assert torch.allclose(labeller.slow[0], expected, atol=1e-6)


def test_self_training_and_the_domains_it_uses_go_together(data: Path) -> None:
    with pytest.raises(BadValue, match="go together"):
        Recipe.of(dict(model="dinov2-small", data=str(data), method="lora", unlabelled="artefacts")).check()
    with pytest.raises(BadValue, match="go together"):
        Recipe.of(dict(model="dinov2-small", data=str(data), method="lora + self-training")).check()
    with pytest.raises(VeneerError, match=r"--unlabelled moon: .*no such domain"):
        prepare(str(data), None, Options(source="clean", unlabelled="moon"))
    with pytest.raises(BadValue, match="Name others with --source"):
        prepare(str(data), None, Options(source="clean", unlabelled="clean"))


def test_predictions_have_the_pictures_size_and_the_datas_values(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "d"
    for i in range(12):
        pair(root, str(i), np.array([[5, 9], [9, 5]], np.uint8).repeat(6, 0).repeat(8, 1), (16, 12))
    plan = Recipe.of(dict(model=str(model_folder(tmp_path / "m")), data=str(root), method="lora(r=2)", steps=2, out=str(tmp_path / "run")))
    train(plan, progress=False, say=lambda line: None)
    answer = predict(tmp_path / "run", [str(root / "images" / "0.png"), np.zeros((20, 30, 3), np.uint8)])
    assert [a["mask"].size for a in answer] == [(16, 12), (30, 20)]
    for a in answer:
        assert set(np.unique(np.array(a["mask"]))) <= {5, 9} and sum(a["scores"].values()) == pytest.approx(1)
        assert a["scores"][a["label"]] == max(a["scores"].values()) == a["score"]


def test_the_shapes_have_a_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.tasks.shapes.SIZES", {"train": 2, "test": 1})
    task, _ = prepare("shapes")
    assert task.slug == "semantic-segmentation" and task.facts["sources"] == ["clean"] and len(task.splits.test) == len(DOMAINS)
