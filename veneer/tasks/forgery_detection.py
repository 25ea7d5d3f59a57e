"""Forgery detection: is a picture (a face, the frames of a video) real or fake, also in data of other kinds than the training's?

Features on the unit sphere, two losses on how they lie there, moves along arcs within a class, face crops by landmarks, and
measures on data sets that were never trained on (2025, arXiv:2503.19683). Any vision transformer, any method; theirs is ln-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.option import option
from veneer.tasks.data import Row, Table, _cap, read
from veneer.tasks.faces import Faces
from veneer.tasks.image_classification import ImageClassification
from veneer.tasks.metric import Measured
from veneer.tasks.task import Options, Settings, load_failed
from veneer.tasks.text_classification import class_name
from veneer.tasks.videos import VIDEO, thin_out

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

REAL = ("real", "original", "originals", "pristine", "authentic", "genuine", "bonafide", "bona-fide", "live", "0", "0_real")
"""What the class of untouched pictures may be called; every other class is fake, whatever made it."""
CLASSES = ["real", "fake"]


@dataclass(frozen=True)
class Spread(Settings):
    others: str | None = option(None, "further data sets, separated by commas, that it is tested on and never trained")
    w_align: float = option(0.1, "weight of the alignment of a class's features", ge=0)
    w_uniform: float = option(0.5, "weight of the uniformity of all features", ge=0)
    slerp: bool = option(True, "move features along arcs within their class in training")
    augment: bool = option(True, "mirror, move, blur and compress training pictures at random")


class ForgeryDetection(ImageClassification):
    """Real or fake. Metrics of pictures, or of videos where the data name them: average precision, AUROC, equal error rate,
    balanced accuracy, and the AUROC on every other data set (all bootstrap)."""

    slug: ClassVar[str] = "forgery-detection"
    main: ClassVar[str] = "ap"
    settings: ClassVar[type[Settings]] = Spread
    headline: ClassVar[str] = "auroc"

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def key(cls, options: Options) -> str:
        return VIDEO

    def said(self) -> str:
        lost = self.facts.get("faceless", 0)
        return super().said() + (f"; {lost} pictures without a face left out" if lost else "")

    def check(self, table: Table, split: str) -> None:
        if split == "train":
            self.facts["labels"] = CLASSES
        lost = Faces.of(table).check(table, split)
        self.facts["faceless"] = self.facts.get("faceless", 0) + lost
        thin_out(table)
        self.check_classes(table, split)
        if split == "train":
            self.foreign = {name: self.other(name) for name in names_of(self.own.others)}

    def check_classes(self, table: Table, split: str) -> None:
        """Raises `BadValue` for a row without a label, or rows that are all real or all fake."""
        column = self.options.label or ""
        names = [class_name(row.get(column) if row.get(column) is not None else "") for row in table.rows]
        if "" in names:
            raise BadValue(f"{table.place(names.index(''))} ({split}): the label in column {column!r} is empty. Mend the row.")
        real = sum(name.lower() in REAL for name in names)
        if real in (0, len(names)):
            have = ", ".join(sorted(set(names))[:6])
            what = "none of them is" if real == 0 else "all of them are"
            raise BadValue(
                f"{table.source} ({split}): the classes are {have}, and {what} called real (or {', '.join(REAL[1:4])}); "
                "there must be real pictures and fake ones. Rename the class, or name the column with --label."
            )

    def other(self, name: str) -> list[Row]:
        """The test rows of another data set, checked; all of it where it has no splits."""
        data = read(name)
        table = data.tables.get("test", data.train)
        table = _cap(table, self.options.test_rows)
        if "image" not in table.columns:
            raise BadValue(f"others={name}: there is no column 'image'; it has {', '.join(table.columns)}.")
        self.facts["faceless"] += Faces.of(table).check(table, name)
        thin_out(table)
        self.check_classes(table, name)
        return table.rows

    def fakes(self, rows: Sequence[Row]) -> list[int]:
        """1 for every fake, 0 for every real row."""
        return [int(class_name(row[self.options.label or ""]).lower() not in REAL) for row in rows]

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoImageProcessor

        from veneer.assets import resolve
        from veneer.models.sphere_classifier import SphereConfig, SphereForImageClassification
        from veneer.models.vision_tower import model_type
        from veneer.tasks.text_classification import label_config

        own = self.own
        arcs = (0.0, 1.0) if own.slerp else None
        spread: dict[str, Any] = {"w_align": own.w_align, "w_uniform": own.w_uniform, "slerp": arcs}
        try:
            processor = AutoImageProcessor.from_pretrained(resolve(model))
            if model_type(model) == SphereConfig.model_type:  # merged earlier
                return SphereForImageClassification.from_pretrained(model, **spread, **kwargs), processor
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        return SphereForImageClassification.around(model, {**label_config(CLASSES), **spread}, **kwargs), processor

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        trained = rows is self.splits.train.rows if hasattr(self, "splits") else False
        return FacePictures(rows, self.fakes(rows), trained and self.own.augment)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        import torch

        from veneer.tasks.picture_noise import disturbed

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            faces = [disturbed(item["image"]) if item["disturb"] else item["image"] for item in items]
            return {"pixel_values": self.pixels(faces, processor), "labels": torch.tensor([item["labels"] for item in items])}

        return collate

    # -- results ------------------------------------------------------------------------------------------------

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        from veneer.tasks.detection_scores import detection

        pairs = self.scored(kept, rows)
        return Measured(detection(pairs), [bool(right) for right in (pairs[:, 0] > 0.5) == (pairs[:, 1] == 1)])

    def scored(self, logits: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        """(probability of being fake, is fake) of every picture or video [n, 2], from logits [pictures, 2]."""
        import numpy as np

        from veneer.tasks.detection_scores import by_group

        likely = 1 / (1 + np.exp(-np.float64(logits[:, 1] - logits[:, 0])))
        videos = [str(row[VIDEO]) for row in rows] if rows and VIDEO in rows[0] else None
        return by_group(likely, np.array(self.fakes(rows)), videos)

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured | None:
        """The AUROC on the other data sets, which chose nothing."""
        from veneer.tasks.detection_scores import auroc
        from veneer.tasks.metric import bootstrap

        found = {}
        for name, others in getattr(self, "foreign", {}).items():
            logits = self.logits(model, processor, self.encode(others, processor), batch_size)
            found[f"auroc {Path(name).name}"] = bootstrap(auroc, self.scored(logits.numpy(), others))
        return Measured(found) if found else None

    def logits(self, model: nn.Module, processor: Any, items: Sequence[dict[str, Any]], batch_size: int) -> Tensor:
        """What the model says of encoded rows, [n, 2] in float32."""
        import torch

        first = next(model.parameters())
        found = []
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                faces = [items[i]["image"] for i in range(start, min(start + batch_size, len(items)))]
                pixels = self.pixels(faces, processor).to(first.device, first.dtype)
                found.append(model(pixel_values=pixels).logits.float().cpu())
        return torch.cat(found)


class FacePictures(Sequence):
    """Rows whose faces are cut out only when a batch needs them."""

    def __init__(self, rows: Sequence[Row], fakes: Sequence[int], disturb: bool) -> None:
        self.rows, self.fakes, self.disturb = rows, fakes, disturb
        self.faces = Faces.of(Table(list(rows[:1]), ""))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {"image": self.faces.crop(self.rows[index]), "labels": self.fakes[index], "disturb": self.disturb}


def names_of(others: str | None) -> list[str]:
    """The data sets of a list with commas."""
    return [name for name in (part.strip() for part in (others or "").split(",")) if name]
