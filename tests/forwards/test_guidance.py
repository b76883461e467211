"""The unconditional pass predicted from the conditional one: exact where their difference stands still, in pipelines too."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.forwards import Forwards, Guided, Interval, Last
from tests.forwards.toys import TEXT, latents, toy
from tests.tiny import (
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

STEPS = 8
ALL_BUT = Forwards(Interval(3, 0.0), Guided())


def given(x: Tensor, t: Tensor, by: Any) -> Tensor:
    return torch.tanh(x) * (1 + t[0]) + by


def pairs(forwards: Any, difference: Any, names: tuple[str, ...] = ("cond", "uncond"), steps: int = STEPS) -> Any:
    """(branch -> steps that ran, branch -> outputs, branch -> what they should be) of a loop in which each branch gives tanh of
    the latents, and each but the first a difference(step) more."""
    model = toy(lambda x, t: x)
    ran: dict[str, list[int]] = {name: [] for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    true: dict[str, list[Tensor]] = {name: [] for name in names}
    with patch(model, forwards) as done, torch.no_grad():
        for step in range(steps):
            done.step(step, steps)
            for place, name in enumerate(names):
                by = place * difference(step)
                model.f = partial(given, by=by)
                before, x, t = len(model.ran), latents(step), torch.tensor([float(steps - step)])
                with model.cache_context(name):
                    found[name].append(model(x, t, TEXT + place).sample)
                true[name].append(model.f(x, t))
                ran[name] += [step] * (len(model.ran) - before)
        report = done.report()
    return ran, found, true, report


def test_a_difference_that_stands_still_is_exact() -> None:
    """However fast both change; the first branch is never predicted."""
    c = latents(99)
    ran, found, true, report = pairs(ALL_BUT, lambda step: c)
    assert ran == {"cond": list(range(STEPS)), "uncond": [0, 3, 6, 7]}
    for name in found:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[name], true[name], strict=True))
    row = report.forwards.rows[0]
    assert row["why"]["first branch of a step"] == STEPS - 2 and row["predicted"] == 4 and not report.notes


def test_the_error_is_how_far_the_difference_has_moved() -> None:
    c = latents(99)
    _, found, true, _ = pairs(ALL_BUT, lambda step: c * step)
    for step, since in ((1, 1), (2, 2), (4, 1), (5, 2)):
        off = true["uncond"][step] - found["uncond"][step]
        assert torch.allclose(off, c * since, atol=1e-4)


def test_every_step_of_all_branches_computes_with_an_interval_of_1() -> None:
    ran, found, true, _ = pairs(Forwards(Interval(1, 0.0), Guided()), lambda step: latents(step))
    assert ran["uncond"] == list(range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(found["uncond"], true["uncond"], strict=True))


def test_the_retention_computes_and_a_third_branch_follows_the_decision() -> None:
    c = latents(99)
    ran, found, true, _ = pairs(Forwards(Interval(9, 0.5), Guided()), lambda step: c, ("cond", "uncond", "perturbed"))
    assert ran["uncond"] == ran["perturbed"] == [0, 1, 2, 3, 7] and ran["cond"] == list(range(STEPS))
    for name in found:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[name], true[name], strict=True))


@pytest.mark.parametrize("other", [Last("velocity"), Last("residual")])
def test_other_predictors_reuse_the_pass_alone(other: Any) -> None:
    """Without its sight of the other branch a prediction is off by how far that has moved."""
    c = latents(99)
    ran, found, true, _ = pairs(Forwards(Interval(3, 0.0), other, ("uncond",)), lambda step: c)
    assert ran == {"cond": list(range(STEPS)), "uncond": [0, 3, 6, 7]}
    assert not torch.allclose(found["uncond"][1], true["uncond"][1], atol=0.1)


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (1.0, 3.0), (2.0, 3.0)])
def test_bands_are_weighted_in_their_part_of_the_schedule(low: float, high: float) -> None:
    """A difference that is the same everywhere is of low frequency, a checkerboard of high."""
    flat = torch.ones(1, 4, 2, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    _, found, true, _ = pairs(Forwards(Interval(3, 0.0), Guided(low, high, 0.5)), lambda step: 3 * flat + board)
    for step in (1, 2, 4, 5):
        by_low, by_high = (low, 1.0) if step < 4 else (1.0, high)
        extra = found["uncond"][step] - true["uncond"][step]
        assert torch.allclose(extra, 3 * flat * (by_low - 1) + board * (by_high - 1), atol=1e-4)


def test_a_branch_of_another_batch_than_the_first_computes() -> None:
    """As of LTX-2, whose first forward of a step holds two branches and whose further ones hold one."""
    model = toy(lambda x, t: x)
    with patch(model, ALL_BUT) as done, torch.no_grad():
        for step in range(STEPS):
            done.step(step, STEPS)
            for name, rows in (("cond_uncond", 2), ("perturbed", 1)):
                with model.cache_context(name):
                    x = latents(step).expand(rows, -1, -1, -1, -1)
                    out = model(x, torch.tensor([float(STEPS - step)]), TEXT + rows).sample
                assert torch.equal(out, x)
        assert len(model.ran) == 2 * STEPS and any("predicts nothing" in note for note in done.report().notes)


def test_what_is_kept_is_counted() -> None:
    """Of the later branch x, v and the first branch's v of one computed step and the latents of the last one, and the first
    branch's v of the running step."""
    _, _, _, report = pairs(ALL_BUT, lambda step: latents(99))
    assert report.forwards.rows[0]["cache_bytes"] == 5 * latents(0).numel() * 4


# Real pipelines

PIPELINES: dict[str, tuple[Any, Any]] = {
    "wan": (tiny_wan, tiny_wan_call),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call),
    "hunyuan_video": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given)),
}


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **overrides}
    frames: np.ndarray = pipe(**call(**given)).frames.numpy()
    return frames


@pytest.mark.parametrize("name", PIPELINES)
def test_the_unconditional_pass_is_left_out_in_pipelines(name: str) -> None:
    make, call = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "guidance", every=1) as done:
        assert np.array_equal(run(pipe, call), stock)
    with patch(pipe, "guidance", every=3, retention=0.0) as done:
        frames = run(pipe, call)
        rows = done.report().forwards.rows
        assert np.isfinite(frames).all() and not np.array_equal(frames, stock)
        assert sum(row["why"].get("first branch of a step", 0) for row in rows) == STEPS - 1 - 1
        assert 0 < sum(row["predicted"] for row in rows) <= STEPS - 2
        assert np.array_equal(run(pipe, call), frames), "a second call begins anew"
    assert np.array_equal(run(pipe, call), stock)


def test_the_prediction_is_nearer_than_reuse() -> None:
    """On a real model: what the unconditional pass gives is nearer to the other branch and their difference than to its past."""
    pipe = tiny_wan()
    stock = run(pipe)
    off = {}
    for name, predictor in (("guided", Guided()), ("reused", Last("velocity"))):
        with patch(pipe, Forwards(Interval(3, 0.0), predictor, ("uncond",))):
            off[name] = float(np.abs(run(pipe) - stock).mean())
    assert off["guided"] < off["reused"]


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (tiny_cogvideox, tiny_cogvideox_call),
        (tiny_wan, lambda **given: tiny_wan_call(**{**given, "guidance_scale": 1.0})),
    ],
)
def test_one_forward_a_step_is_told(make: Any, call: Any) -> None:
    """Guidance in one batch, or none: nothing is predicted, and that is said."""
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "guidance", every=3, retention=0.0) as done:
        assert np.array_equal(run(pipe, call), stock)
        report = done.report()
        assert report.forwards.predicted == 0
        assert any(
            "predicts nothing; no step of this call has a second forward like its first" in note
            for note in report.notes
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(0), "every is a number of steps, expected an integer of 1 or more, found 0"),
        (lambda: Interval(True), "expected an integer of 1 or more, found True"),
        (lambda: Interval(2, 1.5), r"retention is a share of the schedule, expected in \[0, 1\], found 1.5"),
        (lambda: Guided(0.0), "low is a factor, expected a number above 0, found 0.0"),
        (lambda: Guided(high=float("inf")), "high is a factor"),
        (lambda: Guided(turn=2.0), r"turn is a share of the schedule, expected in \[0, 1\], found 2.0"),
    ],
)
def test_wrong_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
