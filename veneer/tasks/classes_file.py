"""Where the classes of masks come from: classes.txt, classes.json, or the masks themselves.

A folder says them in `classes.txt`, one name a line for the values 0, 1, 2 …, or in `classes.json`:

    {"names": ["ground", "road"]}                                        values 0 and 1; 255 is ignored
    {"names": {"0": "ground", "255": "road"}, "ignored": null}           other values
    {"names": ["ground", "road"], "palette": [[0, 0, 0], [255, 0, 0]]}   colours, in the order of the names

Without either, the classes are the values that occur in the training masks. Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadValue
from veneer.tasks.legend import IGNORED, Legend


def legend_of_values(values: Sequence[int], source: str) -> Legend:
    """The classes that occur in masks, named by their values. Raises `BadValue` unless there are 2 to 255 of them."""
    classes = sorted(set(values) - {IGNORED})
    if len(classes) < 2:
        extra = f" besides {IGNORED}, which is ignored" if IGNORED in values else ""
        raise BadValue(
            f"{source}: the training masks hold only the value {classes[0] if classes else IGNORED}{extra}; there must be at least "
            '2 classes. If the ignored value is one, write classes.json: {"names": {"0": "background", "255": "object"}, "ignored": null}.'
        )
    return _checked(Legend(tuple(map(str, classes)), tuple(classes)), source)


def read_legend(root: Path) -> Legend | None:
    """The legend that a folder's classes.txt or classes.json gives; None if there is neither. Raises `BadFile`."""
    text, structured = root / "classes.txt", root / "classes.json"
    if text.is_file():
        names = [line.strip() for line in text.read_text("utf-8").splitlines() if line.strip()]
        return _checked(Legend(tuple(names), tuple(range(len(names)))), str(text))
    if not structured.is_file():
        return None
    try:
        found = json.loads(structured.read_text("utf-8"))
        return _checked(_legend(found if isinstance(found, dict) and "names" in found else {"names": found}), str(structured))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(f'{structured} cannot be read ({error}). Write {{"names": ["ground", "road"]}}, or a list of names.') from None


def _legend(found: Mapping[str, Any]) -> Legend:
    names, ignored = found["names"], found.get("ignored", IGNORED)
    palette = found.get("palette")
    if palette is not None:
        if len(palette) != len(names):
            raise ValueError(f"{len(names)} names, but {len(palette)} colours")
        rest = None if ignored in (None, IGNORED) else _packed(ignored)
        return Legend(tuple(map(str, names)), tuple(map(_packed, palette)), rest, coloured=True)
    pairs = {int(v): str(n) for v, n in names.items()} if isinstance(names, dict) else dict(enumerate(map(str, names)))
    kept = {v: n for v, n in pairs.items() if v != ignored}
    return Legend(tuple(kept.values()), tuple(kept), ignored)


def _packed(colour: Sequence[int]) -> int:
    red, green, blue = (int(c) for c in colour)
    return red << 16 | green << 8 | blue


def _checked(legend: Legend, source: str) -> Legend:
    if not 2 <= len(legend.labels) <= IGNORED:
        raise BadFile(f"{source}: {len(legend.labels)} classes; there must be 2 to {IGNORED}.")
    for what, given in (("name", legend.labels), ("value or colour", legend.values)):
        twice = next((x for x in given if given.count(x) > 1), None)  # type: ignore[arg-type]
        if twice is not None:
            raise BadFile(f"{source}: the {what} {twice!r} stands there twice.")
    return legend
