"""Point-cloud classification: one label of several for each cloud."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadFile, BadValue
from veneer.option import option
from veneer.tasks.data import Row, Table, column
from veneer.tasks.metric import Measured
from veneer.tasks.task import LABEL_NAMES, Options, Settings, Task, _first, load_failed
from veneer.tasks.text_classification import check_labels, class_name, label_config, measure_classes, name_classes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

MOST = 2048
"""Points that are kept of a file, where a model reads no more."""
SLOW = 200
"""So many files are read with a progress bar."""


@dataclass(frozen=True)
class Sampling(Settings):
    """How a cloud enters the model."""

    points: int | None = option(None, "points of a cloud that enter the model; its own number if not given", ge=1)


class PointClassification(Task):
    """One label for each point cloud. Metrics: accuracy (Wilson interval) and macro-averaged F1 (bootstrap).

    A mesh gives points on its surface, drawn once and always the same; clouds are centred and scaled into the unit ball.
    """

    slug: ClassVar[str] = "point-classification"
    main: ClassVar[str] = "accuracy"
    settings: ClassVar[type[Settings]] = Sampling
    grouped: ClassVar[bool] = False

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        column(table, "points", "a folder of class folders")
        label = options.label or _first(LABEL_NAMES, table.columns)
        if label is None:
            raise BadValue(f"{table.source}: no column holds labels; there are {', '.join(table.columns)}. Name it with --label.")
        return dataclasses.replace(options, label=column(table, label, "--label"))

    def check(self, table: Table, split: str) -> None:
        """Reads the files, so that whatever is wrong with them is told before a model is loaded."""
        check_labels(self.facts, table, self.options.label or "", split)
        rows: Any = table.rows
        if len(rows) >= SLOW and any(isinstance(row["points"], str) for row in rows):
            from tqdm.auto import tqdm

            rows = tqdm(rows, desc=f"point clouds ({split})", unit="file", dynamic_ncols=True)
        for row in rows:
            if isinstance(row["points"], str):
                row["name"], row["points"] = row["points"], self.read(row["points"])

    @classmethod
    def key(cls, options: Options) -> str:
        return ""

    def said(self) -> str:
        own = f", points={self.own.points} (in brackets behind the task's name)" if self.own.points else ""
        return f"label={self.options.label!r} (--label){own}"

    def read(self, source: Any) -> np.ndarray:
        """A file, or an array [n, 3], as points."""
        import numpy as np

        from veneer.tasks.point_files import check_points, read_points

        if isinstance(source, str | Path):
            return read_points(Path(source), max(MOST, self.own.points or 0))
        return check_points(np.asarray(source), "the cloud")

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoConfig

        from veneer import models
        from veneer.assets import resolve

        models.register()
        folder = resolve(model)
        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            if kind != "point_mae":
                raise BadValue(f"{model} is a model of kind {kind!r}, which reads no points. Give point-mae, or a folder of that kind.")
            cls = models.architecture("PointMAEForPointCloudClassification")
            loaded = cls.from_pretrained(folder, **label_config(self.facts["labels"]), **kwargs)
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        return loaded, loaded.config

    def ball(self, points: np.ndarray, config: Any, name: str = "") -> np.ndarray:
        """The cloud as the model wants it [points, 3]; one of fewer points has some of them twice.

        Raises `BadFile` for a cloud of fewer points than the model cuts into patches.
        """
        import numpy as np

        from veneer.tasks.point_files import unit_ball

        wanted = self.own.points or config.num_points
        if wanted < config.least_points:
            raise BadValue(f"points={wanted} are too few for the model's patches; choose at least {config.least_points}.")
        if len(points) < config.least_points:
            raise BadFile(
                f"{name or 'The cloud'} holds {len(points)} points, and the model cuts a cloud into {config.num_groups} patches of "
                f"{config.group_size} points; give at least {config.least_points}."
            )
        return unit_ball(points[np.arange(wanted) % len(points)])

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        number, label = {name: i for i, name in enumerate(self.facts["labels"])}, self.options.label or ""
        return [
            {"points": self.ball(self.read(row["points"]), processor, row.get("name", "")), "labels": number[class_name(row[label])]}
            for row in rows
        ]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        import numpy as np
        import torch

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = {"points": torch.from_numpy(np.stack([item["points"] for item in items]))}
            if "labels" in items[0]:
                batch["labels"] = torch.tensor([item["labels"] for item in items])
            return batch

        return collate

    # -- results ------------------------------------------------------------------------------------------------

    @classmethod
    def bare(cls, row: Row) -> Any:
        return row["points"]

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        return measure_classes(kept, [class_name(row[self.options.label or ""]) for row in rows], self.facts["labels"])

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Classes of clouds: files, or arrays [n, 3]."""
        import torch

        clouds = [self.ball(self.read(one), processor, one if isinstance(one, str) else "") for one in inputs]
        collate, device = self.collator(processor), next(model.parameters()).device
        model.eval()
        with torch.inference_mode():
            found = [
                model(points=collate([{"points": c} for c in clouds[i : i + batch_size]])["points"].to(device)).logits.float().cpu()
                for i in range(0, len(clouds), batch_size)
            ]
        return name_classes(torch.cat(found), self.facts["labels"])
