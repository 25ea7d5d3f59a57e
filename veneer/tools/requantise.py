"""From a packed base to a plain model and back: what a merge into 4 or 8 bits costs (2023, arXiv:2305.14314)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import Unsupported
from veneer.forms import QuantisedForm, is_quantised


def packed_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weights are stored packed, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantised(m)}


def unpacked(model: Any, dtype: Any = None) -> Any:
    """A packed model of transformers with the values that it computes with, in 16 or 32 bit, in place; others as they are.

    Raises:
        Unsupported: transformers cannot unpack this format.
    """
    if not packed_layers(model):
        return model if dtype is None else model.to(dtype)
    try:
        plain = model.dequantize(dtype)
    except (AttributeError, NotImplementedError) as error:
        raise Unsupported(f"{type(model).__name__} cannot be unpacked: {error} Give the base in 16 or 32 bit with --model.") from error
    return plain if dtype is None else plain.to(dtype)


def requantised(model: Any, out: Path, quantise: str) -> tuple[Any, float]:
    """Writes a plain model with its linear layers packed; gives it read back, and ‖W_packed − W‖ / ‖W‖ over the packed layers.

    Args:
        model: in 16 or 32 bit, of transformers.
        out: the folder, which has to be there.
        quantise: "nf4", "fp4" or "int8".
    """
    from veneer.train.packed_base import config

    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(beside)
        packed = type(model).from_pretrained(beside, dtype=model.dtype, quantization_config=config(quantise, True, model.dtype))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    form, gone, whole = QuantisedForm(), 0.0, 0.0
    for name, layer in packed_layers(packed).items():
        W = model.get_submodule(name).weight.detach().float()
        gone += float((form.weight(layer).float() - W).square().sum())
        whole += float(W.square().sum())
    packed.save_pretrained(out)
    return type(model).from_pretrained(out).eval(), (gone / whole) ** 0.5
