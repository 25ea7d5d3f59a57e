"""Tokenizers of a few hundred tokens, in the forms that CLIP's and T5's text encoders take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CONTEXT = 77
"""Tokens that a CLIP text encoder reads."""

WORDS = re.findall(
    r"\S+",
    "a an the of in with and on no one two photo picture sketch drawing dark grey light narrow wide tall low long short sleeves sleeveless "
    "shirt t-shirt trousers pullover dress coat sandal sneaker bag ankle boot handbag shoe top garment strap heel handle collar shade "
    "shape",
)
"""Words that the tiny tokenizer takes as one token each; all others are spelt."""


def clip_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """CLIP's tokenizer with these words as tokens, and with every byte, so that any text can be spelt."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = sorted(bytes_to_unicode().values())
    pieces = dict.fromkeys([*signs, *(s + "</w>" for s in signs)])
    merges: dict[Any, None] = {}
    for word in (part for text in words for part in text.split("-")):
        for end in range(2, len(word) + 1):
            close = "</w>" if end == len(word) else ""
            merges[(word[: end - 1], word[end - 1] + close)] = None
            pieces[word[:end] + close] = None
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=CONTEXT)


def t5_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """T5's tokenizer with these words and all printable characters as pieces."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    spelt = [(chr(i), -4.0) for i in range(33, 127)]
    return T5Tokenizer(vocab=[*special, *spelt, *((f"▁{word}", -2.0) for word in words)], extra_ids=0, model_max_length=512)
