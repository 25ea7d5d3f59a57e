"""Multiple choice by a language model: every answer is read in full, the likeliest is chosen (T-Few, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue, Unsupported
from veneer.tasks.causal_lm import IGNORED, CausalLM
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, proportion
from veneer.tasks.task import CHOICES, Options, _first, check_text, text_columns
from veneer.tasks.text_classification import check_labels, class_name, text_row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

MAX_LENGTH = 256
ASK = "\nAnswer:"


class MultipleChoice(CausalLM):
    """A text, its answers in a column `choices` (else the classes of the label column), and which is right (position or text).

    Trained with three losses: the right answer's likelihood, the wrong ones' unlikelihood, and the right one among all by
    mean log-probability, which also ranks. Metric: accuracy (Wilson interval); a tie counts as wrong.
    """

    slug: ClassVar[str] = "multiple-choice"
    main: ClassVar[str] = "accuracy"
    greater: ClassVar[bool] = True
    per_token: ClassVar[bool] = False

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        found = _first(CHOICES, table.columns)
        seen = Table([{k: v for k, v in row.items() if k != found} for row in table.rows], table.source, table.lines)
        return text_columns(seen, options, label=True)

    def check(self, table: Table, split: str) -> None:
        check_text(table, self.options, split)
        if split == "train":
            self.facts["choices"] = _first(CHOICES, table.columns)
        if not self.facts["choices"]:
            check_labels(self.facts, table, self.options.label or "", split)
            self.facts["most"] = len(self.facts["labels"])
            return
        for i, row in enumerate(table.rows):
            problem = _problem(row.get(self.facts["choices"]), row.get(self.options.label or ""))
            if problem:
                raise BadValue(f"{table.place(i)} ({split}): {problem}")
        self.facts["most"] = max(self.facts.get("most", 0), *(len(row[self.facts["choices"]]) for row in table.rows))

    def choices(self, row: Row) -> list[str]:
        """The answers of a row, in their own order."""
        column = self.facts["choices"]
        return [str(c) for c in row[column]] if column else list(self.facts["labels"])

    def right(self, row: Row) -> int:
        """Which of the row's answers is right."""
        value = row[self.options.label or ""]
        return _position(value, self.choices(row)) if self.facts["choices"] else self.choices(row).index(class_name(value))

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from veneer.tasks.answer_losses import t_few

        loaded, tokenizer = super().load(model, **kwargs)
        if not hasattr(type(loaded), "loss_function"):
            raise Unsupported(f"{type(loaded).__name__} computes its loss by itself; multiple-choice needs a model of transformers ≥ 4.48.")
        loaded.loss_function = t_few  # type: ignore[assignment]
        return loaded, tokenizer

    def limit(self, tokenizer: Any) -> int:
        return min(self.options.max_length or MAX_LENGTH, tokenizer.model_max_length)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        return [self._encoded(row, processor, self.right(row)) for row in rows]

    def _encoded(self, row: Row, processor: Any, first: int) -> dict[str, Any]:
        """Token ids of the question, and of every answer, the one at `first` in front."""
        answers = self.choices(row)
        answers.insert(0, answers.pop(first))
        ids = [processor(f" {answer}", add_special_tokens=False)["input_ids"] for answer in answers]
        asked = "\n".join(str(row[c]) for c in (self.options.text, self.options.pair) if c and row.get(c)) + ASK
        room = self.limit(processor) - max(map(len, ids))
        if room < 1:
            raise BadValue(f"An answer of {max(map(len, ids))} tokens leaves no room in max_length={self.limit(processor)}; give more.")
        return {"input_ids": processor(asked)["input_ids"][-room:], "answers": ids}

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return lambda items: choices_batch(items, processor.pad_token_id)

    # -- results ------------------------------------------------------------------------------------------------

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """Mean log-probabilities of the answers [batch, most], the right one first."""
        import torch

        from veneer.tasks.answer_losses import mean_scores, token_scores

        beta = mean_scores(*token_scores(logits[0] if isinstance(logits, tuple) else logits, labels))
        return torch.nn.functional.pad(beta, (0, self.facts["most"] - beta.shape[1]), value=-torch.inf)

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        right = kept[:, 0] > kept[:, 1:].max(-1)
        return Measured({"accuracy": proportion(int(right.sum()), len(right))}, [bool(r) for r in right])

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """The likeliest answer of each input, with its share among the answers; inputs without choices get the classes."""
        import torch

        rows = [text_row(item, self.options) for item in inputs]
        missing = next((row for row in rows if self.facts["choices"] and not row.get(self.facts["choices"])), None)
        if missing is not None:
            raise BadValue(f"predict: the input {missing!r} has no answers under {self.facts['choices']!r}.")
        encoded, collate = [self._encoded(row, processor, 0) for row in rows], self.collator(processor)
        device = next(model.parameters()).device
        model.eval()
        found = []
        with torch.inference_mode():
            for i in range(0, len(encoded), batch_size):
                batch = {k: v.to(device) for k, v in collate(encoded[i : i + batch_size]).items()}
                labels = batch.pop("labels")
                found += list(self.reduce(model(**batch).logits, labels).softmax(-1).cpu())
        named = [(self.choices(row), shares) for row, shares in zip(rows, found)]
        return [{"label": c[int(s.argmax())], "score": float(s.max()), "scores": dict(zip(c, s.tolist()))} for c, s in named]


def choices_batch(items: Sequence[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """input_ids and mask [rows · answers, tokens], labels [rows, answers, tokens]: every question with each of its answers."""
    import torch

    most = max(len(item["answers"]) for item in items)
    longest = max(len(item["input_ids"]) + len(a) for item in items for a in item["answers"])
    ids = torch.full((len(items), most, longest), filler)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    mask[..., 0] = 1  # rows that stand for answers that do not exist must see something
    for b, item in enumerate(items):
        start = len(item["input_ids"])
        for c, answer in enumerate(item["answers"]):
            end = start + len(answer)
            ids[b, c, :end] = torch.tensor([*item["input_ids"], *answer])
            labels[b, c, start:end] = ids[b, c, start:end]
            mask[b, c, :end] = 1
    return {"labels": labels, "input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}


def _position(value: Any, choices: Sequence[str]) -> int:
    """Which answer a label means: a number is a position from 0, a text the answer itself or else a position; −1 for none."""
    text = class_name(value)
    if isinstance(value, str) and text in choices:
        return list(choices).index(text)
    return int(text) if text.isdigit() and int(text) < len(choices) else -1


def _problem(choices: Any, label: Any) -> str:
    """What is wrong with a row's answers, or ""."""
    if not isinstance(choices, list) or len(choices) < 2:
        return "the answers must be a list of at least 2 texts."
    if not all(str(c).strip() for c in choices):
        return "one of the answers is empty."
    if label is None or _position(label, [str(c) for c in choices]) < 0:
        return f"the label {label!r} is neither one of the answers nor a position from 0 to {len(choices) - 1}."
    return ""
