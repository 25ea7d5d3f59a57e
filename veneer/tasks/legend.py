"""What the values in masks mean, and the reading of masks. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue, MissingExtra

if TYPE_CHECKING:
    import numpy as np

IGNORED = 255
"""Label of pixels that count neither in the loss nor in the metrics; and the value that means it unless said otherwise."""
LOSSY = (".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Legend:
    """Which values stand for which classes.

    Args:
        labels: names of the classes, in the order of the model's outputs.
        values: the value of each class in a mask; for coloured masks red · 65536 + green · 256 + blue.
        ignored: value of pixels that do not count; None: all count.
        coloured: whether masks are RGB pictures.
    """

    labels: tuple[str, ...]
    values: tuple[int, ...]
    ignored: int | None = IGNORED
    coloured: bool = False

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Legend:
        """From what `facts` gave, after it was JSON."""
        return cls(tuple(facts["labels"]), tuple(facts["values"]), facts["ignored"], facts["coloured"])

    @property
    def facts(self) -> dict[str, Any]:
        """The legend as JSON values."""
        return {**asdict(self), "labels": list(self.labels), "values": list(self.values)}

    def indices(self, mask: Any) -> np.ndarray:
        """Class indices uint8 [height, width] of a mask, `IGNORED` where it does not count.

        Raises `BadValue` for a value that is no class, with its place.
        """
        import numpy as np

        found = mask_values(mask, self.coloured)
        order = np.argsort(self.values)
        known = np.array(self.values)[order]
        place = np.minimum(np.searchsorted(known, found), len(known) - 1)
        out = order[place].astype(np.uint8)
        strange = known[place] != found
        if self.ignored is not None:
            out[found == self.ignored] = IGNORED
            strange &= found != self.ignored
        if strange.any():
            row, column = np.argwhere(strange)[0]
            raise BadValue(f"{named(mask)} holds {self._value(int(found[row, column]))} in row {row}, column {column}. {self._known()}")
        return out

    def picture(self, indices: np.ndarray) -> Any:
        """A PIL picture of class indices [height, width], in the values or colours that masks have."""
        import numpy as np
        from PIL import Image

        values = np.array(self.values)[indices]
        if self.coloured:
            return Image.fromarray(np.stack([values >> 16, values >> 8 & 255, values & 255], -1).astype(np.uint8))
        return Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.int32))

    def _value(self, value: int) -> str:
        return f"the colour {_colour(value)}" if self.coloured else f"the value {value}"

    def _known(self) -> str:
        shown = [f"{self._value(v).removeprefix('the ')} = {n}" for v, n in list(zip(self.values, self.labels))[:6]]
        more = f", … {len(self.labels)} in all" if len(self.labels) > 6 else ""
        rest = "" if self.ignored is None else f"; {self._value(self.ignored).removeprefix('the ')} is ignored"
        return f"The classes are {', '.join(shown)}{more}{rest}. Mend the mask, or name the class in classes.txt or classes.json."


def _colour(value: int) -> list[int]:
    return [value >> 16, value >> 8 & 255, value & 255]


def named(picture: Any) -> str:
    """A picture's file, for messages."""
    return str(picture) if isinstance(picture, str | Path) else "The mask"


# -- pictures ---------------------------------------------------------------------------------------------------


def mask_values(mask: Any, coloured: bool = False) -> np.ndarray:
    """Values int64 [height, width] of a mask: a file, a PIL image, or an array [height, width] or, coloured, [height, width, 3].

    Raises `BadFile` for what is no picture or was saved with loss, `BadValue` for colours where none are known.
    """
    import numpy as np

    pixels = mask if isinstance(mask, np.ndarray) else _pixels(mask)
    if pixels.ndim == 3 and not coloured:
        raise BadValue(
            f"{named(mask)} is a coloured picture; one class index a pixel is needed. Save it as an 8-bit grey or palette PNG, "
            'or give classes.json a "palette", one [red, green, blue] for each name.'
        )
    if pixels.ndim == 2 and coloured:
        raise BadValue(f"{named(mask)} has no colours, but classes.json has a palette. Save all masks in the palette's colours.")
    values = pixels.astype(np.int64)
    return values if values.ndim == 2 else values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]


def _pixels(mask: Any) -> np.ndarray:
    import numpy as np

    with opened(mask) as picture:
        if isinstance(mask, str | Path) and Path(mask).suffix.lower() in LOSSY:
            raise BadFile(f"{mask}: this kind of file changes pixel values when it is saved. Save masks as PNG.")
        return np.array(picture.convert("RGB") if picture.mode in ("RGB", "RGBA", "CMYK", "YCbCr") else picture)


def opened(picture: Any) -> Any:
    """A picture file opened but not decoded yet; a PIL image as it is. Raises `BadFile` for a file that is no picture."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise MissingExtra("Pictures need the package Pillow. Run: pip install 'veneer[data]'") from None
    if isinstance(picture, Image.Image):
        return picture.copy()
    if not isinstance(picture, str | Path):
        raise BadValue(f"A mask is a file, a PIL image or an array, not {type(picture).__name__}.")
    try:
        return Image.open(picture)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadFile(f"{picture} cannot be read as a picture: {error}") from None
