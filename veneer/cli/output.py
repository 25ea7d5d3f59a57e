"""What a command gives back: a table or a JSON document, and errors as sentences with exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from veneer.errors import BadFile, VeneerError, nearest

OK, BUG, USER, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; a fault of the library; a mistake the caller can mend; the machine (disk, memory, a missing package); Ctrl-C."""


def answer(action: Callable[[], Any], as_json: bool = False, debug: bool = False) -> int:
    """Runs a command's action and gives its exit code; prints the document under `--json`, errors as sentences."""
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            document = action()
        if as_json:
            write(document, out)
        out.flush()
        return OK
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return OK
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        return fail(error, out if as_json else None)


def fail(error: BaseException, out: TextIO | None = None) -> int:
    """Prints an error for people on stderr (and as a JSON document to `out`) and gives its exit code."""
    code, message = exit_code(error), sentence(error)
    print(message if code == INTERRUPTED else f"Error: {message}", file=sys.stderr)
    if out is not None:
        write({"error": {"kind": type(error).__name__, "message": message, "exit_code": code}}, out)
    return code


def exit_code(error: BaseException) -> int:
    """The stable exit code of an error."""
    if isinstance(error, VeneerError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ImportError | MemoryError) or _out_of_memory(error):
        return MACHINE
    if isinstance(error, OSError):
        return MACHINE if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO) else USER
    return BUG


def sentence(error: BaseException) -> str:
    """One to three lines on what was wrong, where, and what would work."""
    if isinstance(error, VeneerError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted."
    if isinstance(error, ModuleNotFoundError):
        return f"The package {error.name!r} is not installed. `veneer doctor` shows what is there and how to add the rest."
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return "Out of memory. A smaller --batch-size or --max-length needs less; `veneer doctor` shows what the machine has."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}.{_FILE_ADVICE.get(error.errno or 0, '')}"
    return (
        f"{type(error).__name__}: {_first_line(error)}\n"
        f"This is a fault in veneer or below it; the traceback is in {_log(error)} (--debug shows it here)."
    )


_FILE_ADVICE = {
    errno.ENOENT: " Check the path.",
    errno.EACCES: " Choose a folder that can be written, or change its permissions.",
    errno.EROFS: " Choose a folder that can be written.",
    errno.ENOSPC: " Free some space or choose another folder; what was saved before is intact.",
}


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _log(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    handle, path = tempfile.mkstemp(prefix="veneer-error-", suffix=".log", text=True)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def write(document: Any, out: TextIO) -> None:
    """One JSON document; numbers that JSON has no word for become null."""
    print(json.dumps(plain(document), ensure_ascii=False, indent=2), file=out)


def plain(value: Any) -> Any:
    """Dictionaries, lists, strings and finite numbers from dataclasses, paths and tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a numpy number
        return plain(value.item())
    return str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    """Prints columns under a header, as wide as needed; the last column is cut at the terminal's width.

    Args:
        right: indices of columns that are set flush right (numbers).
    """
    cells = [[str(c) for c in header], *([("" if c is None else str(c)) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    limit = shutil.get_terminal_size((120, 40)).columns if sys.stdout.isatty() else None
    for n, row in enumerate(cells):
        line = "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        print(line if limit is None or len(line) <= limit else line[: limit - 1] + "…")
        if n == 0:
            print("  ".join("─" * w for w in widths)[:limit])


def existing(path: Path, what: str) -> Path:
    """The path, if it is there. Raises `BadFile` with the nearest names in the same folder."""
    if path.exists():
        return path
    if path.parent.is_dir():
        near = nearest(path.name, (p.name for p in path.parent.iterdir()))
        raise BadFile(f"{what} {str(path)!r} does not exist.{near or ' Check the path.'}")
    raise BadFile(f"{what} {str(path)!r} does not exist: there is no folder {str(path.parent)!r}.")


def version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("veneer")
    except PackageNotFoundError:
        return "(not installed: run from its source)"
