"""The program: quick to start, one JSON document under `--json`, stable exit codes, and every command on a tiny model."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.cli import main as program
from veneer.cli import output
from veneer.cli.command import parser
from veneer.cli.main import COMMANDS, main
from veneer.errors import BadFile, MissingExtra

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "a", "very", "not", "fine", "poor"]
ROWS = "text,label\n" + "".join(
    f"the {'good' if i % 2 else 'bad'} film {'a ' * (i % 5)}very,{'yes' if i % 2 else 'no'}\n" for i in range(60)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, data, and a finished run on them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    for name, width in (("model", 16), ("wider", 24)):
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
        BertForSequenceClassification(config).save_pretrained(folder / name)
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / name)
    (folder / "data.csv").write_text(ROWS)
    argv = ["train", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--method", "lora(r=2)", "--steps", "4"]
    assert main([*argv, "--batch-size", "8", "--device", "cpu", "--out", str(folder / "run")]) == 0
    return folder


def document(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    """The one JSON document that a command prints on stdout."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


# -- starting ---------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_to_help() -> None:
    code = (
        "import sys\nfrom veneer.cli.main import main\nmain(['--help'])\nmain(['methods'])\nmain(['show', 'lora'])\n"
        f"for name in {list(COMMANDS)}: main([name, '--help'])\nprint('loaded', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    loaded = set(done.stdout.rsplit("loaded", 1)[1].split())
    assert not {"torch", "transformers", "numpy", "rich", "typer", "pydantic", "yaml"} & loaded
    assert len(loaded) < 250


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_command_says(name: str) -> None:
    assert COMMANDS[name][1] == (program.command(name).__doc__ or "").splitlines()[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_common_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: veneer {name}" in said and "--json" in said and "--debug" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("veneer ")


# -- exit codes -------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Called like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadFile("x.csv holds no rows."), 2, "x.csv holds no rows."),
        (MissingExtra("`datasets` is missing. Run: pip install 'veneer[data]'"), 3, "pip install"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 3, "'trl'"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 3, "a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), 2, "a/b"),
        (MemoryError(), 3, "memory"),
        (OutOfMemoryError("CUDA out of memory"), 3, "--batch-size"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ZeroDivisionError("division by zero"), 1, "traceback is in"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(output.tempfile, "tempdir", str(tmp_path))
    assert output.answer(broken) == code
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) <= 3 and "Traceback" not in said
    assert output.answer(broken, as_json=True) == code
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == code
    assert output.answer(broken, debug=True) == code
    assert "Traceback" in capsys.readouterr().err
    logs = list(tmp_path.glob("*.log"))
    assert bool(logs) == (code == 1) and all("ZeroDivisionError" in log.read_text() for log in logs)


def test_under_json_only_the_document_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty() -> dict[str, Any]:
        print("for people")
        return {"a": float("nan"), "b": Path("x"), "c": (1, 2)}

    assert output.answer(chatty, as_json=True) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": None, "b": "x", "c": [1, 2]} and captured.err == "for people\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "veneer.cli.main", "methods"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize("argv", [["trian"], ["show"], ["show", "lorra"], ["train", "--modle", "x"], ["inspect", "nowhere"]])
def test_mistakes_under_json_are_documents(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *argv, code=2)
    assert found["error"]["exit_code"] == 2 and found["error"]["message"]


# -- commands without a model -----------------------------------------------------------------------------------


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "methods")["methods"]
    assert {"lora", "dora", "ssf", "prefix-tuning"} <= {m["slug"] for m in found}
    weight = document(capsys, "methods", "--family", "weight")["methods"]
    assert {m["family"] for m in weight} == {"weight"}
    main(["methods"])
    assert len(capsys.readouterr().out.splitlines()) == len(found) + 2


def test_matrix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from veneer.cli import methods

    monkeypatch.setattr(methods, "MATRIX", tmp_path / "matrix.json")
    assert document(capsys, "methods", "--matrix") == {"features": [], "methods": {}}
    cells = {"features": ["merge", "save"], "methods": {"lora": {"merge": True, "save": False}, "ssf": {"merge": "for a reason"}}}
    (tmp_path / "matrix.json").write_text(json.dumps(cells))
    found = document(capsys, "methods", "--matrix")
    assert found["features"] == ["merge", "save"] and found["methods"]["lora"] == cells["methods"]["lora"]
    main(["methods", "--matrix"])
    said = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert said["lora"] == ["✓", "✗"] and said["ssf"] == ["–", "?"]
    (tmp_path / "matrix.json").write_text("[]")
    assert "Run the suite again" in document(capsys, "methods", "--matrix", code=2)["error"]["message"]


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "show", "lora(rank=4)")
    assert found["given"] == {"r": 4} and found["card"]["slug"] == "lora"
    main(["show", "lora(rank=4)"])
    said = capsys.readouterr().out
    assert "W_eff" in said and "4 (given)" in said and "at least 1" in said and "Tensors: A [r, in]" in said


def test_doctor_explains_mismatched_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.cli import doctor

    monkeypatch.setattr(doctor, "_wants", lambda name: "2.6.0" if name == "torchvision" else None)
    found = doctor.mismatches({"torch": "2.7.0+cpu", "torchvision": "0.21.0+cpu", "torchaudio": "2.7.0+cu126"})
    assert "torchvision 0.21.0+cpu was built for torch 2.6.0, but torch 2.7.0+cpu is here" in found[0]
    assert "torchaudio is a cu126 build, torch a cpu build" in found[1]
    assert doctor.mismatches({"torch": "2.6.0+cpu", "torchvision": "0.21.0+cpu", "torchaudio": None}) == []


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "doctor")
    assert found["versions"]["torch"] and {"cpu", "memory", "torch build"} <= set(found["devices"])
    assert {c["name"] for c in found["carriers"]} >= {"minilm", "smollm2"}


# -- commands on a tiny model -----------------------------------------------------------------------------------


def test_anatomy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "anatomy", str(place / "model"))
    assert found["roles"]["attn.q"] == 2 and found["roles"]["head"] == 1
    changed = document(capsys, "anatomy", str(place / "model"), "--role", "pooler.dense=other")
    assert "pooler" not in changed["roles"]


def test_show_counts_on_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "show", "lora(r=2)", "--model", str(place / "model"))["count"]
    assert found["sites"] == 4 and found["trained"] == 4 * 2 * (16 + 16)


def test_train_says_little_and_repeats_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "train",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "data.csv"),
        "--method",
        "ssf",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--out", str(place / "ssf")]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) <= 25 and "Untouched base" in said.out and said.err.count("\n") <= 1  # one progress bar
    assert main([*argv, "--out", str(place / "ssf")]) == 0
    assert "is finished" in capsys.readouterr().out


def test_the_command_that_goes_on_is_the_one_that_was_typed() -> None:
    from veneer.cli.train import typed

    settings = {"method": "lora(r=2)", "base": False, "checkpointing": True, "head": False, "lr": "1e-3"}
    words = typed("train", Path("a b.yaml"), settings)
    assert words == "veneer train 'a b.yaml' --method 'lora(r=2)' --no-base --checkpointing --head False --lr 1e-3"
    plan = ["--model", "minilm", "--data", "x.csv"]
    given = parser("train", program.command("train")).read([*shlex.split(words)[3:], *plan])
    assert {name: given[name] for name in settings} == settings


def test_compare(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import veneer.study.compare as study
    from veneer.tasks.metric import Metric
    from veneer.train.outcome import Outcome

    asked: dict[str, Any] = {}

    def trained(recipe: Any, **_: object) -> dict[str, Any]:
        asked[recipe.method] = recipe
        metrics = {"accuracy": Metric(0.5, 0.4, 0.6, 60)}
        return Outcome(Path(recipe.out), recipe.method, 10, 100, metrics, metrics, 1.0, 0.1, 1, 1).as_json()

    monkeypatch.setattr(study, "_run", trained)
    argv = ["compare", "--model", str(place / "model"), "--data", str(place / "data.csv"), "--steps", "2", "--out", str(place / "study")]
    found = document(capsys, *argv, "--methods", "lora(r=2)", "ssf", "--references", "probe")
    assert list(asked) == ["probe", "lora(r=2)", "ssf"] and {r.steps for r in asked.values()} == {2}
    assert found["rows"][0]["label"] == "untouched base" and (place / "study" / "report.html").exists()


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "inspect", str(place / "run"))
    assert found["spec"].startswith("lora(r=2)") and found["training"]["task"] == "text-classification"
    assert found["bytes"] == (place / "run" / "adapter" / "adapter.safetensors").stat().st_size
    code = "import sys\nfrom veneer.cli.main import main\nassert main(['inspect', sys.argv[1]]) == 0\nassert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, str(place / "run")], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_evaluate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "evaluate", str(place / "run"))
    metric = found["metrics"]["accuracy"]
    assert metric["low"] <= metric["value"] <= metric["high"] and "accuracy" in found["base_metrics"]
    assert document(capsys, "evaluate", str(place / "run" / "adapter"), "--data", str(place / "data.csv"))["metrics"]["accuracy"]["n"] == 60


def test_predict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "predict", str(place / "run"), "the good film", "a bad film")
    assert [set(one) for one in found["answers"]] == [{"label", "score", "scores"}] * 2
    document(capsys, "predict", str(place / "run"), "--data", str(place / "data.csv"), "--out", str(place / "answers.jsonl"))
    assert len((place / "answers.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize("form", ["merged", "veneer", "peft"])
def test_export_is_measured(place: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    if form == "peft":
        pytest.importorskip("veneer.tools.peft")
    found = document(capsys, "export", str(place / "run"), "--to", form, "--out", str(place / form))
    assert found["difference"] <= found["tolerance"] and found["samples"] > 0
    assert any((place / form).iterdir())
    if form == "peft":
        back = document(capsys, "merge", str(place / "peft"), "--out", str(place / "back"))
        assert back["difference"] <= back["tolerance"]


def test_a_merged_model_needs_no_veneer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    answers = document(capsys, "predict", str(place / "run"), "the good film")["answers"]
    assert main(["merge", str(place / "run"), "--out", str(place / "plain")]) == 0
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(place / "plain"), AutoTokenizer.from_pretrained(place / "plain")
    with torch.no_grad():
        shares = plain(**tokenizer("the good film", return_tensors="pt")).logits.softmax(-1)[0]
    assert shares.tolist() == pytest.approx(list(answers[0]["scores"].values()), abs=1e-5)


def test_a_merge_over_tolerance_fails_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.cli import base

    monkeypatch.setattr(base, "difference", lambda first, second: 0.01)
    assert main(["merge", str(place / "run"), "--out", str(place / "wrong")]) == 2
    assert "differ by 1.0e-02" in capsys.readouterr().err
    assert not (place / "wrong").exists() and not list(place.glob(".wrong*"))


# -- mistakes that need a model to be seen ----------------------------------------------------------------------


def test_a_target_that_matches_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "data.csv"), "--steps", "1", "--out", str(place / "none")]
    assert main([*argv, "--method", "lora(targets='attn.q cross.q')"]) == 2
    said = capsys.readouterr().err
    assert "'cross.q' matches no site" in said and "attn.q" in said and len(said.splitlines()) <= 3


def test_an_adapter_for_another_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["merge", str(place / "run"), "--model", str(place / "wider"), "--out", str(place / "misfit")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "[16, 16]" in said and "[24, 24]" in said and "query" in said and len(said.splitlines()) <= 3


def test_ctrl_c_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.train.interrupt import Interrupted

    def stopped() -> None:
        raise Interrupted("Interrupted: step 3 of 9 is saved in runs/x.\nTo go on: veneer train r.yaml")

    monkeypatch.setattr(program, "command", lambda name: stopped)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted: step 3 of 9 is saved in runs/x.\nTo go on: veneer train r.yaml\n"
