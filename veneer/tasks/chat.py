"""Chat fine-tuning: messages in, loss on the assistant's answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.tasks.causal_lm import IGNORED, CausalLM, continue_prompts
from veneer.tasks.data import Row, Table
from veneer.tasks.task import ANSWERS, PROMPTS, Options, _first

if TYPE_CHECKING:
    from torch import nn

ROLES = ("system", "user", "assistant", "tool")
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Used where the tokenizer has no chat template of its own."""


class Chat(CausalLM):
    """Conversations, one a row: a column `messages` of {"role", "content"}, or a prompt and an answer column.

    The tokenizer's own chat template is used. Metrics: loss per answer token and perplexity (bootstrap over conversations).
    """

    slug: ClassVar[str] = "chat"

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        import dataclasses

        if "messages" in table.columns and options.text is None:
            return dataclasses.replace(options, text=None, label=None)
        text = options.text or _first(PROMPTS, table.columns)
        answer = options.label or _first([a for a in ANSWERS if a != text], table.columns)
        if not text or not answer or text not in table.columns or answer not in table.columns:
            raise BadValue(
                f"{table.source}: chat needs a column 'messages', or a prompt and an answer column (--text, --label). "
                f"It has: {', '.join(table.columns)}."
            )
        return dataclasses.replace(options, text=text, label=answer)

    def check(self, table: Table, split: str) -> None:
        for i, row in enumerate(table.rows):
            problem = _problem(self.messages(row))
            if problem:
                raise BadValue(f"{table.place(i)} ({split}): {problem}")

    @classmethod
    def key(cls, options: Options) -> str:
        return options.text or "messages"

    def messages(self, row: Row) -> Any:
        """The row's conversation."""
        if self.options.text is None:
            return row.get("messages")
        return [
            {"role": "user", "content": row.get(self.options.text)},
            {"role": "assistant", "content": row.get(self.options.label or "")},
        ]

    def encode(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        encoded = [encode_conversation(self.messages(row), processor, self.limit(processor)) for row in rows]
        if rows and all(label == IGNORED for item in encoded for label in item["labels"]):
            raise BadValue(f"No answer fits into max_length={self.limit(processor)} tokens; give a larger --max-length.")
        return encoded

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """The assistant's next message for each input: a question, or a list of messages."""
        conversations = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in inputs]
        prompts = [_tokens(messages, processor, ask=True) for messages in conversations]
        return [{"text": text} for text in continue_prompts(model, processor, prompts, self.options.max_new_tokens, batch_size)]


def encode_conversation(messages: Sequence[dict[str, str]], tokenizer: Any, limit: int) -> dict[str, list[int]]:
    """Token ids of a conversation, cut to `limit`, with labels on the answers' tokens only.

    Raises `BadValue` if the chat template changes earlier turns when later ones are added, so that answers cannot be found.
    """
    ids = _tokens(messages, tokenizer, ask=False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _tokens(messages[:i], tokenizer, ask=True), _tokens(messages[: i + 1], tokenizer, ask=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            if i + 1 == len(messages) and ids[: len(before)] == before:
                after = ids
            else:
                raise BadValue("The chat template rewrites earlier turns, so the answers cannot be told apart. Give one answer a row.")
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return {"input_ids": ids[:limit], "labels": labels[:limit]}


def _tokens(messages: Sequence[dict[str, str]], tokenizer: Any, ask: bool) -> list[int]:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, chat_template=template)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _problem(messages: Any) -> str:
    """What is wrong with a conversation, or ""."""
    if not isinstance(messages, list) or not messages:
        return "'messages' must be a non-empty list."
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'message {number} must be {{"role": …, "content": …}}.'
        if message["role"] not in ROLES:
            return f"message {number} has the role {message['role']!r}; legal are {', '.join(ROLES)}."
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return f"message {number} ({message['role']}) has no text under 'content'."
    if not any(message["role"] == "assistant" for message in messages):
        return "there is no answer: no message has the role 'assistant'."
    return ""
