"""Satellite time series: one patch of ground, photographed again and again, with a class for every pixel.

    root/{train,validation,test}/name.npz    patches with their splits (validation and test may be missing)
    root/name.npz                            patches without

A file holds the arrays `series` [time, channels, height, width], `dates` [time] and `mask` [height, width] (whole numbers;
255 does not count), as `numpy.savez(file, series=…, dates=…, mask=…)` writes them, and may hold a text `area`: patches of
one area are never torn apart by an automatic split. Dates are days, as numpy's datetime64 or written 2020-03-01, or days of
the year 1 … 366 where the series stays inside one year. `veneer.tasks.classes_file` says how a folder names its classes.
Nothing that a file holds is executed: arrays of Python objects are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue
from veneer.tasks.classes_file import read_legend
from veneer.tasks.data import SPLITS, Data, Row, Table

if TYPE_CHECKING:
    import numpy as np

LAST_DAY = 365
"""The 366th day of a leap year counts as this one."""
SAVE = "numpy.savez(file, series=…, dates=…, mask=…)"


@dataclass(frozen=True)
class Outline:
    """What is known of a patch before its pictures are read.

    Args:
        where: its file, for messages.
        shape: of the series: time, channels, height, width.
        days: of the year, 1 … 365, one a picture, in the order of the dates.
        mask: [height, width] as it was written; None where there is none.
    """

    where: str
    shape: tuple[int, int, int, int]
    days: np.ndarray
    mask: np.ndarray | None


# -- folders ----------------------------------------------------------------------------------------------------


def holds_series(path: Path) -> bool:
    """Whether a folder has one of the forms above."""
    return any(_files(place) for place in (path, *_splits(path).values()))


def series_folder(path: Path, source: str) -> Data:
    """Rows with `series` (the file), `area` and `classes` (the folder's legend, or None), by split. Raises `BadFile`."""
    places = _splits(path) or {"train": path}
    legend = read_legend(path)
    tables = {}
    for split, place in places.items():
        rows = [{"series": str(f), "area": area_of(f), "classes": legend.facts if legend else None} for f in _files(place)]
        if not rows:
            raise BadFile(f"{place} holds no .npz files, one a patch. Save them with {SAVE}.")
        tables[split] = Table(rows, str(place))
    if "train" not in tables:
        raise BadFile(f"{path} has no folder train; it has {', '.join(places)}.")
    return Data(source, tables, hints={"task": "series-segmentation"})


def _splits(path: Path) -> dict[str, Path]:
    found = {name: next((path / word for word in words if (path / word).is_dir()), None) for name, words in SPLITS.items()}
    return {name: place for name, place in found.items() if place}


def _files(place: Path) -> list[Path]:
    return sorted(f for f in place.iterdir() if f.suffix.lower() == ".npz")


# -- patches ----------------------------------------------------------------------------------------------------


def outline(row: Row | str | Path) -> Outline:
    """Sizes, days and mask of a patch: of a file, or of a row that holds a file or the arrays themselves.

    Raises `BadFile` for files that cannot be read and `BadValue` for arrays that do not go together, with what to change.
    """
    with arrays(row) as (held, where):
        for name in ("series", "dates"):
            if name not in held:
                raise BadFile(f"{where} has no array {name!r}; it has {', '.join(held) or 'none'}. Save it with {SAVE}.")
        shape = _shape(held, where)
        days = days_of(held["dates"], shape[0], where)
        mask = held["mask"] if "mask" in held and held["mask"] is not None else None
    if mask is not None and mask.shape != shape[2:]:
        sizes = f"{' × '.join(map(str, mask.shape))}, the pictures {shape[2]} × {shape[3]} pixels"
        raise BadValue(f"{where}: the mask is {sizes}. Cut or resample one of them: they must be equal.")
    if mask is not None and mask.dtype.kind not in "iub":
        raise BadValue(f"{where}: the mask holds {mask.dtype} values; save whole numbers, one class a pixel.")
    return Outline(where, shape, days, mask)


def pictures(row: Row | str | Path) -> np.ndarray:
    """The series of a patch, float32 [time, channels, height, width]. Raises `BadValue` for values that are not numbers."""
    import numpy as np

    with arrays(row) as (held, where):
        series = np.asarray(held["series"], np.float32)
    bad = ~np.isfinite(series).all((1, 2, 3))
    if bad.any():
        raise BadValue(f"{where}: series[{int(bad.argmax())}] holds values that are not finite. Leave the picture out, or fill the pixels.")
    return series


@contextmanager
def arrays(row: Row | str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The arrays of a patch by name, and its name for messages. Raises `BadFile` for a file that cannot be read."""
    import numpy as np

    given = row if isinstance(row, str | Path) else row.get("series")
    if not isinstance(given, str | Path):
        yield (row if isinstance(row, Mapping) else {}), "The patch"
        return
    try:
        loaded = np.load(given, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, not several by name")
        with loaded as file:
            yield file, str(given)
    except FileNotFoundError:
        raise BadFile(f"There is no file {given}.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = "it holds Python objects, and none are read" if "pickle" in str(error) else str(error).strip() or type(error).__name__
        raise BadFile(f"{given} cannot be read as a patch: {reason}. Save plain arrays with {SAVE}.") from None


def area_of(file: Path) -> str:
    """The area that a patch names; its own path where it names none, so that it is an area for itself."""
    with arrays(file) as (held, _):
        return str(held["area"]) if "area" in held else str(file)


def _shape(held: Mapping[str, Any], where: str) -> tuple[int, int, int, int]:
    """Of the series; of a file without reading the pictures."""
    import numpy as np

    member = getattr(held, "zip", None)
    if member is None:
        shape, kind = np.shape(held["series"]), np.asarray(held["series"]).dtype.kind
    else:
        with member.open("series.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            kind = dtype.kind
    if kind not in "fiu":
        raise BadValue(f"{where}: series must hold plain numbers{'; Python objects are not read' if kind == 'O' else ''}.")
    if len(shape) != 4 or 0 in shape:
        raise BadValue(f"{where}: series has the shape {list(shape)}; it must be [time, channels, height, width].")
    return shape  # type: ignore[return-value]


# -- dates ------------------------------------------------------------------------------------------------------


def days_of(dates: Any, pictures: int, where: str = "The patch") -> np.ndarray:
    """Days of the year int64 [time], 1 … 365, from dates in the forms above.

    Raises `BadValue` for dates that are missing, unreadable or do not increase, naming the one.
    """
    import numpy as np

    given = np.asarray(dates)
    if given.shape != (pictures,):
        raise BadValue(f"{where}: {pictures} pictures need as many dates; dates has the shape {list(given.shape)}.")
    kind = given.dtype.kind
    whole = kind in "iu"
    try:
        if kind not in "iuMUS":
            raise ValueError(f"they are {given.dtype}")
        days = given.astype(np.int64) if whole else given.astype(str if kind == "S" else given.dtype).astype("datetime64[D]")
    except ValueError as error:
        raise BadValue(f"{where}: a date cannot be read ({error}). Write days as 2020-03-01.") from None
    missing = np.zeros(pictures, bool) if whole else np.isnat(days)
    if missing.any():
        raise BadValue(f"{where}: dates[{int(missing.argmax())}] is missing. Fill it in, or leave the picture out.")
    late = np.diff(days).astype(np.int64) <= 0
    if late.any():
        i = int(late.argmax()) + 1
        hint = ", or write whole dates (2020-03-01) where a series goes on into the next year" if whole else ""
        raise BadValue(f"{where}: dates[{i}] ({days[i]}) does not come after dates[{i - 1}] ({days[i - 1]}). Sort the pictures{hint}.")
    found = days if whole else (days - days.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) + 1
    if not 1 <= found.min() <= found.max() <= LAST_DAY + 1:
        raise BadValue(f"{where}: dates go from {found.min()} to {found.max()}; a day of the year is 1 … {LAST_DAY + 1}.")
    return np.minimum(found, LAST_DAY)
