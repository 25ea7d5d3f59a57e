"""Folders of dated patches are read, refused with a reason, learned from and measured; the generator does what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.cli.main import main
from veneer.errors import BadFile, BadValue, VeneerError
from veneer.models.tsvit import TSViTConfig, TSViTForSemanticSegmentation
from veneer.tasks import confusion
from veneer.tasks.data import Data, read
from veneer.tasks.phenology import CROPS, LEAF, SOIL, SOURCE, TARGET, greenness, patches, phenology, write
from veneer.tasks.series import days_of, outline, pictures
from veneer.tasks.series_batches import padded
from veneer.tasks.series_scores import measured
from veneer.tasks.series_segmentation import SeriesSegmentation
from veneer.tasks.task import Options, prepare
from veneer.train import Recipe, evaluate, predict, train

SIDE, SIZES = 8, (12, 4, 6)


def fields(wheat: bool = False, seed: int = 0) -> Data:
    """A few small patches."""
    place = dataclasses.replace(TARGET, year=2000 + seed % 1000)
    return phenology(place, wheat=wheat, sizes=SIZES)


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    write(tmp_path / "fields", fields(seed=seed))
    return tmp_path / "fields"


def model_folder(path: Path, **changes: Any) -> str:
    """A small TSViT with random weights."""
    names = dict(enumerate(CROPS))
    options: dict[str, Any] = dict(
        image_size=SIDE, num_classes=len(CROPS), hidden_size=8, num_attention_heads=2, head_dim=4, mlp_ratio=2, temporal_layers=1,
        spatial_layers=1, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    TSViTForSemanticSegmentation(TSViTConfig(**options | changes)).save_pretrained(path)
    return str(path)


def patch(**changes: Any) -> dict[str, Any]:
    """A patch of 4 dates, 3 bands and 6 × 6 pixels."""
    made = {
        "series": np.random.default_rng().normal(size=(4, 3, 6, 6)),
        "dates": np.array(["2019-11-02", "2019-12-30", "2020-02-29", "2020-12-31"]),
        "mask": np.arange(36).reshape(6, 6) % 2,
    }
    return {k: v for k, v in (made | changes).items() if v is not None}


def saved(path: Path, **changes: Any) -> str:
    np.savez(path, **patch(**changes))
    return str(path)


# -- reading ----------------------------------------------------------------------------------------------------


def test_a_folder_is_read(folder: Path) -> None:
    task, lines = prepare(str(folder))
    assert task.slug == "series-segmentation" and task.facts["labels"] == list(CROPS)
    assert [len(table) for _, table in task.splits.items()] == list(SIZES)
    assert "5 classes, 10 bands, 8 × 8 pixels" in lines[0]
    item = task.encode(task.splits.train.rows, None)[0]
    row = fields().train.rows[0]
    assert item["series"].dtype == np.float32 and item["series"].shape[1:] == row["series"].shape[1:]
    assert set(np.unique(item["labels"])) <= {*range(5), 255}


def test_the_order_of_files_and_rows_in_memory_agree(folder: Path, seed: int) -> None:
    disk, memory = read(str(folder)).train.rows, fields(seed=seed).train.rows
    for a, b in zip(disk, memory):
        assert np.array_equal(pictures(a), pictures(b)) and np.array_equal(outline(a).days, outline(b).days)


def test_areas_are_not_torn_apart(tmp_path: Path) -> None:
    for i in range(40):
        saved(tmp_path / f"{i:02}.npz", area=f"farm {i % 10}")
    task, _ = prepare(str(tmp_path))
    areas = [{row["area"] for row in table.rows} for _, table in task.splits.items()]
    assert sum(map(len, areas)) == 10 and not areas[0] & areas[1] and not areas[0] & areas[2]
    assert task.facts["labels"] == ["0", "1"]


def test_dates_become_days_of_the_year() -> None:
    assert days_of(patch()["dates"], 4).tolist() == [306, 364, 60, 365]
    assert days_of(patch()["dates"].astype("datetime64[D]"), 4).tolist() == [306, 364, 60, 365]
    assert days_of(np.array([1, 59, 366], np.int16), 3).tolist() == [1, 59, 365]


def test_series_are_padded_to_the_longest() -> None:
    items = [{"series": np.ones((n, 3, 6, 6), np.float32), "days": np.arange(1, n + 1)} for n in (2, 5)]
    batch = padded(items)
    assert batch["pixel_values"].shape == (2, 5, 3, 6, 6) and batch["date_mask"].sum(1).tolist() == [2, 5]
    assert (batch["pixel_values"][0, 2:] == 0).all() and (batch["days"][0, 2:] == 0).all() and "labels" not in batch


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no dates", {"dates": None}, r"\.npz has no array 'dates'; it has series, mask\. Save it with numpy\.savez"),
    ("no series", {"series": None}, "has no array 'series'"),
    ("no mask", {"mask": None}, "has no array 'mask', so nothing can be learned"),
    ("too few dates", {"dates": ["2020-01-01"]}, r"4 pictures need as many dates; dates has the shape \[1\]"),
    ("a missing date", {"dates": np.array(["2020-01-01", "NaT", "2020-01-03", "2020-01-04"], "datetime64[D]")}, r"dates\[1\] is missing"),
    ("not increasing", {"dates": ["2020-01-01", "2020-03-05", "2020-03-01", "2020-04-01"]}, r"\[2\] \(2020-03-01\) does not come after"),
    ("twice", {"dates": ["2020-01-01", "2020-03-05", "2020-03-05", "2020-04-01"]}, "Sort the pictures"),
    ("days over the new year", {"dates": [334, 364, 30, 60]}, "or write whole dates"),
    ("days of no year", {"dates": [1, 2, 3, 367]}, "a day of the year is 1 … 366"),
    ("no date", {"dates": ["2020-01-01", "2020-13-05", "b", "c"]}, "Write days as 2020-03-01"),
    ("fractions", {"dates": [0.1, 0.2, 0.3, 0.4]}, "Write days as 2020-03-01"),
    ("mask of another size", {"mask": np.zeros((6, 5), int)}, "the mask is 6 × 5, the pictures 6 × 6 pixels. Cut or resample"),
    ("mask of fractions", {"mask": np.zeros((6, 6))}, "save whole numbers, one class a pixel"),
    ("series of pictures only", {"series": np.zeros((4, 6, 6))}, r"it must be \[time, channels, height, width\]"),
    ("other bands", {"series": np.zeros((4, 2, 6, 6))}, "has 2 bands, the first patch 3. All patches need the same bands"),
    ("other size", {"series": np.zeros((4, 3, 5, 5)), "mask": np.zeros((5, 5), int)}, "is 5 × 5 pixels, the first patch 6 × 6. Cut all"),
    ("dates as objects", {"dates": np.array(["2020-01-01", 1, 2, 3], object)}, "it holds Python objects, and none are read"),
    ("objects", {"series": np.array([{}], object)}, "series must hold plain numbers; Python objects are not read"),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_patch_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    for i in range(12):
        saved(tmp_path / f"{i:02}.npz")
    place = tmp_path / "12.npz"
    with np.errstate(all="ignore"):
        np.savez(place, **{k: np.asarray(v) for k, v in patch(**changes).items()})
    (tmp_path / "13.npz").write_bytes(place.read_bytes())  # wherever the splits put them, training holds one
    with pytest.raises(VeneerError, match=said):
        SeriesSegmentation(Options(), _unsplit(read(str(tmp_path))))


def _unsplit(data: Data) -> Any:
    from veneer.tasks.data import Splits

    return Splits(data.train, data.train, data.train)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    series = patch()["series"]
    series[2, 1, 3, 3] = np.nan
    with pytest.raises(BadValue, match=r"series\[2\] holds values that are not finite"):
        pictures(saved(tmp_path / "a.npz", series=series))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(BadFile, match="cannot be read as a patch"):
        outline(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(BadFile, match="it holds one array"):
        outline(tmp_path / "b.npz")
    with pytest.raises(BadFile, match="There is no file"):
        outline(tmp_path / "c.npz")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    saved(tmp_path / "test" / "a.npz")
    with pytest.raises(BadFile, match=r"holds no \.npz files"):
        read(str(tmp_path))
    (tmp_path / "train").rmdir()
    with pytest.raises(BadFile, match="has no folder train; it has test"):
        read(str(tmp_path))


def test_a_class_that_training_lacks_is_refused(folder: Path) -> None:
    file = folder / "validation" / "0000.npz"
    with np.load(file) as held:
        changed = {k: held[k] for k in held}
    changed["mask"][0, 0] = 7
    np.savez(file, **changed)
    with pytest.raises(BadValue, match=r"validation/0000\.npz: The mask holds the value 7 in row 0, column 0\. The classes are"):
        prepare(str(folder))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image_size": 16}, r"The patches are 8 × 8 pixels, .* reads 16 × 16\. Cut them to that, or .*image_size=8"),
        ({"num_channels": 4}, r"The patches have 10 bands, .* reads 4\..*num_channels=10"),
        ({"max_dates": 5}, r"A series has \d+ dates, .* takes at most 5\. Leave dates out, or .*max_dates="),
    ],
)
def test_data_that_the_model_cannot_read_is_refused(changes: dict[str, Any], said: str, folder: Path, tmp_path: Path) -> None:
    task, _ = prepare(str(folder))
    with pytest.raises(BadValue, match=said):
        task.load(model_folder(tmp_path / "model", **changes))


def test_another_kind_of_model_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    task, _ = prepare(str(folder))
    with pytest.raises(BadValue, match=r"needs a TSViT; .* is a vit\. Give tsvit-phenology"):
        task.load(str(tmp_path))


# -- training and using -----------------------------------------------------------------------------------------


def test_a_run_from_folder_to_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_folder(tmp_path / "model")
    out = str(tmp_path / "run")
    recipe = Recipe(model=model, data=str(folder), method="lora(r=2)", steps=3, batch_size=4, out=out, eval_every=2, device="cpu")
    outcome = train(recipe, progress=False, say=lambda line: None)
    assert outcome.main == "mean_f1" and {"mean_iou", "pixel_accuracy", "mean_accuracy"} <= outcome.metrics.keys()
    assert outcome.base_metrics["mean_f1"].n == SIZES[2]
    again = evaluate(out, str(folder))
    assert again["mean_f1"].value == pytest.approx(outcome.metrics["mean_f1"].value)
    file = str(folder / "test" / "0000.npz")
    answer = predict(out, [file])[0]
    assert np.shape(answer["mask"]) == (SIDE, SIDE) and sum(answer["shares"].values()) == pytest.approx(1)
    assert main(["predict", out, file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["label"] == answer["label"] in CROPS
    row = fields().tables["test"].rows[0]
    assert predict(out, [{"series": row["series"], "dates": row["dates"]}])[0]["label"] in CROPS
    with pytest.raises(BadValue, match="have 3 bands"):
        predict(out, [{"series": np.zeros((2, 3, SIDE, SIDE)), "dates": [1, 2]}])


def test_two_classes_are_one_logit(tmp_path: Path) -> None:
    task, _ = prepare(fields(wheat=True))
    assert task.facts["labels"] == ["other", "winter wheat"]
    model, _ = task.load(model_folder(tmp_path))
    batch = task.collator(None)([task.encode(task.splits.train.rows, None)[i] for i in range(3)])
    output = model(**batch)
    assert output.logits.shape == (3, 1, SIDE, SIDE) and torch.isfinite(output.loss)
    assert torch.equal(task.reduce(output.logits, batch["labels"]).bool(), output.logits[:, 0] > 0)


def test_equal_classes_keep_the_pretrained_head(tmp_path: Path) -> None:
    task, _ = prepare(fields())
    model: Any = task.load(model_folder(tmp_path))[0]
    assert isinstance(model.classifier, torch.nn.Identity)
    names = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    unnamed: Any = task.load(model_folder(tmp_path / "a", **names))[0]
    assert isinstance(unnamed.classifier, torch.nn.Identity) and list(unnamed.config.id2label.values()) == list(CROPS)
    other: Any = task.load(model_folder(tmp_path / "b", num_classes=7, id2label=dict(enumerate("abcdefg"))))[0]
    assert other.classifier.weight.shape == (5, 7)


def test_anatomy_knows_the_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["anatomy", model_folder(tmp_path, num_outputs=1)]) == 0
    shown = capsys.readouterr().out
    assert "TSViTForSemanticSegmentation" in shown and "embed.patch" in shown and "classifier  (trained with the task)" in shown


# -- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_pool_the_labelled_pixels(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, found = draw.integers(3, size=(5, 4, 4)), draw.integers(3, size=(5, 4, 4))
    truth[0, :2] = 255
    metrics = measured(found, list(truth), ["a", "b", "c"]).metrics
    kept = truth != 255
    for i, name in enumerate("abc"):
        t, p = truth[kept] == i, found[kept] == i
        assert metrics[f"f1/{name}"].value == pytest.approx(2 * (t & p).sum() / (t.sum() + p.sum()))
        assert metrics[f"accuracy/{name}"].value == pytest.approx((t & p).sum() / t.sum())
    assert metrics["pixel_accuracy"].value == pytest.approx((truth == found)[kept].mean())
    f1 = np.array([metrics[f"f1/{n}"].value for n in "abc"])
    assert metrics["mean_iou"].value == pytest.approx((f1 / (2 - f1)).mean())
    assert metrics["mean_f1"].value == pytest.approx(np.mean([metrics[f"f1/{n}"].value for n in "abc"]))
    assert metrics["mean_f1"].low <= metrics["mean_f1"].value <= metrics["mean_f1"].high


def test_a_class_that_is_nowhere_has_no_metric() -> None:
    zeros = np.zeros((2, 3, 3), int)
    metrics = measured(zeros, list(zeros), ["a", "b"]).metrics
    assert metrics["mean_f1"].value == 1 and "f1/b" not in metrics
    assert np.isnan(confusion.f1(confusion.tallies(np.array([[4, 0], [0, 0]])))[1])


# -- the generator ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_patches(seed: int) -> None:
    one, two, other = (patches(SOURCE, 2, s, side=6) for s in (seed, seed, seed + 1))
    assert all(np.array_equal(a["series"], b["series"]) and np.array_equal(a["mask"], b["mask"]) for a, b in zip(one, two))
    assert any(a["series"].shape != b["series"].shape or not np.array_equal(a["series"], b["series"]) for a, b in zip(one, other))


@pytest.mark.parametrize("crop", CROPS)
def test_greenness_follows_the_curve_and_the_shift(crop: str, seed: int) -> None:
    start, end, low, high = CROPS[crop]
    days = np.arange(start - 300, end + 300)

    def curve(days_later: float) -> np.ndarray:
        place = dataclasses.replace(SOURCE, days=days_later)
        return np.mean([greenness(crop, days, place, np.random.default_rng(seed + i)) for i in range(30)], 0)

    here, earlier = curve(0), curve(-20)
    assert here[[0, -1]] == pytest.approx(low, abs=1e-6) and here.max() <= high and here[300:-300].max() > 0.9 * high
    np.testing.assert_allclose(earlier[:-20], here[20:], atol=1e-9)


def test_all_crops_share_their_spectra(seed: int) -> None:
    """Without clouds, a pixel's bands lie between soil and leaf, but for noise: nothing but the share tells a crop."""
    soil, leaf = np.array(SOIL), np.array(LEAF)
    row = patches(SOURCE, 1, seed)[0]
    flat = row["series"].transpose(0, 2, 3, 1).reshape(-1, 10)
    clear = flat[flat.min(1) < 0.25]
    basis = np.stack([soil, leaf], 1)
    rest = clear - clear @ np.linalg.pinv(basis).T @ basis.T
    assert np.abs(rest).mean() < 0.02


def test_a_shifted_place_is_cloudier_and_greener_earlier(seed: int) -> None:
    source, target = (patches(place, 40, seed, side=6) for place in (SOURCE, TARGET))
    assert np.mean([len(r["dates"]) for r in source]) > np.mean([len(r["dates"]) for r in target])
    assert all((np.diff(r["dates"]).astype(int) > 0).all() for r in (*source, *target))
