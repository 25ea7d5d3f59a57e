"""What tasks share whose answers are Python code: a prompt and a fenced block, loss on the code alone, answers by beam search."""

from __future__ import annotations

import ast
import random
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.option import option
from veneer.tasks.causal_lm import IGNORED, CausalLM
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, Metric
from veneer.tasks.task import Options, Settings, _first

if TYPE_CHECKING:
    from torch import nn

FENCE = "```"
RESAMPLES = 50


@dataclass(frozen=True)
class CodeSettings(Settings):
    beams: int = option(1, "width of the beam search; as many answers are scored", ge=1)
    shots: int = option(0, "examples of the training rows in front of every prompt", ge=0)
    execute: bool = option(True, "run answers where the data have tests, locked in, without network")
    seconds: float = option(5.0, "longest run of one answer", gt=0)
    megabytes: int = option(512, "most memory of one answer's run", ge=64)
    published: bool = option(True, "CodeBLEU with the published brevity penalty, for comparison with papers")


class Code(CausalLM):
    """A text in, Python code out; subclasses say how a row is asked and how answers are scored."""

    settings: ClassVar[type[Settings]] = CodeSettings
    headline: ClassVar[str] = "pass@1"
    asks: ClassVar[tuple[str, ...]]
    """Names that the column of the question may have."""
    answers: ClassVar[tuple[str, ...]]
    """Names that the column of the code may have."""

    @abstractmethod
    def question(self, text: str) -> str:
        """The prompt of a row, up to where the code begins."""

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Measured:
        """Metrics of the answers of every row, best first."""

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        text = options.text or _first(cls.asks, table.columns)
        label = options.label or _first([name for name in cls.answers if name != text], table.columns)
        if text not in table.columns or label not in table.columns:
            raise BadValue(
                f"{table.source}: {cls.slug} needs a column of {cls.asks[0]}s and one of code (--text, --label). "
                f"It has: {', '.join(table.columns)}."
            )
        return replace(options, text=text, label=label)

    def check(self, table: Table, split: str) -> None:
        for i, row in enumerate(table.rows):
            for name in (self.options.text, self.options.label):
                if not isinstance(row.get(name or ""), str) or not row[name or ""].strip():
                    raise BadValue(f"{table.place(i)} ({split}): the column {name!r} is empty or no text.")
        if split == "train" and self.own.shots:
            if self.own.shots > len(table.rows):
                raise BadValue(f"{table.source}: shots={self.own.shots} are more than its {len(table.rows)} training rows.")
            shown = random.Random(42).sample(table.rows, self.own.shots)
            self.facts["shots"] = [[row[self.options.text or ""], row[self.options.label or ""]] for row in shown]

    def prompt(self, text: str, shots: int | None = None) -> str:
        """What the model sees in front of the code: examples, then the question."""
        examples = self.facts.get("shots", [])[:shots]
        return "".join(f"{self.question(asked)}{code.rstrip()}\n{FENCE}\n\n" for asked, code in examples) + self.question(text)

    def fitting(self, text: str, tokenizer: Any, room: int) -> list[int]:
        """The prompt's tokens, with as many examples as leave room; the question alone is never cut."""
        for shots in range(len(self.facts.get("shots", [])), -1, -1):
            ids: list[int] = tokenizer(self.prompt(text, shots))["input_ids"]
            if len(ids) <= room:
                break
        if shots < len(self.facts.get("shots", [])):
            warnings.warn(f"{self.slug}: only {shots} of {self.own.shots} examples fit in front of a question.", stacklevel=2)
        return ids

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        limit, made = self.limit(processor), []
        for row in rows:
            code = processor(row[self.options.label or ""].rstrip() + f"\n{FENCE}", add_special_tokens=False)["input_ids"]
            asked = self.fitting(row[self.options.text or ""], processor, limit - len(code))
            made.append({"input_ids": [*asked, *code][:limit], "labels": [*[IGNORED] * len(asked), *code][:limit]})
        silent = sum(all(label == IGNORED for label in item["labels"]) for item in made)
        if silent == len(made) and made:
            raise BadValue(f"No code fits behind its question into max_length={limit} tokens; give a larger --max-length.")
        if silent:
            warnings.warn(f"{silent} of {len(made)} rows bear no loss: the question alone fills max_length={limit} tokens.", stacklevel=2)
        return made

    # -- answers ------------------------------------------------------------------------------------------------

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured:
        return self.score(rows, self.written(model, processor, [row[self.options.text or ""] for row in rows], batch_size))

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """Code for each text."""
        texts = [item if isinstance(item, str) else item.get(self.options.text) for item in inputs]
        return [{"code": answers[0]} for answers in self.written(model, processor, texts, batch_size)]

    def written(self, model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[list[str]]:
        """`beams` answers for each text, the likeliest first; each ends at its fence."""
        import torch
        from tqdm.auto import tqdm

        new, most = self.options.max_new_tokens, getattr(model.config, "max_position_embeddings", None) or 10**9
        prompts = [self.fitting(text, tokenizer, min(most, 10**6) - new) for text in texts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        starts = range(0, len(order), batch_size)
        found: list[list[str]] = [[] for _ in prompts]
        device, beams = next(model.parameters()).device, self.own.beams
        model.eval()
        for start in tqdm(starts, desc="writing code", leave=False, disable=None):
            chosen = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in chosen)
            ids = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
            with torch.inference_mode():
                out = model.generate(
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    max_new_tokens=new,
                    do_sample=False,
                    num_beams=beams,
                    num_return_sequences=beams,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                    stop_strings=[FENCE],
                    tokenizer=tokenizer,
                )
            for k, i in enumerate(chosen):
                rows = out[k * beams : (k + 1) * beams]
                found[i] = [tokenizer.decode(row[longest:], skip_special_tokens=True).partition(FENCE)[0].strip() for row in rows]
        return found


def parses(code: str) -> bool:
    """Whether it is Python, and not empty."""
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def codebleu_metric(references: Sequence[str], answers: Sequence[str], published: bool) -> Metric:
    """CodeBLEU of the corpus; ± 1.96 standard deviations of resampled corpora."""
    import numpy as np

    from veneer.study.codebleu import codebleu

    value = codebleu([[r] for r in references], answers, published).score
    draw, n, found = np.random.default_rng(0), len(answers), []
    for _ in range(RESAMPLES):
        at = draw.integers(0, n, n)
        found.append(codebleu([[references[i]] for i in at], [answers[i] for i in at], published).score)
    reach = 1.96 * float(np.std(found))
    return Metric(value, value - reach, value + reach, n)
