"""How guidance joins branches is seen in what the scheduler is given; where it cannot be seen, that is said."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_accel.search.joining import branches_of, joined_by, told_of_steps
from tests.tiny import tiny_cogvideox, tiny_cogvideox_call, tiny_wan, tiny_wan_call


def tensors(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_is_found_in_what_it_gives(dtype):
    uncond, cond, latents = tensors(3, 2, 4, 3, 8, 8, dtype=dtype)
    cond = uncond + 0.1 * cond  # as alike as branches are
    joined = uncond + 5 * (cond - uncond)
    assert joined_by([cond, uncond], joined, latents) == pytest.approx([5, -4], abs=0.05)
    assert joined_by([cond], cond, latents) == pytest.approx([1], abs=1e-3)


def test_a_preconditioned_model_adds_the_latents():
    v, latents = tensors(2, 1, 4, 3, 8, 8)
    assert joined_by([v], 0.3 * latents - 0.7 * v, latents) == pytest.approx([-0.7])


def test_batched_guidance_holds_its_branches_in_one_output():
    uncond, cond = tensors(2, 2, 4, 3, 8, 8)
    branches = branches_of([torch.cat([uncond, cond])], cond)
    assert torch.equal(branches[0], uncond) and torch.equal(branches[1], cond)
    assert joined_by(branches, uncond + 3 * (cond - uncond), None) == pytest.approx([-2, 3])


def test_what_is_no_sum_of_the_branches_has_no_weights():
    cond, uncond, other = tensors(3, 1, 4, 3, 8, 8)
    assert joined_by([cond, uncond], other, None) is None
    assert branches_of([cond], cond[:, :2]) == [] and branches_of([cond], torch.cat([cond, cond])) == []
    assert joined_by([], cond, cond) is None


@pytest.mark.parametrize(
    ("pipe", "call", "branches"), [(tiny_wan, tiny_wan_call, 2), (tiny_cogvideox, tiny_cogvideox_call, 1)]
)
def test_of_the_pipelines_themselves(pipe, call, branches):
    """Two passes (Wan), and one of two rows (CogVideoX)."""
    pipe, outputs, found = pipe(), [], []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def told(joined: torch.Tensor, latents: torch.Tensor | None) -> None:
        parts = branches_of(outputs, joined)
        found.append((len(outputs), sorted(joined_by(parts, joined, latents))))
        outputs.clear()

    with told_of_steps(pipe, told):
        pipe(**call(output_type="latent"))
    hook.remove()
    assert len(found) == 5 and all(count == branches for count, _ in found)
    assert all(weights == pytest.approx([-2, 3], abs=1e-3) for _, weights in found)


def test_the_scheduler_is_as_before_and_copies_are_their_own():
    pipe, told = tiny_wan(), []
    scheduler = pipe.scheduler
    with told_of_steps(pipe, lambda *given: told.append(given)):
        assert inspect.signature(scheduler.step) == inspect.signature(FlowMatchEulerDiscreteScheduler().step)
        other = copy.deepcopy(scheduler)
        assert other.step.__self__ is other
        with pytest.raises(ZeroDivisionError):
            raise_in(pipe, told)
        assert len(told) == 1
        scheduler.set_timesteps(5)
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
        assert len(told) == 2, "one inside another leaves the outer one at work"
    assert "step" not in vars(scheduler)
    with told_of_steps(object(), told.append):
        pass


def raise_in(pipe, told) -> None:
    with told_of_steps(pipe, lambda *given: (told.append(given), 1 / 0)):
        pipe(**tiny_wan_call(output_type="latent"))
