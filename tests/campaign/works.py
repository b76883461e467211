"""What runs in forks: each is one function of a folder, to which it can note what it has done."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.export import AskedReport, export
from diffusers_accel.evals.kept import KeptClips
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.toy.training.run_state import RunState
from diffusers_accel.methods import AxisOrder, Draft, Kept, Method, Patches
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.gates import calibrate_gates
from diffusers_accel.search.scores import Scores
from tests.campaign.tiny_runs import CALL, CANDIDATES, MODELS, numbered_plans, reading_wan
from tests.campaign.verdict import outcome
from tests.evals import synthetic
from tests.kernels.test_bench import row as bench_row
from tests.search.test_assign import random_scores

Note = Callable[[str], None]

PROMPTS = ("a red circle", "a blue square")


@cache
def pipeline() -> Any:
    return reading_wan()


def search(folder: Path, note: Note) -> None:
    stock = Scores.save

    def save(self: Scores, path: Any) -> None:
        stock(self, path)
        note(f"kept runs {len(self.runs)}")

    Scores.save = save  # type: ignore[method-assign]
    plan_search.COST_SECONDS = 0.02
    plan_search.search_plan(
        pipeline(),
        PROMPTS,
        call=CALL,
        budget=Budget.density(0.6),
        candidates=CANDIDATES,
        rows=16,
        out=folder / "plan.json",
        progress=False,
    )


def calibrate(folder: Path, note: Note) -> None:
    methods = (Method(Patches(), Draft(0.4), rest=Kept(2)), Method(AxisOrder("hwf"), Draft(0.5), rest=Kept(3)))
    before = [Plan.uniform(method, "wan", MODELS) for method in methods]
    for number, plan in enumerate(before):
        gated = calibrate_gates(pipeline(), plan, PROMPTS, call=CALL, progress=False)
        gated.save(folder / f"gated{number}.json")


def report(folder: Path, note: Note) -> None:
    stock = KeptClips.save

    def save(self: KeptClips, number: int, record: ClipRecord) -> None:
        stock(self, number, record)
        note(f"kept clips {number + 1}")

    KeptClips.save = save  # type: ignore[method-assign]
    METRICS["films"] = synthetic.FILMS  # so that there are films to lose
    subjects = {"draft": ("draft", {"density": 0.5})}
    found = compare(
        pipeline(),
        subjects,
        PROMPTS,
        call=CALL,
        metrics=("psnr", "films"),
        show=1,
        progress=False,
        keep=folder / "report.clips",
    )
    found.save(folder / "report")


def save_plans(folder: Path, note: Note, number: int, times: int) -> None:
    plan = numbered_plans()[number]
    for _ in range(times):
        plan.save(folder / "plan.json")


def fill(folder: Path, note: Note, writer: str, limit: int | None) -> None:
    """Writes small files, then larger ones to a full disk (a limit: to files that may not grow); notes what was said."""
    path = folder / NAMES[writer]
    WRITERS[writer](path, False)
    before = content(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    else:
        use_all_space(folder.parent / "filler")
    said = outcome(lambda: WRITERS[writer](path, True))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (folder.parent / "filler").unlink(missing_ok=True)
    after = content(folder)
    if writer == "rows" and after[path.name].startswith(before[path.name]) and bench.rows.read(path):
        del before[path.name], after[path.name]  # what was measured before the disk was full is kept
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    note(json.dumps({"refused": said.refused, "raw": said.raw, "changed": changed}))


def content(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def use_all_space(path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    for size in (2**16, 2**10, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(size))
    os.close(descriptor)


def write_plan(path: Path, large: bool) -> None:
    numbered_plans()[large].save(path)


def write_scores(path: Path, large: bool) -> None:
    random_scores(layers=40 if large else 3).save(path)


def write_cost(path: Path, large: bool) -> None:
    times = {"transformer": (1.0,) * (3000 if large else 3)}
    Cost(times, times, "cpu", 9, 1, 3).save(path)


def write_report(path: Path, large: bool) -> None:
    synthetic.report({"plan": [1.3] * 3 if large else [1.2]}).save(path)


def write_rows(path: Path, large: bool) -> None:
    with bench.rows.appending(path) as append:
        for seed in range(40 if large else 2):
            append(bench_row(seed=seed))


def write_state(path: Path, large: bool) -> None:
    run = RunState(path, "transformer", 1.0, 0)
    run.save(average={"count": 1, "values": {"a": torch.zeros(30_000 if large else 3)}})


def write_exported(path: Path, large: bool) -> None:
    asked = AskedReport("toy", [("", ["draft"])], [f"prompt {number}" for number in range(1000 if large else 1)], [])
    provenance = {"pipeline": {"model": ""}, "versions": {"python": "3.11.1"}}
    export(path / ("large" if large else "small"), asked, provenance)


WRITERS: dict[str, Callable[[Path, bool], None]] = {
    "plan": write_plan,
    "scores": write_scores,
    "cost": write_cost,
    "report": write_report,
    "rows": write_rows,
    "state": write_state,
    "exported": write_exported,
}
NAMES = {
    "plan": "plan.json",
    "scores": "s.safetensors",
    "cost": "cost.json",
    "report": "report",
    "rows": "rows.jsonl",
    "state": "state",
    "exported": "exported",
}
WORKS: dict[str, Callable[..., None]] = {
    "search": search,
    "calibrate": calibrate,
    "report": report,
    "save_plans": save_plans,
    "fill": fill,
}
