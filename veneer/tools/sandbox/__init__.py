"""Runs generated code in a process of its own: no network, no files written, no other processes, little time and memory.

Linux only: a filter on system calls (seccomp) is laid over the process before the code begins, and cannot be taken off again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import Unsupported

CELL = Path(__file__).with_name("cell.py")
MACHINES = ("x86_64", "aarch64")
OUTPUT = 2000
"""Characters of what the code printed that are kept."""


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Args:
        status: "passed"; "failed" (an exception, or a call that is forbidden); "timeout"; "memory"; "killed".
        reason: the exception in one line, or what was exceeded.
        output: the end of what was printed.
        lines: executed lines of the part that is measured, and all of its lines that can be executed.
    """

    status: str
    reason: str = ""
    output: str = ""
    lines: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def coverage(self) -> float | None:
        """Share of the measured part's lines that were executed; None where there are none."""
        done, all_of_them = self.lines
        return len(done & all_of_them) / len(all_of_them) if all_of_them else None


def available() -> bool:
    """Whether generated code can be run here."""
    return sys.platform == "linux" and platform.machine() in MACHINES


def run(program: str, *, measured: str = "", seconds: float = 5.0, megabytes: int = 512) -> Ran:
    """Runs Python source to its end; never raises for what the program does.

    Args:
        measured: source that is run first and whose executed lines are counted, such as the function under test.
        seconds: of time on the clock and, rounded up, of the processor. megabytes: of memory beside the interpreter's own.

    Raises:
        Unsupported: not Linux on x86-64 or ARM64.
    """
    if not available():
        raise Unsupported(
            f"Generated code is run only on Linux ({', '.join(MACHINES)}), where it can be locked in; this is {sys.platform} "
            f"{platform.machine()}. Leave execution out: execute=false."
        )
    token = secrets.token_hex(8)
    order = {"token": token, "measured": measured, "program": program, "seconds": seconds, "megabytes": megabytes}
    with tempfile.TemporaryDirectory(prefix="veneer-cell-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CELL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(order).encode(), timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            out = b""
        finally:
            timed_out = process.poll() is None
            _end(process)
    if timed_out:
        return Ran("timeout", f"it ran longer than {seconds:g} s")
    return _read(out, token, process.returncode, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and all that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _read(out: bytes, token: str, code: int, seconds: float) -> Ran:
    for line in reversed(out.decode("utf-8", "replace").splitlines()):
        if line.startswith(token):
            said = json.loads(line.removeprefix(token))
            lines = frozenset(said["done"]), frozenset(said["lines"])
            return Ran(said["status"], said["reason"], said["output"][-OUTPUT:], lines)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Ran("timeout", f"it used more than {seconds:g} s of the processor")
    return Ran("killed", f"it ended by itself with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
