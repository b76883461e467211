"""`diffusers-accel search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from diffusers_accel.cli.output import show_written
from diffusers_accel.support.terminal import Withheld

if TYPE_CHECKING:
    from diffusers_accel.search.budget import Budget


@takes_setup
def search(
    pipe: Pipe,
    out: PlanOut,
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="Budget: this factor for a whole generation.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Budget: this mean density. (default: 0.4)")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Budget: Sparse-vDiT's rule, its threshold.")
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", help="Sparse-vDiT's weight of the remaining cost. (default: 0.5)")
    ] = None,
    dense_steps: Annotated[float, typer.Option("--dense-steps", help="Share of the steps that stays dense.")] = 0.0,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="To choose from, such as draft,cached. (default: pattern,draft,cached,reordered)"
        ),
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="The plan subtracts each head's mean error. (otherwise not)")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Keeps what was measured. (default: OUT with .scores.safetensors)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the plan also where the search warns of it. (otherwise exit code 3)")
    ] = False,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Seed = 0,
    *,
    setup: Setup,
) -> None:
    """Profile each head of PIPE and write the plan with the least error inside a budget.

    Can be stopped and run again: what was measured is kept beside the plan, and another budget then costs seconds. Under
    `accelerate launch` the prompts are dealt over its processes.
    """
    budget = find_budget(speedup, density, epsilon, lam)
    from diffusers_accel import search_plan
    from diffusers_accel.cli.arguments import check_seed, check_share, find_prompts, search_places
    from diffusers_accel.cli.launched import launched
    from diffusers_accel.search.candidates import candidates_for, check_sets

    setup.check()
    texts = find_prompts(pipe, prompt, prompts, for_search=True)
    sets = None if methods is None else check_sets([name.strip() for name in methods.split(",")])
    check_seed(seed)
    check_share("--dense-steps", dense_steps)
    with launched(setup.device) as here:
        kept = search_places(out, scores) if here.is_first else None
        pipeline = setup.load(here.device)
        plan = search_plan(
            pipeline,
            texts,
            call=setup.call(),
            budget=budget,
            candidates=candidates_for(pipeline, sets),
            dense_steps=dense_steps,
            correct=correct,
            seed=seed,
            scores_path=kept,
        )
    if not here.is_first:
        return
    warnings = [str(each) for each in plan.provenance.get("warnings", ())]
    if warnings and not force:
        raise Withheld(f"{out}: not written: {'; '.join(warnings)}. What was measured is kept in {kept}")
    plan.save(out)
    mix = ", ".join(f"{plan.methods[symbol].label} {share:.0%}" for symbol, share in plan.shares().items())
    show_written(out, mix, setup)


def find_budget(speedup: float | None, density: float | None, epsilon: float | None, lam: float | None) -> Budget:
    """What the flags ask for; a density of 0.4 where they ask for nothing."""
    flags = {"--speedup": speedup, "--density": density, "--epsilon": epsilon}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"budget: expected one of --speedup, --density and --epsilon, found {' and '.join(given)}")
    if lam is not None and epsilon is None:
        raise ValueError("--lambda: expected beside --epsilon, found without; leave it out")
    from diffusers_accel.cli.arguments import check_finite
    from diffusers_accel.search.budget import Budget

    if speedup is not None:
        if not speedup > 1:
            raise ValueError(f"--speedup: expected a factor above 1, such as 1.4, found {speedup}")
        return Budget.speedup(speedup)
    if epsilon is not None:
        check_finite("--epsilon", epsilon)
        return Budget.sparse_vdit(epsilon, 0.5 if lam is None else lam)
    return Budget.density(0.4 if density is None else density)
