"""Looks at the machine and runs a few steps of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import nn

from diffusers_accel.doctor import remarks
from diffusers_accel.doctor.caches import outlooks
from diffusers_accel.doctor.diagnosis import ASSUMED_EFFICIENCY, CallDiagnosis, Diagnosis, Expectation
from diffusers_accel.doctor.masked import masked_attention
from diffusers_accel.doctor.speedup import speedup
from diffusers_accel.evals.machine import machine, versions
from diffusers_accel.families import Family, find
from diffusers_accel.kernels.attention import Choice, choices
from diffusers_accel.methods import NAMED
from diffusers_accel.plan import Plan
from diffusers_accel.preset import PRESET, preset_by_size, preset_recipe
from diffusers_accel.run.by_size import preset_density
from diffusers_accel.shape import ModelShape
from diffusers_accel.step_timing import CALLBACK, StepTiming, asked_steps, time_step
from diffusers_accel.support.call_parameters import parameters_of

DENSITIES = (0.5, 0.3, 0.2, 0.1)
READ_BY = ("pattern", "draft")  # methods whose realised density is shown
_DISTRIBUTIONS = ("diffusers-accel", "torch", "diffusers", "triton", "transformers", "accelerate", "numpy")
Found = Mapping[str, tuple[nn.Module, Family]]


def diagnose(
    pipe: Any = None, call: Mapping[str, Any] | None = None, *, densities: Sequence[float] = DENSITIES
) -> Diagnosis:
    """Looks at the machine and, with a pipeline, runs two denoising steps of the call (three for two transformers, or where
    the pipeline has no step callback, up to four of a modular one), and one forward without a patch.

    The pipeline runs dense through the user's own attention backend, without decoding a video, and is left as it was.

    Args:
        pipe: a loaded, unpatched pipeline of a supported family; None looks at the machine only.
        call: what the pipeline is called with, such as height, width, num_frames, num_inference_steps, guidance_scale; a
            prompt and a seed are filled in.
        densities: of the sparse calls for which a speed-up is worked out, each in (0, 1].

    Raises:
        TypeError: the pipeline's transformer is of no supported family, or it takes no number of steps.
        ValueError: the pipeline is patched already, or a density is out of range.
    """
    check_densities(densities)
    if pipe is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = [(device, dtype, head_dim) for dtype in (torch.bfloat16, torch.float32) for head_dim in (64, 128)]
        return Diagnosis(machine(), versions(_DISTRIBUTIONS), _kernels(kinds))
    call = dict(call or {})
    found = find(pipe)
    shapes = {name: family.shape(module) for name, (module, family) in found.items()}
    stages = asked_steps(pipe, call)
    beside = 1 if CALLBACK in parameters_of(pipe) else 2
    beside += isinstance(pipe, ModularPipeline)  # whose schedule may count its end as a step
    timing = time_step(pipe, call, most=beside + len(found))
    kernels = _kernels([(str(timing.device), timing.dtype, shape.head_dim) for shape in shapes.values()])
    runs = all(any(x.automatic and x.name != "reference" for x in options) for options in kernels.values())
    share = min(timing.attention_ms / timing.step_ms, 1.0)
    dense_steps = NAMED["pattern"]().dense_steps
    diagnosis = CallDiagnosis(
        family=next(iter(found.values()))[1].name,
        models=shapes,
        layout=timing.layout,
        steps=sum(stages),
        step_ms=timing.step_ms,
        attention_ms=timing.attention_ms,
        forward_ms=timing.forward_ms,
        forwards=timing.forwards,
        dense_steps=dense_steps,
        expectations=_expectations(timing, share, dense_steps, densities) if runs else (),
        caches=outlooks(stages, min(timing.forward_ms / timing.step_ms, 1.0)),
        preset=_preset_line(found, timing, shapes, share) if runs else "dense: no sparse kernel can run here",
        remarks=_remarks(pipe, call, found, timing, stages),
    )
    return Diagnosis(machine(), versions(_DISTRIBUTIONS), kernels, diagnosis)


def check_densities(densities: Sequence[float]) -> None:
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities: expected shares of key blocks in (0, 1], found {density}")


def _expectations(
    timing: StepTiming, share: float, dense_steps: float, densities: Sequence[float]
) -> tuple[Expectation, ...]:
    rows = []
    for asked, (density, efficiency) in timing.efficiencies(densities).items():
        reads = {name: _read(timing, name, asked) for name in READ_BY}
        rows.append(_expect(share, dense_steps, asked, density, efficiency, reads))
    return tuple(rows)


def _read(timing: StepTiming, name: str, density: float) -> float:
    """What a named method reads when asked for a density, a mean over its heads."""
    heads = NAMED[name](density=density).heads
    return sum(map(timing.read, heads)) / len(heads)


def _expect(
    share: float, dense: float, asked: float, density: float, efficiency: float | None, reads: Mapping[str, float]
) -> Expectation:
    assumed = ASSUMED_EFFICIENCY if efficiency is None else efficiency
    expected = speedup(share, density, efficiency=assumed, dense=dense)
    return Expectation(density, efficiency, speedup(share, density), expected, asked, dict(reads))


def _preset_line(found: Found, timing: StepTiming, shapes: Mapping[str, ModelShape], share: float) -> str:
    """What patch(pipe) takes at this size, and what it could win."""
    family = next(iter(found.values()))[1].name
    recipe = preset_recipe(found, {})
    plan = Plan.uniform(recipe, family=family, models=dict(shapes))
    name, shape = next(iter(shapes.items()))
    line = preset_by_size(recipe, plan, found, {}).choose(timing.layout, name, timing.device.type).line
    density = preset_density(timing.layout.video_tokens, timing.device.type, shape)
    if density is None:
        return line
    ((realised, efficiency),) = timing.efficiencies((density,)).values()
    layers = 1 - recipe.dense_layers / shape.layers
    read = _read(timing, PRESET, density)
    won = _expect(share, 1 - (1 - recipe.dense_steps) * layers, density, read, efficiency, {})
    return f"{line}. It reads {read:.2f} here; best possible {won.best:.2f}x, expected {won.expected:.2f}x"


def _remarks(
    pipe: Any, call: Mapping[str, Any], found: Found, timing: StepTiming, stages: Sequence[int]
) -> tuple[str, ...]:
    modules = [module for module, _ in found.values()]
    module, family = next(iter(found.values()))
    processor = family.self_attention(module)[0][1].processor
    said = (
        remarks.of_few_steps(max(stages), family.preset.dense_steps),
        remarks.of_chunks(family.history),
        remarks.of_masks(masked_attention(pipe, modules, call, timing.layouts)),
        remarks.of_backend(
            remarks.capability_of(timing.device),
            remarks.backend_of(processor),
            family.attention_call == "dispatch_attention_fn",
        ),
        remarks.of_layouts(dict(timing.layouts)),
        remarks.of_stages(len(stages)),
    )
    return tuple(each for each in said if each)


def _kernels(kinds: Sequence[tuple[str, torch.dtype, int]]) -> dict[tuple[str, str, int], list[Choice]]:
    return {
        (device, str(dtype).removeprefix("torch."), head_dim): choices(device, dtype, head_dim)
        for device, dtype, head_dim in kinds
    }
