"""Sound files as samples: read by soundfile, mixed to one channel, brought to the rate a model hears."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, BadValue, MissingExtra

if TYPE_CHECKING:
    import numpy as np


def sound_extra(module: str) -> Any:
    """One of the packages of the extra `speech`. Raises `MissingExtra` with the install line if it is not there."""
    import importlib

    try:
        return importlib.import_module(module)
    except (ModuleNotFoundError, OSError):  # OSError: soundfile without its C library
        raise MissingExtra(f"Sound needs the package {module.partition('.')[0]!r}. Run: pip install 'veneer[speech]'") from None


def seconds(source: Any) -> float:
    """Length of a sound file, from its header. Raises `BadFile` if it is missing, no sound, or empty."""
    soundfile = sound_extra("soundfile")
    try:
        found = soundfile.info(_opened(source))
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise _unreadable(source, error) from None
    if not found.frames:
        raise BadFile(f"{_name(source)} holds no sound: its length is 0.")
    return found.frames / found.samplerate


def samples(source: Any, rate: int) -> np.ndarray:
    """Samples [n], float32 in ±1, of a sound file at `rate` per second; several channels become their mean.

    `source` is a file, or `{"bytes": …, "path": …}` as the datasets library holds sounds. Raises `BadFile` if it cannot be read.
    """
    import math

    soundfile, signal = sound_extra("soundfile"), sound_extra("scipy.signal")
    try:
        found, own = soundfile.read(_opened(source), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise _unreadable(source, error) from None
    if not len(found):
        raise BadFile(f"{_name(source)} holds no sound: its length is 0.")
    mono, common = found.mean(1), math.gcd(own, rate)
    return mono if own == rate else signal.resample_poly(mono, rate // common, own // common).astype("float32")


def _opened(source: Any) -> Any:
    if isinstance(source, dict):
        return io.BytesIO(source["bytes"]) if source.get("bytes") else str(source.get("path"))
    return str(source)


def _name(source: Any) -> str:
    return str(source.get("path") or "the sound") if isinstance(source, dict) else str(source)


def _unreadable(source: Any, error: Exception) -> BadFile:
    file = _name(source)
    if not (isinstance(source, dict) and source.get("bytes")) and not Path(file).is_file():
        return BadFile(f"There is no sound file {file}.")
    return BadFile(f"{file} cannot be read as sound ({str(error).strip().splitlines()[0]}). WAV, FLAC, OGG and MP3 files can.")


def too_long(place: str, length: float, limit: str) -> BadValue:
    """The error for a clip of more than so many seconds."""
    return BadValue(f"{place}: the clip is {length:.1f} s long, more than {limit}. Cut it, or leave the row out.")


def beside(source: Any, table: str) -> Any:
    """A relative path that is not found from here is looked for beside the table that names it."""
    if not isinstance(source, str) or Path(source).is_file():
        return source
    near = Path(table).parent / source
    return str(near) if near.is_file() else source
