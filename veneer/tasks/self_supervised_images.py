"""Self-supervised pre-training: pictures without labels, by masked autoencoding or self-distillation (ExPLoRA, arXiv:2406.10973)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue, MissingExtra, Unsupported
from veneer.option import option
from veneer.tasks.data import Row, Table, column
from veneer.tasks.image_classification import ImageClassification
from veneer.tasks.metric import Measured, Metric, bootstrap, proportion
from veneer.tasks.task import LABEL_NAMES, Options, Settings, _first, load_failed
from veneer.tasks.text_classification import class_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from veneer.tuned import Tuned

NEIGHBOURS = 5


@dataclass(frozen=True)
class Objective(Settings):
    """What is learnt from pictures, and how."""

    objective: str = option("dino", "masked autoencoding, or DINOv2's self-distillation", choices=("mae", "dino"))
    mask_ratio: float = option(0.75, "mae: share of the patches that are hidden", gt=0, lt=1)
    local_crops: int = option(4, "dino: small views of every picture beside the two large ones", ge=0)
    prototypes: int = option(1024, "dino: outputs of the head; the authors have 65536", ge=2)
    centring: str = option(
        "centre", "dino: a running mean taken off the teacher's outputs, or their balance", choices=("centre", "sinkhorn")
    )


class SelfSupervisedImages(ImageClassification):
    """A backbone goes on learning from pictures alone. Metrics: the objective's loss, and where there are labels, which training never
    sees, the accuracy of the 5 nearest other pictures (Wilson interval).

    `veneer merge` writes the backbone without what only training needed: an ordinary model to begin the supervised stage with.
    """

    slug: ClassVar[str] = "self-supervised-images"
    settings: ClassVar[type[Settings]] = Objective
    main: ClassVar[str] = "loss"
    greater: ClassVar[bool] = False
    headline: ClassVar[str] = "neighbours"

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        column(table, "image", "a folder of pictures")
        label = options.label or _first(LABEL_NAMES, table.columns)
        return dataclasses.replace(options, label=column(table, label, "--label") if label else None)

    def check(self, table: Table, split: str) -> None:
        """Nothing: pictures are opened when their batch comes."""

    @property
    def last_counts(self) -> bool:  # type: ignore[override]
        """Self-distillation's loss is against a teacher that moves, so no step can be called the best by it."""
        return self.own.objective == "dino"

    def said(self) -> str:
        own = f"mask_ratio={self.own.mask_ratio}" if self.own.objective == "mae" else f"local_crops={self.own.local_crops}"
        size = f", image_size={self.options.image_size} (--image-size)" if self.options.image_size else ""
        return f"image; objective={self.own.objective}, {own} (in brackets behind the task's name){size}"

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoImageProcessor, AutoModel

        from veneer.assets import resolve
        from veneer.models import self_supervised as models

        folder = resolve(model)
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
            backbone = AutoModel.from_pretrained(folder, **kwargs)
        except ImportError as error:
            raise MissingExtra(f"The pictures' preparation needs a further package: {str(error).strip().splitlines()[0]}") from error
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        try:
            made: models.SelfSupervised
            if self.own.objective == "mae":
                made = models.MaskedAutoencoderForSelfSupervision(backbone, self.own.mask_ratio)
            else:
                made = models.SelfDistillationForSelfSupervision(backbone, self.own.local_crops, self.own.prototypes, self.own.centring)
        except Unsupported as error:
            raise Unsupported(f"{model}: {error}") from None
        self._check_size(made, processor)
        return made.to(backbone.dtype), processor

    def _check_size(self, model: Any, processor: Any) -> None:
        """Refuses pictures that patches do not divide, and masks that leave nothing to read or to draw."""
        from PIL import Image

        height, width = self.pixels([Image.new("RGB", (64, 64))], processor).shape[-2:]
        p = model.side
        if height % p or width % p or height != width:
            near = sorted({max(p, height // p * p), (height // p + 1) * p})
            raise BadValue(
                f"Pictures enter as {height} × {width} pixels, which patches of {p} do not divide into a square; "
                f"choose --image-size {' or '.join(map(str, near))}."
            )
        patches = (height // p) * (width // p)
        kept = int(patches * (1 - self.own.mask_ratio))
        if self.own.objective == "mae" and not kept:
            raise BadValue(
                f"mask_ratio={self.own.mask_ratio} keeps none of the {patches} patches of a picture; choose at most {1 - 1 / patches:.2g}, "
                "or a larger --image-size."
            )

    def before(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """The teacher follows what the adapter trains."""
        teacher = getattr(tuned.model, "teacher", None)
        if teacher is not None:
            tuned.adapters[tuned.active[0]].strategies.append(teacher)
        return []

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        return [{"image": row["image"], "labels": i} for i, row in enumerate(rows)]

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """A picture's loss, then its features: [B, 1 + 2 D]."""
        return logits[0] if isinstance(logits, tuple) else logits

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        found: dict[str, Metric] = {"loss": bootstrap(lambda x: float(x.mean()), kept[:, 0])}
        names = [class_name(row.get(self.options.label or "") or "") for row in rows]
        if len(set(names)) > 1 and len(names) > NEIGHBOURS:
            right = neighbours(kept[:, 1:], names)
            return Measured({**found, "neighbours": proportion(sum(right), len(right))}, right)
        return Measured(found)

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Features of pictures: class token and mean of the patch tokens, one list of numbers each."""
        import torch

        own: Any = model
        first = next(model.parameters())
        model.eval()
        with torch.inference_mode():
            found = [
                own.features(self.pixels(inputs[i : i + batch_size], processor).to(first.device, first.dtype)).float().cpu()
                for i in range(0, len(inputs), batch_size)
            ]
        return [{"features": [round(float(v), 5) for v in row]} for row in torch.cat(found)]


def neighbours(features: np.ndarray, names: Sequence[str]) -> list[bool]:
    """Whether most of the 5 rows of features [n, D] that point most alike have a row's name; of equally many the nearest counts."""
    import numpy as np

    x = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    alike = x @ x.T
    np.fill_diagonal(alike, -np.inf)
    right = []
    for i, near in enumerate(np.argsort(-alike, axis=1)[:, :NEIGHBOURS]):
        votes = [names[j] for j in near]
        right.append(max(votes, key=votes.count) == names[i])
    return right
