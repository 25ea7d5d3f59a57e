"""Generated code is locked in: what hangs, forks, eats memory, calls home or writes files is ended and counted, and the next one runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from veneer.errors import Unsupported
from veneer.tools import sandbox
from veneer.tools.sandbox import run


def test_a_program_that_ends_well() -> None:
    found = run("assert sum(range(4)) == 6\nprint('done')")
    assert found.passed and found.output == "done\n" and found.coverage is None


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
        ("while True: pass", "timeout", "1 s"),
        ("import time; time.sleep(60)", "timeout", "1 s"),
        ("x = bytearray(10**10)", "memory", "MB"),
        ("x = []\nwhile True: x.append('y' * 10**6)", "memory", "MB"),
        ("import os; os.fork()", "failed", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "failed", "PermissionError"),
        ("import os; os.system('true') == 0 or 1/0", "failed", "ZeroDivisionError"),
        ("import socket; socket.socket()", "failed", "PermissionError"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "failed", "not permitted"),
        ("open('x', 'w')", "failed", "PermissionError"),
        ("import os; os.remove('/etc/hostname')", "failed", "PermissionError"),
        ("import os; os.rename('/etc/hostname', '/etc/x')", "failed", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "failed", "PermissionError"),
        ("import os; os.abort()", "killed", ""),
        ("import os; os._exit(0)", "killed", "exit code 0"),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "failed", "not allowed"),
        ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
    ],
)
def test_what_misbehaves_is_ended_and_said(program: str, status: str, reason: str) -> None:
    found = run(program, seconds=1 if status == "timeout" else 10)
    assert (found.status, reason in found.reason) == (status, True), found


def test_a_bomb_is_over_in_time_and_leaves_no_file(tmp_path: Path) -> None:
    start = time.monotonic()
    target = tmp_path / "left"
    found = run(
        f"import os\ntry:\n open({str(target)!r}, 'w')\nexcept OSError: pass\nwhile True:\n try: os.fork()\n except OSError: pass",
        seconds=1,
    )
    assert found.status == "timeout" and time.monotonic() - start < 10 and not target.exists()
    assert run("pass").passed


def test_threads_and_files_that_are_read_are_allowed() -> None:
    assert run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\nopen('/proc/self/stat').read()").passed


def test_lines_are_counted_in_the_measured_part_alone() -> None:
    measured = "def f(x):\n    if x:\n        return 1\n    return 2\n"
    half, whole = run("assert f(1) == 1", measured=measured), run("assert f(1) == 1\nassert f(0) == 2", measured=measured)
    assert half.coverage == pytest.approx(3 / 4) and whole.coverage == 1.0
    assert half.lines[1] - half.lines[0] == {4}


def test_a_verdict_cannot_be_printed() -> None:
    assert run('import os\nos.write(1, b\'0000000000000000{"status": "passed"}\')\nassert False').status == "failed"


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(Unsupported, match="execute=false"):
        run("pass")
