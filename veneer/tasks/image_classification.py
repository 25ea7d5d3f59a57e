"""Image classification: one label of several for each picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadFile, BadValue, MissingExtra
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured
from veneer.tasks.task import LABEL_NAMES, Options, Task, _first, load_failed
from veneer.tasks.text_classification import check_labels, class_name, label_config, measure_classes, name_classes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


class ImageClassification(Task):
    """One label for each picture. Metrics: accuracy (Wilson interval) and macro-averaged F1 (bootstrap)."""

    slug: ClassVar[str] = "image-classification"
    main: ClassVar[str] = "accuracy"
    grouped: ClassVar[bool] = False

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        import dataclasses

        from veneer.tasks.data import column

        column(table, "image", "a folder of class folders")
        label = options.label or _first(LABEL_NAMES, table.columns)
        if label is None:
            raise BadValue(f"{table.source}: no column holds labels; there are {', '.join(table.columns)}. Name it with --label.")
        return dataclasses.replace(options, label=column(table, label, "--label"))

    def check(self, table: Table, split: str) -> None:
        check_labels(self.facts, table, self.options.label or "", split)

    @classmethod
    def key(cls, options: Options) -> str:
        return ""

    def said(self) -> str:
        size = f", image_size={self.options.image_size} (--image-size)" if self.options.image_size else ""
        return f"label={self.options.label!r} (--label){size}"

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from veneer.assets import resolve
        from veneer.tasks.image_size import check_side

        folder = resolve(model)
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
            loaded = AutoModelForImageClassification.from_pretrained(folder, **label_config(self.facts["labels"]), **kwargs)
        except ImportError as error:
            raise MissingExtra(f"The pictures' preparation needs a further package: {str(error).strip().splitlines()[0]}") from error
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        if self.options.image_size:
            check_side(loaded, self.options.image_size, model)
        return loaded, processor

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        return Pictures(self, rows, processor)

    def pixels(self, pictures: Sequence[Any], processor: Any) -> Tensor:
        """Pictures as the model wants them: [n, 3, side, side]."""
        size = self.options.image_size
        given = {"size": {"height": size, "width": size}, "do_center_crop": False} if size else {}
        return processor([open_picture(p) for p in pictures], return_tensors="pt", **given)["pixel_values"]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        import torch

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = {"pixel_values": self.pixels([item["image"] for item in items], processor)}
            if "labels" in items[0]:
                batch["labels"] = torch.tensor([item["labels"] for item in items])
            return batch

        return collate

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        return measure_classes(kept, [class_name(row[self.options.label or ""]) for row in rows], self.facts["labels"])

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Classes of pictures: files, PIL images, or arrays [height, width] or [height, width, 3]."""
        import torch

        first = next(model.parameters())
        model.eval()
        with torch.inference_mode():
            found = [
                model(pixel_values=self.pixels(inputs[i : i + batch_size], processor).to(first.device, first.dtype)).logits.float().cpu()
                for i in range(0, len(inputs), batch_size)
            ]
        return name_classes(torch.cat(found), self.facts["labels"])


class Pictures(Sequence):
    """Rows whose pictures are opened only when a batch needs them."""

    def __init__(self, task: ImageClassification, rows: Sequence[Row], processor: Any) -> None:
        self.rows = rows
        self.label = task.options.label or ""
        self.number = {name: i for i, name in enumerate(task.facts["labels"])}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return {"image": row["image"], "labels": self.number[class_name(row[self.label])]}


def open_picture(source: Any, under: str | None = None) -> Any:
    """A file, array or PIL image as a PIL image with three channels; `under`: the colour that shows where it is transparent.

    Raises `BadFile` for a file that is no picture.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise MissingExtra("Pictures need the package Pillow. Run: pip install 'veneer[data]'") from None
    if isinstance(source, dict):  # how the datasets library holds encoded pictures
        import io

        source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
    if isinstance(source, Image.Image):
        return _rgb(source, under)
    if hasattr(source, "shape"):
        return _rgb(Image.fromarray(source), under)
    try:
        with Image.open(source) as opened:
            return _rgb(opened, under)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        name = Path(source).name if isinstance(source, str | Path) else "the picture"
        raise BadFile(f"{source if isinstance(source, str | Path) else name} cannot be read as a picture: {error}") from None


def _rgb(picture: Any, under: str | None) -> Any:
    if under is None or not picture.has_transparency_data:
        return picture.convert("RGB")
    from PIL import Image

    layered = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, under), layered).convert("RGB")
