"""Models with pruned weights as files that leave the zeros out, and back: `sparse.safetensors` beside the model's configuration.

A weight, seen as a matrix of its first axis, is stored as whatever takes the fewest bytes, under its name in the model:

- `NAME`: as it is;
- `NAME.values` [n], `NAME.columns` [n], `NAME.rows` [out + 1]: compressed rows, as `torch.sparse_csr_tensor` takes them; of
  row i the entries rows[i] … rows[i + 1];
- `NAME.values`, `NAME.places` [out, in · n / m]: n of every m neighbours in a row, their places in 0 … m − 1 ascending.

The header's `veneer_sparse` gives shape and form of each. Loaded weights are dense, with exact zeros where they were: on CUDA,
`torch.sparse.to_sparse_semi_structured(layer.weight)` then takes a 2:4 weight as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadFile, BadValue, Mismatch
from veneer.store import write_tensors
from veneer.strategies.pruning import n_of_m

FILE = "sparse.safetensors"
PATTERNS = ((1, 2), (1, 4), (2, 4))
"""n of m that are looked for."""


def pattern_of(text: str) -> tuple[int, int]:
    """n and m of "2:4". Raises `BadValue`."""
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not found or tuple(map(int, found.groups())) not in PATTERNS:
        raise BadValue(f"The pattern {text!r} is not one of {', '.join(f'{n}:{m}' for n, m in PATTERNS)}.")
    return int(found[1]), int(found[2])


def enforce(W: Tensor, n: int, m: int) -> Tensor:
    """W [out, in] with all but the n largest magnitudes of every m neighbours in a row set to zero; one that fits stays as it is."""
    return W * n_of_m(W.abs(), n, m)


# -- one weight -------------------------------------------------------------------------------------------------


def packed(W: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The form that takes the fewest bytes, "" (as it is), "csr" or such as "2:4", and its parts by name."""
    forms: dict[str, dict[str, Tensor]] = {"": {"": W}}
    if W.is_floating_point() and W.ndim > 1 and W.numel():
        flat = W.reshape(len(W), -1)
        if 2 * int((flat != 0).sum()) <= flat.numel():
            forms["csr"] = _rows(flat)
            forms.update({f"{n}:{m}": _places(flat, n, m) for n, m in PATTERNS if _fits(flat, n, m)})
    best = min(forms, key=lambda form: sum(t.numel() * t.element_size() for t in forms[form].values()))
    return best, forms[best]


def _rows(W: Tensor) -> dict[str, Tensor]:
    row, column = W.nonzero(as_tuple=True)
    ends = torch.bincount(row, minlength=len(W)).cumsum(0)
    small = next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if W.shape[1] <= torch.iinfo(t).max + 1)
    count = torch.int32 if len(row) <= torch.iinfo(torch.int32).max else torch.int64
    return {"values": W[row, column], "columns": column.to(small), "rows": torch.cat([ends.new_zeros(1), ends]).to(count)}


def _fits(W: Tensor, n: int, m: int) -> bool:
    return W.shape[1] % m == 0 and int((W.unflatten(1, (-1, m)) != 0).sum(-1).max()) <= n


def _places(W: Tensor, n: int, m: int) -> dict[str, Tensor]:
    groups = W.unflatten(1, (-1, m))
    places = (groups != 0).int().topk(n, -1).indices.sort(-1).values  # where a group has fewer entries, zeros among them
    return {"values": groups.gather(-1, places).flatten(1), "places": places.flatten(1).to(torch.uint8)}


def unpacked(form: str, parts: dict[str, Tensor], shape: list[int]) -> Tensor:
    """The dense weight. Raises `ValueError` for parts that are not those of one."""
    if not form:
        return parts[""]
    out = shape[0]
    inside = torch.Size(shape).numel() // max(out, 1)
    values = parts["values"]
    W = values.new_zeros(out, inside)
    if form == "csr":
        rows, columns = parts["rows"].long(), parts["columns"].long()
        whole = (
            len(rows) == out + 1 and int(rows[0]) == 0 and int(rows[-1]) == len(values) == len(columns) and bool((rows.diff() >= 0).all())
        )
        if not whole or bool((columns < 0).any() or (columns >= inside).any()):
            raise ValueError
        W[torch.arange(out).repeat_interleave(rows.diff()), columns] = values
        return W.reshape(shape)
    n, m = (int(k) for k in form.split(":"))
    places = parts["places"].long()
    if inside % m or values.shape != places.shape or list(values.shape) != [out, inside // m * n] or bool((places >= m).any()):
        raise ValueError
    return W.unflatten(1, (-1, m)).scatter(-1, places.unflatten(1, (-1, n)), values.unflatten(1, (-1, n))).reshape(shape)


# -- models -----------------------------------------------------------------------------------------------------


def save_sparse(model: nn.Module, folder: str | Path) -> dict[str, str]:
    """Writes a plain model; returns the form of every weight that is not stored as it is, by name.

    A weight that the model has under several names is stored once.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, W in _own(model):
        form, parts = packed(W.detach().cpu())
        facts[name] = {"shape": list(W.shape), "form": form}
        tensors.update({f"{name}.{part}".removesuffix("."): t.contiguous() for part, t in parts.items()})
    write_tensors(Path(folder) / FILE, tensors, {"veneer_sparse": json.dumps(facts)})
    if hasattr(model, "config"):
        model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    return {name: fact["form"] for name, fact in facts.items() if fact["form"]}


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything in the model's state, each storage once."""
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        if (key := (tensor.data_ptr(), tensor.shape)) not in seen or not tensor.numel():
            seen.add(key)
            yield name, tensor


def load_sparse(folder: str | Path, model: Any = None) -> Any:
    """A model with the weights of a folder; without `model`, the one of transformers that its configuration names.

    Raises:
        BadFile: missing, truncated or foreign files.
        Mismatch: a model whose weights have other names or shapes.
    """
    state = read_sparse(folder)
    if model is None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if cls is None:
            raise BadFile(f"{folder}: its configuration names no class of transformers; build the model and pass it.")
        model = cls(config)
    own = model.state_dict(keep_vars=True)
    wrong = [name for name, t in state.items() if name not in own or own[name].shape != t.shape]
    filled = {own[name].data_ptr() for name in state if name in own}
    wrong += [name for name, t in own.items() if name not in state and t.data_ptr() not in filled]
    if wrong:
        raise Mismatch(f"{folder}: this {type(model).__name__} and the file differ at {', '.join(wrong[:3])}.")
    for name, t in state.items():  # in the file's dtype; buffers that are in no file keep theirs
        own[name].data = t.to(own[name].device)
    return model.eval()


def read_sparse(folder: str | Path) -> dict[str, Tensor]:
    """The dense tensors of a folder by name. Raises `BadFile`."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.is_file():
        raise BadFile(f"{folder}: there is no {FILE} here.")
    try:
        with safe_open(str(path), framework="pt") as f:
            facts = json.loads((f.metadata() or {})["veneer_sparse"])
            parts = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (not a mapping)
        names = {"": ("",), "csr": ("values", "columns", "rows")}
        return {
            name: unpacked(
                fact["form"],
                {part: parts[f"{name}.{part}".removesuffix(".")] for part in names.get(fact["form"], ("values", "places"))},
                fact["shape"],
            )
            for name, fact in facts.items()
        }
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadFile(f"{path}: not whole, or not a file of sparse weights; export it again.") from error
