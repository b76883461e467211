"""What is written is read again, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusers_accel.files import FileError, save_tensor_document
from diffusers_accel.search.steps import trajectory_file
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep
from diffusers_accel.search.steps.trajectory_file import load_trajectory, save_trajectory
from tests.search.steps.synthetic import drawn, euler


def example() -> Trajectory:
    found = euler(lambda step: {"cond": drawn(step), "uncond": drawn(step + 50)}, {"cond": 3.0, "uncond": -2.0})
    half = tuple(replace(step, x=step.x.bfloat16()) for step in found.steps)
    return replace(found, steps=half, identity={"call": {"num_inference_steps": 7}})


def test_a_trajectory_comes_back(tmp_path: Path) -> None:
    path, before = tmp_path / "folder" / "one.safetensors", example()
    save_trajectory(path, before)
    after = load_trajectory(path)
    assert (after.prompt, after.identity, after.transformers) == (before.prompt, before.identity, before.transformers)
    assert after.final is not None and before.final is not None and torch.equal(after.final, before.final)
    for one, other in zip(before.steps, after.steps, strict=True):
        assert one.timestep == other.timestep and list(one.v) == list(other.v)
        assert one.x.dtype == other.x.dtype == torch.bfloat16 and torch.equal(one.x, other.x)
        assert all(torch.equal(one.v[branch], other.v[branch]) for branch in one.v)
    save_trajectory(path, replace(before, final=None))
    assert load_trajectory(path).final is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_trajectory(path, example())
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FileError, match="damaged; delete the file and record the prompt again"):
        load_trajectory(path)
    path.write_bytes(bytes(data[:-50]))
    with pytest.raises(FileError, match="cut off"):
        load_trajectory(path)
    with pytest.raises(FileNotFoundError):
        load_trajectory(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x/7", torch.ones(1), "one too many or too few"),
        ("x/3", torch.ones(2, 4, 2, 4, 4), r"steps\[3\].x: expected the shape of the first step"),
        ("v/2/1", torch.ones(1, 4, 2, 4, 5), r"steps\[2\].v\['uncond'\]: expected the shape of x"),
        ("v/2/0", torch.full((1, 4, 2, 4, 4), torch.nan), r"steps\[2\].v\['cond'\]: expected finite"),
        ("x/0", torch.ones(1, 4, 2, 4, 4, dtype=torch.int32), r"steps\[0\].x: expected finite floating-point numbers"),
        ("final", torch.full((1,), torch.inf), "final: expected finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    """Also where the checksum is right."""
    path, before = tmp_path / "one.safetensors", example()
    header = trajectory_file._Header(
        prompt="",
        channels=1,
        identity={},
        steps=tuple(
            trajectory_file._Step(transformer=s.transformer, timestep=s.timestep, branches=tuple(s.v))
            for s in before.steps
        ),
    )
    save_tensor_document(path, trajectory_file.KIND, header, {**trajectory_file._tensors(before), name: tensor})
    with pytest.raises(FileError, match=message):
        load_trajectory(path)


def test_a_trajectory_has_steps_and_outputs() -> None:
    with pytest.raises(
        ValueError, match=r"channels: expected a dimension of latents of shape \[1, 4, 2, 4, 4\], found 5"
    ):
        replace(example(), channels=5)
    with pytest.raises(ValueError, match=r"steps\[0\].timestep: expected a number of at most 1e\+09"):
        replace(example(), steps=tuple(replace(step, timestep=1e300) for step in example().steps))
    with pytest.raises(ValueError, match="expected one step or more, found none"):
        Trajectory("", ())
    with pytest.raises(ValueError, match="expected the output of one branch or more"):
        Trajectory("", (TrajectoryStep("transformer", 1.0, torch.ones(1, 4), {}),))
