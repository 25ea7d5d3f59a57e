"""Deliberate mistakes: each is told in one to three lines that name the thing, the place and the next step, with exit code 2.

Those that can be seen without a model are told before torch is imported; one process goes through all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

GOOD = "text,label\n" + "".join(f"row {i},{'yes' if i % 2 else 'no'}\n" for i in range(40))


@dataclass(frozen=True)
class Mistake:
    """A command and what its message must contain."""

    argv: str
    words: tuple[str, ...]
    code: int = 2


TRAIN = "train --model ./base --data good.csv --steps 1 --out run"

MISTAKES = {
    "command": Mistake("trian --model minilm", ("no command 'trian'", "'train'", "veneer --help")),
    "flag": Mistake("train --modle minilm", ("`veneer train`", "'--modle'", "'--model'")),
    "missing argument": Mistake("show", ("`veneer show`", "METHOD", "--help")),
    "value of a flag": Mistake("merge run --out x --tolerance tiny", ("--tolerance", "'tiny'", "number")),
    "choice of a flag": Mistake("export run --out x --to pfet", ("--to", "pfet", "peft")),
    "method": Mistake(f"{TRAIN} --method lorra(r=8)", ("no method 'lorra'", "'lora'", "\n  lorra(r=8)\n  ^")),
    "option": Mistake(f"{TRAIN} --method lora(rnk=8)", ("LoRA has no option 'rnk'", "'rank'", "\n       ^")),
    "range": Mistake(f"{TRAIN} --method ssf+lora(r=0)", ("LoRA: r=0", "at least 1", "\n             ^")),
    "choice": Mistake(f"{TRAIN} --method lora(start=pisa)", ("start='pisa'", "'pissa'")),
    "bracket": Mistake(f"{TRAIN} --method lora(r=8", ("closing bracket", "lora(r=8")),
    "no model": Mistake("train --data good.csv", ("model is missing", "minilm")),
    "model": Mistake("train --model minilmm --data good.csv", ("no model 'minilmm'", "'minilm'")),
    "model folder": Mistake("train --model empty --data good.csv", ("empty", "config.json")),
    "learning rate": Mistake(f"{TRAIN} --lr -1", ("lr=-1", "more than 0")),
    "exclusive settings": Mistake(f"{TRAIN} --epochs 1", ("epochs=1", "steps=1", "give one")),
    "task": Mistake(f"{TRAIN} --task text-clasification", ("no task 'text-clasification'", "'text-classification'")),
    "recipe": Mistake("train god.yaml", ("no recipe god.yaml", "'good.yaml'")),
    "setting in a recipe": Mistake("train typo.yaml", ("no setting 'epocs'", "'epochs'")),
    "recipe that is not YAML": Mistake("train broken.yaml", ("broken.yaml, line", "not YAML")),
    "data file": Mistake("train --model ./base --data god.csv", ("no file god.csv", "'good.csv'")),
    "column": Mistake(f"{TRAIN} --label lable", ("good.csv", "no column 'lable'", "'label'", "--label")),
    "line": Mistake("train --model ./base --data broken.jsonl --out run", ("broken.jsonl, line 2", "not JSON")),
    "encoding": Mistake("train --model ./base --data latin.csv --out run", ("latin.csv, line 2", "UTF-8")),
    "no rows": Mistake("train --model ./base --data header.csv --out run", ("header.csv", "no rows")),
    "empty split": Mistake("train --model ./base --data tiny.csv --out run", ("tiny.csv", "too few")),
    "label unseen in training": Mistake("train --model ./base --data unseen --out run", ("unseen", "perhaps", "test.csv, line 3")),
    "folder that cannot be made": Mistake(f"{TRAIN.replace('--out run', '--out good.csv/run')}", ("good.csv/run", "--out")),
    "spec of a comparison": Mistake("compare --model minilm --data good.csv --methods lora sff", ("no method 'sff'", "'ssf'")),
    "adapter folder": Mistake("inspect adaptr", ("'adaptr' does not exist", "'adapter'")),
    "no adapter in it": Mistake("inspect empty", ("empty is not an adapter", "adapter.safetensors")),
    "truncated file": Mistake("inspect truncated", ("truncated/adapter.safetensors", "cut off")),
    "oversized header": Mistake("inspect oversized", ("oversized/adapter.safetensors", "not a safetensors file")),
    "file that is none of ours": Mistake("inspect foreign", ("foreign/adapter.safetensors", "not an adapter of veneer")),
    "merge of a nonlinear method": Mistake("merge nonlinear --out x", ("BottleneckAdapter cannot be merged", "nonlinear", "veneer.load")),
    "merge over something": Mistake("merge adapter --out empty/..", ("is there already", "another folder")),
    "base of an adapter": Mistake("merge adapter --out x", ("adapter does not say which model", "--model")),
    "run folder": Mistake("predict empty text", ("empty is not the folder of a run", "veneer train")),
    "nothing to answer": Mistake("predict run-record --data good.csv text", ("inputs or --data", "not both")),
    "role": Mistake("anatomy minilm --role encoder.proj=attn.oo", ("no role 'attn.oo'", "'attn.o'")),
    "role without a module": Mistake("anatomy minilm --role attn.o", ("'attn.o'", "MODULE=ROLE")),
    "family": Mistake("methods --family wieght", ("no family 'wieght'", "'weight'")),
}

DRIVER = """
import contextlib, io, json, shlex, sys
from veneer.cli.main import main
for name, argv in json.loads(sys.stdin.read()).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    print(json.dumps([name, {"code": code, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}]))
"""


def adapter(folder: Path, facts: dict[str, Any], keep: int | None = None) -> None:
    """A safetensors file with one small tensor, written by hand; `keep` cuts it off."""
    header = json.dumps(
        {"__metadata__": {"veneer": json.dumps(facts)}, "A": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes((len(header).to_bytes(8, "little") + header + bytes(8))[:keep])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program says to every mistake: exit code, output, and whether torch was imported."""
    place = tmp_path_factory.mktemp("mistakes")
    for name, text in {
        "good.csv": GOOD,
        "good.yaml": "model: minilm\ndata: good.csv\n",
        "typo.yaml": "model: minilm\ndata: good.csv\nepocs: 3\n",
        "broken.yaml": "model: minilm\ndata: [good.csv\n",
        "broken.jsonl": '{"text": "a", "label": "b"}\n{"text": "a", \n',
        "header.csv": "text,label\n",
        "tiny.csv": "text,label\na,b\n",
    }.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "latin.csv").write_bytes("text,label\ncafé,yes\n".encode("latin-1"))
    (place / "empty").mkdir()
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text("{}")
    (place / "unseen").mkdir()
    (place / "unseen" / "train.csv").write_text(GOOD)
    (place / "unseen" / "test.csv").write_text("text,label\na,yes\nb,perhaps\n")
    adapter(place / "adapter", {"spec": "lora"})
    adapter(place / "nonlinear", {"spec": "bottleneck-adapter"})
    adapter(place / "truncated", {"spec": "lora"}, keep=-3)
    adapter(place / "oversized", {"spec": "lora"})
    (place / "oversized" / "adapter.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + bytes(100))
    (place / "foreign").mkdir()
    (place / "foreign" / "adapter.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (place / "run-record").mkdir()
    (place / "run-record" / "run.json").write_text('{"recipe": {}}')
    request = json.dumps({name: mistake.argv.split() for name, mistake in MISTAKES.items()})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", DRIVER], input=request, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_there_are_at_least_twenty() -> None:
    assert len(MISTAKES) >= 20


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_work(told: dict[str, Any], name: str) -> None:
    found, mistake = told[name], MISTAKES[name]
    assert found["code"] == mistake.code, found["err"]
    lines = found["err"].rstrip("\n").split("\n")
    assert found["out"] == "" and 1 <= len(lines) <= 3 and lines[0].startswith("Error: ")
    assert "Traceback" not in found["err"]
    assert all(word in found["err"] for word in mistake.words), found["err"]
    assert not found["torch"], "torch was imported before the mistake was told"
