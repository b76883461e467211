"""What came of the stages, for people and for programs; written anew, whole, after every stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from diffusers_accel.evals.first_hour.stages import ROWS, STEPS
from diffusers_accel.evals.kernel_bench import report, rows, tiles
from diffusers_accel.evals.kernel_bench.worker import code
from diffusers_accel.evals.step_bench import rows_of as step_rows_of
from diffusers_accel.evals.step_bench import steps_markdown
from diffusers_accel.files import FileError, convert, encode_json, printable, read_json, write_together

MOST_ROWS = 40  # of the kernels' rows on the summary's page
DONE = ("done", "findings")  # stages that are not run again


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """One stage.

    Args:
        status: done; findings (it came to its end, and found something wrong); unfinished, failed, out of time, held,
            interrupted, running (it was killed with us), skipped, not begun.
        seconds: that it took, in all runs.
        why: the reason of a status, or what was found.
        wrote: files in the folder.
    """

    name: str
    status: str = "not begun"
    seconds: float = 0.0
    why: str = ""
    wrote: list[str] = []

    @property
    def is_done(self) -> bool:
        return self.status in DONE


class _File(msgspec.Struct, forbid_unknown_fields=True):
    device: str
    code: str
    stages: list[Record]
    steps: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    tiles: dict[str, Any] = {}


def read(path: Path, device: str) -> list[Record]:
    """The stages of an earlier run into the same folder; none where there was none.

    Raises:
        FileError: the file holds something else, or the run was on another kind of device or with other kernels.
    """
    if not path.exists():
        return []
    try:
        found: _File = convert(read_json(path), _File)
    except FileError as error:
        raise FileError(
            f"{printable(path)}: expected a summary of this command: {error}; name another --out"
        ) from error
    for what, expected, there in (("a device", device, found.device), ("kernels", code(), found.code)):
        if expected != there:
            raise FileError(
                f"{printable(path)}: expected stages on {what} {expected}, found {printable(there)[:40]}; name another --out"
            )
    return found.stages


def write(folder: Path, device: str, stages: Sequence[Record]) -> None:
    """Writes `summary.json` and `summary.md`, both or none, from the stages and the rows that there are.

    Raises:
        WriteError: they cannot be written; what was there is as it was.
    """
    kernels, kernels_wrong = _tried(lambda: rows.latest(rows.read(folder / ROWS)))
    steps, steps_wrong = _tried(lambda: step_rows_of(folder / STEPS))
    swept = tiles.table(kernels)
    attention = [row for row in kernels if row["operator"] == "attention" and "eta" in row][:MOST_ROWS]
    data = {
        "device": device,
        "code": code(),
        "stages": [msgspec.to_builtins(each) for each in stages],
        "steps": steps,
        "kernels": attention,
        "tiles": swept,
    }
    lines = ["# First hour", "", _place([*kernels, *steps]), ""]
    lines += [f"**{wrong}**\n" for wrong in (kernels_wrong, steps_wrong) if wrong]
    if any("ms_step" in row for row in steps):
        lines += ["## Steps of whole models", "", *steps_markdown(steps), ""]
    if attention:
        lines += report.section("Sparse attention", attention)
    lines += _tiles(swept)
    lines += ["## Stages", "", "| stage | status | seconds | why | wrote |", "| --- | --- | ---: | --- | --- |"]
    lines += [
        f"| {each.name} | {each.status} | {each.seconds:.0f} | {_cell(each.why)} | {', '.join(each.wrote)} |"
        for each in stages
    ]
    lines += [
        "",
        f"`{ROWS}` and `{STEPS}` hold every row, `kernels.md` all tables, `log-<stage>.txt` what a stage said.",
    ]
    path = folder / "summary.json"
    write_together({path: encode_json(path, data), folder / "summary.md": ("\n".join(lines) + "\n").encode()})


def last_words(log: Path) -> str:
    """What a log says at its end: pytest's count, else the last exception, else the last line."""
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lines = lines[-400:]
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in ", line)]
    raised = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception): )", line)]
    return printable((counts or raised or lines or [""])[-1])[:300]


def _tried(read_rows: Any) -> tuple[list[dict[str, Any]], str]:
    """Rows, or none and why: a file that cannot be read keeps nobody from the rest."""
    try:
        return read_rows(), ""
    except FileError as error:
        return [], printable(error)


def _place(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "Nothing has been measured yet."
    facts = {**found[0]["machine"], **found[0]["versions"], "revision": found[0].get("git_sha")}
    return "; ".join(f"{name} {printable(value)[:80]}" for name, value in facts.items() if value is not None) + "."


def _tiles(swept: dict[str, Any]) -> list[str]:
    if not swept["tables"]:
        return []
    lines = ["## Fastest tiles", ""]
    for name, entry in swept["tables"].items():
        times = ", ".join(f"{each['tile']} {each['ms']:g} ms" for each in entry["tiles"][:4])
        lines.append(f"- {name} ({' x '.join(entry['fields'])}): {times or 'none has a time'}")
    return [*lines, ""]


def _cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
