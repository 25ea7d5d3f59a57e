"""What cameras and uploads do to a picture, drawn at random for training: the augmentations of arXiv:2503.19683."""

from __future__ import annotations

import io
import math
import random
from typing import TYPE_CHECKING, Any

from veneer.errors import MissingExtra

if TYPE_CHECKING:
    from PIL import Image

ANGLE, SHIFT, SCALE = 10.0, 0.1, (0.9, 1.1)
SIGMA, BRIGHTER, QUALITY = (0.1, 2.0), 0.1, (40, 100)
KERNEL = (3, 7)
"""Pixels of the blur's window, across and down."""
INSTALL = "pip install 'veneer[forensics]'"


def disturbed(picture: Image.Image, chance: random.Random | None = None) -> Image.Image:
    """Mirrored by half, turned by up to 10°, shifted by up to a tenth, scaled, blurred, brightened, with other contrast, and saved
    as JPEG of quality 40 to 100; same size, three channels. `chance` is Python's own unless given."""
    from PIL import Image, ImageEnhance, ImageOps

    draw: Any = chance or random
    if draw.random() < 0.5:
        picture = ImageOps.mirror(picture)
    width, height = picture.size
    turn, scale = math.radians(draw.uniform(-ANGLE, ANGLE)), draw.uniform(*SCALE)
    across, down = draw.uniform(-SHIFT, SHIFT) * width, draw.uniform(-SHIFT, SHIFT) * height
    cos, sin, x, y = math.cos(turn) / scale, math.sin(turn) / scale, width / 2, height / 2
    back = (cos, sin, x - cos * (x + across) - sin * (y + down), -sin, cos, y + sin * (x + across) - cos * (y + down))
    picture = picture.transform(picture.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    picture = blurred(picture, draw.uniform(*SIGMA))
    picture = ImageEnhance.Brightness(picture).enhance(draw.uniform(1 - BRIGHTER, 1 + BRIGHTER))
    picture = ImageEnhance.Contrast(picture).enhance(draw.uniform(1 - BRIGHTER, 1 + BRIGHTER))
    return as_jpeg(picture, draw.randint(*QUALITY))


def blurred(picture: Image.Image, sigma: float) -> Image.Image:
    """Convolved with a Gaussian of `sigma` pixels, cut to a window of `KERNEL`."""
    import numpy as np
    from PIL import Image

    try:
        from scipy.ndimage import correlate1d
    except ModuleNotFoundError:
        raise MissingExtra(f"Blurring pictures needs the package scipy. Run: {INSTALL}") from None
    values = np.asarray(picture, np.float32)
    for axis, size in zip((1, 0), KERNEL):
        window = np.exp(-0.5 * (np.arange(size) - size // 2) ** 2 / sigma**2)
        values = correlate1d(values, window / window.sum(), axis, mode="mirror")
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """What is left of a picture saved as JPEG."""
    from PIL import Image

    held = io.BytesIO()
    picture.save(held, "JPEG", quality=quality)
    with Image.open(held) as again:
        return again.convert(picture.mode)
