"""A contact sheet: pictures in columns, one row a prompt, with what they are written above and beside them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARGIN, LINE, TEXT_WIDTH, SMALLEST = 8, 14, 260, 96


def contact_sheet(rows: Sequence[tuple[str, Sequence[Any]]], heads: Sequence[str]) -> Any:
    """One picture of many.

    Args:
        rows: what each row shows, and its PIL pictures, one for each of `heads`; None leaves a gap.
        heads: the columns' names.

    Returns:
        A PIL picture; small ones are enlarged to at least 96 pixels without smoothing.
    """
    from PIL import Image, ImageDraw

    side = max(SMALLEST, *(p.width for _, pictures in rows for p in pictures if p is not None))
    step, top = side + MARGIN, LINE + 2 * MARGIN
    sheet = Image.new("RGB", (MARGIN + len(heads) * step + TEXT_WIDTH, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((MARGIN + column * step, MARGIN), head, fill="black")
    for row, (said, pictures) in enumerate(rows):
        y = top + row * step
        for column, picture in enumerate(pictures):
            if picture is not None:
                shown = picture if picture.width == side else picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(shown, (MARGIN + column * step, y))
        for line, words in enumerate(textwrap.wrap(printable(said), TEXT_WIDTH // 7)[: side // LINE]):
            draw.text((MARGIN + len(heads) * step, y + line * LINE), words, fill="black")
    return sheet


def printable(text: str) -> str:
    """Text in the signs that PIL's own font has."""
    return text.encode("latin-1", "replace").decode("latin-1")


def save_png(picture: Any, path: Path) -> None:
    """A PNG file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(work, format="PNG")
    work.replace(path)
