"""LoRA and DoRA as PEFT's LORA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from veneer import registry
from veneer.errors import Unsupported
from veneer.forms import form_of
from veneer.method import Method, Params
from veneer.part import Part
from veneer.site import Site
from veneer.tools.peft.given import Given, Piece, finished
from veneer.tools.peft.names import Places, pattern_value
from veneer.tools.peft.taken import Grouped, Taken, most, whole_number


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


def write_lora_or_dora(taken: Taken, groups: Grouped) -> None:
    dora = next(iter(groups.values()))[0].method.slug == "dora"
    (write_dora if dora else write_lora)(taken, groups)


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
