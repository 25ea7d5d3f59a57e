"""From a picture to the face in it, by five landmarks or a box that stand in the data; no detector is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue
from veneer.maths.face_alignment import Point, around, inverse, similarity, targets
from veneer.tasks.data import Row, Table
from veneer.tasks.image_classification import open_picture

if TYPE_CHECKING:
    from PIL import Image

CROP = 256
"""Side of an aligned face in pixels."""
SMALLEST = 16
"""Pixels: what is narrower shows no traces of anything."""


class Faces:
    """How the rows of one data set say where the face is: column `landmarks` (left eye, right eye, nose, left and right corner
    of the mouth, as ten numbers x y x y …), else column `box` (left, top, right, bottom), else the picture is the face.

    Numbers are pixels, as a list or a text with blanks, commas or brackets between them.
    """

    def __init__(self, column: str | None) -> None:
        self.column = column

    @classmethod
    def of(cls, table: Table) -> Faces:
        return cls(next((name for name in ("landmarks", "box") if name in table.columns), None))

    def numbers(self, row: Row) -> list[float]:
        """The row's landmarks or box; [] where no face was found. Raises `ValueError` for anything else than numbers."""
        value = row.get(self.column or "")
        return [] if value is None else list(_flat(value))

    def crop(self, row: Row) -> Image.Image:
        """The face, with three channels: aligned by its landmarks, cut around its box, or the whole picture."""
        picture = open_picture(row["image"])
        found = self.numbers(row)
        if self.column == "landmarks" and found:
            return aligned(picture, _points(found))
        return picture.crop(around(found)) if self.column == "box" and found else picture

    def check(self, table: Table, split: str) -> int:
        """Leaves rows out of the table whose face was not found, and gives their number; the uncut picture must not stand in for it.

        Raises `BadFile` or `BadValue` with the place of a picture that is missing, too small, or does not hold its landmarks or box.
        """
        kept = []
        for i, row in enumerate(table.rows):
            place = f"{table.place(i)} ({split})"
            size = picture_size(row.get("image"), place)
            try:
                found = self.numbers(row) if self.column else []
            except (ValueError, TypeError):
                raise BadValue(f"{place}: {self.column} {row.get(self.column or '')!r} holds other things than numbers.") from None
            problem = _problem(size, found, self.column)
            if problem:
                raise BadValue(f"{place}: {problem}")
            if found or not self.column:
                kept.append(i)
        lost = len(table) - len(kept)
        if not kept:
            raise BadValue(f"{table.source} ({split}): the column {self.column!r} is empty everywhere; fill it, or leave it out.")
        if lost:
            left = table.pick(kept)
            table.rows, table.lines = left.rows, left.lines
        return lost


_MARKS = {ord(mark): " " for mark in "[](),;"}


def _flat(value: Any) -> Iterator[float]:
    """The numbers of a text, a list or a list of points."""
    for part in value.translate(_MARKS).split() if isinstance(value, str) else value:
        if hasattr(part, "__len__") and not isinstance(part, str):
            yield from _flat(part)
        else:
            yield float(part)


def picture_size(image: Any, place: str) -> tuple[int, int]:
    """Width and height, of a file from its head alone. Raises `BadFile` if there is no picture."""
    if isinstance(image, str | Path) and str(image):
        if not Path(image).is_file():
            raise BadFile(f"{place}: there is no picture {image}.")
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(image) as opened:
                return opened.size
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise BadFile(f"{place}: {image} cannot be read as a picture: {error}") from None
    if image is None or isinstance(image, str):
        raise BadFile(f"{place}: the column 'image' is empty.")
    return image.shape[1::-1] if hasattr(image, "shape") else open_picture(image).size


def _points(found: Sequence[float]) -> list[Point]:
    return list(zip(found[::2], found[1::2]))


def _problem(size: tuple[int, int], found: Sequence[float], column: str | None) -> str:
    """What is wrong with where the face is said to be in a picture of this size, or ""."""
    width, height = size
    if min(size) < SMALLEST:
        return f"the picture has {width} × {height} pixels; at least {SMALLEST} a side are needed."
    if not found:
        return ""
    wanted = {"landmarks": 10, "box": 4}[column or ""]
    if len(found) != wanted:
        return f"{column} has {len(found)} numbers, expected {wanted}."
    xs, ys = found[::2], found[1::2]
    if min(xs) < -width / 10 or min(ys) < -height / 10 or max(xs) > 1.1 * width or max(ys) > 1.1 * height:
        return (
            f"{column} reaches from {min(xs):g}, {min(ys):g} to {max(xs):g}, {max(ys):g}, outside the picture of {width} × {height} pixels."
        )
    if column == "box" and (found[2] - found[0] < SMALLEST or found[3] - found[1] < SMALLEST):
        return f"the box (left, top, right, bottom) {', '.join(f'{v:g}' for v in found)} is narrower than {SMALLEST} pixels."
    if column == "landmarks" and max(max(xs) - min(xs), max(ys) - min(ys)) < SMALLEST / 2:
        return f"the landmarks lie within {SMALLEST // 2} pixels; they are to be pixels of the picture."
    return ""


def aligned(picture: Image.Image, landmarks: Sequence[Point], res: int = CROP) -> Image.Image:
    """The picture turned, scaled and shifted so that the landmarks lie where they lie in every crop: res × res, bilinear, black outside."""
    from PIL import Image

    (a, b, c), (d, e, f) = inverse(similarity(landmarks, targets(res)))
    # Pillow counts from the corner of a pixel, landmarks from its centre.
    half = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    return picture.transform((res, res), Image.Transform.AFFINE, half, Image.Resampling.BILINEAR)
