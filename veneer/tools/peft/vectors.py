"""Vectors and norms: PEFT's IA3 and LN_TUNING."""

from __future__ import annotations

from typing import Any

from veneer import registry
from veneer.errors import Unsupported
from veneer.method import Method, Params
from veneer.site import Site
from veneer.tools.peft.given import Given, Piece, finished
from veneer.tools.peft.names import picks, short_targets
from veneer.tools.peft.taken import Grouped, Taken


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


def write_norms(taken: Taken, groups: Grouped) -> None:
    for path, (part,) in groups.items():
        for ours, theirs in (("gamma", "weight"), ("beta", "bias")):
            if ours in part.tensors():
                taken.put(path, f"ln_tuning_layers.{theirs}", part.tensors()[ours])
    taken.name_targets(list(groups))
    del taken.config["fan_in_fan_out"]
