"""Runs the kernel benchmark's worker in a process group of its own and outlives whatever a kernel does to it.

A kernel that hangs cannot be interrupted from within: not by a signal handler, not by another thread. So the worker says
what it begins; when it has been silent for too long, its whole group is killed, that point gets the status "hung", and a
new worker goes on behind it. The same when it dies ("crashed"). This process never touches the GPU.
"""

from __future__ import annotations

import queue
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from diffusers_accel.evals.kernel_bench.peers import PEERS
from diffusers_accel.evals.kernel_bench.points import (
    BenchSettings,
    Row,
    family,
    given_up,
    key,
    left,
    processes,
    status_word,
)
from diffusers_accel.evals.kernel_bench.rows import latest
from diffusers_accel.evals.worker_process import Worker

COMMAND = (sys.executable, "-m", "diffusers_accel.evals.kernel_bench.worker")
START_SECONDS = 120.0  # to import PyTorch, open the device and measure what it reaches


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
    avoid = {lost for row in latest(rows) if status_word(row) in ("hung", "crashed") for lost in given_up(row)}
    order = processes(settings)
    while time.monotonic() < end:
        lost: Row | None = None  # the point that it is at
        environment: Row | None = None
        status: str | None = None  # of that point, if it ends there
        finished, over = False, False
        worker = Worker(_job(settings, done, avoid) | {"process": order[0]}, COMMAND)
        try:
            while True:
                limit = START_SECONDS if environment is None else max(timeout, _compilation(lost))
                remaining = max(0.0, end - time.monotonic())
                message = worker.answers.get(timeout=min(limit, remaining))
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
                    avoid |= given_up(row)
                    if status_word(row) != "missing" or there.get(key(row)) != row["status"]:
                        yield row
                else:
                    finished = message["end"]
                    break
        except queue.Empty:
            over = remaining < limit  # the time is over; the point may need less next time
            status = None if over else f"hung: silent for {limit:g} s, killed"
        finally:
            held = worker.kill()
        if status and lost:
            done.append(_stamped(lost | {"status": status}, environment, run_id))
            avoid |= given_up(done[-1])
            yield done[-1]
        if held:
            raise RuntimeError(held)
        if status and not lost:
            where = "between two points" if environment else "before it could use the device; look at that first"
            raise RuntimeError(f"the benchmark's worker went {where}. It {status}")
        if over:
            return
        if finished:
            while order := order[1:]:  # a worker is not begun for nothing
                if any(left(settings, order[0], set(_done(latest(done))), avoid)):
                    break
            else:
                return


def _done(rows: Sequence[Row]) -> list[str]:
    """The points that are not tried again. Who is missing may have come since."""
    return [key(row) for row in rows if status_word(row) != "missing"]


def _job(settings: BenchSettings, rows: Sequence[Row], avoid: set[str]) -> Row:
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
        "done": _done(last),
        "avoid": sorted(avoid),
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
