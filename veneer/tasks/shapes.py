"""A generator of pictures of shapes with their masks, clean and with frequency artefacts: for tests, demonstrations and recipes.

One to four shapes of five kinds stand on a ground of slow waves of colour; kind, colour, size and turn are independent, so
a class can only be told by its outline. Domains show the same kind of scene:

    clean       as drawn
    artefacts   with one of: a fine grating (period 2 to 4 pixels, any direction), a checkerboard of single pixels, or stripes
                (every line of the picture a little brighter or darker), as interference, resampling and line sensors leave them
    blurred     without its high frequencies: four by four pixels averaged and interpolated again
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from veneer.errors import BadValue
from veneer.tasks.data import Data, Table
from veneer.tasks.legend import Legend

if TYPE_CHECKING:
    import numpy as np

CLASSES = ("ground", "disc", "square", "triangle", "ring", "cross")
DOMAINS = ("clean", "artefacts", "blurred")
SIDE = 112
SIZES = {"train": 240, "validation": 48, "test": 64}
CORNERS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(math.cos(a), math.sin(a)) for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)],
    "cross": [(-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)],
}
"""Outlines around the origin; each is scaled to reach as far as a disc."""


def shapes(sizes: dict[str, int] | None = None, side: int = SIDE, seed: int = 0) -> Data:
    """Scenes of every domain, by split. The test scenes are the same in all of them, so only the artefacts differ.

    Args:
        sizes: scenes of each domain in each split.
        side: of the square pictures, in pixels.
    """
    tables = {}
    for k, (split, n) in enumerate((sizes or SIZES).items()):
        rows = []
        for d, domain in enumerate(DOMAINS):
            for i in range(n):
                image, mask = scene((seed, k, 0 if split == "test" else d, i), side)
                rows.append({"image": degraded(image, domain, (seed, k, d, i, 1)), "mask": mask, "domain": domain})
        tables[split] = Table(rows, f"shapes[{split}]")
    legend = Legend(CLASSES, tuple(range(len(CLASSES))))
    hints = {"task": "semantic-segmentation", "source": "clean"}
    return Data("shapes", tables, images=True, hints=hints, facts={"legend": legend.facts})


def scene(seed: tuple[int, ...], side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [side, side, 3] and its mask uint8 [side, side] of indices into `CLASSES`; later shapes hide earlier ones."""
    import numpy as np

    chance = np.random.default_rng(seed)
    picture, mask = _waves(chance, side), np.zeros((side, side), np.uint8)
    texture = chance.normal(0, 6, (side, side, 3))
    for _ in range(chance.integers(1, 5)):
        kind = int(chance.integers(1, len(CLASSES)))
        size = side * chance.uniform(0.12, 0.25)
        centre = chance.uniform(size * 0.7, side - size * 0.7, 2)
        inside = _drawn(CLASSES[kind], size, centre, chance.uniform(0, 2 * math.pi), side)
        picture[inside] = (chance.uniform(0, 255, 3) + texture)[inside]
        mask[inside] = kind
    return picture.clip(0, 255).astype(np.uint8), mask


def degraded(picture: np.ndarray, domain: str, seed: tuple[int, ...]) -> np.ndarray:
    """A picture uint8 [side, side, 3] as a domain shows it. Raises `BadValue` for a domain that does not exist."""
    import numpy as np
    from PIL import Image

    if domain == "clean":
        return picture
    side = len(picture)
    if domain == "blurred":
        small = Image.fromarray(picture).resize((side // 4, side // 4), Image.Resampling.BOX)
        return np.array(small.resize((side, side), Image.Resampling.BICUBIC))
    if domain != "artefacts":
        raise BadValue(f"shapes: there is no domain {domain!r}; there are {', '.join(DOMAINS)}.")
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    kind, angle, period = chance.integers(3), chance.uniform(0, math.pi), chance.uniform(2, 4)
    grating = np.sin(2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)))
    noise = (grating, (-1.0) ** (x + y), chance.normal(0, 1, (side, 1)) * np.ones((1, side)))[kind]
    return (picture + chance.uniform(30, 70) * noise[..., None]).clip(0, 255).astype(np.uint8)


def _waves(chance: np.random.Generator, side: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    coarse = Image.fromarray(chance.uniform(0, 255, (4, 4, 3)).astype(np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


def _drawn(kind: str, size: float, centre: Any, angle: float, side: int) -> np.ndarray:
    """Which pixels a shape covers, bool [side, side]."""
    import numpy as np
    from PIL import Image, ImageDraw

    y, x = np.mgrid[:side, :side]
    if kind in ("disc", "ring"):
        distance = np.hypot(x - centre[0], y - centre[1])
        return (distance <= size) & ((kind == "disc") | (distance >= 0.55 * size))
    corners = np.array(CORNERS[kind], float)
    corners *= size / np.hypot(*corners.T).max()
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in corners @ turn.T + centre], fill=1)
    return np.array(canvas)
