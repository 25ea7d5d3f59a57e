"""Pictures that are frames of videos, named in a column: which of them count, and that they count as one."""

from __future__ import annotations

from veneer.maths.face_alignment import frames
from veneer.tasks.data import Table

VIDEO = "video"
"""The column: a video's score is the mean of its frames', and a split does not tear it apart."""
FRAMES = 32
"""Frames of a video that count, evenly spread over those there are."""


def thin_out(table: Table) -> None:
    """Leaves `FRAMES` of every video in the table, where it names videos."""
    if VIDEO not in table.columns:
        return
    videos: dict[str, list[int]] = {}
    for i, row in enumerate(table.rows):
        videos.setdefault(str(row[VIDEO]), []).append(i)
    left = table.pick(sorted(numbers[k] for numbers in videos.values() for k in frames(len(numbers), FRAMES)))
    table.rows, table.lines = left.rows, left.lines
