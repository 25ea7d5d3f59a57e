"""How each class of layer uses its weight: read it dense, run it with another one, add a low-rank term, write to it.

One form serves every method. Weights are always seen as [out, in] (convolutions: [out, in/groups · kernel];
embedding tables transposed to [dim, vocabulary]; norms: the gain [d]), whatever the layer's own layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import Unsupported
from veneer.kernels.low_rank import add_low_rank


class Form:
    """A plain layer whose parameter is already [out, in]. Subclasses say what differs."""

    def __init__(self, parameter: str = "weight", bias: str = "bias") -> None:
        self.parameter, self.bias_name = parameter, bias

    def raw(self, module: nn.Module) -> Tensor:
        """The stored parameter, fetched where an offloading hook keeps it."""
        return stored(module, self.parameter)

    def seen(self, stored: Tensor) -> Tensor:
        """A stored parameter, or its gradient, as [out, in]."""
        return stored

    def weight(self, module: nn.Module) -> Tensor:
        return self.seen(self.raw(module).detach())

    def bias(self, module: nn.Module) -> Tensor | None:
        held = module._parameters.get(self.bias_name)
        return None if held is None else stored(module, self.bias_name).detach()

    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        raise NotImplementedError

    def low_rank(self, module: nn.Module, y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
        """y plus the low-rank term."""
        raise Unsupported(f"{type(module).__name__} has no low-rank form.")

    def as_it_is(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The weight [out, in] of a linear layer, where it multiplies x without a cast; None where it does not."""
        return None

    def packed_low_rank(self, module: nn.Module, x: Tensor, L: Tensor, R: Tensor) -> Tensor | None:
        """A layer with a packed weight plus (x Rᵀ) Lᵀ in one kernel, or None where there is none."""
        return None

    def store(self, W: Tensor, like: Tensor) -> Tensor:
        """The weight back in the layer's own layout and dtype."""
        return W.to(like.dtype).reshape(like.shape)

    writable = ""
    """Why a merge cannot be written into it; "" when it can."""


class LinearForm(Form):
    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def low_rank(self, module: nn.Module, y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
        return add_low_rank(y, x, L, R)

    def as_it_is(self, module: nn.Module, x: Tensor) -> Tensor | None:
        W = module._parameters["weight"]
        return None if W is None or W.dtype != x.dtype else self.seen(W.detach())


class TransposedForm(LinearForm):
    """Stored [in, out], as GPT-2's Conv1D."""

    def seen(self, stored: Tensor) -> Tensor:
        return stored.t()

    def store(self, W: Tensor, like: Tensor) -> Tensor:
        return W.t().to(like.dtype).contiguous()


class QuantisedForm(LinearForm):
    """A linear layer whose stored weight is packed: bitsandbytes 4-bit and 8-bit, torchao tensors."""

    writable = (
        "its weight is stored quantised, so a merge would be rounded away; load the base in 16 or 32 bit to merge, "
        "or `veneer export --to merged --base FULL_PRECISION_BASE`"
    )

    def weight(self, module: nn.Module) -> Tensor:
        W = self.raw(module)
        kind = type(module).__name__ + type(W).__name__
        if W.is_meta:
            return torch.empty(module.out_features, module.in_features, device="meta")  # type: ignore[call-overload]
        if "4bit" in kind:
            import bitsandbytes.functional as bnb

            packing: Any = getattr(W, "quant_state", None) or module.quant_state  # sharding leaves it with the layer
            return bnb.dequantize_4bit(W.data, packing).to(packing.dtype)
        if "Int8Params" in kind or "8bit" in kind:
            state = getattr(module, "state", None)
            packed = W.CB if getattr(W, "CB", None) is not None else state.CB if state is not None and state.CB is not None else W.data  # type: ignore
            scale = W.SCB if getattr(W, "SCB", None) is not None else state.SCB  # type: ignore
            if packed.dtype != torch.int8:
                return packed
            return packed.float() * (scale.float() / 127.0).unsqueeze(1)
        return W.get_original_weight() if hasattr(W, "get_original_weight") else W.dequantize()  # the first: torchao's NF4

    def packed_low_rank(self, module: nn.Module, x: Tensor, L: Tensor, R: Tensor) -> Tensor | None:
        W: Any = self.raw(module)
        if not x.is_cuda or type(W).__name__ != "Params4bit" or getattr(module, "compute_dtype", None) not in (None, x.dtype):
            return None
        from veneer.kernels.nf4_low_rank import nf4_low_rank, packed

        return nf4_low_rank(x, packed(W), self.bias(module), L, R)

    def as_it_is(self, module: nn.Module, x: Tensor) -> Tensor | None:
        return None


class EmbeddingForm(Form):
    """A table [vocabulary, dim], seen as [dim, vocabulary] acting on one-hot columns."""

    def seen(self, stored: Tensor) -> Tensor:
        return stored.t()

    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        own: Any = module
        y = F.embedding(x, W.t(), own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq).to(own.weight.dtype)
        scale = getattr(module, "embed_scale", None)
        y = y if scale is None else y * scale
        return y if b is None else y + b

    def low_rank(self, module: nn.Module, y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
        own: Any = module
        term = F.embedding(x, R.t(), own.padding_idx) @ L.t()
        scale = getattr(module, "embed_scale", None)
        return y + (term if scale is None else term * scale).to(y.dtype)

    def store(self, W: Tensor, like: Tensor) -> Tensor:
        return W.t().to(like.dtype).contiguous()


class ConvForm(Form):
    """Conv1d, Conv2d, Conv3d with any stride, padding mode, dilation and groups; the kernel counts among the inputs."""

    def seen(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        own: Any = module
        b = None if b is None else b.to(x.dtype)
        return own._conv_forward(x, W.to(x.dtype).reshape(own.weight.shape), b)

    def low_rank(self, module: nn.Module, y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
        own: Any = module
        if own.groups > 1:  # each group of outputs meets its own inputs: one dense kernel is the cheaper form
            delta = (L @ R).to(x.dtype).reshape(own.weight.shape)
            return y + own._conv_forward(x, delta, None)
        inner = own._conv_forward(x, R.to(x.dtype).reshape(R.shape[0], *own.weight.shape[1:]), None)
        pointwise = L.to(x.dtype).reshape(*L.shape, *(1,) * (own.weight.ndim - 2))
        return y + (F.conv1d, F.conv2d, F.conv3d)[own.weight.ndim - 3](inner, pointwise)


class NormForm(Form):
    """LayerNorm and its relatives. Classes other than torch's run their own forward on substituted parameters."""

    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        own: Any = module
        if isinstance(module, nn.LayerNorm):
            W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
            return F.layer_norm(x, own.normalized_shape, W, b, own.eps)
        dtype = own._parameters["weight"].dtype
        values = {"weight": W.to(dtype), "bias": None if b is None else b.to(dtype)}
        with module.veneer.substituted(values):  # type: ignore[union-attr, operator]
            return module.veneer.frozen(module, x)  # type: ignore[union-attr, operator]


class ParameterForm(Form):
    """A bare parameter, or one a fused kernel reads without calling the layer: seen through a property of the class."""

    def apply(self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        raise Unsupported(f"the parameter {self.parameter} of {type(module).__name__} is read by its owner; there is no layer to run")


def stored(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter; for an offloaded one (on meta, under an accelerate hook) the copy its hook keeps."""
    held = module._parameters[name]
    assert held is not None
    hook = getattr(module, "_hf_hook", None)
    if held.device.type != "meta" or hook is None:
        return held
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[name]
    return held


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer's stored weight is packed."""
    W = module._parameters.get("weight")
    if W is None:
        return False
    return type(W).__name__ in ("Params4bit", "Int8Params") or "torchao" in type(W.data).__module__ or "torchao" in type(W).__module__


def form_of(module: nn.Module, kind: str, parameter: str) -> Form:
    """The form for a site of this kind on this module, which may bring one of its own."""
    if hasattr(module, "veneer_form"):
        return module.veneer_form()  # type: ignore[operator]
    if kind == "linear" and parameter == "weight" and not read_from_outside(module):
        if type(module).__name__.removeprefix("Adapted") == "Conv1D":
            return TransposedForm()
        return QuantisedForm() if is_quantised(module) else LinearForm()
    if kind == "embedding":
        return EmbeddingForm()
    if kind == "conv":
        return ConvForm()
    if kind == "norm":
        return NormForm()
    bias = {"in_proj_weight": "in_proj_bias", "weight": "bias"}.get(parameter, parameter + "_bias")
    return ParameterForm(parameter, bias)


def read_from_outside(module: nn.Module) -> bool:
    """Whether the owner reads this layer's weight itself instead of calling the layer (`nn.MultiheadAttention.out_proj`)."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def keep_trainable(module: nn.Module) -> None:
    """Some CPUs repack bitsandbytes 4-bit weights at the first evaluation, after which gradients stop silently: prevent or undo it."""
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight: Any = module.weight
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

        weight.data, weight.quant_state = unpacked(weight.data, state)
        if not weight.quant_state.nested:  # left in the packed order there
            weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
