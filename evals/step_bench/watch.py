"""Runs the step benchmark's models each in a process of its own, and outlives a method that hangs or crashes.

A run that says nothing for too long is killed and its row says `hung`; one whose process dies says `crashed`. A new process
goes on with the methods behind it.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from diffusers_accel.evals.kernel_bench.rows import RECORDED
from diffusers_accel.evals.step_bench.models import DTYPES, MODELS
from diffusers_accel.evals.step_bench.rivals import SECONDS, is_rival
from diffusers_accel.evals.step_bench.timing import STOCK, Row, place
from diffusers_accel.evals.worker_process import Worker
from diffusers_accel.files import FileError, printable

COMMAND = (sys.executable, "-m", "diffusers_accel.evals.step_bench.worker")
START_SECONDS = 180.0  # to import PyTorch and diffusers, open the device and build the layers
# What two rows of one measurement have in common, and what rows of one file must agree in to compare.
KEY = ("model", "latents", "dtype", "layers_measured", "steps", "method")
SAME = ("machine", "versions", "git_sha")


def key(row: Row) -> str:
    """What identifies the measurement of a row."""
    return "|".join(str(row.get(name)) for name in KEY)


def word(row: Row) -> str:
    """What stands before the reason in a row's status: ok, missing, failed, hung, crashed."""
    return str(row.get("status")).partition(":")[0]


def job_place(job: Mapping[str, Any]) -> Row:
    """The fields of a job's rows, but for the method."""
    model, size = MODELS[job["model"]], tuple(job["size"])
    return place(job["model"], model, size, DTYPES[job["dtype"]], job["layers"], job["steps"])


def watched(
    jobs: Sequence[Mapping[str, Any]], rows: Sequence[Row], end: float, timeout: float, remedy: str
) -> Iterator[Row]:
    """The rows of all jobs that are not there yet, as they are measured.

    Args:
        jobs: of `worker`, one a model.
        rows: those that are there; they are not measured again, whatever their status but `missing`.
        end: the `time.monotonic()` at which the worker is stopped, wherever it is.
        timeout: seconds for which a run may be silent; rivals, which compile, have at least `SECONDS`.
        remedy: what to do about rows that do not compare.

    Raises:
        FileError: `rows` were measured on another machine, or with another state of the software.
        RuntimeError: a worker cannot start, or cannot be killed.
    """
    there = {key(row): str(row.get("status")) for row in rows}
    for job in jobs:
        asked = list(job["methods"])
        while time.monotonic() < end and (wanted := _wanted(job, asked, there)):
            lost = yield from _one({**job, "methods": wanted}, rows, there, end, timeout, remedy)
            if lost is None or lost == STOCK:  # all is done, or nothing of this model can be compared
                break
            asked = wanted[wanted.index(lost) + 1 :]


def _wanted(job: Mapping[str, Any], methods: Sequence[str], there: Mapping[str, str]) -> list[str]:
    """The methods that have no row yet, or had none to give: what is missing may have come since."""
    status = {name: there.get(key(job_place(job) | {"method": name}), "") for name in (STOCK, *methods)}
    if status[STOCK] not in ("", "ok"):
        return []
    return [name for name in methods if not status[name] or status[name].startswith("missing")]


def _one(
    job: Mapping[str, Any], rows: Sequence[Row], there: dict[str, str], end: float, timeout: float, remedy: str
) -> Generator[Row, None, str | None]:
    """The rows of one worker; returns the method at which it was lost, or None."""
    environment: Row = {}
    begun: Row | None = None
    status = None
    worker = Worker(job, COMMAND)
    try:
        while True:
            limit = START_SECONDS if begun is None else max(timeout, SECONDS if is_rival(begun["method"]) else 0.0)
            remaining = max(0.0, end - time.monotonic())
            message = worker.answers.get(timeout=min(limit, remaining))
            if message is None:
                status = f"crashed: {worker.last_words()}"
                break
            if "hello" in message:
                environment = message["hello"]
                _check_same(rows, environment, remedy)
            elif "begin" in message:
                begun = message["begin"]
            elif "row" in message:
                row = message["row"] | environment
                if there.get(key(row)) != row["status"]:  # stock runs again beside what is new
                    there[key(row)] = row["status"]
                    yield row
            else:
                break
    except queue.Empty:
        status = None if remaining < limit else f"hung: silent for {limit:g} s, killed"
    finally:
        held = worker.kill()
    if status and begun:
        there[key(begun)] = status
        yield begun | {"status": status} | environment
    if held:
        raise RuntimeError(held)
    if status and not begun:
        raise RuntimeError(f"the step benchmark's worker went before it had built {job['model']}. It {status}")
    return begun["method"] if status and begun else None


def _check_same(rows: Sequence[Row], environment: Row, remedy: str) -> None:
    """Refuses to go on with rows of another machine or other software."""
    for row in rows:
        for name in SAME:
            there, here = row.get(name), environment[name]
            if name == "machine" and isinstance(there, dict):
                loose = RECORDED[here["device"]]
                there, here = ({x: y for x, y in each.items() if x not in loose} for each in (there, here))
            if there != here:
                raise FileError(
                    f"rows of the step benchmark: expected {name} {printable(here)[:150]}, found {printable(there)[:150]} of an "
                    f"earlier run; such rows do not compare: {remedy}"
                )
