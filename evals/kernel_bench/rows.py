"""The file of the kernel benchmark's rows: a line of JSON each (`files.lines`), written as soon as it is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from diffusers_accel.evals.kernel_bench.inputs import FORMER_SHAPES
from diffusers_accel.evals.kernel_bench.points import Row, key
from diffusers_accel.files import (
    FileError,
    append_line,
    check_appends,
    convert,
    only_writer,
    prepare_file,
    printable,
    quoted,
    read_lines,
)

# Rows that do not agree in these were not measured on the same machine, with the same software and kernels, equally long.
SAME = ("machine", "versions", "code", "rep_ms")
# What is said of a machine, and may differ: a GPU that is rented twice has another host, and a driver another patch level.
RECORDED = {"cuda": {"cpu", "driver", "cpu_capability"}, "cpu": {"cpu", "driver"}}
REMEDY = "give another --out, or move this file away"


class _Required(msgspec.Struct):
    """What the benchmark and its report read of a row; it may hold more."""

    operator: str
    impl: str
    precision: str
    dtype: str
    shape: str
    input_kind: str
    seed: int
    pattern: str | None
    density_requested: float | None
    machine: dict[str, Any]
    versions: dict[str, Any]
    peers: dict[str, Any]
    code: str
    rep_ms: float
    status: str
    D: int
    dense: str | msgspec.UnsetType = msgspec.UNSET
    t_dense_ms: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    t_med_ms: float | msgspec.UnsetType = msgspec.UNSET
    t_p20_ms: float | msgspec.UnsetType = msgspec.UNSET
    t_p80_ms: float | msgspec.UnsetType = msgspec.UNSET
    git_sha: str | None = None
    t_kernel_ms: float | None = None
    t_prep_ms: float | None = None
    t_select_ms: float | None = None
    t_scatter_ms: float | None = None
    tile: str | None = None
    t_graph_ms: float | None = None
    density_computed: float | None = None
    eta: float | None = None
    rel_err: float | None = None
    overhead_share: float | None = None
    roofline_share: float | None = None
    speedup_total: float | None = None
    tbps: float | None = None
    tflops_computed: float | None = None

    def __post_init__(self) -> None:
        if (self.t_med_ms is msgspec.UNSET) != (self.t_p20_ms is msgspec.UNSET or self.t_p80_ms is msgspec.UNSET):
            raise ValueError("expected t_p20_ms and t_p80_ms beside t_med_ms, found none")
        if self.dense is not msgspec.UNSET and (self.t_dense_ms is msgspec.UNSET or self.dense not in self.t_dense_ms):
            raise ValueError(f"expected the time of {quoted(self.dense)} in t_dense_ms, found none")
        if self.eta is not None and None in (self.density_requested, self.density_computed):
            raise ValueError("expected density_requested and density_computed beside eta, found none")


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. A last line that was cut off does not count. Shapes have the names
    that they have now.

    Raises:
        FileError: the file holds something else, or a row was changed after it was written.
    """
    kind = "a row of this version's benchmark"
    rows = read_lines(path, kind, REMEDY)
    for number, row in enumerate(rows, 1):
        try:
            convert(row, _Required)
        except FileError as error:
            raise FileError(f"{printable(path)}, line {number}: expected {kind}: {error}; {REMEDY}") from error
        row["shape"] = FORMER_SHAPES.get(row["shape"], row["shape"])
    return rows


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row, and has it on the disk when it returns. The file's folder is made.

    Raises:
        FileError: another process measures into the file.
        WriteError: it cannot be written; rows that were added before are kept.
    """
    prepare_file(path)
    with only_writer(path, "another run measures into it"):
        check_appends(path)
        yield partial(append_line, path)


def check_same(path: Path, rows: Sequence[Row], environment: Row) -> None:
    """Refuses to go on with a file from another machine, other versions or other kernels.

    A peer may have come or gone since: its own rows say with which version they were measured.

    Raises:
        FileError: the message names what differs, and what to do.
    """
    for row in rows:
        both = row["peers"].keys() & environment["peers"].keys()
        for name in (*SAME, "peers"):
            there, here = row[name], environment[name]
            if name == "machine":
                loose = RECORDED[environment["machine"].get("device", "cuda")]
                there, here = ({x: y for x, y in each.items() if x not in loose} for each in (there, here))
            elif name == "peers":
                there, here = ({peer: versions[peer] for peer in both} for versions in (there, here))
            if there != here:
                raise FileError(
                    f"{printable(path)}: its rows were measured with {name} {_difference(there, here)}; such rows do not "
                    f"compare: {REMEDY}"
                )


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every point, in the order in which the points were first measured."""
    return list({key(row): row for row in rows}.values())


def _difference(there: object, here: object) -> str:
    """What differs, of two dictionaries only the entries that do."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{_shown(there)}, this run has {_shown(here)}"
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return "; ".join(
        f"{_shown(name)} {_shown(there.get(name))}, this run has {_shown(here.get(name))}" for name in names[:4]
    )


def _shown(value: object) -> str:
    return printable(value)[:60]
