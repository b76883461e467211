"""Options that several commands take, and what they say of the pipeline together. Imports nothing heavy before a command runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from diffusers_accel.cli.toy import TOY, by_present_name

Pipe = Annotated[
    str,
    typer.Argument(
        help="'toy' (a small trained model that comes with the checkout, to try things on), a pipeline's folder, or a hub id.",
        callback=by_present_name,
    ),
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
PlanOut = Annotated[Path, typer.Option("--out", help="The plan file to write.")]


@dataclass(frozen=True)
class Setup:
    """What a command runs on: the pipeline, how it is loaded, and what it is called with. All fields but the pipeline are
    options of every command that `takes_setup`."""

    pipe: str
    dtype: DtypeFlag = None
    device: DeviceFlag = None
    offload: OffloadFlag = "none"
    height: Height = None
    width: Width = None
    frames: Frames = None
    steps: Steps = None
    guidance: Guidance = None

    def check(self) -> Setup:
        """Refuses what can be known before anything is loaded."""
        from diffusers_accel.cli.arguments import check_finite, check_whole
        from diffusers_accel.cli.loading import check_source

        for flag in ("height", "width", "frames", "steps"):
            check_whole(f"--{flag}", getattr(self, flag))
        check_finite("--guidance", self.guidance)
        check_source(self.pipe, dtype=self.dtype, device=self.device, offload=self.offload)
        return self

    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that were given, on top of those that the toy model was trained for."""
        given = {
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        base: dict[str, Any] = {}
        if self.pipe == TOY:
            from diffusers_accel.evals.toy import CALL

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

    def load(self, device: str | None = None) -> Any:
        """The pipeline, on `device` where it is not the user's own choice that counts."""
        from diffusers_accel.cli.loading import load_pipeline

        return load_pipeline(self.pipe, dtype=self.dtype, device=device or self.device, offload=self.offload)


def takes_setup(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: with the options of a `Setup`, after its own, in place of its parameter `setup`. Its
    own `pipe` is the pipeline of that, "" where it may be left out and is."""
    own = inspect.signature(command, eval_str=True).parameters
    kinds = get_type_hints(Setup, include_extras=True)
    options = [field for field in fields(Setup) if field.name != "pipe"]

    @functools.wraps(command)
    def told(**given: Any) -> None:
        setup = Setup(given["pipe"] or "", **{field.name: given.pop(field.name) for field in options})
        command(**given, setup=setup)

    shown = [each for each in own.values() if each.name != "setup"]
    shown += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
        )
        for field in options
    ]
    told.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return told
