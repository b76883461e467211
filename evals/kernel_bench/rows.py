"""The file of the kernel benchmark's rows: a line of JSON each, written as soon as it is measured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from diffusers_accel.evals.kernel_bench.points import KEY, Row, key

# Rows that do not agree in these were not measured on the same machine, with the same software and kernels, equally long.
SAME = ("machine", "versions", "code", "rep_ms")


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. A last line that was cut off does not count.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is None and number == len(lines) and not line.endswith(b"\n"):
            break
        if not isinstance(row, dict) or not {*KEY, *SAME, "peers", "status"} <= row.keys():
            raise ValueError(
                f"{path}, line {number}: expected a row of this version's benchmark, found {line[:60]!r}; give another --out"
            )
        rows.append(row)
    return rows


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row, and has it on the disk when it returns. The file is made, with its folder.

    Raises:
        ValueError: another process measures into the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _lock(file, path)

        def append(row: Row) -> None:
            _mend(file)
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def check_same(path: Path, rows: Sequence[Row], environment: Row) -> None:
    """Refuses to go on with a file from another machine, other versions or other kernels.

    A peer may have come or gone since: its own rows say with which version they were measured.

    Raises:
        ValueError: the message names what differs, and what to do.
    """
    for row in rows:
        both = row["peers"].keys() & environment["peers"].keys()
        for name in (*SAME, "peers"):
            there, here = row[name], environment[name]
            if name == "peers":
                there, here = ({peer: versions[peer] for peer in both} for versions in (there, here))
            if there != here:
                raise ValueError(
                    f"{path}: its rows were measured with {name} {_difference(there, here)}; such rows do not compare: "
                    "give another --out, or move this file away"
                )


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every point, in the order in which the points were first measured."""
    return list({key(row): row for row in rows}.values())


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _mend(file: BinaryIO) -> None:
    """Ends a last line that has no end, or removes it where it is half a row, as a power cut leaves it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    if _parsed(data[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _lock(file: BinaryIO, path: Path) -> None:
    """For this process alone, until the file is closed; nothing on Windows."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run measures into it; wait for its end or give another --out") from None


def _difference(there: object, here: object) -> str:
    """What differs, of two dictionaries only the entries that do."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{there}, this run has {here}"
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return "; ".join(f"{name} {there.get(name)}, this run has {here.get(name)}" for name in names)
