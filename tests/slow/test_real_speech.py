"""Whisper and its prompts as they arrive in packages; skipped, with the install line, where one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer import assets, assets_speech
from veneer.tasks.audio import seconds
from veneer.tasks.task import Options, prepare
from veneer.tasks.transcription import Transcription
from veneer.tasks.word_errors import plain_words
from veneer.train import Recipe, train

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"


def need(*names: str) -> None:
    for name in names:
        if not assets.available(name):
            pytest.skip(f"needs: {assets.INSTALL[name]}")


def test_the_prompts_are_as_described() -> None:
    need("asterisk-es", "asterisk-en")
    assert [len(assets_speech.asterisk_prompts(code)) for code in ("es", "en")] == [479, 563]
    task, _ = prepare("asterisk-es")
    texts = [{plain_words(row["text"]) for row in table.rows} for _, table in task.splits.items()]
    assert sum(len(table) for _, table in task.splits.items()) > 400
    assert all(seconds(row["audio"]) <= 10 for row in task.splits.test.rows)
    raw = [{row["text"] for row in table.rows} for _, table in task.splits.items()]
    assert not (raw[0] & raw[1] or raw[0] & raw[2] or raw[1] & raw[2]) and all(texts)


def test_whisper_hears_english_also_through_a_shorter_window() -> None:
    need("whisper-tiny.en", "asterisk-en")
    folder = assets.resolve("whisper-tiny.en")
    assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == "whisper"
    for most in (None, 15.0):
        task, _ = prepare("asterisk-en", None, Options(max_seconds=most, max_new_tokens=60))
        assert isinstance(task, Transcription)
        model, processor = task.load("whisper-tiny.en")
        assert task.generate(model, processor, task.splits.test.rows[:20], 10).metrics["wer"].value < 0.3


def test_whisper_learns_spanish(tmp_path: Path) -> None:
    need("whisper-tiny.en", "asterisk-es")
    settings = {"method": "lora(r=8)", "lr": 3e-3, "steps": 15, "test_rows": 16, "validation_rows": 4, "out": str(tmp_path / "run")}
    outcome = train(Recipe.read(RECIPES / "whisper-spanish.yaml", {**settings, "eval_every": 15}), progress=False)
    before, after = outcome.base_metrics, outcome.metrics
    assert after["loss"].high < before["loss"].low and after["wer"].value < before["wer"].value
