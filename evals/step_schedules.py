"""Do derived step schedules pay? Against EasyCache and uniform skipping, at equal numbers of computed forwards.

python -m diffusers_accel.evals.step_schedules --prompts 8 --out steps

A few prompts of the toy model are recorded, and schedules are derived from these. Then clips of other prompts are made: dense,
and under each schedule, and their final latents and frames are compared with the dense ones. Last, how well predicted errors
rank schedules is told: derived, uniform and random ones, each measured on the same prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from diffusers_accel.api import patch
from diffusers_accel.evals import toy
from diffusers_accel.evals.intervals import FEWEST, estimate
from diffusers_accel.evals.metrics.psnr import PSNR
from diffusers_accel.files import prepare_folder, write_json, write_whole
from diffusers_accel.forwards import EasyCache, Forwards, Last, Schedule
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.running import Enough
from diffusers_accel.search.steps.curve import DEFAULT, Curve, evenly
from diffusers_accel.search.steps.recorder import record
from diffusers_accel.support.seeded import seeded

NAME = "step-schedules"
RECORDED = 2  # prompts that schedules are derived from
WARM_UP = 2  # of EasyCache: its default leaves nothing to predict in 10 steps
DERIVED, UNIFORM, EASYCACHE = "derived", "uniform", "easycache"


@dataclass(frozen=True)
class Tried:
    """What is tried: a name, the steps that it is to compute, and what is predicted of it."""

    name: str
    steps: int
    forwards: Forwards
    error: float


@dataclass(frozen=True)
class Outcome:
    """One clip of a subject beside the dense one of the same prompt and noise.

    computed: forwards that ran, all branches together. error: relative squared error of the final latents. psnr: in dB, None
    where frames were not decoded.
    """

    subject: str
    prompt: str
    computed: int
    error: float
    psnr: float | None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(NAME), help="folder for the table and the numbers")
    parser.add_argument("--prompts", type=int, default=FEWEST, help="to compare on; none of them is recorded")
    parser.add_argument("--steps", type=int, default=10, help="of the schedule")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: one forward a step")
    parser.add_argument(
        "--computed", type=int, nargs="+", default=[7, 6, 5], help="numbers of computed steps to compare at"
    )
    parser.add_argument(
        "--random", type=int, default=4, help="random schedules for each of these numbers and each predictor"
    )
    parser.add_argument(
        "--ranked-prompts", type=int, default=2, help="prompts on which all schedules are measured, to rank them"
    )
    options = parser.parse_args(arguments)
    if min(options.prompts, options.ranked_prompts) < 1 or not all(2 <= k <= options.steps for k in options.computed):
        raise ValueError(
            f"expected 1 prompt or more, and numbers of computed steps from 2 to {options.steps}, found {options.prompts}, "
            f"{options.ranked_prompts} and {options.computed}"
        )
    prepare_folder(options.out)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    pipe = toy.load_pipeline()
    call = {**toy.CALL, "num_inference_steps": options.steps, "guidance_scale": options.guidance}
    prompts = toy.held_out_prompts(RECORDED + options.prompts, seed=0)
    console.print(f"Recording {RECORDED} prompts.")
    curve = Curve([record(pipe, prompt, call, seed) for seed, prompt in enumerate(prompts[:RECORDED])])
    clips = list(enumerate(prompts))[RECORDED:]
    console.print(f"Comparing on {len(clips)} prompts.")
    subjects = compared(curve, options.computed)
    outcomes = measured(pipe, call, subjects, clips, True)
    ranked = [*subjects, *others(curve, options.computed, options.random)]
    known = [each for each in outcomes if each.prompt in dict(clips[: options.ranked_prompts]).values()]
    console.print(f"Ranking {len(ranked)} schedules on {len(clips[: options.ranked_prompts])} prompts.")
    more = measured(pipe, call, ranked[len(subjects) :], clips[: options.ranked_prompts], False)
    text = page(call, subjects, outcomes, ranked, [*known, *more])
    rows = [vars(each) for each in (*outcomes, *more)]
    plans = [{"name": s.name, "error": s.error, "forwards": s.forwards.to_json()} for s in ranked]
    write_json(options.out / f"{NAME}.json", {"call": call, "subjects": plans, "clips": rows})
    write_whole(options.out / f"{NAME}.md", text.encode())
    console.print(text)


def compared(curve: Curve, counts: Sequence[int]) -> list[Tried]:
    """At each number of computed steps: the derived schedule, its predictor on evenly spaced steps, and EasyCache."""
    derived = [choice for predictor in DEFAULT for choice in curve.schedules(predictor)]
    rule = curve.of_rule(EasyCache(warm_up=WARM_UP), Last("residual"))
    found = []
    for count in counts:
        best = min((c for c in derived if len(c.computed) == count), key=lambda c: c.error, default=None)
        if best is None:
            raise ValueError(
                f"no schedule of {count} computed steps: an expert's first step and the last one compute too"
            )
        found.append(Tried(f"{DERIVED} {count}", count, best.forwards, best.error))
        found.append(_scheduled(f"{UNIFORM} {count}", curve, best.forwards.predictor, evenly(curve.steps, count)))
        if cached := [c for c in rule if len(c.computed) <= count]:
            nearest = max(cached, key=lambda c: len(c.computed))
            found.append(Tried(f"{EASYCACHE} {count}", len(nearest.computed), nearest.forwards, nearest.error))
    return found


def others(curve: Curve, counts: Sequence[int], random: int) -> list[Tried]:
    """More schedules to rank: with every predictor the derived one, evenly spaced steps, and random ones."""
    rng, found = np.random.default_rng(0), []
    for predictor in DEFAULT:
        derived = {len(choice.computed): choice for choice in curve.schedules(predictor)}
        for count in counts:
            sets = [derived[count].computed, evenly(curve.steps, count)]
            for _ in range(random):
                inner = rng.choice(np.arange(1, curve.steps - 1), count - 2, replace=False)
                sets.append((0, *sorted(int(step) for step in inner), curve.steps - 1))
            for computed in dict.fromkeys(sets):
                found.append(_scheduled(f"{predictor.label} at {list(computed)}", curve, predictor, computed))
    return found


def _scheduled(name: str, curve: Curve, predictor: Any, computed: tuple[int, ...]) -> Tried:
    error = curve.error(predictor, computed)
    return Tried(name, len(computed), Forwards(Schedule(steps=computed), predictor), error)


def measured(
    pipe: Any, call: Mapping[str, Any], subjects: Sequence[Tried], clips: Sequence[tuple[int, str]], frames: bool
) -> list[Outcome]:
    """Every subject on every clip, (seed, prompt) each."""
    psnr, found = PSNR.load(), []
    for seed, prompt in clips:
        dense, dense_frames, _ = generated(pipe, prompt, seed, call, None, frames)
        for subject in subjects:
            latents, own, computed = generated(pipe, prompt, seed, call, subject.forwards, frames)
            error = float((latents - dense).square().sum() / dense.square().sum())
            value = None if own is None or dense_frames is None else float(np.mean(psnr(dense_frames, own)))
            found.append(Outcome(subject.name, prompt, computed, error, value))
    return found


def generated(
    pipe: Any, prompt: str, seed: int, call: Mapping[str, Any], forwards: Forwards | None, frames: bool
) -> tuple[Tensor, np.ndarray | None, int]:
    """Final latents, frames [F, H, W, 3] if asked for, and how many forwards were computed (0 of the dense clip)."""
    last = LastLatents(None if frames else call["num_inference_steps"])
    with seeded(seed, torch.device(pipe._execution_device)) as generator:
        arguments = {
            **call,
            "prompt": prompt,
            "generator": generator,
            "callback_on_step_end": last,
            "output_type": "np",
        }
        pipe.set_progress_bar_config(disable=True)
        patched = patch(pipe, forwards) if forwards is not None else None
        output = None
        try:
            output = pipe(**arguments)
        except Enough:
            pass
        finally:
            computed = 0
            if patched is not None:
                report = patched.report().forwards
                computed = report.computed if report is not None else 0
                patched.unpatch()
    shown = None if output is None else np.ascontiguousarray(output.frames[0], dtype=np.float32)
    return last.ending.latents, shown, computed


def page(
    call: Mapping[str, Any],
    subjects: Sequence[Tried],
    outcomes: Sequence[Outcome],
    ranked: Sequence[Tried],
    measurements: Sequence[Outcome],
) -> str:
    """The comparison and the ranking in Markdown."""
    prompts = list(dict.fromkeys(each.prompt for each in outcomes))
    lines = [
        "# Derived step schedules",
        "",
        f"The toy model, {call['num_inference_steps']} steps, guidance {call['guidance_scale']:g}; {RECORDED} prompts recorded, "
        f"{len(prompts)} others compared. Errors are relative squared ones of the final latents.",
        "",
        "| subject | forwards computed | predicted error | error | PSNR | PSNR of derived less this one |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(subject, subjects, outcomes) for subject in subjects]
    lines += ["", *(f"- {subject.name}: {_told(subject.forwards)}" for subject in subjects)]
    return "\n".join([*lines, "", *ranking(ranked, measurements)]) + "\n"


def ranking(ranked: Sequence[Tried], outcomes: Sequence[Outcome]) -> list[str]:
    """How well predicted errors rank schedules, over all and of each predictor alone, and how large they are."""
    every = list({each.forwards: each for each in ranked if each.error > 0}.values())
    prompts = len({each.prompt for each in outcomes})
    groups = {"all": every} | {
        each.label: [subject for subject in every if subject.forwards.predictor == each] for each in DEFAULT
    }
    lines = [
        f"Predicted and measured errors of schedules on {prompts} prompt{'s' * (prompts > 1)} that were not recorded:",
        "",
        "| predictor | schedules | rank correlation (Spearman) | measured / predicted, median |",
        "| --- | --- | --- | --- |",
    ]
    for name, group in groups.items():
        pairs = [(subject.error, _measured_error(subject, outcomes)) for subject in group]
        ratio = float(np.median([measured / predicted for predicted, measured in pairs]))
        lines.append(f"| {name} | {len(pairs)} | {rank_correlation(pairs):.3f} | {ratio:.2f} |")
    return lines


def _measured_error(subject: Tried, outcomes: Sequence[Outcome]) -> float:
    """The geometric mean over prompts."""
    return float(np.exp(np.mean([np.log(each.error) for each in outcomes if each.subject == subject.name])))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of (predicted, measured)."""
    from scipy import stats  # of the extra `eval`

    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def _row(subject: Tried, subjects: Sequence[Tried], outcomes: Sequence[Outcome]) -> str:
    mine = [each for each in outcomes if each.subject == subject.name]
    count = subject.name.split()[-1]
    derived = [each for each in outcomes if each.subject == f"{DERIVED} {count}"]
    prompts = [each.prompt for each in mine]
    value, _ = estimate([_db(each) for each in mine], prompts)
    error, _ = estimate([each.error for each in mine], prompts, ratio=True)
    forwards = sorted({each.computed for each in mine})
    ran = f"{forwards[0]}" if len(forwards) == 1 else f"{forwards[0]} to {forwards[-1]}"
    less = ""
    if not subject.name.startswith(DERIVED):
        more, spread = estimate([_db(a) - _db(b) for a, b in zip(derived, mine, strict=True)], prompts)
        less = f"{more:+.2f} dB"
        less += "" if spread.low is None or spread.high is None else f" ({spread.low:+.2f} to {spread.high:+.2f})"
    return f"| {subject.name} | {ran} | {subject.error:.2e} | {error:.2e} | {value:.2f} dB | {less} |"


def _db(outcome: Outcome) -> float:
    assert outcome.psnr is not None
    return outcome.psnr


def _told(forwards: Forwards) -> str:
    steps = getattr(forwards.rule, "steps", None)
    return f"{forwards.label}" if steps is None else f"steps {', '.join(map(str, steps))}; {forwards.predictor.label}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; nothing is kept")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
