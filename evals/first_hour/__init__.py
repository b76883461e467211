"""The first minutes on a rented GPU: `python -m diffusers_accel.evals.first_hour --minutes 9 --out DIR`.

`stages`: what is done, from tests to profiles. `running`: a command with a limit that holds, under `guard`, which ends it when
we are gone. `summary`: what came of it. Started again with the same folder it goes on with what is unfinished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffusers_accel.evals.first_hour import summary
from diffusers_accel.evals.first_hour.running import run as run_command
from diffusers_accel.evals.first_hour.stages import HourStage, planned
from diffusers_accel.evals.first_hour.summary import Record
from diffusers_accel.files import only_writer, prepare_folder
from diffusers_accel.support.interrupted import Interrupted
from diffusers_accel.support.suggest import did_you_mean

MINUTES = 9.0  # leaves one of ten for what is around it
LEAST = 5.0  # seconds; with less no stage is begun


def run(
    todo: Sequence[HourStage],
    device: str,
    folder: Path,
    minutes: float,
    on_stage: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Does the stages one after the other, and never stops at one that fails.

    Each has its share of the time that is left, so that what one leaves over goes to those behind it. `summary.json` and
    `summary.md` in the folder are written anew before the first stage and after each.

    Args:
        todo: the stages. Those that an earlier run into this folder has done are not run again.
        device: "cuda" or "cpu".
        folder: where everything is written.
        minutes: after which nothing is running any more.
        on_stage: called with each record when it changes.

    Raises:
        FileError: another run writes into the folder, or what it holds is of something else.
        WriteError: the folder cannot be written.
        Interrupted: Ctrl-C; what the stages have written is kept.
    """
    end = time.monotonic() + 60 * minutes
    prepare_folder(folder)
    with only_writer(folder / "summary.json", "another run writes into this folder"):
        before = {record.name: record for record in summary.read(folder / "summary.json", device)}
        records = [before.pop(stage.name, Record(stage.name)) for stage in todo]
        others = list(before.values())  # of an earlier run with other stages

        def told(record: Record) -> None:
            summary.write(folder, device, [*records, *others])
            on_stage(record)

        waiting = [(stage, record) for stage, record in zip(todo, records, strict=True) if not record.is_done]
        summary.write(folder, device, [*records, *others])
        while waiting:
            stage, record = waiting[0]
            if reason := stage.missing():
                record.status, record.why = "skipped", reason
            else:
                seconds = (end - time.monotonic()) * stage.share / sum(each.share for each, _ in waiting)
                _do(stage, record, seconds, folder, told)
            waiting.pop(0)
            told(record)
    return records


def _do(stage: HourStage, record: Record, seconds: float, folder: Path, told: Callable[[Record], None]) -> None:
    """Runs one stage, and writes into its record what came of it."""
    if seconds < LEAST:
        record.status, record.why = "not begun", f"{max(seconds, 0):.0f} s were left for it"
        return
    log = folder / f"log-{stage.name}.txt"
    record.status, record.why = "running", ""
    told(record)
    begin = time.monotonic()
    try:
        ended = run_command(stage.command(seconds), log, seconds, stage.cwd or folder, stage.env)
    except KeyboardInterrupt:
        record.status, record.why = "interrupted", "by Ctrl-C"
        record.seconds += time.monotonic() - begin
        told(record)
        raise Interrupted(f"what the stages have written is kept in {folder}") from None
    except OSError as error:
        record.status, record.why = "failed", f"cannot be started: {error}"
        return
    record.seconds = round(record.seconds + ended.seconds, 1)
    record.wrote = [name for name in (*stage.writes, log.name) if (folder / name).exists()]
    words = summary.last_words(log)
    if ended.held:
        record.status, record.why = "held", ended.held
    elif ended.code is None:
        record.status, record.why = "out of time", f"ended after {ended.seconds:.0f} s; {words}"
    elif ended.code in stage.findings:
        record.status, record.why = "findings", f"{stage.findings[ended.code]}: {words}"
    elif ended.code != 0:
        record.status, record.why = "failed", f"exit code {ended.code}: {words}"
    elif left := stage.left():
        record.status, record.why = "unfinished", left
    else:
        record.status, record.why = "done", words if stage.name == "tests" else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 whatever the stages found, which the summary says.

    Raises:
        ValueError: the options are none, or there is no such device.
        FileError, WriteError, Interrupted: as of `run`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_accel.evals.first_hour",
        description="Tests, a sanitizer, a sweep of tiles, the kernel benchmark, the step benchmark and a profile, in one run "
        "that ends in time. Run again with the same folder it goes on with what is unfinished.",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing runs any more (9)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of everything")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run through all stages")
    parser.add_argument("--dry", action="store_const", const="cpu", dest="device", help="the same as --device cpu")
    parser.add_argument("--stages", help="only these, comma-separated")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if given.device not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, found {given.device!r}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch sees no GPU here; --device cpu is a dry run through all stages")
    if not given.minutes > 0:
        raise ValueError(f"minutes must be more than 0, found {given.minutes}")
    folder = given.out.absolute()
    todo = _chosen(planned(given.device, folder), given.stages)

    def on_stage(record: Record) -> None:
        print(f"{record.name}: {record.status}{f' ({record.why})' if record.why else ''}", file=sys.stderr, flush=True)

    run(todo, given.device, folder, given.minutes, on_stage)
    print(folder / "summary.md")
    return 0


def _chosen(found: list[HourStage], asked: str | None) -> list[HourStage]:
    if asked is None:
        return found
    names, known = [name.strip() for name in asked.split(",")], [stage.name for stage in found]
    if unknown := [name for name in names if name not in known]:
        words = f"found {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        raise ValueError(f"stages must be among {', '.join(known)}, {words}")
    return [stage for stage in found if stage.name in names]
