"""PLY files: corners and faces of a mesh, or points, as text or in binary. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from veneer.errors import BadFile

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
MOST_HEADER = 100_000
"""Longest header that is looked at, in bytes."""


@dataclass
class Element:
    """One table of the file: rows of properties, each (name, type) or, for a list, (name, type of the length, type)."""

    name: str
    count: int
    properties: list[tuple[str, ...]] = field(default_factory=list)

    def dtype(self, order: str) -> np.dtype:
        return np.dtype([(p[0], order + TYPES[p[1]]) for p in self.properties])


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Corners or points [n, 3] and triangles [faces, 3]. Raises `BadFile` for files that are no PLY or are cut off."""
    raw = path.read_bytes()
    end = raw.find(b"end_header", 0, MOST_HEADER)
    if not raw.startswith(b"ply") or end < 0:
        raise BadFile(f"{path} is no PLY file: it must begin with the line 'ply' and have a line 'end_header'.")
    order, elements = _header(raw[:end].decode("latin1"), path)
    body = raw[raw.index(b"\n", end) + 1 :] if b"\n" in raw[end:] else b""
    try:
        return _text(body, elements, path) if not order else _binary(body, elements, order, path)
    except (ValueError, IndexError):
        raise BadFile(f"{path} is cut off or not what its header says. Export or copy it again.") from None


def _header(text: str, path: Path) -> tuple[str, list[Element]]:
    order, elements = "", list[Element]()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        try:
            if words[:1] == ["format"]:
                order = ORDERS[words[1]]
            elif words[:1] == ["element"]:
                elements.append(Element(words[1], int(words[2])))
                if elements[-1].count < 0:
                    raise ValueError
            elif words[:2] == ["property", "list"]:
                elements[-1].properties.append((words[4], words[2], words[3]))
            elif words[:1] == ["property"]:
                elements[-1].properties.append((words[2], words[1]))
            if words[:1] == ["property"] and any(kind not in TYPES for kind in elements[-1].properties[-1][1:]):
                raise KeyError
        except (KeyError, IndexError, ValueError):
            raise BadFile(f"{path}, line {number}: {line.strip()[:60]!r} is nothing a PLY header may say. Export it again.") from None
    corners = next((e for e in elements if e.name == "vertex"), None)
    if corners is None or not {"x", "y", "z"} <= {p[0] for p in corners.properties} or any(len(p) > 2 for p in corners.properties):
        raise BadFile(f"{path}: its header names no element 'vertex' with the properties x, y, z. Export it with coordinates.")
    return order, elements


def _text(body: bytes, elements: list[Element], path: Path) -> tuple[np.ndarray, np.ndarray]:
    lines = [line.split() for line in body.decode("latin1").splitlines() if line.strip()]
    at, points, faces = 0, np.zeros((0, 3)), list[tuple[int, int, int]]()
    for element in elements:
        rows = lines[at : at + element.count]
        if len(rows) < element.count:
            raise IndexError
        at += element.count
        if element.name == "vertex":
            names = [p[0] for p in element.properties]
            points = np.array([[float(row[names.index(axis)]) for axis in "xyz"] for row in rows]).reshape(-1, 3)
        elif element.name == "face" and len(element.properties[0]) == 3:
            for row in rows:
                faces += _cut([int(word) for word in row[1 : 1 + int(row[0])]], int(row[0]))
    return points, np.array(faces, int).reshape(-1, 3)


def _binary(body: bytes, elements: list[Element], order: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    at, points, faces = 0, np.zeros((0, 3)), list[tuple[int, int, int]]()
    for element in elements:
        if all(len(p) == 2 for p in element.properties):
            table = np.frombuffer(body, element.dtype(order), element.count, at)
            at += table.nbytes
            if element.name == "vertex":
                points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], 1)
            continue
        for _ in range(element.count):
            for name, *kinds in element.properties:
                count, kind = 1, np.dtype(order + TYPES[kinds[-1]])
                if len(kinds) == 2:
                    length = np.dtype(order + TYPES[kinds[0]])
                    count, at = int(np.frombuffer(body, length, 1, at)[0]), at + length.itemsize
                    if count < 0:
                        raise ValueError
                values, at = np.frombuffer(body, kind, count, at), at + count * kind.itemsize
                if element.name == "face" and name.startswith("vert"):
                    faces += _cut([int(v) for v in values], count)
    return points, np.array(faces, int).reshape(-1, 3)


def _cut(corners: list[int], count: int) -> list[tuple[int, int, int]]:
    """A face as triangles around its first corner."""
    if len(corners) != count:
        raise IndexError
    return [(corners[0], corners[k], corners[k + 1]) for k in range(1, count - 1)]
