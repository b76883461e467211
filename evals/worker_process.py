"""A process that measures, in a process group of its own, and what ends it whatever a kernel has done to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KILL_SECONDS = 20.0  # that a killed process may take to be gone


class Worker:
    """A child process that is given a job and answers in lines of JSON, of which the last is None. It has to be killed.

    Args:
        job: plain JSON, written to a file whose path is the command's last argument.
        command: what is run. Its stdin is never written to: it ends when the other end of it is gone (`end_with_parent`).
    """

    def __init__(self, job: Mapping[str, Any], command: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark_")
        folder = Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._errors = folder / "errors.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # a line that was cut off by a death
            for line in self._process.stdout:
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def last_words(self) -> str:
        """How it ended, with the last exception of its errors, or their last line."""
        try:
            how = f"exit code {self._process.wait(KILL_SECONDS)}"
        except subprocess.TimeoutExpired:
            how = "closed its answers and went on"
        lines = [line for line in self._errors.read_text(errors="replace").splitlines() if line.strip()]
        # CUDA's exceptions are followed by advice.
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        return f"{how}: {(raised or lines)[-1].strip()[:300]}" if lines else how

    def kill(self) -> str | None:
        """Kills the process group, if anything of it is left; why that failed, or None."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return (
                f"the benchmark's worker (process {self._process.pid}) was killed {KILL_SECONDS:g} s ago and is still "
                "there: the device's driver holds it. Run again with the same --out when it lets go"
            )
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._folder.cleanup()
        return None


def end_with_parent() -> None:
    """In the child: ends it when its parent is gone, however that went; also in the middle of a kernel. Never returns.

    For a thread of its own. The parent holds the other end of stdin: nobody reads any more what is measured here.
    """
    sys.stdin.buffer.read()
    os._exit(1)
