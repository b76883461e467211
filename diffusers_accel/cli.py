"""The command `diffusers-accel`. Each of its commands is one call of the library, which is imported only when it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_accel.support.terminal import Withheld, run_command, safe

if TYPE_CHECKING:
    from diffusers_accel.search.budget import Budget

PROGRAM = "diffusers-accel"
# The class of what typer says about options; it brings click along in some versions, and needs it in others.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Sparse attention for diffusers' video pipelines: search a plan, report what it wins and costs. "
    "With --debug anywhere, errors show their traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at plan files.")
app.add_typer(plan_app, name="plan")


Pipe = Annotated[
    str, typer.Argument(help="'shapes' (the small model of this package), a pipeline's folder, or a hub id.")
]
DtypeFlag = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="[float32|bfloat16|float16]",
        help="Of the weights. (default: bfloat16, on a CPU float32)",
    ),
]
DeviceFlag = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:1. (default: a GPU if there is one)")
]
OffloadFlag = Annotated[
    str,
    typer.Option(
        "--offload",
        metavar="[none|model|group]",
        help="Keep on the GPU all, one model at a time, or one layer at a time.",
    ),
]
Height = Annotated[int | None, typer.Option("--height", help="In pixels. (default: the pipeline's own)")]
Width = Annotated[int | None, typer.Option("--width", help="In pixels. (default: the pipeline's own)")]
Frames = Annotated[int | None, typer.Option("--frames", help="Of the video. (default: the pipeline's own)")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps. (default: the pipeline's own)")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale. (default: the pipeline's own)")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the initial noise.")]


@dataclass(frozen=True)
class Setup:
    """What a command runs on: the pipeline, how it is loaded, and what it is called with."""

    pipe: str
    dtype: str | None
    device: str | None
    offload: str
    height: int | None
    width: int | None
    frames: int | None
    steps: int | None
    guidance: float | None

    def check(self) -> Setup:
        """Refuses what can be known before anything is loaded."""
        from diffusers_accel.cli_arguments import check_finite, check_whole
        from diffusers_accel.loading import check_source

        for flag in ("height", "width", "frames", "steps"):
            check_whole(f"--{flag}", getattr(self, flag))
        check_finite("--guidance", self.guidance)
        check_source(self.pipe, dtype=self.dtype, device=self.device, offload=self.offload)
        return self

    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that were given, on top of those that the shapes model was trained for."""
        given = {
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        base: dict[str, Any] = {}
        if self.pipe == "shapes":
            from diffusers_accel.evals.shapes import CALL

            base = CALL
        return {**base, **{name: value for name, value in given.items() if value is not None}}

    def flags(self) -> list[str]:
        """The options that were given, for another command on the same pipeline."""
        given = {
            "--dtype": self.dtype,
            "--device": self.device,
            "--offload": None if self.offload == "none" else self.offload,
            "--height": self.height,
            "--width": self.width,
            "--frames": self.frames,
            "--steps": self.steps,
            "--guidance": self.guidance,
        }
        return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


@app.command()
def doctor(
    pipe: Annotated[str | None, typer.Argument(help="As for search; without it only the machine is looked at.")] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="To work out. May be given several times.")
    ] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = "none",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Say what can run here and, with PIPE, what a sparse call could win: runs two denoising steps, no video."""
    from diffusers_accel.doctor import DENSITIES, check_densities, diagnose

    densities = density or DENSITIES
    check_densities(densities)
    setup = Setup(pipe or "", dtype, device, offload, height, width, frames, steps, guidance)
    if pipe is None:
        if flags := setup.flags():
            raise ValueError(f"doctor: expected a pipeline beside {flags[0]}, found none; without one leave it out")
        _print(diagnose(densities=densities))
        return
    _print(diagnose(_load(setup.check()), setup.call(), densities=densities))


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
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Keeps what was measured. (default: OUT with .scores.safetensors)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the plan also where the search warns of it. (otherwise exit code 3)")
    ] = False,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Seed = 0,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = "none",
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
    setup = Setup(pipe, dtype, device, offload, height, width, frames, steps, guidance).check()
    texts = _texts(pipe, prompt, prompts, for_search=True)
    from diffusers_accel import search_plan
    from diffusers_accel.cli_arguments import (
        check_seed,
        check_share,
        search_places,
    )
    from diffusers_accel.search.candidates import candidates_for, check_sets

    sets = None if methods is None else check_sets([name.strip() for name in methods.split(",")])
    check_seed(seed)
    check_share("--dense-steps", dense_steps)
    kept = search_places(out, scores)
    pipeline = _load(setup)
    plan = search_plan(
        pipeline,
        texts,
        call=setup.call(),
        budget=budget,
        candidates=candidates_for(pipeline, sets),
        dense_steps=dense_steps,
        seed=seed,
        scores_path=kept,
    )
    warnings = [str(each) for each in plan.provenance.get("warnings", ())]
    if warnings and not force:
        raise Withheld(f"{out}: not written: {'; '.join(warnings)}. What was measured is kept in {kept}")
    plan.save(out)
    mix = ", ".join(f"{plan.methods[symbol].label} {share:.0%}" for symbol, share in plan.shares().items())
    _print_plan(out, mix, setup)


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
    offload: OffloadFlag = "none",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Find at which steps each head that reuses has to refresh, from one dense generation per prompt, and write the plan."""
    setup = Setup(pipe, dtype, device, offload, height, width, frames, steps, guidance).check()
    texts = _texts(pipe, prompt, prompts, for_search=True)
    from diffusers_accel.cli_arguments import check_out, check_seed, read_plan
    from diffusers_accel.files import prepare_file
    from diffusers_accel.search.gates import calibrate_gates, check_gated, summary

    check_seed(seed)
    check_out(out)
    before = read_plan(plan)
    check_gated(before, gamma, max_lse_change)
    prepare_file(out)
    pipeline = _load(setup)
    found = calibrate_gates(
        pipeline, before, texts, call=setup.call(), seed=seed, gamma=gamma, max_lse_change=max_lse_change
    )
    found.save(out)
    _print_plan(out, summary(found), setup)


@app.command()
def report(
    pipe: Pipe,
    plan: Annotated[
        list[str],
        typer.Option(
            "--plan",
            help="A plan file or a method, such as draft; with a step cache, easycache+draft; or NAME=PLAN. "
            "May be given several times.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("report"),
    rounds: Annotated[int, typer.Option("--rounds", help="Timed runs of each clip, each between two dense ones.")] = 1,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="May be given several times. (default: psnr, ssim and lpips)")
    ] = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="May be given several times. (default: 0)"),
    ] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    offload: OffloadFlag = "none",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Compare plans with dense attention, same prompts, seeds and noise: speed, quality, and the clips side by side.

    Can be stopped and run again: finished clips are kept in OUT.partial until the report is saved.
    """
    setup = Setup(pipe, dtype, device, offload, height, width, frames, steps, guidance).check()
    texts = _texts(pipe, prompt, prompts, for_search=False)
    from diffusers_accel.cli_arguments import check_seed, check_whole, read_subjects
    from diffusers_accel.evals.arguments import check_asked
    from diffusers_accel.evals.compare import compare
    from diffusers_accel.evals.metrics import METRICS
    from diffusers_accel.evals.report import check_report_folder

    metrics, seeds = metric or tuple(METRICS), seed or [0]
    check_whole("--rounds", rounds)
    for each in seeds:
        check_seed(each)
    subjects = read_subjects(plan)
    check_asked(subjects, texts, metrics=metrics, seeds=seeds, rounds=rounds)
    check_report_folder(out)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")  # removed when the report is saved
    asked: dict[str, Any] = {"call": setup.call(), "seeds": seeds, "metrics": metrics, "rounds": rounds}
    found = compare(_load(setup), subjects, texts, **asked, keep=partial)
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
    from diffusers_accel.cli_arguments import read_plan

    print(read_plan(file).show())


@plan_app.command("schema")
def plan_schema() -> None:
    """Print the JSON schema of plan files, by which an editor completes and checks them."""
    from diffusers_accel.plan.schema import schema_text

    print(schema_text(), end="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, as `terminal.run_command` says."""
    run_command(PROGRAM, sys.argv[1:] if arguments is None else arguments, _run)


def _run(arguments: list[str]) -> int:
    """As `app()`, which would answer for errors and Ctrl-C itself."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except UsageError as error:
        raise ValueError(_usage(error)) from error
    return 0


def _usage(error: Any) -> str:
    """What typer says about an option, with what was meant."""
    from diffusers_accel.support.suggest import did_you_mean

    text = error.format_message().strip().rstrip(".")
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    context = error.ctx
    if context is None:
        return text
    if option := getattr(error, "option_name", None):
        known = [each for parameter in context.command.params for each in parameter.opts]
        if option not in known:
            return f"{context.command_path}: there is no option {option[:100]}{did_you_mean(option, known)}"
    return text if text.endswith("?") else f"{text}; {context.command_path} --help lists all"


def _load(setup: Setup) -> Any:
    from diffusers_accel.loading import load_pipeline

    return load_pipeline(setup.pipe, dtype=setup.dtype, device=setup.device, offload=setup.offload)


def _texts(pipe: str, prompt: list[str] | None, file: Path | None, *, for_search: bool) -> list[str]:
    """The prompts that were given, else four that no other command takes."""
    from diffusers_accel.cli_arguments import check_prompts, read_prompts
    from diffusers_accel.support import prompts

    if prompt and file:
        raise ValueError("prompts: expected --prompt or --prompts, found both")
    if given := read_prompts(file) if file else prompt:
        check_prompts(given)
        return given
    if pipe == "shapes":
        from diffusers_accel.evals.shapes import held_out_prompts

        return held_out_prompts(8, seed=0)[:4] if for_search else held_out_prompts(8, seed=0)[4:]
    return list(prompts.SEARCH if for_search else prompts.REPORT)


def _budget(speedup: float | None, density: float | None, epsilon: float | None, lam: float | None) -> Budget:
    flags = {"--speedup": speedup, "--density": density, "--epsilon": epsilon}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"budget: expected one of --speedup, --density and --epsilon, found {' and '.join(given)}")
    if lam is not None and epsilon is None:
        raise ValueError("--lambda: expected beside --epsilon, found without; leave it out")
    from diffusers_accel.cli_arguments import check_finite
    from diffusers_accel.search.budget import Budget

    if speedup is not None:
        if not speedup > 1:
            raise ValueError(f"--speedup: expected a factor above 1, such as 1.4, found {speedup}")
        return Budget.speedup(speedup)
    if epsilon is not None:
        check_finite("--epsilon", epsilon)
        return Budget.sparse_vdit(epsilon, 0.5 if lam is None else lam)
    return Budget.density(0.4 if density is None else density)


def _print_plan(out: Path, what: str, setup: Setup) -> None:
    look = shlex.join([PROGRAM, "plan", "show", str(out)])
    measure = shlex.join([PROGRAM, "report", setup.pipe, "--plan", str(out), *setup.flags()])
    _print(f"{out}: {what}\nlook at it:  {look}\nmeasure it:  {measure}")


def _print(what: Any) -> None:
    """On stdout; a text without what would steer a terminal."""
    from rich.console import Console

    if isinstance(what, str):
        what = safe(what)
    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False, emoji=False).print(what)


if __name__ == "__main__":
    main()
