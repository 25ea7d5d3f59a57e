"""Whether a fused function may run: a compiler fuses by itself, and autocast needs the plain operations to cast."""

from __future__ import annotations

import torch
from torch import Tensor


def eager(x: Tensor) -> bool:
    """Whether operations on x run as they are written: not traced by a compiler, not cast by autocast."""
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
