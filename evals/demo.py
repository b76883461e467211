"""The demonstration: search a plan for the shapes model on this machine, generate with and without it, and report.

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
from diffusers_accel.evals import shapes
from diffusers_accel.evals.compare import PlanLike, compare
from diffusers_accel.evals.generate import SharedNoise, attribute, generate
from diffusers_accel.evals.report import Report
from diffusers_accel.evals.shapes.weights_folder import weights_digest
from diffusers_accel.plan import Plan
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan

MINUTES = 8.0
SPEEDUP = 1.4  # asked of the search
DENSITY = 0.35  # asked instead, where that is out of reach
SEARCH_PROMPTS = 2
RESERVE_S = 30.0  # for the page, and for a machine that slows down
TRIAL_STEPS = 2
# (prompts, with the unsearched method too): the first that fits into the time left is run.
CHOICES = ((4, True), (4, False), (3, False), (2, False), (1, False))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for plan.json and the report")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time budget; fewer clips are made where it is short"
    )
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    start = time.monotonic()
    console.print(
        f"[bold]diffusers_accel demo[/bold]: search a plan (2 to 3 minutes), then dense against patched; at most about "
        f"{options.minutes:g} minutes on 2 idle cores.",
        soft_wrap=True,
    )
    if (busy := _load_average()) and busy > 1:
        console.print(
            f"This machine is not idle (load average {busy:.1f}): it will take longer, and times will be less exact.",
            soft_wrap=True,
        )
    pipe = shapes.load_pipeline()
    plan = find_plan(pipe, options.out, console)
    left = options.minutes * 60 - (time.monotonic() - start) - RESERVE_S
    report = measure(pipe, plan, left, console)
    page = report.save(options.out)
    minutes = (time.monotonic() - start) / 60
    console.print(report.table())
    console.print(report.headline, soft_wrap=True, markup=False)
    console.print(
        f"{minutes:.1f} of {options.minutes:g} minutes. Plan: {options.out / 'plan.json'}  Page: {page}", soft_wrap=True
    )


def find_plan(pipe: Any, out: Path, console: Console) -> Plan:
    """Searches a plan and saves it as `out`/plan.json; what an interrupted search measured is used again."""
    digest = weights_digest(shapes.verify_weights())
    out.mkdir(parents=True, exist_ok=True)
    scores = out / f"search-{__version__}-{digest[:12]}.safetensors"
    prompts = shapes.held_out_prompts(8, seed=0)[:SEARCH_PROMPTS]

    def search(budget: Budget) -> Plan:
        return search_plan(pipe, prompts, call=shapes.CALL, budget=budget, scores_path=scores)

    try:
        plan = search(Budget.speedup(SPEEDUP))
    except ValueError as reason:
        if "out of reach" not in str(reason):
            raise
        console.print(f"{reason}. Taking the best plan at density {DENSITY:g} instead.", soft_wrap=True, markup=False)
        plan = search(Budget.density(DENSITY))
    plan.save(out / "plan.json")
    return plan


def measure(pipe: Any, plan: Plan, seconds: float, console: Console) -> Report:
    """Compares as many held-out prompts as the time allows, none of which the search has seen."""
    held_out = shapes.held_out_prompts(8, seed=0)[4:]
    prompts, both = fit(seconds, clip_seconds(pipe, held_out[0]))
    subjects: dict[str, PlanLike] = {"searched plan": plan}
    if both:
        subjects["pattern (no search)"] = "pattern"
    names = " and ".join(subjects)
    console.print(f"Comparing on {prompts} prompt{'s' * (prompts > 1)}: dense, {names}, dense again.", markup=False)
    return compare(pipe, subjects, held_out[:prompts], call=shapes.CALL)


def clip_seconds(pipe: Any, prompt: str) -> float:
    """About how long a dense clip takes here: a trial of a few steps, as if all its time were in steps."""
    with attribute(pipe, "_progress_bar_config", {"disable": True}):
        trial = generate(pipe, prompt, SharedNoise(0), {**shapes.CALL, "num_inference_steps": TRIAL_STEPS})
    return trial.milliseconds / 1e3 * shapes.CALL["num_inference_steps"] / TRIAL_STEPS


def fit(seconds: float, clip: float) -> tuple[int, bool]:
    """(prompts, with the unsearched method too) for the time left, given the seconds of a dense clip; at least one prompt."""
    for prompts, both in CHOICES:
        patched = 0.8 * (1 + both)  # a patched clip costs less than a dense one
        warm_up_and_attention = 1.5 + 0.2 * both
        if clip * (prompts * (2 + patched) + warm_up_and_attention) <= seconds:
            return prompts, both
    return CHOICES[-1]


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run it again and the search goes on from where it was")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
