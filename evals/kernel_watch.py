"""Runs the kernel benchmark's worker in a process group of its own and outlives whatever a kernel does to it.

A kernel that hangs cannot be interrupted from within: not by a signal handler, not by another thread. So the worker says
what it begins; when it has been silent for too long, its whole group is killed, that point gets the status "hung", and a
new worker goes on behind it. The same when it dies ("crashed"). This process never touches the GPU.
"""

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
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from diffusers_accel.evals.kernel_points import Row, Settings, family, key
from diffusers_accel.evals.kernel_worker import GIVE_UP, status_word

COMMAND = (sys.executable, "-m", "diffusers_accel.evals.kernel_worker")
START_SECONDS = 120.0  # to import PyTorch, open the device and measure what it reaches
KILL_SECONDS = 20.0  # that a killed process may take to be gone


class Ended(Exception):
    """The worker has closed its answers."""


class Worker:
    """A child process that is given a job and answers in lines of JSON. Leaving the context kills it with its children."""

    def __init__(self, command: Sequence[str], job: Row) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kernel_bench_")
        folder = Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._errors = folder / "errors.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, str(folder / "job.json")],
                stdin=subprocess.PIPE,  # never written to: the worker ends when this end of it is gone
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._answers: queue.Queue[Row | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._answers.put(json.loads(line))
            except ValueError:  # cut off by a death
                break
        self._answers.put(None)

    def answer(self, seconds: float) -> Row:
        """The next answer.

        Raises:
            TimeoutError: there was none for so long.
            Ended: there will be none.
        """
        try:
            found = self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        if found is None:
            raise Ended
        return found

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

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Kills the process group, if anything of it is left.

        Raises:
            RuntimeError: the process does not die, because the device's driver does not let it go.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"the benchmark's worker (process {self._process.pid}) was killed {KILL_SECONDS:.0f} s ago and is still there: "
                "the device's driver holds it, so nothing more can be measured before it lets go. All rows so far are "
                "written; run again with the same --out then"
            ) from None
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._folder.cleanup()


def watched(
    settings: Settings,
    rows: Sequence[Row],
    end: float,
    timeout: float,
    on_hello: Callable[[Row], None] = lambda environment: None,
    command: Sequence[str] = COMMAND,
) -> Iterator[Row]:
    """Every row that is not there yet, as it is measured, until all are there or the time is over.

    Args:
        settings: what is asked for.
        rows: those that are there; their points are not measured again.
        end: the `time.monotonic()` at which the worker is stopped, wherever it is; a point that it cuts off has no row.
        timeout: seconds in which a point has to say something, compilation included.
        on_hello: called with the environment of every worker before its first row; what it raises ends the run.
        command: what is started, with the name of the job's file after it.

    Raises:
        RuntimeError: the worker cannot start, or ends before it has begun a new point; the message has its last words.
    """
    done, avoid = list(rows), set[str]()
    run_id = uuid.uuid4().hex[:12]
    while time.monotonic() < end:
        lost: Row | None = None  # the point that it was at when it went
        environment: Row | None = None
        with Worker(command, _job(settings, done, avoid)) as worker:
            try:
                while True:
                    limit = START_SECONDS if environment is None else timeout
                    message = worker.answer(min(limit, end - time.monotonic()))
                    if "hello" in message:
                        environment = message["hello"]
                        on_hello(environment)
                    elif "begin" in message:
                        lost = message["begin"]
                    elif "row" in message:
                        done.append(_stamped(message["row"], environment, run_id))
                        lost = None
                        yield done[-1]
                        if status_word(done[-1]) in GIVE_UP:
                            avoid.add(family(done[-1]))
                    else:
                        return
            except TimeoutError:
                if time.monotonic() >= end:
                    return
                status = f"hung: silent for {limit:g} s, killed"
            except Ended:
                status = f"crashed: {worker.last_words()}"
        if lost is None:
            where = (
                "between two points; run again" if environment else "before it could use the device; look at that first"
            )
            raise RuntimeError(f"the benchmark's worker went {where}. It {status}")
        done.append(_stamped(lost | {"status": status}, environment, run_id))
        avoid.add(family(lost))
        yield done[-1]


def _job(settings: Settings, rows: Sequence[Row], avoid: set[str]) -> Row:
    """What a worker has to know: what is asked for, what is there, and the times of dense attention among that."""
    latest = {key(row): row for row in rows}
    dense: list[tuple[Any, ...]] = [
        (row["shape"], row["input_kind"], row["impl"], row["t_med_ms"])
        for row in latest.values()
        if (row["operator"], row["precision"], row["status"]) == ("dense", "input", "ok")
        and (row["dtype"], row["seed"]) == (settings.dtype, settings.seed)
        and family(row) not in avoid
    ]
    return {"settings": asdict(settings), "done": sorted(latest), "avoid": sorted(avoid), "dense": dense}


def _stamped(row: Row, environment: Row | None, run_id: str) -> Row:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"run_id": run_id, "time_utc": now} | (environment or {}) | row
