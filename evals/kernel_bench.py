"""Times the attention kernels on this device against its best dense attention: `diffusers-accel bench`.

The points and their order are in `kernel_points`, what each of them does in `kernel_works`, the peers in `kernel_peers`,
how they are measured in `kernel_worker`, and the process that survives a kernel that hangs in `kernel_watch`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_accel.evals import kernel_report, kernel_rows
from diffusers_accel.evals.kernel_inputs import INPUTS, PATTERNS, SHAPES
from diffusers_accel.evals.kernel_peers import PEERS
from diffusers_accel.evals.kernel_points import DTYPES, OPERATORS, Row
from diffusers_accel.evals.kernel_points import settings as make_settings
from diffusers_accel.evals.kernel_watch import COMMAND, watched
from diffusers_accel.kernels.attention import IMPLEMENTATIONS, PRECISIONS

MINUTES = 9.0  # leaves one of ten for what is around it
# Seconds in which a point has to be done, its compilation included.
TIMEOUT = {"cuda": 60.0, "cpu": 600.0}


def run(
    device: torch.device | str,
    *,
    minutes: float = MINUTES,
    timeout: float | None = None,
    out: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    command: Sequence[str] = COMMAND,
    **asked: Any,
) -> list[Row]:
    """Measures, in a process of its own, what is asked for; one row of plain JSON values each, times in ms.

    Args:
        device: where to run.
        minutes: stop after so long, wherever it is; 0 only reads what is in `out`.
        timeout: seconds after which a point that says nothing counts as hung; None is 60 on a GPU and 600 on a CPU.
        out: a file of JSON lines. Rows that it holds are not measured again, others are appended when they are done.
        on_row: called with each row as it is done.
        command: the worker that is started.
        **asked: as of `kernel_points.settings`.

    Returns:
        The rows of the file and the new ones, the last of each point.

    Raises:
        ValueError: an unknown name, a density outside 0..1, or rows in `out` from another machine or state of the kernels.
        RuntimeError: the process that measures cannot start or cannot be ended; the rows so far are in the file.
    """
    asked_for = make_settings(device, **asked)
    if not minutes >= 0:
        raise ValueError(f"minutes must be 0 or more, found {minutes}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, found {timeout}")
    kind = torch.device(device).type
    if kind == "cuda" and minutes > 0 and not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no GPU here; take --device cpu, or --minutes 0 to show rows")
    end = time.monotonic() + 60 * minutes
    rows = kernel_rows.read(out) if out else []
    there = list(rows)

    def on_hello(environment: Row) -> None:
        if out:
            kernel_rows.check_same(out, there, environment)

    if timeout is None:
        timeout = TIMEOUT[kind]
    for row in watched(asked_for, there, end, timeout, on_hello, command):
        if out:
            kernel_rows.append(out, row)
        rows.append(row)
        on_row(row)
    return kernel_rows.latest(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `diffusers-accel bench` and `python -m diffusers_accel.evals.kernel_bench`."""
    from rich.console import Console

    options = vars(_parser().parse_args(sys.argv[1:] if arguments is None else arguments))
    report: Path | None = options.pop("report")
    if options["out"]:
        options["out"].parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    measured: list[Row] = []

    def on_row(row: Row) -> None:
        measured.append(row)
        words = [row["operator"], row["impl"], row["shape"], row["input_kind"], row["pattern"]]
        words += [row["density_requested"], row["precision"]]
        time_ms = f"{row['t_med_ms']:.3f} ms, " if "t_med_ms" in row else ""
        console.print(f"{' '.join(str(word) for word in words if word is not None)}: {time_ms}{row['status']}")

    failure: RuntimeError | None = None
    try:
        rows = run(**options, on_row=on_row)
    except RuntimeError as error:  # what was measured before it is shown all the same
        failure, rows = error, kernel_rows.latest(kernel_rows.read(options["out"]) if options["out"] else measured)
    for table in kernel_report.tables(rows):
        Console().print(table)
    for reason in kernel_report.not_measured(rows):
        console.print(reason)
    if report:
        console.print(str(kernel_report.save(rows, report)))
    if failure:
        raise failure


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="diffusers-accel bench",
        description="Times the attention kernels on this device against its best dense attention.",
        epilog="Lists are separated by commas. Without a GPU the defaults are small enough for a laptop. The most telling "
        "rows come first; run again with the same --out to go on.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=words, help=f"from {', '.join(SHAPES)}")
    parser.add_argument("--densities", type=numbers, help="share of block pairs, 0..1")
    parser.add_argument("--patterns", type=words, help=f"from {', '.join(PATTERNS)}")
    parser.add_argument("--operators", type=words, help=f"from {', '.join(OPERATORS)}")
    parser.add_argument("--dtype", default="bf16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--inputs", type=words, help=f"from {', '.join(INPUTS)}")
    parser.add_argument("--precisions", type=words, help=f"from {', '.join(PRECISIONS)}")
    names = ", ".join((*IMPLEMENTATIONS, *PEERS["attention"]))
    parser.add_argument("--impls", type=words, help=f"of sparse attention, from {names}; all, if not given")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rep-ms", type=float, help="repeat each call for so long (300 on a GPU, 1500 on a CPU)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after so long; 0 shows what is in --out")
    parser.add_argument(
        "--timeout", type=float, help="seconds until a point counts as hung (60 on a GPU, 600 on a CPU)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="append each row when it is done; go on behind them"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write kernels.md and kernels.png there")
    return parser


if __name__ == "__main__":
    main()
