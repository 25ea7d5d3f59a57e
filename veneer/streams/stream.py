"""The place of an adapter that stands alone: what a method makes of the identity, without the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.forms import LinearForm
from veneer.site import Site

CHILD = "@stream"
"""The name of the module under a block's slot; no adapter can be called so."""


class Stream(nn.Module):
    """The identity on a stream [..., width], which methods see as a linear layer; it holds no weight, only its dtype and device."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.in_features = self.out_features = width
        self.weight = nn.Parameter(like.new_empty(0, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def veneer_form(self) -> IdentityForm:
        return IdentityForm()

    def alone(self, x: Tensor) -> Tensor:
        """The adapter's own output for x [..., width]; zero where none is."""
        h = x.to(torch.promote_types(self.weight.dtype, torch.float32))
        return (self(h) - h).to(x.dtype)


class IdentityForm(LinearForm):
    """A weight that is the identity and is made when a method reads it."""

    writable = "an adapter on a stream has no weight to be written to"

    def weight(self, module: nn.Module) -> Tensor:
        like: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def as_it_is(self, module: nn.Module, x: Tensor) -> Tensor | None:
        return None


def stream_site(block: Site) -> Site:
    """The site of the stream beside a block."""
    from dataclasses import replace

    return replace(block, name=f"{block.name}.stream", module=f"{block.module}.veneer.{CHILD}", role="stream", kind="linear")
