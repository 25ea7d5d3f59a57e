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
    adapter = Adapter(name, method, [], facts={"peft": config})
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
                f"{folder}: {CONFIG} sets {option}, {what}, which cannot be read here. Merge it into the base with PEFT, or train anew without it."
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
        owner = re.sub(r"\.modules_to_save(\.\w+)?$", "", owner)
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
    cls = registry.load("lora")
    common = {"dropout": float(config.get("lora_dropout") or 0.0), "rslora": bool(config.get("use_rslora"))}
    start = config.get("init_lora_weights")
    common["start"] = start if start in ("pissa", "olora") else "kaiming"
    r, alpha = int(config.get("r") or 8), config.get("lora_alpha")
    method = cls(r=r, alpha=alpha, lora_bias=bool(config.get("lora_bias")), **common)
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
    common = {"dropout": float(config.get("lora_dropout") or 0.0), "rslora": bool(config.get("use_rslora"))}
    alpha = config.get("lora_alpha")
    method = registry.load("dora")(r=int(config.get("r") or 8), alpha=alpha, **common)
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
    method = registry.load("adalora")(target_r=target, init_r=r, alpha=config.get("lora_alpha", 8), **options)
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
    cls = registry.load("ia3")
    method = cls()
    if any(method.input_side(site) != (path in within) for path, (site, _) in vectors.items()):  # type: ignore[attr-defined]
        method = cls(feedforward=" ".join(short_targets(within, vectors)))
    return finished(given, method, [(method, site, {method.name(site): l}) for site, l in vectors.values()])  # type: ignore[attr-defined]


def read_norms(given: Given) -> Piece:
    found: list[tuple[Method, Site, Params]] = []
    method = registry.load("ln-tuning")()
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
    length = int(given.config.get("num_virtual_tokens") or 0)
    P = given.need("", "prompt_embeddings", (-1, sites[0].in_features))
    if not 1 <= length <= len(P):
        raise BadFile(f"{given.folder}: num_virtual_tokens is {length}, the table has {len(P)} rows.")
    method = registry.load("prompt-tuning")(length=length, after_first=False)
    return Piece(method, [(method, sites[0], {"P": P[:length]})])  # of an encoder-decoder's two tables PEFT reads the first


def read_prefix(given: Given) -> Piece:
    sites = prefix_sites(given.places, str(given.folder))
    width = 2 * sum(s.out_features for s in sites)
    table = given.need("", "prompt_embeddings", (-1, width))
    method = registry.load("prefix-tuning")(length=len(table), shift_positions=True)
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
    full, bitfit, head = Piece(registry.load("full")()), Piece(registry.load("bitfit")()), Piece(registry.head_method())
    for path, slots in given.modules.items():
        under = {slot.removeprefix("base_layer."): slot for slot in list(slots)}
        if unknown := [slot for name, slot in under.items() if name not in ("weight", "bias") and not given.places.bare(path, name)]:
            raise Unsupported(f"{given.folder / WEIGHTS}: {path or 'the model'} has {unknown[0]}, which no known part of the format explains.")
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
            continue  # PEFT writes the untouched table beside its adapter
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
