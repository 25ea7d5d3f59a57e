"""Adapters as files: `adapter.safetensors`, whose header also holds the facts, and `veneer.json`, the same facts to read.

Files are written whole or not at all. Nothing read is executed or unpickled, and sizes are checked before memory is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor, nn

import veneer
from veneer import anatomy
from veneer.adapter import Adapter
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported, VeneerError, nearest
from veneer.pruned import files as pruned
from veneer.site import whole_sites
from veneer.source import Source, first_tensors
from veneer.spec import parse
from veneer.streams.wrap import facts as reversible_facts
from veneer.streams.wrap import fit as fit_reversible
from veneer.tuned import Tuned, check_name, tuned_of
from veneer.waiting import gathered

if TYPE_CHECKING:
    from veneer.method import Method, Params
    from veneer.site import Site
    from veneer.slot import Slot

WEIGHTS, FACTS = "adapter.safetensors", "veneer.json"
FORMAT = 1


class CannotWrite(VeneerError):
    """The disk or folder did not take the file; what was there before is untouched."""

    code = 3


# -- writing --------------------------------------------------------------------------------------------------


def save(tuned: Tuned, folder: str | Path, name: str, facts: Mapping[str, Any] | None = None, *, fixed: bool = False) -> Path:
    """Writes one adapter, with `fixed` also the tensors its seed gives again; one that was in the folder survives if anything fails."""
    adapter = tuned.adapters[name]
    if any(t.is_meta for t in tensors_of(tuned, name).values()):
        raise Unsupported(f"save: the adapter {name!r} has no values yet, as its base has no weights (meta); veneer.fill the base first.")
    adapter.facts.update(facts or {})
    folder = Path(folder)
    about = describe(tuned, name)
    tensors = {key: gathered(t).detach().cpu().contiguous() for key, t in tensors_of(tuned, name, fixed).items()}
    write_tensors(folder / WEIGHTS, tensors, {"veneer": json.dumps(about)})
    write_text(folder / FACTS, json.dumps(about, indent=2) + "\n")
    return folder


def describe(tuned: Tuned, name: str) -> dict[str, Any]:
    """The facts of an adapter: what `veneer.json` holds."""
    adapter, model = tuned.adapters[name], tuned.model
    config = getattr(model, "config", None)
    stored = tensors_of(tuned, name)
    sites = []
    for part in adapter.parts:
        entry: dict[str, Any] = {"part": part.index, "name": part.site.name, "role": part.site.role, "kind": part.site.kind}
        entry.update(out=part.site.out_features, **{"in": part.site.in_features})
        entry["tensors"] = {key: list(t.shape) for key, t in part.tensors().items() if key in part.keys}
        if part.method != adapter.method.parts[part.index]:
            entry["method"] = part.method.spec
        sites.append(entry)
    return {
        "format": FORMAT,
        "veneer": veneer.__version__,
        "spec": adapter.method.spec,
        "adapter": name,
        "base": {
            "name": getattr(config, "_name_or_path", "") or "",
            "class": type(model).__name__.removeprefix("Adapted"),
            "fingerprint": fingerprint(model),
            "parameters": tuned.base_size(),
        },
        "sites": sites,
        "fixed": {key: checksum(t) for key, t in tensors_of(tuned, name, True).items() if key not in stored},
        "trained": tuned.summary(name).trained,
        **pruned.facts(model),
        **reversible_facts(tuned),
        "training": adapter.facts,
    }


def checksum(tensor: Tensor) -> str:
    """Digest of a tensor's values as float32: the same whatever dtype and device it is held on."""
    return hashlib.sha256(tensor.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def tensors_of(tuned: Tuned, name: str, fixed: bool = False) -> dict[str, Tensor]:
    """An adapter's tensors by their names in the file: part/site/tensor, shared ones part/@group/tensor, each once.

    Those that the method's seed gives again are among them only with `fixed`, or if it was loaded with others than those.
    """
    fixed = fixed or bool(tuned.adapters[name].facts.get("own_fixed"))
    out: dict[str, Tensor] = {}
    for part in tuned.adapters[name].parts:
        tensors = part.tensors()
        left_out = () if fixed else part.method.fixed
        out.update({f"{part.index}/{part.site.name}/{key}": tensors[key] for key in part.keys if key not in left_out})
        group = f"{part.index}/@{part.method.tie(part.site)}"
        out.update({f"{group}/{key}": tensors[key] for key in part.shared_keys if key not in left_out})
    return out | pruned.stored(tuned.model)


def fingerprint(model: nn.Module) -> str:
    """Digest of the base's parameter names and shapes, without adapters and without the task head; a child that the model
    only wraps has the same as the model."""
    heads = tuple(s.module + "." for s in anatomy.sites(model) if s.role == "head")
    lines = []
    for path, module in model.named_modules():
        if "veneer" in path.split("."):
            continue
        for name, p in module._parameters.items():
            full = f"{path}.{name}".removeprefix(".").removeprefix(f"{getattr(model, 'wraps', '')}.")
            if p is None or full.startswith(heads or ("\0",)):
                continue
            packed = name == "weight" and hasattr(module, "in_features") and hasattr(module, "out_features")
            shape = (module.out_features, module.in_features) if packed else tuple(p.shape)
            lines.append(f"{full}:{shape}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    _whole(path, lambda temporary: save_file(dict(tensors), temporary, metadata=dict(header)))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    _whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _whole(path: Path, write: Any) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except Exception as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or str(error)
            raise CannotWrite(
                f"Could not write {path}: {reason}. What was there before is unchanged; choose a folder with space and write access."
            ) from error
        raise


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


# -- reading --------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """An adapter file that has been read and checked for form."""

    folder: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def of(self, index: int, owner: str) -> Params:
        return dict(self._owners.get(f"{index}/{owner}", {}))

    @cached_property
    def _owners(self) -> dict[str, Params]:
        found: dict[str, Params] = {}
        for key, t in self.tensors.items():
            owner, _, name = key.rpartition("/")
            found.setdefault(owner, {})[name] = t
        return found


class FromFile(Source):
    """Tensors of one part as they stand in a file; `names` gives a site's name there."""

    def __init__(self, saved: Saved, index: int, names: Mapping[str, str]):
        self.saved, self.index, self.names = saved, index, names
        self.listed = {e.get("name"): e.get("tensors") for e in saved.about["sites"] if e.get("part", 0) == index}

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        first = part.init_shared(members, Generator())
        found = self._found(f"@{group}", part.fixed, lambda: first)
        return self._whole(f"@{group}", found, {name: list(t.shape) for name, t in first.items()}, first, members)

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        name = self.names.get(site.name, site.name)
        listed = self.listed.get(name) or {}
        found = self._found(name, method.fixed, lambda: first_tensors(method, site, Generator()))
        p = self._whole(name, found, listed, listed)
        try:
            for n in range(site.count or 1):  # of stacked matrices one at a time
                method.check_tensors({k: t[n] for k, t in p.items()} if site.count else p, site)
        except BadValue as error:
            raise BadFile(f"{self.saved.folder / WEIGHTS}: {error}") from None
        return p

    def _found(self, owner: str, fixed: Collection[str], draw: Callable[[], Params]) -> Params:
        """The tensors of one owner: as the file has them, drawn again where it left fixed ones out."""
        found = self.saved.of(self.index, owner)
        sums: Mapping[str, str] = self.saved.about.get("fixed") or {}
        for name in (n for n in fixed if n not in found and f"{self.index}/{owner}/{n}" in sums):
            found[name] = draw()[name]
            if checksum(found[name]) != sums[f"{self.index}/{owner}/{name}"]:
                raise BadFile(
                    f"{self.saved.folder / WEIGHTS}: {name!r} of {owner} is drawn from a seed, and this version of torch draws other "
                    "numbers than the one it was trained with; save it there with save(…, fixed=True)."
                )
        return found

    def _whole(
        self, owner: str, found: Params, shapes: Mapping[str, Sequence[int]], names: Collection[str], members: Sequence[Site] = ()
    ) -> Params:
        """The tensors of one owner, all of them and of the shapes the method gives them."""
        path = self.saved.folder / WEIGHTS
        for name in names:
            if name not in found:
                raise BadFile(f"{path}: not whole: the tensor {name!r} of {owner} is missing; copy or download it again.")
        for name, tensor in found.items():
            there, here = list(tensor.shape), list(shapes.get(name, tensor.shape))
            if there == here:
                continue
            if members:
                raise Mismatch(
                    f"{path}: {name!r}, shared by {len(members)} sites, is {there}, and this model needs {here}: "
                    "it was made for a model of another depth or width."
                )
            raise BadFile(f"{path}: not whole: {name!r} of {owner} is {there} where the method needs {here}.")
        return {name: found[name] for name in [*names, *(n for n in found if n not in names)]}  # as they were: optimisers count on it


def read_about(folder: str | Path) -> dict[str, Any]:
    """The facts of an adapter folder, from the header of its weights; no tensor is read."""
    path = Path(folder) / WEIGHTS
    try:
        with _opened(path) as f:
            header = f.metadata() or {}
    except FileNotFoundError:
        raise BadFile(f"{folder}: there is no {WEIGHTS} here; an adapter folder holds {WEIGHTS} and {FACTS}.") from None
    try:
        about = json.loads(header["veneer"])
        if not isinstance(about, dict) or not isinstance(about.get("spec"), str) or not isinstance(about.get("sites"), list):
            raise ValueError
    except (KeyError, ValueError):
        raise BadFile(f"{path}: a safetensors file, but not a veneer adapter (its header has no facts).") from None
    if about.get("format", 0) > FORMAT:
        raise BadFile(f"{path}: written by veneer {about.get('veneer')} in a newer format ({about['format']}); update veneer to read it.")
    return about


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise BadFile(f"{path}: not a whole safetensors file ({error}); copy or download it again.") from None


def read(folder: str | Path) -> Saved:
    """Facts and tensors of an adapter folder.

    Raises:
        BadFile: missing, truncated or not an adapter.
    """
    about = read_about(folder)
    with _opened(Path(folder) / WEIGHTS) as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (not a mapping)
    return Saved(Path(folder), about, tensors)


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, roles: Mapping[str, str] | None = None) -> Tuned:
    """Loads an adapter folder (ours or Hugging Face PEFT's; or a hub name) into the model and activates it.

    Raises:
        BadFile: missing, truncated or foreign files.
        Mismatch: an adapter for another model; says which site and which shapes.
    """
    folder = _local(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_config.json").exists():
        from veneer.tools.peft import load_peft

        return load_peft(model, folder, name)
    saved = read(folder)
    tuned = tuned_of(model)
    name = name or saved.about.get("adapter") or "default"
    check_name(name, tuned)
    pruned.fit(model, saved.tensors, folder)
    fit_reversible(tuned, saved.about, folder)
    planned, method = _plan(model, saved, roles)
    adapter = Adapter(name, method, [], facts=dict(saved.about.get("training") or {}))
    tuned.add(adapter, [(part, found, FromFile(saved, i, names)) for i, (part, found, names) in enumerate(planned)])
    base = saved.about.get("base", {})
    if base.get("fingerprint") != fingerprint(model):
        warnings.warn(
            f"{folder}: trained on another shape of base ({base.get('name') or base.get('class')}); "
            "every adapted layer fits, the rest differs.",
            stacklevel=2,
        )
    return tuned


def _local(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if isinstance(folder, str) and folder.count("/") == 1 and not folder.startswith((".", "/")) and not path.exists():
        from veneer.hub import fetch

        return fetch(folder)
    raise BadFile(f"{folder}: no such folder.")


def _plan(
    model: nn.Module, saved: Saved, roles: Mapping[str, str] | None
) -> tuple[list[tuple[Method, list[tuple[Method, Site]], dict[str, str]]], Method]:
    """Which method acts at which of the model's sites, with the sites' names in the file."""
    method = parse(saved.about["spec"])
    sites = anatomy.sites(model, roles)
    here = {s.name: s for s in [*whole_sites(sites), *sites]}
    planned = []
    for index, part in enumerate(method.parts):
        found, names = [], {}
        there = here | {s.name: s for s in part.views(sites)}
        for entry in (e for e in saved.about["sites"] if e.get("part", 0) == index):
            site = _fitting(entry, there, model, saved)
            special = parse(entry["method"]) if "method" in entry else part
            special.check(site)
            found.append((special, site))
            names[site.name] = entry["name"]
        if saved.tensors and all(k.split("/")[1].startswith("@") for k in saved.tensors if k.startswith(f"{index}/")):
            found = [(part, site) for site in part.select(sites)]  # everything is shared: any depth will do
        planned.append((part, found, names))
    return planned, method


def _fitting(entry: Mapping[str, Any], here: Mapping[str, Site], model: nn.Module, saved: Saved) -> Site:
    name = str(entry.get("name"))
    prefix = getattr(model, "base_model_prefix", "") or ""
    site = here.get(name) or here.get(name.removeprefix(prefix + ".")) or here.get(f"{prefix}.{name}")
    if site is None and "." in name:
        site = here.get(name.split(".", 1)[1])
    base = saved.about.get("base", {}).get("name") or saved.about.get("base", {}).get("class")
    if site is None:
        raise Mismatch(f"{saved.folder}: made for {base}; this {type(model).__name__} has no site {name!r}.{nearest(name, here)}")
    if (entry.get("out"), entry.get("in")) != (site.out_features, site.in_features):
        raise Mismatch(
            f"{saved.folder}: made for {base}; at {site.name} it expects [{entry.get('out')}, {entry.get('in')}], "
            f"this model has [{site.out_features}, {site.in_features}]."
        )
    return site
