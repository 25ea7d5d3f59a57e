"""Code as answers: CodeBLEU to the last digit, prompts without loss, repair, tests that are run, and the studies' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.errors import BadValue, MissingExtra, UnknownName
from veneer.study.code_study import STUDIES, CodeStudy, plan_of
from veneer.study.codebleu import bleu, codebleu, weighted_bleu
from veneer.tasks.code_generation import CodeGeneration
from veneer.tasks.task import Options, named, prepare
from veneer.tasks.unit_test_generation import UnitTestGeneration, asserts, named_tests, repaired
from veneer.train import Recipe

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "code-generation.json").read_text())["cases"]
SCORES = load_file(GOLDEN / "code-generation.safetensors")
PARTS = {"codebleu": "score", "ngram_match_score": "ngram", "weighted_ngram_match_score": "weighted_ngram"}
PARTS |= {"syntax_match_score": "syntax", "dataflow_match_score": "dataflow"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prefix"])
def test_codebleu(case: dict[str, Any]) -> None:
    told, made = case["references"], case["hypotheses"]
    scores = {k.partition("/score.")[2]: v.item() for k, v in SCORES.items() if k.startswith(case["prefix"] + "/")}
    assert scores
    if "codebleu" in scores:
        found = codebleu(told, made)
        got = {name: getattr(found, ours) for name, ours in PARTS.items()}
    else:
        words = [[r.split() for r in several] for several in told], [h.split() for h in made]
        got = {
            "ngram": bleu(*words),
            "weighted_ngram": weighted_bleu(*words),
            "weighted_ngram_fixed_bp": weighted_bleu(*words, published=False),
        }
    assert got == {name: pytest.approx(value, abs=1e-10) for name, value in scores.items()}


def test_codebleu_of_itself_is_one_and_no_data_flow_is_told_apart() -> None:
    code = "def f ( x ) :\n    y = x + 1\n    return y"
    assert codebleu([[code]], [code]).score == pytest.approx(1.0)
    bare = "import os"
    assert codebleu([[bare]], [bare]).dataflow == 1.0 and codebleu([[bare]], [bare], published=False).dataflow == 0.0
    with pytest.raises(BadValue, match="1 hypotheses and 0 sets"):
        codebleu([], [code])


def test_without_the_package_the_line_to_install_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"veneer\[code\]"):
        codebleu([["x"]], ["x"])


# -- tasks --------------------------------------------------------------------------------------------------------

ROWS = [
    {"instruction": f"Write f that adds {i}.", "response": f"def f(x):\n    return x + {i}", "setup": "", "test": f"assert f(1) == {1 + i}"}
    for i in range(12)
]
TESTS = [
    {"source": f"def f(x):\n    if x:\n        return {i}\n    return 0", "target": f"def test_f():\n    assert f(1) == {i}"}
    for i in range(12)
]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


class Letters:
    """A tokenizer with a token a letter."""

    model_max_length = 10**6
    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_loss_is_on_the_code_and_its_end_alone(tmp_path: Path) -> None:
    task, _ = prepare(write(tmp_path, ROWS), "code-generation", Options(max_length=400))
    for row, item in zip(task.splits.train.rows, task.encode(task.splits.train.rows, Letters())):
        text = "".join(map(chr, item["input_ids"]))
        assert text == f"### Instruction:\n{row['instruction']}\n### Response:\n```python\n{row['response']}\n```"
        learned = "".join(chr(label) for label in item["labels"] if label != -100)
        assert learned == row["response"] + "\n```"


def test_rows_without_room_for_code_are_told_of(tmp_path: Path) -> None:
    long = [{**ROWS[0], "instruction": "x" * 300}]
    task, _ = prepare(write(tmp_path, ROWS * 4), "code-generation", Options(max_length=150))
    with pytest.warns(UserWarning, match="1 of 2 rows bear no loss"):
        task.encode([ROWS[0], *long], Letters())
    with pytest.raises(BadValue, match="larger --max-length"):
        task.encode(long, Letters())


def test_examples_stand_in_front_as_far_as_they_fit(tmp_path: Path) -> None:
    task: Any = prepare(write(tmp_path, ROWS), "code-generation(shots=2)", Options())[0]
    prompt = task.prompt("Write f.")
    assert prompt.count("### Instruction:") == 3 and prompt.endswith("Write f.\n### Response:\n```python\n")
    assert all(code in prompt for _, code in task.facts["shots"])
    with pytest.warns(UserWarning, match="only 1 of 2 examples"):
        assert len(task.fitting("Write f.", Letters(), len(prompt) - 1)) < len(prompt)
    with pytest.raises(BadValue, match="shots=50 are more"):
        prepare(write(tmp_path, ROWS), "code-generation(shots=50)")


def test_answers_are_scored_and_run() -> None:
    task = CodeGeneration(Options(text="instruction", label="response", own={"beams": 2}))
    answers = [
        ["def f(x):\n    return 1 + x", ROWS[1]["response"]],  # right, another way
        [ROWS[2]["response"]] * 2,
        ["def f(x): while"] * 2,
        ["def f(x):\n    while True: pass"] * 2,
        ["import os\nos.fork()"] * 2,
    ]
    found = CodeGeneration(Options(**{**vars(task.options), "own": {"beams": 2, "seconds": 1.0}})).score(ROWS[1:2] + ROWS[2:6], answers)
    assert found.correct == [True, True, False, False, False]
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["em@1"] == 1 / 5 and values["em@2"] == 2 / 5 and values["syntax"] == 4 / 5 and values["pass@1"] == 2 / 5
    assert found.metrics["codebleu"].low <= values["codebleu"] <= found.metrics["codebleu"].high
    quiet = CodeGeneration(Options(text="instruction", label="response", own={"execute": False}))
    assert "pass@1" not in quiet.score(ROWS[:1], [[ROWS[0]["response"]]]).metrics


def test_tests_are_repaired_run_and_their_coverage_taken_over_those_that_hold() -> None:
    task = UnitTestGeneration(Options(text="source", label="target"))
    answers = [
        [TESTS[1]["target"]],  # holds, two of four lines never reached
        ["def test_f():\n    assert f(1) == 2\n    assert f(0) == 0\n    assert f("],  # cut, then holds with all lines
        ["def test_f():\n    assert f(1) == 7"],
        ["def test_f():\n    f(1)"],  # asserts nothing
        ["x ="],
        ["assert f(1) == 1"],  # no test
    ]
    found = task.score([TESTS[1], TESTS[2], TESTS[3], TESTS[4], TESTS[5], TESTS[6]], answers)
    assert found.correct == [True, True, False, False, False, False]
    assert found.metrics["syntax"].value == 5 / 6 and found.metrics["pass@1"].value == 2 / 6
    assert found.metrics["coverage"].value == pytest.approx((3 / 4 + 1) / 2) and found.metrics["coverage"].n == 2


@pytest.mark.parametrize(
    ("code", "left"), [("x = 1\ny = 2", "x = 1\ny = 2"), ("x = 1\ny = (", "x = 1"), ("def f():\n    if a:\n", ""), ("", ""), ("# note", "")]
)
def test_repair_keeps_the_longest_beginning(code: str, left: str) -> None:
    assert repaired(code) == left == repaired(left)


def test_what_counts_as_a_test() -> None:
    assert named_tests("def test_a(): pass\ndef test_b(x): pass\ndef helper(): pass") == ["test_a"]
    assert asserts("import unittest\nself.assertEqual(1, 1)") and not asserts("print(1)")


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("code-generation", [{"a": "x", "b": "y"}], "a column of instructions and one of code"),
        ("code-generation", [{**row, "response": " "} for row in ROWS], "'response' is empty"),
        ("code-generation(beams=0)", ROWS, "at least 1"),
        ("code-generation(beam=2)", ROWS, "'beams'"),
        ("unit-test-generation", [{"source": i, "target": "y"} for i in range(12)], "'source' is empty or no text"),
    ],
)
def test_mistakes(task: str, rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises((BadValue, UnknownName)) as caught:
        prepare(write(tmp_path, rows), task)
    assert said in str(caught.value)


# -- studies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of width 64 with a token for every printable character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)).save_pretrained(folder)
    return str(folder)


def study(model: str, data: str, out: Path, rows: list[str], **changes: Any) -> CodeStudy:
    settings = {"model": model, "data": data, "steps": 2, "batch_size": 2, "max_length": 256, "max_new_tokens": 8, "device": "cpu"}
    return CodeStudy(plan_of("code-generation"), rows, {**settings, **changes}, out, shots=1)


def test_every_row_of_a_study_runs_once(model: str, tmp_path: Path) -> None:
    data = write(tmp_path, ROWS)
    names = list(STUDIES["code-generation"].rows)
    lines: list[str] = []
    made = study(model, data, tmp_path / "out", names)
    made.check()
    rows = made.go(lines.append, progress=False)
    assert list(rows) == names
    for name, row in rows.items():
        assert {"em@1", "codebleu", "syntax", "pass@1", "loss"} <= set(row["metrics"]), name
        assert (row["trained"] > 0) is (name not in ("none", "icl"))
    assert rows["icl"]["shots"] == 1 and rows["icl"]["metrics"]["loss"]["value"] != rows["none"]["metrics"]["loss"]["value"]
    again: list[str] = []
    assert study(model, data, tmp_path / "out", names).go(again.append) == json.loads(json.dumps(rows)) and not again
    with pytest.raises(BadValue, match="other settings \\(steps\\)"):
        study(model, data, tmp_path / "out", names, steps=3)


def test_rows_that_need_a_missing_package_say_so_and_the_others_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest))
    made = study(model, write(tmp_path, ROWS), tmp_path / "out", ["none", "qlora4"])
    made.check()
    rows = made.go(lambda line: None, progress=False)
    assert "veneer[quant]" in rows["qlora4"]["left_out"] and "metrics" in rows["none"]


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_row_is_a_recipe(name: str, model: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    made = CodeStudy(plan, list(plan.rows), {"model": model}, tmp_path)
    for row in plan.rows:
        recipe = made.recipe(row)
        assert isinstance(recipe, Recipe) and named(recipe.task or "")[0] == plan.task
        recipe.check()
    with pytest.raises(UnknownName, match="lora"):
        CodeStudy(plan, ["lroa"], {"model": model}, tmp_path)
