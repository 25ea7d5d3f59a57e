"""The T-Few recipe: losses over answers, ranking, and what examples in the prompt cost against training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden_unions import count, sites_of
from tiny import llama, spread
from torch import Tensor
from torch.nn import functional as F

import veneer.registry as registry
from veneer.cli.main import main
from veneer.errors import BadValue
from veneer.study.fewshot import FewShot
from veneer.tasks.answer_losses import length_normalised, likelihood, t_few, token_scores, unlikelihood
from veneer.tasks.multiple_choice import choices_batch
from veneer.tasks.task import Options, prepare


def example(rows: int = 3, answers: int = 4, tokens: int = 6, words: int = 11) -> tuple[Tensor, Tensor]:
    """Logits and labels with answers of different lengths; the last answer of the last row does not exist."""
    logits = torch.randn(rows * answers, tokens, words, dtype=torch.float64).float()
    labels = torch.randint(words, (rows, answers, tokens))
    labels[..., :2] = -100
    for b in range(rows):
        for c in range(answers):
            labels[b, c, 3 + (b + c) % 4 :] = -100
    labels[-1, -1] = -100
    return logits, labels


# -- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_losses_are_their_formulas(eps: float) -> None:
    logits, labels = example()
    scores, mask = token_scores(torch.cat([torch.randn(12, 2, 11), logits], 1), labels)  # soft prompts in front
    lm, ul, ln = [], [], []
    for b in range(3):
        beta = []
        for c in range(4):
            at = [t for t in range(1, 6) if labels[b, c, t] != -100]
            lp = [float(logits[4 * b + c, t - 1].log_softmax(-1)[labels[b, c, t]]) for t in at]
            (lm if c == 0 else ul).extend(lp)
            if lp:
                beta.append(sum(lp) / len(lp))
        ln.append(-beta[0] + math.log(sum(map(math.exp, beta))))
    assert float(likelihood(scores, mask)) == pytest.approx(-sum(lm) / len(lm), rel=1e-5)
    expected = -sum(math.log(1 - math.exp(lp) + eps) for lp in ul) / len(ul)
    assert float(unlikelihood(scores, mask, eps)) == pytest.approx(expected, rel=1e-5)
    assert float(length_normalised(scores, mask)) == pytest.approx(sum(ln) / 3, rel=1e-5)
    whole = likelihood(scores, mask) + unlikelihood(scores, mask) + length_normalised(scores, mask)
    assert float(t_few(logits, labels, vocab_size=11)) == pytest.approx(float(whole), rel=1e-6)


def test_the_likelihood_is_the_models_own_loss_of_the_right_answers() -> None:
    logits, labels = example()
    own = F.cross_entropy(logits.view(3, 4, 6, 11)[:, 0, :-1].flatten(0, 1), labels[:, 0, 1:].flatten())
    assert float(likelihood(*token_scores(logits, labels))) == pytest.approx(float(own), rel=1e-6)


def test_losses_see_what_they_should() -> None:
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    scores = -torch.rand(2, 3, 2) - 0.1
    moved = scores + torch.tensor([0.3, -0.2])[:, None, None]  # by the same for all answers of a row
    assert float(length_normalised(moved, mask)) == pytest.approx(float(length_normalised(scores, mask)), rel=1e-5)
    likelier = scores.clone()
    likelier[:, 1] += 0.05
    assert unlikelihood(likelier, mask) > unlikelihood(scores, mask)
    right = scores.clone()
    right[:, 0] += 0.05
    assert unlikelihood(right, mask) == unlikelihood(scores, mask) and likelihood(right, mask) < likelihood(scores, mask)
    padded, hidden = F.pad(scores, (0, 3), value=-7.0), F.pad(mask, (0, 3), value=False)
    for loss in (likelihood, unlikelihood, length_normalised):
        assert float(loss(padded, hidden)) == pytest.approx(float(loss(scores, mask)), rel=1e-6)  # type: ignore[operator]


def test_losses_have_finite_gradients_at_their_ends() -> None:
    logits, labels = example()
    for size in (0.0, 60.0):  # every word alike; one word certain
        x = (size * logits).requires_grad_()
        t_few(x, labels).backward()
        assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


# -- the task ---------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "</s>", "[UNK]", "pick", "Answer", ":", *"abcdefghij", "one", "two", "three", "four", "positive", "negative"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>", pad_token="[PAD]")


def questions(path: Path, n: int = 60) -> str:
    """The letter says which answer is right; some questions have three answers."""
    rows = []
    for i in range(n):
        answers = ["one", "two three"] + ["four"] * (i % 3 == 0)
        letter = "ab"[i % 2]
        rows.append({"text": f"pick {letter} {'cdefghij'[i % 8]}", "choices": answers, "label": "ab".index(letter)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    spread(llama(depth=2, width=32)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_ranking_is_scoring_every_answer_alone(model: str, tmp_path: Path) -> None:
    task, lines = prepare(questions(tmp_path / "q.jsonl"))
    assert task.slug == "multiple-choice" and "guessed" in lines[0]
    loaded, words = task.load(model)
    loaded.requires_grad_(False)
    rows = task.splits.train.rows[:5]
    batch = task.collator(words)(list(task.encode(rows, words)))
    kept = task.reduce(loaded(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]).detach()
    for row, betas in zip(rows, kept):
        right = row["label"]
        order = [right, *(i for i in range(len(row["choices"])) if i != right)]
        for place, i in enumerate(order):
            asked, answer = words(row["text"] + "\nAnswer:")["input_ids"], words(" " + row["choices"][i])["input_ids"]
            scores = loaded(torch.tensor([asked + answer])).logits[0].log_softmax(-1)
            lp = [scores[len(asked) + t - 1, token] for t, token in enumerate(answer)]
            assert float(betas[place]) == pytest.approx(float(sum(lp) / len(lp)), rel=1e-4)
        assert torch.isneginf(betas[len(order) :]).all()
    found = task.measure(kept.numpy(), rows)
    said = task.predict(loaded, words, rows)
    assert found.correct == [one["label"] == row["choices"][row["label"]] for one, row in zip(said, rows)]
    assert loaded(**batch).loss == pytest.approx(float(t_few(loaded(**batch).logits, batch["labels"])))


def test_a_tie_is_no_right_answer(tmp_path: Path) -> None:
    import numpy as np

    task, _ = prepare(questions(tmp_path / "q.jsonl"))
    kept = np.array([[-1.0, -1.0, -np.inf], [-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0]])
    assert task.measure(kept, [{}] * 3).correct == [False, True, False]


def test_classes_are_the_choices_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"pick a {i},{'positive' if i % 2 else 'negative'}\n" for i in range(30)))
    task, _ = prepare(str(path), "multiple-choice")
    words = tokenizer()
    batch = choices_batch(task.encode(task.splits.train.rows[:2], words), 0)
    assert batch["labels"].shape[:2] == (2, 2) and len(batch["input_ids"]) == 4
    first = [words.decode(row[0][row[0] != -100]) for row in batch["labels"]]
    assert first == [row["label"] for row in task.splits.train.rows[:2]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"choices": ["one"], "label": 0}, "at least 2 texts"),
        ({"choices": ["one", " "], "label": 0}, "empty"),
        ({"choices": ["one", "two"], "label": 2}, "neither one of the answers nor a position from 0 to 1"),
        ({"choices": ["one", "two"], "label": "three"}, "'three'"),
    ],
)
def test_bad_answers_are_refused(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    good = {"text": "pick", "choices": ["one", "two"], "label": "one"}
    rows = [{**good, "text": f"pick {i}"} for i in range(20)] + [{"text": "last", **row}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadValue, match=words):
        prepare(str(tmp_path / "q.jsonl"), "multiple-choice", Options())


def test_training_learns_to_choose(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--model", model, "--data", questions(tmp_path / "q.jsonl", 80), "--method", "ia3(targets='attn.* mlp.*')"]
    argv += ["--steps", "60", "--batch-size", "8", "--lr", "3e-2", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    assert main(argv) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["metrics"]["accuracy"]["value"] == 1.0 and outcome["main"] == "accuracy"
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["value"] == 1.0


# -- costs ------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_paper() -> None:
    t_few_11b = FewShot(11 * 10**9, 1_081_344, 41, 98, 103, 48 * 4096, encoder_decoder=True)
    assert t_few_11b.tuned_flops == pytest.approx(1.1e12, rel=0.05) and t_few_11b.training_flops == pytest.approx(2.7e16, rel=0.01)
    assert t_few_11b.icl_bytes == pytest.approx(16e3, rel=0.01) and t_few_11b.tuned_bytes / 2**20 == pytest.approx(4.2, rel=0.03)
    assert t_few_11b.icl_flops == pytest.approx(4.5e13, rel=0.02)
    for size, flops in ((175, 1.4e15), (13, 1.0e14), (6.7, 5.4e13)):
        gpt = FewShot(int(size * 10**9), 1, 41, 98, 103, 1)
        assert gpt.icl_flops == pytest.approx(flops, rel=0.08)
    assert t_few_11b.break_even * (t_few_11b.icl_flops - t_few_11b.tuned_flops) == pytest.approx(t_few_11b.training_flops)


def test_ia3_counts() -> None:
    for width, inner, trained in ((2048, 5120, 540_672), (4096, 10240, 1_081_344)):
        facts = {"d_model": 1024, "d_ff": inner, "num_layers": 24, "num_heads": width // 64, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
        assert count(registry.method("ia3"), sites_of("T5 ForConditionalGeneration", **facts)) == trained


def test_the_command_prints_the_comparison(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fewshot", "--model", model, "--data", questions(tmp_path / "q.jsonl"), "--shots", "4"]
    assert main([*argv, "--runs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = found["sizes"]
    assert sizes["shot"] > 5 and sizes["trained"] == 2 * (16 + 16 + 64) and sizes["cached"] == 2 * 16
    assert found["icl_flops"] == pytest.approx(2 * sizes["parameters"] * (4 * sizes["shot"] + sizes["query"]))
    assert set(found["seconds"]) == {"icl", "tuned"}
    assert main([*argv, "--runs", "0"]) == 0
    said = capsys.readouterr().out
    assert "in the prompt" in said and "storage of a task" in said and "pays for itself" in said
    assert main([*argv, "--shots", "0"]) == 2
