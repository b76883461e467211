"""Which tile a kernel of ours is fastest with on this device: the points of the sweep, and the table of what they found.

A kernel takes its tile from a table in its module. The sweep puts one of these candidates in the table's place, checks the
result as ever, and times it. A tile that does not fit fails, and costs its own row only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_accel.evals.kernel_bench.points import TILES, Row, status_word
from diffusers_accel.files import write_json


@contextmanager
def taken(impl: str, tile: str) -> Iterator[None]:
    """Inside, this implementation of attention takes this tile, whatever its table says."""
    module = _module(impl)
    own, fields = module.config, dict(zip(module.Config._fields, map(int, tile.split("x")), strict=True))
    module.config = lambda *inputs: module.Config(**fields)
    try:
        yield
    finally:
        module.config = own


def calling(impl: str, tile: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with this tile."""

    def tiled() -> Any:
        with taken(impl, tile):
            return call()

    return tiled


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """The tiles of a sweep, for each implementation and kind of inputs the fastest first: plain JSON, in a fixed order.

    Without times of day or names of hosts, so that two tables of one device differ only in what was measured.
    """
    swept = [row for row in rows if row["operator"] == "sweep" and row["impl"] in TILES]
    found: dict[str, Any] = {}
    for row in sorted(swept, key=lambda row: (row["impl"], row["D"], row["precision"], row["dtype"])):
        name = f"{row['impl']}, head dim {row['D']}, {row['precision']}, {row['dtype']}"
        entry = found.setdefault(name, {"tiles": [], "fields": list(_fields(row["impl"])), "shape": row["shape"]})
        if "t_kernel_ms" in row and status_word(row) == "ok":
            entry["tiles"].append({"tile": row["tile"], "ms": round(row["t_kernel_ms"], 4)})
        else:
            entry.setdefault("without_a_time", {})[str(row["tile"])] = row["status"]
    for entry in found.values():
        entry["tiles"].sort(key=lambda each: (each["ms"], each["tile"]))
        if "without_a_time" in entry:
            entry["without_a_time"] = dict(sorted(entry["without_a_time"].items()))
        entry["best"] = entry["tiles"][0]["tile"] if entry["tiles"] else None
    return {"measured_on": _place(swept[0]) if swept else None, "tables": found}


def save(rows: Sequence[Row], path: Path) -> None:
    """Writes `table` as JSON.

    Raises:
        WriteError: it cannot be written; what was there is as it was.
    """
    write_json(path, table(rows))


def _place(row: Row) -> Mapping[str, Any]:
    machine = {name: row["machine"].get(name) for name in ("gpu", "cuda", "device")}
    return machine | {name: row["versions"].get(name) for name in ("torch", "triton")} | {"code": row["code"]}


def _fields(impl: str) -> tuple[str, ...]:
    fields: tuple[str, ...] = _module(impl).Config._fields
    return fields


def _module(impl: str) -> Any:
    return importlib.import_module(f"diffusers_accel.kernels.attention.{impl}")
