"""From an adapter's methods and tensors to PEFT's config and tensors; one function for each of its types."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.calls import Frozen
from veneer.errors import BadValue, Unsupported
from veneer.forms import Form
from veneer.part import Part, add_fold
from veneer.site import Site
from veneer.slot import Slot
from veneer.starts import truncated_svd
from veneer.tools.peft_names import (
    LAYERS,
    PROMPTS,
    TUNED,
    Places,
    check_first_position,
    pattern_value,
    picks,
    prefix_sites,
    short_targets,
    split_key,
    stored_shape,
    turned,
)  # fmt: skip
from veneer.tuned import Tuned


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


def grouped(parts: Iterable[Part]) -> Grouped:
    out: Grouped = {}
    for part in parts:
        out.setdefault(part.site.module, []).append(part)
    return out


def write_method(taken: Taken, parts: Mapping[int, list[Part]]) -> set[int]:
    """Writes the one part that is a PEFT method, and returns its index."""
    methods = taken.tuned.adapters[taken.name].method.parts
    found = [i for i, m in enumerate(methods) if m.slug in TYPES]
    strange = [m.slug for m in methods if m.slug not in TYPES and m.slug not in EXTRAS]
    way = "Save it in veneer's own format, or export it as LoRA (as_lora=True, with rank=… where it is not of low rank)."
    if strange:
        raise Unsupported(f"PEFT has no {strange[0]} that this could be written as. {way}")
    if len(found) != 1:
        what = " + ".join(methods[i].slug for i in found) or " + ".join(m.slug for m in methods)
        raise Unsupported(f"A PEFT adapter holds exactly one method; this is {what}. {way}")
    kind = TYPES[methods[found[0]].slug]
    taken.config["peft_type"] = kind
    writer = WRITERS[kind]
    own = parts[found[0]]
    if bare := next((p for p in own if p.site.kind == "parameter" or p.site.parameter.endswith("_proj_weight")), None):
        raise Unsupported(f"{bare.site.name} is a bare parameter, which PEFT's format has no place for. {way}")
    writer(taken, grouped(own))
    return {found[0]}


def quantised(part: Part) -> bool:
    """Whether a quantised copy stands for the weight."""
    return getattr(part.method, "start", None) == "loftq"


# -- low rank -------------------------------------------------------------------------------------------------


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
    call = taken.frozen(parts)
    W = call.weight()
    exact = [p.method.low_rank(W if p.site.rows is None else W[slice(*p.site.rows)], p.tensors(), p.site) for p in parts]
    if all(factors is not None for factors in exact):
        A, B, _ = joined(taken, parts, [(f[1], f[0], 1.0) for f in exact if f is not None])
        return A, B, 0.0
    label, path = parts[0].method.label, parts[0].site.module
    if rank is None:
        raise BadValue(f"{label} at {path} is not of low rank; give rank=… for its nearest LoRA (its error is reported).")
    new, b = taken.folded(parts)
    change = (new - W).flatten(1)
    if b is not None and (call.bias() is None or not torch.equal(b, call.bias().to(b.dtype))):  # type: ignore[union-attr]
        if taken.layer(parts)[0]._parameters.get("bias") is None:
            raise Unsupported(f"{label} gives {path} a bias, which it has not in the base; export the adapter merged.")
        taken.put(path, "base_layer.bias", b)
    U, S, Vt = truncated_svd(change, min(rank, *change.shape))
    left = change - (U * S) @ Vt
    return Vt * S.sqrt()[:, None], U * S.sqrt(), float(left.norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny))


# -- vectors --------------------------------------------------------------------------------------------------


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


# -- prompts --------------------------------------------------------------------------------------------------


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


# -- modules and biases beside the method ---------------------------------------------------------------------


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


# -- config ---------------------------------------------------------------------------------------------------


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


# -- the tables -------------------------------------------------------------------------------------------------


def write_lora_or_dora(taken: Taken, groups: Grouped) -> None:
    dora = next(iter(groups.values()))[0].method.slug == "dora"
    (write_dora if dora else write_lora)(taken, groups)


WRITERS: dict[str, Callable[[Taken, Grouped], None]] = {
    "LORA": write_lora_or_dora,
    "ADALORA": write_adalora,
    "IA3": write_ia3,
    "LN_TUNING": write_norms,
    "PROMPT_TUNING": write_prompt,
    "PREFIX_TUNING": write_prefix,
}
"""By PEFT's type."""

TYPES = {
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
