"""Training state as a safetensors file: tensors as tensors, everything else as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadFile


def write_state(path: str | Path, state: Any) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings, None and tensors; whole or not at all."""
    from veneer.store import write_tensors

    tensors: dict[str, Tensor] = {}
    header = {"state": json.dumps(_plain(state, tensors))}
    write_tensors(Path(path), tensors, header)


def read_state(path: str | Path) -> Any:
    """What `write_state` wrote. Raises `BadFile` if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return _nested(json.loads((file.metadata() or {})["state"]), tensors)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise BadFile(f"{path} is not a whole state file ({error}).") from None


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_plain(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # numpy numbers and arrays
        return _plain(value.tolist(), tensors)
    raise TypeError(f"{type(value).__name__} cannot be part of a training state.")


def _nested(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_nested(item, tensors) for item in value["tuple"])
        return {key: _nested(item, tensors) for key, item in value["dict"]}
    return value


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators."""
    import random

    import numpy as np

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Takes back what `random_state` gave."""
    import random

    import numpy as np

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
