"""Times the attention kernels on this device against its best dense attention: `diffusers-accel bench`.

`points`: what is measured, and in which order. `inputs`: on which tokens and patterns. `works`: what each operator does,
and how its result is checked. `peers`: attention by others. `tiles`: the sweep of tile sizes. `timing` and `worker`: how it
is measured. `watch`: the process that survives a kernel that hangs. `rows`: the file of what was measured. `report`: its
tables and plot. `once`: points without times, for a profiler or a sanitizer.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from diffusers_accel.evals.kernel_bench import report, rows
from diffusers_accel.evals.kernel_bench.points import BenchSettings, Row, given_up, key, left, processes, settings
from diffusers_accel.evals.kernel_bench.watch import watched
from diffusers_accel.files import WriteError, prepare_file, prepare_folder, printable
from diffusers_accel.support.device import not_there
from diffusers_accel.support.interrupted import Interrupted
from diffusers_accel.support.suggest import did_you_mean, did_you_mean_file

MINUTES = 9.0  # leaves one of ten for what is around it
# Seconds in which a point has to be done, its compilation included.
TIMEOUT = {"cuda": 20.0, "cpu": 600.0}


def run(
    device: torch.device | str,
    *,
    minutes: float = MINUTES,
    timeout: float | None = None,
    out: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    **asked: Any,
) -> list[Row]:
    """Measures, in a process of its own, what is asked for; one row of plain JSON values each, times in ms.

    Args:
        device: where to run.
        minutes: stop after so long, wherever it is; 0 only reads what is in `out`.
        timeout: seconds after which a point that says nothing counts as hung; None is 20 on a GPU and 600 on a CPU. Peers
            that compile their own kernels have at least `Peer.seconds`.
        out: a file of JSON lines. Rows that it holds are not measured again, others are appended when they are done.
        on_row: called with each row as it is done.
        **asked: as of `points.settings`.

    Returns:
        The rows of the file and the new ones, the last of each point.

    Raises:
        FileNotFoundError: `minutes` is 0 and there is no file.
        WriteError: `out` cannot be written, or no more; the rows so far are in it.
        ValueError: an unknown name, a number out of range, rows in `out` from another machine or state of the kernels, or
            another run that measures into it.
        RuntimeError: the process that measures cannot start or cannot be ended; the rows so far are in the file.
    """
    asked_for = settings(device, **asked)
    if not minutes >= 0:
        raise ValueError(f"minutes must be 0 or more, found {minutes}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, found {timeout}")
    if minutes == 0:
        return _measured(out)
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no GPU here; take --device cpu, or --minutes 0 to show rows")
    if reason := not_there(torch.device(device)):
        raise ValueError(f"device {device}: {reason}; take another one")
    if out:
        prepare_file(out)
    end = time.monotonic() + 60 * minutes
    with rows.appending(out) if out else contextlib.nullcontext() as append:
        there = rows.read(out) if out else []
        found = list(there)

        def on_hello(environment: Row) -> None:
            if out:
                rows.check_same(out, there, environment)

        for row in watched(asked_for, there, end, timeout or TIMEOUT[kind], on_hello):
            if append:
                append(row)
            found.append(row)
            on_row(row)
    return rows.latest(found)


def left_over(device: torch.device | str, out: Path, **asked: Any) -> int:
    """How many points of such a run have no row in `out`, and are not given up for one that has."""
    found, asked_for = rows.latest(rows.read(out)), settings(device, **asked)
    avoid = {lost for row in found for lost in given_up(row)}
    done = {key(row) for row in found}
    return sum(1 for process in processes(asked_for) for _ in left(asked_for, process, done, avoid))


def _measured(out: Path | None) -> list[Row]:
    """What a file holds, where nothing is to be measured."""
    if out is None:
        raise ValueError("minutes: 0 shows the rows of a file; expected one as out, found none")
    if not out.exists():
        raise FileNotFoundError(
            f"{printable(out)}: expected rows of the benchmark, found nothing there{did_you_mean_file(out)}"
        )
    return rows.latest(rows.read(out))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `diffusers-accel bench`.

    Raises:
        Interrupted: Ctrl-C, where `--out` keeps what was measured.
        ValueError: as of `run`, or the options are none.
        WriteError: `--out` or `--report` cannot be written; before anything is measured.
    """
    options = vars(_parser().parse_args(sys.argv[1:] if arguments is None else arguments))
    folder: Path | None = options.pop("report")
    out: Path | None = options["out"]
    if folder:
        prepare_folder(folder)
    measured: list[Row] = []

    def on_row(row: Row) -> None:
        measured.append(row)
        names = ("operator", "impl", "shape", "input_kind", "pattern", "density_requested", "precision")
        time_ms = f"{row['t_med_ms']:.3f} ms, " if "t_med_ms" in row else ""
        words = " ".join(str(row[name]) for name in names if row[name] is not None)
        print(f"{words}: {time_ms}{row['status']}", file=sys.stderr, flush=True)

    failure: RuntimeError | WriteError | None = None
    try:
        found = run(**options, on_row=on_row)
    except (RuntimeError, WriteError) as error:  # what was measured before it is shown all the same
        if isinstance(error, WriteError) and not measured:
            raise
        failure, found = error, rows.latest(rows.read(out) if out else measured)
    except KeyboardInterrupt:
        if out is None:
            raise
        raise Interrupted(f"{len(measured)} rows were measured now, and all of them are in {out}") from None
    print(report.markdown(found))
    if folder:
        print(report.save(found, folder), file=sys.stderr)
    if failure:
        raise failure


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffusers-accel bench",
        description="Times the attention kernels on this device against its best dense attention.",
        epilog="Lists are separated by commas. Without a GPU the defaults are small enough for a laptop. The most telling "
        "rows come first; run again with the same --out to go on.",
    )
    for entry in fields(BenchSettings):
        option = entry.metadata
        flag, text = f"--{entry.name.replace('_', '-')}", option["text"]
        if option["kind"] is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            if option["names"]:
                text += f"; from {', '.join(option['names'])}"
            parser.add_argument(flag, type=_list_of(option["kind"]) if option["many"] else option["kind"], help=text)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after so long; 0 shows what is in --out")
    parser.add_argument(
        "--timeout", type=float, help="seconds until a point counts as hung: 20 on a GPU, 600 on a CPU, if not given"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append each row when done; go on behind them")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write kernels.md, kernels.png and tiles.json there"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, instead of printing a screen of usage and exiting."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= 300 else f"{message[:300]} ..."
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        meant = did_you_mean(unknown[1], re.findall(r"--[\w-]+", self.format_help())) if unknown else ""
        raise ValueError(f"bench: {message}{meant}; diffusers-accel bench --help lists all")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(word.strip()) for word in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in messages
    return parse
