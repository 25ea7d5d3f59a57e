"""Prompt tuning: learned vectors stand before the text's token embeddings (2021, arXiv:2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import uniform, zeros
from veneer.method import Params, PromptMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """X′ = [P ; X], or [X_0 ; P ; X_1 …] with after_first, on the token embeddings X; masks and labels follow

    Pick it for large models with many tasks: length · D numbers a task, and one batch can mix tasks. Not for small
    models or few steps, where it trails; it needs learning rates of 1e-3 to 1e-1.

    Tensors: P [length, D]. start="vocabulary": embeddings of tokens drawn from the first `common` ids; "uniform":
    in ±0.5; "text": the rows of `text_ids`, cut or repeated; "labels": row i is the mean embedding of label_ids[i],
    the rest as "vocabulary". No start equals the base.

    Args:
        after_first: insert after the first token; None does so in encoders, whose first token is pooled.
    """

    length: int = option(20, "number of learned tokens", ge=1)
    start: str = option("vocabulary", "where P starts", choices=("vocabulary", "uniform", "text", "labels"))
    common: int = option(5000, "draw start tokens from this many first ids", ge=1)
    text_ids: tuple[int, ...] = option((), "token ids of the start text")
    label_ids: tuple[tuple[int, ...], ...] = option((), "token ids of each label")
    after_first: bool | None = option(None, "insert after the first token; None: in encoders")

    default_lr = 1e-2
    sizes = ("length",)
    default_targets = "model"
    aliases = {"Pn": "length", "num_virtual_tokens": "length", "prompt_length": "length", "init": "start"}
    limits = {
        "identity": "extra tokens change attention from the start",
        "merge": "tokens are added to the input; no weight holds them",
    }

    def validate(self) -> None:
        for start, name, given in (("text", "text_ids", self.text_ids), ("labels", "label_ids", self.label_ids)):
            if self.start == start and not (given and all(isinstance(i, int) or i for i in given)):
                raise BadValue(f"PromptTuning: start={start!r} needs token ids; give {name}=(…) from the tokenizer or start='vocabulary'.")

    def init(self, site: Site, generator: Generator) -> Params:
        shape = (self.length, site.in_features)
        return {"P": uniform(shape, generator, 0.5) if self.start == "uniform" else zeros(shape)}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        if self.start == "uniform":
            return p
        self.check_ids(len(W))
        if self.start == "text":
            text = [self.text_ids[i % len(self.text_ids)] for i in range(self.length)]
            return {"P": W[text].clone()}
        drawn = torch.randint(min(self.common, len(W)), (self.length,), generator=generator)
        P = W[drawn.to(W.device)].clone()
        for row, ids in enumerate(self.label_ids[: self.length] if self.start == "labels" else ()):
            P[row] = W[list(ids)].mean(0)
        return {"P": P}

    def check_ids(self, vocabulary: int) -> None:
        for i in (*self.text_ids, *(i for ids in self.label_ids for i in ids)):
            if not 0 <= i < vocabulary:
                raise BadValue(
                    f"PromptTuning: token id {i} is outside the model's vocabulary of {vocabulary}; use the model's own tokenizer."
                )

    def tokens(self, p: Params, site: Site) -> Tensor:
        return p["P"]
