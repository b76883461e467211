"""`diffusers-accel calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@takes_setup
def calibrate(
    pipe: Pipe,
    plan: Annotated[Path, typer.Option("--plan", help="A plan file in which some heads reuse.")],
    out: PlanOut,
    gamma: Annotated[float, typer.Option("--gamma", help="Least mean cosine at which a head reuses.")] = 0.85,
    max_lse_change: Annotated[
        float, typer.Option("--max-lse-change", help="Largest mean change of the log-sum-exp at which it does.")
    ] = 0.05,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Seed = 0,
    *,
    setup: Setup,
) -> None:
    """Find at which steps each head that reuses has to refresh, from one dense generation per prompt, and write the plan."""
    from diffusers_accel.cli.arguments import check_out, check_seed, find_prompts
    from diffusers_accel.cli.launched import check_one_process
    from diffusers_accel.cli.plans import read_plan
    from diffusers_accel.files import prepare_file
    from diffusers_accel.search.gates import calibrate_gates, check_gated, summary

    check_one_process("calibrate")
    setup.check()
    texts = find_prompts(pipe, prompt, prompts, for_search=True)
    check_seed(seed)
    check_out(out)
    before = read_plan(plan)
    check_gated(before, gamma, max_lse_change)
    prepare_file(out)
    pipeline = setup.load()
    found = calibrate_gates(
        pipeline, before, texts, call=setup.call(), seed=seed, gamma=gamma, max_lse_change=max_lse_change
    )
    found.save(out)
    show_written(out, summary(found), setup)
