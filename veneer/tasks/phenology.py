"""Made satellite series: fields whose crops differ in when they are green, clouds that leave gaps, regions and years that shift.

No labelled series arrive in packages, so this generator stands in for them, in tests and in the recipe. What it makes is far
simpler than real fields; scores on it say that the machinery works, not how well a method does on real crops.

A patch is divided into fields (the cells of random points), each with one crop. A crop's greenness over the season is

    g(t) = low + (high − low) (σ((t − start) / 8) − σ((t − end) / 8)),    t in days from 1 January of the harvest year,

where start and end are the crop's, moved by the place's days, and by N(0, 4²) days for each field. A band's reflectance is
(1 − g) soil + g leaf: all crops share both spectra, so that only the timing tells them apart. Every picture then gets a
brightness of its own and noise on every pixel. A satellite passes every 10 days from November to August; clouded passes are
missing, so series have different lengths and dates, and some of the others have a cloud in them. Pixels beside another
field are mixed and not labelled. Places differ in days, greenness, soil brightness and clouds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.tasks.data import Data, Row, Table
from veneer.tasks.legend import IGNORED, Legend

if TYPE_CHECKING:
    import numpy as np

CROPS = {
    "grassland": (35, 280, 0.35, 0.75),
    "winter wheat": (66, 176, 0.12, 0.90),
    "winter barley": (44, 148, 0.12, 0.90),
    "maize": (142, 262, 0.05, 0.88),
    "sunflower": (122, 226, 0.05, 0.85),
}
"""start, end, low, high."""
WHEAT = ("other", "winter wheat")
SOIL = (0.08, 0.11, 0.15, 0.18, 0.20, 0.22, 0.24, 0.26, 0.32, 0.28)
LEAF = (0.03, 0.06, 0.03, 0.10, 0.30, 0.38, 0.42, 0.44, 0.20, 0.10)
"""Reflectances in the bands 2–8, 8A, 11 and 12 of Sentinel-2, rounded from what is typical."""
SEASON = (-61, 243)
"""1 November to the end of August."""
PASS, FIELDS, STEEP = 10, 3, 8.0


@dataclass(frozen=True)
class Place:
    """A region in a year: days by which crops are later (negative: earlier), factor on greenness, on soil, share of clouded passes."""

    region: str
    year: int
    days: float = 0.0
    green: float = 1.0
    soil: float = 1.0
    clouds: float = 0.4


SOURCE = Place("A", 2019)
"""Where the built-in model is pretrained."""
TARGET = Place("B", 2020, days=-20.0, green=0.85, soil=1.2, clouds=0.5)
"""Where it is adapted to: warmer, so that its wheat is green when barley was, with thinner crops on brighter soil."""


def patches(place: Place, count: int, seed: int, side: int = 8) -> list[Row]:
    """Rows with series float32 [time, 10, side, side], dates, mask uint8 and area; the same for the same arguments."""
    import numpy as np

    draw = np.random.default_rng(seed)
    return [patch(place, draw, side) for _ in range(count)]


def patch(place: Place, draw: np.random.Generator, side: int) -> Row:
    """One patch of a place."""
    import numpy as np

    fields, edges = _fields(draw, side)
    crops = draw.integers(len(CROPS), size=FIELDS)
    days = _passes(place, draw)
    green = np.stack([greenness(list(CROPS)[c], days, place, draw) for c in crops], 1)[:, fields]  # [time, side, side]
    soil, leaf = place.soil * np.array(SOIL), np.array(LEAF)
    series = (1 - green)[:, None] * soil[:, None, None] + green[:, None] * leaf[:, None, None]
    series = series * draw.normal(1, 0.04, (len(days), 1, 1, 1)) + draw.normal(0, 0.015, series.shape)
    _clouds(series, draw)
    mask = np.where(edges, IGNORED, crops[fields]).astype(np.uint8)
    dates = np.datetime64(f"{place.year}-01-01") + days
    return {"series": series.astype(np.float32), "dates": dates, "mask": mask, "area": f"{place.region}{place.year}"}


def greenness(crop: str, days: np.ndarray, place: Place, draw: np.random.Generator) -> np.ndarray:
    """g on these days for one field of a crop, [time]."""
    import numpy as np

    *turns, low, high = CROPS[crop]
    rise, fall = (1 / (1 + np.exp(-(days - t - place.days - draw.normal(0, 4)) / STEEP)) for t in turns)
    return place.green * (low + (high - low) * (rise - fall))


def _fields(draw: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The field of every pixel, and whether one beside it belongs to another, both [side, side]."""
    import numpy as np

    points = draw.uniform(0, side, (FIELDS, 2))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    fields = ((grid[:, :, None] - points) ** 2).sum(-1).argmin(-1)
    down, right = fields[1:] != fields[:-1], fields[:, 1:] != fields[:, :-1]
    edges = np.zeros((side, side), bool)
    edges[1:] |= down
    edges[:, 1:] |= right
    return fields, edges


def _passes(place: Place, draw: np.random.Generator) -> np.ndarray:
    """Days of the passes without cloud, at least six."""
    import numpy as np

    days = np.arange(SEASON[0] + draw.integers(PASS), SEASON[1], PASS)
    clear = draw.uniform(size=len(days)) > place.clouds
    clear[draw.choice(len(days), 6, replace=False)] = True
    return days[clear]


def _clouds(series: np.ndarray, draw: np.random.Generator) -> None:
    """A bright disc in some of the pictures."""
    import numpy as np

    side = series.shape[-1]
    rows, columns = np.ogrid[:side, :side]
    for picture in series:
        if draw.uniform() < 0.15:
            y, x, radius = *draw.uniform(0, side, 2), draw.uniform(side / 8, side / 3)
            picture[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = draw.uniform(0.4, 0.8)


# -- as data ----------------------------------------------------------------------------------------------------


def wheat_only(rows: Sequence[Row]) -> list[Row]:
    """The rows with winter wheat as class 1 and everything else as class 0."""
    import numpy as np

    wheat = list(CROPS).index("winter wheat")
    return [{**row, "mask": np.where(row["mask"] == IGNORED, IGNORED, row["mask"] == wheat).astype(np.uint8)} for row in rows]


def legend(wheat: bool = False) -> dict[str, Any]:
    """The classes, as rows carry them."""
    names = WHEAT if wheat else tuple(CROPS)
    return Legend(names, tuple(range(len(names)))).facts


def phenology(place: Place = TARGET, *, wheat: bool = False, sizes: tuple[int, int, int] = (64, 32, 128)) -> Data:
    """Training, validation and test patches of a place; with `wheat` the two classes of the study."""
    name, classes = "phenology-wheat" if wheat else "phenology", legend(wheat)
    tables = {}
    for seed, (split, count) in enumerate(zip(("train", "validation", "test"), sizes)):
        rows = patches(place, count, 100 * place.year + seed)
        rows = [{**row, "classes": classes} for row in (wheat_only(rows) if wheat else rows)]
        tables[split] = Table(rows, f"{name}[{split}]")
    return Data(name, tables, hints={"task": "series-segmentation"})


def write(folder: str | Path, data: Data) -> None:
    """The data as a folder of .npz files, in the form that `veneer.tasks.series` describes."""
    import numpy as np

    root = Path(folder)
    for split, table in data.tables.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(table.rows):
            np.savez(root / split / f"{i:04}.npz", **{k: row[k] for k in ("series", "dates", "mask", "area")})
    names = data.train.rows[0]["classes"]["labels"]
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
