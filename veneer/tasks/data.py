"""Reads data: CSV, JSONL and text files, folders of them, folders of images, `datasets` names. Needs neither torch nor numpy.

Every complaint names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadValue, MissingExtra, UnknownName, nearest

Row = dict[str, Any]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Names under which the three splits are looked for."""

LISTS = ("metadata", "captions")
"""Names of a table about the pictures of its folder."""
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLIT_SEED = 20241
"""Data without a split is always split in the same way, whatever the seed of training, so that runs can be compared."""


@dataclass
class Table:
    """Rows with the place each came from.

    Args:
        rows: one mapping an example.
        source: file or split, for messages.
        lines: line number of each row; empty where rows have none.
    """

    rows: list[Row]
    source: str
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def place(self, index: int) -> str:
        """Where a row stands: "reviews.csv, line 12"."""
        return f"{self.source}, line {self.lines[index]}" if self.lines else f"{self.source}, row {index + 1}"

    def pick(self, indices: Sequence[int], source: str = "") -> Table:
        """The rows at these indices, in this order."""
        return Table([self.rows[i] for i in indices], source or self.source, [self.lines[i] for i in indices] if self.lines else ())


@dataclass
class Data:
    """A data set as read: one table, or one for each split that there is.

    Args:
        source: what the user named.
        tables: by split name; the single table of unsplit data is called "train".
        images: whether the column `image` holds pictures.
        hints: task and columns that are known and need not be guessed.
        facts: what else the data say of themselves and the task has to know, as JSON values.
    """

    source: str
    tables: dict[str, Table]
    images: bool = False
    hints: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> Table:
        return self.tables["train"]


@dataclass
class Splits:
    """The three parts every task works on. `note` says how they came about."""

    train: Table
    validation: Table
    test: Table
    note: str = ""

    def items(self) -> Iterator[tuple[str, Table]]:
        yield from (("train", self.train), ("validation", self.validation), ("test", self.test))


def read(source: str) -> Data:
    """Reads what `source` names: a built-in data set, a file, a folder, or a name for the `datasets` library.

    Raises:
        BadFile: missing, empty, of an unknown kind, badly encoded, or with a line that cannot be read.
        UnknownName: neither a path nor a data set, with the nearest names.
    """
    from veneer.tasks.builtin import BUILTIN

    if source in BUILTIN:
        return BUILTIN[source]()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source)
    if path.is_file():
        return Data(source, {"train": read_table(path)})
    if path.suffix.lower() in (*TABLES, *IMAGES) or source.startswith((".", "/", "~")):
        raise BadFile(f"There is no file {source}.{_neighbours(path)}")
    close = nearest(source, BUILTIN) if "/" not in source else ""
    if close or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UnknownName(f"There is no data set {source!r}, nor a file of that name.{close} Built in are: {', '.join(BUILTIN)}.")
    return _from_datasets(source)


def read_table(path: Path) -> Table:
    """One file as a table. Raises `BadFile` with file and line for anything that cannot be read."""
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise BadFile(f"{path}: files of kind {kind or 'without a suffix'!r} are not read. Use one of {', '.join(TABLES)}.")
    text = _decode(path)
    if kind in (".csv", ".tsv"):
        table = _csv(text, path)
    elif kind == ".txt":
        kept = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        table = Table([{"text": line} for _, line in kept], str(path), [i for i, _ in kept])
    elif kind == ".json":
        table = _json(text, path)
    else:
        table = _jsonl(text, path)
    if not table.rows:
        raise BadFile(f"{path} holds no rows.")
    return _with_pictures(table, path.parent)


def _with_pictures(table: Table, folder: Path) -> Table:
    """Names of picture files, in a column `image`, `file_name` or `img_paths`, as paths: they count from the table's folder."""
    named = next((name for name in ("image", "file_name", "img_paths") if name in table.columns), "")
    for row in table.rows:
        value = row.get(named)
        if isinstance(value, str) and value.lower().endswith(IMAGES):
            row["image"] = str(folder / row.pop(named))
    return table


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadFile(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8 and try again.") from None


def _csv(text: str, path: Path) -> Table:
    header = text.split("\n", 1)[0]
    mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows: list[Row] = []
    lines: list[int] = []
    names: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not names:
                names = [name.strip() for name in fields]
                _check_header(names, path)
            elif fields:
                if len(fields) != len(names):
                    raise BadFile(f"{path}, line {start}: {len(fields)} fields, but the header has {len(names)} ({', '.join(names)}).")
                rows.append(dict(zip(names, fields)))
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadFile(f"{path}, line {reader.line_num}: {error}.") from None
    return Table(rows, str(path), lines)


def _check_header(names: list[str], path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise BadFile(f"{path}, line 1: the column {sorted(twice)[0]!r} stands there twice.")


def _jsonl(text: str, path: Path) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadFile(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise BadFile(f'{path}, line {number}: each line must be an object such as {{"text": "…", "label": "…"}}.')
        rows.append(row)
        lines.append(number)
    return Table(rows, str(path), lines)


def _json(text: str, path: Path) -> Table:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise BadFile(f"{path}: not JSON ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadFile(f"{path}: a .json file must hold one list of objects.")
    return Table(rows, str(path))


# -- folders ----------------------------------------------------------------------------------------------------


def _folder(path: Path, source: str) -> Data:
    from veneer.tasks.mask_folder import holds_masks, mask_folder
    from veneer.tasks.point_folder import holds_points, point_folder
    from veneer.tasks.series import holds_series, series_folder

    listed = next((path / f"{word}{kind}" for word in LISTS for kind in TABLES if (path / f"{word}{kind}").is_file()), None)
    if listed is None and holds_masks(path):
        return mask_folder(path, source)
    if holds_series(path):
        return series_folder(path, source)
    if holds_points(path):
        return point_folder(path, source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_datasets(source)
    files = {name: _split_file(path, name) for name in SPLITS}
    if files["train"]:
        return Data(source, {name: read_table(file) for name, file in files.items() if file})
    if listed:
        return Data(source, _parted(read_table(listed)))
    folders = {name: next((path / word for word in words if (path / word).is_dir()), None) for name, words in SPLITS.items()}
    if _sounds(folders["train"] or path):
        places = {name: found for name, found in folders.items() if found} if folders["train"] else {"train": path}
        return Data(source, {name: _spoken_folder(place) for name, place in places.items()})
    if folders["train"]:
        return Data(source, {name: _image_folder(found) for name, found in folders.items() if found}, images=True)
    return Data(source, {"train": _image_folder(path)}, images=True)


def _split_file(path: Path, name: str) -> Path | None:
    found = [path / f"{word}{kind}" for word in SPLITS[name] for kind in TABLES if (path / f"{word}{kind}").is_file()]
    if len(found) > 1:
        raise BadFile(f"{path} holds both {found[0].name} and {found[1].name}; keep one of them.")
    return found[0] if found else None


def _parted(table: Table) -> dict[str, Table]:
    """The tables that a column `split` parts a list of pictures into; the whole of it where there is no such column."""
    if "split" not in table.columns:
        return {"train": table}
    parts: dict[str, list[int]] = {}
    for i, row in enumerate(table.rows):
        name = next((name for name, words in SPLITS.items() if str(row["split"]).lower() in words), None)
        if name is None:
            raise BadFile(f"{table.place(i)}: split={row['split']!r} is none of {', '.join(SPLITS)}.")
        parts.setdefault(name, []).append(i)
    if "train" not in parts:
        raise BadFile(f"{table.source}: no row has split=train; there are {', '.join(parts)}.")
    return {name: table.pick(rows) for name, rows in parts.items()}


def _image_folder(path: Path) -> Table:
    rows = [
        {"image": str(file), "label": folder.name}
        for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    rows = rows or [{"image": str(file)} for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGES]  # of one subject
    if not rows:
        raise BadFile(f"{path} holds neither train{'/'.join(TABLES[:3])} nor one folder of images for each class.")
    return Table(rows, str(path))


def _sounds(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in SOUND_FILES)


def _spoken_folder(path: Path) -> Table:
    """Sound files with a text file of the same name beside each."""
    rows = []
    for file in _sounds(path):
        script = file.with_suffix(".txt")
        if not script.is_file():
            raise BadFile(f"{file} has no transcript: there is no {script.name} beside it.")
        rows.append({"audio": str(file), "text": " ".join(_decode(script).split())})
    if not rows:
        raise BadFile(f"{path} holds no sound files ({', '.join(SOUND_FILES)}).")
    return Table(rows, str(path))


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    return nearest(path.name, [p.name for p in path.parent.iterdir()])


# -- the datasets library ---------------------------------------------------------------------------------------


def _from_datasets(source: str) -> Data:
    """A data set of the `datasets` library, by name, as name:configuration, or saved in a folder."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtra(f"{source!r} is read by the library `datasets`. Run: pip install 'veneer[data]'") from None
    try:
        if Path(source).is_dir():
            loaded: Any = datasets.load_from_disk(source)
        else:
            name, _, configuration = source.partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library raises many kinds: no network, no such name, a broken file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise BadFile(f"The data set {source!r} cannot be loaded: {reason}") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    tables = {}
    for name, words in SPLITS.items():
        found = next((parts[word] for word in words if word in parts), None)
        if found is not None:
            tables[name] = Table(_named_classes(found), f"{source}[{name}]")
    if "train" not in tables:
        raise BadFile(f"{source!r} has no training split; it has: {', '.join(parts)}.")
    images = any(type(kind).__name__ == "Image" for kind in parts[next(iter(parts))].features.values())
    return Data(source, tables, images=images)


def _named_classes(dataset: Any) -> list[Row]:
    """The rows, with class numbers turned into class names and the picture column called `image`."""
    names = {column: kind.names for column, kind in dataset.features.items() if type(kind).__name__ == "ClassLabel"}
    picture = next((column for column, kind in dataset.features.items() if type(kind).__name__ == "Image"), None)
    for column, kind in dataset.features.items():
        if type(kind).__name__ == "Audio":  # as bytes: the library's own decoder is a large package
            dataset = dataset.cast_column(column, type(kind)(decode=False))
    rows = []
    for row in dataset:
        named = {c: names[c][v] if c in names and isinstance(v, int) and v >= 0 else v for c, v in row.items()}
        if picture and picture != "image":
            named["image"] = named.pop(picture)
        rows.append(named)
    return rows


# -- splitting --------------------------------------------------------------------------------------------------


def split(data: Data, key: str, limits: tuple[int | None, int | None, int | None] = (None, None, None)) -> Splits:
    """Train, validation and test, always disjoint, always the same for the same data.

    What the data lacks is cut from its training rows: 10 % for validation, 10 % for test, rows with equal `key` column
    kept together. Data with a validation but no test split is tested on its validation split. `limits` caps the sizes.

    Raises `BadFile` for an empty split.
    """
    tables = dict(data.tables)
    notes = []
    if "test" not in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")
        notes.append("tested on the data's validation split")
    wanted = [name for name in ("test", "validation") if name not in tables]
    if wanted:
        train, *parts = _cut(tables["train"], key, len(wanted))
        tables["train"] = train
        tables.update(zip(wanted, parts))
        notes.append(f"{' and '.join(wanted)} cut from the training rows, 10 % each, always the same ones")
    for name, table in tables.items():
        if not table.rows:
            raise BadFile(f"{data.source}: the {name} split is empty. Give at least 10 rows, or a folder with train, validation and test.")
    train, validation, test = (_cap(tables[name], limit) for name, limit in zip(("train", "validation", "test"), limits))
    return Splits(train, validation, test, "; ".join(notes) or "the data's own splits")


def _cut(table: Table, key: str, parts: int) -> list[Table]:
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(str(row[key]) if key in row else str(i), []).append(i)
    order = list(groups.values())
    random.Random(SPLIT_SEED).shuffle(order)
    size = max(1, len(order) // 10)
    if len(order) <= parts * size:
        raise BadFile(f"{table.source}: {len(order)} different rows are too few to keep some aside for validation and test.")
    cuts = [order[parts * size :], *(order[k * size : (k + 1) * size] for k in range(parts))]
    return [table.pick([i for group in cut for i in group]) for cut in cuts]


def _cap(table: Table, limit: int | None) -> Table:
    if limit is None or limit >= len(table):
        return table
    return table.pick(sorted(random.Random(SPLIT_SEED).sample(range(len(table)), limit)))


# -- columns ----------------------------------------------------------------------------------------------------


def column(table: Table, name: str, flag: str) -> str:
    """Checks that a column is there; raises `BadValue` with the nearest ones and the flag that names another."""
    if name not in table.columns:
        have = ", ".join(table.columns)
        raise BadValue(f"{table.source} has no column {name!r}.{nearest(name, table.columns)} It has: {have}. Choose with {flag}.")
    return name
