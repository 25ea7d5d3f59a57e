"""From PEFT's config and tensors to methods, sites and their tensors; one function for each of PEFT's types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from veneer import registry
from veneer.errors import BadFile, Mismatch, Unsupported, nearest
from veneer.forms import form_of
from veneer.method import Method, Params
from veneer.site import Site, matches, tokens_of
from veneer.tools.peft_names import (
    CONFIG,
    LAYERS,
    PICKLED,
    WEIGHTS,
    Places,
    check_first_position,
    pattern_value,
    picks,
    prefix_sites,
    short_targets,
    split_key,
    stored_shape,
    turned,
)

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


@dataclass
class Given:
    """A PEFT folder that has been read: its config, and its tensors by module and by slot (`lora_A.weight` …)."""

    folder: Path
    config: dict[str, Any]
    places: Places
    modules: dict[str, dict[str, Tensor]]
    tables: list[str] = field(default_factory=list)
    """Modules whose untouched weight PEFT wrote beside its adapter."""

    def take(self, path: str, slot: str) -> Tensor | None:
        return self.modules[path].pop(slot, None)

    def need(self, path: str, slot: str, *shapes: tuple[int, ...]) -> Tensor:
        """The tensor, of one of these shapes (-1: any)."""
        t = self.take(path, slot)
        if t is None:
            raise BadFile(f"{self.folder / WEIGHTS}: {path} has no {slot}; the file is not whole.")
        if not any(len(s) == t.ndim and all(a in (-1, b) for a, b in zip(s, t.shape)) for s in shapes):
            raise Mismatch(
                f"{self.folder}: made for another model ({self.config.get('base_model_name_or_path') or 'unnamed'}); at {path} "
                f"{slot} is {list(t.shape)}, this model needs {' or '.join(str(list(s)) for s in shapes)}."
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


def read_lora(given: Given) -> Piece:
    if given.config.get("use_dora"):
        return read_dora(given)
    config, found = given.config, []
    common: dict[str, Any] = {"dropout": float(config.get("lora_dropout") or 0.0), "rslora": bool(config.get("use_rslora"))}
    start = config.get("init_lora_weights")
    common["start"] = start if start in ("pissa", "olora") else "kaiming"
    r, alpha = int(config.get("r") or 8), config.get("lora_alpha")
    method = registry.method("lora", r=r, alpha=alpha, lora_bias=bool(config.get("lora_bias")), **common)
    for path in low_rank_modules(given):
        site = given.places.whole(path)
        p = factors_of(given, path, site)
        bias = given.take(path, "lora_B.bias")
        own = {"r": len(p["A"]), "alpha": pattern_value(config.get("alpha_pattern"), path, alpha), "lora_bias": bias is not None}
        if bias is not None:
            p["b"] = bias
        special = replace(method, **own)  # type: ignore[arg-type]
        if common["start"] != "kaiming":
            p = {**first_factors(given.places, special, site), **p}
        found.append((special, site, p))
    return finished(given, method, found)


def low_rank_modules(given: Given) -> list[str]:
    return [*given.having("lora_A.weight"), *given.having("lora_embedding_A")]


def factors_of(given: Given, path: str, site: Site) -> Params:
    """A [r, in] and B [out, r] from a layer's, a convolution's or a table's slots."""
    if site.kind == "embedding":
        A = given.need(path, "lora_embedding_A", (-1, site.in_features))
        return {"A": A, "B": given.need(path, "lora_embedding_B", (site.out_features, len(A)))}
    if site.kind == "conv":
        if site.groups > 1:
            raise Unsupported(f"{given.folder}: {path} is a convolution in {site.groups} groups, where PEFT's LoRA shares its inner layer.")
        inside = site.in_features // math.prod(site.kernel)
        A = given.need(path, "lora_A.weight", (-1, inside, *site.kernel))
        B = given.need(path, "lora_B.weight", (site.out_features, len(A), *(1,) * len(site.kernel)))
        return {"A": A.flatten(1), "B": B.flatten(1)}
    A = given.need(path, "lora_A.weight", (-1, site.in_features))
    return {"A": A, "B": given.need(path, "lora_B.weight", (site.out_features, len(A)))}


def first_factors(places: Places, method: Method, site: Site) -> Params:
    """Where an unconverted PiSSA or OLoRA adapter started: PEFT takes that off the base when it loads one."""
    generator = Generator().manual_seed(0)
    module = places.model.get_submodule(site.module)
    W = form_of(module, site.kind, site.parameter).weight(module).float()
    return method.init_from_weight(W, None, method.init(site, generator), site, generator)


def finished(given: Given, method: Method, found: list[tuple[Method, Site, Params]]) -> Piece:
    """The piece, its method with targets; sites that agree with the method carry it, the others their own variant."""
    if not found:
        raise BadFile(f"{given.folder / WEIGHTS}: holds no tensor of a {given.config['peft_type']} adapter.")
    targets = given.targets([site for _, site, _ in found])
    return Piece(replace(method, targets=targets), [(replace(m, targets=targets), site, p) for m, site, p in found])


def read_dora(given: Given) -> Piece:
    config, found = given.config, []
    common: dict[str, Any] = {"dropout": float(config.get("lora_dropout") or 0.0), "rslora": bool(config.get("use_rslora"))}
    alpha = config.get("lora_alpha")
    method = registry.method("dora", r=int(config.get("r") or 8), alpha=alpha, **common)
    for path in low_rank_modules(given):
        site = given.places.whole(path)
        p = factors_of(given, path, site)
        slot = "lora_magnitude_vector" + (".weight" if "lora_magnitude_vector.weight" in given.modules[path] else "")
        width = site.out_features
        p["m"] = given.need(path, slot, (width,), (1, width, *(1,) * len(site.kernel)), (1, width)).reshape(-1)
        own = replace(method, r=len(p["A"]), alpha=pattern_value(config.get("alpha_pattern"), path, alpha))  # type: ignore[call-arg]
        found.append((own, site, p))
    return finished(given, method, found)


def read_adalora(given: Given) -> Piece:
    config, found = given.config, []
    r = int(config.get("init_r") or 12)
    named = {"gamma": "orth_reg_weight", "t_i": "tinit", "t_f": "tfinal", "delta_T": "deltaT", "T": "total_step", "dropout": "lora_dropout"}
    options = {ours: config[theirs] for ours, theirs in named.items() if config.get(theirs) is not None}
    options |= {key: config[key] for key in ("beta1", "beta2") if key in config}
    target = min(int(config.get("target_r") or 8), r)
    method = registry.method("adalora", target_r=target, init_r=r, alpha=config.get("lora_alpha", 8), **options)
    for path in given.having("lora_E"):
        site = given.places.whole(path)
        Q = given.need(path, "lora_A", (-1, site.in_features))
        P, E = given.need(path, "lora_B", (site.out_features, len(Q))), given.need(path, "lora_E", (len(Q), 1))
        kept = kept_triplets(given, path, r, len(Q))
        p = {"P": P.new_zeros(len(P), r), "lambda": E.new_zeros(r), "Q": Q.new_zeros(r, Q.shape[1])}
        p["P"][:, kept], p["lambda"][kept], p["Q"][kept] = P, E[:, 0], Q
        found.append((method, site, p))
    return finished(given, method, found)


def kept_triplets(given: Given, path: str, r: int, count: int) -> Tensor:
    """Which of the r triplets the file holds: all, or those that `rank_pattern` keeps."""
    for key, mask in (given.config.get("rank_pattern") or {}).items():
        if given.places.path(split_key(key)[0]) == path:
            kept = torch.tensor(mask).flatten().bool()
            if len(kept) == r and int(kept.sum()) == count:
                return kept
            raise BadFile(f"{given.folder}: rank_pattern keeps {int(kept.sum())} of {len(kept)} at {path}, the file holds {count} of {r}.")
    if count != r:
        raise BadFile(f"{given.folder}: {path} has {count} triplets, init_r is {r}, and no rank_pattern says which they are.")
    return torch.ones(r, dtype=torch.bool)


def read_ia3(given: Given) -> Piece:
    within, vectors = [], {}
    for path in given.having("ia3_l"):
        site = given.places.whole(path)
        inner = picks(given.config.get("feedforward_modules"), path)
        width, rest = site.in_features if inner else site.out_features, (1,) * len(site.kernel)
        shape = (1, width, *rest) if inner or rest else (width, 1)
        vectors[path] = site, given.need(path, "ia3_l", shape).reshape(-1)
        within += [path] * inner
    method = registry.method("ia3")
    if any(method.input_side(site) != (path in within) for path, (site, _) in vectors.items()):  # type: ignore[attr-defined]
        method = registry.method("ia3", feedforward=" ".join(short_targets(within, vectors)))
    return finished(given, method, [(method, site, {method.name(site): l}) for site, l in vectors.values()])  # type: ignore[attr-defined]


def read_norms(given: Given) -> Piece:
    found: list[tuple[Method, Site, Params]] = []
    method = registry.method("ln-tuning")
    for path in given.having("ln_tuning_layers.weight"):
        site = given.places.whole(path)
        if site.kind != "norm":
            raise Unsupported(f"{given.folder}: LN tuning of {path}, which is no norm, cannot be read.")
        p = {"gamma": given.need(path, "ln_tuning_layers.weight", (site.out_features,))}
        if (beta := given.take(path, "ln_tuning_layers.bias")) is not None:
            p["beta"] = beta
        found.append((method, site, p))
    return finished(given, method, found)


def read_prompt(given: Given) -> Piece:
    sites = given.places.only("model")
    if not sites:
        raise Unsupported(f"{given.folder}: this model takes no token embeddings, so learned tokens have no place.")
    check_first_position(given.places, str(given.config.get("task_type")), str(given.folder))
    length = int(given.config.get("num_virtual_tokens") or 0)
    P = given.need("", "prompt_embeddings", (-1, sites[0].in_features))
    if not 1 <= length <= len(P):
        raise BadFile(f"{given.folder}: num_virtual_tokens is {length}, the table has {len(P)} rows.")
    method = registry.method("prompt-tuning", length=length, after_first=False)
    return Piece(method, [(method, sites[0], {"P": P[:length]})])  # of an encoder-decoder's two tables PEFT reads the first


def read_prefix(given: Given) -> Piece:
    sites = prefix_sites(given.places, str(given.folder))
    width = 2 * sum(s.out_features for s in sites)
    table = given.need("", "prompt_embeddings", (-1, width))
    method = registry.method("prefix-tuning", length=len(table), shift_positions=True)
    pieces = table.split([s.out_features for s in sites for _ in "kv"], 1)
    return Piece(method, [(method, s, {"PK": pieces[2 * i], "PV": pieces[2 * i + 1]}) for i, s in enumerate(sites)])


def read_saved_modules(given: Given) -> tuple[list[Piece], list[Piece]]:
    """Whole modules and biases that PEFT saved beside its own tensors: what acts before the adapter, and what after."""
    full, bitfit, head = Piece(registry.method("full")), Piece(registry.method("bitfit")), Piece(registry.head_method())
    for path, slots in given.modules.items():
        under = {slot.removeprefix("base_layer."): slot for slot in list(slots)}
        if unknown := [slot for name, slot in under.items() if name not in ("weight", "bias") and not given.places.bare(path, name)]:
            raise Unsupported(
                f"{given.folder / WEIGHTS}: {path or 'the model'} has {unknown[0]}, which no known part of the format explains."
            )
        for name in [n for n in under if given.places.bare(path, n)]:
            site = given.places.bare(path, name)
            assert site is not None
            full.at.append((full.method, site, {"weight": given.need(path, under.pop(name), stored_shape(given.places, site))}))
        if not under:
            continue
        site = given.places.whole(path)
        if "weight" not in under:
            bias = given.need(path, under["bias"], (site.out_features,))
            bitfit.at.append((bitfit.method, site, {"beta" if site.kind == "norm" else "b": bias}))
            continue
        p = saved_module(given, path, site, under)
        if under["weight"].startswith("base_layer.") and same_as_base(given.places, site, p):
            given.tables.append(path)
            continue
        piece = head if site.trainable_head and site.role == "head" else full
        piece.at.append((piece.method, site, p))
    for piece in (full, bitfit):
        if piece.at:
            names = " ".join(re.escape(s.name) for _, s, _ in piece.at)
            piece.method = replace(piece.method, targets=names)
            piece.at = [(piece.method, s, p) for _, s, p in piece.at]
    return [full, bitfit], [head]


def saved_module(given: Given, path: str, site: Site, under: Mapping[str, str]) -> Params:
    """A module's own weight and bias as [out, in] and [out]."""
    W = given.need(path, under["weight"], stored_shape(given.places, site))
    form = form_of(given.places.model.get_submodule(path), site.kind, site.parameter)
    W = W.t().contiguous() if turned(form) else W
    p = {"weight": W.flatten(1) if W.ndim > 1 else W}
    if "bias" in under:
        p["bias"] = given.need(path, under["bias"], (site.out_features,))
    return p


def same_as_base(places: Places, site: Site, p: Params) -> bool:
    module = places.model.get_submodule(site.module)
    W = form_of(module, site.kind, site.parameter).weight(module)
    return torch.equal(W.cpu(), p["weight"].to(W.dtype).reshape(W.shape))


READERS: dict[str, Callable[[Given], Piece]] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "IA3": read_ia3,
    "LN_TUNING": read_norms,
    "PROMPT_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
}
"""By PEFT's type."""
