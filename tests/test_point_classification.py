"""Point-cloud classification: from folders of files to answers, and what is told when something does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LABELS, SUBJECTS, moved
from torch.nn import functional as F

import veneer
from veneer.errors import BadFile, BadValue, VeneerError
from veneer.models.point_mae import PointMAEConfig, PointMAEForPointCloudClassification
from veneer.tasks.data import read
from veneer.tasks.point_classification import PointClassification
from veneer.tasks.task import Options, prepare
from veneer.train import Recipe, predict, train
from veneer.train.use import evaluate

POINTS = SUBJECTS["points"]


def ring_or_ball(kind: str, seed: int, n: int = 40) -> np.ndarray:
    """Points of a ring, or of a ball."""
    cloud = np.random.default_rng(seed).normal(size=(n, 3))
    cloud /= np.linalg.norm(cloud, axis=1, keepdims=True)
    return cloud * [1, 1, 0.05] if kind == "ring" else cloud


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "clouds"
    for split, count in (("train", 12), ("val", 2), ("test", 4)):
        for kind in ("ring", "ball"):
            for i in range(count):
                file = folder / split / kind / f"{i}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, ring_or_ball(kind, 100 * count + i))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    POINTS.build(torch.float32).point_mae.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("method", ["dapt(r=4)", "point-peft(L=4, k=4, m=4)", "lora(r=4)"])
def test_a_run_from_files_to_answers(method: str, data: Path, model: Path, tmp_path: Path) -> None:
    settings = {"model": str(model), "data": str(data), "method": method, "steps": 30, "batch_size": 8, "eval_every": 30, "lr": 1e-2}
    outcome = train(Recipe.of({**settings, "out": str(tmp_path / "run")}), progress=False, say=lambda line: None)
    assert outcome.metrics["accuracy"].n == 8 and outcome.metrics["accuracy"].value >= 0.75
    answers = predict(outcome.folder, [str(data / "test" / "ring" / "0.npy"), ring_or_ball("ball", 5)])
    assert [set(a["scores"]) for a in answers] == [{"ball", "ring"}] * 2
    assert evaluate(outcome.folder)["accuracy"].value == outcome.metrics["accuracy"].value
    assert evaluate(outcome.folder, str(data))["accuracy"].n == 8


def test_a_folder_without_splits_is_split_and_guessed(data: Path) -> None:
    task, lines = prepare(str(data / "train"))
    assert isinstance(task, PointClassification) and "guessed" not in lines[0]
    assert [len(t) for _, t in task.splits.items()] == [20, 2, 2] and task.facts["labels"] == ["ball", "ring"]


def test_a_cloud_of_too_few_points_is_told_with_its_file(data: Path, model: Path) -> None:
    np.save(data / "train" / "ring" / "0.npy", ring_or_ball("ring", 0, n=5))
    with pytest.raises(BadFile) as said:
        train(Recipe.of({"model": str(model), "data": str(data), "steps": 1, "out": str(data / "run")}), progress=False, say=lambda _: None)
    assert all(w in str(said.value) for w in ("ring/0.npy holds 5 points", "8 patches", "4 points", "at least 8"))


def test_fewer_points_than_the_model_reads_are_taken_twice() -> None:
    task = PointClassification(Options(label="label"), None, {"labels": ["a", "b"]})
    cloud = ring_or_ball("ball", 0, n=20)
    found = task.ball(cloud.astype(np.float32), PointMAEConfig(num_points=50, num_groups=8, group_size=4))
    assert found.shape == (50, 3) and len(np.unique(found.round(5), axis=0)) == 20


BAD_RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too few points asked": ({"task": "point-classification(points=3)"}, ["points=3", "at least 8"]),
    "no number of points": ({"task": "point-classification(points=0)"}, ["points", "at least 1"]),
    "unknown setting": ({"task": "point-classification(point=30)"}, ["'point'", "'points'"]),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_wrong_settings_are_told(what: str, data: Path, model: Path, tmp_path: Path) -> None:
    changes, words = BAD_RUNS[what]
    with pytest.raises(VeneerError) as said:
        recipe = Recipe.of({"model": str(model), "data": str(data), "steps": 1, "out": str(tmp_path / "run"), **changes})
        train(recipe, progress=False, say=lambda _: None)
    assert all(word in str(said.value) for word in words), str(said.value)


def test_a_model_that_reads_no_points_is_refused(data: Path, tmp_path: Path) -> None:
    SUBJECTS["vit"].build(torch.float32).save_pretrained(tmp_path / "vit")
    with pytest.raises(BadValue, match="reads no points"):
        train(
            Recipe.of({"model": str(tmp_path / "vit"), "data": str(data), "steps": 1, "out": str(tmp_path / "run")}),
            progress=False,
            say=lambda _: None,
        )


def test_an_empty_split_and_a_folder_without_points_are_told(data: Path, tmp_path: Path) -> None:
    (data / "test" / "ring").rename(tmp_path / "ring")
    (data / "test" / "ball").rename(tmp_path / "ball")
    with pytest.raises(BadFile, match="holds no point clouds"):
        read(str(data))


def test_merged_it_is_an_ordinary_model(data: Path, model: Path, tmp_path: Path) -> None:
    base = PointMAEForPointCloudClassification.from_pretrained(model, num_labels=LABELS).eval()
    tuned = moved(veneer.attach(base, "lora(r=2)"))
    before = POINTS.answers(base)
    tuned.merge(keep=False).detach().save_pretrained(tmp_path / "merged")
    again = PointMAEForPointCloudClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(POINTS.answers(again), before)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "point_mae"


def test_keys_and_values_may_be_learned_too_but_no_words() -> None:
    model = POINTS.build()
    with pytest.raises(VeneerError, match="does not read token ids"):
        veneer.attach(model, "prompt-tuning", head=False)
    tuned = moved(veneer.attach(model, "prefix-tuning(length=3)", head=False))
    with tuned.disabled():
        plain = POINTS.answers(model)
    assert float((POINTS.answers(model) - plain).detach().abs().max()) > 1e-6
    assert F.cross_entropy(POINTS.answers(model), torch.zeros(4, dtype=torch.long)).isfinite()
