"""The seam of a block: between its attention and its feed-forward, where a method may leave fewer tokens to the rest.

A pre-norm block computes h = x + attention, y = h + feed-forward(norm(h)). Here the norm reads the changed tokens, the
feed-forward's output is filled up with zeros to the old number, and what the block adds to h is added to the changed ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import Unsupported
from veneer.site import Site

Change: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(h [B, T, D], keys [B, T, head_dim]) → tokens [B, T′, D], and the new row of every old one [B, T]."""

MASKS = ("attention_mask", "attn_mask")
PLACED = re.compile("position|rope|rotary")
"""Arguments by which a block tells its tokens' places, one by one: they would not fit fewer tokens."""


class Seam:
    """The seam of one block, and what passes through it while the block runs."""

    def __init__(self, keys: Site, mask: str | None, at: int | None):
        self.rows, self.head_dim, self.mask, self.at = slice(*(keys.rows or (None,))), keys.head_dim, mask, at
        self.clear()

    def clear(self) -> None:
        self.change: Change | None = None
        self.bias: Tensor | None = None
        self.tokens: int = 0
        self.keys: Any = None
        self.before: Any = None
        self.after: Any = None
        self.where: Any = None

    def run(self, call: Callable[[Tensor], Tensor], x: Tensor, change: Change | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block's output for x [B, T, D] with `change` at the seam, and the new row of every old token (None without change)."""
        self.change, self.bias, self.tokens = change, bias, x.shape[1]
        try:
            y = call(x)
            if change is None:
                return y, None
            return self.after + (y - self.before)[:, : self.after.shape[1]], self.where
        finally:
            self.clear()

    # -- at the block's modules -----------------------------------------------------------------------------------

    def read_keys(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.change is not None:
            self.keys = output[..., self.rows].unflatten(-1, (-1, self.head_dim)).mean(2)

    def weigh_keys(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.bias is None:
            return None
        if self.mask is None or self.at is None:
            raise Unsupported("the attention of this block takes no mask, so its keys cannot be weighed.")
        given = args[self.at] if len(args) > self.at else kwargs.get(self.mask)
        if given is not None:
            raise Unsupported("the attention of this block has a mask or biases by position already, which do not fit merged tokens.")
        bias = self.bias[:, None, None, :]
        if len(args) > self.at:
            return (*args[: self.at], bias, *args[self.at + 1 :]), kwargs
        return args, {**kwargs, self.mask: bias}

    def shorten(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.change is None:
            return None
        if args[0].shape[1] != self.tokens:
            raise Unsupported(f"a block that was given {self.tokens} tokens has {args[0].shape[1]} inside; another method adds some there.")
        self.before = args[0]
        self.after, self.where = self.change(args[0], self.keys)
        return (self.after, *args[1:])

    def lengthen(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.change is None:
            return None
        y = output[0] if isinstance(output, tuple) else output
        y = F.pad(y, (0, 0, 0, self.tokens - y.shape[1]))
        return (y, *output[1:]) if isinstance(output, tuple) else y


def open_seam(model: nn.Module, block: Site, sites: Sequence[Site], biased: bool, who: str) -> tuple[Seam, list[RemovableHandle]]:
    """The seam of this block and the hooks that make it.

    Args:
        sites: all of the model's. biased: keys will be weighed. who: the method's name.

    Raises:
        Unsupported: a block that is not attention and then a feed-forward behind a norm of its own, one whose attention
            takes no mask where `biased`, or one that tells its tokens' places in every block.
    """
    here = [s for s in sites if s.depth == block.depth]

    def one(wanted: str, fits: Callable[[Site], bool]) -> Site:
        found = [s for s in here if fits(s)]
        if len(found) != 1:
            raise Unsupported(f"{who}: the block {block.name} has {len(found) or 'no'} {wanted}; it acts on plain vision transformers.")
        return found[0]

    norm = one("norm before its feed-forward", lambda s: s.role == "norm.mlp" and s.kind == "norm" and not s.post)
    end = one("feed-forward network", lambda s: s.role == "mlp" and s.kind == "branch")
    keys = one("key projection that is a layer", lambda s: s.role == "attn.k" and s.kind == "linear" and s.parameter == "weight")
    core = one("self-attention", lambda s: s.role == "attn" and s.kind == "attention")
    module = model.get_submodule(core.module)
    placed = [name for name in inspect.signature(type(model.get_submodule(block.module)).forward).parameters if PLACED.search(name)]
    if placed:
        raise Unsupported(f"{who}: the block {block.name} is told its tokens' places ({placed[0]}), which fewer tokens do not have.")
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    mask = next((name for name in MASKS if name in arguments), None)
    flash = "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    if biased and (mask is None or flash):
        why = "runs by flash kernels" if flash else "takes no mask"
        raise Unsupported(
            f"{who}: the attention {core.name} {why}, so merged tokens cannot count by their size; choose proportional=False."
        )
    seam = Seam(keys, mask, arguments.index(mask) if mask else None)
    hooks = [
        model.get_submodule(keys.module).register_forward_hook(seam.read_keys),
        module.register_forward_pre_hook(seam.weigh_keys, with_kwargs=True),
        model.get_submodule(norm.module).register_forward_pre_hook(seam.shorten),
        model.get_submodule(end.module).register_forward_hook(seam.lengthen),
    ]
    return seam, hooks
