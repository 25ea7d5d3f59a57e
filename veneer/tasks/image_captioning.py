"""Image captioning: a language model that sees pictures as a few tokens writes what is in them (2023, arXiv:2312.08900)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue, MissingExtra
from veneer.option import option
from veneer.tasks.causal_lm import IGNORED, CausalLM, pad
from veneer.tasks.data import Row, Table, column
from veneer.tasks.faces import picture_size
from veneer.tasks.image_classification import open_picture
from veneer.tasks.metric import Measured, bootstrap, proportion
from veneer.tasks.task import CAPTIONS, LABEL_NAMES, Options, Settings, _first, check_text, load_failed

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_LENGTH = 64
"""Tokens of a caption."""
IMAGE_SIZE = 112
INSTALL = "pip install 'veneer[captions]'"


@dataclass(frozen=True)
class Seeing(Settings):
    vision: str = option("dinov2-small", "vision tower: a folder, a hub name or a short name")
    image_tokens: int = option(16, "tokens in which the language model sees a picture: a square number", ge=1)


@dataclass(frozen=True)
class Reader:
    """What prepares both halves of a row.

    Args:
        tokenizer: the language model's. images: the tower's image processor.
        prompt: token ids in front of a caption: the beginning of text, if there is one, and the picture's places.
        room: tokens that the language model can read behind them.
    """

    tokenizer: Any
    images: Any
    prompt: list[int]
    room: int


class ImageCaptioning(CausalLM):
    """A caption for each picture. Metrics: loss per caption token and perplexity; of written captions the mean BLEU-4 (smoothed,
    against the row's own caption), and accuracy: how many hold the row's label as a word, where the data have a label column."""

    slug: ClassVar[str] = "image-captioning"
    settings: ClassVar[type[Settings]] = Seeing

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        import dataclasses

        column(table, "image", "a column 'image' or 'file_name' with the pictures' files")
        text = options.text or _first(CAPTIONS, table.columns)
        if text is None:
            raise BadValue(f"{table.source}: no column is called caption; there are {', '.join(table.columns)}. Name it with --text.")
        label = options.label or _first(LABEL_NAMES, [c for c in table.columns if c != text])
        return dataclasses.replace(options, text=column(table, text, "--text"), label=label and column(table, label, "--label"))

    @classmethod
    def key(cls, options: Options) -> str:
        return "image"

    def check(self, table: Table, split: str) -> None:
        if split == "train":
            self.check_setting()
        check_text(table, self.options, split)
        for i, row in enumerate(table.rows):
            picture_size(row.get("image"), f"{table.place(i)} ({split})")

    def check_setting(self) -> None:
        """Raises `BadValue` for options, and `MissingExtra` for a package, that would fail later."""
        import importlib.util

        from veneer.train.recipe import check_model

        n = self.own.image_tokens
        side = math.isqrt(n)
        if side**2 != n:
            raise BadValue(f"image_tokens={n} is no square number; choose {side**2} or {(side + 1) ** 2}.")
        check_model(self.own.vision)
        if importlib.util.find_spec("torchmetrics") is None:
            raise MissingExtra(f"Captions are compared by the package torchmetrics. Run: {INSTALL}")

    def said(self) -> str:
        return f"{super().said()}; {self.own.vision} (vision=…), {self.own.image_tokens} image tokens (image_tokens=…)"

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoImageProcessor, AutoTokenizer

        from veneer.assets import resolve
        from veneer.models.captioner import CaptionerConfig, ImageTokensForCaptioning
        from veneer.models.vision_tower import model_type

        own = self.own
        made: Any
        try:
            if model_type(model) == CaptionerConfig.model_type:  # merged earlier
                made, tokenizer = ImageTokensForCaptioning.from_pretrained(model, **kwargs), AutoTokenizer.from_pretrained(model)
            else:
                language, tokenizer = super().load(model, **kwargs)
                made = ImageTokensForCaptioning.over(language, own.vision, own.image_tokens, dtype=language.dtype)  # type: ignore[arg-type]
            images = AutoImageProcessor.from_pretrained(resolve(made.config.vision))
        except (OSError, ValueError) as error:
            raise load_failed(own.vision, error) from error
        if tokenizer.eos_token_id is None:
            raise BadValue(f"The tokenizer of {model} has no end-of-text token, so a caption could not end. Choose another language model.")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompt = begin + [made.config.image_token_id] * made.config.image_tokens
        positions = getattr(made.config.text_config, "max_position_embeddings", None) or 10**6
        return made, Reader(tokenizer, images, prompt, positions - len(prompt))

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        """Raises `BadValue` for a caption that does not fit: a cut one would teach to stop in the middle."""
        prompt, end = processor.prompt, processor.tokenizer.eos_token_id
        asked = self.options.max_length or MAX_LENGTH
        made = processor.tokenizer([row[self.options.text or ""] for row in rows], add_special_tokens=False)["input_ids"]
        encoded = []
        for row, ids in zip(rows, made):
            if len(ids) + 1 > min(asked, processor.room):
                advice = "give more with --max-length" if processor.room > asked else "that is all the language model can read"
                raise BadValue(
                    f"The caption {str(row[self.options.text or ''])[:60]!r}… has {len(ids) + 1} tokens with its end, "
                    f"and at most {min(asked, processor.room)} fit: {advice}, or shorten it."
                )
            encoded.append({"input_ids": [*prompt, *ids, end], "labels": [IGNORED] * len(prompt) + [*ids, end], "image": row["image"]})
        return encoded

    def pixels(self, pictures: Sequence[Any], reader: Reader) -> Tensor:
        """Pictures as the tower wants them, [n, 3, side, side]."""
        side = self.options.image_size or IMAGE_SIZE
        size = {"size": {"height": side, "width": side}, "do_center_crop": False}
        return reader.images([open_picture(p) for p in pictures], return_tensors="pt", **size)["pixel_values"]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {
                **pad(items, processor.tokenizer.pad_token_id),
                "pixel_values": self.pixels([item["image"] for item in items], processor),
            }

        return collate

    # -- results ------------------------------------------------------------------------------------------------

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured | None:
        """Writes a caption for every row and compares it with the row's own."""
        import numpy as np
        from torchmetrics.functional.text import bleu_score

        written = self.written(model, processor, [row["image"] for row in rows], batch_size)
        alike = [float(bleu_score([said], [[row[self.options.text or ""]]], smooth=True)) for said, row in zip(written, rows)]
        metrics = {"bleu": bootstrap(lambda values: float(values.mean()), np.array(alike))}
        if self.options.label is None:
            return Measured(metrics)
        right = [names(said, str(row[self.options.label])) for said, row in zip(written, rows)]
        return Measured({**metrics, "accuracy": proportion(sum(right), len(right))}, right)

    def written(self, model: nn.Module, processor: Any, pictures: Sequence[Any], batch_size: int) -> list[str]:
        """Greedy captions of pictures."""
        import torch

        first, tokenizer = next(model.parameters()), processor.tokenizer
        most = min(self.options.max_new_tokens, self.options.max_length or MAX_LENGTH, processor.room)
        settings = {"max_new_tokens": most, "do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
        captions = []
        model.eval()
        for start in range(0, len(pictures), batch_size):
            pixels = self.pixels(pictures[start : start + batch_size], processor).to(first.device)
            ids = torch.tensor([processor.prompt] * len(pixels), device=first.device)
            with torch.inference_mode():
                new = model.generate(ids, pixels, torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, **settings)  # type: ignore[operator]
            captions += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        return captions

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 16) -> list[dict[str, Any]]:
        """Captions of pictures: files, PIL images, or arrays [height, width] or [height, width, 3]."""
        return [{"caption": said} for said in self.written(model, processor, inputs, batch_size)]


def names(caption: str, label: str) -> bool:
    """Whether the label stands in the caption as a word of its own ("shirt" is not in "T-shirt"), in whatever case."""
    return re.search(rf"(?<![\w-]){re.escape(label)}(?![\w-])", caption, re.IGNORECASE) is not None
