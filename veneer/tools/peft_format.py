"""Hugging Face PEFT's adapter folders, `adapter_config.json` and `adapter_model.safetensors`: read and written bit-exactly.

The file's keys say which modules are adapted, the shapes their ranks; the config says scales and switches. What a config
asks for and this library does not compute is refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer import anatomy, registry
from veneer.adapt import Adapter, Source, Tuned, check_name, tuned_of
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported, nearest
from veneer.forms import EmbeddingForm, Form, TransposedForm, form_of
from veneer.layer import Frozen, Part, Slot, add_fold
from veneer.method import LowRankMethod, Method, Params, Stack
from veneer.site import Site, matches, tokens_of
from veneer.starts import truncated_svd
from veneer.store import CannotWrite, write_tensors, write_text

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LAYERS = ("linear", "conv", "embedding", "norm")
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


# -- what both ways share -------------------------------------------------------------------------------------


class Places:
    """The model's sites by module path; the row ranges of a fused weight count as one, as PEFT sees them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = anatomy.sites(model)
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")

    @cached_property
    def at(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.kind in (*LAYERS, "parameter"):
                found.setdefault(site.module, []).append(site)
        return found

    def path(self, name: str) -> str | None:
        """The module's path here; saved from a model with or without a head, it may differ in the backbone's name."""
        tries = (name, name.removeprefix(self.prefix + "."), f"{self.prefix}.{name}")
        return next((t for t in tries if t in self.at), None)

    def whole(self, path: str) -> Site:
        """The one site of a module's weight."""
        weights = [s for s in self.at[path] if s.kind in LAYERS and not s.parameter.endswith(("k_proj_weight", "v_proj_weight"))]
        if not weights:
            raise Unsupported(f"PEFT format: {path} is not a layer with one weight.")
        first = weights[0]
        if first.rows is None:
            return first
        return replace(first, name=path, role="attn.qkv", rows=None, out_features=sum(s.out_features for s in weights))

    def bare(self, path: str, parameter: str) -> Site | None:
        return next((s for s in self.at[path] if s.kind == "parameter" and s.parameter == parameter), None)

    def only(self, kind: str) -> list[Site]:
        return [s for s in self.sites if s.kind == kind]


def picks(targets: Any, path: str) -> bool:
    """Whether PEFT's `target_modules` (a list of names, or a regular expression) names this module."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, path) is not None
        except re.error:
            return False
    return any(path == t or path.endswith(f".{t}") for t in targets or ())


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The entry of `rank_pattern` or `alpha_pattern` for a module: the first key that is its name, its end, or matches it."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except re.error:
            raise BadFile(f"{CONFIG}: the pattern {key!r} is not a regular expression.") from None
    return default


def short_targets(paths: Sequence[str], everything: Iterable[str]) -> list[str]:
    """The shortest list of names that picks exactly these modules: last names where they do, else whole paths."""
    last = sorted({p.rpartition(".")[2] for p in paths})
    wanted = set(paths)
    exact = all((p in wanted) == picks(last, p) for p in {*everything, *paths})
    return last if exact and not any(n.isdigit() for n in last) else sorted(wanted)


# -- reading --------------------------------------------------------------------------------------------------


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


class FromTensors(Source):
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Params]) -> None:
        self.tensors = tensors

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        return {}

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        return self.tensors[site.name]


def load_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> Tuned:
    """Loads a folder that PEFT's `save_pretrained` wrote into the model, under `name` ("default"), and activates it.

    Raises:
        BadFile: missing, truncated or pickled files.
        Mismatch: an adapter for another model.
        Unsupported: a kind of adapter, or an option, that this library does not compute.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = str(config.get("peft_type"))
    if kind not in FORMATS:
        raise Unsupported(f"{folder}: PEFT's {kind} cannot be read.{nearest(kind, FORMATS)} Those that can: {', '.join(FORMATS)}.")
    check_options(folder, config)
    tuned = tuned_of(model)
    name = name or "default"
    check_name(name, tuned)
    given = read_given(folder, config, Places(model), kind in PROMPTS)
    with torch.no_grad():
        main = FORMATS[kind].read(given)
        before, after = read_saved_modules(given)
    pieces = [p for p in (*before, main, *after) if p.at]
    method = pieces[0].method if len(pieces) == 1 else Stack(methods=tuple(p.method for p in pieces))
    adapter = Adapter(name, method, [], facts={"peft": config, **({"peft_tables": given.tables} if given.tables else {})})
    for piece in pieces:
        for special, site, _ in piece.at:
            special.check(site)
    planned = [(p.method, [(m, s) for m, s, _ in p.at], FromTensors({s.name: t for _, s, t in p.at})) for p in pieces]
    return tuned.add(adapter, planned)


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


TUNED = re.compile(r"(?:^|\.)(lora_\w+|ia3_l|ln_tuning_layers|base_layer\.(?:weight|bias)$|original_module|prompt_embeddings)(\..*)?$")


def split_key(key: str, prompt: bool = False) -> tuple[str, str]:
    """Module path and slot of a key: "base_model.model.h.0.attn.lora_A.weight" → ("h.0.attn", "lora_A.weight")."""
    key = key.removeprefix("base_model.") if prompt else key.removeprefix("base_model.model.")
    found = TUNED.search(key)
    if found is None:
        owner, _, slot = key.rpartition(".")
        owner = re.sub(r"\.modules_to_save(\.default)?", "", owner)
    else:
        owner, slot = key[: found.start()], key[found.start() :].lstrip(".")
    words = slot.split(".")
    if words[0].startswith(("lora_", "ln_")) and words[-1] in ("weight", "bias"):
        slot = f"{words[0]}.{words[-1]}"  # some writers leave the adapter's name between the two
    return owner.replace(".base_layer", ""), slot


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


def check_first_position(places: Places, task: str | None, where: str) -> None:
    """With PEFT, a head that reads the first position of an encoder's output reads the first learned token."""
    inner = getattr(places.model, "base_model", None)
    pools = getattr(inner, "pooler", None) is not None
    if task == "SEQ_CLS" and not pools and not any(s.causal for s in places.only("attention")):
        raise Unsupported(
            f"{where}: the head of {type(places.model).__name__} reads the first position, which is a learned token with PEFT and the "
            "text's first token here, so the answers would differ. Attach 'prompt-tuning' or 'prefix-tuning' and train it here."
        )


def read_prefix(given: Given) -> Piece:
    sites = prefix_sites(given.places, str(given.folder))
    width = 2 * sum(s.out_features for s in sites)
    table = given.need("", "prompt_embeddings", (-1, width))
    method = registry.method("prefix-tuning", length=len(table), shift_positions=True)
    pieces = table.split([s.out_features for s in sites for _ in "kv"], 1)
    return Piece(method, [(method, s, {"PK": pieces[2 * i], "PV": pieces[2 * i + 1]}) for i, s in enumerate(sites)])


def prefix_sites(places: Places, where: str) -> list[Site]:
    """The attention modules that PEFT's table serves, in its order."""
    sites = [s for s in places.only("attention") if s.role == "attn"]
    if any(s.side for s in sites):
        raise Unsupported(
            f"{where}: PEFT's prefix tuning of encoder-decoders gives the decoder half of its table, twice, under position biases; "
            "that cannot be matched here. Attach 'prefix-tuning' and train it, or use 'prompt-tuning', whose files agree."
        )
    if not sites:
        raise Unsupported(f"{where}: this model has no attention module that takes learned keys and values.")
    return sites


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


def stored_shape(places: Places, site: Site) -> tuple[int, ...]:
    held = places.model.get_submodule(site.module)._parameters[site.parameter]
    assert held is not None
    return tuple(held.shape)


def turned(form: Form) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(form, TransposedForm | EmbeddingForm)


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


# -- writing --------------------------------------------------------------------------------------------------


@dataclass
class Taken:
    """An adapter on its way out: its parts by module, and the config and tensors that come of them."""

    tuned: Tuned
    name: str
    places: Places
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def remembered(self) -> dict[str, Any]:
        """The config it was loaded with, if it came from PEFT."""
        return dict(self.tuned.adapters[self.name].facts.get("peft") or {})

    def task(self) -> str | None:
        """PEFT's name of the model's task; as remembered where it was loaded."""
        return self.remembered.get("task_type") or task_type(self.tuned.model)

    def put(self, path: str, slot: str, tensor: Tensor) -> None:
        self.tensors[f"base_model.model.{path}.{slot}"] = tensor

    def layer(self, parts: Sequence[Part]) -> tuple[nn.Module, Slot, Form]:
        module = self.tuned.model.get_submodule(parts[0].site.module)
        slot: Slot = module.veneer  # type: ignore[assignment]
        return module, slot, slot.forms[parts[0].site.parameter]

    def frozen(self, parts: Sequence[Part]) -> Frozen:
        module, slot, form = self.layer(parts)
        return Frozen(slot, module, form)

    def folded(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias with these parts, and no others, folded in."""
        call = self.frozen(parts)
        W, b = call.weight(), call.bias()
        new_W, new_b = W, b
        for rows in dict.fromkeys(p.site.rows for p in parts):
            new_W, new_b = add_fold(new_W, new_b, W, b, rows, [p for p in parts if p.site.rows == rows], 1.0)
        return new_W, new_b

    def modules(self) -> list[str]:
        """Paths of the base's modules."""
        return [name for name, _ in self.tuned.model.named_modules() if name and "veneer" not in name.split(".")]

    def name_targets(self, paths: Sequence[str]) -> None:
        """`target_modules`: as remembered where that still picks these modules, else the shortest list that does."""
        modules = self.modules()
        before = self.remembered.get("target_modules")
        same = before and {m for m in modules if picks(before, m)} == set(paths)
        self.config["target_modules"] = before if same else short_targets(paths, modules)
        turned_round = [
            turned(self.layer([p])[2]) for p in self.tuned.adapters[self.name].parts if p.site.module in paths and p.site.kind == "linear"
        ]
        self.config["fan_in_fan_out"] = bool(turned_round) and all(turned_round)


Grouped = dict[str, list[Part]]
"""Parts of one method by module; several where a fused weight is adapted by row ranges."""


def save_peft(
    tuned: Tuned,
    folder: str | Path,
    name: str | None = None,
    *,
    as_lora: bool = False,
    rank: int | None = None,
    tell: Callable[[str], object] = print,
) -> Path:
    """Writes one adapter as PEFT's `save_pretrained` would, whole or not at all, and returns the folder.

    Args:
        name: the adapter; the first active one by default.
        as_lora: write plain LoRA whatever the method: exact for low-rank methods, else the best product of this rank.
        rank: with as_lora, the rank for methods that are not of low rank.
        tell: where the error of an inexact conversion is reported, as a sentence.

    Raises:
        Unsupported: a method that PEFT does not have; the message says what can be done instead.
    """
    name = name if name is not None else (tuned.active or list(tuned.adapters))[0]
    taken = Taken(tuned, name, Places(tuned.model))
    parts = {i: [p for p in tuned.adapters[name].parts if p.index == i] for i in range(len(tuned.adapters[name].method.parts))}
    with torch.no_grad():
        main = write_as_lora(taken, parts, rank, tell) if as_lora else write_method(taken, parts)
        write_extras(taken, {i: p for i, p in parts.items() if i not in main})
    finish(taken)
    folder = Path(folder)
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in taken.tensors.items()}
    text = json.dumps(dict(sorted(taken.config.items())), indent=2) + "\n"
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"Could not write {folder}: it is a file; choose another folder.")
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, text)
    return folder


def grouped(parts: Iterable[Part]) -> Grouped:
    out: Grouped = {}
    for part in parts:
        out.setdefault(part.site.module, []).append(part)
    return out


def write_method(taken: Taken, parts: Mapping[int, list[Part]]) -> set[int]:
    """Writes the one part that is a PEFT method, and returns its index."""
    methods = taken.tuned.adapters[taken.name].method.parts
    found = [i for i, m in enumerate(methods) if m.slug in WRITERS]
    strange = [m.slug for m in methods if m.slug not in WRITERS and m.slug not in EXTRAS]
    way = "Save it in veneer's own format, or export it as LoRA (as_lora=True, with rank=… where it is not of low rank)."
    if strange:
        raise Unsupported(f"PEFT has no {strange[0]} that this could be written as. {way}")
    if len(found) != 1:
        what = " + ".join(methods[i].slug for i in found) or " + ".join(m.slug for m in methods)
        raise Unsupported(f"A PEFT adapter holds exactly one method; this is {what}. {way}")
    kind = WRITERS[methods[found[0]].slug]
    taken.config["peft_type"] = kind
    writer = FORMATS[kind].write
    own = parts[found[0]]
    if bare := next((p for p in own if p.site.kind == "parameter" or p.site.parameter.endswith("_proj_weight")), None):
        raise Unsupported(f"{bare.site.name} is a bare parameter, which PEFT's format has no place for. {way}")
    writer(taken, grouped(own))
    return {found[0]}


# Low rank


def quantised(part: Part) -> bool:
    """Whether a quantised copy stands for the weight."""
    return getattr(part.method, "start", None) == "loftq"


def product(part: Part) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and s of W + s · B A; as they are where the method holds just these."""
    p, method = part.tensors(), part.method
    if quantised(part):
        raise Unsupported(
            f"{method.label} at {part.site.name} stands on a quantised copy of the weight, which PEFT's file cannot hold; "
            "export it merged, or as_lora=True with a rank."
        )
    if "A" in p and "B" in p and "A0" not in p and p["B"].shape[0] == part.site.out_features:
        return p["A"], p["B"], method.scale  # type: ignore[attr-defined]
    L, R = method.factors(p, part.site)  # type: ignore[attr-defined]
    return R, L, 1.0


def joined(taken: Taken, parts: Sequence[Part], made: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """The products of one module as one: row ranges of a fused weight side by side, a stack's one after another."""
    if len(parts) == 1 and parts[0].site.rows is None:
        return made[0]
    out = taken.places.whole(parts[0].site.module).out_features
    scale = made[0][2] if len({s for _, _, s in made}) == 1 else 1.0
    A, B, at = torch.cat([a for a, _, _ in made]), made[0][1].new_zeros(out, sum(len(a) for a, _, _ in made)), 0
    for part, (a, b, s) in zip(parts, made):
        B[slice(None) if part.site.rows is None else slice(*part.site.rows), at : at + len(a)] = b if s == scale else b * (s / scale)
        at += len(a)
    return A, B, scale


def put_product(taken: Taken, path: str, A: Tensor, B: Tensor) -> None:
    site = taken.places.whole(path)
    if site.kind == "embedding":
        taken.put(path, "lora_embedding_A", A)
        taken.put(path, "lora_embedding_B", B)
        return
    if site.kind == "conv":
        if site.groups > 1:
            raise Unsupported(
                f"{path} is a convolution in {site.groups} groups, which PEFT's LoRA treats otherwise; export the adapter merged."
            )
        A = A.reshape(len(A), -1, *site.kernel)
        B = B.reshape(*B.shape, *(1,) * len(site.kernel))
    taken.put(path, "lora_A.weight", A)
    taken.put(path, "lora_B.weight", B)


def put_scales(taken: Taken, scales: Mapping[str, tuple[int, float]], rslora: bool, alphas: Mapping[str, float | None]) -> None:
    """r, lora_alpha and, where modules differ, rank_pattern and alpha_pattern."""
    root = math.sqrt if rslora else float
    alpha = {path: whole_number(alphas.get(path) or s * root(r)) for path, (r, s) in scales.items()}
    common, usual = most([r for r, _ in scales.values()]), most(list(alpha.values()))
    before = taken.remembered
    if any(before.get(k) for k in ("rank_pattern", "alpha_pattern")) and all(
        pattern_value(before.get("rank_pattern"), path, before.get("r")) == r
        and pattern_value(before.get("alpha_pattern"), path, before.get("lora_alpha")) == alpha[path]
        for path, (r, _) in scales.items()
    ):
        return  # the words it was loaded with still hold
    taken.config.update(
        r=common,
        lora_alpha=usual,
        rank_pattern={f"^{re.escape(p)}": r for p, (r, _) in scales.items() if r != common},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alpha.items() if a != usual},
        use_rslora=rslora,
    )


def most(values: list[Any]) -> Any:
    return max(values, key=values.count)


def whole_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def write_lora(taken: Taken, groups: Grouped) -> None:
    """LoRA: A and B as they are; starts that keep frozen copies become plain LoRA of twice the rank."""
    rslora = {p.method.rslora for parts in groups.values() for p in parts} == {True}  # type: ignore[attr-defined]
    biased = any("b" in p.tensors() for parts in groups.values() for p in parts)
    scales, alphas = {}, {}
    for path, parts in groups.items():
        made = [product(p) for p in parts]
        A, B, s = joined(taken, parts, made)
        put_product(taken, path, A, B)
        scales[path] = len(A), s
        plain = A is made[0][0] and getattr(parts[0].method, "r", 0) == len(A)
        alphas[path] = parts[0].method.alpha if plain and parts[0].method.rslora == rslora else None  # type: ignore[attr-defined]
        if biased and taken.places.whole(path).kind != "embedding":
            b = B.new_zeros(len(B))
            for part, (_, _, own) in zip(parts, made):
                if "b" in part.tensors():  # the bias carries the method's scale, whatever form the product took
                    rows = slice(None) if part.site.rows is None else slice(*part.site.rows)
                    ratio = part.method.scale / s  # type: ignore[attr-defined]
                    b[rows] = part.tensors()["b"] if own == s == part.method.scale else part.tensors()["b"] * ratio  # type: ignore[attr-defined]
            taken.put(path, "lora_B.bias", b)
    put_scales(taken, scales, rslora, alphas)
    any_part = next(iter(groups.values()))[0]
    put_lora_options(taken, groups, lora_dropout=any_part.method.dropout, lora_bias=biased)  # type: ignore[attr-defined]


def put_lora_options(taken: Taken, groups: Grouped, **options: Any) -> None:
    taken.config.update(options, init_lora_weights=True, use_dora=options.get("use_dora", False), bias="none")
    taken.name_targets(list(groups))


def write_dora(taken: Taken, groups: Grouped) -> None:
    """DoRA: A, B and the magnitude of every row; rows that are not adapted keep their own."""
    rslora = {p.method.rslora for parts in groups.values() for p in parts} == {True}  # type: ignore[attr-defined]
    scales, alphas = {}, {}
    for path, parts in groups.items():
        first, site = parts[0], taken.places.whole(path)
        made = []
        for part in parts:
            p, zero = part.tensors(), part.tensors()["m"]
            none = (zero.new_zeros(1, part.site.in_features), zero.new_zeros(part.site.out_features, 1), 1.0)
            made.append((p["A"], p["B"], part.method.scale) if "A" in p else none)  # type: ignore[attr-defined]
        A, B, s = joined(taken, parts, made)
        put_product(taken, path, A, B)
        scales[path] = len(A), s
        plain = A is made[0][0] and first.method.r == len(A) and first.method.rslora == rslora  # type: ignore[attr-defined]
        alphas[path] = first.method.alpha if plain else None  # type: ignore[attr-defined]
        m = first.tensors()["m"]
        if first.site.rows is not None:
            m = first.method.row_norm(taken.frozen(parts).weight(), {}).to(m.dtype)  # type: ignore[attr-defined]
            for part in parts:
                m[slice(*part.site.rows)] = part.tensors()["m"]  # type: ignore[misc]
        taken.put(path, "lora_magnitude_vector", m.reshape(1, -1, *(1,) * len(site.kernel)) if site.kind == "conv" else m)
    put_scales(taken, scales, rslora, alphas)
    put_lora_options(taken, groups, lora_dropout=next(iter(groups.values()))[0].method.dropout, use_dora=True, lora_bias=False)  # type: ignore[attr-defined]


def write_adalora(taken: Taken, groups: Grouped) -> None:
    """AdaLoRA: triplets that are masked for good are cut off and noted in rank_pattern."""
    methods = [p.method for parts in groups.values() for p in parts]
    method: Any = methods[0]
    if any(len(parts) > 1 or parts[0].site.rows for parts in groups.values()) or any(m != method for m in methods):
        raise Unsupported("PEFT's AdaLoRA acts on whole layers with one initial rank; write this one with as_lora=True.")
    before, masks = taken.remembered, {}
    loaded = before.get("peft_type") == "ADALORA"
    known = {taken.places.path(split_key(k)[0]): v for k, v in (before.get("rank_pattern") or {}).items()}
    trained = any(bool((parts[0].tensors()["lambda"] != 0).any()) for parts in groups.values())
    for path, (part,) in groups.items():
        p = part.tensors()
        kept = p["lambda"] != 0 if trained and (known or not loaded) else torch.ones_like(p["lambda"], dtype=torch.bool)
        if path in known:
            kept = kept | torch.tensor(known[path], device=kept.device).flatten()
        masks[f"{path}.lora_E"] = kept.tolist()
        taken.put(path, "lora_A", p["Q"][kept])
        taken.put(path, "lora_E", p["lambda"][kept][:, None])
        taken.put(path, "lora_B", p["P"][:, kept])
    total = int(method.T or before.get("total_step") or 1000)
    times = method.budget(total)
    taken.config.update(
        init_r=method.init_r, target_r=method.target_r, r=method.init_r, lora_alpha=whole_number(method.alpha), lora_dropout=method.dropout,
        beta1=method.beta1, beta2=method.beta2, orth_reg_weight=method.gamma, deltaT=method.delta_T, total_step=total,
        tinit=times.t_i, tfinal=times.t_f, rank_pattern=None if all(all(m) for m in masks.values()) and not known else masks,
        init_lora_weights=True, bias="none",
    )  # fmt: skip
    taken.name_targets(list(groups))


def write_as_lora(taken: Taken, parts: Mapping[int, list[Part]], rank: int | None, tell: Callable[[str], object]) -> set[int]:
    """Writes every change of a weight as a plain low-rank product; returns the parts it has dealt with."""
    mine = {i: own for i, own in parts.items() if own and not (own[0].method.trains_heads or own[0].method.slug == "bitfit")}
    scales, worst = {}, (0.0, "")
    for path, group in grouped(p for own in mine.values() for p in own).items():
        for part in group:
            if part.site.kind not in ("linear", "conv", "embedding") or not part.method.foldable:
                reason = part.method.limits.get("merge", f"a {part.site.kind} has no matrix")
                raise Unsupported(f"{part.method.label} at {part.site.name} cannot be written as LoRA: {reason}")
        A, B, error = as_product(taken, group, rank)
        put_product(taken, path, A, B)
        scales[path] = len(A), 1.0
        worst = max(worst, (error, path))
    if not scales:
        raise Unsupported("There is no change of a weight here that could be written as LoRA.")
    taken.config["peft_type"] = "LORA"
    put_scales(taken, scales, False, {})
    put_lora_options(taken, grouped(p for own in mine.values() for p in own), lora_dropout=0.0, lora_bias=False)
    if worst[1]:
        tell(f"Written as LoRA of rank {rank}: the largest relative error of a weight's change is {worst[0]:.3g}, at {worst[1]}.")
    return set(mine)


def as_product(taken: Taken, parts: Sequence[Part], rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] of the module's whole change, and the relative error; 0 where it is of low rank."""
    if all(isinstance(p.method, LowRankMethod) and not quantised(p) and "b" not in p.tensors() for p in parts):
        made = []
        for p in parts:
            L, R = p.method.factors(p.tensors(), p.site)  # type: ignore[attr-defined]
            made.append((R, L, 1.0))
        A, B, _ = joined(taken, parts, made)
        return A, B, 0.0
    label, path = parts[0].method.label, parts[0].site.module
    if rank is None:
        raise BadValue(f"{label} at {path} is not of low rank; give rank=… for its nearest LoRA (its error is reported).")
    call = taken.frozen(parts)
    W, b = taken.folded(parts)
    change = (W - call.weight()).flatten(1)
    if b is not None and (call.bias() is None or not torch.equal(b, call.bias().to(b.dtype))):  # type: ignore[union-attr]
        if taken.layer(parts)[0]._parameters.get("bias") is None:
            raise Unsupported(f"{label} gives {path} a bias, which it has not in the base; export the adapter merged.")
        taken.put(path, "base_layer.bias", b)
    U, S, Vt = truncated_svd(change, min(rank, *change.shape))
    left = change - (U * S) @ Vt
    return Vt * S.sqrt()[:, None], U * S.sqrt(), float(left.norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny))


# Vectors


def write_ia3(taken: Taken, groups: Grouped) -> None:
    """IA3: one vector a module, [1, in] on the input side, [out, 1] on the output side."""
    inner = []
    for path, parts in groups.items():
        site = taken.places.whole(path)
        l = next(iter(parts[0].tensors().values()))
        method: Any = parts[0].method
        if site.kind not in ("linear", "conv"):
            raise Unsupported(f"PEFT's IA3 has no place for the {site.kind} {path}; choose other targets, or export the adapter merged.")
        if method.input_side(parts[0].site):
            inner.append(path)
            taken.put(path, "ia3_l", l.reshape(1, -1, *(1,) * len(site.kernel)))
            continue
        if parts[0].site.rows is not None:
            l = l.new_ones(site.out_features)
            for part in parts:
                l[slice(*part.site.rows)] = next(iter(part.tensors().values()))  # type: ignore[misc]
        taken.put(path, "ia3_l", l.reshape(1, -1, *(1,) * len(site.kernel)) if site.kind == "conv" else l[:, None])
    taken.name_targets(list(groups))
    before = taken.remembered.get("feedforward_modules")
    if before is None or [p for p in groups if picks(before, p)] != inner:
        modules = taken.modules()
        before = short_targets(inner, modules) if inner else []
        rest = [p for p in groups if p not in inner]  # PEFT wants the one list to be a part of the other
        taken.config["target_modules"] = sorted({*before, *(short_targets(rest, modules) if rest else ())})
    taken.config.update(feedforward_modules=before, init_ia3_weights=True)


def write_norms(taken: Taken, groups: Grouped) -> None:
    for path, (part,) in groups.items():
        for ours, theirs in (("gamma", "weight"), ("beta", "bias")):
            if ours in part.tensors():
                taken.put(path, f"ln_tuning_layers.{theirs}", part.tensors()[ours])
    taken.name_targets(list(groups))
    del taken.config["fan_in_fan_out"]


# Prompts


def write_prompt(taken: Taken, groups: Grouped) -> None:
    (part,) = (p for parts in groups.values() for p in parts)
    if taken.task() in CLASSIFIERS and part.method.after_first is not False:  # type: ignore[attr-defined]
        raise Unsupported(
            "PEFT puts learned tokens before the first token, this adapter puts them after it (after_first); "
            "train with prompt-tuning(after_first=False) to share it with PEFT."
        )
    check_first_position(taken.places, taken.task(), "export")
    P = part.method.tokens(part.tensors(), part.site)  # type: ignore[attr-defined]
    taken.tensors["prompt_embeddings"] = P
    taken.config.update(num_virtual_tokens=len(P), token_dim=P.shape[1], num_transformer_submodules=1, prompt_tuning_init="RANDOM")


def write_prefix(taken: Taken, groups: Grouped) -> None:
    """Prefix tuning: keys and values of all layers in one table [P, layers · 2 · width]; the network that made them is left out."""
    parts = [p for found in groups.values() for p in found]
    sites = prefix_sites(taken.places, "export")
    if {p.site.name for p in parts} != {s.name for s in sites}:
        raise Unsupported("PEFT's prefix tuning acts on every attention layer; this adapter leaves some out (leave_out or targets).")
    order = {s.name: i for i, s in enumerate(sites)}
    parts.sort(key=lambda p: order[p.site.name])
    if len({s.out_features for s in sites}) > 1:
        raise Unsupported("PEFT's prefix tuning needs keys of one width in every layer.")
    pairs = [p.method.keys_values(p.tensors(), p.site) for p in parts]  # type: ignore[attr-defined]
    table = torch.cat([t for pair in pairs for t in pair], 1)
    taken.tensors["prompt_embeddings"] = table
    taken.config.update(
        num_virtual_tokens=len(table), token_dim=sites[0].out_features, num_attention_heads=sites[0].kv_heads, num_layers=len(sites),
        num_transformer_submodules=1, prefix_projection=False, encoder_hidden_size=None,
    )  # fmt: skip


# Modules and biases beside the method


def write_extras(taken: Taken, parts: Mapping[int, list[Part]]) -> None:
    """Trained heads and whole modules as `modules_to_save`, trained biases under `bias`."""
    targets, roots = grouped_targets(taken), []
    for own in sorted((o for o in parts.values() if o), key=lambda own: EXTRAS[own[0].method.slug]):
        if EXTRAS[own[0].method.slug] == "bias":
            write_biases(taken, own, targets)
            continue
        for path, group in grouped(own).items():
            if path in targets:
                taken.put(path, "base_layer.weight", stored_weight(taken, group)["weight"])
            else:
                roots.append(root_of(path, group[0].site))
    for path in taken.tuned.adapters[taken.name].facts.get("peft_tables") or ():
        if path in targets:
            taken.put(path, "base_layer.weight", taken.tuned.model.get_submodule(path)._parameters["weight"])  # type: ignore[arg-type]
    prompt = taken.config["peft_type"] in PROMPTS
    if prompt and not roots and taken.task() in CLASSIFIERS:  # PEFT saves and expects the head there, trained or not
        roots += [s.module.split(".")[0] for s in taken.places.sites if s.trainable_head]
    for root in dict.fromkeys(roots):
        write_module(taken, root, [p for own in parts.values() for p in own], prompt)
    taken.config["modules_to_save"] = list(dict.fromkeys(roots)) or None


def grouped_targets(taken: Taken) -> set[str]:
    return {split_key(key)[0] for key in taken.tensors if TUNED.search(key)}


def root_of(path: str, site: Site) -> str:
    """The module that PEFT copies: a task head as a whole, else the layer."""
    return path.split(".")[0] if site.trainable_head else path


def stored_weight(taken: Taken, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Parameters of a trained module in its own layout, in the adapter's precision."""
    module, _, form = taken.layer(parts)
    W, b = taken.folded(parts)
    out = {form.parameter: W.t() if turned(form) else W.reshape(stored_shape(taken.places, parts[0].site))}
    return out if b is None or form.bias_name not in module._parameters else {**out, form.bias_name: b}


def write_module(taken: Taken, root: str, parts: Sequence[Part], prompt: bool) -> None:
    trained: dict[str, Tensor] = {}
    for path, group in grouped(p for p in parts if p.site.kind in (*LAYERS, "parameter")).items():
        for parameter in dict.fromkeys(p.site.parameter for p in group):
            new = stored_weight(taken, [p for p in group if p.site.parameter == parameter])
            trained.update({f"{path}.{key}": t for key, t in new.items()})
    prefix = "base_model." if prompt else "base_model.model."
    for path, module in taken.tuned.model.get_submodule(root).named_modules(prefix=root):
        if "veneer" in path.split("."):
            continue
        own = {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        for key, t in own.items():
            if key not in module._non_persistent_buffers_set:
                taken.tensors[f"{prefix}{path}.{key}"] = trained.get(f"{path}.{key}", t)
            if key == "bias" and taken.config.get("bias") == "all":  # then PEFT writes its two copies, too
                inside = f"{path}.{key}".removeprefix(root)
                taken.put(root, f"modules_to_save{'.default' * (path != root)}{inside}", trained.get(f"{path}.{key}", t))
                taken.put(root, f"original_module{inside}", t)


def write_biases(taken: Taken, parts: Sequence[Part], targets: set[str]) -> None:
    if taken.config["peft_type"] != "LORA":
        raise Unsupported("PEFT trains biases only beside LoRA; take bitfit out of the stack, or save in veneer's own format.")
    for path, group in grouped(p for p in parts if p.tensors()).items():
        b = stored_weight(taken, group).get("bias")
        if b is None:
            raise Unsupported(f"bitfit gives {path} a bias, which it has not in the base; PEFT's format has no place for it.")
        taken.put(path, "base_layer.bias" if path in targets else "bias", b)
    taken.config["bias"] = "lora_only" if {p.site.module for p in parts} <= targets else "all"


# Config


TASKS = (
    (re.compile("ForSequenceClassification$"), "SEQ_CLS"),
    (re.compile("ForTokenClassification$"), "TOKEN_CLS"),
    (re.compile("ForQuestionAnswering$"), "QUESTION_ANS"),
    (re.compile("ForConditionalGeneration$"), "SEQ_2_SEQ_LM"),
    (re.compile("(ForCausalLM|LMHeadModel)$"), "CAUSAL_LM"),
)
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task."""
    kind = type(model).__name__.removeprefix("Adapted")
    task = next((task for pattern, task in TASKS if pattern.search(kind)), None)
    return None if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False) else task


def finish(taken: Taken) -> None:
    """The fields every config has; what the adapter was loaded with fills those that are not set here."""
    model, config = taken.tuned.model, taken.config
    task = taken.task()
    if task in CLASSIFIERS and not config.get("modules_to_save"):
        task = None  # PEFT would look for a head in the file
    if task is None and config["peft_type"] in PROMPTS:
        task = "FEATURE_EXTRACTION"
    if task == "SEQ_2_SEQ_LM" and config["peft_type"] in PROMPTS:
        config["num_transformer_submodules"] = 1
    kind = type(model)
    plain = kind.__mro__[2] if kind.__name__.startswith("Adapted") else kind
    common = {
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": plain.__name__, "parent_library": plain.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "inference_mode": True,
        "revision": None,
    }
    before = taken.remembered
    if before.get("peft_type") == config["peft_type"]:
        kept = {"task_type", "auto_mapping", "base_model_name_or_path", "revision"}
        common |= {k: before[k] for k in kept if k in before}
        if config.get("modules_to_save") and before.get("modules_to_save"):
            config["modules_to_save"] = before["modules_to_save"]
        if before.get("bias") and config.get("bias") not in (None, "none"):
            config["bias"] = before["bias"]
        taken.config = {**before, **common, **config}
    else:
        taken.config = {**common, **config}


# -- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How one of PEFT's types is read, and written."""

    read: Callable[[Given], Piece]
    write: Callable[[Taken, Grouped], None]


def write_lora_or_dora(taken: Taken, groups: Grouped) -> None:
    dora = next(iter(groups.values()))[0].method.slug == "dora"
    (write_dora if dora else write_lora)(taken, groups)


FORMATS: dict[str, Format] = {
    "LORA": Format(read_lora, write_lora_or_dora),
    "ADALORA": Format(read_adalora, write_adalora),
    "IA3": Format(read_ia3, write_ia3),
    "LN_TUNING": Format(read_norms, write_norms),
    "PROMPT_TUNING": Format(read_prompt, write_prompt),
    "PREFIX_TUNING": Format(read_prefix, write_prefix),
}
"""PEFT's types by their names in the config."""

PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING")

WRITERS = {
    "lora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "ln-tuning": "LN_TUNING",
    "prompt-tuning": "PROMPT_TUNING",
    "prefix-tuning": "PREFIX_TUNING",
}
"""Our methods by slug → PEFT's type."""

EXTRAS = {"full": "module", "probe": "module", "bitfit": "bias"}
"""Methods that PEFT has as options of another one."""
