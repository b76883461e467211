"""`kill -9` at every change of a file: begun again, the work ends as if nothing had happened, and nothing is done twice."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.kept import CLIPS
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.plan import Plan
from diffusers_accel.plan.file import plain
from diffusers_accel.search.scores import Scores
from tests.campaign.forks import Ending, Forks
from tests.campaign.sound import picture_of_tensors, same
from tests.campaign.tally import Campaign

TIMES = re.compile(r"time|warm_up|middles|speed|seconds|share|ratio|drift|memory|rounds|layers|warnings|^ms$")


def plans(folder: Path) -> Any:
    """The plans of a folder but for what the clock says."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".cost.json"):
            continue
        plan = Plan.load(path)
        found[path.name] = without_times(plain(plan)), picture_of_tensors(plan.tensors)
    return found


def scores(folder: Path) -> Any:
    found = Scores.load(folder / "plan.scores.safetensors")
    return picture_of_tensors(found.sums), found.impacts, [done.prompt for done in found.runs]


def rows(folder: Path) -> Any:
    """The rows of a report but for what the clock says."""
    kept = [row for row in read_rows(folder / "report" / "report.json") if not TIMES.search(row.metric)]
    return sorted(repr((row.metric, row.subject, row.clip, row.value, row.spread, row.note)) for row in kept)


def without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_times(value) for key, value in data.items() if not TIMES.search(key)}
    return [without_times(each) for each in data] if isinstance(data, list) else data


RESULTS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "search": (plans, scores),
    "calibrate": (plans,),
    "report": (rows,),
}


@pytest.mark.parametrize(("work", "short", "long"), [("search", 5, 1000), ("calibrate", 2, 1000), ("report", 5, 1000)])
def test_kills(work: str, short: int, long: int, warm: Forks, tmp_path: Path, campaign: Campaign) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    undisturbed = warm.run(work, whole, die=None)
    assert undisturbed.code == 0, undisturbed.output
    expected = [result(whole) for result in RESULTS[work]]
    steps = len(undisturbed.steps)
    assert steps > 2, undisturbed.notes
    random = campaign.random("kills", work)
    asked = campaign.many(short, long)
    numbers = sorted(random.sample(range(1, steps + 1), min(asked, steps)))
    wrong = []
    for number in numbers:
        where = undisturbed.steps[number - 1]
        found = [
            f"at {number} of {steps}, {where}: {each}" for each in killed(work, warm, tmp_path, number, expected, whole)
        ]
        wrong += found
        campaign.count(f"killed: {work}", "tried")
        campaign.count(f"killed: {work}", "losses" if found else "as before")
        assert len(wrong) < 5, "\n".join(wrong)
    assert not wrong, f"seed {campaign.seed}:\n" + "\n".join(wrong)


def killed(work: str, warm: Forks, tmp_path: Path, number: int, expected: list[Any], whole: Path) -> list[str]:
    """What is wrong after a kill at the `number`-th change of a file and a second run to the end."""
    folder = tmp_path / "killed"
    folder.mkdir()
    try:
        first = warm.run(work, folder, die=number)
        assert first.signal == 9, first.output
        wrong = lost(work, folder, first)
        for old in folder.rglob(".*"):  # an hour later: what is younger might belong to somebody who still writes
            os.utime(old, (time.time() - 3600,) * 2)
        finished = (folder / "report").exists()  # a comparison that is written is not kept any longer
        again = warm.run(work, folder)
        if again.code:
            return [*wrong, f"does not go on: {again.output[-600:]}"]
        wrong += [] if finished else repeated(work, first, again)
        found = [result(folder) for result in RESULTS[work]]
        wrong += ["another result"] * (not all(map(same, found, expected)))
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        usual = {path.relative_to(whole).as_posix() for path in whole.rglob("*")}
        if more := {name for name in names - usual if not name.endswith(".safetensors")}:
            wrong.append(f"left behind: {sorted(more)}")
        return wrong
    finally:
        shutil.rmtree(folder)


def lost(work: str, folder: Path, first: Ending) -> list[str]:
    """What the killed run had said to be kept and is not there."""
    if work == "search":
        path = folder / "plan.scores.safetensors"
        found = len(Scores.load(path).runs) if path.exists() else 0
        return [f"lost {first.kept('runs') - found} runs"] * (found < first.kept("runs"))
    if work == "report" and not (folder / "report").exists():
        found = len([ClipRecord.load(path) for path in folder.glob(f"report.clips/{CLIPS}")])
        return [f"lost {first.kept('clips') - found} clips"] * (found < first.kept("clips"))
    return []


def repeated(work: str, first: Ending, again: Ending) -> list[str]:
    """What was kept and has been measured once more."""
    what = {"search": "runs", "report": "clips"}.get(work)
    numbers = [int(note.split()[2]) for note in again.notes if what and note.startswith(f"kept {what} ")]
    kept = first.kept(what) if what else 0
    if not numbers or numbers[0] >= kept:
        return []
    return [f"{what} {numbers[0]} again, of {kept} that were kept"]
