"""Pictures with descriptions: a folder of images with metadata.jsonl or .csv, one line a picture (image, description, attributes).

The form in which outfit data sets such as FLORA come (arXiv:2411.13901). Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from veneer.errors import BadFile, BadValue, nearest
from veneer.tasks.data import Row, Table
from veneer.tasks.task import _first

DESCRIPTION_NAMES = ("description", "text", "caption", "input prompt", "prompt")
MANY = 200
"""From so many pictures on, looking at all of them shows a bar."""

Item = TypeVar("Item")
FIELD = re.compile(r"\{([^{}]+)\}")


# -- columns and prompts ------------------------------------------------------------------------------------------


def column_names(table: Table, description: str | None, template: str | None) -> tuple[str | None, str | None]:
    """The columns of description and attributes (None where there is none, and none is needed).

    Raises `BadValue` for a missing picture or description, and for a template that names a column which is not there.
    """
    names = table.columns
    if "image" not in names:
        raise BadValue(f"{table.source}: no column names the pictures; call it image (there are {', '.join(names)}).")
    said = description or _first(DESCRIPTION_NAMES, names)
    if said is not None and said not in names:
        raise BadValue(f"{table.source} has no column {said!r}.{nearest(said, names)} It has: {', '.join(names)}. Choose with --text.")
    attributes = _first(("attributes",), names)
    fields = FIELD.findall(template) if template else ["description"]
    for field in fields:
        if field not in names and not (field == "description" and said):
            if template is None:
                raise BadValue(
                    f"{table.source}: the pictures have no descriptions; there are {', '.join(names)}. Add a column description to "
                    "metadata.jsonl, name it with --text, or give all one prompt: --task \"text-to-image(template='a photo of sks dog')\"."
                )
            known = [*names, *(["description"] if said else [])]
            raise BadValue(f"template {template!r}: there is no column {field!r}.{nearest(field, known)} There are: {', '.join(known)}.")
    return said, attributes


def needs_description(template: str | None, description: str) -> bool:
    """Whether prompts are made of the descriptions."""
    return template is None or bool({"description", description} & set(FIELD.findall(template)))


def prompt_of(row: Row, description: str | None, attributes: str | None, template: str | None) -> str:
    """The prompt of one row: its description and its attributes, or the template with its {columns} filled in."""
    said = str(row.get(description) or "").strip() if description else ""
    told = listed(row.get(attributes)) if attributes else ""
    if template is None:
        return ", ".join(part for part in (said.rstrip(".") if told else said, told) if part)
    known = {**{k: listed(v) for k, v in row.items()}, **({"description": said} if description else {}), "attributes": told}
    return FIELD.sub(lambda found: known.get(found[1], ""), template).strip()


def listed(value: Any) -> str:
    """Attributes as words: {"color": "red", "sleeves": "long"} → "color red, sleeves long"; lists joined, text as it is."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return value.strip()
    if isinstance(value, dict):
        return ", ".join(f"{k} {listed(v)}" for k, v in value.items() if v not in (None, ""))
    if isinstance(value, list | tuple):
        return ", ".join(listed(v) for v in value)
    return "" if value is None or hasattr(value, "shape") else str(value).strip()


# -- checking -----------------------------------------------------------------------------------------------------


def check_pictures(table: Table, split: str, seen: dict[str, str]) -> None:
    """Opens every picture, column `image`, and finds those that are there twice, also across splits; `seen` is filled with digest → place.

    Raises `BadFile` for a missing or unreadable file, `BadValue` for a picture that is there again, both with the line.
    """
    from veneer.tasks.image_classification import open_picture

    for i, row in enumerate(watched(table.rows, f"looking at {split} pictures", MANY)):
        picture = row.get("image")
        if picture is None or (isinstance(picture, str) and not picture):
            raise BadValue(f"{table.place(i)} ({split}): no picture is named. Give its file.")
        if isinstance(picture, str) and not Path(picture).is_file():
            raise BadFile(f"{table.place(i)} ({split}): there is no picture {picture}.")
        try:
            shown = open_picture(picture)
        except BadFile as error:
            raise BadFile(f"{table.place(i)} ({split}): {error}") from None
        digest = hashlib.sha256(f"{shown.size}".encode() + shown.tobytes()).hexdigest()
        if digest in seen:
            raise BadValue(f"{table.place(i)} ({split}) is the same picture as {seen[digest]}. Leave one of them out.")
        seen[digest] = f"{table.place(i)} ({split})"


def watched(items: Sequence[Item], what: str, many: int = 4) -> Iterable[Item]:
    """The items, with a bar if they are at least so many and somebody is looking."""
    if len(items) < many or not sys.stderr.isatty():
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit="picture", leave=False, dynamic_ncols=True)
