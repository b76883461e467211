"""`diffusers-accel search`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_accel.cli.options import (
    Pipe,
    PlanOut,
    PromptFile,
    Prompts,
    Seed,
    Setup,
    takes_setup,
)
from diffusers_accel.cli.output import mix, show_written
from diffusers_accel.support.terminal import Withheld

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan
    from diffusers_accel.search.budget import Budget
    from diffusers_accel.tune import Goal, Tuned


@takes_setup
def search(
    pipe: Pipe,
    out: PlanOut,
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="Goal: a whole generation this many times as fast. (default: 1.5)")
    ] = None,
    ms_per_step: Annotated[
        float | None, typer.Option("--ms-per-step", help="Goal: so long a step, in ms, as a mean over the schedule.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="Goal: this PSNR against dense in dB, as a mean.")
    ] = None,
    ssim: Annotated[float | None, typer.Option("--ssim", help="Goal: this SSIM against dense, as a mean.")] = None,
    lpips: Annotated[
        float | None, typer.Option("--lpips", help="Goal: at most this LPIPS against dense, as a mean.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Budget of the heads alone, not proven: this mean density.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Sparse-vDiT's rule, not proven: its threshold.")
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", help="Sparse-vDiT's weight of the remaining cost. (default: 0.5)")
    ] = None,
    proof: Annotated[
        bool,
        typer.Option(
            "--proof/--no-proof",
            help="Try plans on clips, correct the search by them, and judge the plan on other prompts. --no-proof: a speed-up as "
            "the search predicts it.",
        ),
    ] = True,
    step_caches: Annotated[
        bool, typer.Option("--step-caches/--no-step-caches", help="Also choose which steps are computed.")
    ] = True,
    dense_steps: Annotated[
        float, typer.Option("--dense-steps", help="Share of the steps that stays dense and is computed.")
    ] = 0.0,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="To choose from, such as draft,cached. (default: pattern,draft,cached,reordered; where a video is made chunk by "
            "chunk, history in place of the last)",
        ),
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="The plan subtracts each head's mean error. (otherwise not)")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Solve for the best choice of heads, by scipy. (otherwise nearly the best)")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Keeps what was measured. (default: OUT with .scores.safetensors)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the plan also where the search warns of it. (otherwise exit code 3)")
    ] = False,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="A text file with the prompts that decide. (default: eight of ours)"),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="A text file with prompts that are read once, for the report.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="A folder for the report of the clips that had the last word.")
    ] = None,
    pareto: Annotated[
        Path | None,
        typer.Option(
            "--pareto", help="A folder for the front: plans for a few speed-ups, as predicted, and a page of them."
        ),
    ] = None,
    floor: Annotated[
        bool,
        typer.Option("--floor/--no-floor", help="In the report: how far dense in another exact kernel is from dense."),
    ] = True,
    seed: Seed = 0,
    *,
    setup: Setup,
) -> None:
    """Find the mix of step caches and sparse heads with which PIPE does what is asked, and prove it on clips.

    Can be stopped and run again: what was measured is kept beside the plan, and another goal then costs clips only. Under
    `accelerate launch` prompts and clips are dealt over its processes.
    """
    goals = {"speedup": speedup, "ms_per_step": ms_per_step, "psnr": psnr, "ssim": ssim, "lpips": lpips}
    asked = find_asked(goals, density, epsilon, lam, proof)
    from diffusers_accel.cli.arguments import check_seed, check_share, find_prompts, search_places
    from diffusers_accel.cli.launched import launched
    from diffusers_accel.search.candidates import candidates_for, check_sets

    setup.check()
    texts = find_prompts(pipe, prompt, prompts, for_search=True)
    sets = None if methods is None else check_sets([name.strip() for name in methods.split(",")])
    check_seed(seed)
    check_share("--dense-steps", dense_steps)
    _check_pareto(pareto, asked)
    judged = _judged(pipe, asked, validation, held_out, page, floor)
    with launched(setup.device) as here:
        kept = search_places(out, scores) if here.is_first else None
        pipeline = setup.load(here.device)
        options = {
            "call": setup.call(),
            "candidates": candidates_for(pipeline, sets),
            "dense_steps": dense_steps,
            "correct": correct,
            "exact": exact,
            "seed": seed,
            "scores_path": kept,
            "step_caches": step_caches,
        }
        plan, tuned = _found(pipeline, texts, asked, judged, options)
    if not here.is_first:
        return
    warnings = [str(each) for each in plan.provenance.get("warnings", ())]
    if tuned is not None and tuned.met is False:
        warnings.append(tuned.verdict)
    if tuned is not None and page is not None:
        tuned.report.save(page)
    if pareto is not None:
        assert kept is not None  # by the first process
        _write_front(pareto, kept, options)
    if warnings and not force:
        raise Withheld(f"{out}: not written: {'; '.join(warnings)}. What was measured is kept in {kept}")
    plan.save(out)
    show_written(out, mix(plan), setup)


def _check_pareto(folder: Path | None, asked: Budget | Goal) -> None:
    from diffusers_accel.files import prepare_folder
    from diffusers_accel.search.budget import Budget

    if folder is None:
        return
    if isinstance(asked, Budget) and asked.kind == "sparse_vdit":
        raise ValueError(
            "--pareto: expected beside a goal or --density, found --epsilon, whose search measures no spans"
        )
    prepare_folder(folder)


def _write_front(folder: Path, scores: Path, options: dict[str, Any]) -> None:
    """The front of what the search has kept, whatever was asked of it."""
    from diffusers_accel.cli.output import show
    from diffusers_accel.search.profile import Profile
    from diffusers_accel.tune.front import find_front
    from diffusers_accel.tune.front_files import save_front

    found = replace(Profile.load(scores), exact=options["exact"])
    found = found if options["step_caches"] else replace(found, steps=None)
    page = save_front(find_front(found, dense_steps=options["dense_steps"]), found, folder, options["correct"])
    show(f"{page}: the front as it is predicted; the plans are beside it")


def _judged(
    pipe: str, asked: Budget | Goal, validation: Path | None, held_out: Path | None, page: Path | None, floor: bool
) -> Any:
    """The prompts that a goal is judged by; a budget is not judged."""
    from diffusers_accel.cli.arguments import find_validation, read_prompts
    from diffusers_accel.search.budget import Budget

    given = {"--validation": validation, "--held-out": held_out, "--report": page}
    if isinstance(asked, Budget):
        if useless := [flag for flag, value in given.items() if value is not None]:
            raise ValueError(
                f"{useless[0]}: expected a goal that is proven on clips, such as --speedup 1.5, found none"
            )
        return {}
    if page is not None:
        from diffusers_accel.evals.report import check_report_folder

        check_report_folder(page)
    return {
        "validation": find_validation(pipe, validation),
        "held_out": read_prompts(held_out) if held_out else (),
        "floor": floor,
    }


def _found(
    pipeline: Any, texts: list[str], asked: Budget | Goal, judged: dict[str, Any], options: dict[str, Any]
) -> tuple[Plan, Tuned | None]:
    import diffusers_accel
    from diffusers_accel.search.budget import Budget

    if isinstance(asked, Budget):
        return diffusers_accel.search_plan(pipeline, texts, budget=asked, **options), None
    tuned = diffusers_accel.tune_plan(pipeline, texts, asked, **judged, **options)
    return tuned.plan, tuned


def find_asked(
    goals: dict[str, float | None], density: float | None, epsilon: float | None, lam: float | None, proof: bool
) -> Budget | Goal:
    """What the flags ask for; a speed-up of 1.5 where they ask for nothing."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in goals.items()}
    flags |= {"--density": density, "--epsilon": epsilon}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"expected one of {', '.join(flags)}, found {' and '.join(given)}")
    if lam is not None and epsilon is None:
        raise ValueError("--lambda: expected beside --epsilon, found without; leave it out")
    from diffusers_accel.cli.arguments import check_finite
    from diffusers_accel.search.budget import Budget

    if epsilon is not None:
        check_finite("--epsilon", epsilon)
        return Budget.sparse_vdit(epsilon, 0.5 if lam is None else lam)
    if density is not None:
        return Budget.density(density)
    kind, value = next(((name, value) for name, value in goals.items() if value is not None), ("speedup", 1.5))
    flag = f"--{kind.replace('_', '-')}"
    check_finite(flag, value)
    if kind == "speedup" and not value > 1:
        raise ValueError(f"--speedup: expected a factor above 1, such as 1.4, found {value}")
    if not proof:
        if kind != "speedup":
            raise ValueError(
                f"{flag}: expected a goal that the search predicts by itself, --speedup, beside --no-proof"
            )
        return Budget.speedup(value)
    from diffusers_accel.tune import Goal

    return Goal(kind, value)  # type: ignore[arg-type]  # one of its kinds
