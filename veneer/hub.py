"""Adapters on the Hugging Face hub: fetched without any code or pickle, pushed with a card for the person who finds them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from veneer import registry
from veneer.errors import BadFile, BadValue, MissingExtra, VeneerError
from veneer.spec import parse_spec

if TYPE_CHECKING:
    from veneer.tuned import Tuned

FILES = ["adapter.safetensors", "veneer.json", "adapter_model.safetensors", "adapter_config.json", "README.md"]
"""What is fetched: our files and PEFT's, none of which can run code."""

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubError(VeneerError):
    """The hub could not be reached, or did not do what was asked."""

    code = 3


# -- fetching -------------------------------------------------------------------------------------------------


def fetch(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """Downloads an adapter's safe files, or finds them in the cache, and returns their folder.

    Raises:
        BadFile: the repository does not exist, needs access, or holds no adapter in safetensors.
        HubError: offline, and not in the cache.
    """
    hub = _hub()
    check_repo(repo)
    with _readable(repo):
        folder = Path(hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=FILES))
    if not any((folder / name).exists() for name in ("adapter.safetensors", "adapter_model.safetensors")):
        raise BadFile(
            f"{repo}: holds no adapter.safetensors and no adapter_model.safetensors. Pickled adapters (.bin) are never read; "
            "ask its owner to save it with safetensors."
        )
    return folder


def check_repo(repo: str) -> None:
    """Raises `BadValue` for anything but "owner/name"."""
    if not REPO.fullmatch(repo) or len(repo) > 120:
        raise BadValue(f"{repo!r} is no name of a repository; it has the form 'owner/name', of letters, digits, '-', '_' and '.'.")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise MissingExtra("The hub needs the package 'huggingface_hub': pip install huggingface_hub") from None
    return huggingface_hub


@contextmanager
def _readable(repo: str) -> Iterator[None]:
    """The hub's errors as sentences that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise BadFile(
            f"{repo}: its owner must grant you access first; ask for it on the repository's page, then log in: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise BadFile(f"{repo}: there is no such revision; leave it out for the newest one.") from None
    except errors.RepositoryNotFoundError:
        raise BadFile(f"{repo}: no such repository on the hub, or a private one. Check the spelling, or log in: hf auth login") from None
    except errors.LocalTokenNotFoundError:
        raise HubError(f"{repo}: you are not logged in. Run `hf auth login`, or pass token=…") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise HubError(f"{repo}: your token may not do this. Log in with one that may write: hf auth login") from None
        raise HubError(f"{repo}: the hub answered {status or 'with an error'}: {_first_line(error)} Try again later.") from error
    except errors.HFValidationError as error:
        raise BadValue(f"{repo!r} is no name of a repository: {_first_line(error)}") from None
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise HubError(
            f"{repo}: the hub cannot be reached and the files are not in the cache ({_first_line(error)}) "
            "Check the network, or give a local folder."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


# -- pushing --------------------------------------------------------------------------------------------------


def push(
    tuned: Tuned,
    repo: str,
    name: str | None = None,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    peft: bool = True,
) -> str:
    """Uploads one adapter with its card, making the repository if there is none, and returns its address.

    Args:
        name: the adapter; the first active one by default.
        metrics: results for the card; by default those of the training.
        peft: also in Hugging Face PEFT's format, where it has the method.

    Raises:
        HubError: offline, or not allowed to write there.
    """
    check_repo(repo)
    name = name if name is not None else (tuned.active or list(tuned.adapters))[0]
    hub = _hub()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_folder(tuned, folder, name, repo, metrics, peft)
        with _readable(repo):
            api = hub.HfApi(token=token)
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message or f"Add the adapter {name!r}")
    return str(address)


def write_folder(tuned: Tuned, folder: Path, name: str, repo: str, metrics: Mapping[str, Any] | None = None, peft: bool = True) -> None:
    """What is uploaded: the adapter in our format (without local paths), in PEFT's where it can be, and the card."""
    from veneer import store

    about = without_paths(store.describe(tuned, name))
    tensors = {key: t.detach().cpu().contiguous() for key, t in store.tensors_of(tuned, name).items()}
    store.write_tensors(folder / store.WEIGHTS, tensors, {"format": "pt", "veneer": json.dumps(about)})
    store.write_text(folder / store.FACTS, json.dumps(about, indent=2) + "\n")
    size = (folder / store.WEIGHTS).stat().st_size
    both = peft and _write_peft(tuned, folder, name)
    store.write_text(folder / "README.md", model_card(about, metrics, repo=repo, size=size, peft=both))


def _write_peft(tuned: Tuned, folder: Path, name: str) -> bool:
    from veneer.tools.peft import CONFIG, save_peft

    try:
        save_peft(tuned, folder, name)
    except VeneerError:  # PEFT does not have the method
        return False
    config = without_paths(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def without_paths(value: Any) -> Any:
    """The same facts with paths of this machine cut to their last name: strangers have no use for the rest."""
    if isinstance(value, Mapping):
        return {key: without_paths(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(v) for v in value]
    if isinstance(value, str) and is_path(value):
        return PureWindowsPath(value).name
    return value


def is_path(text: str) -> bool:
    """Whether a text is a path of this machine, and not a name on the hub."""
    return bool(re.match(r"(~|\.{1,2})?[/\\]|[A-Za-z]:[/\\]", text)) and "\n" not in text


# -- the card -------------------------------------------------------------------------------------------------


def model_card(
    about: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    *,
    repo: str = "OWNER/NAME",
    size: int | None = None,
    peft: bool = False,
) -> str:
    """The README of an adapter, in Markdown with the hub's YAML header.

    Args:
        about: what `veneer.json` holds.
        metrics: results by name, numbers or {"value", "low", "high", "n"}; those of the training by default.
        size: of the adapter's file in bytes. peft: whether PEFT's files lie beside it.
    """
    training = dict(about.get("training") or {})
    results = dict(metrics if metrics is not None else training.get("metrics") or {})
    parts = [
        _header(about, peft),
        f"# {repo.rpartition('/')[2]}\n",
        _what(about, size),
        _use(about, repo, peft),
        _training(about, training),
        _results(results),
        _limits(about),
        _licence(about),
    ]
    return "\n".join(p for p in parts if p)


def _base(about: Mapping[str, Any]) -> tuple[str, str]:
    """Name and class of the base; the name is "" if it has none that others could use."""
    base = about.get("base") or {}
    name = str(base.get("name") or "")
    return ("" if is_path(name) else name), str(base.get("class") or "the base model")


def _slugs(about: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(slug for slug, _ in parse_spec(str(about["spec"]))))


def _header(about: Mapping[str, Any], peft: bool) -> str:
    name, _ = _base(about)
    tags = ["veneer", "adapter", "parameter-efficient-fine-tuning", *_slugs(about), *(["peft"] if peft else [])]
    lines = ["---", "library_name: veneer"]
    if REPO.fullmatch(name) or re.fullmatch(r"[\w.-]+", name):
        lines += [f"base_model: {json.dumps(name)}", "base_model_relation: adapter"]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""])


def _what(about: Mapping[str, Any], size: int | None) -> str:
    from veneer.study.format import count, share
    from veneer.study.format import size as bytes_text

    name, kind = _base(about)
    base = f"`{name}` (`{kind}`)" if name else f"a `{kind}`"
    total = (about.get("base") or {}).get("parameters")
    part = f", {share(about.get('trained'), total)} of the base's {count(total)}" if total else ""
    file = f"; the file has {bytes_text(size)}" if size is not None else ""
    lines = [f"A small trained layer over {base}, which stays as it is: {count(about.get('trained'))} trained parameters{part}{file}.\n"]
    for slug in _slugs(about):
        lines.append(_sentence(slug))
    return "\n".join(
        [*lines, f"\nMethod, as veneer reads it: `{about['spec']}`, at {len(about.get('sites') or [])} places of the model.\n"]
    )


def _sentence(slug: str) -> str:
    """A method in one sentence, from its own docstring."""
    card = registry.card(slug)
    source = f" ([arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv}))" if card.arxiv else ""
    own = "" if card.module.startswith("veneer.") else " Its code is not part of veneer and is needed to load this adapter."
    return f"- **{card.title}**: {card.summary}{source}.{own}"


def _use(about: Mapping[str, Any], repo: str, peft: bool) -> str:
    name, kind = _base(about)
    where = name or "PATH-OF-THE-BASE-MODEL"
    head = next((s for s in about.get("sites") or [] if s.get("role") == "head" and "ForSequenceClassification" in kind), None)
    labels = f", num_labels={head['out']}" if head else ""
    known = re.search(r"(Model|For\w+|LMHead\w*)$", kind)
    base = (
        [f"from transformers import {kind}", f'model = {kind}.from_pretrained("{where}"{labels})']
        if known
        else [f"model = ...  # your {kind}"]
    )
    ours = [
        "import veneer",
        *base,
        f'tuned = veneer.load(model, "{repo}")',
        "# model(**inputs) answers with the adapter; tuned.disabled() is the base",
    ]
    text = ["## Use it\n", "```python", *ours, "```\n"]
    if peft:
        theirs = ["from peft import PeftModel", *base, f'model = PeftModel.from_pretrained(model, "{repo}")']
        text += ["The same adapter lies here in Hugging Face PEFT's format:\n", "```python", *theirs, "```\n"]
    return "\n".join(text)


SHOWN = {
    "task": "Task",
    "data": "Data",
    "steps": "Optimiser steps",
    "epochs": "Epochs",
    "seed": "Seed",
    "seconds": "Seconds",
    "lr": "Learning rate",
}
"""Training facts that a card tells, by their names in `veneer.json`."""


def _training(about: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    lines = [f"- {label}: {training[key]}" for key, label in SHOWN.items() if isinstance(training.get(key), str | int | float)]
    lines += [f"- veneer {about.get('veneer')}"] if about.get("veneer") else []
    return "\n".join(["## Training\n", *lines, ""]) if lines else ""


def _results(results: Mapping[str, Any]) -> str:
    if not results:
        return "## Results\n\nNone were recorded. Measure it on your own data before you rely on it.\n"
    rows = [f"| {name} | {_number(value)} |" for name, value in results.items()]
    note = "Measured on held-out data; brackets hold the 95 % interval.\n" if any(isinstance(v, Mapping) for v in results.values()) else ""
    return "\n".join(["## Results\n", "| | |", "|---|---|", *rows, "", note])


def _number(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        many = f", {value['n']} examples" if value.get("n") else ""
        return (
            f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]{many}"
            if "low" in value and "high" in value
            else f"{value['value']:.4g}"
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _limits(about: Mapping[str, Any]) -> str:
    lines = ["It fits the base model named above and no other; loading checks the shapes and says what does not fit."]
    for slug in _slugs(about):
        card = registry.card(slug)
        if "merge" in card.limits:
            lines.append(f"It cannot be merged into the base: {card.limits['merge']}.")
    lines.append("It has the base model's faults, and those of the data it was trained on. Nobody has tested it for other uses.")
    return "\n".join(["## Limits\n", *(f"- {line}" for line in lines), ""])


def _licence(about: Mapping[str, Any]) -> str:
    name, _ = _base(about)
    base = f"`{name}`" if name else "the base model"
    return f"## Licence\n\nThe licence of {base} is not recorded here and holds for this adapter too: check it before use.\n"
