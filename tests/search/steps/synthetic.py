"""Trajectories whose outputs are known, and pipelines of models whose outputs do not depend on the latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep
from tests.forwards.toys import toy
from tests.tiny import tiny_wan

SHAPE = (1, 4, 2, 4, 4)
SIGMAS = (1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.2, 0.0)  # of 7 steps


def drawn(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def euler(
    outputs: Callable[[int], Mapping[str, Tensor]],
    weights: Mapping[str, float],
    *,
    sigmas: Sequence[float] = SIGMAS,
    transformers: Sequence[str] | None = None,
    prompt: str = "a prompt",
    noise: Callable[[int], Tensor] = lambda step: torch.zeros(SHAPE),
) -> Trajectory:
    """Flow matching by Euler's method: x += (sigma' - sigma) * sum of weights * outputs(step), and noise after it."""
    x, steps = drawn(0), []
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        v = dict(outputs(step))
        name = "transformer" if transformers is None else transformers[step]
        steps.append(TrajectoryStep(name, 1000 * sigma, x, v))
        x = x + (following - sigma) * sum(weights[branch] * v[branch] for branch in v) + noise(step)
    return Trajectory(prompt, tuple(steps), x)


def wave(seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """A model whose output is a function of the timestep alone, [rows, 4, ...]: predicting it changes nothing that it computes
    later."""

    def f(x: Tensor, timestep: Tensor) -> Tensor:
        shape = (1, *x.shape[1:])
        t = timestep.float().reshape(-1)[:1] / 1000
        v = (3 * t).sin() * drawn(seed, shape) + (5 * t**2).cos() * drawn(seed + 1, shape) + drawn(seed + 2, shape)
        v = v + 0.2 * drawn(seed + 3 + int(1000 * t), shape)  # of each step alone, as in a real model
        return v.expand(x.shape[0], *shape[1:]).contiguous()

    return f


def wave_pipeline(scheduler: Any = None) -> Any:
    pipe = tiny_wan()
    pipe.register_modules(transformer=toy(wave()))
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def wan_prompt(seed: int = 0) -> dict[str, Tensor]:
    """A prompt of the tiny Wan pipelines."""
    from tests.tiny import tiny_wan_call

    call = tiny_wan_call(seed)
    return {name: call[name] for name in ("prompt_embeds", "negative_prompt_embeds")}


def wan_call(**overrides: Any) -> dict[str, Any]:
    """Arguments of the tiny Wan pipelines, without the prompt."""
    return {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8, "guidance_scale": 1.0, **overrides}
