"""A model made on `meta`, filled from its checkpoint: tensor by tensor, sharded and quantised on the way.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    veneer.pack(model)                                               # if the linear layers are to be 4-bit ones
    tuned = veneer.attach(model, "lora(r=16)")
    veneer.fill(model, folder, device="cuda", shard=fully_shard)     # if it is to be sharded

Nothing is held beside the model but the tensor that is read, and of a block that is sharded each process reads its piece.
A 4-bit layer is quantised from its whole weight, so blocks of such layers are read whole and sharded then.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.errors import BadFile, BadValue, Mismatch, MissingExtra, Unsupported, nearest
from veneer.slot import Slot
from veneer.waiting import Waiting, WaitingShared, piece_of, replace, sharded_like


def fill(
    model: nn.Module, folder: str | Path, *, device: str | torch.device = "cpu", shard: Callable[[nn.Module], Any] | None = None
) -> nn.Module:
    """Reads a safetensors checkpoint into a model that is on `meta`; its adapters get their first values as layers arrive.

    Values are cast to the dtypes the model was made with. A task's own head that the checkpoint lacks starts at random.

    Args:
        folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`; or one such file.
        device: where the model is to live.
        shard: called for every block, for token embedding and head where they are not tied, and last for the model, as
            `torch.distributed.fsdp.fully_shard` wants it; `partial(fully_shard, mesh=mesh)` where there are options. Every
            process must call `fill`.

    Raises:
        BadFile, Mismatch: tensors that are missing or of another shape.
    """
    with contextlib.closing(Checkpoint(folder)) as weights:
        filling = Filling(model, weights, torch.device(device))
        for unit in [*(model.get_submodule(name) for name in units(model)), model]:
            whole = any(p.is_meta and is_packed(p) for p in unit.parameters())
            if shard is not None and not whole:
                shard(unit)
            filling.unit(unit)
            if shard is not None and whole:
                shard(unit)
    filling.finish()
    return model


def pack(model: nn.Module) -> nn.Module:
    """Turns the linear layers in the blocks of a model on `meta` into 4-bit ones (NF4, double quantisation, bitsandbytes).

    `fill` quantises each weight as it is read. Packed bytes are kept in words of the weight's own dtype, as sharding wants it.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise MissingExtra("pack needs bitsandbytes. Run: pip install 'veneer[quant]'") from None
    if "veneer" in model._modules:
        raise Unsupported("pack: adapters are attached already. Pack first, then attach, then fill.")
    for name in dict.fromkeys(s.module for s in anatomy.sites(model) if s.kind == "linear" and s.depth is not None):
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            continue
        dtype = layer.weight.dtype
        if not layer.weight.is_meta:
            raise Unsupported(f"pack: {name} has its weights already; make the model inside `with torch.device('meta')`.")
        options: Any = dict(quant_type="nf4", compress_statistics=True, quant_storage=dtype, device="meta")
        packed = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, **options).to(dtype)
        packed.train(layer.training)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed)
    return model


def units(model: nn.Module) -> list[str]:
    """What is filled, and gathered where it is sharded, as one: the blocks; token embedding and head, unless they are one tensor."""
    sites = anatomy.sites(model)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    apart = [s for s in sites if s.role in ("embed.token", "head") and s.kind in ("embedding", "linear") and s.depth is None]
    apart = [s for s in apart if uses[id(model.get_submodule(s.module)._parameters.get("weight"))] == 1]
    return list(dict.fromkeys(s.module for s in [*(s for s in sites if s.kind == "block"), *apart]))


def is_packed(parameter: Any) -> bool:
    """Whether a parameter is quantised when it gets its values."""
    return type(parameter).__name__ == "Params4bit"


# -- the checkpoint -------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a safetensors checkpoint, in one file or several; one file is open at a time."""

    def __init__(self, folder: str | Path):
        path = Path(folder)
        self.place, self.open, self.handle = path, contextlib.ExitStack(), None
        self.opened: Path | None = None
        indices = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        files = [f for f in files if f.name == "model.safetensors"] or files
        self.files: dict[str, Path] = {}
        if indices:
            self.files = {name: path / self._inside(file) for name, file in self._map(indices[0]).items()}
        elif len(files) == 1:
            with contextlib.closing(self):
                self.files = dict.fromkeys(self._file(files[0]).keys(), files[0])
        else:
            raise BadFile(f"{path}: expected model.safetensors, or model.safetensors.index.json with its shards.")

    def _map(self, index: Path) -> dict[str, str]:
        try:
            return dict(json.loads(index.read_text("utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise BadFile(f"{index}: not an index of a safetensors checkpoint (no weight_map).") from None

    def _inside(self, file: str) -> str:
        if Path(file).name != file:
            raise BadFile(f"{self.place}: its index names {file!r}, which is not a file of this folder.")
        return file

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path != self.opened:
            self.close()
            try:
                self.handle = self.open.enter_context(safe_open(str(path), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise BadFile(f"{path}: not a whole safetensors file ({error}); copy or download it again.") from None
            self.opened = path
        return self.handle

    def shape(self, name: str) -> list[int]:
        return list(self._file(self.files[name]).get_slice(name).get_shape())

    def read(self, name: str, piece: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a piece of it, over the file's own memory: copy it before another is read."""
        file = self._file(self.files[name])
        return file.get_tensor(name) if not piece else file.get_slice(name)[piece]

    def close(self) -> None:
        self.open.close()
        self.opened = self.handle = None


def known_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The checkpoint's names by what transformers calls them today; other libraries' as they are."""
    if not hasattr(model, "_init_weights"):
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings: Any = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]  # type: ignore[arg-type]
    return {rename_source_key(name, renamings, [])[0]: name for name in names}


# -- filling --------------------------------------------------------------------------------------------------


class Filling:
    """One model on its way from `meta` to a device."""

    def __init__(self, model: nn.Module, weights: Checkpoint, device: torch.device):
        self.model, self.weights, self.device = model, weights, device
        self.heads = {s.module for s in anatomy.sites(model) if s.role == "head" and s.trainable_head}
        self.paths = {id(m): path for path, m in model.named_modules() if "veneer" not in path.split(".")}
        self.called = known_names(model, weights.files)
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = f"{prefix}." if prefix else ""
        if not any(p.is_meta for p in model.parameters()):
            raise BadValue("fill: no weight of the model is on meta; make it inside `with torch.device('meta')`.")
        self.tied: dict[int, list[tuple[nn.Module, str]]] = {}
        for module, name, p in self._base(model):
            self.tied.setdefault(id(p), []).append((module, name))
        self.places = {(id(module), name): places for places in self.tied.values() for module, name in places}
        slot = model._modules.get("veneer")
        self.adapters = list(slot.tuned.adapters.values()) if isinstance(slot, Slot) and slot.tuned is not None else []
        self.shared: list[Waiting] = []
        self.waiting: dict[str, list[Waiting]] = {}
        for one in (one for adapter in self.adapters for one in adapter.waiting):
            (self.shared if isinstance(one, WaitingShared) else self.waiting.setdefault(one.site.module, [])).append(one)
        self.fresh: list[str] = []

    def _base(self, unit: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """The base's parameters and buffers in a unit, each where it is held."""
        for module in unit.modules():
            if id(module) in self.paths:
                yield from ((module, n, t) for held in (module._parameters, module._buffers) for n, t in held.items() if t is not None)

    def unit(self, unit: nn.Module) -> None:
        """Everything under a unit that has no values yet: the base's tensors, what no checkpoint holds, the adapters."""
        while self.shared:  # what sites share comes first: their own first values may rest on it
            self.shared.pop(0).arrive(self.device)
        lacking: dict[nn.Module, list[str]] = {}
        for module, name, held in list(self._base(unit)):
            if not held.is_meta:
                if name in module._buffers:
                    module._buffers[name] = held.to(self.device)
            elif self._now(module, name).is_meta and not self._read(module, name):
                lacking.setdefault(module, []).append(name)
        for module, names in lacking.items():
            self._begin(module, names)
        for path in [self.paths[id(module)] for module in unit.modules() if id(module) in self.paths]:
            for one in self.waiting.pop(path, ()):
                one.arrive(self.device)

    @staticmethod
    def _now(module: nn.Module, name: str) -> Tensor:
        held = module._parameters.get(name)
        return held if held is not None else module._buffers[name]  # type: ignore[return-value]

    def _full(self, module: nn.Module, name: str) -> str:
        return f"{self.paths[id(module)]}.{name}".removeprefix(".")

    def _names(self, module: nn.Module, name: str) -> Iterator[str]:
        """What the tensor may be called in the checkpoint, but for transformers' renamings."""
        for place, key in self.places[id(module), name]:
            full = self._full(place, key)
            yield from (full, full.removeprefix(self.prefix), self.prefix + full)

    def _read(self, module: nn.Module, name: str) -> bool:
        """Fills one tensor, wherever it is held, from the checkpoint if that has it."""
        there = next((self.called[n] for n in self._names(module, name) if n in self.called), None)
        held: Any = self._now(module, name)
        if there is None or name in module._non_persistent_buffers_set:
            return False
        shape, wanted = self.weights.shape(there), list(held.shape)
        if shape != wanted:
            raise Mismatch(f"{self.weights.place}: {there} is {shape}, and this model needs {wanted}.")
        read = self.weights.read(there, piece_of(held) if hasattr(held, "full_tensor") else None)
        value = read.to(self.device, held.dtype, copy=True)
        self._put(module, name, value)
        return True

    def _put(self, module: nn.Module, name: str, value: Tensor) -> None:
        held: Any = self._now(module, name)
        if name in module._buffers:
            module._buffers[name] = value
            return
        if is_packed(held):
            new = type(held)(value, requires_grad=False, quant_type=held.quant_type, compress_statistics=held.compress_statistics,
                             blocksize=held.blocksize, quant_storage=held.quant_storage, module=module).to(self.device)  # fmt: skip
        else:
            value = sharded_like(held, value) if hasattr(held, "full_tensor") else value
            new = nn.Parameter(value, requires_grad=held.requires_grad)
        for place, key in self.places[id(module), name]:
            place._parameters[key] = new

    # -- what no checkpoint holds ---------------------------------------------------------------------------

    def _begin(self, module: nn.Module, names: list[str]) -> None:
        """Tensors that the checkpoint lacks: buffers that the model computes, and a task's own head."""
        path = self.paths[id(module)]
        missing = [n for n in names if n in module._parameters or n not in module._non_persistent_buffers_set]
        if missing and path not in self.heads:
            first = self._full(module, missing[0])
            raise BadFile(
                f"{self.weights.place}: the checkpoint has no {first}.{nearest(first, self.weights.files)} "
                "Make the model with the class and configuration that the checkpoint was saved from. Weights that transformers joins "
                "while loading (experts stored one by one) are not read here: load and save such a model once with transformers."
            )
        self.fresh += [self._full(module, n) for n in missing]
        held = {n: self._now(module, n) for n in names}
        for name, t in held.items():  # marked, so that what nobody computes is found out
            holder: Any = module._parameters if name in module._parameters else module._buffers
            value = torch.full(t.shape, float("nan") if t.is_floating_point() else 0, dtype=t.dtype, device=self.device)
            if not t.is_floating_point() and t.dtype != torch.bool:
                value.fill_(torch.iinfo(t.dtype).min)
            holder[name] = nn.Parameter(value, requires_grad=False) if holder is module._parameters else value
        with torch.no_grad():
            self._compute(module, path, names)
        for name, t in held.items():
            value = self._now(module, name).detach()
            mark = (
                value.isnan() if value.is_floating_point() else value == (0 if value.dtype == torch.bool else torch.iinfo(value.dtype).min)
            )
            if value.dtype != torch.bool and value.numel() and bool(mark.any()):
                raise self._unknown(module, name)
            if name in module._parameters:
                replaced = value
                module._parameters[name] = t  # type: ignore[assignment]
                replace(module, name, replaced)

    def _compute(self, module: nn.Module, path: str, names: list[str]) -> None:
        """The module's own start: transformers' for its models, else torch's where nothing of the module is filled."""
        owner: Any = self.model
        for part in ["", *(p for p in self._parents(path))]:
            above = self.model.get_submodule(part)
            owner = above if hasattr(above, "_init_weights") else owner
        kept: list[Any] = [t for held in (module._parameters, module._buffers) for n, t in held.items() if t is not None and n not in names]
        if hasattr(owner, "_init_weights"):
            for t in kept:
                t._is_hf_initialized = True
            owner._init_weights(module)
            for t in kept:
                del t._is_hf_initialized
        elif hasattr(module, "reset_parameters") and not kept:
            module.reset_parameters()  # type: ignore[operator]
        else:
            raise self._unknown(module, names[0])

    @staticmethod
    def _parents(path: str) -> Iterator[str]:
        parts = path.split(".")
        return (".".join(parts[:n]) for n in range(1, len(parts) + 1)) if path else iter(())

    def _unknown(self, module: nn.Module, name: str) -> Unsupported:
        return Unsupported(
            f"fill: {self._full(module, name)} is in no checkpoint, and {type(module).__name__} has no way to compute it again. Make "
            "the model with real buffers: accelerate's init_empty_weights(include_buffers=False) in place of torch.device('meta')."
        )

    def finish(self) -> None:
        """Nothing waits any more; says what started at random."""
        for adapter in self.adapters:
            adapter.waiting = []
        if self.fresh:
            warnings.warn(f"fill: {', '.join(self.fresh)} not in {self.weights.place}: the task's head starts at random.", stacklevel=3)
