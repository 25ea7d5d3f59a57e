"""Generated forgeries of real pictures: four manipulations of Fashion-MNIST, each a data set of its own.

Every picture is drawn to twice its size (56 × 56). A half stays; in the other half a soft-edged ellipse somewhere in the middle
is forged, by one manipulation a data set:

- splice: the same place of another garment of the same kind, blended in.
- warp: the same place, twisted by up to 100° at its middle.
- resample: the same place, made three times smaller and back.
- compress: the same place, saved as JPEG of quality 5 to 20.

The data sets share no picture (they take every fourth), train and test rows come from the two splits of Fashion-MNIST, and all
is drawn from a fixed seed. Licence of the pictures: MIT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from veneer import assets
from veneer.tasks.data import Data, Row, Table
from veneer.tasks.picture_noise import INSTALL, as_jpeg

if TYPE_CHECKING:
    import numpy as np

SIDE = 56
TRAIN, TEST = 2400, 600
"""Pictures of each data set."""


def forgeries(kind: str) -> Data:
    """Real and forged pictures of one manipulation, a key of `MANIPULATIONS`."""
    images, labels, test_images, test_labels = assets.fashion_mnist()
    first = list(MANIPULATIONS).index(kind)
    step = len(MANIPULATIONS)
    name = f"fashion-{kind}"
    parts = {"train": (images, labels, TRAIN), "test": (test_images, test_labels, TEST)}
    tables = {}
    for part, (x, y, count) in parts.items():
        taken = slice(first, first + step * count, step)
        tables[part] = Table(half_forged(x[taken], y[taken], kind, seed=first), f"{name}[{part}]")
    return Data(name, tables, images=True, hints={"task": "forgery-detection", "label": "label"})


def half_forged(images: np.ndarray, labels: np.ndarray, kind: str, seed: int) -> list[Row]:
    """Rows of pictures uint8 [n, 28, 28] drawn larger, every second one forged; a donor is the next picture of the same label."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(seed)
    large: list[np.ndarray] = [np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) for x in images]
    rows: list[Row] = []
    for i, picture in enumerate(large):
        forged = i % 2 == 1
        if forged:
            alike = np.flatnonzero(labels == labels[i])
            donor = large[alike[(np.searchsorted(alike, i) + 1) % len(alike)]]
            mask = ellipse(chance)
            picture = picture + mask * (MANIPULATIONS[kind](picture, donor, mask, chance) - picture)
        rows.append({"image": picture.round().clip(0, 255).astype(np.uint8), "label": "fake" if forged else "real"})
    return rows


def ellipse(chance: np.random.Generator) -> np.ndarray:
    """1 inside an ellipse of a quarter to two fifths of the picture's side around its middle, falling to 0 at its edge: [side, side]."""
    import numpy as np

    middle = SIDE / 2 + chance.uniform(-SIDE / 8, SIDE / 8, 2)
    radii = chance.uniform(SIDE / 4, SIDE / 2.5, 2)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    distance = np.hypot((y - middle[0]) / radii[0], (x - middle[1]) / radii[1])
    return ((1 - distance) / 0.2).clip(0, 1)


def splice(picture: np.ndarray, donor: np.ndarray, mask: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    return donor


def warp(picture: np.ndarray, donor: np.ndarray, mask: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    import numpy as np

    try:
        from scipy.ndimage import map_coordinates
    except ModuleNotFoundError:
        from veneer.errors import MissingExtra

        raise MissingExtra(f"Twisting pictures needs the package scipy. Run: {INSTALL}") from None
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    middle = [float((axis * mask).sum() / mask.sum()) for axis in (y, x)]
    far = np.hypot(y - middle[0], x - middle[1]) / (SIDE / 3)
    angle = np.radians(chance.choice([-1, 1]) * chance.uniform(50, 100)) * (1 - far).clip(0, 1)
    dy, dx = y - middle[0], x - middle[1]
    turned = [middle[0] + np.cos(angle) * dy - np.sin(angle) * dx, middle[1] + np.sin(angle) * dy + np.cos(angle) * dx]
    return map_coordinates(picture, turned, order=1, mode="nearest")


def resample(picture: np.ndarray, donor: np.ndarray, mask: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    import numpy as np
    from PIL import Image

    small = Image.fromarray(picture).resize((SIDE // 3, SIDE // 3), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)


def compress(picture: np.ndarray, donor: np.ndarray, mask: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    import numpy as np
    from PIL import Image

    plain = Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))
    return np.asarray(as_jpeg(plain, int(chance.integers(5, 21))), np.float32)


MANIPULATIONS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "splice": splice,
    "warp": warp,
    "resample": resample,
    "compress": compress,
}
"""What is put in the place of the ellipse, from the picture, another one, the ellipse and chance: all [side, side] in 0 … 255."""
