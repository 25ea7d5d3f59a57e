"""Data is read, guessed, split and checked before any model is loaded; metrics are what they say."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer import assets
from veneer.errors import BadFile, BadValue, UnknownName, VeneerError
from veneer.tasks.chat import encode_conversation
from veneer.tasks.data import Data, Table, read, read_table, split
from veneer.tasks.metric import Metric, bootstrap, proportion
from veneer.tasks.task import TASKS, Options, guess, prepare, task_class
from veneer.tasks.word_problems import evaluate, final_number, problems

ROOT = Path(__file__).parent.parent


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def csv_rows(n: int, labels: str = "ab") -> str:
    return "\n".join(["text,label", *(f"sentence {i},{labels[i % len(labels)]}" for i in range(n))])


def conversations(role: str) -> str:
    return "\n".join(json.dumps({"messages": [{"role": role, "content": f"hi {i}"}]}) for i in range(12))


# -- mistakes ---------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, dict[str, str | bytes], str, dict[str, Any], type[VeneerError], list[str]]] = [
    ("missing file", {"reviews.csv": csv_rows(20)}, "review.csv", {}, BadFile, ["review.csv", "'reviews.csv'"]),
    ("missing folder", {}, "nowhere/reviews.csv", {}, BadFile, ["nowhere"]),
    ("misspelt data set", {}, "movie-sentimant", {}, UnknownName, ["'movie-sentiment'"]),
    ("unknown kind", {"d.xlsx": b"PK"}, "d.xlsx", {}, BadFile, [".xlsx", ".csv"]),
    ("empty file", {"d.csv": ""}, "d.csv", {}, BadFile, ["no rows"]),
    ("only a header", {"d.csv": "text,label\n"}, "d.csv", {}, BadFile, ["no rows"]),
    ("too few fields", {"d.csv": "text,label\na,1\nb\n"}, "d.csv", {}, BadFile, ["line 3", "1 fields", "text, label"]),
    ("too many fields", {"d.csv": "text,label\na,1\nb,c,2\n"}, "d.csv", {}, BadFile, ["line 3", "3 fields"]),
    ("field over two lines", {"d.csv": 'text,label\n"a\nb",1\nc\n'}, "d.csv", {}, BadFile, ["line 4"]),
    ("open quote", {"d.csv": 'text,label\n"a,1\n'}, "d.csv", {}, BadFile, ["line"]),
    ("same column twice", {"d.csv": "text,text\na,b\n"}, "d.csv", {}, BadFile, ["'text'", "twice"]),
    ("not UTF-8", {"d.csv": "text,label\ngood,1\ncaf\xe9,0\n".encode("latin-1")}, "d.csv", {}, BadFile, ["line 3", "0xe9", "UTF-8"]),
    ("bad JSON line", {"d.jsonl": '{"text": "a"}\n\n{"text": \n'}, "d.jsonl", {}, BadFile, ["line 3", "not JSON"]),
    ("JSON line without names", {"d.jsonl": '["a", 1]\n'}, "d.jsonl", {}, BadFile, ["line 1", "object"]),
    ("JSON that is no list", {"d.json": '{"a": 1}'}, "d.json", {}, BadFile, ["list of objects"]),
    ("missing label column", {"d.csv": csv_rows(20)}, "d.csv", {"label": "lable"}, BadValue, ["'lable'", "'label'", "--label"]),
    ("missing text column", {"d.csv": csv_rows(20)}, "d.csv", {"text": "txt"}, BadValue, ["'txt'", "'text'", "--text"]),
    ("no task fits", {"d.csv": "a,b\n1,2\n"}, "d.csv", {}, BadValue, ["a, b", "--task"]),
    ("empty text", {"d.csv": csv_rows(20) + "\n,a"}, "d.csv", {}, BadValue, ["line 22", "'text'", "empty"]),
    ("empty label", {"d.csv": csv_rows(20) + "\nfine,"}, "d.csv", {}, BadValue, ["line 22", "'label'", "empty"]),
    ("one class", {"d.csv": csv_rows(20, "a")}, "d.csv", {}, BadValue, ["at least 2 classes"]),
    ("too few rows", {"d.csv": csv_rows(2)}, "d.csv", {}, BadFile, ["too few"]),
    ("empty split", {"d/train.csv": csv_rows(20), "d/test.csv": "text,label\n"}, "d", {}, BadFile, ["test.csv", "no rows"]),
    (
        "label unseen in training",
        {"d/train.csv": csv_rows(20), "d/test.csv": "text,label\nx,a\ny,c\n"},
        "d",
        {},
        BadValue,
        ["test.csv, line 3", "'c'", "a, b"],
    ),
    (
        "numbers that are none",
        {"d.csv": "text,score\n" + "".join(f"x{i},0.5{i}\n" for i in range(20)) + "y,high\n"},
        "d.csv",
        {"task": "text-regression"},
        BadValue,
        ["'high'"],
    ),
    ("two files for a split", {"d/train.csv": csv_rows(9), "d/train.jsonl": "{}"}, "d", {}, BadFile, ["train.csv", "train.jsonl"]),
    ("folder of nothing", {"d/readme.md": ""}, "d", {}, BadFile, ["neither"]),
    (
        "messages without an answer",
        {"d.jsonl": conversations("user")},
        "d.jsonl",
        {},
        BadValue,
        ["line", "assistant"],
    ),
    (
        "unknown role",
        {"d.jsonl": conversations("bot")},
        "d.jsonl",
        {},
        BadValue,
        ["'bot'", "assistant"],
    ),
    ("unknown task", {"d.csv": csv_rows(20)}, "d.csv", {"task": "text-clasification"}, UnknownName, ["'text-classification'"]),
]


@pytest.mark.parametrize(("files", "source", "given_options", "error", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_in_data_are_told_with_their_place(
    files: dict[str, str | bytes],
    source: str,
    given_options: dict[str, Any],
    error: type[VeneerError],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    chosen = dict(given_options)
    with pytest.raises(error) as caught:
        prepare(source, chosen.pop("task", None), Options(**chosen))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


# -- reading and guessing ---------------------------------------------------------------------------------------


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    wanted = [{"text": 'a, "b"', "label": "x"}, {"text": "two\nlines", "label": "y"}]
    comma = write(tmp_path / "a.csv", '\ufefftext,label\n"a, ""b""",x\n"two\nlines",y\n')
    semicolon = write(tmp_path / "b.csv", 'text;label\n"a, ""b""";x\n"two\nlines";y\n')
    tab = write(tmp_path / "c.tsv", 'text\tlabel\n"a, ""b"""\tx\n"two\nlines"\ty\n')
    lines = write(tmp_path / "d.jsonl", "\n".join(json.dumps(row) for row in wanted))
    listed = write(tmp_path / "e.json", json.dumps(wanted))
    assert all(read(path).train.rows == wanted for path in (comma, semicolon, tab, lines, listed))
    assert read_table(Path(comma)).place(1) == f"{comma}, line 3"
    assert read(write(tmp_path / "f.txt", "one\n\ntwo\n")).train.rows == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"review": "good", "stars": "4"}, "text-classification"),
        ({"text": "good", "score": "0.25"}, "text-regression"),
        ({"text": "once upon a time"}, "causal-lm"),
        ({"messages": []}, "chat"),
        ({"prompt": "hi", "completion": "hello"}, "chat"),
        ({"image": "a.png", "label": "cat"}, "image-classification"),
    ],
)
def test_the_task_is_guessed_from_the_columns(row: dict[str, Any], task: str) -> None:
    assert guess(Data("d", {"train": Table([row], "d")}, images="image" in row)) == task
    assert task_class(task).slug == task


def test_what_was_guessed_is_said_with_the_flag_that_changes_it(tmp_path: Path) -> None:
    source = write(tmp_path / "d.csv", csv_rows(40).replace("text,label", "review,stars"))
    task, lines = prepare(source)
    assert "guessed; --task" in lines[0] and "text='review' (--text)" in lines[0] and "label='stars' (--label)" in lines[0]
    assert "32 train, 4 validation, 4 test" in lines[1]
    assert task.facts["labels"] == ["a", "b"]


def test_every_task_can_be_found() -> None:
    assert all(task_class(name).slug == name for name in TASKS)


def test_pictures_in_class_folders(tmp_path: Path) -> None:
    from PIL import Image

    for name, shade in (("dark", 10), ("light", 240)):
        for i in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (9, 7), shade + i % 3).save(tmp_path / name / f"{i}.png")
    task, _ = prepare(str(tmp_path))
    assert task.slug == "image-classification" and task.facts["labels"] == ["dark", "light"]
    from veneer.tasks.image_classification import open_picture

    assert open_picture(task.splits.train.rows[0]["image"]).mode == "RGB"
    broken = write(tmp_path / "dark" / "no.png", b"no picture")
    with pytest.raises(BadFile, match=r"no\.png"):
        open_picture(broken)


def test_the_datasets_library_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(20)], "label": [i % 2 for i in range(20)]}, features=features)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path / "d"))
    task, lines = prepare(str(tmp_path / "d"))
    assert task.facts["labels"] == ["no", "yes"] and "validation split" in lines[1]


# -- splitting --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 200), st.integers(1, 5))
def test_splits_are_disjoint_complete_and_always_the_same(n: int, copies: int) -> None:
    rows = [{"text": f"t{i // copies}", "id": i} for i in range(n * copies)]
    cut = split(Data("d", {"train": Table(rows, "d")}), "text")
    again = split(Data("d", {"train": Table(list(rows), "d")}), "text")
    parts = [[row["id"] for row in table.rows] for _, table in cut.items()]
    assert sorted(i for part in parts for i in part) == list(range(n * copies))
    assert parts == [[row["id"] for row in table.rows] for _, table in again.items()]
    texts = [{row["text"] for row in table.rows} for _, table in cut.items()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_limits_cap_the_splits() -> None:
    rows = [{"text": f"t{i}"} for i in range(100)]
    cut = split(Data("d", {"train": Table(rows, "d")}), "text", (50, 3, None))
    assert [len(table) for _, table in cut.items()] == [50, 3, 10]


# -- metrics ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation(pair: tuple[int, int]) -> None:
    right, n = pair
    found = proportion(right, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for bound in (found.low, found.high):
        if 0 < bound < 1:
            assert abs(found.value - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-4)


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    import numpy as np

    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(lambda a: float(a.mean()), values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found == bootstrap(lambda a: float(a.mean()), values)
    assert str(Metric(0.5, 0.25, 0.75, 4)) == "0.5 [0.25, 0.75]"


def test_macro_f1_is_the_mean_over_classes() -> None:
    import numpy as np

    from veneer.tasks.text_classification import macro_f1

    pairs = np.array([[0, 0], [0, 1], [1, 1], [1, 1], [2, 0]])  # F1: 1/2, 4/5, 0
    assert macro_f1(pairs, 3) == pytest.approx((0.5 + 0.8 + 0) / 3)


def test_language_model_loss_is_the_models_own() -> None:
    import torch

    from veneer.tasks.causal_lm import CausalLM, pad

    torch.manual_seed(0)
    batch = pad([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}], 0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]] and batch["labels"][0, 3] == -100
    logits = torch.randn(2, 4, 8)
    kept = CausalLM(Options(text="text")).reduce(logits, batch["labels"])
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 8), batch["labels"][:, 1:].reshape(-1))
    assert kept[:, 1].tolist() == [2, 2] and kept[:, 0].sum() / 4 == pytest.approx(float(whole), rel=1e-6)
    longer = torch.cat([torch.randn(2, 3, 8), logits], dim=1)  # soft prompts in front
    assert torch.equal(CausalLM(Options(text="text")).reduce(longer, batch["labels"]), kept)
    found = CausalLM(Options(text="text")).measure(kept.numpy(), [{}, {}]).metrics
    assert found["perplexity"].value == pytest.approx(math.exp(found["loss"].value))


# -- chat -------------------------------------------------------------------------------------------------------


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "</s>", "user", "assistant", "system", ":", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")


def test_only_answers_bear_loss() -> None:
    tokenizer = word_tokenizer()
    messages = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    made = encode_conversation(messages, tokenizer, 100)
    learnt = tokenizer.convert_ids_to_tokens([i for i in made["labels"] if i != -100])
    assert learnt == ["c", "d", "</s>", "f", "</s>"]
    assert [i for i, label in zip(made["input_ids"], made["labels"]) if label != -100] == [i for i in made["labels"] if i != -100]
    assert len(encode_conversation(messages, tokenizer, 5)["input_ids"]) == 5


def test_prompt_and_answer_columns_are_a_chat(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": f"a {i}", "completion": "b"}) for i in range(20))
    task, _ = prepare(write(tmp_path / "d.jsonl", rows))
    assert task.slug == "chat"
    made = task.encode(task.splits.test.rows, word_tokenizer())
    assert all(any(label != -100 for label in item["labels"]) for item in made)


# -- word problems ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * x", 17),
        ("x // 3 + x % 3", 3),
        ("x / 2", Fraction(5, 2)),
        ("int(x * half)", 2),
        ("is_int(x * half)", False),
        ("divides(x + 1, 3) and not divides(x, 3)", True),
        ("1 < x <= 5 != 4", True),
        ("'a' if x > 3 else 'b'", "a"),
        ("round(x / 3)", 2),
        ("2 ** 3", 8),
    ],
)
def test_template_expressions(expression: str, value: object) -> None:
    assert evaluate(expression, {"x": 5, "half": "1/2"}) == value


@pytest.mark.parametrize("expression", ["__import__('os')", "x.real", "[i for i in x]", "open('a')", "2 ** 99", "y", "(lambda: 1)()", "x["])
def test_template_expressions_are_arithmetic_and_nothing_else(expression: str) -> None:
    with pytest.raises(BadValue):
        evaluate(expression, {"x": Fraction(4)})


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3+4=7\n#### 7", 7), ("#### $1,234.50", Fraction("1234.5")), ("the answer is 12.", 12), ("#### -3", -3), ("none", None)],
)
def test_the_final_number_is_found(text: str, number: object) -> None:
    assert final_number(text) == number


@pytest.mark.skipif(not assets.available("arithmetic"), reason=f"needs: {assets.INSTALL['arithmetic']}")
def test_word_problems_are_fresh_right_and_split_by_template() -> None:
    rows = problems(each=2)
    assert rows == problems(each=2)
    by_template: dict[str, list[str]] = {}
    for row in rows:
        assert final_number(row["answer"]) is not None and "{" not in row["question"] + row["answer"] and "<<" not in row["answer"]
        by_template.setdefault(row["template"], []).append(row["question"])
    assert len(by_template) == 100
    assert sum(len(set(questions)) == 2 for questions in by_template.values()) >= 90
    table = Table(rows, "arithmetic")
    cut = split(Data("arithmetic", {"train": table}), "template")
    kinds = [{row["template"] for row in part.rows} for _, part in cut.items()]
    assert [len(k) for k in kinds] == [80, 10, 10] and not kinds[0] & kinds[2]


@pytest.mark.skipif(not assets.available("arithmetic"), reason=f"needs: {assets.INSTALL['arithmetic']}")
def test_sums_in_drawn_answers_are_right() -> None:
    import re

    checked = 0
    for row in problems(each=3, seed=random.randrange(100)):
        for left, right in re.findall(r"(?:^|(?<=[a-z:] ))(\d+(?: ?[+*] ?\d+)+) ?= ?(\d+(?:\.\d+)?)(?![\w/.,])", row["answer"], re.M):
            assert evaluate(left, {}) == Fraction(right), row
            checked += 1
    assert checked > 20


# -- light ------------------------------------------------------------------------------------------------------


def test_checking_data_needs_no_torch(tmp_path: Path) -> None:
    source = write(tmp_path / "d.csv", csv_rows(40))
    code = (
        "import sys; from veneer.tasks.task import prepare; prepare(sys.argv[1])\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, source], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
