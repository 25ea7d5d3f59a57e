"""Files of points and meshes: every form gives the same points, and what is wrong is told with its place."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import BadFile
from veneer.tasks.point_files import check_points, on_surface, parse_obj, read_points, unit_ball

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ply(order: str, corners: np.ndarray, faces: list[list[int]]) -> bytes:
    head = (
        f"ply\nformat {order} 1.0\ncomment made here\nelement vertex {len(corners)}\nproperty float x\nproperty float y\nproperty float z\n"
    )
    head += f"property uchar red\nelement face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    if order == "ascii":
        rows = [" ".join(map(str, c)) + " 7" for c in corners] + [" ".join(map(str, [len(f), *f])) for f in faces]
        return (head + "\n".join(rows) + "\n").encode()
    mark = "<" if "little" in order else ">"
    body = b"".join(struct.pack(f"{mark}fffB", *c, 7) for c in corners)
    return head.encode() + body + b"".join(struct.pack(f"{mark}B{len(f)}i", len(f), *f) for f in faces)


@given(st.integers(4, 40), st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_points_come_back_from_every_kind_of_file(n: int, seed: int) -> None:
    import tempfile

    cloud = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "a.npy", np.concatenate([cloud, np.ones_like(cloud)], 1))
        write(folder / "a.xyz", f"{n}\n# x y z\n" + "\n".join(" ".join(f"{v:.9g}" for v in row) for row in cloud))
        write(folder / "a.obj", "\n".join("v " + " ".join(f"{v:.9g}" for v in row) for row in cloud))
        for order in ("ascii", "binary_little_endian", "binary_big_endian"):
            write(folder / f"{order}.ply", ply(order, cloud, []))
        for file in sorted(folder.iterdir()):
            found = read_points(file, 2048)
            assert np.allclose(sorted(map(tuple, found.tolist())), sorted(map(tuple, cloud.tolist())), atol=1e-6), file.name
            assert len(read_points(file, 3)) == 3


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_meshes_give_points_on_their_surface(order: str, tmp_path: Path) -> None:
    corners = np.array([[0, 0, 0], [4, 0, 0], [4, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    faces = [[0, 1, 2, 3], [0, 1, 4]]
    obj = write(tmp_path / "a.obj", "\n".join("v " + " ".join(map(str, c)) for c in corners) + "\nf 1/1/1 2/2 3 4\nf -5 -4 -1\n")
    for file in (write(tmp_path / "a.ply", ply(order, corners, faces)), obj):
        found = read_points(file, 6000)
        assert len(found) == 6000 and np.array_equal(found, read_points(file, 6000))
        flat, upright = np.abs(found[:, 2]) < 1e-6, np.abs(found[:, 1]) < 1e-6
        assert (flat | upright).all()
        assert abs(float(flat.mean()) - 4 / 6) < 0.05  # areas 4 and 2
        inside = found[~flat]
        assert (inside[:, 0] / 4 + inside[:, 2] <= 1 + 1e-5).all()


def test_clouds_are_centred_and_reach_the_unit_sphere() -> None:
    ball = unit_ball(np.random.default_rng(0).normal(5, 3, (50, 3)))
    assert np.allclose(ball.mean(0), 0, atol=1e-6) and np.linalg.norm(ball, axis=1).max() == pytest.approx(1)


WRONG: list[tuple[str, str | bytes, list[str]]] = [
    ("two.xyz", "1 2\n3 4\n", ["two.xyz, line 1", "2 columns", "3 or more"]),
    ("ragged.xyz", "1 2 3\n3 4 5 6\n", ["ragged.xyz, line 2", "4 columns"]),
    ("words.xyz", "1 2 3\na b c\n", ["words.xyz, line 2", "'a b c'"]),
    ("nan.xyz", "1 2 3\nnan 4 5\n", ["nan.xyz", "point", "of 2", "finite"]),
    ("empty.xyz", "", ["empty.xyz", "0 points"]),
    ("same.xyz", "1 2 3\n1 2 3\n", ["same.xyz", "all in one place"]),
    ("text.npy", b"no array", ["text.npy", "numpy.save"]),
    ("bad.obj", SQUARE + "f 1 2 x\n", ["bad.obj, line 5", "'f 1 2 x'"]),
    ("short.obj", "v 1 2\n", ["short.obj, line 1"]),
    ("far.obj", SQUARE + "f 1 2 9\n", ["far.obj", "corner 9", "4"]),
    ("thin.obj", SQUARE + "f 1 1 1\n", ["thin.obj", "no area"]),
    ("other.ply", b"solid stl", ["other.ply", "no PLY file"]),
    ("cut.ply", ply("binary_little_endian", np.ones((9, 3), np.float32), [])[:-5], ["cut.ply", "cut off"]),
    ("kind.ply", "ply\nformat ascii 2\nelement vertex 1\nproperty quaternion x\nend_header\n", ["kind.ply, line 4", "quaternion"]),
    ("flat.ply", "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n", ["flat.ply", "x, y, z"]),
    ("less.ply", "ply\nformat ascii 1.0\nelement vertex -2\n", ["less.ply", "end_header"]),
    ("minus.ply", "ply\nformat ascii 1.0\nelement vertex -2\nend_header\n", ["minus.ply, line 3", "vertex -2"]),
    ("cloud.las", "LASF", [".las", ".obj, .ply, .npy, .xyz"]),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_file_is_told_with_its_place(name: str, content: str | bytes, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadFile) as said:
        read_points(write(tmp_path / name, content), 100)
    assert all(word in str(said.value) for word in words), str(said.value)
    assert "\n" not in str(said.value) and len(str(said.value)) < 300 + len(str(tmp_path))


def test_arrays_of_other_shapes_or_objects_are_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros(5), np.zeros((4, 2)), np.array([["a"] * 3] * 4)):
        with pytest.raises(BadFile, match="rows of x, y, z"):
            check_points(wrong, "here")
    np.save(tmp_path / "evil.npy", np.array([{}] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(BadFile, match=r"evil\.npy"):
        read_points(tmp_path / "evil.npy", 10)
    with pytest.raises(BadFile, match="no file"):
        read_points(tmp_path / "none.npy", 10)


def test_faces_of_many_corners_are_cut_into_triangles() -> None:
    corners, faces = parse_obj(SQUARE + "f 1 2 3 4\n", "here")
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    found = on_surface(corners, faces, 500, np.random.default_rng(0), "here")
    assert (found >= 0).all() and (found <= 1).all() and (found[:, 2] == 0).all()
