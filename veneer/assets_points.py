"""Furniture as point clouds, and the small Point-MAE that was pre-trained on it: the carriers of the point-cloud recipe.

The model lies in this package (`veneer/models/point_mae_furniture`). The meshes are a Debian package's; points are drawn on
their surfaces once, into the cache folder.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.assets import _CARRIERS, INSTALL, MODELS, _first_existing, _verify, cache_folder
from veneer.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

FURNITURE_SHA = {
    "BlendSwap-CC-0.sh3f": "7ef093fe70cedbb160bdb532d86a84580459635e34130c16777f549eba1993dc",
    "BlendSwap-CC-BY.sh3f": "29ae78937b4d5dbe93db74067817a984fa411f017b007fd666bc40368bdb0c83",
    "KatorLegaz.sh3f": "f512443b5d3a6903497573095f971f44334b3165ab32182133051fa9487764a6",
    "Reallusion.sh3f": "dd553207876ccec6372dde7aaea6b2dcf2d631997fcdb8a9856a639e0db9aa9b",
    "Scopia.sh3f": "b4505451b1e8ab339c101c0afddfef4e1a07b95aa8c821c61ec41487afd43850",
}
FURNITURE_FOLDER = Path("/usr/share/sweethome3d/furniture")
CLOUD = 2048
"""Points that are kept of a mesh."""
ENTRY = re.compile(r"(\w+)#(\d+)\s*=\s*(.*)")
POINT_MAE = Path(__file__).parent / "models" / "point_mae_furniture"


def point_mae_dir() -> Path:
    """A Point-MAE of 6 blocks of width 128 (1.3 M parameters), pre-trained on the furniture that is not tested on.

    Made by `python -m veneer.models.point_mae_pretraining`; licence: that of this library. Source: Pang et al. 2022
    (arXiv:2203.06604).
    """
    return POINT_MAE


@lru_cache(maxsize=1)
def furniture() -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Points [820, 2048, 3] on the surfaces of 820 furniture meshes, float32; their 12 categories; their names.

    Licences: CC-BY 3.0 (Scopia, Andrew Kator and Jennifer Legaz, Reallusion, BlendSwap's contributors) and CC0 (Emmanuel
    Puybaret and others), as the Debian package sweethome3d-furniture says mesh by mesh.
    """
    from safetensors import SafetensorError, safe_open

    file = cache_folder() / "furniture" / "points.safetensors"
    if not file.is_file():
        _convert(file)
    try:
        with safe_open(str(file), "numpy") as opened:
            about = json.loads(opened.metadata()["about"])
            return opened.get_tensor("points"), tuple(about["categories"]), tuple(about["names"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise BadFile(f"{file} is damaged. Remove it; it is made again from the meshes.") from None


def furniture_parts() -> dict[str, list[dict[str, Any]]]:
    """The furniture's rows by split: of every category 30 % for the test and 10 % for validation, always the same ones."""
    from veneer.tasks.point_files import SEED

    points, categories, names = furniture()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for category in sorted(set(categories)):
        members = [i for i, own in enumerate(categories) if own == category]
        random.Random(SEED).shuffle(members)
        test, validation = max(1, round(0.3 * len(members))), round(0.1 * len(members))
        for place, i in enumerate(members):
            part = "test" if place < test else "validation" if place < test + validation else "train"
            parts[part].append({"points": points[i], "label": category, "name": names[i]})
    return parts


def _source() -> Path:
    return _first_existing("furniture", [cache_folder() / "furniture-meshes", FURNITURE_FOLDER])


def _convert(file: Path) -> None:
    """Draws the points of all meshes into one file, whole or not at all."""
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from veneer.store import write_tensors
    from veneer.tasks.point_files import SEED, check_points, on_surface, parse_obj

    root = _source()
    for name, digest in FURNITURE_SHA.items():
        _verify(root / name, digest, "furniture")
    chance, clouds, categories, names = np.random.default_rng(SEED), [], [], []
    with tqdm(total=820, desc="furniture meshes", unit="mesh", dynamic_ncols=True) as bar:
        for pack in FURNITURE_SHA:
            with zipfile.ZipFile(root / pack) as archive:
                for piece in _catalogue(archive.read("PluginFurnitureCatalog.properties").decode("latin1")):
                    inside = piece["model"].lstrip("/")
                    corners, faces = parse_obj(archive.read(inside).decode("latin1"), f"{pack}/{inside}")
                    clouds.append(on_surface(check_points(corners, inside), faces, CLOUD, chance, inside))
                    categories.append(piece["category"])
                    names.append(piece["name"])
                    bar.update()
    about = json.dumps({"categories": categories, "names": names})
    write_tensors(file, {"points": torch.from_numpy(np.stack(clouds))}, {"about": about})


def _catalogue(text: str) -> list[dict[str, Any]]:
    """The entries of a catalogue, in its order."""
    found: dict[str, dict[str, Any]] = {}
    for key, number, value in ENTRY.findall(text):
        found.setdefault(number, {})[key] = value.strip()
    return list(found.values())


INSTALL["furniture"] = "apt-get install sweethome3d-furniture"
MODELS["point-mae"] = point_mae_dir
_CARRIERS |= {"furniture": _source, "point-mae": point_mae_dir}
