"""Semantic segmentation: a class for each pixel, trained on some domains and measured on these and on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue, MissingExtra
from veneer.tasks.data import Data, Row, Splits, Table, column
from veneer.tasks.domains import divided, domain_of, firsts
from veneer.tasks.image_classification import open_picture
from veneer.tasks.legend import IGNORED, Legend
from veneer.tasks.mask_checks import check_masks, classes_of
from veneer.tasks.metric import Measured
from veneer.tasks.task import Options, Task, load_failed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from veneer.tuned import Tuned

MASK_NAMES = ("mask", "annotation", "segmentation_mask", "label", "labels")
SHOWN = 4
"""Pictures of each domain on the sheet."""


class SemanticSegmentation(Task):
    """A class for each pixel, from pictures with masks (`veneer.tasks.mask_folder`).

    Metrics: mean IoU, mean F1, pixel accuracy and mean accuracy, on domains that were not trained on if the test rows have
    some; the same for each domain; and the classes' IoU (all bootstrap over pictures). Predictions are compared with the masks
    at the size that enters the model. Checkpoints are chosen on the sources' validation rows.
    """

    slug: ClassVar[str] = "semantic-segmentation"
    main: ClassVar[str] = "mean_iou"
    headline: ClassVar[str] = "mean_iou"
    grouped: ClassVar[bool] = False

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        column(table, "image", "folders images and masks")
        mask = options.label or next((name for name in MASK_NAMES if name in table.columns), None)
        if mask is None:
            raise BadValue(f"{table.source}: no column holds masks; there are {', '.join(table.columns)}. Name it with --label.")
        return dataclasses.replace(options, label=column(table, mask, "--label"))

    @classmethod
    def divide(cls, data: Data, options: Options) -> Splits:
        """Training and validation rows of the sources; test rows of the sources and of every other domain."""
        own = super().divide
        return divided(data, options, lambda part: own(part, options))

    def check(self, table: Table, split: str) -> None:
        column = self.options.label or ""
        table = table.pick([i for i, row in enumerate(table.rows) if not row.get("unlabelled")])
        if split == "train":
            if "legend" not in self.facts:
                self.facts["legend"] = classes_of(table, column).facts
            self.facts["sources"] = sorted(set(map(domain_of, table.rows)))
        check_masks(table, column, self.legend, split)

    def said(self) -> str:
        names, sources = self.legend.labels, self.facts["sources"]
        shown = ", ".join(names[:8]) + (f", … {len(names)} in all" if len(names) > 8 else "")
        others = [d for d in dict.fromkeys(map(domain_of, self.splits.test.rows)) if d not in sources]
        trained = f"; trained on {', '.join(sources)}" if sources != [""] else ""
        trained += f", without masks on {self.options.unlabelled} (--unlabelled)" if self.options.unlabelled else ""
        tested = f", tested also on {', '.join(others)}" if others else ""
        return f"label={self.options.label!r} (--label); classes {shown}{trained}{tested}{' (--source)' if trained else ''}"

    @property
    def legend(self) -> Legend:
        """What the values in masks mean."""
        return Legend.of(self.facts["legend"])

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoImageProcessor

        from veneer.assets import resolve
        from veneer.models.segmenters import segmenter
        from veneer.tasks.image_size import check_side

        folder = resolve(model)
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
            loaded = segmenter(folder, self.legend.labels, **kwargs)
        except ImportError as error:
            raise MissingExtra(f"The pictures' preparation needs a further package: {str(error).strip().splitlines()[0]}") from error
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        check_side(loaded, self.side(processor), model)
        return loaded, processor

    def side(self, processor: Any) -> int:
        """The side of the square picture that enters the model, in pixels."""
        from veneer.tasks.image_size import side_of

        return self.options.image_size or side_of(processor)

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        column = self.options.label or ""  # pictures are opened when a batch needs them
        return [{"image": row["image"], "labels": None if row.get("unlabelled") else row[column]} for row in rows]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        import torch

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = {"pixel_values": self.pixels([item["image"] for item in items], processor)}
            if "labels" in items[0]:
                batch["labels"] = torch.stack([torch.from_numpy(self.labels(item["labels"], processor)) for item in items])
            return batch

        return collate

    def pixels(self, pictures: Sequence[Any], processor: Any) -> Tensor:
        """Pictures as the model wants them: [n, 3, side, side]."""
        side = self.side(processor)
        size = {"size": {"height": side, "width": side}, "do_center_crop": False}
        return processor([open_picture(p) for p in pictures], return_tensors="pt", **size)["pixel_values"]

    def labels(self, mask: Any, processor: Any) -> np.ndarray:
        """Class indices int64 [side, side] of a mask; none of them counts if there is no mask."""
        import numpy as np
        from PIL import Image

        size = (self.side(processor),) * 2
        if mask is None:
            return np.full(size, IGNORED, np.int64)
        return np.array(Image.fromarray(self.legend.indices(mask)).resize(size, Image.Resampling.NEAREST), dtype=np.int64)

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """Right, true and predicted pixels of each class, [batch, 3, classes]."""
        import numpy as np
        import torch

        from veneer.tasks.confusion import count, tallies

        found = _classes(logits[0] if isinstance(logits, tuple) else logits, labels.shape[-2:]).cpu().numpy()
        n = len(self.legend.labels)
        each = [tallies(count(t, f, n, IGNORED)) for t, f in zip(labels.cpu().numpy(), found)]
        return torch.from_numpy(np.stack(each).astype(np.float32)).to(labels.device)

    # -- results ------------------------------------------------------------------------------------------------

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        from veneer.tasks.segmentation_scores import measured, table

        domains = [domain_of(row) for row in rows]
        self.by_class = table(kept, domains, self.legend.labels)
        return measured(kept, domains, self.facts["sources"], self.legend.labels)

    def after(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """A sheet of predictions, and the classes' metrics in each domain."""
        from veneer.store import write_text
        from veneer.study.contact_sheet import save_png
        from veneer.tasks.mask_pictures import sheet

        write_text(folder / "classes.csv", "".join(",".join(cells) + "\n" for cells in self.by_class))
        chosen = firsts(self.splits.test.rows, SHOWN)
        masks = [self.legend.indices(row[self.options.label or ""]) for row in chosen]
        found = self.found(tuned.model, processor, [row["image"] for row in chosen])
        save_png(sheet(chosen, masks, found, self.legend.labels), folder / "predictions.png")
        return [f"Pictures: {folder / 'predictions.png'}; every class in every domain: {folder / 'classes.csv'}"]

    def found(self, model: nn.Module, processor: Any, pictures: Sequence[Any], batch_size: int = 8) -> list[np.ndarray]:
        """Class indices uint8 [height, width] of pictures, each in its own size."""
        import numpy as np
        import torch

        first = next(p for p in model.parameters() if p.is_floating_point())
        masks = []
        model.eval()
        with torch.inference_mode():
            for i in range(0, len(pictures), batch_size):
                part = [open_picture(p) for p in pictures[i : i + batch_size]]
                logits = model(pixel_values=self.pixels(part, processor).to(first.device, first.dtype)).logits
                masks += [_classes(one[None], p.size[::-1])[0].cpu().numpy().astype(np.uint8) for one, p in zip(logits, part)]
        return masks

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """The commonest class, the classes' shares of the pixels, and the mask as a PIL picture of the data's own values."""
        from veneer.tasks.mask_pictures import answer

        found = self.found(model, processor, inputs, batch_size)
        return [answer(item, mask, self.legend) for item, mask in zip(inputs, found)]


def _classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The likeliest class of each pixel [batch, height, width], after interpolation to this size."""
    import torch

    return torch.nn.functional.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False).argmax(1)
