"""Text regression: one number for each text, or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, bootstrap
from veneer.tasks.task import check_text
from veneer.tasks.text_classification import TextTask

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class TextRegression(TextTask):
    """One number for each text; trained on standardised targets. Metrics: rmse, mae and Pearson's r (bootstrap)."""

    slug: ClassVar[str] = "text-regression"
    main: ClassVar[str] = "rmse"
    greater: ClassVar[bool] = False

    def check(self, table: Table, split: str) -> None:
        check_text(table, self.options, split)
        numbers = [_number(row.get(self.options.label or ""), table.place(i), self.options.label or "") for i, row in enumerate(table.rows)]
        if split == "train":
            mean = math.fsum(numbers) / len(numbers)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))
            if spread == 0:
                raise BadValue(f"{table.source}: all training rows have the number {numbers[0]!r} in {self.options.label!r}.")
            self.facts.update(mean=mean, spread=spread)

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        return self._load(model, num_labels=1, problem_type="regression", **kwargs)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        mean, spread = self.facts["mean"], self.facts["spread"]
        targets = [(float(row[self.options.label or ""]) - mean) / spread for row in rows]
        return [{**tokens, "labels": target} for tokens, target in zip(self._tokens(rows, processor), targets)]

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        import numpy as np

        guess = kept.reshape(len(rows)) * self.facts["spread"] + self.facts["mean"]
        pairs = np.stack([np.array([float(row[self.options.label or ""]) for row in rows]), guess], axis=1)
        return Measured(
            {
                "rmse": bootstrap(lambda p: float(np.sqrt(((p[:, 0] - p[:, 1]) ** 2).mean())), pairs),
                "mae": bootstrap(lambda p: float(np.abs(p[:, 0] - p[:, 1]).mean()), pairs),
                "pearson": bootstrap(_pearson, pairs),
            }
        )

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        numbers = self._outputs(model, processor, inputs, batch_size).reshape(-1) * self.facts["spread"] + self.facts["mean"]
        return [{"value": float(x)} for x in numbers]


def _number(value: Any, place: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadValue(f"{place}: {value!r} in column {column!r} is not a number. For classes use --task text-classification.")
    return number


def _pearson(pairs: np.ndarray) -> float:
    import numpy as np

    a, b = pairs[:, 0] - pairs[:, 0].mean(), pairs[:, 1] - pairs[:, 1].mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else math.nan
