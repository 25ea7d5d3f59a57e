"""Ctrl-C: asks a run to stop after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from veneer.errors import VeneerError


class Interrupted(VeneerError):
    """The run was stopped by the user; the message says what was saved and how to go on."""

    code = 130


class Interrupt:
    """Inside the `with` block, the first Ctrl-C sets `asked`; a second one, or one outside of training, stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.patient = False
        """True while a training loop looks at `asked` after every step."""
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.patient:
            raise KeyboardInterrupt
        self.asked = True
