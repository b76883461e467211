"""SeaCache: its filter by its formula, its decisions against its bookkeeping, the noise level, and where the video lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.attach.clock import _noise_shares
from diffusers_accel.forwards import Forwards, Last, SeaCache, Taylor, seacache
from diffusers_accel.forwards.rules.seacache import axis_gain, filtered
from diffusers_accel.forwards.video import VideoView, video_view
from diffusers_accel.layout import Segment, TokenLayout
from tests.forwards.toys import TEXT, latents, toy, walk
from tests.tiny import (
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

STEPS = 8
EVERY_THIRD = SeaCache(threshold=1e9, max_skips=2)


# The filter


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_the_gain_has_a_mean_of_1_and_is_largest_for_what_stands_still(size: int, noise: float) -> None:
    gain = axis_gain(size, noise)
    assert gain.shape == (size,) and float(gain.mean()) == pytest.approx(1)
    assert int(gain.argmax()) == 0 and bool((gain >= 0).all())


def test_without_noise_the_filter_is_flat_and_of_noise_alone_it_leaves_the_mean() -> None:
    video = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(axis_gain(9, 1e-9), torch.ones(9, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(filtered(video, 0.0), video, atol=1e-5)
    mean = video.mean(dim=(-3, -2, -1), keepdim=True) * (4 * 6 * 5)  # all gain is that of frequency 0
    assert torch.allclose(filtered(video, 1.0), mean.expand_as(video), rtol=1e-3, atol=1e-3)


def by_numpy(video: Tensor, s: float) -> np.ndarray:
    """A Wiener filter for a spectrum |f|^-3 of each axis, in full."""
    gain = np.ones(video.shape[-3:])
    for axis, size in enumerate(video.shape[-3:]):
        power = 1 / (np.abs(np.fft.fftfreq(size)) ** 3 + 1e-16)
        shape = [1, 1, 1]
        shape[axis] = size
        gain = gain * ((1 - s) * power / ((1 - s) ** 2 * power + s**2)).reshape(shape)
    spectrum = np.fft.fftn(video.double().numpy(), axes=(-3, -2, -1))
    return np.fft.ifftn(spectrum * gain / gain.mean(), axes=(-3, -2, -1)).real


@pytest.mark.parametrize("noise", [0.05, 0.4, 0.9])
def test_the_filter_is_that_of_the_formula(noise: float) -> None:
    video = torch.randn(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    assert np.allclose(filtered(video, noise).numpy(), by_numpy(video, noise), atol=1e-4)
    assert filtered(video.bfloat16(), noise).dtype == torch.float32
    assert filtered(video.double(), noise).dtype == torch.float64


# What it decides


def expected_steps(xs: list[Tensor], sigmas: list[float], threshold: float, skips: int) -> list[int]:
    """The authors' bookkeeping, step by step: which steps compute."""
    found: list[int] = []
    error, skipped, before = 0.0, 0, by_numpy(xs[0], sigmas[0])
    for step, (x, sigma) in enumerate(zip(xs, sigmas, strict=True)):
        y = by_numpy(x, sigma)
        error += float(np.abs(y - before).mean() / np.abs(before).mean())
        if step in (0, len(xs) - 1) or skipped >= skips or error >= threshold:
            found.append(step)
            error, skipped = 0.0, 0
        else:
            skipped += 1
        before = y
    return found


@pytest.mark.parametrize(
    ("threshold", "skips"), [(0.1, 2), (0.25, 2), (0.6, 4), (2.0, 9), (1e9, 2), (1e9, 1), (0.0, 2)]
)
def test_steps_compute_where_the_bookkeeping_says(threshold: float, skips: int) -> None:
    """Latents of flow matching that go from noise to a smooth video, in steps of different sizes."""
    steps = 24
    sigmas = [(0.99 - 0.98 * step / steps) ** 0.7 for step in range(steps)]
    clean = latents(0, size=1).expand(1, 4, 2, 8, 8) + 0.2 * latents(1)
    noise = latents(2)
    xs = [(1 - sigma) * clean + sigma * noise for sigma in sigmas]
    expected = expected_steps(xs, sigmas, threshold, skips)
    model = toy(lambda x, t: x)
    with patch(model, Forwards(SeaCache(threshold, skips))) as done:
        walk(done, model, xs, sigmas=sigmas)
        report = done.report().forwards
    assert report is not None and report.rows[0]["steps"] == expected and len(model.ran) == len(expected)
    assert (len(expected) < steps) == (threshold > 0)


def test_thresholds_of_both_kinds_are_tried() -> None:
    """The number of computed steps falls as the threshold rises: of the cases above not all are bounded by max_skips."""
    steps = 24
    sigmas = [(0.99 - 0.98 * step / steps) ** 0.7 for step in range(steps)]
    xs = [(1 - sigma) * latents(1) + sigma * latents(2) for sigma in sigmas]
    counts = [len(expected_steps(xs, sigmas, threshold, 9)) for threshold in (0.0, 0.1, 0.25, 0.6, 2.0)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) >= 4


def test_a_residual_that_is_linear_in_the_step_is_continued_exactly() -> None:
    """By its usual predictor, as soon as two steps were computed."""
    c, xs = latents(9), [latents(seed) for seed in range(10)]
    model = toy(lambda x, t: x + c * (3 + 2 * float(t)))
    with patch(model, "seacache", threshold=1e9) as done:
        assert done.forwards is not None and done.forwards.predictor == Taylor(1, "residual", "step")
        found = walk(done, model, xs, sigmas=[0.5] * 10)
        report = done.report().forwards
    assert report is not None and report.rows[0]["steps"] == [0, 3, 6, 9]
    for step in (4, 5, 7, 8):
        assert torch.allclose(found[step], xs[step] + c * (3 + 2 * (10 - step)), atol=1e-4)
    assert not torch.allclose(found[1], xs[1] + c * 21, atol=1e-2), "one computed step tells no direction"


def test_latents_of_zeros_compute() -> None:
    model = toy(lambda x, t: x)
    with patch(model, Forwards(SeaCache(1e9))) as done:
        walk(done, model, [latents(0) * 0] * 5, sigmas=[0.5] * 5)
    assert len(model.ran) == 5, "0 / 0 says nothing"


# Noise levels


def test_an_unknown_noise_level_is_refused_before_the_model_runs() -> None:
    model = toy(lambda x, t: x)
    with (
        patch(model, "seacache") as done,
        pytest.raises(RuntimeError, match=r"Patch.step\(i, steps, sigma\).*easycache"),
    ):
        walk(done, model, [latents(0)] * 3)
    assert model.ran == []


def test_noise_levels_of_schedulers_that_are_not_of_flow_matching() -> None:
    """Of squared shares of the video, and of ratios of noise to video: both say the same of one schedule."""
    ddim = CogVideoXDDIMScheduler()
    ddim.set_timesteps(20)
    found = _noise_shares(ddim, ddim.timesteps)
    assert found is not None and list(found) == sorted(found, reverse=True) and 0 < found[-1] < found[0] <= 1
    for t, share in zip(ddim.timesteps, found, strict=True):
        video = ddim.alphas_cumprod[t] ** 0.5
        noise = (1 - ddim.alphas_cumprod[t]) ** 0.5
        assert share == pytest.approx(float(noise / (noise + video)), abs=1e-5)
    solver = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    solver.set_timesteps(20)
    by_ratio = _noise_shares(solver, solver.timesteps)
    del solver.sigmas
    by_share = _noise_shares(solver, solver.timesteps)
    assert by_ratio is not None and by_share is not None
    assert np.allclose(by_ratio[:20], by_share, atol=1e-4)
    assert _noise_shares(object(), ddim.timesteps) is None


# Where the video lies


def test_latents_are_read_as_video_in_every_layout() -> None:
    video = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)  # [B, C, frames, height, width]
    grid = TokenLayout(4, 5, 6)
    for channels, x in ((1, video), (2, video.movedim(1, 2)), (-1, video.movedim(1, -1))):
        assert torch.equal(video_view(x, channels, grid).of(x), video)
    packed = video.movedim(1, -1).flatten(1, 3)  # [B, tokens, C]
    assert torch.equal(video_view(packed, 2, grid).of(packed), video)
    in_front = TokenLayout.of(Segment("condition", 7), Segment.video((4, 5, 6)))
    longer = torch.cat([torch.zeros(2, 7, 3), packed], dim=1)
    assert video_view(longer, 2, in_front) == VideoView(2, (4, 5, 6), 7)
    assert torch.equal(video_view(longer, 2, in_front).of(longer), video)
    video_view(longer, 2, in_front).of(longer).fill_(1)
    assert bool((longer[:, :7] == 0).all()) and bool((longer[:, 7:] == 1).all()), "a view"


@pytest.mark.parametrize("shape", [(1, 119, 3), (1, 3, 4, 5), (120, 3)])
def test_latents_that_hold_other_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"expected latents with frames, height and width, or the tokens of"):
        video_view(torch.zeros(shape), 2, TokenLayout(4, 5, 6))


# Real pipelines

PIPELINES: dict[str, tuple[Any, Any, int]] = {  # with the branches of a step
    "wan": (tiny_wan, tiny_wan_call, 2),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call, 2),
    "hunyuan_video with true cfg": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given), 2),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, 1),
}


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    frames: np.ndarray = pipe(
        **call(**{"num_inference_steps": STEPS, "output_type": "latent", **overrides})
    ).frames.numpy()
    return frames


@pytest.mark.parametrize("name", PIPELINES)
def test_a_threshold_of_0_is_the_unpatched_pipeline_and_calls_do_not_mix(name: str) -> None:
    make, call, branches = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "seacache", threshold=0) as done:
        assert np.array_equal(run(pipe, call), stock)
        assert done.report().forwards.computed == STEPS * branches
    with patch(pipe, "seacache", threshold=0.4) as done:
        frames = [run(pipe, call, seed=seed) for seed in (0, 1, 0)]
        assert done.report().forwards.predicted > 0
    assert np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[0], stock)
    for seed in (0, 1):
        fresh = make()
        with patch(fresh, "seacache", threshold=0.4):
            assert np.array_equal(run(fresh, call, seed=seed), frames[seed])


def test_an_expert_begins_anew() -> None:
    pipe = tiny_wan(2)
    with patch(pipe, Forwards(EVERY_THIRD)) as done:
        run(pipe)
        first, second = (row["steps"] for row in done.report().forwards.rows)
    begins = second[0]
    assert 0 < begins < STEPS - 1
    assert first == list(range(0, begins, 3)) and second == [*range(begins, STEPS - 1, 3), STEPS - 1]


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_branches_follow_one_decision_and_do_not_mix(order: tuple[str, ...]) -> None:
    """Their latents are the same, so it is the same decision in either order."""
    shift = {"cond": 1.0, "uncond": 5.0}
    model = toy(lambda x, t: x)
    ran: dict[str, list[int]] = {name: [] for name in order}
    with patch(model, Forwards(SeaCache(0.3), Last("residual"))) as done, torch.no_grad():
        for step in range(STEPS):
            done.step(step, STEPS, 1 - step / STEPS)
            for name in order:
                model.f, before = (lambda x, t, by=shift[name]: x + by), len(model.ran)
                with model.cache_context(name):
                    x = latents(0) * (1 - 0.1 * step)
                    out = model(x, torch.tensor([float(STEPS - step)]), TEXT).sample
                assert torch.allclose(out, x + shift[name], atol=1e-5)
                ran[name] += [step] * (len(model.ran) - before)
    assert ran["cond"] == ran["uncond"] and 2 < len(ran["cond"]) < STEPS


def test_another_schedule_is_another_noise_level() -> None:
    """The same latents at other levels are filtered otherwise, by what the pipeline's own scheduler says."""
    steps = {}
    for shift in (1.0, 12.0):
        pipe = tiny_wan()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        with patch(pipe, seacache(threshold=0.25, max_skips=9)) as done:
            run(pipe, num_inference_steps=16)
            steps[shift] = done.report().forwards.rows[0]["steps"]
    assert steps[1.0] != steps[12.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": -0.1}, "expected 0 or more and finite, found -0.1"),
        ({"threshold": float("nan")}, "expected 0 or more and finite, found nan"),
        ({"threshold": "1"}, "expected 0 or more and finite, found '1'"),
        ({"max_skips": 0}, "expected an integer of 1 or more, found 0"),
        ({"max_skips": True}, "expected an integer of 1 or more, found True"),
    ],
)
def test_wrong_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeaCache(**given)
