"""Segmentation of satellite time series: a class for every pixel of a patch, from all pictures of a season (arXiv:2310.01825)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadFile, BadValue
from veneer.tasks.classes_file import legend_of_values
from veneer.tasks.data import Row, Table, column
from veneer.tasks.legend import Legend
from veneer.tasks.metric import Measured
from veneer.tasks.series import Outline, outline, pictures
from veneer.tasks.series_batches import padded
from veneer.tasks.task import Options, Task, load_failed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

MODEL = "tsvit-phenology"


class SeriesSegmentation(Task):
    """One class for every pixel. Two classes are told apart by one logit, as in the study; more by one logit each.

    Metrics, pooled over all labelled pixels, with intervals over patches: F1 and accuracy of every class, their means and
    the mean IoU, and the accuracy over pixels.
    """

    slug: ClassVar[str] = "series-segmentation"
    main: ClassVar[str] = "mean_f1"
    grouped: ClassVar[bool] = False

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        column(table, "series", "a folder of .npz files")
        return options

    @classmethod
    def key(cls, options: Options) -> str:
        return "area"

    def said(self) -> str:
        f = self.facts
        sizes = f"{f['channels']} bands, {f['size'][0]} × {f['size'][1]} pixels, up to {f['longest']} dates"
        return f"series, dates, mask ({len(f['labels'])} classes, {sizes})"

    def check(self, table: Table, split: str) -> None:
        found = [outline(row) for row in table.rows]
        if split == "train":
            self.facts |= {"channels": found[0].shape[1], "size": list(found[0].shape[2:])}
            self.facts |= self.legend_of(table, found).facts
        for one in found:
            self.check_one(one)
        self.facts["longest"] = max(self.facts.get("longest", 0), *(one.shape[0] for one in found))

    def legend_of(self, table: Table, found: Sequence[Outline]) -> Legend:
        """The classes: those of the folder, else the values in the training masks."""
        import numpy as np

        if table.rows[0].get("classes"):
            return Legend.of(table.rows[0]["classes"])
        values = [np.unique(one.mask) for one in found if one.mask is not None]
        return legend_of_values(np.unique(np.concatenate(values)).tolist() if values else [], table.source)

    def check_one(self, one: Outline) -> None:
        """Raises `BadValue` or `BadFile` for a patch without mask, or unlike the first one in bands or size."""
        if one.mask is None:
            raise BadFile(f"{one.where} has no array 'mask', so nothing can be learned or measured on it. Add one, or leave the file out.")
        _, channels, *size = one.shape
        if channels != self.facts["channels"]:
            raise BadValue(f"{one.where} has {channels} bands, the first patch {self.facts['channels']}. All patches need the same bands.")
        if size != self.facts["size"]:
            first = " × ".join(map(str, self.facts["size"]))
            raise BadValue(f"{one.where} is {size[0]} × {size[1]} pixels, the first patch {first}. Cut all patches to one size.")
        self.classes(one)

    def classes(self, one: Outline) -> np.ndarray:
        """Class indices [height, width], 255 where nothing is known. Raises `BadValue` for a value that is no class."""
        try:
            return Legend.of(self.facts).indices(one.mask)
        except BadValue as error:
            raise BadValue(f"{one.where}: {error}") from None

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoConfig

        from veneer.assets import resolve
        from veneer.models.tsvit import TSViTConfig, TSViTForSemanticSegmentation

        folder, labels = resolve(model), self.facts["labels"]
        try:
            config = AutoConfig.from_pretrained(folder)
            if not isinstance(config, TSViTConfig):
                raise BadValue(f"{self.slug} needs a TSViT; {model!r} is a {config.model_type}. Give {MODEL}, or the folder of a TSViT.")
            self.check_fit(config, model)
            if not _knows(config, labels):  # other classes than the tokens': a linear layer from these to those, as in the study
                config.num_outputs = 1 if len(labels) == 2 else len(labels)
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
            loaded = TSViTForSemanticSegmentation.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **kwargs)
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        return loaded, None

    def check_fit(self, config: Any, model: str) -> None:
        """Raises `BadValue` for data that the model cannot read."""
        height, width = self.facts["size"]
        side, make = config.image_size, "make a model with TSViTConfig"
        if height != width or height != side:
            raise BadValue(
                f"The patches are {height} × {width} pixels, {model!r} reads {side} × {side}. "
                f"Cut them to that, or {make}(image_size={height})."
            )
        if self.facts["channels"] != config.num_channels:
            raise BadValue(
                f"The patches have {self.facts['channels']} bands, {model!r} reads {config.num_channels}. "
                f"Give the bands it was trained on, or {make}(num_channels={self.facts['channels']})."
            )
        if self.facts["longest"] > config.max_dates:
            raise BadValue(
                f"A series has {self.facts['longest']} dates, {model!r} takes at most {config.max_dates}. "
                f"Leave dates out, or {make}(max_dates={self.facts['longest']})."
            )

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        return Patches(self, rows)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return padded

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """The class of every pixel [batch, height, width]."""
        import torch

        given = logits[0] if isinstance(logits, tuple) else logits
        return (given[:, 0] > 0 if given.shape[1] == 1 else given.argmax(1)).to(torch.uint8)

    # -- results ------------------------------------------------------------------------------------------------

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        from veneer.tasks.series_scores import measured

        return measured(kept, [self.classes(outline(row)) for row in rows], self.facts["labels"])

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 16) -> list[dict[str, Any]]:
        """The class of every pixel, and the share of each class, for patches: .npz files, or mappings with `series` and `dates`."""
        import torch

        config: Any = model.config
        device = next(model.parameters()).device
        model.eval()
        found: list[Any] = []
        with torch.inference_mode():
            for i in range(0, len(inputs), batch_size):
                batch = padded([_item(one, self, config) for one in inputs[i : i + batch_size]])
                found += self.reduce(model(**{k: v.to(device) for k, v in batch.items()}).logits, torch.empty(0)).cpu()
        return [_answer(classes, self.facts["labels"]) for classes in found]


class Patches(Sequence):
    """Rows whose pictures are read only when a batch needs them."""

    def __init__(self, task: SeriesSegmentation, rows: Sequence[Row]) -> None:
        self.task, self.rows = task, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        known = outline(row)
        return {"series": pictures(row), "days": known.days, "labels": self.task.classes(known)}


def _knows(config: Any, labels: Sequence[str]) -> bool:
    """Whether a model's outputs are these classes; one whose classes have no names yet takes as many as it has tokens."""
    names = list((config.id2label or {}).values())
    unnamed = all(name.startswith("LABEL_") for name in names) and config.num_outputs is None
    return names == list(labels) or (unnamed and config.num_classes == len(labels))


def _item(given: Any, task: SeriesSegmentation, config: Any) -> dict[str, Any]:
    known = outline(given)
    T, channels, *size = known.shape
    checker = type(task)(task.options, None, {**task.facts, "channels": channels, "size": size, "longest": T})
    checker.check_fit(config, known.where)
    return {"series": pictures(given), "days": known.days}


def _answer(classes: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    counts = classes.flatten().long().bincount(minlength=len(labels)).double()
    shares = counts / counts.sum()
    top = int(shares.argmax())
    shown = dict(zip(labels, shares.tolist()))
    return {"label": labels[top], "share": float(shares[top]), "shares": shown, "mask": classes.tolist()}
