"""Instrument notes that arrive inside an ordinary package: the samples of a General MIDI sound font."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.assets import _CARRIERS, INSTALL, _first_existing, _verify
from veneer.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

NOTES = "instrument-notes"
NOTES_SHA = "c5378b62028c920cb11e4803327983fee2f2cdff5dc89c708e39da417e51c854"
SOUND_FONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")

INSTALL[NOTES] = "apt-get install timgm6mb-soundfont"


@dataclass(frozen=True)
class Note:
    """One recorded note: its instrument's name in the file, samples int16 [n], samples per second, and MIDI pitch."""

    name: str
    samples: np.ndarray
    rate: int
    pitch: int


@lru_cache(maxsize=1)
def instrument_notes() -> tuple[Note, ...]:
    """520 notes of a General MIDI sound font, 12 to 44 kHz, most shorter than a second.

    Licence: GPL-2 (Tim Brechbill's TimGM6mb, Debian's timgm6mb-soundfont).
    """
    file = _notes_source()
    _verify(file, NOTES_SHA, NOTES)
    return tuple(read_sound_font(file))


def read_sound_font(path: Path) -> list[Note]:
    """The samples of a SoundFont 2 file. Raises `BadFile` if it is none, or ends early."""
    import numpy as np

    raw = path.read_bytes()
    try:
        chunks = _chunks(raw)
        (wave, _), (heads, size) = chunks[b"smpl"], chunks[b"shdr"]
        found = []
        for at in range(heads, heads + size - 46, 46):  # the last header only ends the list
            name, start, end, _, _, rate, pitch = struct.unpack_from("<20sIIIIIB", raw, at)
            if end > start:
                label = name.split(b"\0")[0].decode("latin1").strip()
                found.append(Note(label, np.frombuffer(raw, "<i2", end - start, wave + 2 * start), rate, pitch))
    except (struct.error, KeyError, ValueError):
        raise BadFile(f"{path} cannot be read as a SoundFont 2 file.") from None
    return found


def _chunks(raw: bytes) -> dict[bytes, tuple[int, int]]:
    """Where the chunks inside a RIFF file's lists begin, and their sizes."""
    found, at = {}, 12
    while at < len(raw) - 8:
        size = struct.unpack_from("<I", raw, at + 4)[0]
        if raw[at : at + 4] == b"LIST":
            inner = at + 12
            while inner < at + 8 + size:
                length = struct.unpack_from("<I", raw, inner + 4)[0]
                found[raw[inner : inner + 4]] = (inner + 8, length)
                inner += 8 + length + length % 2
        at += 8 + size + size % 2
    return found


def _notes_source() -> Path:
    return _first_existing(NOTES, [SOUND_FONT])


_CARRIERS[NOTES] = _notes_source
