"""Preference data: a prompt with a better and a worse answer a row, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import BadValue, nearest
from veneer.tasks.data import Data, Row, Splits, Table, read, split

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"


@dataclass(frozen=True)
class Pairs:
    """Checked rows with the columns `prompt` (a text or messages), `chosen` and `rejected` (texts)."""

    splits: Splits

    @classmethod
    def read(cls, source: str | Data, limits: tuple[int | None, int | None, int | None] = (None, None, None)) -> Pairs:
        """Pairs of a file or data set, split by prompt. Raises `BadValue` naming the line of a row that is no pair."""
        data = read(source) if isinstance(source, str) else source
        for table in data.tables.values():
            check(table)
        return cls(split(data, PROMPT, limits))


def check(table: Table) -> None:
    """Raises `BadValue` with the place of the first row that is no pair."""
    for name in (PROMPT, CHOSEN, REJECTED):
        if name not in table.columns:
            raise BadValue(
                f"{table.source} has no column {name!r}.{nearest(name, table.columns)} "
                f"Preference data have {PROMPT}, {CHOSEN} and {REJECTED}; this has {', '.join(table.columns)}."
            )
    for i, row in enumerate(table.rows):
        problem = _problem(row)
        if problem:
            raise BadValue(f"{table.place(i)}: {problem}")


def _problem(row: Row) -> str:
    prompt = row.get(PROMPT)
    if not (isinstance(prompt, str) and prompt.strip()) and not _messages(prompt):
        return f"{PROMPT!r} is empty; give a text, or a list of messages that ends with the user's."
    for name in (CHOSEN, REJECTED):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"there is no {name} answer; every row needs a better and a worse one."
    if row[CHOSEN].strip() == row[REJECTED].strip():
        return "both answers are the same, so nothing is preferred; leave the row out."
    return ""


def _messages(prompt: Any) -> bool:
    good = isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    return good and prompt[-1]["role"] == "user"


def conversation(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def for_trl(rows: Sequence[Row], template: bool) -> list[dict[str, Any]]:
    """Rows as TRL takes them: messages where the tokenizer has a chat template, else texts."""
    if template:
        return [
            {
                "prompt": conversation(row[PROMPT]),
                "chosen": [{"role": "assistant", "content": row[CHOSEN]}],
                "rejected": [{"role": "assistant", "content": row[REJECTED]}],
            }
            for row in rows
        ]
    return [{"prompt": flat(row[PROMPT]), "chosen": row[CHOSEN], "rejected": row[REJECTED]} for row in rows]


def flat(prompt: Any) -> str:
    """A prompt as one text that an answer can follow."""
    if isinstance(prompt, str):
        return prompt if prompt[-1:].isspace() else prompt + "\n"
    return "".join(f"{m['role']}: {m['content']}\n" for m in prompt) + "assistant: "


def batches(rows: Sequence[Row], tokenizer: Any, size: int, limit: int, device: Any) -> Any:
    """Batches for `veneer.train.preference.pair_logps`: first the better answers of some rows, then their worse ones."""
    from veneer.tasks.causal_lm import pad
    from veneer.tasks.chat import encode_conversation

    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        items = []
        for name in (CHOSEN, REJECTED):
            for row in part:
                if tokenizer.chat_template:
                    told = [*conversation(row[PROMPT]), {"role": "assistant", "content": row[name]}]
                    items.append(encode_conversation(told, tokenizer, limit))
                    continue
                asked = tokenizer(flat(row[PROMPT]), add_special_tokens=False)["input_ids"]
                answer = [*tokenizer(row[name], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                items.append({"input_ids": [*asked, *answer][:limit], "labels": [*[-100] * len(asked), *answer][:limit]})
        yield {k: v.to(device) for k, v in pad(items, tokenizer.pad_token_id).items()}
