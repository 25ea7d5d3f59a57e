"""What surveys name and what veneer carries; and names that several papers share."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import veneer
from veneer import names, registry
from veneer.errors import UnknownName

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
FIRST = (
    "LoRA", "BitFit", "AdaptFormer", "linear probe", "sequential adapters, two a block", "sequential adapters, one a block",
    "prefix tuning", "prompt tuning", "VPT, deep", "VPT, shallow", "(IA)³", "LST", "MAM adapter", "Compacter",
)  # fmt: skip
SECOND = (
    "QLoRA", "LN-Tune", "SSF", "LoRand", "BAPAT (V-PETL)", "Partial-1", "GPS", "HST", "LAST", "SNF", "E3VA", "Mona", "Child-Tuning",
    "NOAH", "Diff pruning", "FISH mask", "UniPELT", "S4", "AdapterDrop", "AdapterFusion", "AdaMix", "SparseAdapter", "P-tuning", "SPoT",
    "LoRA-FA", "KronA", "CoOp", "T2I-Adapter",
)  # fmt: skip
SHARED = (
    "deft", "cpt", "spt", "dept", "tpt", "lpt", "ppt", "sam", "evp", "lst", "last", "meft", "s-lora", "s2-lora", "s2ft", "dlora", "dylora",
    "delora", "mola", "mole", "moelora", "molora", "mixlora", "bone", "miss", "autolora", "pasta", "hydra", "san", "apt", "ipt",
)  # fmt: skip


def rows(heading: str) -> dict[str, str]:
    """Method → the third cell of its row, of the table below a heading."""
    text = PAGE.read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")][1:]
    return {method: said for method, _, said in cells}


def missing(said: str) -> bool:
    return said.startswith("missing: ")


@pytest.mark.parametrize("heading, wanted", [("First ring", FIRST), ("Second ring", SECOND)])
def test_the_page_covers_the_rings(heading: str, wanted: tuple[str, ...]) -> None:
    """Every method of the ring has a row: a spec that veneer reads, or the reason why it is missing. The first ring is whole."""
    found = rows(heading)
    assert tuple(found) == wanted
    for method, said in found.items():
        spec = re.match(r"`([^`]+)`", said)
        assert missing(said) or (spec and veneer.parse(spec[1])), f"{method}: {said}"
    gaps = [method for method, said in found.items() if missing(said)]
    assert not gaps if heading == "First ring" else len(gaps) <= 11, gaps


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_name(name: str) -> None:
    """A method here answers to it and says which one it is; otherwise one sentence names the papers and what veneer has."""
    if name in registry.cards():
        assert registry.card(name).slug == name
        return
    with pytest.raises(UnknownName) as refused:
        registry.card(name.upper())
    said = str(refused.value)
    assert said.startswith(f"{name!r} is the name of several methods: ") and said.count("\n") == 0
    assert len(re.findall(r"arXiv:\d{4}\.\d{5}|NeurIPS|OSDI", said)) >= 2
    carried = [m.here for m in names.meanings(name) if m.here in registry.cards()]
    assert all(repr(slug) in said for slug in carried) and ("none of them" in said) == (not carried)


def test_qualified_names() -> None:
    for qualified, slug in (
        ("deft-density", "deft"),
        ("DEPT_decomposed", "dept"),
        ("spt-sensitivity", "spt"),
        ("lst-ladder", "ladder-side-tuning"),
    ):
        assert registry.card(qualified).slug == slug
    assert veneer.parse("lora + deft-density(lam=2)").spec == "lora + deft(lam=2)"
    with pytest.raises(UnknownName, match=r"'deft-decompositional' is not in veneer: decompositional .* \(NeurIPS 2025\)"):
        veneer.parse("deft-decompositional")


def test_every_meaning_is_one() -> None:
    found = [m for several in names.CLASHES.values() for m in several]
    assert len({m.slug for m in found}) == len(found)
    assert not {m.slug for m in found} & set(registry.cards()), "a qualified name hides a method"
    for name, several in names.CLASHES.items():
        assert len(several) > 1 and all(re.match(r"arXiv:\d{4}\.\d{5}$|\w+ \d{4}$", m.source) for m in several), name
    assert {m.here for m in found if m.here} <= set(registry.cards()), "a carried method is not there"
    for slug in ("deft", "dept", "spt", "s2-lora", "mola", "delora", "bone", "miss"):
        assert names.note(slug, registry.cards()).startswith("Also "), slug
    assert not names.note("lora", registry.cards()) and not names.sentence("lroa", registry.cards())


def test_the_command_line_says_so() -> None:
    asked = subprocess.run([sys.executable, "-m", "veneer.cli.main", "show", "cpt"], capture_output=True, text=True, check=False)
    assert asked.returncode == 2 and "'cpt' is the name of several methods" in asked.stderr and "Traceback" not in asked.stderr
    shown = subprocess.run([sys.executable, "-m", "veneer.cli.main", "show", "deft"], capture_output=True, text=True, check=True)
    assert "Also 'deft-density'; not to be taken for decompositional fine-tuning" in shown.stdout
