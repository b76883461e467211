"""The command `diffusers-accel`. Each of its commands is one call of the library, which is imported only when it runs."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffusers_accel.search.budget import Budget

app = typer.Typer(
    help="Sparse attention for diffusers' video pipelines: search a plan, report what it wins and costs. "
    "With --debug anywhere, errors show their traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at plan files.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Offload(StrEnum):
    none = "none"
    model = "model"
    group = "group"


Pipe = Annotated[
    str, typer.Argument(help="'shapes' (the small model of this package), a pipeline's folder, or a hub id.")
]
DtypeFlag = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the weights. (default: bfloat16, on a CPU float32)")
]
DeviceFlag = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:1. (default: a GPU if there is one)")
]
OffloadFlag = Annotated[
    Offload, typer.Option("--offload", help="Keep on the GPU all, one model at a time, or one layer at a time.")
]
Height = Annotated[int | None, typer.Option("--height", min=1, help="In pixels. (default: the pipeline's own)")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="In pixels. (default: the pipeline's own)")]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="Of the video. (default: the pipeline's own)")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps. (default: the pipeline's own)")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale. (default: the pipeline's own)")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the initial noise.")]


@app.command()
def doctor(
    pipe: Annotated[str | None, typer.Argument(help="As for search; without it only the machine is looked at.")] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="To work out. May be given several times.")
    ] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = Offload.none,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Say what can run here and, with PIPE, what a sparse call could win: runs two denoising steps, no video."""
    from diffusers_accel.doctor import DENSITIES, diagnose

    densities = density or DENSITIES
    if pipe is None:
        _print(diagnose(densities=densities))
        return
    call = _call(pipe, height, width, frames, steps, guidance)
    _print(diagnose(_load(pipe, dtype, device, offload), call, densities=densities))


@app.command()
def search(
    pipe: Pipe,
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.")],
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="Budget: this factor for a whole generation.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Budget: this mean density. (default: 0.4)")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Budget: Sparse-vDiT's rule, its threshold.")
    ] = None,
    lam: Annotated[float, typer.Option("--lambda", help="Sparse-vDiT's weight of the remaining cost.")] = 0.5,
    dense_steps: Annotated[float, typer.Option("--dense-steps", help="Share of the steps that stays dense.")] = 0.0,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="To choose from, such as draft,cached. (default: pattern,draft,cached,reordered)"
        ),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Keeps what was measured. (default: OUT with .scores.safetensors)")
    ] = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Seed = 0,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = Offload.none,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Profile each head of PIPE and write the plan with the least error inside a budget.

    Can be stopped and run again: what was measured is kept beside the plan, and another budget then costs seconds.
    """
    budget = _budget(speedup, density, epsilon, lam)
    _check_out(out)
    texts = _texts(pipe, prompt, prompts, for_search=True)
    call = _call(pipe, height, width, frames, steps, guidance)
    from diffusers_accel import search_plan
    from diffusers_accel.search.candidates import candidates_for, check_sets

    sets = check_sets([name.strip() for name in methods.split(",")]) if methods else None
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after the search
    pipeline = _load(pipe, dtype, device, offload)
    plan = search_plan(
        pipeline,
        texts,
        call=call,
        budget=budget,
        candidates=candidates_for(pipeline, sets),
        dense_steps=dense_steps,
        seed=seed,
        scores_path=scores or out.with_suffix(".scores.safetensors"),
    )
    plan.save(out)
    mix = ", ".join(f"{plan.methods[symbol].label} {share:.0%}" for symbol, share in plan.shares().items())
    _print_plan(out, mix, pipe)


@app.command()
def calibrate(
    pipe: Pipe,
    plan: Annotated[Path, typer.Option("--plan", help="A plan file in which some heads reuse.")],
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.")],
    gamma: Annotated[float, typer.Option("--gamma", help="Least mean cosine at which a head reuses.")] = 0.85,
    max_lse_change: Annotated[
        float, typer.Option("--max-lse-change", help="Largest mean change of the log-sum-exp at which it does.")
    ] = 0.05,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Seed = 0,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = Offload.none,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Find at which steps each head that reuses has to refresh, from one dense generation per prompt, and write the plan."""
    _check_out(out)
    texts = _texts(pipe, prompt, prompts, for_search=True)
    call = _call(pipe, height, width, frames, steps, guidance)
    from diffusers_accel import Plan
    from diffusers_accel.search.gates import calibrate_gates, check_gated, summary

    before = Plan.load(plan)
    check_gated(before, gamma, max_lse_change)
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after the calibration
    pipeline = _load(pipe, dtype, device, offload)
    found = calibrate_gates(pipeline, before, texts, call=call, seed=seed, gamma=gamma, max_lse_change=max_lse_change)
    found.save(out)
    _print_plan(out, summary(found), pipe)


@app.command()
def report(
    pipe: Pipe,
    plan: Annotated[
        list[str], typer.Option("--plan", help="A plan file or a method, or NAME=PLAN. May be given several times.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("report"),
    rounds: Annotated[int, typer.Option("--rounds", help="Timed runs of each clip, each between two dense ones.")] = 1,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="May be given several times. (default: psnr, ssim and lpips)")
    ] = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="May be given several times. (default: 0)")] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = Offload.none,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Compare plans with dense attention, same prompts, seeds and noise: speed, quality, and the clips side by side."""
    subjects = _subjects(plan)
    texts = _texts(pipe, prompt, prompts, for_search=False)
    call = _call(pipe, height, width, frames, steps, guidance)
    from diffusers_accel import compare
    from diffusers_accel.evals.metrics import METRICS

    pipeline = _load(pipe, dtype, device, offload)
    metrics = metric or tuple(METRICS)
    found = compare(pipeline, subjects, texts, call=call, seeds=seed or [0], metrics=metrics, rounds=rounds)
    page = found.save(out)
    _print(found.table())
    _print(f"{found.headline}\n{page}")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """Time the attention kernels on this device, against dense attention (bench --help says with which options)."""
    from diffusers_accel.evals import kernel_bench

    kernel_bench.main(context.args)


@plan_app.command("show")
def plan_show(file: Annotated[Path, typer.Argument(help="A plan file.")]) -> None:
    """Print a plan: its methods and a row of symbols per layer and span."""
    from diffusers_accel import Plan

    print(Plan.load(file).show())


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what the library refuses becomes one message and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="diffusers-accel")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _load(pipe: str, dtype: Dtype | None, device: str | None, offload: Offload) -> Any:
    from diffusers_accel.loading import load_pipeline

    return load_pipeline(pipe, dtype=dtype.value if dtype else None, device=device, offload=offload.value)


def _call(
    pipe: str, height: int | None, width: int | None, frames: int | None, steps: int | None, guidance: float | None
) -> dict[str, Any]:
    """The arguments of the pipeline's call that were given, on top of those that the shapes model was trained for."""
    given = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    base: dict[str, Any] = {}
    if pipe == "shapes":
        from diffusers_accel.evals.shapes import CALL

        base = CALL
    return {**base, **{name: value for name, value in given.items() if value is not None}}


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise ValueError(f'--out: expected a file name that ends in ".json", found {str(out)!r}')


def _texts(pipe: str, prompt: list[str] | None, file: Path | None, *, for_search: bool) -> list[str]:
    """The prompts that were given, else four that no other command takes."""
    if prompt and file:
        raise ValueError("prompts: expected --prompt or --prompts, found both")
    if file:
        if lines := [line.strip() for line in file.read_text().splitlines() if line.strip()]:
            return lines
        raise ValueError(f"{file}: expected a prompt on each line, found none")
    if prompt:
        return prompt
    if pipe == "shapes":
        from diffusers_accel.evals.shapes import held_out_prompts

        return held_out_prompts(8, seed=0)[:4] if for_search else held_out_prompts(8, seed=0)[4:]
    from diffusers_accel import prompts

    return list(prompts.SEARCH if for_search else prompts.REPORT)


def _budget(speedup: float | None, density: float | None, epsilon: float | None, lam: float) -> Budget:
    given = [
        flag
        for flag, value in (("--speedup", speedup), ("--density", density), ("--epsilon", epsilon))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"budget: expected one of --speedup, --density and --epsilon, found {' and '.join(given)}")
    from diffusers_accel.search.budget import Budget

    if speedup is not None:
        return Budget.speedup(speedup)
    if epsilon is not None:
        return Budget.paper(epsilon, lam)
    return Budget.density(0.4 if density is None else density)


def _subjects(plans: list[str]) -> dict[str, str]:
    """Name -> plan file or method; the name is what stands before "=", else the file's own."""
    subjects: dict[str, str] = {}
    for item in plans:
        name, separator, value = item.partition("=")
        if not separator:
            name, value = Path(item).stem, item
        if name in subjects:
            raise ValueError(
                f"--plan: two plans are called {name!r}; give them names: --plan first={subjects[name]} --plan second={value}"
            )
        subjects[name] = value
    return subjects


def _print_plan(out: Path, what: str, pipe: str) -> None:
    look, measure = f"diffusers-accel plan show {out}", f"diffusers-accel report {pipe} --plan {out}"
    _print(f"{out}: {what}\nlook at it:  {look}\nmeasure it:  {measure}")


def _print(what: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False).print(what)


if __name__ == "__main__":
    main()
