"""A PEFT folder that has been read: its config, and its tensors by module and slot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import BadFile, Mismatch, Unsupported, nearest
from veneer.method import Method, Params
from veneer.site import Site, matches, tokens_of
from veneer.tools.peft.names import CONFIG, LAYERS, PICKLED, WEIGHTS, Places, short_targets, split_key

CONFIG_LIMIT = 10_000_000
"""Largest config that is read, in bytes."""

CHANGES_THE_MATHS = {
    "alora_invocation_tokens": "activated LoRA (adapted only behind an invocation)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "single trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA (pooled inputs)",
}
"""Options of PEFT configs that this library does not compute, with what they are."""


CHANGES_THE_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")
"""Starts that rewrite the base's weights in a way that the file does not hold."""


@dataclass
class Piece:
    """One part of the adapter to be: a method and, site by site, its variant and tensors."""

    method: Method
    at: list[tuple[Method, Site, Params]] = field(default_factory=list)
    shared: dict[str, Params] = field(default_factory=dict)
    """Tensors that all sites of a tie group share, by the group's name."""


@dataclass
class Given:
    """A PEFT folder that has been read: its config, and its tensors by module and by slot (`lora_A.weight` …)."""

    folder: Path
    config: dict[str, Any]
    places: Places
    modules: dict[str, dict[str, Tensor]]
    tables: list[str] = field(default_factory=list)
    """Modules whose untouched weight PEFT wrote beside its adapter."""
    copies: list[str] = field(default_factory=list)
    """Modules at which PEFT wrote the shared matrices once more."""
    own_fixed: bool = False
    """Whether tensors that our method's seed gives are others in the file, so that ours must keep them, too."""

    def take(self, path: str, slot: str) -> Tensor | None:
        return self.modules[path].pop(slot, None)

    def need(self, path: str, slot: str, *shapes: tuple[int, ...]) -> Tensor:
        """The tensor, of one of these shapes (-1: any)."""
        t = self.take(path, slot)
        if t is None:
            raise BadFile(f"{self.folder / WEIGHTS}: {path or 'the model'} has no {slot}; the file is not whole.")
        if not any(len(s) == t.ndim and all(a in (-1, b) for a, b in zip(s, t.shape)) for s in shapes):
            raise Mismatch(
                f"{self.folder}: made for another model ({self.config.get('base_model_name_or_path') or 'unnamed'}); at "
                f"{path or 'the model'} {slot} is {list(t.shape)}, this model needs {' or '.join(str(list(s)) for s in shapes)}."
            )
        return t

    def having(self, slot: str) -> list[str]:
        return [path for path, slots in self.modules.items() if slot in slots]

    def targets(self, sites: Sequence[Site]) -> str:
        """A target string for the method: the config's own words where they name exactly these sites."""
        own = self.config.get("target_modules")
        words = own if isinstance(own, str) else " ".join(own or ())
        layers = [s for s in self.places.sites if s.kind in LAYERS]
        wanted = {s.module for s in sites}
        if words and {s.module for s in layers if any(matches(t, s) for t in tokens_of(words))} == wanted:
            return words
        return " ".join(short_targets(sorted(wanted), self.places.at))


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked for form."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise BadFile(f"{path}: {path.stat().st_size:,} bytes are too many for a config.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"{folder}: there is no {CONFIG} here; a PEFT adapter holds {CONFIG} and {WEIGHTS}.") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadFile(f"{path}: names no peft_type, so this is not a PEFT adapter.")
    return config


def check_options(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises `Unsupported` for options that change the maths in a way this library does not follow."""
    for option, what in CHANGES_THE_MATHS.items():
        if config.get(option):
            raise Unsupported(
                f"{folder}: {CONFIG} sets {option}, {what}, which cannot be read here. "
                "Merge it into the base with PEFT, or train anew without it."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        raise Unsupported(
            f"{folder}: init_lora_weights={start!r} rewrote the base's weights, and the file does not hold them. "
            "Convert it with PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=…)."
        )


def read_given(folder: Path, config: dict[str, Any], places: Places, prompt: bool) -> Given:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.exists():
        if (folder / PICKLED).exists():
            raise BadFile(
                f"{folder}: {PICKLED} is a pickle, which could run code, and is never read. Convert it where you trust it: "
                "load it with PEFT and call model.save_pretrained(folder, safe_serialization=True)."
            )
        raise BadFile(f"{folder}: there is no {WEIGHTS} beside {CONFIG}.")
    try:
        with safe_open(str(path), framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise BadFile(f"{path}: not a whole safetensors file ({error}); copy or download it again.") from None
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, slot = split_key(key, prompt)
        if slot.startswith("original_module"):  # what the module was before; PEFT writes it with bias="all"
            continue
        here = places.path(owner) if owner else ""
        if here is None:
            base = config.get("base_model_name_or_path") or "another model"
            kind = type(places.model).__name__.removeprefix("Adapted")
            raise Mismatch(f"{folder}: made for {base}; this {kind} has no layer {owner!r}.{nearest(owner, places.at)}")
        modules.setdefault(here, {})[slot] = tensor
    return Given(folder, config, places, modules)


def finished(given: Given, method: Method, found: list[tuple[Method, Site, Params]]) -> Piece:
    """The piece, its method with targets; sites that agree with the method carry it, the others their own variant."""
    if not found:
        raise BadFile(f"{given.folder / WEIGHTS}: holds no tensor of a {given.config['peft_type']} adapter.")
    targets = given.targets([site for _, site, _ in found])
    return Piece(replace(method, targets=targets), [(replace(m, targets=targets), site, p) for m, site, p in found])
