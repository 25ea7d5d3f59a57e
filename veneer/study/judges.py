"""Judges: a model behind any OpenAI-compatible address, or one that is loaded here."""

from __future__ import annotations

import os
from typing import Any

from veneer.errors import BadValue, VeneerError
from veneer.study.judge import Judge

KEY = "VENEER_JUDGE_KEY"
"""Environment variable that holds the key of a remote judge, if it wants one."""


class JudgeFailed(VeneerError):
    """A remote judge that does not answer."""


def remote(address: str, model: str, timeout: float = 120.0) -> Judge:
    """A judge behind `address` (…/v1), asked greedily.

    The key is taken from $VENEER_JUDGE_KEY. Raises `JudgeFailed` with the address when it cannot be asked.
    """
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=address, api_key=os.environ.get(KEY) or "none", timeout=timeout)

    def judge(prompt: str) -> str:
        try:
            said: Any = client.chat_completion([{"role": "user", "content": prompt}], model=model, temperature=0.0, max_tokens=400)
        except Exception as error:  # the client raises its HTTP library's errors as well as its own
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise JudgeFailed(f"The judge at {address} does not answer: {reason}. Is the address right, and {KEY} set?") from error
        return said.choices[0].message.content or ""

    return judge


def local(name: str) -> Judge:
    """A judge loaded here: a model folder, a hub name or a short name. Raises `VeneerError` if it is none."""
    from veneer.tasks.causal_lm import continue_prompts
    from veneer.tasks.chat import Chat, _tokens
    from veneer.tasks.task import Options
    from veneer.train.recipe import check_model

    check_model(name)
    model, tokenizer = Chat(Options()).load(name)

    def judge(prompt: str) -> str:
        ids = _tokens([{"role": "user", "content": prompt}], tokenizer, ask=True)
        most = getattr(model.config, "max_position_embeddings", None)
        if most and len(ids) >= most:
            raise BadValue(f"A question with its answers takes {len(ids)} tokens, more than the judge {name} sees ({most}).")
        return continue_prompts(model, tokenizer, [ids], 200, 1)[0]

    return judge
