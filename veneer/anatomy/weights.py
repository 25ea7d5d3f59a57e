"""The weights of a model as layers [out, in], of whatever make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn

from veneer.anatomy import families as names
from veneer.anatomy.tree import SKIPPED, Layer, Node, plain_class


def layers_in(nodes: list[Node]) -> list[Layer]:
    """Every weight, in model order; bare parameters that another layer or an earlier module holds too are left out."""
    layers = [layer for node in nodes for layer in _layers_of(node)]
    seen = {id(p) for x in layers if x.kind != "parameter" for p in x.node.module._parameters.values()}
    kept = []
    for layer in layers:
        own = id(layer.node.module._parameters.get(layer.parameter))
        if layer.kind != "parameter" or own not in seen:
            kept.append(layer)
            seen.add(own)
    return kept


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of whatever make; quantised weights have other shapes, so the attributes count."""
    if plain_class(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf), int(module.weight.shape[0])  # type: ignore[arg-type, union-attr, index]
    out, inside = getattr(module, "out_features", None), getattr(module, "in_features", None)
    leaf = bool(module._parameters or module._buffers) and all(k in SKIPPED for k in module._modules)
    return (out, inside) if leaf and isinstance(out, int) and isinstance(inside, int) else None


def _layers_of(node: Node) -> list[Layer]:
    module = node.module
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(node, module)
    shape = linear_shape(module)
    if shape:
        return [Layer(node, "linear", *shape)]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        inside = module.in_channels // module.groups * math.prod(module.kernel_size)
        extra = {"kernel": tuple(module.kernel_size), "groups": module.groups}
        return [Layer(node, "conv", module.out_channels, inside, extra=extra)]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return []
    if isinstance(module, nn.Embedding):
        return [Layer(node, "embedding", module.embedding_dim, module.num_embeddings)]
    own = {k: p for k, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if weight is not None and weight.ndim == 1 and re.search(r"Norm(Act|Gated)?(\dd)?$", node.cls.__name__):
        first = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase)
        return [Layer(node, "norm", len(weight), len(weight), extra={"channels_first": first})]
    stacks = _expert_stacks(node, own)
    return [*stacks, *(_bare(node, k, p) for k, p in own.items() if all(k != s.parameter for s in stacks))]


def _multihead(node: Node, module: nn.MultiheadAttention) -> list[Layer]:
    width = module.embed_dim
    if module.in_proj_weight is not None:
        return [Layer(node, "linear", 3 * width, width, "in_proj_weight")]
    inside = {"q": width, "k": module.kdim, "v": module.vdim}
    return [Layer(node, "linear", width, n, f"{part}_proj_weight") for part, n in inside.items()]


def _expert_stacks(node: Node, own: Mapping[str, nn.Parameter]) -> list[Layer]:
    """Stacked matrices [E, out, in] of a mixture; stacks stored the other way round stay bare parameters."""
    first = next((k for k in ("gate_up_proj", "up_proj") if k in own), "")
    up, down = own.get(first), own.get("down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return []
    halves = ("expert.gate", "expert.up") if first == "gate_up_proj" else ("expert.up",)
    straight = up.shape[2] == down.shape[1] and up.shape[1] == len(halves) * down.shape[2]
    if not straight or getattr(node.module, "is_transposed", False) or not getattr(node.module, "is_concatenated", True):
        return []
    stacks = ((first, up, halves), ("down_proj", down, ("expert.down",)))
    return [Layer(node, "parameter", p.shape[1], p.shape[2], k, roles, extra={"count": p.shape[0]}) for k, p, roles in stacks]


def _bare(node: Node, name: str, parameter: nn.Parameter) -> Layer:
    shape = tuple(parameter.shape) or (1,)
    router = len(shape) == 2 and names.ROUTER.search(node.cls.__name__)
    out, inside = shape if len(shape) == 2 else (shape[-1], math.prod(shape[:-1]))
    return Layer(node, "parameter", out, inside, name, ("router",) if router else ())
