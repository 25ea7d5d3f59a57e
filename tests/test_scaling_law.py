"""Laws of the sparse scaling law, of gradual pruning, and of the study that puts them together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from veneer.cli.main import main
from veneer.errors import BadFile, BadValue
from veneer.maths import scaling_law as maths
from veneer.maths.scaling_law import Law, contour, data_for, fit, largest_left_out, optimal_sparsity, resampled
from veneer.strategies.gradual_pruning import Goal, GradualPruning, largest, mask_at, prunable, table_sparsity
from veneer.study import scaling_charts
from veneer.study import scaling_law as study
from veneer.study.sparse_runs import Design, Trainer, finished
from veneer.train.interrupt import Interrupted

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_law(rng: np.random.Generator) -> Law:
    """A law like the published ones, in random units."""
    a_S, c_S, e, c = rng.uniform(0.4, 2.0, 4)
    b_S, b_N, b_D = rng.uniform(0.5, 1.0), rng.uniform(0.2, 0.4), rng.uniform(0.2, 0.9)
    return Law(a_S, b_S, c_S, b_N, e, b_D, c, N_unit=10 ** rng.uniform(3, 7), D_unit=10 ** rng.uniform(4, 9))


def grid(law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    S, N, D = np.meshgrid([0, 0.5, 0.75, 0.875], np.geomspace(0.5, 60, 4) * law.N_unit, np.array([1, 4, 16]) * law.D_unit)
    return S.ravel(), N.ravel(), D.ravel()


# -- the law ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [True, False])
def test_a_fit_of_exact_losses_predicts_them(rng: np.random.Generator, log: bool) -> None:
    law = some_law(rng)
    S, N, D = grid(law)
    found = fit(S, N, D, law(S, N, D), log=log, starts=10)
    np.testing.assert_allclose(found.law(S, N, D), law(S, N, D), rtol=1e-3)
    new = rng.uniform(0, 0.8, 20), law.N_unit * rng.uniform(1, 50, 20), law.D_unit * rng.uniform(1, 15, 20)
    np.testing.assert_allclose(found.law(*new), law(*new), rtol=2e-3)
    np.testing.assert_allclose(found.law.factor([0.5, 0.75]), law.factor([0.5, 0.75]), rtol=1e-2)


def test_sparsity_that_does_harm_shows_as_a_factor_below_one(rng: np.random.Generator) -> None:
    law = dataclasses.replace(some_law(rng), a_S=-0.3, c_S=1.3)
    S, N, D = grid(law)
    found = fit(S, N, D, law(S, N, D), starts=10)
    np.testing.assert_allclose(found.law(S, N, D), law(S, N, D), rtol=1e-3)
    assert found.law.factor(0.75) == pytest.approx(law.factor(0.75), rel=0.02) and law.factor(0.75) < 1
    for cost in maths.COSTS:
        assert (optimal_sparsity(law, N, D, cost) == 0).all() and np.isinf(contour(law, 0.5, N, cost)).all()


def test_units_change_coefficients_and_nothing_else(rng: np.random.Generator) -> None:
    law = some_law(rng)
    S, N, D = grid(law)
    np.testing.assert_allclose(law.raw(S, N, D), law(S, N, D), rtol=1e-10)
    np.testing.assert_allclose(law.raw.e, law.raw.a_D**law.b_D, rtol=1e-9)
    assert law.raw.a_D == pytest.approx(law.a_D * law.D_unit)
    L = law(S, N, D) * np.exp(rng.normal(0, 0.005, len(S)))
    one, other = fit(S, N, D, L), fit(S, N, D, L, N_unit=law.N_unit * 7, D_unit=law.D_unit / 3)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_the_equivalent_dense_model_has_the_same_loss(rng: np.random.Generator) -> None:
    law = some_law(rng)
    S, N, D = grid(law)
    np.testing.assert_allclose(law(0, law.dense_size(S, N), D), law(S, N, D), rtol=1e-10)
    assert law.factor(0.0) == 1 and (np.diff(law.factor(np.linspace(0, 0.99, 50))) > 0).all()
    assert law.factor(1 - 1e-12) == pytest.approx(law.most, rel=1e-4)


def test_the_cost_of_gradual_pruning_is_the_mean_over_its_schedule() -> None:
    S = np.array([0.0, 0.3, 0.5, 0.9])
    x = (np.arange(200_000) + 0.5) / 200_000
    part = np.where(x < 0.25, 0, np.where(x > 0.75, 1, 1 - (1 - (x - 0.25) / 0.5) ** 3))
    np.testing.assert_allclose(maths.c_mul(S), (1 - S[:, None] * part).mean(-1) / (1 - S), rtol=1e-6)
    assert maths.c_mul(0.5) == 1.375


@pytest.mark.parametrize("cost", maths.COSTS)
def test_the_best_sparsity_is_the_minimum_of_a_grid(rng: np.random.Generator, cost: str) -> None:
    law = some_law(rng)
    N, D0 = law.N_unit * np.geomspace(0.1, 1e3, 12), law.D_unit * 10 ** rng.uniform(-1, 4, 12)
    best = optimal_sparsity(law, N, D0, cost)
    S = -np.expm1(-np.linspace(0, 12, 60_001))
    losses = law(S[:, None], N, data_for(S[:, None], D0, cost))
    at = losses.argmin(0)
    np.testing.assert_allclose(np.log1p(-best), np.log1p(-S[at]), atol=4e-4)
    assert (law(best, N, data_for(best, D0, cost)) <= losses.min(0) * (1 + 1e-12)).all()


@pytest.mark.parametrize("cost", maths.COSTS)
def test_more_data_never_asks_for_less_sparsity_and_contours_are_straight(rng: np.random.Generator, cost: str) -> None:
    law = some_law(rng)
    N, D0 = law.N_unit * 3.0, law.D_unit * np.geomspace(1e-3, 1e6, 200)
    assert (np.diff(optimal_sparsity(law, N, D0, cost)) >= 0).all()
    assert (np.diff(optimal_sparsity(law, law.N_unit * np.geomspace(1e-3, 1e6, 200), law.D_unit, cost)) <= 0).all()
    for S in (0.2, 0.5, 0.9):
        sizes = law.N_unit * np.geomspace(0.1, 100, 5)
        line = contour(law, S, sizes, cost)
        np.testing.assert_allclose(optimal_sparsity(law, sizes, line, cost), S, atol=1e-9)
        np.testing.assert_allclose(np.diff(np.log(line)) / np.diff(np.log(sizes)), law.b_N / law.b_D, rtol=1e-8)


def test_samples_of_the_runs_surround_the_fit_and_the_largest_size_is_foretold(rng: np.random.Generator) -> None:
    law = some_law(rng)
    S, N, D = grid(law)
    L = law(S, N, D) * np.exp(rng.normal(0, 0.003, len(S)))
    found = fit(S, N, D, L, starts=5)
    laws = resampled(found, S, N, D, L, times=40)
    low, high = np.percentile([x.factor(0.75) for x in laws], [0, 100])
    assert len(laws) == 40 and low <= found.law.factor(0.75) <= high
    out = largest_left_out(S, N, D, L, starts=5)
    assert out is not None and out[0].sum() == 12
    np.testing.assert_allclose(out[1], law(S, N, D)[out[0]], rtol=0.05)
    few = law.N_unit > N
    assert largest_left_out(S[few], N[few], D[few], L[few]) is None


def bad_runs(**changes: Any) -> dict[str, np.ndarray]:
    runs = {"S": np.zeros(9), "N": np.full(9, 1e4), "D": np.full(9, 1e5), "L": np.full(9, 2.0)}
    for key, value in changes.items():
        runs[key][3] = value
    return runs


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({k: v[:7] for k, v in bad_runs().items()}, "7 runs are too few.*at least 8"),
        (bad_runs(S=1.0), r"Run 4: S=1 .*at least 0 and less than 1"),
        (bad_runs(S=-0.5), r"Run 4: S=-0.5 .*at least 0 and less than 1"),
        (bad_runs(S=math.nan), "Run 4: S=nan"),
        (bad_runs(N=0), "Run 4: N=0 is out of range; it must be more than 0"),
        (bad_runs(D=-1), "Run 4: D=-1 is out of range"),
        (bad_runs(L=math.inf), "Run 4: L=inf is out of range"),
        ({**bad_runs(), "L": np.ones(4)}, "each run has one of each"),
    ],
)
def test_runs_out_of_range_are_refused(runs: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        fit(**runs)


# -- pruning ----------------------------------------------------------------------------------------------------


def test_masks_keep_exactly_the_largest_and_of_equals_the_first(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(7, 12, generator=generator)
    for S in (0.0, 0.1, 0.5, 0.77, 0.98):
        mask = mask_at(w, Goal(S), S)
        assert int(mask.sum()) == round(84 * (1 - S))
        if S > 0:
            assert w.abs()[mask].min() >= w.abs()[~mask].max()
    equal = torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, 0.0]])
    assert mask_at(equal, Goal(0.5), 0.5).tolist() == [[True, True, False], [True, False, False]]
    assert mask_at(torch.ones(2, 8), Goal.of("2:4"), 0.5).tolist() == [[True, True, False, False] * 2] * 2
    assert largest(equal, 6).all()


@pytest.mark.parametrize("iterative", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "4:4"])
def test_n_of_m_ends_exactly(seed: int, pattern: str, iterative: bool) -> None:
    goal, w = Goal.of(pattern), torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    counts = []
    for part in np.linspace(0, 1, 21):
        mask = mask_at(w, goal, part * goal.S, iterative)
        counts.append(int(mask.sum()))
        groups = mask.reshape(-1, goal.m).sum(-1)
        assert (groups >= goal.n).all()
        if not iterative:
            assert len(set(groups.tolist())) == 1
    assert counts == sorted(counts, reverse=True) and counts[0] == w.numel()
    assert (groups == goal.n).all()
    assert torch.equal(mask, mask_at(w, goal, goal.S, not iterative))


def toy(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 11))


def test_a_run_is_dense_first_then_cubic_then_fixed(seed: int) -> None:
    model, steps = toy(seed), 80
    pruning = GradualPruning.of(model, Goal(0.75), steps)
    optimiser = torch.optim.AdamW(model.parameters(), 0.01)
    matrices, tables = prunable(model)
    assert list(matrices) == ["1.weight", "3.weight"] and list(tables) == ["0.weight"]
    shares, patterns = [], []
    for _ in range(steps):
        model(torch.randint(0, 11, (5,))).square().sum().backward()
        optimiser.step()
        pruning.after_step()
        optimiser.zero_grad()
        shares.append(1 - int(model[1].weight.count_nonzero()) / 128)
        patterns.append(model[1].weight != 0)
    for t, share in enumerate(shares, 1):
        x = min(max((t - 20) / 40, 0), 1)
        assert share == pytest.approx(1 - round(128 * (1 - 0.75 * (1 - (1 - x) ** 3))) / 128)
    assert all(torch.equal(p, patterns[-1]) for p in patterns[59:])
    assert not torch.equal(patterns[40], patterns[41])
    assert int(model[3].weight.count_nonzero()) == 44 and int(model[0].weight.count_nonzero()) == round(88 * 0.5)
    assert (model[1].bias != 0).all() and (model[2].weight != 0).all()


def test_pruned_weights_may_come_back_while_the_schedule_runs() -> None:
    w = nn.Parameter(torch.tensor([[3.0, 2.0, 1.0, 0.5]]))
    pruning = GradualPruning({"w": w}, {"w": Goal(0.5)}, 8, every=1)
    for _ in range(3):
        pruning.after_step()
    assert w.ne(0).tolist() == [[True, True, True, False]]
    with torch.no_grad():
        w[0, 3] = 9.0  # what a step of the optimiser may do
    pruning.after_step()
    assert w.ne(0).tolist() == [[True, False, False, True]]
    pruning.after_step()
    pruning.after_step()
    with torch.no_grad():
        w[0, 1] = 9.0
    pruning.after_step()
    assert w.ne(0).tolist() == [[True, False, False, True]]  # fixed by now


def test_pruning_goes_on_from_its_state(seed: int) -> None:
    def go(model: nn.Module, pruning: GradualPruning, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * torch.sin(97 * p))
            pruning.after_step()

    whole, halves = toy(seed), toy(seed)
    go(whole, GradualPruning.of(whole, Goal.of("2:4"), 20), 20)
    first = GradualPruning.of(halves, Goal.of("2:4"), 20)
    go(halves, first, 17)
    second = GradualPruning.of(halves, Goal.of("2:4"))
    second.load_state_dict(first.state_dict())
    go(halves, second, 3)
    for a, b in zip(whole.parameters(), halves.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_tables_shrink_with_the_width() -> None:
    assert table_sparsity(0.75) == 0.5 and table_sparsity(0) == 0
    model = toy(0)
    assert "0.weight" not in GradualPruning.of(model, Goal(0.5), 8, "dense").weights
    tied = nn.Module()
    tied.a, tied.relative_attention_bias = nn.Embedding(4, 8), nn.Embedding(3, 2)
    tied.b = nn.Linear(8, 4, bias=False)
    tied.b.weight = tied.a.weight
    matrices, tables = prunable(tied)
    assert not matrices and list(tables) == ["a.weight"]


def test_weights_held_as_in_by_out_are_pruned_along_their_inputs() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(3, 8))
    pruning = GradualPruning.of(model, Goal.of("2:4"), 4)
    for _ in range(4):
        pruning.after_step()
    assert (model[0].weight.T.reshape(-1, 4).ne(0).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1", "at least 0 and less than 1"),
        ("-0.1", "at least 0 and less than 1"),
        ("nan", "at least 0 and less than 1"),
        ("5:4", "n must be at least 1 and at most m = 4"),
        ("0:4", "n must be at least 1 and at most m = 4"),
        ("half", "at least 0 and less than 1, or n:m"),
    ],
)
def test_sparsities_out_of_range_are_refused(text: str, words: str) -> None:
    with pytest.raises(BadValue, match=words):
        Goal.of(text)


def test_goals_that_do_not_fit_a_weight_are_refused() -> None:
    with pytest.raises(BadValue, match=r"S=0.9 leaves none of the 4 entries of w; choose S of at most 0.75"):
        GradualPruning({"w": torch.ones(1, 4)}, {"w": Goal(0.9)}, 8)
    assert int(mask_at(torch.ones(1, 4), Goal(0.75), 0.75).sum()) == 1
    with pytest.raises(BadValue, match=r"m=5 does not divide the 12 inputs of w; m must divide them, such as m = 4, 6"):
        GradualPruning({"w": torch.ones(2, 12)}, {"w": Goal.of("4:5")}, 8)
    with pytest.raises(BadValue, match="needs the number of optimiser steps"):
        GradualPruning({"w": torch.ones(2, 12)}, {"w": Goal(0.5)}).after_step()


# -- the study --------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(widths=(16, 32), sparsities=("0", "0.5", "2:4"), lengths=(640, 1280, 1920), layers=1, context=16, batch_size=2)
FLAGS = shlex.split(
    "--widths 16 32 --sparsity 0 0.5 2:4 --length 640 1280 1920 --layers 1 --context 16 --batch-size 2 --samples 10 --device cpu"
)
WORDS = ("the", "a", "cat", "dog", "sees", "hears", "big", "small", "old", "tree", "house", "runs", "sleeps", "and")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that a model of bytes can learn something from."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, 8)) + f" {i}.\n" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    out = tmp_path_factory.mktemp("study")
    return study.study(Design(data=str(text), **SMALL), out, study.Fitting(times=10), progress=False)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these studies; `made` has its pictures, as it is made before."""
    monkeypatch.setattr(scaling_charts, "pictures", lambda *args: [])


def test_a_study_runs_from_text_to_report(made: study.Study) -> None:
    runs = made.data["runs"]
    assert len(runs) == 18
    for r in runs:
        assert r["N"] == round(r["total"] * (1 - {"0": 0, "0.5": 0.5, "2:4": 0.5}[r["sparsity"]]))
        assert r["S"] == pytest.approx(1 - r["N"] / r["total"]) and r["D"] == r["length"] and 1 < r["L"] < 6
        assert r["flops"] == pytest.approx(6 * r["N"] * r["D"] * maths.c_mul(r["S"]))
    names = [f["name"] for f in made.data["fits"]]
    assert names == ["unstructured", "n:m (2:4)"]
    assert made.data["fits"][0]["mean_error"] < 0.1
    longest = {r["D"]: r["L"] for r in runs if r["model"] == "width 32" and r["sparsity"] == "0"}
    assert longest[1920] < longest[640]
    assert {"study.json", "report.html", "runs.jsonl"} <= {p.name for p in made.folder.iterdir()}
    assert json.loads((made.folder / "study.json").read_text())["runs"] == runs


def test_the_report_is_whole_and_fetches_nothing(made: study.Study) -> None:
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=", page) and page.count("<svg") >= 3
    for heading in ("Loss and non-zero weights", "Predicted and measured loss", "Sparsity of least loss", "Held-out loss"):
        assert heading in page
    from html.parser import HTMLParser

    HTMLParser().feed(page)
    pytest.importorskip("matplotlib")
    assert all((made.folder / f"{name}.png").stat().st_size > 5000 for name in ("sizes", "predictions", "contours"))


def test_a_finished_study_trains_nothing_and_its_runs_can_be_fitted_as_a_file(
    made: study.Study, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda *args: pytest.fail("trained again"))
    again = study.study(Design(data=str(text), **SMALL), made.folder, study.Fitting(times=0), progress=False)
    assert again.data["runs"] == made.data["runs"]
    from_file = study.study_of_file(made.folder / "runs.jsonl", tmp_path, study.Fitting(times=0))
    assert [f["law"] for f in from_file.data["fits"]] == [f["law"] for f in again.data["fits"]]
    with pytest.raises(BadValue, match=r"other settings \(seed 0 → 1\).*--out.*--again"):
        study.study(Design(data=str(text), **SMALL, seed=1), made.folder, progress=False)


def test_an_interrupted_study_goes_on_with_the_same_result(
    made: study.Study, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    design, left = Design(data=str(text), **SMALL), [5]
    whole = Trainer.run

    def stops(self: Trainer, size: str, sparsity: str, length: int, tick: Any) -> dict[str, Any]:
        def ticked(tokens: int) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            tick(tokens)

        found = whole(self, size, sparsity, length, ticked)
        left[0] -= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", stops)
        with pytest.raises(Interrupted, match="5 of 18 runs are finished"):
            study.study(design, tmp_path, progress=False)
    assert len(finished(tmp_path, design)) == 5
    found = study.study(design, tmp_path, study.Fitting(times=10), progress=False)
    assert [r["L"] for r in found.data["runs"]] == [r["L"] for r in made.data["runs"]]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines[:3], lines[3][:50]]))
    with pytest.raises(BadFile, match=r"runs.jsonl, line 4: not a run"):
        study.study(design, tmp_path, progress=False)


def test_ctrl_c_leaves_whole_runs_and_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "veneer.cli.main", "scaling-law", "--data", str(text), *FLAGS, "--length", "32000", "32640", "33280"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen([*argv, "--out", str(tmp_path)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "runs.jsonl").exists() and done.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    done.send_signal(signal.SIGINT)
    said = done.communicate(timeout=120)[1]
    assert done.returncode == 130, said
    assert "Interrupted:" in said and "To go on: veneer scaling-law --data" in said
    assert all(json.loads(line)["L"] > 0 for line in (tmp_path / "runs.jsonl").read_text().splitlines())


def test_runs_may_start_from_dense_training(text: Path, tmp_path: Path) -> None:
    """The fine-tuning form on models built here: the base is trained once, and runs start where it ended."""
    plain = Trainer(Design(data=str(text), **SMALL), tmp_path)
    tuned = Trainer(Design(data=str(text), **SMALL, pretrain=6400), tmp_path)
    before, after = (t.run("width 16", "0.5", 640) for t in (plain, tuned))
    assert after["L"] < before["L"] and after["D"] == 640
    assert len(list((tmp_path / "bases").iterdir())) == 1
    again = Trainer(tuned.design, tmp_path)
    again.trained = lambda *args: pytest.fail("trained again") if len(args) < 6 else Trainer.trained(again, *args)  # type: ignore[method-assign]
    assert again.run("width 16", "0.5", 640)["L"] == after["L"]


@pytest.fixture
def pretrained(tmp_path: Path) -> dict[str, str]:
    """Folders of two causal language models of one tokenizer, and of one with another vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<end>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {}
    for name, width, size in (("small", 8, len(words)), ("large", 16, len(words)), ("other", 8, 40)):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=size, n_embd=width, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / name)
        names[name] = str(tmp_path / name)
    return names


def test_pretrained_models_are_the_sizes_of_a_study(pretrained: dict[str, str], text: Path, tmp_path: Path) -> None:
    design = dict(data=str(text), sparsities=("0", "2:4"), lengths=(320, 640), context=8, batch_size=2, lr=0.01)
    names = pretrained["small"], pretrained["large"]
    found = study.study(Design(models=names, **design), tmp_path / "out", study.Fitting(times=0), progress=False)  # type: ignore[arg-type]
    sparse = [r for r in found.data["runs"] if r["pattern"] == "2:4"]
    assert len(sparse) == 4 and all(2 * r["N"] == r["total"] for r in sparse)
    assert [f["name"] for f in found.data["fits"]] == ["n:m (2:4)"]
    assert any("too few to fit" in note for note in found.data["notes"])
    with pytest.raises(BadValue, match=r"vocabularies of 15 .*, 40 .*within one tokenizer"):
        study.study(Design(models=(names[0], pretrained["other"]), **design), tmp_path / "mixed", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": (16, 40)}, "width 40 is out of range; it must be a multiple of 16"),
        ({"sparsities": ("0", "1")}, "at least 0 and less than 1"),
        ({"sparsities": ("0", "3:2")}, "n must be at least 1 and at most m = 2"),
        ({"sparsities": ("0", "2:5")}, "m=5 does not divide the 16 inputs"),
        ({"lengths": (640, 100)}, "100 tokens are 3 steps of 32; a pruning schedule needs at least 20 steps, 640 tokens"),
        ({"lengths": (640,)}, "2 sizes × 3 sparsities × 1 lengths are 6 runs; .* need at least 8"),
        ({"batch_size": 0}, "batch_size=0 is out of range; it must be at least 1"),
        ({"nm": "x"}, "nm='x' is not one of 'groups', 'iterative'"),
    ],
)
def test_designs_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        Design(**{**SMALL, **changes})


def test_a_sparsity_at_which_nothing_survives_is_refused_before_training(text: Path, tmp_path: Path) -> None:
    design = Design(data=str(text), **{**SMALL, "sparsities": ("0", "0.5", "0.999")})
    with pytest.raises(BadValue, match=r"S=0.999 leaves none of the 256 entries of .*q_proj.*; choose S of at most 0.99609375"):
        study.study(design, tmp_path, progress=False)
    assert not (tmp_path / "runs.jsonl").exists()


# -- files and the command --------------------------------------------------------------------------------------

GOOD = "sparsity,nonzero,tokens,val-loss\n" + "".join(
    f"{s},{n},{d},{2 + 0.4 * (1 - s) * (n / 1e6) ** -0.3 + (n / 1e6) ** -0.3 + (d / 1e5) ** -0.4}\n"
    for s in (0, 0.5, 0.75) for n in (1e6, 4e6, 16e6) for d in (1e5, 1e6)
)  # fmt: skip


def test_a_file_of_measurements_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(GOOD)
    assert main(["scaling-law", "--fit", str(path), "--out", str(tmp_path / "out"), "--samples", "20"]) == 0
    said = capsys.readouterr().out
    for words in (
        "Law, unstructured: 18 runs",
        "plain counts",
        "N dense / N",
        "0.9375",
        "* beyond what was measured",
        "largest size (N = 16,000,000)",
    ):
        assert words in said
    assert main(["scaling-law", "--fit", str(path), "--out", str(tmp_path / "out"), "--samples", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["fits"][0]
    by_S = {f["S"]: f for f in found["factors"]}
    assert by_S[0.5]["value"] == pytest.approx((1.4 / 1.2) ** (1 / 0.3), rel=0.01) and not by_S[0.75]["beyond"] and by_S[0.875]["beyond"]
    assert found["coefficients"][3]["raw"] == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("sparsity", "x"), "has no column S; it has x, nonzero"),
        (GOOD + "0.5,many,1,2\n", r"line 20: N \('nonzero'\) is 'many', not a number"),
        (GOOD + "1.0,1,1,2\n", "line 20: S=1 is not a sparsity; it must be at least 0 and less than 1"),
        (GOOD + "0.5,0,1,2\n", "line 20: N=0 is out of range; it must be more than 0"),
        (GOOD + "0.5,1\n", "line 20: 2 fields, but the header has 4"),
        ("".join(GOOD.splitlines(keepends=True)[:8]), "7 runs are too few.*at least 8"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    with pytest.raises((BadFile, BadValue), match=words):
        study.study_of_file(path, tmp_path / "out")


def test_the_command_refuses_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(GOOD)
    for argv, words in (
        (["--fit", str(path), "--widths", "16"], "--widths has no place beside it"),
        (["--fit", str(tmp_path / "their.csv")], "There is no file"),
        (["--fit", str(path), "--delta", "-1"], "delta=-1 is out of range"),
        (["--widths", "16", "--model", "smollm2"], "exclude each other"),
        (["--length", "many"], "not a number of tokens; write it as 256000, 256k or 1.5M"),
        (["--sparsity", "0", "1.5"], "at least 0 and less than 1"),
    ):
        assert main(["scaling-law", *argv]) == 2
        assert words in capsys.readouterr().err


def test_a_study_from_the_command_line(made: study.Study, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling-law", "--data", str(text), *FLAGS, "--out", str(made.folder)]) == 0  # all runs are there
    said = capsys.readouterr().out
    for words in (
        "18 of 18 runs were finished before",
        "Held-out loss after D bytes",
        "Law, n:m (2:4)",
        "Sparsity of least loss",
        "Report:",
    ):
        assert words in said


def test_numbers_of_tokens() -> None:
    from veneer.cli.scaling_law import counted

    assert [counted(t) for t in ("640", "128k", "1.5M", "2_000", "1G")] == [640, 128_000, 1_500_000, 2000, 10**9]
