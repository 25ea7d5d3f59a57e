"""Text classification: one label of several for each text, or pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, bootstrap, proportion
from veneer.tasks.task import Options, Task, check_text, load_failed, text_columns

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

MAX_LENGTH = 256


class TextTask(Task):
    """What text classification and regression share: tokenised texts, padded by batch."""

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        return text_columns(table, options, label=True)

    def _load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from veneer.assets import resolve

        folder = resolve(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded = AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if loaded.config.pad_token_id is None:  # decoders find the last token of a padded row by it
            loaded.config.pad_token_id = tokenizer.pad_token_id
        return loaded, tokenizer

    def _tokens(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        text, pair = self.options.text or "text", self.options.pair
        limit = min(self.options.max_length or MAX_LENGTH, tokenizer.model_max_length)
        first = [row[text] for row in rows]
        second = [row[pair] for row in rows] if pair else None
        made = tokenizer(first, second, truncation=True, max_length=limit)
        return [{name: values[i] for name, values in made.items()} for i in range(len(first))]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def _outputs(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int) -> Tensor:
        """The model's logits [n, …] for bare texts, or pairs of texts."""
        import torch

        rows = [text_row(item, self.options) for item in inputs]
        encoded, collate = self._tokens(rows, processor), self.collator(processor)
        device = next(model.parameters()).device
        model.eval()
        with torch.inference_mode():
            found = [
                model(**collate(encoded[i : i + batch_size]).to(device)).logits.float().cpu()  # type: ignore[attr-defined]
                for i in range(0, len(encoded), batch_size)
            ]
        return torch.cat(found)


class TextClassification(TextTask):
    """One label for each text. Metrics: accuracy (Wilson interval) and macro-averaged F1 (bootstrap)."""

    slug: ClassVar[str] = "text-classification"
    main: ClassVar[str] = "accuracy"

    def check(self, table: Table, split: str) -> None:
        check_text(table, self.options, split)
        check_labels(self.facts, table, self.options.label or "", split)

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        return self._load(model, **label_config(self.facts["labels"]), **kwargs)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        number = {name: i for i, name in enumerate(self.facts["labels"])}
        label = self.options.label or ""
        return [{**tokens, "labels": number[class_name(row[label])]} for tokens, row in zip(self._tokens(rows, processor), rows)]

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        return measure_classes(kept, [class_name(row[self.options.label or ""]) for row in rows], self.facts["labels"])

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        return name_classes(self._outputs(model, processor, inputs, batch_size), self.facts["labels"])


def text_row(item: Any, options: Options) -> Row:
    """A bare input as a row: a string, a pair of strings, or a mapping with the columns."""
    text = options.text or "text"
    if isinstance(item, str):
        return {text: item, options.pair or "": ""}
    if isinstance(item, dict):
        missing = next((c for c in (text, options.pair) if c and not isinstance(item.get(c), str)), None)
        if missing is None:
            return item
        raise BadValue(f"predict: the input {item!r} has no text under {missing!r}.")
    if isinstance(item, tuple | list) and len(item) == 2 and options.pair:
        return {text: item[0], options.pair: item[1]}
    raise BadValue(f"predict: {item!r} is not a text; give strings, or mappings with the column {text!r}.")


# -- what all classification shares -----------------------------------------------------------------------------


def class_name(value: Any) -> str:
    """A label as the name of its class: 1, 1.0 and "1" are one class."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return str(value).strip()


def check_labels(facts: dict[str, Any], table: Table, column: str, split: str) -> None:
    """Collects the classes of the training rows, and refuses rows of the others whose label is none of them."""
    names = []
    for i, row in enumerate(table.rows):
        value = row.get(column)
        if value is None or class_name(value) == "":
            raise BadValue(
                f"{table.place(i)} ({split}): the label in column {column!r} is empty. Mend the row, or name the column with --label."
            )
        names.append(class_name(value))
    if split == "train":
        facts["labels"] = _sorted(set(names))
        if len(facts["labels"]) < 2:
            raise BadValue(
                f"{table.source}: all training rows have the label {names[0]!r} in {column!r}; there must be at least 2 classes."
            )
        if len(facts["labels"]) > max(50, len(names) // 2):
            raise BadValue(
                f"{table.source}: column {column!r} has {len(facts['labels'])} labels in {len(names)} rows. Name another with --label."
            )
        return
    known = set(facts["labels"])
    for i, name in enumerate(names):
        if name not in known:
            have = ", ".join(facts["labels"][:8]) + (", …" if len(known) > 8 else "")
            raise BadValue(f"{table.place(i)} ({split}): the label {name!r} does not occur in the training rows, which have: {have}.")


def _sorted(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """The head's settings for `from_pretrained`."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def measure_classes(logits: np.ndarray, names: Sequence[str], labels: Sequence[str]) -> Measured:
    """Accuracy and macro F1 of logits [n, classes] against the rows' class names."""
    import numpy as np

    number = {name: i for i, name in enumerate(labels)}
    truth = np.array([number[name] for name in names])
    guess = logits.argmax(axis=-1)
    right = guess == truth
    metrics = {
        "accuracy": proportion(int(right.sum()), len(right)),
        "macro_f1": bootstrap(lambda pairs: macro_f1(pairs, len(labels)), np.stack([truth, guess], axis=1)),
    }
    return Measured(metrics, [bool(r) for r in right])


def macro_f1(pairs: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that occur among truth and guess, from pairs [n, 2]."""
    import numpy as np

    table = np.zeros((classes, classes))
    np.add.at(table, tuple(pairs.astype(int).T), 1)
    both = table.sum(0) + table.sum(1)
    return float((2 * np.diag(table)[both > 0] / both[both > 0]).mean())


def name_classes(logits: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The likeliest class of each row with its probability, and all probabilities."""
    shares = logits.softmax(-1)
    return [
        {"label": labels[int(row.argmax())], "score": float(row.max()), "scores": {name: float(p) for name, p in zip(labels, row)}}
        for row in shares
    ]
