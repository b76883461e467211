"""Does mixing pay? One plan that mixes all methods against the best plan of each method alone, at equal time.

python -m diffusers_accel.evals.mixed --speedup 1.4 --prompts 8 --out mixed

One search of the toy model measures all candidates. From its scores a plan is made of each method alone and one of all,
at the same speed-up. What each plan really reaches is tried on the search's prompts, a prompt a round, and its budget
corrected by that. All plans are then compared on prompts that the search has not seen. Stopped and run again, it goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from diffusers_accel import __version__
from diffusers_accel.evals import toy
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.intervals import FEWEST
from diffusers_accel.evals.metrics.psnr import PSNR
from diffusers_accel.evals.report import Report, check_report_folder
from diffusers_accel.evals.report.pair_table import SPEED
from diffusers_accel.evals.report.words import TOO_FEW, basis
from diffusers_accel.evals.toy.weights_folder import weights_digest
from diffusers_accel.files import prepare_folder, write_whole
from diffusers_accel.plan import Plan
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import SETS, candidates
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.scores import Scores

SPEEDUP = 1.4
PROMPTS = 8  # the fewest that give an interval
SEARCH_PROMPTS = 4
ROUNDS = 2  # of correction
SAME_TIME = 0.03  # share by which measured times may differ and still be compared
MIXED, HIGHER = "mixed", "higher"
REPORT = "report"  # folder in that of the plans: it is replaced as a whole
PARTIAL = "report-{:g}.partial"  # of a speed-up: keeps the clips until the report is written
HEADINGS = ("plan", "expected speed-up", "measured", "density", "PSNR", "SSIM", "methods, by share of heads")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path(MIXED), help="folder for the plans and, in report/, the report"
    )
    parser.add_argument("--speedup", type=float, default=SPEEDUP, help="of a whole generation, asked of every plan")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="to compare on; none of them is searched with")
    parser.add_argument("--search-prompts", type=int, default=SEARCH_PROMPTS, help="to search with, 2 or more")
    options = parser.parse_args(arguments)
    if options.prompts < 1 or options.search_prompts < 2:
        raise ValueError(
            f"expected 1 prompt or more to compare on and 2 or more to search with, found {options.prompts} and "
            f"{options.search_prompts}"
        )
    prepare_folder(options.out)
    check_report_folder(options.out / REPORT)
    pipe = toy.load_pipeline()
    prompts = toy.held_out_prompts(options.search_prompts + options.prompts, seed=0)
    known, held_out = prompts[: options.search_prompts], prompts[options.search_prompts :]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    scores, cost = measured(pipe, known, options.out, options.speedup)
    plans, missing = find_plans(scores, cost, dict.fromkeys((MIXED, *SETS), options.speedup))
    if MIXED not in plans:
        raise ValueError(missing[MIXED])
    partial = options.out / PARTIAL.format(options.speedup)
    if partial.is_dir():  # of a comparison that was stopped, which goes on with its own plans
        files = {name: options.out / f"{name}.json" for name in (MIXED, *SETS)}
        plans = {name: Plan.load(path) for name, path in files.items() if path.exists()}
    else:
        for prompt in known[:ROUNDS]:
            console.print("A clip with each plan, to correct their budgets by what they reach.")
            tried = compare(pipe, plans, [prompt], call=toy.CALL, metrics=("psnr",), floor=False)
            plans = corrected(scores, cost, plans, tried, options.speedup)
        save(plans, options.out)
    report = compare(pipe, plans, held_out, call=toy.CALL, keep=partial)
    report.save(options.out / REPORT)
    missing = {name: reason for name, reason in missing.items() if name not in plans}
    text = summary(report, plans, missing, options.speedup)
    write_whole(options.out / "mixed.md", text.encode())
    console.print(text)


def save(plans: Mapping[str, Plan], out: Path) -> None:
    """Each under its name, and no other's of an earlier run."""
    for name in (MIXED, *SETS):
        path = out / f"{name}.json"
        if name in plans:
            plans[name].save(path)
        else:
            path.unlink(missing_ok=True)


def measured(pipe: Any, prompts: list[str], out: Path, speedup: float) -> tuple[Scores, Cost]:
    """What one search measures; an interrupted one goes on. A speed-up that not even the mixed plan reaches is refused."""
    digest = weights_digest(toy.verify_weights())
    path = out / f"search-{__version__}-{digest[:12]}.safetensors"
    budget = Budget.speedup(speedup)
    search_plan(pipe, prompts, call=toy.CALL, budget=budget, scores_path=path, step_caches=False)
    return Scores.load(path), Cost.load(path.with_suffix(".cost.json"))


def find_plans(scores: Scores, cost: Cost, speedups: Mapping[str, float]) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plan of each name ("mixed" or one of `SETS`) at its speed-up, and of those out of reach the reason."""
    plans, missing = {}, {}
    for name, speedup in speedups.items():
        budget = Budget.speedup(speedup)
        try:
            found = assign(scores, cost, budget, among=None if name == MIXED else alone(scores, name))
        except ValueError as reason:
            missing[name] = str(reason)
        else:
            plans[name] = make_plan(scores, cost, found, budget)
    return plans, missing


def alone(scores: Scores, name: str) -> tuple[Any, ...]:
    """The candidates of one method, at whatever densities were searched."""
    densities = sorted({method.select.expected_density(method.order) or 1.0 for method in scores.candidates})
    quantized = any(method.precision != "input" for method in scores.candidates)
    every = {each for density in densities for each in candidates([density], methods=[name], quantized=quantized)}
    return tuple(method for method in scores.candidates if method in every)


def corrected(scores: Scores, cost: Cost, plans: Mapping[str, Plan], tried: Report, speedup: float) -> dict[str, Plan]:
    """Plans that should really reach the speed-up: each asked for as much more than before as it fell short, or less; one
    for which that is out of reach stays as it is."""
    asked = {
        name: max(1.0, plan.budget["value"] * speedup / _value(tried, "speedup", name)) for name, plan in plans.items()
    }
    better, _ = find_plans(scores, cost, asked)
    return {**plans, **better}


def summary(report: Report, plans: Mapping[str, Plan], missing: Mapping[str, str], speedup: float) -> str:
    """A table with a line per plan, and in words against which the mixed one has the higher PSNR."""
    lines = [
        "# Mixed against single methods",
        "",
        f"Plans of the toy model for {speedup:g}x, on {len(report.clips)} clip{'s' * (len(report.clips) > 1)}.",
        "",
    ]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(_cells(report, name, plan))} |" for name, plan in plans.items()]
    lines += ["", *(f"{name}: {reason}" for name, reason in missing.items()), verdict(report, [*plans])]
    return "\n".join(lines) + "\n"


def verdict(report: Report, names: list[str]) -> str:
    """Against which single methods the mixed plan has the higher PSNR, clip by clip; a line for each, then what follows."""
    single = [name for name in names if name != MIXED]
    if not single:
        return "No single method reaches the speed-up: there is nothing to compare with."
    against = {name: _against(report, name) for name in single}
    lines = [f"- {name}: {outcome}: {numbers}." for name, (outcome, numbers) in against.items()]
    outcomes = {outcome for outcome, _ in against.values()}
    if outcomes == {HIGHER}:
        found = f"The mixed plan's PSNR is higher than that of every single method ({', '.join(single)})."
    elif TOO_FEW in outcomes:
        found = f"{TOO_FEW.capitalize()} whether mixing pays: an interval takes {FEWEST} prompts or more."
    else:
        others = ", ".join(f"{name} ({outcome})" for name, (outcome, _) in against.items() if outcome != HIGHER)
        found = f"The mixed plan's PSNR is NOT shown to be higher than that of every single method: {others}."
    return "\n".join(["PSNR of the mixed plan minus that of each single method, on the same clips:", *lines, "", found])


def _against(report: Report, name: str) -> tuple[str, str]:
    """The outcome of the mixed plan against a single method, and its numbers. None where the better one took more time."""
    more, speed = report.pair(PSNR.difference, MIXED, name), report.pair(SPEED, MIXED, name)
    assert more and speed and speed.value  # `compare` has them of each two subjects
    if more.value is None or more.spread is None:
        return "no verdict", f"no finite difference, {more.note}"
    low, high = more.spread.low, more.spread.high
    interval = basis(more.spread)
    if low is not None:
        interval = (
            f"95 % interval {low:+.2f} to {high:+.2f}, {interval}{' pairs' if more.spread.comparisons > 1 else ''}"
        )
    numbers = (
        f"mean {more.value:+.2f} dB, median {more.spread.median:+.2f} dB ({interval}), at {speed.value:.2f}x its speed"
    )
    if low is None or high is None:
        return TOO_FEW, numbers
    if low <= 0 <= high:
        return "not told apart", numbers
    slower = speed.value if low > 0 else 1 / speed.value  # of the one with the higher PSNR
    if slower < 1 - SAME_TIME:
        return f"no verdict, the better one is more than {SAME_TIME:.0%} slower", numbers
    return HIGHER if low > 0 else "NOT higher", numbers


def _cells(report: Report, name: str, plan: Plan) -> list[str]:
    shares = sorted(plan.shares().items(), key=lambda item: -item[1])
    mix = ", ".join(f"{plan.methods[symbol].label} {share:.0%}" for symbol, share in shares if share >= 0.005)
    figures = [
        f"{_value(report, metric, name):{form}}"
        for metric, form in (("density", ".3f"), ("psnr", ".2f"), ("ssim", ".4f"))
    ]
    return [
        name,
        f"{plan.provenance['predicted']['speedup']:.2f}x",
        f"{_value(report, 'speedup', name):.2f}x",
        *figures,
        mix,
    ]


def _value(report: Report, metric: str, name: str) -> float:
    """A number of the report over all clips; the PSNR of frames that are all the same is infinite."""
    row = report.row(metric, name)
    if row and row.value is None and row.note == "identical":
        return math.inf
    if row is None or row.value is None:
        raise ValueError(f"{name}: expected a value of {metric}, found none: {row.note if row else 'no such row'}")
    return row.value


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run it again and it goes on from where it was")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
