"""One dense generation as step caches see it: what goes into a transformer at each step, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e9  # of timesteps


@dataclass(frozen=True, eq=False)
class TrajectoryStep:
    """One step of a generation.

    Args:
        transformer: the pipeline's name of the one that runs.
        timestep: that it was given (the largest, where tokens differ).
        x: the latents that went in, [rows, ...], without channels of a condition; in the model's dtype, on the host. All branches
            get the same latents; where guidance is batched, its rows repeat them, and they stand here once.
        v: what came out of each branch of guidance by its name, in the order in which they ran: [parts * rows, ...], where
            `parts` is how often that branch's batch repeats the latents. Same dtype, on the host.
    """

    transformer: str
    timestep: float
    x: Tensor
    v: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One dense generation. Where a model denoises several things at once (LTX-2: video and audio), only the first one is
    kept, the video: rules of step caches look at it, and it decides for all.

    Args:
        prompt: a label of the prompt.
        steps: one entry for each step that runs, from the first.
        final: latents after the last step, in fp32 on the host; None where the pipeline does not show them.
        channels: dimension of the latents in which their channels lie, 1 or more.
        identity: JSON data that is equal where two trajectories belong to the same search (model, call, scheduler).

    Raises:
        ValueError: the steps do not fit each other, or a number is not finite.
    """

    prompt: str
    steps: tuple[TrajectoryStep, ...]
    final: Tensor | None = None
    channels: int = 1
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("steps: expected one step or more, found none")
        shape = self.steps[0].x.shape
        if not 1 <= self.channels < len(shape):
            raise ValueError(f"channels: expected a dimension of latents of shape {list(shape)}, found {self.channels}")
        for number, step in enumerate(self.steps):
            _check_step(step, shape, f"steps[{number}]")
        if self.final is not None:
            _check_finite(self.final, "final")

    @property
    def transformers(self) -> tuple[str, ...]:
        """That of each step."""
        return tuple(step.transformer for step in self.steps)

    @property
    def fresh(self) -> tuple[int, ...]:
        """The steps before which nothing is known: the first one, and the first of each expert."""
        return (0, *(i for i, (a, b) in enumerate(pairwise(self.transformers), 1) if a != b))

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions of the latents that are neither rows nor channels: frames, height and width, or tokens."""
        return tuple(axis for axis in range(1, self.steps[0].x.dim()) if axis != self.channels)

    @property
    def bytes(self) -> int:
        """Of all tensors: steps * (1 + outputs) latents."""
        tensors = [tensor for step in self.steps for tensor in (step.x, *step.v.values())]
        tensors += [] if self.final is None else [self.final]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_step(step: TrajectoryStep, shape: torch.Size, path: str) -> None:
    if step.x.shape != shape or step.x.dim() < 1 or not step.x.numel():
        raise ValueError(f"{path}.x: expected the shape of the first step, {list(shape)}, found {list(step.x.shape)}")
    if not step.v:
        raise ValueError(f"{path}.v: expected the output of one branch or more, found none")
    for branch, v in step.v.items():
        if v.dim() != len(shape) or v.shape[1:] != shape[1:] or v.shape[0] == 0 or v.shape[0] % shape[0]:
            raise ValueError(
                f"{path}.v[{branch!r}]: expected the shape of x, {list(shape)}, with as many rows or a multiple, found "
                f"{list(v.shape)}"
            )
    if not abs(step.timestep) <= LARGEST:
        raise ValueError(f"{path}.timestep: expected a number of at most {LARGEST:g}, found {step.timestep}")
    for name, tensor in (("x", step.x), *((f"v[{branch!r}]", v) for branch, v in step.v.items())):
        _check_finite(tensor, f"{path}.{name}")


def _check_finite(tensor: Tensor, path: str) -> None:
    """Also in fp32, in which errors are worked out."""
    if not tensor.is_floating_point() or not tensor.numel() or not bool(torch.isfinite(tensor.float()).all()):
        raise ValueError(f"{path}: expected finite floating-point numbers, found others")
