"""A command that may hang, with a limit that holds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GUARD = Path(__file__).resolve().with_name("guard.py")
GRACE_SECONDS = 5.0  # of the limit, to answer an interrupt: pytest then says what has run
KILL_SECONDS = 20.0  # that a killed process may take to be gone


class Ended(NamedTuple):
    """How a command ended.

    Args:
        code: its exit code; None where its time was over.
        seconds: that it took.
        held: why it is still there although it was killed, or None.
    """

    code: int | None
    seconds: float
    held: str | None = None


def run(command: Sequence[str], log: Path, limit: float, cwd: Path, env: Mapping[str, str]) -> Ended:
    """Runs a command in a process group of its own; what it says is added to `log`.

    Args:
        limit: seconds after which nothing of it is left. `GRACE_SECONDS` before, or at half of it, it is interrupted.
        env: added to the environment.

    Raises:
        OSError: it cannot be started.
    """
    begin = time.monotonic()
    with log.open("ab") as words:
        words.write(f"\n$ {' '.join(command)}\n".encode())
        words.flush()
        process = subprocess.Popen(
            [sys.executable, str(GUARD), *command],
            stdin=subprocess.PIPE,  # never written to: the guard ends everything when this end of it is gone
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, **env},
        )
    code: int | None = None
    held = None
    try:
        grace = min(GRACE_SECONDS, limit / 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limit - grace)
        if code is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):  # whatever it says now, it was not done
                process.wait(max(0.0, begin + limit - time.monotonic()))
    finally:
        _signal(process, signal.SIGKILL)  # also what a command has left behind
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            held = f"process {process.pid} was killed {KILL_SECONDS:g} s ago and is still there: the device's driver holds it"
        if process.stdin is not None:
            process.stdin.close()
    return Ended(code, time.monotonic() - begin, held)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
