"""The file of a trajectory: safetensors, whose header says in JSON what was recorded, and whose checksum tells any change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    load_tensor_document,
    prepare_file,
    printable,
    quoted,
    save_tensor_document,
)
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep

KIND = Kind("diffusers_accel.trajectory", 1, "delete the file and record the prompt again")
FINAL = "final"


class _Step(Schema, frozen=True):
    transformer: str
    timestep: float
    branches: tuple[str, ...]


class _Header(Schema, frozen=True):
    prompt: str
    channels: int
    identity: dict[str, Any]
    steps: tuple[_Step, ...]


def save_trajectory(path: str | os.PathLike[str], trajectory: Trajectory) -> None:
    """Writes the file whole or not at all; makes its folder.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    header = _Header(
        prompt=trajectory.prompt,
        channels=trajectory.channels,
        identity=dict(trajectory.identity),
        steps=tuple(
            _Step(transformer=s.transformer, timestep=s.timestep, branches=tuple(s.v)) for s in trajectory.steps
        ),
    )
    prepare_file(path)
    save_tensor_document(path, KIND, header, _tensors(trajectory))


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Reads a file that `save_trajectory` wrote.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: it is something else, of another version, or damaged; the message says which and what to do.
    """
    path = Path(path)
    header, tensors = load_tensor_document(path, KIND, _Header)
    try:
        return _trajectory(header, tensors)
    except ValueError as error:
        raise FileError(f"{printable(path)}: {error}; {KIND.remedy}") from error


def _tensors(trajectory: Trajectory) -> dict[str, Tensor]:
    """By the number of the step and, of outputs, that of the branch in it."""
    found = {} if trajectory.final is None else {FINAL: trajectory.final}
    for number, step in enumerate(trajectory.steps):
        found[_x(number)] = step.x
        found |= {_v(number, branch): v for branch, v in enumerate(step.v.values())}
    return found


def _trajectory(header: _Header, tensors: dict[str, Tensor]) -> Trajectory:
    names = {name for number, step in enumerate(header.steps) for name in _names(number, step)}
    if set(tensors) - {FINAL} != names:
        wrong = sorted(set(tensors) - {FINAL} ^ names)
        raise ValueError(f"expected the tensors that its steps have, found one too many or too few: {quoted(wrong)}")
    steps = tuple(
        TrajectoryStep(
            step.transformer,
            step.timestep,
            tensors[_x(number)],
            {branch: tensors[_v(number, place)] for place, branch in enumerate(step.branches)},
        )
        for number, step in enumerate(header.steps)
    )
    return Trajectory(header.prompt, steps, tensors.get(FINAL), header.channels, header.identity)


def _names(number: int, step: _Step) -> tuple[str, ...]:
    if len(set(step.branches)) != len(step.branches):
        raise ValueError(f"steps[{number}].branches: expected each branch once, found {quoted(list(step.branches))}")
    return _x(number), *(_v(number, place) for place in range(len(step.branches)))


def _x(step: int) -> str:
    return f"x/{step}"


def _v(step: int, branch: int) -> str:
    return f"v/{step}/{branch}"
