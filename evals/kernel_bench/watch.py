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
from typing import Any

from diffusers_accel.evals.kernel_bench.peers import PEERS
from diffusers_accel.evals.kernel_bench.points import BenchSettings, Row, family, given_up, key, status_word
from diffusers_accel.evals.kernel_bench.rows import latest

COMMAND = (sys.executable, "-m", "diffusers_accel.evals.kernel_bench.worker")
START_SECONDS = 120.0  # to import PyTorch, open the device and measure what it reaches
KILL_SECONDS = 20.0  # that a killed process may take to be gone


class Worker:
    """A child process that is given a job and answers in lines of JSON, of which the last is None. It has to be killed."""

    def __init__(self, job: Row) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kernel_bench_")
        folder = Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._errors = folder / "errors.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*COMMAND, str(folder / "job.json")],
                stdin=subprocess.PIPE,  # never written to: the worker ends when this end of it is gone
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.answers: queue.Queue[Row | None] = queue.Queue()
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


def watched(
    settings: BenchSettings, rows: Sequence[Row], end: float, timeout: float, on_hello: Callable[[Row], None]
) -> Iterator[Row]:
    """Every row that is not there yet, as it is measured, until all are there or the time is over.

    Args:
        settings: what is asked for.
        rows: those that are there; their points are not measured again.
        end: the `time.monotonic()` at which the worker is stopped, wherever it is; a point that it cuts off has no row.
        timeout: seconds in which a point has to say something, compilation included; some peers have longer.
        on_hello: called with the environment of every worker before its first row; what it raises ends the run.

    Raises:
        RuntimeError: the worker cannot start, ends before it has begun a new point, or cannot be killed.
    """
    there = {key(row): row["status"] for row in rows}
    done, run_id = list(rows), uuid.uuid4().hex[:12]
    # Who hung or crashed in an earlier run would cost as much in this one. What is missing may have come since.
    avoid = {given_up(row) for row in latest(rows) if status_word(row) in ("hung", "crashed")}
    while time.monotonic() < end:
        lost: Row | None = None  # the point that it is at
        environment: Row | None = None
        status: str | None = None  # of that point, if it ends there
        finished = False
        worker = Worker(_job(settings, done, avoid))
        try:
            while True:
                limit = START_SECONDS if environment is None else max(timeout, _compilation(lost))
                left = max(0.0, end - time.monotonic())
                message = worker.answers.get(timeout=min(limit, left))
                if message is None:
                    status = f"crashed: {worker.last_words()}"
                    break
                if "hello" in message:
                    environment = message["hello"]
                    on_hello(environment)
                elif "begin" in message:
                    lost = message["begin"]
                elif "row" in message:
                    row, lost = _stamped(message["row"], environment, run_id), None
                    done.append(row)
                    avoid.add(given_up(row))
                    if status_word(row) != "missing" or there.get(key(row)) != row["status"]:
                        yield row
                else:
                    finished = message["end"]
                    break
        except queue.Empty:
            finished = left < limit  # the time is over; the point may need less next time
            status = None if finished else f"hung: silent for {limit:g} s, killed"
        finally:
            held = worker.kill()
        if status and lost:
            done.append(_stamped(lost | {"status": status}, environment, run_id))
            avoid.add(given_up(done[-1]))
            yield done[-1]
        if held:
            raise RuntimeError(held)
        if status and not lost:
            where = "between two points" if environment else "before it could use the device; look at that first"
            raise RuntimeError(f"the benchmark's worker went {where}. It {status}")
        if finished:
            return


def _job(settings: BenchSettings, rows: Sequence[Row], avoid: set[str | None]) -> Row:
    """What a worker has to know: what is asked for, what is there, and the times of dense attention among that."""
    last = latest(rows)
    dense: list[tuple[Any, ...]] = [
        (row["shape"], row["input_kind"], row["impl"], row["t_med_ms"])
        for row in last
        if (row["operator"], row["precision"], row["status"]) == ("dense", "input", "ok")
        and (row["dtype"], row["seed"]) == (settings.dtype, settings.seed)
        and family(row, "D") not in avoid
    ]
    return {
        "settings": asdict(settings),
        "done": [key(row) for row in last if status_word(row) != "missing"],
        "avoid": sorted(avoid - {None}, key=str),
        "dense": dense,
        "graphs": not any(str(row.get("graph")).startswith("not captured") for row in last),
    }


def _compilation(row: Row | None) -> float:
    """Seconds that a point may take, at least, because its kernel is compiled by its own compiler first."""
    peer = PEERS.get(row["operator"], {}).get(row["impl"]) if row else None
    return peer.seconds if peer else 0.0


def _stamped(row: Row, environment: Row | None, run_id: str) -> Row:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"run_id": run_id, "time_utc": now} | (environment or {}) | row
