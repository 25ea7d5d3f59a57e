"""Counting without attaching, the search for sizes that meet a budget, and `veneer budget`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SUBJECTS
from torch import nn

import veneer
from veneer import anatomy, registry
from veneer.cli.main import main
from veneer.errors import BadValue, Unsupported, VeneerError
from veneer.site import Site
from veneer.study.budget import budget_of, count, everywhere, nearest
from veneer.study.budget import replace as site_with

SLUGS = [card.slug for card in registry.methods() if card.family != "strategy"]
BUDGETS = (1500, 6000)


def model(subject: str = "bert") -> nn.Module:
    return SUBJECTS[subject].build(torch.float32, width=64)


@functools.cache
def skeleton(subject: str = "bert") -> tuple[nn.Module, list[Site]]:
    """A model without weights, and its sites."""
    empty = model(subject).to("meta")
    return empty, anatomy.sites(empty)


def trained(spec: str, subject: str = "bert") -> int | str:
    """What attaching counts, or the words in which it refuses. No tensor may be left without values."""
    try:
        tuned = veneer.attach(model(subject), spec, head=False)
    except VeneerError as error:
        return str(error)
    assert not any(t.is_meta for _, _, p in tuned.entries() for t in p.values())
    return tuned.summary().trained


# -- counting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["bert", "llama", "vit", "convnet"])
@pytest.mark.parametrize("slug", SLUGS)
def test_the_count_is_what_attaching_trains(slug: str, subject: str) -> None:
    empty, sites = skeleton(subject)
    base: Any = model(subject) if registry.load(slug).weighs else empty
    try:
        found: int | str = count(registry.method(slug), sites, base)
    except VeneerError as error:
        found = str(error)
    if registry.method(slug).reads_gradients:  # it trains what data say, up to a budget
        assert "decided on data" in str(found) and "starts from data" in str(trained(slug, subject))
    elif found == 0:
        assert "nothing to train" in str(trained(slug, subject))
    else:
        assert found == trained(slug, subject)


def test_shared_tensors_count_once_and_fixed_ones_not() -> None:
    _, sites = skeleton()
    assert count(veneer.parse("wegeft(r=4)"), sites) == 2 * 2 * 4 * 64  # a pair for q, a pair for v
    assert count(veneer.parse("wegeft(r=4, share='all')"), sites) == 2 * 4 * 64
    assert count(veneer.parse("lora(r=2) + wegeft(r=4)"), sites) == 4 * 2 * 128 + 2 * 2 * 4 * 64
    assert count(veneer.parse("lora(r=2, start=pissa)"), sites) == 4 * 2 * 128


def test_a_missing_bias_is_seen_in_the_model_alone() -> None:
    empty, sites = skeleton("llama")
    assert count(veneer.parse("ssf"), sites, empty) < count(veneer.parse("ssf"), sites)


def test_stacked_matrices_count_each() -> None:
    _, sites = skeleton()
    stack = site_with(sites[0], kind="parameter", role="expert.up", count=3, out_features=10, in_features=6)
    assert count(veneer.parse("lora(r=2, targets='expert.up')"), [stack]) == 3 * 2 * 16


@pytest.mark.parametrize("slug", [s for s in SLUGS if registry.load(s).weighs])
def test_counts_that_depend_on_weights_need_them(slug: str) -> None:
    empty, sites = skeleton()
    for base in (None, empty):
        with pytest.raises(Unsupported, match="depends on the weights"):
            count(registry.method(slug), sites, base)


def test_sizes_are_hyper_parameters() -> None:
    for card in registry.methods():
        named = {o.name for o in card.options}
        cls = registry.load(card.slug)
        assert set(cls.sizes) <= named or cls.sizes == ("r",), card.slug
        assert "r" not in named or cls.sizes != () or card.slug == "pyra", card.slug  # whose r is a number of tokens


# -- searching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("slug", SLUGS)
def test_what_is_found_can_be_attached_and_counts_so(slug: str, budget: int) -> None:
    empty, sites = skeleton()
    found = nearest(slug, sites, budget, model=model() if registry.load(slug).weighs else empty)
    if found.spec is None:
        assert found.trained is None and found.why
        return
    assert found.trained == trained(found.spec)
    if registry.load(slug).sizes and {"r", "m", "length", "k", "n"} & set(registry.load(slug).sizes[:1]):
        default = trained(slug)
        assert isinstance(default, str) or abs(found.trained - budget) <= abs(default - budget)


@pytest.mark.parametrize("budget", [200, 1000, 1300, 5000, 7000])
@pytest.mark.parametrize("slug", ["lora", "dora", "wegeft", "prefix-tuning"])
def test_no_other_size_is_nearer(slug: str, budget: int) -> None:
    _, sites = skeleton()
    size = "length" if slug == "prefix-tuning" else "r"
    found = nearest(slug, sites, budget, targets="attn" if slug == "prefix-tuning" else "attn.q attn.v")
    targets = None if slug == "prefix-tuning" else "attn.q attn.v"
    best = min(abs(count(registry.method(slug, **{size: n, "targets": targets}), sites) - budget) for n in range(1, 65))
    assert found.trained is not None and abs(found.trained - budget) == best


def test_what_is_given_stays() -> None:
    _, sites = skeleton()
    assert nearest("lora(r=3)", sites, 5000, targets="attn.q").spec == "lora(r=3, targets='attn.q')"
    found = nearest("bottleneck-adapter(variant='parallel')", sites, 3000)
    assert found.spec and "variant='parallel'" in found.spec and "m=" in found.spec
    with pytest.raises(BadValue, match="one method at a time"):
        nearest("lora + ssf", sites, 1000)


def test_alpha_keeps_its_ratio_to_the_rank() -> None:
    _, sites = skeleton()
    found = nearest("adalora", sites, 5000, targets="attn.q attn.v")
    method: Any = veneer.parse(str(found.spec))
    assert method.alpha / method.init_r == pytest.approx(16 / 12, rel=0.01) and method.target_r <= method.init_r


def test_other_targets_where_the_own_do_not_reach() -> None:
    _, sites = skeleton()
    assert everywhere(sites) == "attn.* mlp.*"
    wide = nearest("ia3", sites, 1_000_000)
    assert wide.spec == "ia3(targets='attn.* mlp.*')" and not wide.within(2)
    narrow = nearest("adalora(init_r=4, target_r=4)", sites, 2000)
    assert narrow.spec and "attn.q attn.v" in narrow.spec
    assert nearest("ia3", sites, 1_000_000, targets="attn.k").spec == "ia3(targets='attn.k')"


def test_a_method_that_does_not_fit_says_why() -> None:
    _, sites = skeleton()
    found = nearest("vpt", sites, 1000)
    assert found.spec is None and found.distance is None and "reads tokens" in str(found.why)


@pytest.mark.parametrize(
    ("text", "number"),
    [("300k", 300_000), ("1.2M", 1_200_000), ("250000", 250_000), ("250,000", 250_000), ("0.05%", 10_000), (" 3e5 ", 300_000)],
)
def test_budgets_are_read(text: str, number: int) -> None:
    assert budget_of(text, 20_000_000) == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lots", "Write 300k"),
        ("", "Write 300k"),
        ("-3k", "Write 300k"),
        ("0", "less than one"),
        ("30M", "more than the model has"),
        ("3 %k", "Write"),
    ],
)
def test_budgets_that_are_none(text: str, words: str) -> None:
    with pytest.raises(BadValue, match=words):
        budget_of(text, 20_000_000)


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("budget")
    base: Any = model()
    base.save_pretrained(place)
    return place


def document(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_command_lists_every_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "budget", "--params", "2k", "--model", str(folder))
    assert [row["slug"] for row in found["methods"]] == SLUGS and found["budget"] == 2000
    rows = {row["slug"]: row for row in found["methods"]}
    assert rows["lora"]["spec"] == "lora(r=4)" and rows["lora"]["trained"] == 2048 and rows["lora"]["distance"] == pytest.approx(0.024)
    assert rows["vpt"]["spec"] is None and rows["vpt"]["why"]


def test_the_command_takes_specs_and_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["budget", "--params", "2%", "--model", str(folder), "lora(dropout=0.1)", "dora", "--targets", "attn.* mlp.*"]
    found = document(capsys, *argv)
    assert [row["spec"].partition("(")[0] for row in found["methods"]] == ["lora", "dora"]
    assert "dropout=0.1" in found["methods"][0]["spec"] and "targets='attn.* mlp.*'" in found["methods"][1]["spec"]
    assert main(argv) == 0
    assert '"lora(r=' in capsys.readouterr().out


def test_methods_that_weigh_say_so_where_no_weights_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heavy = [s for s in SLUGS if registry.load(s).weighs]
    if not heavy:
        pytest.skip("no method's shapes depend on weights")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = document(capsys, "budget", "--params", "2k", "--model", str(tmp_path), *heavy)
    assert all(row["spec"] is None and "could not be loaded" in row["why"] for row in found["methods"])
    found = document(capsys, "budget", "--params", "2k", "--model", str(folder), *heavy)
    assert all(row["trained"] == trained(row["spec"]) for row in found["methods"])
    shown = document(capsys, "show", heavy[0], "--model", str(folder))["count"]
    assert shown["weights_read"] and shown["trained"] == trained(heavy[0])
    assert main(["show", heavy[0], "--model", str(folder)]) == 0
    assert "the model is loaded to count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--params", "many"], "Write 300k"),
        (["--params", "1G"], "more than the model has"),
        (["--params", "3", "lora"], "lora(r=1) trains 512"),
        (["--params", "2k", "lorra"], "'lora'"),
        (["--params", "2k", "lora", "--targets", "attn.x"], "attn.x"),
    ],
)
def test_mistakes_are_told(argv: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["budget", *argv, "--model", str(folder)])
    said = capsys.readouterr()
    assert words in said.err + said.out and code in (0, 2)
