"""What a denoising step of a real model costs, dense and patched: `python -m diffusers_accel.evals.step_bench`.

The transformers have their real widths, heads and token counts and random weights, so nothing has to be downloaded and no
picture comes out (`models`). A few layers of each kind are run and timed one by one; a whole model is extrapolated from them,
its layers times their number plus what lies around them (`timing`). Beside our methods without a plan stand those of others
(`rivals`). A process of its own measures (`worker`), which may hang (`watch`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from diffusers_accel.evals.step_bench.models import DTYPES, MODELS, Size
from diffusers_accel.evals.step_bench.rivals import RIVALS
from diffusers_accel.evals.step_bench.timing import STEPS, STOCK, Row, check_methods
from diffusers_accel.evals.step_bench.watch import job_place, key, watched, word
from diffusers_accel.files import append_line, check_appends, only_writer, prepare_file, read_lines
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from diffusers_accel.support.interrupted import Interrupted

DRIFT = 0.03  # stock runs that differ more make the row doubtful, which it says
TIMEOUT = {"cuda": 60.0, "cpu": 1800.0}  # seconds
METHODS = [*FOR_EVERY_MODEL, *RIVALS]
REMEDY = "give another --out, or move this file away"


def table(rows: Sequence[Row]) -> Table:
    """One line per row; a step is extrapolated."""
    found = Table("model", "latents", "method", "density", "ms per layer", "ms per step", "speed-up", "drift", "cache")
    for row in (row for row in rows if word(row) == "ok"):
        layer = " / ".join(f"{ms:,.2f}" for ms in row["ms_layer"].values())
        density, more = "", ["", "", ""]
        if row["method"] != STOCK:
            doubtful = "!" if abs(row["stock_drift"]) > DRIFT else ""
            cache = f"{row['cache_bytes'] / 2**30:,.1f} GiB" if row.get("cache_bytes") else ""
            density = f"{row['density']:.2f}" if "density" in row else "?"
            more = [f"{row['speedup']:.2f}x", f"{row['stock_drift']:+.1%}{doubtful}", cache]
        latents = "x".join(map(str, row["latents"]))
        found.add_row(row["model"], latents, row["method"], density, layer, f"{row['ms_step']:,.1f}", *more)
    return found


def steps_markdown(rows: Sequence[Row]) -> list[str]:
    """The rows that have times as lines of a Markdown table, the fastest method of each model first."""
    timed = [row for row in rows if "ms_step" in row]
    order = list(dict.fromkeys(row["model"] for row in timed))
    timed.sort(key=lambda row: (order.index(row["model"]), -row.get("speedup", 1.0)))
    lines = ["| model | method | speed-up | ms a step | density | drift |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in timed:
        numbers = [f"{row['speedup']:.2f}x" if "speedup" in row else "", f"{row['ms_step']:,.1f}"]
        numbers += [
            f"{row[name]:{form}}" if name in row else "" for name, form in (("density", ".2f"), ("stock_drift", "+.1%"))
        ]
        lines.append(f"| {row['model']} | {row['method']} | {' | '.join(numbers)} |")
    return lines


def rows_of(out: Path) -> list[Row]:
    """The last row of each measurement in a file; none where there is no file.

    Raises:
        FileError: it holds something else.
    """
    return list({key(row): row for row in read_lines(out, "a row of this version's step benchmark", REMEDY)}.values())


def left_over(
    out: Path,
    models: str = "",
    methods: str = "",
    size: str = "",
    layers: int = 2,
    steps: int = STEPS,
    dtype: str = "bf16",
) -> int:
    """How many methods of such a run of the command have no row in `out`; a model whose stock run has no time has none."""
    there = {key(row): word(row) for row in rows_of(out)}
    number = 0
    for job in _jobs(_names(models) or list(MODELS), _names(methods) or METHODS, size, layers, steps, dtype):
        place = job_place(job)
        if there.get(key(place | {"method": STOCK}), "ok") == "ok":
            number += sum(key(place | {"method": method}) not in there for method in job["methods"])
    return number


def _jobs(
    models: Sequence[str], methods: Sequence[str], size: str, layers: int, steps: int, dtype: str
) -> list[dict[str, Any]]:
    """What a worker is told of each model, but for the device."""
    shared = {"dtype": dtype, "layers": layers, "steps": steps, "methods": list(methods)}
    return [{"model": name, "size": list(_size(size) if size else MODELS[name].size), **shared} for name in models]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(MODELS)}.")] = ",".join(MODELS),
    methods: Annotated[
        str, typer.Option(help="Comma-separated names of methods; sparsevideo:<method> is one of that package.")
    ] = ",".join(METHODS),
    size: Annotated[str, typer.Option(help="Latents as FxHxW, the same for all; each model's own by default.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Layers of each kind to build and time.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the schedule.")] = STEPS,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    device: Annotated[str, typer.Option(help="Where to run; a GPU by default where there is one.")] = "",
    minutes: Annotated[float, typer.Option(min=0.0, help="Stop after so long, wherever it is.")] = 60.0,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds until a run counts as hung; 0 is 60 on a GPU, 1800 on a CPU.")
    ] = 0.0,
    out: Annotated[Path, typer.Option(help="File of JSON lines to which rows are appended.")] = Path("steps.jsonl"),
) -> None:
    """Time a denoising step of real models with random weights, stock and patched. Run again, it goes on with --out."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted, asked = _names(models), _names(methods)
    if unknown := [name for name in wanted if name not in MODELS]:
        raise typer.BadParameter(f"models must be among {', '.join(MODELS)}, found {', '.join(unknown)}")
    try:
        check_methods(asked)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    latents = _size(size) if size else None
    for name in wanted:
        MODELS[name].check(latents or MODELS[name].size)
    end, kind = time.monotonic() + 60 * minutes, where.type
    prepare_file(out)
    console, measured = Console(), list[Row]()
    jobs = [{**job, "device": str(where)} for job in _jobs(wanted, asked, size, layers, steps, dtype)]
    with only_writer(out, "another benchmark writes into it"):
        check_appends(out)
        there = read_lines(out, "a row of this version's step benchmark", REMEDY)
        try:
            for row in watched(jobs, there, end, timeout or TIMEOUT[kind], REMEDY):
                append_line(out, row)
                measured.append(row)
                took = f"{row['ms_step']:,.1f} ms a step" if "ms_step" in row else row["status"]
                console.print(f"{row['model']}, {row['method']}: {took}", highlight=False, markup=False)
        except KeyboardInterrupt:
            raise Interrupted(f"{len(measured)} rows were measured now, and all of them are in {out}") from None
    asked_for = {key(job_place(job) | {"method": method}) for job in jobs for method in (STOCK, *asked)}
    last = {key(row): row for row in (*there, *measured)}
    show(console, [row for name, row in last.items() if name in asked_for])


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table, and why others are not in it."""
    console.print(table(rows))
    for row in rows:
        if word(row) != "ok":
            console.print(f"{row['model']}, {row['method']}: {row['status']}", highlight=False, markup=False)
    console.print(
        "A step and its cache are extrapolated from the layers that were measured. Weights are random, so densities of methods "
        "that look at the content are not those of a trained model. Where a whole cache does not fit, layers stay dense.",
        highlight=False,
    )


def _size(text: str) -> Size:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"size must be FxHxW, such as 21x60x104, found {text!r}")
    frames, height, width = map(int, parts)
    return frames, height, width
