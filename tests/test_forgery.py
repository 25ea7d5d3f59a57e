"""Forgery detection on tiny vision towers and made pictures: the whole run, its counts, crops, measures and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from tiny import spread
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

import veneer
from veneer.cli.main import main
from veneer.errors import BadFile, BadValue, VeneerError
from veneer.maths.sphere import alignment, on_sphere, uniformity
from veneer.models.sphere_classifier import SphereConfig, SphereForImageClassification
from veneer.models.vision_tower import load_tower, patch_grid, pooled
from veneer.tasks.data import Table
from veneer.tasks.detection_scores import auroc, average_precision, balanced_accuracy, by_group, detection, equal_error_rate
from veneer.tasks.faces import Faces
from veneer.tasks.fashion_forgeries import MANIPULATIONS, SIDE, half_forged
from veneer.tasks.forgery_detection import ForgeryDetection
from veneer.tasks.picture_noise import as_jpeg, blurred, disturbed
from veneer.tasks.task import Options, prepare, with_own
from veneer.tasks.videos import FRAMES
from veneer.train import Recipe, evaluate, predict, train

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)


def clip() -> CLIPVisionModel:
    return spread(CLIPVisionModel(CLIPVisionConfig(**SMALL))).eval()  # type: ignore[return-value]


def sphere(**settings: Any) -> SphereForImageClassification:
    return spread(SphereForImageClassification(SphereConfig(CLIPVisionConfig(**SMALL), num_labels=2, **settings))).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP image tower of random weights with its processor."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    clip().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def striped(folder: Path, down: bool, count: int, seed: int) -> None:
    """Pictures of class real and fake: fakes have stripes, down or across."""
    draw = np.random.default_rng(seed)
    for name in ("real", "fake"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = draw.integers(0, 90, (32, 32, 3))
            if name == "fake":
                picture[(slice(None, None, 4), slice(None)) if down else (slice(None), slice(None, None, 4))] += 150
            Image.fromarray(picture.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    striped(root / "down", True, 40, 1)
    striped(root / "across", False, 12, 2)
    return root


@pytest.fixture(scope="module")
def run(tower: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = dict(model=str(tower), data=str(folders / "down"), others=str(folders / "across"), task="forgery-detection", out=str(out))
    train(
        Recipe.of({**settings, "method": "ln-tuning", "steps": 25, "batch_size": 16, "lr": 3e-2, "augment": False, "eval_every": 25}),
        progress=False,
    )
    return out


# -- the model --------------------------------------------------------------------------------------------------


def test_trained_are_the_norms_and_the_head_and_frozen_tensors_stay() -> None:
    model = sphere()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = veneer.attach(model, "ln-tuning")
    assert tuned.summary().trained == 2 * 16 * (2 + 2 * 2) + (16 + 1) * 2
    optimiser = torch.optim.AdamW(tuned.param_groups(lr=0.1))
    model.train()(torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 0, 1, 0, 1])).loss.backward()
    optimiser.step()
    with tuned.disabled():
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_count_on_clip_vit_l_14() -> None:
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    with torch.device("meta"):
        model = SphereForImageClassification(SphereConfig(config, num_labels=2))
    assert sum(p.numel() for p in model.tower.parameters()) == 303_179_776
    assert veneer.attach(model, "ln-tuning").summary().trained == 104_450


def test_logits_see_directions_only_and_the_loss_is_the_three_of_them() -> None:
    model, labels = sphere(slerp=None, w_align=0.3, w_uniform=0.7), torch.tensor([0, 1, 1, 0, 1])
    pixels = torch.randn(5, 3, 28, 28)
    out = model.train()(pixels, labels)
    f = on_sphere(pooled(model.tower, pixels))
    torch.testing.assert_close(out.logits, f @ model.classifier.weight.T + model.classifier.bias)
    wanted = torch.nn.functional.cross_entropy(out.logits, labels) + 0.3 * alignment(f, labels) + 0.7 * uniformity(f)
    torch.testing.assert_close(out.loss, wanted)
    with torch.no_grad():
        norm = model.tower.post_layernorm
        norm.weight.mul_(5), norm.bias.mul_(5)
    torch.testing.assert_close(model(pixels).logits, out.logits)


def test_arcs_are_for_training_alone() -> None:
    model, pixels, labels = sphere(), torch.randn(20, 3, 28, 28), torch.arange(20) % 2
    plain = model(pixels, labels).logits
    torch.testing.assert_close(model(pixels, labels).logits, plain)
    torch.testing.assert_close(model.train()(pixels).logits, plain)
    assert not torch.allclose(model(pixels, labels).logits, plain)


def test_the_feature_is_the_class_token_after_the_last_norm_in_every_family(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    pixels = torch.randn(2, 3, 28, 28)
    one = clip()
    torch.testing.assert_close(pooled(one, pixels), one.post_layernorm(one(pixels).last_hidden_state[:, 0]))
    dino = spread(Dinov2Model(Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}))).eval()
    torch.testing.assert_close(pooled(dino, pixels), dino(pixels).last_hidden_state[:, 0])
    vit = spread(ViTModel(ViTConfig(**SMALL))).eval()
    torch.testing.assert_close(pooled(vit, pixels), vit(pixels).last_hidden_state[:, 0])
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8)).eval()
    both.save_pretrained(tmp_path)
    half = load_tower(str(tmp_path)).eval()
    torch.testing.assert_close(pooled(half, pixels), both.vision_model(pixels).pooler_output)
    larger = torch.randn(2, 3, 56, 70)
    patches = one(larger, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(patch_grid(one, larger, 4)[:, 0], patches[:, [0, 1]].mean(1))  # of 4 × 5 patches
    with pytest.raises(BadValue, match=r"image_size=28 gives 2 × 2 patches, too few for 9"):
        patch_grid(one, pixels, 3)
    with pytest.raises(VeneerError, match="cannot be loaded"):
        load_tower(str(tmp_path / "nothing"))


# -- a run ------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_measured_on_the_other_data(run: Path, folders: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    found = record["outcome"]["metrics"]
    assert set(found) == {"ap", "auroc", "eer", "balanced_accuracy", "auroc across"}
    assert found["auroc"]["value"] > 0.9 and record["outcome"]["main"] == "auroc"
    assert (
        found["auroc across"]["n"] == 24 and found["auroc across"]["low"] <= found["auroc across"]["value"] <= found["auroc across"]["high"]
    )
    assert record["outcome"]["correct"] is not None and "auroc across" in record["outcome"]["base_metrics"]
    again = evaluate(run, str(folders / "across"))
    assert again["auroc"].value == pytest.approx(found["auroc across"]["value"])
    answers = predict(run, [str(folders / "down" / "fake" / "0.png"), str(folders / "down" / "real" / "0.png")])
    assert [set(a["scores"]) for a in answers] == [{"real", "fake"}] * 2
    assert answers[0]["scores"]["fake"] > answers[1]["scores"]["fake"]


@pytest.mark.parametrize("method", ["lora(r=2)", "probe", "vpt(p=2)", "full"])
def test_any_method_trains(method: str, tower: Path, folders: Path, tmp_path: Path) -> None:
    settings = dict(model=str(tower), data=str(folders / "down"), task="forgery-detection", out=str(tmp_path / "r"), base=False)
    outcome = train(Recipe.of({**settings, "method": method, "steps": 1, "batch_size": 8}), progress=False)
    assert outcome.trained > 0 and outcome.metrics["auroc"].n == 8


def test_the_merged_model_is_read_again(run: Path, folders: Path, tmp_path: Path) -> None:
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert main(["anatomy", str(tmp_path / "merged")]) == 0
    settings = dict(model=str(tmp_path / "merged"), data=str(folders / "down"), task="forgery-detection", out=str(tmp_path / "r"))
    outcome = train(Recipe.of({**settings, "method": "ln-tuning", "steps": 1, "batch_size": 8, "lr": 1e-9}), progress=False)
    before = json.loads((run / "run.json").read_text())["outcome"]["metrics"]["auroc"]["value"]
    assert outcome.base_metrics["auroc"].value == pytest.approx(before)


# -- faces ------------------------------------------------------------------------------------------------------

POINTS = "[30, 40], [60, 41], [45, 60], [32, 75], [58, 76]"


def csv(folder: Path, header: str, *lines: str) -> str:
    folder.mkdir(exist_ok=True)
    for i, shade in enumerate((10, 120, 240)):
        Image.new("RGB", (100, 90), (shade, 255 - shade, 99)).save(folder / f"{i}.png")
    Image.new("L", (9, 40)).save(folder / "thin.png")
    (folder / "broken.png").write_bytes(b"no picture")
    rows = lines or tuple(f'{i % 3}.png,{"real" if i % 2 else "fake"},v{i // 2 % 10},"{POINTS}"' for i in range(40))
    (folder / "d.csv").write_text("\n".join([header, *rows]))
    return str(folder / "d.csv")


def test_faces_are_cut_out_by_landmarks_or_box(tmp_path: Path) -> None:
    task, lines = prepare(csv(tmp_path, "image,label,video,landmarks"), "forgery-detection")
    assert task.encode(task.splits.train.rows[:1], None)[0]["image"].size == (256, 256)
    assert "without a face" not in lines[0]
    by_box = [f'{i % 3}.png,{"real" if i % 2 else "fake"},"10 20 50 60"' for i in range(40)]
    task, _ = prepare(csv(tmp_path, "image,label,box", *by_box), "forgery-detection")
    assert task.encode(task.splits.train.rows[:1], None)[0]["image"].size == (52, 52)
    bare = [f"{i % 3}.png,{'real' if i % 2 else 'fake'}" for i in range(40)]
    task, _ = prepare(csv(tmp_path, "image,label", *bare), "forgery-detection")
    assert task.encode(task.splits.train.rows[:1], None)[0]["image"].size == (100, 90)


def test_frames_without_a_face_are_left_out_and_counted_and_videos_stay_whole(tmp_path: Path) -> None:
    lines = [f"{i % 3}.png,{'real' if i // 4 % 2 else 'fake'},v{i // 4},{'' if i % 5 == 0 else json.dumps(POINTS)}" for i in range(160)]
    task, said = prepare(csv(tmp_path, "image,label,video,landmarks", *lines), "forgery-detection")
    assert "32 pictures without a face left out" in said[0]
    videos = [{row["video"] for row in table.rows} for _, table in task.splits.items()]
    assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
    assert sum(len(table) for _, table in task.splits.items()) == 128


def test_long_videos_are_thinned_evenly(tmp_path: Path) -> None:
    lines = [f"{i % 3}.png,{'real' if i // 100 % 2 else 'fake'},v{i // 100},{i % 100}" for i in range(2000)]
    task, _ = prepare(csv(tmp_path, "image,label,video,frame", *lines), "forgery-detection")
    assert all(len(table) % FRAMES == 0 for _, table in task.splits.items())
    taken = [int(row["frame"]) for row in task.splits.train.rows if row["video"] == task.splits.train.rows[0]["video"]]
    assert len(taken) == FRAMES and taken[0] == 0 and taken[-1] == 99


PLAIN = [f"{i % 3}.png,{'real' if i % 2 else 'fake'},{POINTS.replace('[', '').replace(']', '').replace(',', '')}" for i in range(20)]
BOXED = [f"{i % 3}.png,{'real' if i % 2 else 'fake'},10 10 60 60" for i in range(20)]
MISTAKES: list[tuple[str, str, list[str], dict[str, Any], type[VeneerError], list[str]]] = [
    ("one class", "image,label,landmarks", [line.replace("fake", "real") for line in PLAIN], {}, BadValue, ["all of them are", "real"]),
    (
        "no real class",
        "image,label,landmarks",
        [line.replace("real", "untouched") for line in PLAIN],
        {},
        BadValue,
        ["none of them", "original"],
    ),
    ("empty label", "image,label,landmarks", [*PLAIN, f"0.png,,{PLAIN[0].split(',')[-1]}"], {}, BadValue, ["'label'", "empty"]),
    ("missing picture", "image,label,landmarks", [*PLAIN, PLAIN[0].replace("0.png", "7.png")], {}, BadFile, ["line 22", "7.png"]),
    ("broken picture", "image,label,landmarks", [*PLAIN, PLAIN[0].replace("0.png", "broken.png")], {}, BadFile, ["line 22", "broken.png"]),
    ("small picture", "image,label,landmarks", [*PLAIN, PLAIN[0].replace("0.png", "thin.png")], {}, BadValue, ["9 × 40", "at least 16"]),
    ("box beyond the picture", "image,label,box", ["0.png,real,10 10 300 200", *BOXED], {}, BadValue, ["300, 200", "100 × 90"]),
    ("box of no size", "image,label,box", ["0.png,real,10 10 12 80", *BOXED], {}, BadValue, ["narrower than 16"]),
    ("box of three numbers", "image,label,box", ["0.png,real,10 10 12", *BOXED], {}, BadValue, ["3 numbers, expected 4"]),
    ("landmarks as shares", "image,label,landmarks", ["0.png,real,.3 .4 .6 .4 .4 .6 .3 .7 .6 .7", *PLAIN], {}, BadValue, ["pixels"]),
    ("words for landmarks", "image,label,landmarks", ["0.png,real,left right", *PLAIN], {}, BadValue, ["'left right'", "numbers"]),
    (
        "no face anywhere",
        "image,label,landmarks",
        [f"0.png,{'real' if i % 2 else 'fake'}," for i in range(20)],
        {},
        BadValue,
        ["empty everywhere"],
    ),
    ("other data that do not exist", "image,label,landmarks", PLAIN, {"others": "fashion-wrap"}, VeneerError, ["'fashion-warp'"]),
]


@pytest.mark.parametrize(("header", "lines", "options", "error", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes(
    header: str, lines: list[str], options: dict[str, Any], error: type[VeneerError], words: list[str], tmp_path: Path
) -> None:
    own = {name: options[name] for name in ("others",) if name in options}
    options = {name: value for name, value in options.items() if name not in own}
    with pytest.raises(error) as caught:
        prepare(csv(tmp_path, header, *lines), with_own("forgery-detection", own), Options(**options))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and all(word in message for word in words)


def test_other_data_of_one_class_are_refused(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(parents=True)
    Image.new("L", (30, 30)).save(tmp_path / "real" / "0.png")
    with pytest.raises(BadValue, match="all of them are called real"):
        prepare(str(folders / "down"), with_own("forgery-detection", {"others": str(tmp_path)}))


# -- disturbances -----------------------------------------------------------------------------------------------


def test_training_pictures_are_disturbed_and_others_are_not(folders: Path, tower: Path) -> None:
    task, _ = prepare(str(folders / "down"), "forgery-detection")
    splits = task.splits
    assert task.encode(splits.train.rows, None)[0]["disturb"] and not task.encode(splits.test.rows, None)[0]["disturb"]
    plain, _ = prepare(str(folders / "down"), "forgery-detection(augment=false)")
    assert not plain.encode(plain.splits.train.rows, None)[0]["disturb"]
    collate = task.collator(CLIPImageProcessor.from_pretrained(tower))
    first, second = (collate([task.encode(splits.train.rows, None)[0]])["pixel_values"] for _ in range(2))
    assert first.shape == (1, 3, 28, 28) and not torch.equal(first, second)
    items = [task.encode(splits.test.rows, None)[0]]
    assert torch.equal(collate(items)["pixel_values"], collate(items)["pixel_values"])


def test_disturbances_follow_the_seed_and_keep_size_and_mean() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).resize((160, 120))
    for seed in range(5):
        made = disturbed(picture, random.Random(seed))
        assert made.size == picture.size and made.mode == "RGB"
        assert made.tobytes() == disturbed(picture, random.Random(seed)).tobytes()
        assert 0.5 < np.asarray(made).mean() / np.asarray(picture).mean() < 1.2


def test_the_blur_reaches_further_down_than_across_and_keeps_light() -> None:
    dot = np.zeros((21, 21, 3), np.uint8)
    dot[10, 10] = 255
    made = np.asarray(blurred(Image.fromarray(dot), 2.0), float)[..., 0]
    assert np.flatnonzero(made.any(1)).tolist() == list(range(7, 14)) and np.flatnonzero(made.any(0)).tolist() == [9, 10, 11]
    assert made.sum() == pytest.approx(255, rel=0.05)
    assert as_jpeg(Image.fromarray(dot), 40).size == (21, 21)


# -- measures ---------------------------------------------------------------------------------------------------


def test_measures_agree_with_their_definitions() -> None:
    draw = np.random.default_rng(4)
    fake = draw.integers(0, 2, 60).astype(float)
    rows = np.stack([draw.uniform(size=60) * 0.7 + 0.3 * fake, fake], 1)
    wins = [(a > b) + (a == b) / 2 for a in rows[fake == 1, 0] for b in rows[fake == 0, 0]]
    assert auroc(rows) == pytest.approx(np.mean(wins))
    order = rows[rows[:, 0].argsort()[::-1], 1]
    precision = np.cumsum(order) / np.arange(1, 61)
    assert average_precision(rows) == pytest.approx(precision[order == 1].mean())
    called = rows[:, 0] > 0.5
    assert balanced_accuracy(rows) == pytest.approx((called[fake == 1].mean() + (~called[fake == 0]).mean()) / 2)
    gaps = [abs((rows[fake == 0, 0] >= t).mean() - (rows[fake == 1, 0] < t).mean()) for t in rows[:, 0]]
    nearest = rows[int(np.argmin(gaps)), 0]
    assert equal_error_rate(rows) == pytest.approx((rows[fake == 0, 0] >= nearest).mean(), abs=1 / min(fake.sum(), 60 - fake.sum()))
    found = detection(rows)
    assert all(m.low <= m.value <= m.high and m.n == 60 for m in found.values())
    assert np.isnan(auroc(rows[fake == 1])) and np.isnan(equal_error_rate(rows[fake == 0]))
    perfect = np.array([[0.1, 0], [0.2, 0], [0.8, 1], [0.9, 1]])
    assert (auroc(perfect), average_precision(perfect), equal_error_rate(perfect), balanced_accuracy(perfect)) == (1, 1, 0, 1)


def test_measures_agree_with_scikit_learn_also_with_equal_scores() -> None:
    draw = np.random.default_rng()
    for _ in range(20):
        rows = np.stack([draw.integers(0, 9, 40) / 8, np.arange(40) % 2], 1)
        scores, fake = rows.T
        assert auroc(rows) == pytest.approx(metrics.roc_auc_score(fake, scores))
        assert average_precision(rows) == pytest.approx(metrics.average_precision_score(fake, scores))
        assert balanced_accuracy(rows) == pytest.approx(metrics.balanced_accuracy_score(fake, scores > 0.5))
        wrong, found, _ = metrics.roc_curve(fake, scores, drop_intermediate=False)
        error = equal_error_rate(rows)
        assert float(np.interp(error, wrong, found)) == pytest.approx(1 - error) or error in wrong  # on the curve, or on a step of it


def test_a_video_counts_once_with_the_mean_of_its_frames() -> None:
    rows = by_group(np.array([0.2, 0.9, 0.4, 0.5]), np.array([0, 1, 0, 1]), ["b", "a", "b", "a"])
    np.testing.assert_allclose(rows, [[0.7, 1], [0.3, 0]])
    task = ForgeryDetection(Options(label="label"), None, {"labels": ["real", "fake"]})
    frames = [{"label": "fake", "video": 1}, {"label": "real", "video": 2}, {"label": "fake", "video": 1}]
    measured = task.measure(np.array([[0, 5.0], [5.0, 0], [0, -1.0]]), frames)
    assert measured.metrics["auroc"].n == 2 and measured.correct == [True, True]


# -- generated data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MANIPULATIONS)
def test_half_of_the_pictures_are_changed_and_only_inside(kind: str) -> None:
    draw = np.random.default_rng(1)
    images = np.kron(draw.integers(0, 255, (12, 7, 7), np.uint8), np.ones((1, 4, 4), np.uint8))
    labels = np.arange(12) % 3
    rows = half_forged(images, labels, kind, seed=5)
    again = half_forged(images, labels, kind, seed=5)
    for i, row in enumerate(rows):
        plain = np.asarray(Image.fromarray(images[i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        changed = row["image"] != plain
        assert row["label"] == ("fake" if i % 2 else "real") and bool(changed.any()) == bool(i % 2)
        assert changed.mean() < 0.6 and not changed[0].any() and not changed[-1].any()
        assert np.array_equal(row["image"], again[i]["image"])


def test_a_table_without_places_leaves_pictures_whole() -> None:
    picture = np.zeros((20, 30), np.uint8)
    table = Table([{"image": picture, "label": "real"}], "t")
    assert Faces.of(table).check(table, "train") == 0 and Faces.of(table).crop(table.rows[0]).size == (30, 20)
