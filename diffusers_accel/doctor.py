"""What can run here, and what sparse attention could win for one call of a pipeline, before anybody waits for a video."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table

from diffusers_accel.evals.machine import machine, versions
from diffusers_accel.families import find, list_families
from diffusers_accel.kernels.attention import Choice, choices
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import NAMED
from diffusers_accel.shape import ModelShape
from diffusers_accel.step_timing import time_step

DENSITIES = (0.5, 0.3, 0.2, 0.1)
ASSUMED_EFFICIENCY = 0.8
_DISTRIBUTIONS = ("diffusers-accel", "torch", "diffusers", "triton", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Expectation:
    """What a density can win.

    Args:
        density: that of the sparse calls, realised for this layout.
        efficiency: dense time x density / sparse time of one layer's attention on this device; None where not measured.
        best: speed-up of a step if sparse attention took exactly `density` of the dense time, with nothing kept dense.
        expected: speed-up of the denoising loop with that efficiency and the default share of dense steps.
    """

    density: float
    efficiency: float | None
    best: float
    expected: float


@dataclass(frozen=True)
class CallDiagnosis:
    """One call of one pipeline.

    Args:
        family: model family.
        models: transformer name -> layers, heads, head dim.
        layout: how the tokens of one self-attention call lie.
        steps: of the schedule that the call asks for.
        step_ms: one denoising step, all its branches, measured dense.
        attention_ms: self-attention's part of that.
        dense_steps: share of the steps that `expected` leaves dense.
        expectations: one for each density; empty where no sparse kernel can run.
    """

    family: str
    models: dict[str, ModelShape]
    layout: TokenLayout
    steps: int
    step_ms: float
    attention_ms: float
    dense_steps: float
    expectations: tuple[Expectation, ...]

    @property
    def share(self) -> float:
        """Self-attention's share of a step, 0..1."""
        return min(self.attention_ms / self.step_ms, 1.0)


@dataclass(frozen=True)
class Diagnosis:
    """The findings; `str()` and rich print them as tables.

    Args:
        machine: processor, threads and GPU.
        versions: of Python and of the packages that matter.
        kernels: (device, dtype, head dim) -> each attention implementation: why it cannot run, or why it has to be asked for.
        call: what was measured with a pipeline; None without one.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    kernels: dict[tuple[str, str, int], list[Choice]]
    call: CallDiagnosis | None = None

    def __rich__(self) -> RenderableType:
        return Group(*_machine_lines(self), _kernel_table(self), *(_call_lines(self.call) if self.call else ()))

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def diagnose(
    pipe: Any = None, call: Mapping[str, Any] | None = None, *, densities: Sequence[float] = DENSITIES
) -> Diagnosis:
    """Looks at the machine and, with a pipeline, runs two denoising steps of the call (three for two transformers).

    The pipeline runs dense through the user's own attention backend, without decoding a video, and is left as it was.

    Args:
        pipe: a loaded, unpatched pipeline of a supported family; None looks at the machine only.
        call: what the pipeline is called with, such as height, width, num_frames, num_inference_steps, guidance_scale; a
            prompt and a seed are filled in.
        densities: of the sparse calls for which a speed-up is worked out, each in (0, 1].

    Raises:
        TypeError: the pipeline's transformer is of no supported family, or it has no step callback to time steps with.
        ValueError: the pipeline is patched already, or a density is out of range.
    """
    check_densities(densities)
    if pipe is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = [(device, dtype, head_dim) for dtype in (torch.bfloat16, torch.float32) for head_dim in (64, 128)]
        return Diagnosis(machine(), versions(_DISTRIBUTIONS), _kernels(kinds))
    found = find(pipe)
    shapes = {name: family.shape(module) for name, (module, family) in found.items()}
    defaults = {name: each.default for name, each in inspect.signature(type(pipe).__call__).parameters.items()}
    if "callback_on_step_end" not in defaults:
        raise TypeError(f"{type(pipe).__name__} takes no callback_on_step_end, without which its steps cannot be timed")
    steps = int({**defaults, **(call or {})}["num_inference_steps"])
    timing = time_step(pipe, {**(call or {}), "num_inference_steps": min(1 + len(found), steps)})
    kernels = _kernels([(str(timing.device), timing.dtype, shape.head_dim) for shape in shapes.values()])
    share = min(timing.attention_ms / timing.step_ms, 1.0)
    dense_steps = NAMED["pattern"]().dense_steps
    runs = all(any(x.automatic and x.name != "reference" for x in options) for options in kernels.values())
    efficiencies = timing.efficiencies(densities) if runs else {}
    diagnosis = CallDiagnosis(
        family=next(iter(found.values()))[1].name,
        models=shapes,
        layout=timing.layout,
        steps=steps,
        step_ms=timing.step_ms,
        attention_ms=timing.attention_ms,
        dense_steps=dense_steps,
        expectations=tuple(_expect(share, dense_steps, *pair) for pair in efficiencies.items()),
    )
    return Diagnosis(machine(), versions(_DISTRIBUTIONS), kernels, diagnosis)


def check_densities(densities: Sequence[float]) -> None:
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities: expected shares of key blocks in (0, 1], found {density}")


def speedup(share: float, density: float, *, efficiency: float = 1.0, dense: float = 0.0) -> float:
    """End-to-end speed-up by Amdahl's law: 1 / (1 - f + f (dense + (1 - dense) density / efficiency)).

    Args:
        share: self-attention's share f of the dense time, 0..1.
        density: of the sparse calls, 0..1.
        efficiency: dense time x density / sparse time.
        dense: share of the calls that stay dense, 0..1.
    """
    return 1 / (1 - share + share * (dense + (1 - dense) * density / efficiency))


def _expect(share: float, dense_steps: float, density: float, efficiency: float | None) -> Expectation:
    assumed = ASSUMED_EFFICIENCY if efficiency is None else efficiency
    expected = speedup(share, density, efficiency=assumed, dense=dense_steps)
    return Expectation(density, efficiency, speedup(share, density), expected)


def _kernels(kinds: Sequence[tuple[str, torch.dtype, int]]) -> dict[tuple[str, str, int], list[Choice]]:
    return {
        (device, str(dtype).removeprefix("torch."), head_dim): choices(device, dtype, head_dim)
        for device, dtype, head_dim in kinds
    }


def _machine_lines(diagnosis: Diagnosis) -> list[RenderableType]:
    found = diagnosis.machine
    gpu = (
        f", {found['gpu']} with {found['gpu_memory_bytes'] / 2**30:.0f} GiB"
        if "gpu" in found
        else ", no GPU that torch sees"
    )
    installed = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    return [
        f"machine   {found['cpu']}, {found['cores']} cores ({found['torch_threads']} threads of torch){gpu}",
        f"versions  {installed}",
        f"families  {', '.join(list_families())}",
    ]


def _kernel_table(diagnosis: Diagnosis) -> Table:
    """One row per implementation, one column for all inputs that share its verdicts."""
    alike: dict[tuple[str, ...], list[str]] = {}
    names = [option.name for option in next(iter(diagnosis.kernels.values()))]
    for (device, dtype, head_dim), options in diagnosis.kernels.items():
        verdicts = {option.name: option.verdict for option in options}  # ranks may differ
        inputs = f"{device} {dtype}, head dim {head_dim}"
        alike.setdefault(tuple(verdicts[name] for name in names), []).append(inputs)
    table = Table("attention kernel", *("\n".join(inputs) for inputs in alike.values()))
    for row in zip(names, *alike, strict=True):
        table.add_row(*row)
    return table


def _call_lines(call: CallDiagnosis) -> list[RenderableType]:
    layout = call.layout
    text = f" + {layout.text_tokens:,} of text" if layout.text_tokens else ""
    sizes = "; ".join(f"{name} {s.layers} layers x {s.heads} heads x {s.head_dim}" for name, s in call.models.items())
    loop = call.step_ms * call.steps / 1e3
    lines: list[RenderableType] = [
        f"model     {call.family}: {sizes}",
        f"tokens    {layout.tokens:,} = {layout.frames} frames x {layout.height} x {layout.width}{text}",
        f"one step  {call.step_ms:,.0f} ms dense, of which self-attention {call.attention_ms:,.0f} ms ({call.share:.0%}); "
        f"{call.steps} steps: {loop:,.1f} s",
    ]
    if not call.expectations:
        return [*lines, "No sparse kernel can run on this device with this model: a patch would stay dense."]
    table = Table("density of sparse calls", "sparse efficiency", "best possible", "expected", "expected loop")
    for row in call.expectations:
        efficiency = f"{ASSUMED_EFFICIENCY} (assumed)" if row.efficiency is None else f"{row.efficiency:.2f}"
        table.add_row(
            f"{row.density:.2f}",
            efficiency,
            f"{row.best:.2f}x",
            f"{row.expected:.2f}x",
            f"{loop / row.expected:,.1f} s",
        )
    limit = f"{1 / (1 - call.share):.2f}x" if call.share < 1 else "without bound"
    return [
        *lines,
        table,
        f"Best possible: sparse attention takes exactly its density of the dense time; no density wins more than {limit}. "
        f"Expected: with the efficiency above and the first {call.dense_steps:.0%} of the steps dense.",
    ]
