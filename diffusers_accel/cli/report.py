"""`diffusers-accel report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_accel.cli.options import (
    Pipe,
    PromptFile,
    Prompts,
    Setup,
    takes_setup,
)
from diffusers_accel.cli.output import show


@takes_setup
def report(
    pipe: Pipe,
    plan: Annotated[
        list[str],
        typer.Option(
            "--plan",
            help="A plan file or a method, such as draft; with parameters, draft:density=0.3:per=row, those of a list as in "
            "schedule:steps=0/4/8; with a step cache, easycache:warm_up=4+draft; a cache of diffusers, such as "
            "first_block_cache:threshold=0.1; dense in another backend, backend:name=sage; or NAME=PLAN. May be given several "
            "times.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("report"),
    rounds: Annotated[int, typer.Option("--rounds", help="Timed runs of each clip, each between two dense ones.")] = 1,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="May be given several times. (default: psnr, ssim, lpips, psnr_pooled and ssim_gaussian)"
        ),
    ] = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="May be given several times. (default: 0)"),
    ] = None,
    floor: Annotated[
        bool,
        typer.Option(
            "--floor/--no-floor",
            help="One more run of each clip, dense in another exact kernel: how far that alone is from dense.",
        ),
    ] = True,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Also a new folder with a script, the plans and the versions, to run this again."
        ),
    ] = None,
    *,
    setup: Setup,
) -> None:
    """Compare plans with dense attention, same prompts, seeds and noise: speed, quality, and the clips side by side.

    Can be stopped and run again: finished clips are kept in OUT.partial until the report is saved. Under `accelerate launch` the
    clips are dealt over its processes.
    """
    from diffusers_accel.cli.arguments import check_seed, check_whole, find_prompts
    from diffusers_accel.cli.launched import launched
    from diffusers_accel.cli.plans import check_steps, given_plans, read_subjects

    setup.check()
    texts = find_prompts(pipe, prompt, prompts, for_search=False)
    # Now: they need the packages of the extra `eval`, without which the above is refused too.
    from diffusers_accel.evals.arguments import check_asked
    from diffusers_accel.evals.compare import compare
    from diffusers_accel.evals.export import AskedReport, check_export
    from diffusers_accel.evals.export import export as write
    from diffusers_accel.evals.kept import check_keep
    from diffusers_accel.evals.metrics import DEFAULT
    from diffusers_accel.evals.report import check_report_folder

    metrics, seeds = metric or DEFAULT, seed or [0]
    check_whole("--rounds", rounds)
    for each in seeds:
        check_seed(each)
    subjects = read_subjects(plan, of_diffusers=True)
    given = given_plans(plan) if export else []
    check_steps(subjects, setup.call())
    check_asked(subjects, texts, metrics=metrics, seeds=seeds, rounds=rounds, floor=floor)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")  # removed when the report is saved
    asked: dict[str, Any] = {"call": setup.call(), "seeds": seeds, "metrics": metrics, "rounds": rounds, "floor": floor}
    with launched(setup.device) as here:
        if here.is_first:
            check_report_folder(out)
            check_keep(partial)
            if export:
                check_export(export)
        found = compare(setup.load(here.device), subjects, texts, **asked, keep=partial)
    if not here.is_first:
        return
    options = [word for name in metrics for word in ("--metric", name)]
    options += [word for each in seeds for word in ("--seed", str(each))]
    options += ["--rounds", str(rounds), "--floor" if floor else "--no-floor", *setup.flags()]
    script = write(export, AskedReport(pipe, given, texts, options), found.provenance) if export else None
    page = found.save(out)
    show(found.table())
    show(f"{found.headline}\n{page}" + (f"\n{script}" if script else ""))
