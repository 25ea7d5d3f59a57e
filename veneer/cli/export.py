"""`veneer merge` and `veneer export`: adapters in other forms, each measured against the adapter it came from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from veneer import registry
from veneer.cli import base
from veneer.cli.command import Argument, Flag
from veneer.cli.folder import adapter_folder, facts_of
from veneer.errors import BadFile, BadValue, Unsupported, VeneerError
from veneer.spec import parse_spec
from veneer.train.packed_base import FORMATS

if TYPE_CHECKING:
    from torch import nn

    from veneer.tuned import Tuned

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference relative to the largest output that a merge may make, by the dtype of the weights."""

FORMS = ("peft", "veneer", "merged", "sparse-weights", "torchao", "diffusers")

PATTERNS = ("2:4", "1:4", "1:2")

WHOLE = ("merged", "sparse-weights", "torchao")
"""Forms that are a whole model."""


class Inexact(VeneerError):
    """A merge or export whose answers differ from the adapter's by more than the tolerance."""


def merge(
    folder: Annotated[Path, Argument("FOLDER", "an adapter's folder")],
    out: Annotated[Path, Flag("folder for the merged model")],
    model: Annotated[str | None, Flag("base model, if the adapter does not name it or it has moved")] = None,
    tolerance: Annotated[float | None, Flag("largest allowed relative difference; by default 1e-4 in float32")] = None,
    dtype: Annotated[str | None, Flag("number format of the merged model; by default the base's", choices=tuple(TOLERANCES))] = None,
    requantise: Annotated[str | None, Flag("store the merged model in 4 or 8 bits; the error is printed", choices=FORMATS[1:])] = None,
) -> Any:
    """Write the adapter into the model's weights: a plain model that needs no veneer."""
    return export(folder, out, "merged", model, tolerance, dtype=dtype, requantise=requantise)


def export(
    folder: Annotated[Path, Argument("FOLDER", "an adapter's folder")],
    out: Annotated[Path, Flag("folder to write")],
    to: Annotated[str, Flag("the form", choices=FORMS)],
    model: Annotated[str | None, Flag("base model, if the adapter does not name it or it has moved")] = None,
    tolerance: Annotated[float | None, Flag("largest allowed relative difference; by default 1e-4 in float32")] = None,
    as_lora: Annotated[bool, Flag("with --to peft or diffusers: as plain LoRA, whatever the method")] = False,
    rank: Annotated[int | None, Flag("with --as-lora: rank for methods that are not of low rank")] = None,
    pattern: Annotated[
        str | None, Flag("with --to sparse-weights: entries left of neighbours, in adapted weights", choices=PATTERNS)
    ] = None,
    dtype: Annotated[str | None, Flag("with --to merged: number format; by default the base's", choices=tuple(TOLERANCES))] = None,
    requantise: Annotated[str | None, Flag("with --to merged: store it in 4 or 8 bits; the error is printed", choices=FORMATS[1:])] = None,
) -> Any:
    """Write an adapter in another form: Hugging Face PEFT's, veneer's, or merged into the model."""
    folder = adapter_folder(folder)
    if pattern is not None and to != "sparse-weights":
        raise BadValue("--pattern goes with --to sparse-weights.")
    if (dtype or requantise) and to != "merged":
        raise BadValue("--dtype and --requantise go with --to merged.")
    _refuse(folder, out, to, facts_of(folder), tolerance)
    if (as_lora and to not in ("peft", "diffusers")) or (rank is not None and not as_lora):
        raise BadValue("--as-lora goes with --to peft or diffusers, and --rank with --as-lora.")
    name = base.base_name(folder, model)
    from veneer.store import load

    tuned = load(base.load_base(folder, model), folder)
    inputs = base.samples(tuned.model)
    expected = base.outputs(tuned.model, inputs)
    allowed = tolerance if tolerance is not None else float("inf") if requantise else TOLERANCES.get(dtype or _dtype(tuned.model), 1e-4)
    with _beside(out) as folder_beside:
        if to == "merged":
            tuned = _on_plain(tuned, folder, model, dtype)
            again = _merged(tuned, folder_beside, requantise)
        elif to == "torchao":
            from veneer.tools.torchao_integers import save_torchao

            again = type(save_torchao(tuned, folder_beside)).from_pretrained(folder_beside)
        elif to == "diffusers":
            from veneer.tools.diffusers_lora import read_back, save_diffusers

            save_diffusers(tuned, folder_beside, rank)
            again = read_back(base.load_base(folder, model), folder_beside)
        elif to == "sparse-weights":
            again = _sparse(tuned, folder_beside, pattern)
        else:
            _write(tuned, folder_beside, to, as_lora, rank)
            again = load(base.load_base(folder, model), folder_beside).model
        found = base.difference(expected, base.outputs(again, inputs))
        if not found <= allowed:
            raise Inexact(
                f"{folder} as {to}: the answers differ by {found:.1e} of the largest output, more than {allowed:.1e}.\n"
                f"Nothing was written. A base in float32, or a larger --tolerance, lets it pass."
            )
        if to in WHOLE and (processor := base.processor_of(name)) is not None:
            processor.save_pretrained(folder_beside)
        _put(folder_beside, out)
    limit = "" if allowed == float("inf") else f" (allowed {allowed:.1e})"
    print(f"{out}: {to}; read back, its answers differ by {found:.1e} of the largest output at most{limit}.")
    return {"folder": out, "to": to, "difference": found, "tolerance": allowed if limit else None, "samples": len(expected), "model": name}


def _refuse(folder: Path, out: Path, to: str, facts: dict[str, Any], tolerance: float | None) -> None:
    """Tells what can be told before torch is imported."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadValue(f"--out {str(out)!r} is there already and not empty. Choose another folder.")
    if tolerance is not None and not tolerance > 0:
        raise BadValue(f"--tolerance {tolerance} must be more than 0.")
    if "spec" not in facts:
        return
    if facts.get("pruned") and to != "veneer":
        raise Unsupported(
            f"{folder}: made for a pruned base, whose shapes no configuration of transformers can tell.\n"
            "Serve it as it is, with veneer.load(model, folder): that prunes the whole base."
        )
    if facts.get("reversible") and to != "veneer":
        raise Unsupported(
            f"{folder}: trained in reversible blocks ({facts['reversible']}), and that network is not the base with other weights.\n"
            "Serve it as it is, with veneer.load(model, folder): that makes the base's blocks reversible."
        )
    for slug, _ in parse_spec(facts["spec"]):
        card = registry.card(slug)
        if to in WHOLE and "merge" in card.limits:
            raise Unsupported(
                f"{folder}: {card.class_name} cannot be merged: {card.limits['merge']}\nServe it as it is, with veneer.load(model, folder)."
            )


def _dtype(model: nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def _on_plain(tuned: Tuned, folder: Path, model: str | None, dtype: str | None) -> Tuned:
    """The adapter on the values that a packed base computes with, in 16 or 32 bit; as it is where nothing has to change."""
    import torch

    from veneer.store import load
    from veneer.tools.requantise import packed_layers, unpacked

    if dtype is None and not packed_layers(tuned.model):
        return tuned
    return load(unpacked(base.load_base(folder, model), getattr(torch, dtype or _dtype(tuned.model))), folder)


def _merged(tuned: Tuned, out: Path, requantise: str | None) -> nn.Module:
    plain: Any = tuned.merge(keep=False).detach()
    if requantise is not None:
        from veneer.tools.requantise import requantised

        packed, error = requantised(plain, out, requantise)
        print(f"{requantise}: the packed weights differ from the merged ones by {error:.2%} of their norm.")
        return packed
    plain.save_pretrained(out)
    return type(plain).from_pretrained(out, dtype=plain.dtype)


def _sparse(tuned: Tuned, out: Path, pattern: str | None) -> nn.Module:
    """The merged model without its zeros; with a pattern, adapted weights are made to fit it."""
    import torch

    from veneer.forms import form_of
    from veneer.tools.sparse_weights import enforce, load_sparse, pattern_of, save_sparse

    n, m = pattern_of(pattern) if pattern else (0, 0)
    sites = [s for s in tuned.sites() if s.kind == "linear" and s.role != "head"]
    plain: Any = tuned.merge().detach()
    for site in sites if pattern else ():
        if site.in_features % m:
            raise BadValue(f"--pattern {pattern}: the {site.in_features} inputs of {site.name} are no multiple of {m}.")
        module = plain.get_submodule(site.module)
        form, held = form_of(module, site.kind, site.parameter), module._parameters[site.parameter]
        W, rows = form.weight(module).clone(), slice(None) if site.rows is None else slice(*site.rows)
        W[rows] = enforce(W[rows], n, m)
        with torch.no_grad():
            held.copy_(form.store(W, held))
    if not save_sparse(plain, out):
        raise BadValue(
            "No weight of the merged model has zeros enough to leave them out: --pattern 2:4 makes half of every adapted one zero, "
            "a method that prunes, such as pst, more."
        )
    return load_sparse(out)


def _write(tuned: Tuned, out: Path, to: str, as_lora: bool, rank: int | None) -> None:
    if to == "veneer":
        tuned.save(out)
        return
    from veneer.tools.peft import save_peft

    save_peft(tuned, out, as_lora=as_lora, rank=rank)


class _beside:
    """A temporary folder next to the wanted one, gone at the end: what is written is there whole or not at all."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}."))
        except OSError as error:
            raise BadFile(f"--out {str(self.out)!r} cannot be written: {error.strerror}. Choose another folder.") from error
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _put(folder: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()
    folder.chmod(0o755)
    folder.rename(out)
