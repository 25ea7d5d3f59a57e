"""Whether a Triton kernel runs in place of the plain operations."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor, nn

from veneer.kernels.eager import eager

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fused(*tensors: Tensor) -> bool:
    """True on an NVIDIA GPU with triton, unless VENEER_TRITON=0. A compiler fuses by itself; autocast needs plain operations."""
    first = tensors[0]
    return (
        first.is_cuda
        and eager(first)
        and os.environ.get("VENEER_TRITON", "1") != "0"
        and all(type(t) in (Tensor, nn.Parameter) and t.device == first.device and t.dtype in DTYPES for t in tensors)
        and _present()
        and _able(first.device)
    )


@functools.cache
def _present() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


@functools.cache
def _able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # the first with bfloat16
