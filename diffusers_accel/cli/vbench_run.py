"""`diffusers-accel vbench run`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_accel.cli.options import Setup, takes_setup
from diffusers_accel.cli.output import show
from diffusers_accel.cli.toy import by_present_name
from diffusers_accel.cli.vbench_setup import EnvFlag


@takes_setup
def vbench_run(
    clips: Annotated[
        Path | None,
        typer.Argument(help="A folder of films (.mp4), each named after its prompt, or one that a comparison keeps."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("vbench"),
    dimension: Annotated[
        list[str] | None,
        typer.Option("--dimension", help="May be given several times. (default: all that such clips can have)"),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out dimensions whose weights or packages are missing.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSON, name of a film -> its prompt, where names are no prompts.")
    ] = None,
    pipe: Annotated[
        str | None,
        typer.Option(
            "--standard",
            metavar="PIPE",
            help="Generate VBench's own clips into OUT/clips first, with this pipeline, as for search.",
            callback=by_present_name,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", help="With --standard: what to patch PIPE with, as for report. (default: nothing)"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="With --standard: clips of each prompt; less than 5 gives no total.")
    ] = 5,
    seed: Annotated[int, typer.Option("--seed", help="With --standard: of the first clip.")] = 0,
    fps: Annotated[
        int, typer.Option("--fps", help="With --standard: of the films; dynamic degree depends on it.")
    ] = 16,
    env: EnvFlag = None,
    *,
    setup: Setup,
) -> None:
    """Measure films by VBench: those of a folder, or VBench's own prompts as a pipeline shows them (--standard).

    Can be stopped and run again: finished clips and dimensions are kept in OUT.
    """
    from diffusers_accel.evals.vbench import environment
    from diffusers_accel.evals.vbench.dimensions import check_dimensions
    from diffusers_accel.evals.vbench.run import check_ready, run
    from diffusers_accel.evals.vbench.show import table
    from diffusers_accel.files import prepare_folder, printable
    from diffusers_accel.support.terminal import say

    if (clips is None) == (pipe is None):
        found = "neither" if clips is None else "both"
        raise ValueError(f"vbench run: expected a folder of films, or --standard and a pipeline, found {found}")
    check_dimensions(dimension or (), standard=clips is None)
    subject = check_of_pipe(pipe, plan, samples, seed, fps, prompts, setup)
    sets = {} if clips is None else read_sets(clips, prompts)
    place = environment.find(env)
    device = environment.device(place, setup.device)
    ready, left_out = check_ready(dimension, place, standard=clips is None, skip=skip_missing)
    prepare_folder(out)
    if clips is None:
        sets = {"": _standard(out / "clips", ready, place, subject, samples, seed, fps, setup)}
    for number, (name, films) in enumerate(sets.items()):
        folder = out / f"{number:02}-{folder_name(name)}" if name else out
        result = run(films, ready, folder, place, device, left_out=left_out, say=say)
        show((f"{printable(name)} ({folder})\n" if name else "") + table(result))


def read_sets(folder: Path, prompts: Path | None) -> dict[str, Any]:
    """The sets of clips in a folder by the names of their subjects, "" where it is no comparison."""
    from diffusers_accel.evals.vbench.clips import read_folder
    from diffusers_accel.evals.vbench.comparison import is_comparison, read_comparison

    if not is_comparison(folder):
        return {"": read_folder(folder, prompts)}
    if prompts:
        raise ValueError("--prompts: expected beside a folder of films, found a comparison, which knows its prompts")
    return read_comparison(folder)


def folder_name(subject: str) -> str:
    """What of a subject's name can be that of a folder; the number before it tells subjects apart."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", subject)[:60]


def check_of_pipe(
    pipe: str | None, plan: str | None, samples: int, seed: int, fps: int, prompts: Path | None, setup: Setup
) -> Any:
    """Refuses what says something of a pipeline where there is none, and what does not fit where there is one.

    Returns:
        What `patch` takes; None for nothing.
    """
    from diffusers_accel.cli.arguments import check_seed, check_whole
    from diffusers_accel.cli.plans import check_steps, read_subjects

    if pipe is None:
        flags = [flag for flag in setup.flags()[::2] if flag != "--device"] + (["--plan"] if plan else [])
        if flags:
            raise ValueError(
                f"vbench run: expected --standard and a pipeline beside {flags[0]}, found a folder of films"
            )
        return None
    if prompts:
        raise ValueError(
            "--prompts: expected beside a folder of films, found --standard, whose prompts are VBench's own"
        )
    check_whole("--samples", samples, 1, 5)
    check_whole("--fps", fps, 1, 240)
    check_seed(seed)
    setup.check()
    subjects = read_subjects([plan] if plan else [])
    check_steps(subjects, setup.call())
    return next(iter(subjects.values()), None)


def _standard(
    folder: Path, ready: tuple[str, ...], place: Any, subject: Any, samples: int, seed: int, fps: int, setup: Setup
) -> Any:
    """The clips that VBench asks for, generated where they are not there."""
    from diffusers_accel.evals.vbench.standard import asked_clips, make_clips, read_clips, read_prompts
    from diffusers_accel.support.terminal import say

    known = read_prompts(place)
    asked = asked_clips(known, ready, samples, seed)
    make_clips(setup.load(), asked, folder, call=setup.call(), subject=subject, seed=seed, fps=fps, say=say)
    return read_clips(folder, known, asked, samples)
