"""The demonstration: search a plan for the toy model on this machine, compare it and every named method with dense.

python -m diffusers_accel.evals.demo --out demo
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from diffusers_accel import __version__
from diffusers_accel.evals import toy
from diffusers_accel.evals.compare import PlanLike, compare
from diffusers_accel.evals.generate import SharedNoise, attribute, generate
from diffusers_accel.evals.report import Report, check_report_folder
from diffusers_accel.evals.tally import WARM_UP_STEPS
from diffusers_accel.evals.toy.weights_folder import weights_digest
from diffusers_accel.files import prepare_folder, printable
from diffusers_accel.plan import Plan
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan

MINUTES = 10.0
REPORT = "report"  # folder in the demo's: it is replaced as a whole
SPEEDUP = 1.4  # asked of the search
DENSITY = 0.35  # asked instead, where that is out of reach
SEARCH_PROMPTS = 2
RESERVE_S = 30.0  # for the page, and for a machine that slows down
TRIAL_STEPS = 2  # at least 2: from the end of the first to that of the last
NAMES = ("pattern", "draft", "cached", "reordered")  # with their defaults, beside the searched plan
# (prompts, names): the first that fits into the time left is run. All subjects get the same prompts, so that their numbers
# can be compared; so prompts go first and names last.
CHOICES = ((4, 4), (3, 4), (2, 4), (1, 4), (1, 2), (1, 0))
PATCHED = 0.8  # of a dense clip's time, its metrics and films included
FLOOR = 2.0  # the same of the floor: on a CPU its attention, which is two thirds of a clip, takes 2.5 times as long


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for plan.json and, in report/, the report"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time budget; fewer clips are made where it is short"
    )
    options = parser.parse_args(arguments)
    prepare_folder(options.out)
    check_report_folder(options.out / REPORT)
    console = Console(highlight=False, markup=False)
    start = time.monotonic()
    console.print("diffusers_accel demo", style="bold")
    console.print(
        f"Search a plan (3 to 4 minutes), then dense against that plan and the methods "
        f"{', '.join(NAMES)}; at most about {options.minutes:g} minutes on 2 idle cores.",
        soft_wrap=True,
    )
    if (busy := _load_average()) and busy > 1:
        console.print(
            f"This machine is not idle (load average {busy:.1f}): it will take longer, and times will be less exact.",
            soft_wrap=True,
        )
    pipe = toy.load_pipeline()
    plan = find_plan(pipe, options.out, console)
    left = options.minutes * 60 - (time.monotonic() - start) - RESERVE_S
    report = measure(pipe, plan, left, console)
    page = report.save(options.out / REPORT)
    minutes = (time.monotonic() - start) / 60
    console.print(report.table())
    console.print(report.headline, soft_wrap=True)
    plan_file, page_file = printable(options.out / "plan.json"), printable(page)
    console.print(f"{minutes:.1f} of {options.minutes:g} minutes. Plan: {plan_file}  Page: {page_file}", soft_wrap=True)


def find_plan(pipe: Any, out: Path, console: Console) -> Plan:
    """Searches a plan and saves it as `out`/plan.json; what an interrupted search measured is used again."""
    digest = weights_digest(toy.verify_weights())
    scores = out / f"search-{__version__}-{digest[:12]}.safetensors"
    prompts = toy.held_out_prompts(8, seed=0)[:SEARCH_PROMPTS]

    def search(budget: Budget) -> Plan:
        return search_plan(pipe, prompts, call=toy.CALL, budget=budget, scores_path=scores)

    try:
        plan = search(Budget.speedup(SPEEDUP))
    except ValueError as reason:
        if "out of reach" not in str(reason):
            raise
        console.print(f"{printable(reason)}. Taking the best plan at density {DENSITY:g} instead.", soft_wrap=True)
        plan = search(Budget.density(DENSITY))
    plan.save(out / "plan.json")
    return plan


def measure(pipe: Any, plan: Plan, seconds: float, console: Console) -> Report:
    """Compares with the plan, and with as many names on as many held-out prompts as the time allows.

    The search has seen none of these prompts.
    """
    held_out = toy.held_out_prompts(8, seed=0)[4:]
    clip = clip_seconds(pipe, held_out[0])
    prompts, names = fit(seconds, clip)
    subjects: dict[str, PlanLike] = {"searched plan": plan, **{name: name for name in NAMES[:names]}}
    console.print(
        f"Comparing on {prompts} prompt{'s' * (prompts > 1)}: dense, {', '.join(subjects)}, the floor (dense in another "
        "exact kernel), dense again.",
        soft_wrap=True,
    )
    if left_out := NAMES[names:]:
        console.print(
            f"No time left for {', '.join(left_out)}: run it again, what the search measured is kept.", soft_wrap=True
        )
    return compare(pipe, subjects, held_out[:prompts], call=toy.CALL)


def clip_seconds(pipe: Any, prompt: str) -> float:
    """About how long a dense clip takes here: a trial of a few steps, and the time of a step for each of the others."""
    ends: list[float] = []
    with attribute(pipe, "_progress_bar_config", {"disable": True}):
        trial = generate(
            pipe,
            prompt,
            SharedNoise(0),
            {**toy.CALL, "num_inference_steps": TRIAL_STEPS},
            lambda: ends.append(time.perf_counter()),
        )
    step = (ends[-1] - ends[0]) / (TRIAL_STEPS - 1)
    return trial.milliseconds / 1e3 + step * (toy.CALL["num_inference_steps"] - TRIAL_STEPS)


def fit(seconds: float, clip: float) -> tuple[int, int]:
    """(prompts, names) for the time left, given the seconds of a dense clip; at least the searched plan on one prompt."""
    return next((choice for choice in CHOICES if clip * cost(*choice) <= seconds), CHOICES[-1])


def cost(prompts: int, names: int) -> float:
    """What a comparison takes, in dense clips: warm-up, for each prompt dense, patched, the floor and dense, a dense run under a
    patch."""
    subjects = 1 + names
    warm_up = WARM_UP_STEPS / toy.CALL["num_inference_steps"] * (1 + FLOOR + subjects)
    return warm_up + prompts * (2 + FLOOR + PATCHED * subjects) + 1


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run it again and the search goes on from where it was")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
