"""A model of linear integers as torchao's tensors: loads with transformers and torchao alone, veneer is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.errors import MissingExtra, Unsupported
from veneer.method import Params
from veneer.tools.integers import integers

if TYPE_CHECKING:
    from veneer.tuned import Tuned


def save_torchao(tuned: Tuned, out: str | Path) -> Any:
    """Writes the base with every adapted layer as codes, steps and zero points, and gives the model that was written.

    A weight is (code − zero) · step over groups of neighbouring columns, zero = −beta / step in floating point: to rounding the
    very weight that was trained. torchao keeps every code of 2 to 8 bits in a byte. The adapter is taken off the model.

    Raises:
        Unsupported: the method has no integers, or a layer holds several weights; MissingExtra: no torchao.
    """
    try:
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig
        from transformers.quantizers import AutoHfQuantizer
    except ImportError as error:
        raise MissingExtra("torchao's format needs torchao: pip install 'veneer[quant]'") from error
    pieces = integers(tuned)
    sites = {site.name: site for site in tuned.sites()}
    odd = [name for name in pieces if sites[name].kind != "linear" or sites[name].rows is not None]
    if odd:
        raise Unsupported(f"torchao: {odd[0]} is a part of a layer or a bare parameter; only whole linear layers can be written.")
    method: Any = next(part for part in tuned.adapters[tuned.active[0]].method.parts if hasattr(part, "pieces"))
    bits, group = getattr(torch, f"int{method.bits}"), method.group
    model: Any = tuned.merge(keep=False).detach()  # a head that was trained along goes into the base
    for name, piece in pieces.items():
        module = model.get_submodule(sites[name].module)
        module.weight = nn.Parameter(_tensor(ao, piece, bits, group, module.weight.dtype), requires_grad=False)
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in {sites[s].module for s in pieces}]
    plan = ao.IntxWeightOnlyConfig(weight_dtype=bits, granularity=PerGroup(group))
    model.config.quantization_config = TorchAoConfig(plan, modules_to_not_convert=left)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    model.save_pretrained(out)
    return model


def _tensor(ao: Any, piece: Params, bits: torch.dtype, group: int, dtype: torch.dtype) -> Tensor:
    s, beta = piece["s"].abs().to(dtype), piece["beta"].to(dtype)
    return ao.IntxUnpackedToInt8Tensor(piece["codes"].contiguous(), s, -beta / s, bits, (1, group), dtype, None)
