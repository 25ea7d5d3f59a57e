"""What an adapter on a large model takes: bytes, traffic and the least time, worked out from shapes before anything is rented.

The model is made on `meta`, packed and adapted by the library itself, and its tensors are counted as FSDP2 would hold them:
every parameter split along its first axis over all GPUs, blocks gathered one at a time. `scale_run` holds the same numbers
against two real processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import veneer
from veneer import anatomy
from veneer.filling import is_packed, units
from veneer.part import Tensors

SHARE, SHARE_OF_SCALES = 64, 256
"""NF4 with double quantisation: values that share a scale of one byte, scales that share one of four bytes."""
TABLES = 4 * (16 + 256)
"""Bytes of the two tables beside every 4-bit weight: what each code, and each packed scale, stands for."""
ADAM = 2 * 4
"""Bytes of AdamW's two moments for one trained number."""


@dataclass(frozen=True)
class GPU:
    """Datasheet numbers of one GPU and its links; peaks, so times worked out from them are bounds.

    Args:
        memory: bytes. flops: of dense bf16 products a second. hbm, nvlink, network: bytes a second, the links one way.
        node: GPUs that NVLink joins.
    """

    name: str = "H100 SXM 80 GB"
    memory: float = 80e9
    flops: float = 989e12
    hbm: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8


RESERVE = 4e9
"""Bytes left for the driver's context, communication buffers and fragmentation."""
UTILISATION = 0.4
"""Share of the peak rate that large models commonly reach in training; only the column that says so uses it."""


@dataclass(frozen=True)
class Llama:
    """The dimensions of a Llama."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    def parts(self) -> dict[str, int]:
        """Parameters by part, closed formulas; the linear layers are those of one block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn.q": self.width * q,
            "attn.k": self.width * kv,
            "attn.v": self.width * kv,
            "attn.o": q * self.width,
            "mlp.gate": self.width * self.mlp,
            "mlp.up": self.width * self.mlp,
            "mlp.down": self.mlp * self.width,
            "norms of a block": 2 * self.width,
            "embedding": self.vocabulary * self.width,
            "final norm": self.width,
            "head": self.vocabulary * self.width,
        }

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of one block: what 4 bits are for."""
        return sum(n for name, n in self.parts().items() if name.startswith(("attn.", "mlp.")))

    @property
    def total(self) -> int:
        parts = self.parts()
        return self.layers * (self.linear + parts["norms of a block"]) + parts["embedding"] + parts["final norm"] + parts["head"]

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim, tie_word_embeddings=False,
            use_cache=False,
        )  # fmt: skip

    def empty(self, dtype: torch.dtype = torch.bfloat16, four_bit: bool = False) -> nn.Module:
        """The model on `meta`."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model: nn.Module = LlamaForCausalLM(self.config())
        model = model.to(dtype)
        return veneer.pack(model) if four_bit else model


LLAMA_70B = Llama("Llama 70B", 80, 8192, 64, 8, 128, 28672, 128256)
LLAMA_405B = Llama("Llama 405B", 126, 16384, 128, 8, 128, 53248, 128256)


# -- memory and traffic by the tensors there are -----------------------------------------------------------------


def nf4_codes(values: int) -> int:
    """Bytes of the packed codes: two values a byte."""
    return math.ceil(values / 2)


def nf4_scales(values: int) -> int:
    """Bytes of the scales: one for 64 values, four for 256 scales, and their mean."""
    scales = math.ceil(values / SHARE)
    return scales + 4 * math.ceil(scales / SHARE_OF_SCALES) + 4


@dataclass(frozen=True)
class Held:
    """One parameter: how it is split and what it weighs.

    Args:
        unit: path of the block, embedding or head that is gathered with it, "" for the rest of the model.
        rows, row: length of the first axis, and bytes of one entry along it. values: numbers it stands for.
    """

    unit: str
    rows: int
    row: int
    values: int
    trained: bool
    packed: bool

    def piece(self, gpus: int) -> int:
        """Bytes that every process holds: the longest of the equal runs of rows, as FSDP2 pads the others to it."""
        return math.ceil(self.rows / gpus) * self.row


class Account:
    """Bytes and traffic of one model with its adapter, for one GPU of several.

    Args:
        model: on `meta`, with its adapters attached; `veneer.pack`ed where the base is to be 4-bit.
    """

    def __init__(self, model: nn.Module):
        self.units = units(model)
        self.blocks = {s.module for s in anatomy.sites(model) if s.kind == "block"}
        self.held: list[Held] = []
        self.buffers = 0
        known = set(self.units)
        for path, module in model.named_modules():
            names = path.split(".")
            unit = next((u for n in range(len(names)) if (u := ".".join(names[: n + 1])) in known), "")
            for p in (p for p in module._parameters.values() if p is not None):
                self.held.append(_held(p, unit, isinstance(module, Tensors)))
            if isinstance(module, Tensors):
                self.buffers += sum(t.numel() * t.element_size() for t in module._buffers.values() if t is not None)

    def base(self, gpus: int) -> int:
        """The base's weights, split."""
        return sum(h.piece(gpus) for h in self.held if not h.trained)

    @cached_property
    def scales(self) -> int:
        """Scales of the 4-bit weights: bitsandbytes keeps them with the layer, so every process has all of them."""
        return sum(nf4_scales(h.values) for h in self.held if h.packed)

    def adapter(self, gpus: int) -> int:
        """The adapter's trained tensors, split, and its frozen ones, which are not."""
        return sum(h.piece(gpus) for h in self.held if h.trained) + self.buffers

    def gradients(self, gpus: int) -> int:
        return sum(h.piece(gpus) for h in self.held if h.trained)

    def optimiser(self, gpus: int) -> int:
        """AdamW's moments, in float32, and its count of steps for every tensor."""
        return sum(h.piece(gpus) // h.row * (h.row // 4) * ADAM + 4 for h in self.held if h.trained)

    def whole(self, gpus: int) -> dict[str, int]:
        """Bytes of every gathered unit, all GPUs' pieces."""
        found = dict.fromkeys((*self.units, ""), 0)
        for h in self.held:
            found[h.unit] += gpus * h.piece(gpus)
        return found

    def at_once(self, gpus: int) -> int:
        """The most that is gathered at a time: the largest unit, a block that is fetched ahead, and the rest."""
        whole = self.whole(gpus)
        largest = max(whole, key=lambda unit: whole[unit] if unit else 0)
        return whole[largest] + max(whole[b] for b in self.blocks) + whole[""]

    def gathered(self, gpus: int) -> int:
        """Bytes that all-gathers of one step give each process: units forward and backward, the rest once."""
        whole = self.whole(gpus)
        return 2 * sum(whole.values()) - whole[""]

    def reduced(self, gpus: int) -> int:
        """Bytes of gradients that each process gives to reduce-scatters in one step."""
        return gpus * self.gradients(gpus)


def _held(p: Any, unit: str, trained: bool) -> Held:
    values, size = p.numel(), p.element_size()
    if is_packed(p):
        return Held(unit, math.ceil(nf4_codes(values) / size), size, values, False, True)
    rows = p.shape[0] if p.ndim else 1
    return Held(unit, rows, values // max(rows, 1) * size, values, trained, False)


# -- one training step on a Llama --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step with checkpointed blocks: `rows` texts of `length` tokens on each of `gpus` GPUs."""

    shape: Llama
    account: Account
    gpus: int
    four_bit: bool
    rows: int = 1
    length: int = 4096
    gpu: GPU = GPU()

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def memory(self) -> dict[str, float]:
        """Bytes on one GPU by what they are for. The first five are exact, the others bounds.

        "gathered" are the largest unit, a block fetched ahead, and what FSDP2 keeps from forward to backward; "unpacked" is
        the largest 4-bit weight in bf16; "inputs" are what checkpointing keeps of every block.
        """
        a, g, s = self.account, self.gpus, self.shape
        return {
            "base": a.base(g),
            "scales": a.scales,
            "adapter": a.adapter(g),
            "gradients": a.gradients(g),
            "AdamW": a.optimiser(g),
            "gathered": 0 if g == 1 else a.at_once(g),
            "unpacked": 2 * s.mlp * s.width if self.four_bit else 0,
            "inputs": s.layers * self.tokens * s.width * 2,
            "one block": 2 * self.tokens * block_bytes(s),  # what it keeps, and at most as much again in gradients
            "logits": self.tokens * s.vocabulary * LOGIT,
        }

    @property
    def total(self) -> float:
        return sum(self.memory().values()) + RESERVE

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.memory

    def longest(self, multiple: int = 512) -> int:
        """The longest single text that fits, 0 if none does."""
        free = self.gpu.memory - replace(self, rows=1, length=0).total
        each = replace(self, rows=1, length=1).total - replace(self, rows=1, length=0).total
        return max(0, int(free / each) // multiple * multiple)

    def flops(self) -> float:
        """Forward, the forward that checkpointing repeats, and backward to the inputs; a frozen weight has no gradient of its own."""
        s = self.shape
        trained = sum(h.values for h in self.account.held if h.trained)
        blocks = s.layers * s.linear
        attention = s.layers * 2 * self.length * s.heads * s.head_dim  # causal: q kᵀ and the weighted sum over half of the texts
        each = 3 * 2 * blocks + 2 * 2 * s.vocabulary * s.width + (1 + 1 + 2.5) * attention + 4 * 2 * trained
        return self.tokens * each

    def times(self) -> dict[str, float]:
        """The least seconds of one step by what bounds them; they overlap at best."""
        a, g = self.account, self.gpus
        link = self.gpu.nvlink if g <= self.gpu.node else self.gpu.network
        sent = (g - 1) / g * (a.gathered(g) + a.reduced(g))
        packed = self.shape.layers * self.shape.linear
        unpacking = 3 * (nf4_codes(packed) + nf4_scales(packed) + 2 * packed) / self.gpu.hbm if self.four_bit else 0.0
        return {"products": self.flops() / self.gpu.flops, "unpacking": unpacking, "links": sent / link}

    def even(self) -> int:
        """Tokens on each GPU from which the products take longer than the links, at the usual utilisation."""
        one = replace(self, rows=1)
        return math.ceil(one.times()["links"] / (one.flops() / one.tokens / (UTILISATION * self.gpu.flops)))


LOGIT = 12
"""Bytes a logit takes at the peak, in backward: itself and its gradient in bf16, log-softmax and its gradient in float32."""


def block_bytes(s: Llama) -> int:
    """Bytes that one block keeps for its backward, for one token, in bf16 with an adapter on every linear layer.

    Two norms keep their input and its root mean square in float32, the attention one sum for each head; in bf16 what
    layers read (twice the width, the attention's output), queries, keys, values, gate, its activation, up, their product.
    """
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return 2 * (4 * s.width + 4) + 4 * s.heads + 2 * (2 * s.width + 2 * q + 2 * kv + 4 * s.mlp)


def accounts(shape: Llama, spec: str) -> dict[bool, Account]:
    """The shape's account with a 16-bit and with a 4-bit base."""
    found = {}
    for four_bit in (False, True):
        model = shape.empty(four_bit=four_bit)
        veneer.attach(model, spec)
        found[four_bit] = Account(model)
    return found


def trained(shape: Llama, specs: Iterable[str]) -> dict[str, int]:
    """How many numbers each method trains on the shape."""
    from veneer.spec import parse
    from veneer.study.budget import count

    model = shape.empty()
    sites = anatomy.sites(model)
    return {spec: count(parse(spec), sites, model) for spec in specs}
