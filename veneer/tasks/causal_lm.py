"""Causal language modelling: predict every next token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, Metric, bootstrap
from veneer.tasks.task import Options, Task, check_text, load_failed, text_columns

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

MAX_LENGTH = 512
IGNORED = -100
"""Label of tokens that bear no loss."""


class CausalLM(Task):
    """Every next token of each text. Metrics: loss per token and perplexity (bootstrap over texts)."""

    slug: ClassVar[str] = "causal-lm"
    main: ClassVar[str] = "loss"
    per_token: ClassVar[bool] = True
    greater: ClassVar[bool] = False

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        return text_columns(table, options, label=False)

    def check(self, table: Table, split: str) -> None:
        check_text(table, self.options, split)

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from veneer.assets import resolve

        folder = resolve(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return loaded, tokenizer

    def limit(self, tokenizer: Any) -> int:
        """The longest text in tokens."""
        return min(self.options.max_length or MAX_LENGTH, tokenizer.model_max_length)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        made = processor([row[self.options.text or "text"] for row in rows], truncation=True, max_length=self.limit(processor))
        return [{"input_ids": ids, "labels": list(ids)} for ids in made["input_ids"]]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return lambda items: pad(items, processor.pad_token_id)

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """Summed loss and number of answer tokens of every row [batch, 2]; the logits [batch, length, words] are not kept."""
        import torch

        scores = logits[0] if isinstance(logits, tuple) else logits
        scores = scores[:, -labels.shape[1] :]  # soft prompts put positions in front
        rows = []
        for one, target in zip(scores, labels):  # row by row: a whole batch of log-probabilities may not fit
            loss = torch.nn.functional.cross_entropy(one[:-1].float(), target[1:], ignore_index=IGNORED, reduction="sum")
            rows.append(torch.stack([loss, (target[1:] != IGNORED).sum().to(loss.dtype)]))
        return torch.stack(rows)

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        loss = bootstrap(lambda parts: float(parts[:, 0].sum() / max(parts[:, 1].sum(), 1)), kept)
        value, low, high = (math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
        return Measured({"loss": loss, "perplexity": Metric(value, low, high, loss.n)})

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """Continuations of the given texts."""
        texts = [item if isinstance(item, str) else item.get(self.options.text) for item in inputs]
        if not all(isinstance(t, str) and t for t in texts):
            raise BadValue("predict: give texts to continue, as strings.")
        prompts = [processor(text)["input_ids"] for text in texts]
        return [{"text": text} for text in continue_prompts(model, processor, prompts, self.options.max_new_tokens, batch_size)]


def pad(items: list[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """Rows of different length as one batch, padded on the right; padding bears no loss."""
    import torch

    longest = max(len(item["input_ids"]) for item in items)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([list(item[name]) + [value] * (longest - len(item[name])) for item in items])

    mask = torch.tensor([[1] * len(item["input_ids"]) + [0] * (longest - len(item["input_ids"])) for item in items])
    return {"input_ids": filled("input_ids", filler), "attention_mask": mask, "labels": filled("labels", IGNORED)}


def continue_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int, batch_size: int) -> list[str]:
    """Greedy continuations of token lists, padded on the left; prompts of similar length share a batch."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, row in zip(chosen, out):
            answers[i] = tokenizer.decode(row[longest:], skip_special_tokens=True).strip()
    return answers
