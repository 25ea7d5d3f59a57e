"""Learned tokens at the input of the backbone, and learned keys and values at attention.

Input tokens are inserted in the backbone's forward and taken out of its output, so heads, pooling, losses and labels
see the text's own positions. Keys and values enter through transformers' attention interface. Both follow masks,
positions and key-value caches, and rows of one batch may carry different prompts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.beside import with_beside
from veneer.errors import Unsupported
from veneer.layer import adapt
from veneer.part import Part
from veneer.positions import positions_of
from veneer.route import Active, Route
from veneer.slot import Slot

# -- what is active -------------------------------------------------------------------------------------------


def joined(tables: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """Active prompts [P, D], or [batch, P, D], in order, one after another; weighted ones add up."""
    if not tables:
        return None
    if all(weight == 1.0 for _, weight in tables):
        rows = next((table.shape[:1] for table, _ in tables if table.ndim > 2), ())
        return torch.cat([t.expand(*rows, *t.shape[-2:]) for t, _ in tables], -2) if len(tables) > 1 else tables[0][0]
    if len({table.shape[-2:] for table, _ in tables}) > 1:
        raise Unsupported("weighted prompts must have equal lengths: " + ", ".join(str(tuple(t.shape)) for t, _ in tables) + ".")
    return sum(weight * table for table, weight in tables)  # type: ignore[return-value]


def per_row(route: Route, batch: int, table_of: Callable[[Active], Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Prompts of a batch [B, P, D] and which of their tokens count [B, P] (None: all). Short ones are filled at the front."""
    if route.rows is None:
        table = table_of(route.active)
        return (None, None) if table is None else (table.expand(batch, *table.shape[-2:]), None)
    times = batch // len(route.rows)
    tables = {name: table_of(() if name is None else ((name, 1.0),)) for name in dict.fromkeys(route.rows)}
    longest = max((t.shape[-2] for t in tables.values() if t is not None), default=0)
    if not longest:
        return None, None
    like = next(t for t in tables.values() if t is not None)
    filled, counts = {}, {}
    for name, table in tables.items():
        length = 0 if table is None else table.shape[-2]
        table = like.new_zeros(0, like.shape[-1]) if table is None else table
        filled[name] = F.pad(table, (0, 0, longest - length, 0)).expand(batch, longest, like.shape[-1])
        counts[name] = torch.arange(longest, device=like.device) >= longest - length
    prompts = torch.cat([filled[name][i * times : (i + 1) * times] for i, name in enumerate(route.rows)])
    visible = torch.stack([counts[name] for name in route.rows]).repeat_interleave(times, 0)
    return prompts, None if bool(visible.all()) else visible


# -- tokens at the input --------------------------------------------------------------------------------------


def insert(x: Tensor, piece: Tensor, at: int) -> Tensor:
    """piece [B, P, …] into x [B, T, …] before position `at`."""
    return torch.cat([x[:, :at], piece.to(x.dtype), x[:, at:]], 1)


def remove(x: Tensor, at: int, count: int) -> Tensor:
    return torch.cat([x[:, :at], x[:, at + count :]], 1) if at else x[:, count:]


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """Tokens that the key-value cache already holds."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None or not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())


class Backbone:
    """How one backbone takes learned input tokens, or starts its text at a later position."""

    def __init__(self, module: nn.Module, causal: bool, keeps: bool = False, encoder: Slot | None = None):
        self.causal, self.keeps, self.encoder = causal, keeps, encoder
        self.attention: list[Slot] = []
        self.offset = first_position(module)
        self.positions_there = positions_of(module, self.offset)

    def __call__(self, slot: Slot, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        kwargs = {**dict(zip(slot.arguments, args)), **kwargs}
        if self.encoder is not None:  # a decoder whose encoder carries the tokens: they count in cross-attention
            self.widen(self.encoder, tokens_in(self.encoder), kwargs, "encoder_attention_mask")
        chosen = tokens_in(slot)
        return self.with_tokens(slot, module, kwargs, chosen) if chosen else self.below(slot, module, kwargs)

    def below(self, slot: Slot, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        return slot.frozen(module, **self.shifted(slot.route, kwargs, slot.arguments))

    def room(self, part: Part) -> None:
        """Raises `BadValue` for a part whose learned tokens, or the shift of its keys, leave no position for text."""
        method: Any = part.method
        table = method.tokens(part.tensors(), part.site) if part.site.kind == "model" else method.keys_values(part.tensors(), part.site)[0]
        self.positions_there.leave_room(method.label, table.shape[-2])

    def prompts(self, slot: Slot, batch: int) -> tuple[Tensor | None, Tensor | None]:
        def table(active: Active) -> Tensor | None:
            found = [(p.method.tokens(p.tensors(), p.site), w) for parts, w in slot.chosen(active, ("model",)) for p in parts]  # type: ignore[attr-defined]
            return joined(found)

        return per_row(slot.route, batch, table)

    def at(self, parts: Sequence[Part]) -> int:
        after = getattr(parts[0].method, "after_first", None)
        return int((not self.causal and not self.keeps) if after is None else after)

    def widen(self, source: Slot, parts: Sequence[Part], kwargs: dict[str, Any], name: str) -> None:
        """Extends a mask over text by the prompt's columns."""
        mask = kwargs.get(name)
        if mask is None or not parts:
            return
        prompts, visible = self.prompts(source, mask.shape[0])
        if prompts is None:
            return
        if mask.ndim != 2:
            raise Unsupported(f"{name} of shape {tuple(mask.shape)}: learned input tokens need the mask as [batch, tokens].")
        columns = mask.new_ones(prompts.shape[:2]) if visible is None else visible.to(mask.dtype)
        kwargs[name] = insert(mask, columns, self.at(parts))

    def with_tokens(self, slot: Slot, module: nn.Module, kwargs: dict[str, Any], parts: Sequence[Part]) -> Any:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        assert given is not None
        batch, length = given.shape[:2]
        prompts, visible = self.prompts(slot, batch)
        table = module.get_input_embeddings()  # type: ignore[operator]
        if not cached_length(kwargs):
            shift = self.text_shift(slot, kwargs.get("attention_mask"), batch, length)
            if shift is not None:
                embeds = table(ids) if embeds is None else embeds
                embeds = embeds + shift.to(embeds.dtype)
                kwargs["input_ids"], kwargs["inputs_embeds"] = None, embeds
        if prompts is None:
            return self.below(slot, module, kwargs)
        count, at, past = prompts.shape[1], self.at(parts), cached_length(kwargs)
        self.positions_there.leave_room(who(parts), count, past + length - count if past else length)
        mask = kwargs.get("attention_mask")
        if mask is None and visible is not None:
            kwargs["attention_mask"] = given.new_ones((batch, length + (past - count if past else 0)), dtype=torch.long)
        self.widen(slot, parts, kwargs, "attention_mask")
        own = torch.full((batch, 1), count, device=given.device) if visible is None else visible.sum(1, keepdim=True)
        positions = kwargs.get("position_ids")
        if past:
            if positions is not None:
                kwargs["position_ids"] = positions + own
            elif visible is not None and "position_ids" in slot.arguments:
                kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1)[:, -length:] + self.offset
            return self.below(slot, module, kwargs)
        if embeds is None:
            embeds = table(ids)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, insert(embeds, prompts, at)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = insert(kwargs["token_type_ids"], given.new_zeros((batch, count), dtype=torch.long), at)
        if "position_ids" in slot.arguments and (positions is not None or visible is not None):
            kwargs["position_ids"] = self.positions(positions, kwargs["attention_mask"], own, visible, (batch, length, count), at)
        return self.without_tokens(self.below(slot, module, kwargs), at, count, length + count)

    def text_shift(self, slot: Slot, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        """What is added to the text's embeddings [B, T, D]: row i of the active shifts at the i-th token, also behind padding."""

        def table(active: Active) -> Tensor | None:
            made = [
                (p.method.text_shift(p.tensors(), p.site, length), w)  # type: ignore[attr-defined]
                for parts, w in slot.chosen(active, ("model",))
                for p in parts
            ]
            shifts = [weight * shift for shift, weight in made if shift is not None]
            return sum(shifts[1:], shifts[0]) if shifts else None

        shift, _ = per_row(slot.route, batch, table)
        if shift is None or mask is None or mask.ndim != 2:
            return shift
        first = (mask != 0).to(torch.int8).argmax(1, keepdim=True)  # padding on the left puts the text further on
        index = (torch.arange(length, device=mask.device) - first).clamp(min=0)
        return shift.gather(1, index[..., None].expand(-1, -1, shift.shape[-1]))

    def positions(
        self, given: Tensor | None, mask: Tensor, own: Tensor, visible: Tensor | None, sizes: tuple[int, int, int], at: int
    ) -> Tensor:
        """Position ids with the prompt counted in; filled-up places count for nothing."""
        batch, length, count = sizes
        text = torch.arange(length, device=own.device).expand(batch, length) + self.offset if given is None else given.expand(batch, length)
        if visible is None:
            prompt = torch.arange(count, device=own.device).expand(batch, count)
        else:
            prompt = (visible.long().cumsum(1) - 1).clamp(min=0)
        start = text[:, :at].max(1, keepdim=True).values + 1 if at else torch.full((batch, 1), self.offset, device=own.device)
        return torch.cat([text[:, :at], prompt + start, text[:, at:] + own], 1)

    def without_tokens(self, output: Any, at: int, count: int, length: int) -> Any:
        if self.keeps:
            return output

        def strip(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[1] == length:
                return remove(value, at, count)
            if isinstance(value, tuple) and value and all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
                return tuple(strip(v) for v in value)
            return value

        if isinstance(output, tuple):
            return tuple(strip(v) for v in output)
        for name in ("last_hidden_state", "hidden_states", "logits"):
            if output.get(name) is not None:
                output[name] = strip(output[name])
        return output

    def shifted(self, route: Route, kwargs: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
        """Text positions behind attention prompts, where the model takes position ids."""
        if "position_ids" not in arguments or not self.attention:
            return kwargs
        given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        assert given is not None
        batch, length = given.shape[:2]
        keys, visible = per_row(route, batch, functools.partial(shifting_keys, self.attention[0]))
        if keys is None:
            return kwargs
        shifting = [p for parts in self.attention[0].parts.values() for p in parts if p.site.kind == "attention"]
        self.positions_there.leave_room(who(shifting), keys.shape[1], cached_length(kwargs) + length)
        own = torch.full((batch, 1), keys.shape[1], device=given.device) if visible is None else visible.sum(1, keepdim=True)
        positions = kwargs.get("position_ids")
        if positions is None:
            start = cached_length(kwargs) + self.offset
            positions = torch.arange(start, start + length, device=given.device).expand(batch, length)
        return {**kwargs, "position_ids": positions + own}


def who(parts: Sequence[Part]) -> str:
    """The methods of these parts, for messages."""
    return " + ".join(dict.fromkeys(p.method.label for p in parts))


def tokens_in(slot: Slot) -> list[Part]:
    return [p for parts in slot.parts.values() for p in parts if p.site.kind == "model"]


def shifting_keys(slot: Slot, active: Active) -> Tensor | None:
    """Keys of the active prompts whose method lets the text start behind them."""
    found = [
        (p.method.keys_values(p.tensors(), p.site)[0], w)  # type: ignore[attr-defined]
        for parts, w in slot.chosen(active, ("attention",))
        for p in parts
        if getattr(p.method, "shift_positions", None) is not False
    ]
    return joined(found)


def first_position(module: nn.Module) -> int:
    """Position id of the first token: RoBERTa-like tables start behind the padding index."""
    tables: Any = getattr(module, "embeddings", None)
    return int(tables.padding_idx) + 1 if hasattr(tables, "create_position_ids_from_input_ids") else 0


# -- keys and values at attention -----------------------------------------------------------------------------


def prefix_of(slot: Slot, batch: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Keys and values [B, P, kv_heads · head_dim] and which count [B, P]."""

    names = {p.site.name for parts in slot.parts.values() for p in parts if p.site.kind == "attention"}
    captured = {name: slot.route.captured.pop(name) for name in names if name in slot.route.captured}

    def table(active: Active) -> Tensor | None:
        found = [(p, w) for parts, w in slot.chosen(active, ("attention",)) for p in parts if not p.method.stands_beside]  # type: ignore[attr-defined]
        return joined([(keys_and_values(p, captured), w) for p, w in found])

    both, visible = per_row(slot.route, batch, table)
    if both is None:
        return None, None, None
    keys, values = both.chunk(2, -1)
    return keys, values, visible


def keys_and_values(part: Part, captured: Mapping[str, Tensor]) -> Tensor:
    """Keys beside values [P, 2 · kv_heads · head_dim]; gated ones [batch, P, …], from what the attention module read."""
    method: Any = part.method
    both = torch.cat(method.keys_values(part.tensors(), part.site), -1)
    return method.gate(captured[part.site.name], part.tensors(), part.site) * both if method.gates else both


def widened_mask(mask: Tensor | None, visible: Tensor | None, causal: bool, sizes: tuple[int, int, int], query: Tensor) -> Tensor | None:
    """The attention mask with the prefix's columns in front: seen by every row of the text."""
    count, queries, keys = sizes
    batch = query.shape[0]
    if mask is None:
        if causal and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
        elif visible is None:
            return None
        else:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
    if mask.ndim == 2:  # flash kernels: [batch, keys]
        return torch.cat([mask.new_ones(batch, count) if visible is None else visible.to(mask.dtype), mask], 1)
    shown = torch.ones(1, 1, 1, count, dtype=torch.bool, device=query.device) if visible is None else visible[:, None, None]
    if mask.dtype != torch.bool:
        shown = torch.zeros_like(shown, dtype=mask.dtype).masked_fill(~shown, torch.finfo(mask.dtype).min)
    rows = max(mask.shape[0], shown.shape[0])
    shown = shown.expand(rows, mask.shape[1], mask.shape[2], count)
    return torch.cat([shown, mask.expand(rows, *mask.shape[1:])], -1)


def eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention [B, H, T, dh] → [B, T, H, dh] and its weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = kwargs.get("scaling")
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if attention_mask is not None:
        scores = (
            scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
            if attention_mask.dtype == torch.bool
            else scores + attention_mask
        )
    weights = F.softmax(scores, -1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    dropped = F.dropout(weights, kwargs.get("dropout", 0.0), module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


def attention(implementation: str) -> Callable[..., Any]:
    """An attention function for transformers that puts the module's learned keys and values in front, if it has any."""

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        below = eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        slot: Any = module._modules.get("veneer")
        if slot is None or not slot.route.on or not slot.has(("attention",)):
            if implementation == "eager" and attention_mask is None and is_causal(module, kwargs) and query.shape[2] > 1:
                attention_mask = widened_mask(None, None, True, (0, query.shape[2], key.shape[2]), query)
            return below(module, query, key, value, attention_mask, **kwargs)
        keys, values, visible = prefix_of(slot, query.shape[0])
        if keys is None or values is None:
            output, weights = below(module, query, key, value, attention_mask, **kwargs)
            return with_beside(slot, query, output, kwargs.get("scaling")), weights
        count, sizes = keys.shape[1], (keys.shape[1], query.shape[2], key.shape[2])
        heads = (query.shape[0], count, key.shape[1], -1)
        flash = "flash" in implementation and attention_mask is None and visible is None
        if not flash:
            attention_mask = widened_mask(attention_mask, visible, is_causal(module, kwargs), sizes, query)
            kwargs["is_causal"] = "flash" in implementation and is_causal(module, kwargs)
        key = torch.cat([keys.view(heads).transpose(1, 2).to(key.dtype), key], 2)
        value = torch.cat([values.view(heads).transpose(1, 2).to(value.dtype), value], 2)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
        output, weights = below(module, query, key, value, attention_mask, **kwargs)
        output = with_beside(slot, query, output, kwargs.get("scaling"))
        return output, None if weights is None else weights[..., count:]

    return forward


def is_causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", False) if given is None else given)


def uses_interface(module: nn.Module) -> bool:
    """Whether this attention module looks its function up in transformers' attention interface."""
    try:
        return "get_interface" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def route_attention(model: nn.Module) -> list[tuple[Any, str]]:
    """Switches the model's configs to the adapting attention functions; returns what to restore."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    changed = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        implementation = getattr(config, "_attn_implementation", None)
        if not isinstance(implementation, str) or implementation.startswith("veneer_"):
            continue
        name = f"veneer_{implementation}"
        AttentionInterface.register(name, attention(implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        changed.append((config, implementation))
        config._attn_implementation_internal = name
    return changed


# -- installing -----------------------------------------------------------------------------------------------


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that turns tokens into hidden states: where learned tokens go in and come out again."""
    inner = getattr(model, "base_model", None)
    backbone = inner if isinstance(inner, nn.Module) else model
    if not hasattr(backbone, "get_input_embeddings"):
        raise Unsupported(
            f"{type(model).__name__} has no get_input_embeddings(), so learned input tokens have no place; "
            "use a method that acts on layers."
        )
    return backbone


def read_tokens(module: nn.Module) -> None:
    """Raises `Unsupported` for a module that reads images, sound or anything else than tokens."""
    if not isinstance(module.get_input_embeddings(), nn.Embedding):  # type: ignore[operator]
        raise Unsupported(f"{type(module).__name__} does not read token ids, so learned input tokens have no place in it.")


def install_tokens(model: nn.Module, causal: bool) -> nn.Module:
    """Adapts the backbone (of encoder-decoders: the encoder, and the decoder's view of it); returns the adapted module."""
    backbone = backbone_of(model)
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        read_tokens(backbone)
        return install(backbone, model, Backbone(backbone, causal))
    encoder, decoder = backbone.get_encoder(), backbone.get_decoder()  # type: ignore[operator]
    read_tokens(encoder)
    install(encoder, model, Backbone(encoder, False, keeps=True))
    install(decoder, model, Backbone(decoder, True, encoder=encoder.veneer))
    return encoder


def install_shift(model: nn.Module, attention: Sequence[Slot]) -> Backbone:
    """Lets the backbone start its text behind attention prompts."""
    backbone = backbone_of(model)
    whole: Backbone = install(backbone, model, Backbone(backbone, True)).veneer.whole  # type: ignore[union-attr, assignment]
    whole.attention = list(attention)
    return whole


def install(module: nn.Module, model: nn.Module, backbone: Backbone) -> nn.Module:
    slot = adapt(module, model.veneer.route, ())  # type: ignore[union-attr, arg-type]
    if slot.whole is None:
        slot.whole = backbone
    return module
