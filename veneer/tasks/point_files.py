"""Point clouds from files: .obj and .ply meshes (points are drawn on their surfaces), .ply, .npy and .xyz points. No torch.

Every complaint names the file, and the line where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from veneer.errors import BadFile
from veneer.tasks.ply import read_ply
from veneer.tasks.point_folder import POINTS

SEED = 20243
"""A file gives the same points every time."""


def read_points(path: Path, most: int) -> np.ndarray:
    """At most that many points [n, 3] of a file, in a random order that is always the same; meshes give exactly that many.

    Further columns (normals, colours) are left out. Raises `BadFile` for files that cannot be read, and points that are none.
    """
    if not path.is_file():
        raise BadFile(f"There is no file {path}.")
    kind, faces = path.suffix.lower(), np.zeros((0, 3), int)
    if kind == ".obj":
        points, faces = parse_obj(path.read_text("latin1"), str(path))
    elif kind == ".ply":
        points, faces = read_ply(path)
    elif kind == ".npy":
        points = _npy(path)
    elif kind == ".xyz":
        points = _xyz(path)
    else:
        raise BadFile(f"{path}: point clouds of kind {kind or 'without a suffix'!r} are not read. Use one of {', '.join(POINTS)}.")
    checked = check_points(points, str(path))
    chance = np.random.default_rng(SEED)
    if len(faces):
        return on_surface(checked, faces, most, chance, str(path))
    return checked[chance.permutation(len(checked))[:most]]


def check_points(points: np.ndarray, where: str) -> np.ndarray:
    """Points as float32 [n, 3]. Raises `BadFile` for another shape, numbers that are not finite, or points all in one place."""
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
        raise BadFile(
            f"{where}: expected numbers in rows of x, y, z, found {points.dtype} of shape {tuple(points.shape)}. Store one point a row."
        )
    found = points[:, :3].astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(found).all(1))
    if len(wrong):
        raise BadFile(
            f"{where}: point {int(wrong[0]) + 1} of {len(found)} is {found[wrong[0]].tolist()}, not three finite numbers. Leave it out."
        )
    if len(found) == 0 or bool((found == found[0]).all()):
        raise BadFile(f"{where}: {len(found)} points, all in one place, are no shape. Give the points of a surface.")
    return found


def on_surface(points: np.ndarray, faces: np.ndarray, count: int, chance: np.random.Generator, where: str) -> np.ndarray:
    """Points [count, 3] drawn evenly on the triangles [faces, 3] over these corners [n, 3]."""
    if faces.min() < 0 or faces.max() >= len(points):
        raise BadFile(f"{where}: a face names corner {int(faces.max()) + 1}, and there are {len(points)}. Export the mesh again.")
    a, b, c = points[faces.T].astype(np.float64)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        raise BadFile(f"{where}: its {len(faces)} faces have no area. Export the mesh again, or give points as .xyz.")
    face = chance.choice(len(faces), count, p=area / area.sum())
    u, v = chance.random((2, count, 1))
    over = u + v > 1  # the half of the parallelogram that lies outside the triangle, folded back
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    return (a[face] + u * (b[face] - a[face]) + v * (c[face] - a[face])).astype(np.float32)


def unit_ball(points: np.ndarray) -> np.ndarray:
    """Points [n, 3] centred at their mean and scaled so that the farthest lies at distance 1."""
    centred = points - points.mean(0)
    return (centred / (np.linalg.norm(centred, axis=1).max() or 1)).astype(np.float32)


def parse_obj(text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners [n, 3] and triangles [faces, 3] of a Wavefront OBJ; faces of more corners are cut into triangles."""
    corners: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        kind, _, rest = line.partition(" ")
        try:
            if kind == "v":
                x, y, z = rest.split()[:3]
                corners.append([float(x), float(y), float(z)])
            elif kind == "f":
                named = [int(word.split("/")[0]) for word in rest.split()]
                own = [i - 1 if i > 0 else len(corners) + i for i in named]
                faces += triangles(own)
        except ValueError:
            raise BadFile(
                f"{where}, line {number}: {line.strip()[:60]!r} is no corner or face of an OBJ file. Export the mesh again."
            ) from None
    return np.array(corners, np.float64).reshape(-1, 3), np.array(faces, int).reshape(-1, 3)


def triangles(corners: Sequence[int]) -> list[tuple[int, int, int]]:
    """A face as triangles around its first corner."""
    return [(corners[0], corners[k], corners[k + 1]) for k in range(1, len(corners) - 1)]


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadFile(f"{path} cannot be read as an array of numbers ({str(error).splitlines()[0]}). Save it with numpy.save.") from None


def _xyz(path: Path) -> np.ndarray:
    rows: list[list[float]] = []
    for number, line in enumerate(path.read_text("latin1").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith(("#", "//")) or (len(words) == 1 and not rows):
            continue  # comments, and the count of points that some programs put first
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            raise BadFile(f"{path}, line {number}: {line.strip()[:60]!r} is not numbers. Give x y z in every line.") from None
        if len(rows[-1]) != len(rows[0]) or len(rows[-1]) < 3:
            raise BadFile(f"{path}, line {number}: {len(rows[-1])} columns where 3 or more, as many as in the lines before, are needed.")
    return np.array(rows, np.float64).reshape(len(rows), -1) if rows else np.zeros((0, 3))
