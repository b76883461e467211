"""A front as files: a plan for each of a few speed-ups, the numbers, and a page with their chart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers_accel.evals.report.charts import expected_front
from diffusers_accel.evals.report.render import front_page
from diffusers_accel.files import Kind, Schema, prepare_folder, save_document, write_whole
from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.profile import Profile
from diffusers_accel.tune.front import Front

KIND = Kind("diffusers_accel.front", 1, "write it again with --pareto")
PREDICTED = (
    "All of this is predicted: by the times of kernels and by errors that add up. None of these plans has made a clip, so use "
    "the numbers to choose what to try, and measure that with diffusers-accel report."
)
COLUMNS = ("plan", "expected speed-up", "expected error", "steps computed", "density", "gap")


class _Plan(Schema, frozen=True):
    file: str
    asked: float
    speedup: float
    error: float
    heads_error: float
    computed: int | None
    density: float
    gap: float | None


class _File(Schema, frozen=True):
    predicted: bool
    device: str
    curves: dict[str, tuple[tuple[float, float], ...]]
    plans: tuple[_Plan, ...]
    config: dict[str, Any]


def save_front(front: Front, profile: Profile, folder: str | os.PathLike[str], correct: bool = False) -> Path:
    """Writes a plan file for each speed-up, then front.json (expected speed-ups and errors; those of the curves too), and a page,
    front.html, which needs nothing else. Files of the same names are replaced, others stay.

    Args:
        profile: of which the front was made.
        correct: the plans subtract each head's mean error; what is expected is so without that.

    Returns:
        The page's path.

    Raises:
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    prepare_folder(folder)
    rows = []
    for asked, found in front.plans.items():
        name = f"plan-{asked:g}x.json"
        profile.plan(found, Budget.speedup(asked), correct).save(folder / name)
        rows.append(_row(name, asked, found))
    content = _File(
        predicted=True,
        device=profile.cost.device,
        curves=front.curves,
        plans=tuple(rows),
        config=profile.scores.config,
    )
    write_whole(folder / "front.html", _page(front, rows, profile.cost.device).encode())
    save_document(folder / "front.json", KIND, content)
    return folder / "front.html"


def _row(name: str, asked: float, found: Assignment) -> _Plan:
    computed = len(found.steps.computed) if found.steps else None
    return _Plan(
        file=name,
        asked=asked,
        speedup=found.speedup,
        error=found.total(),
        heads_error=found.heads_error,
        computed=computed,
        density=found.density,
        gap=found.gap,
    )


def _page(front: Front, rows: list[_Plan], device: str) -> str:
    chart = expected_front(front.curves, [(row.speedup, row.error) for row in rows])
    return front_page(chart, PREDICTED, device, COLUMNS, [_cells(row) for row in rows])


def _cells(row: _Plan) -> tuple[str, ...]:
    steps = "all" if row.computed is None else str(row.computed)
    gap = "not known" if row.gap is None else f"{row.gap:.2%}"
    return row.file, f"{row.speedup:.2f}x", f"{row.error:.3g}", steps, f"{row.density:.3f}", gap
