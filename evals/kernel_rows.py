"""The file of the kernel benchmark's rows: a line of JSON each, written as soon as it is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_accel.evals.kernel_points import KEY, Row, key

# Rows that do not agree in these were not measured on the same machine, with the same software and kernels, equally long.
SAME = ("machine", "versions", "code", "rep_ms")


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. A last line that was cut off is removed from the file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {*KEY, *SAME, "status"} <= row.keys():
            raise ValueError(
                f"{path}, line {number}: expected a row of this version's benchmark, found {line[:60]!r}; give another --out"
            )
        rows.append(row)
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def append(path: Path, row: Row) -> None:
    """Adds a row, and has it on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_same(path: Path, rows: Sequence[Row], environment: Row) -> None:
    """Refuses to go on with a file from another machine, other versions or other kernels.

    Raises:
        ValueError: the message names what differs, and what to do.
    """
    for name in SAME:
        for row in rows:
            if row[name] != environment[name]:
                raise ValueError(
                    f"{path}: its rows were measured with {name} {_difference(row[name], environment[name])}; such rows do "
                    "not compare: give another --out, or move this file away"
                )


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every point, in the order in which the points were first measured."""
    return list({key(row): row for row in rows}.values())


def _difference(there: object, here: object) -> str:
    """What differs, of two dictionaries only the entries that do."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{there}, this run has {here}"
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return "; ".join(f"{name} {there.get(name)}, this run has {here.get(name)}" for name in names)
