"""The scope at work in real pipelines: what is computed and counted, and that runs, branches and experts are kept apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from PIL import Image

from diffusers_accel import patch
from diffusers_accel.forwards import EasyCache, Forwards, Schedule, schedule
from diffusers_accel.forwards.report import ForwardsReport
from tests.forwards.toys import TEXT, latents, toy, walk
from tests.tiny import (
    TEXT_DIM,
    TEXT_TOKENS,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
    tiny_wan_vae,
)

STEPS = 8
SOME = schedule([0, 1, 4])  # and 7
COMPUTED = [0, 1, 4, 7]

PIPELINES: dict[str, tuple[Any, Any, int]] = {  # with the passes of a step
    "wan": (tiny_wan, tiny_wan_call, 2),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call, 2),
    "hunyuan_video": (tiny_hunyuan, tiny_hunyuan_call, 1),
    "hunyuan_video with true cfg": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given), 2),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, 1),
    "cogvideox 1.5": (lambda: tiny_cogvideox("1.5"), tiny_cogvideox_call, 1),
}


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **overrides}
    return pipe(**call(**given)).frames.numpy()


def forwards_of(done: Any) -> ForwardsReport:
    found = done.report().forwards
    assert found is not None
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_a_threshold_of_0_is_the_unpatched_pipeline_bit_for_bit(name: str) -> None:
    make, call, passes = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "easycache", threshold=0, warm_up=0) as done:
        assert np.array_equal(run(pipe, call), stock)
        assert forwards_of(done).computed == STEPS * passes and forwards_of(done).predicted == 0
    assert np.array_equal(run(pipe, call), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_steps_of_a_schedule_run_and_no_others(name: str) -> None:
    make, call, passes = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    models = {"transformer": pipe.transformer, "transformer_2": getattr(pipe, "transformer_2", None)}
    ran = dict.fromkeys(models, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            ran[name] += 1

        return hook

    for which, model in models.items():
        if model is not None:  # what is inside a block runs only where the forward is computed
            (model.blocks if hasattr(model, "blocks") else model.transformer_blocks)[0].register_forward_hook(
                count(which)
            )
    with patch(pipe, SOME) as done:
        frames = run(pipe, call)
        found = forwards_of(done)
    assert np.isfinite(frames).all() and not np.array_equal(frames, stock)
    assert ran == {**dict.fromkeys(models, 0), **{row["transformer"]: row["computed"] for row in found.rows}}
    assert found.computed + found.predicted == STEPS * passes
    steps = sorted(step for row in found.rows for step in row["steps"])
    assert steps == (sorted({*COMPUTED, 2}) if name == "wan 2.2" else COMPUTED), "an expert's first step computes"


def test_the_first_step_of_an_expert_computes_whatever_the_rule_says() -> None:
    """Also where two experts take turns, since what one of them knew is then old."""
    pipe = tiny_wan(2)
    with patch(pipe, schedule([])) as done:
        run(pipe)
        assert [row["steps"] for row in forwards_of(done).rows] == [[0], [2, 7]]
    first, second = toy(lambda x, t: x + 1), toy(lambda x, t: x - 1)
    pipe.register_modules(transformer=first, transformer_2=second)
    with patch(pipe, schedule([])) as done, torch.no_grad():
        for step, model in enumerate((first, first, second, first, first, second)):
            done.step(step, 10)
            model(latents(step), torch.tensor([1.0]), TEXT)
        assert [row["steps"] for row in forwards_of(done).rows] == [[0, 3], [2, 5]]


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_other_numbers_of_steps_and_schedulers_in_turn(scheduler: str) -> None:
    """One patch over several calls is as a fresh one for each."""

    def pipeline() -> Any:
        pipe = tiny_wan()
        if scheduler == "unipc":
            pipe.scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
        return pipe

    calls: list[dict[str, Any]] = [
        {"num_inference_steps": 9, "seed": 1},
        {"num_inference_steps": 5, "seed": 2},
        {"num_inference_steps": 5, "seed": 3, "height": 32},
        {"num_inference_steps": 9, "seed": 1},
    ]
    cache = Forwards(EasyCache(0.4, 1))
    pipe, together = pipeline(), []
    with patch(pipe, cache) as done:
        for each in calls:
            together.append(run(pipe, **each))
        assert forwards_of(done).predicted > 0
    for each, frames in zip(calls, together, strict=True):
        fresh = pipeline()
        with patch(fresh, cache):
            assert np.array_equal(run(fresh, **each), frames)


def test_after_an_exception_the_next_call_begins_anew() -> None:
    """Also where it begins at a later step than the one that failed, as video-to-video may."""
    pipe = tiny_wan()
    fresh = tiny_wan()
    with patch(fresh, SOME):
        expected = run(fresh)

    def stop_at(last: int) -> Any:
        def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == last:
                raise KeyboardInterrupt
            return given

        return stop

    with patch(pipe, SOME) as done:
        for last in (0, 1, 3, 6):
            with pytest.raises(KeyboardInterrupt):
                run(pipe, callback_on_step_end=stop_at(last))
            done.clear()
            assert np.array_equal(run(pipe), expected)
            assert forwards_of(done).rows[0]["steps"] == COMPUTED
    model = toy(lambda x, t: x + 1)
    with patch(model, schedule([0])) as done, torch.no_grad():
        for step in (0, 1, 2, 5, 5, 6, 2):  # by hand nothing but the steps tells generations apart
            done.step(step, 10)
            model(latents(step), torch.tensor([float(step)]), TEXT)
        assert model.ran == [0, 5, 2]


def test_the_output_of_a_forward_that_failed_is_not_used() -> None:
    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if float(t) == 3:
            raise MemoryError
        return x + 1

    model = toy(f)
    with patch(model, schedule([3])) as done, torch.no_grad():
        for step in (0, 1):
            done.step(step, 6)
            model(latents(step), torch.tensor([float(step)]), TEXT)
        done.step(3, 6)
        with pytest.raises(MemoryError):
            model(latents(3), torch.tensor([3.0]), TEXT)
        done.step(4, 6)
        out = model(latents(4), torch.tensor([4.0]), TEXT).sample
    assert torch.allclose(out, latents(4) + 1, atol=1e-6)
    assert forwards_of(done).computed == 1


# Branches


def two_branches(order: tuple[str, ...], cache: Any, named: bool) -> dict[str, list[torch.Tensor]]:
    model = tiny_wan_transformer()
    text = {
        name: torch.randn(1, 8, TEXT_DIM, generator=torch.Generator().manual_seed(len(name)))
        for name in ("cond", "uncond")
    }
    out: dict[str, list[torch.Tensor]] = {name: [] for name in order}
    with patch(model, cache) as done, torch.no_grad():
        for step in range(STEPS):
            done.step(step, STEPS)
            for name in order:
                with model.cache_context(name if named else ""):
                    x = latents(0, size=16) * (1 + 0.05 * step)
                    out[name].append(model(x, torch.tensor([1000 - step]), text[name]).sample)
        assert forwards_of(done).predicted > 0
    return out


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("cache", [SOME, schedule([0, 2, 5], predictor="taylor"), Forwards(EasyCache(0.2, 1))])
def test_branches_of_guidance_never_mix(cache: Forwards, named: bool) -> None:
    """In either order, and each as if alone; where outputs decide, that is the one that runs first."""
    outputs = []
    for order in (("cond", "uncond"), ("uncond", "cond")):
        together = two_branches(order, cache, named)
        outputs.append(together["cond"])
        for name in order if isinstance(cache.rule, Schedule) else order[:1]:
            for a, b in zip(together[name], two_branches((name,), cache, named)[name], strict=True):
                assert torch.equal(a, b)
        assert not any(torch.equal(a, b) for a, b in zip(together["cond"], together["uncond"], strict=True))
    if isinstance(cache.rule, Schedule):
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_step_is_decided_once_on_its_first_branch() -> None:
    """The second branch follows, though its own output changes much faster."""
    model = toy(lambda x, t: x)
    texts = {"cond": TEXT, "uncond": TEXT + 1}

    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (1 if model.clock.branch == "cond" else float(t) ** 3)

    model.f = f
    with patch(model, "easycache", threshold=0.15, warm_up=2) as done, torch.no_grad():
        model.clock = done._clock
        for step in range(12):
            done.step(step, 12)
            for name, text in texts.items():
                with model.cache_context(name):
                    model(latents(0) * (1 + 0.05 * step), torch.tensor([float(step)]), text)
        row = forwards_of(done).rows[0]
    assert row["computed"] == 2 * len(row["steps"]) and 3 < len(row["steps"]) < 12
    assert sorted(model.ran) == sorted([float(step) for step in row["steps"]] * 2)


def test_a_rule_may_be_for_one_pass_alone() -> None:
    pipe = tiny_wan()
    with patch(pipe, schedule([0, 4], branches=["uncond"])) as done:
        run(pipe)
        row = forwards_of(done).rows[0]
    assert (row["computed"], row["predicted"]) == (STEPS + 3, STEPS - 3)
    assert row["why"] == {
        "a branch that is never predicted": STEPS,
        "first step of a generation": 1,
        "the rule": 1,
        "last step": 1,
    }
    assert row["steps"] == list(range(STEPS)) and not row["notes"]


def test_a_pass_that_never_runs_is_named_in_the_report() -> None:
    pipe = tiny_cogvideox()
    with patch(pipe, schedule([0], branches=["uncond"])) as done:
        run(pipe, tiny_cogvideox_call)
        assert "no branch named 'uncond' has run, only cond_uncond" in str(done.report())
        assert forwards_of(done).predicted == 0


def test_a_pass_that_appears_late_computes_first() -> None:
    model = toy(lambda x, t: x)
    with patch(model, schedule([0])) as done, torch.no_grad():
        for step in range(6):
            done.step(step, 6)
            for name, text in (("cond", TEXT), ("uncond", TEXT + 1))[: 1 + (step >= 3)]:
                with model.cache_context(name):
                    model(latents(step), torch.tensor([float(step)]), text)
        assert model.ran == [0, 3, 5, 5]


# Other calls


IMAGE = Image.new("RGB", (64, 64), (200, 40, 90))


def test_image_to_video_predicts_from_the_denoised_channels() -> None:
    """The model's input has channels of a condition behind them."""
    torch.manual_seed(0)
    transformer = tiny_wan_transformer()
    config = {**transformer.config, "in_channels": 4 + 2 + 4, "image_dim": None}
    wide = type(transformer)(**{name: value for name, value in config.items() if not name.startswith("_")}).eval()
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_vae(),
        scheduler=tiny_wan().scheduler,
        image_encoder=None,
        image_processor=None,
        transformer=wide,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny_wan_call(num_inference_steps=STEPS, output_type="latent"), "image": IMAGE}
    seen: list[tuple[int, ...]] = []
    wide.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["hidden_states"].shape)), with_kwargs=True)
    with patch(pipe, "easycache", threshold=0.5, warm_up=2) as done:
        frames = pipe(**call).frames
        assert forwards_of(done).predicted > 0 and torch.isfinite(frames).all()
    assert {shape[1] for shape in seen} == {10}
    x, c = latents(1, channels=10), latents(2)
    model = toy(lambda x, t: x + c)
    with patch(model, schedule([0])) as done:
        out = walk(done, model, [x, x * 2, x * 3])
    assert torch.allclose(out[1], x[:, :4] * 2 + c, atol=1e-5)


def test_video_to_video_with_strength_begins_in_the_middle() -> None:
    pipe = WanVideoToVideoPipeline.from_pipe(tiny_wan())
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "video": [IMAGE] * 5,
        "prompt_embeds": torch.ones(1, 8, TEXT_DIM),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_inference_steps": 12,
        "strength": 0.5,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    with patch(pipe, "schedule", shares=[0, 0.5]) as done:
        pipe(**call)
        assert forwards_of(done).rows[0]["steps"] == [0, 3, 5], "of the 6 steps that run"
    with patch(pipe, "easycache", threshold=1e9, warm_up=2) as done:
        pipe(**{**call, "guidance_scale": 1.0})
        assert forwards_of(done).rows[0]["steps"] == [0, 1, 5] and forwards_of(done).computed == 3


def test_video_to_video_of_batched_guidance() -> None:
    pipe = CogVideoXVideoToVideoPipeline.from_pipe(tiny_cogvideox())
    pipe.set_progress_bar_config(disable=True)
    with patch(pipe, "schedule", steps=[2]) as done:
        pipe(
            video=[IMAGE] * 5,
            prompt_embeds=torch.ones(1, TEXT_TOKENS, TEXT_DIM),
            negative_prompt_embeds=torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
            height=64,
            width=64,
            num_inference_steps=8,
            strength=0.5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        assert forwards_of(done).rows[0]["steps"] == [0, 2, 3] and forwards_of(done).computed == 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_predicted_outputs_have_the_form_that_is_asked_for(return_dict: bool) -> None:
    """A form that was not seen yet computes."""
    model = toy(lambda x, t: x + 1)
    with patch(model, schedule([0])) as done, torch.no_grad():
        found = []
        for step in range(4):
            done.step(step, 9)
            found.append(model(latents(step), torch.tensor([1.0]), TEXT, return_dict if step else not return_dict))
    assert type(found[1]) is type(found[2]) is type(found[3]) is not type(found[0])
    assert torch.equal(found[2][0], found[2].sample if return_dict else found[2][0])
    assert len(model.ran) == 2


def test_latents_and_outputs_may_be_written_over() -> None:
    """As CUDA graphs and careless loops do."""
    model = toy(lambda x, t: x + 1)
    with patch(model, schedule([0])) as done, torch.no_grad():
        for step in range(4):
            done.step(step, 9)
            x = latents(step)
            out = model(x, torch.tensor([1.0]), TEXT).sample
            assert torch.allclose(out, latents(step) + 1, atol=1e-6)
            x.fill_(torch.nan)
            out.fill_(torch.nan)


@pytest.mark.parametrize("change", ["size", "dtype"])
def test_latents_of_another_kind_compute(change: str) -> None:
    model = toy(lambda x, t: x + 1)
    with patch(model, schedule([0])) as done:
        xs = [latents(0), latents(1), latents(2, size=12) if change == "size" else latents(2).double(), latents(3)]
        walk(done, model, xs + [latents(4)] * 5)
        assert forwards_of(done).rows[0]["steps"] == [0, 2, 3, 8]


def test_a_model_that_does_not_know_its_step_says_what_to_do() -> None:
    model = toy(lambda x, t: x)
    with patch(model, SOME), torch.no_grad(), pytest.raises(RuntimeError, match=r"Patch.step\(i, steps\)"):
        model(latents(0), torch.tensor([1.0]), TEXT)


# What is counted


def test_predicted_forwards_count_as_no_work() -> None:
    pipe = tiny_wan()
    with patch(pipe, [SOME, "dense"]) as done:
        assert done.report().density is None and "nothing has run yet" in str(done.report())
        with done.timed() as timer:
            run(pipe)
        assert done.report().density == pytest.approx(len(COMPUTED) / STEPS)
        assert [row["calls"] for row in done.report().rows] == [2 * len(COMPUTED)] * 3
        assert timer.attention_ms > 0
        assert "8 of 16 forwards computed" in str(done.report()) and "schedule of 3 steps, last residual" in repr(done)
    with patch(pipe, SOME) as done:
        run(pipe)
        assert done.report().rows == [] and done.report().density == pytest.approx(len(COMPUTED) / STEPS)
        done.clear()
        assert forwards_of(done).computed == 0 and done.report().density is None
        with pytest.raises(ValueError, match='compose with "dense"'), done.timed():
            pass


def test_density_weighs_each_expert_by_its_own_steps() -> None:
    pipe = tiny_wan(2)
    with patch(pipe, [schedule([0]), "dense"]) as done:
        run(pipe)
        assert [row["computed"] for row in forwards_of(done).rows] == [2, 4]
        assert done.report().density == pytest.approx(6 / 16)


def test_what_is_kept_is_counted_and_given_back() -> None:
    pipe = tiny_wan()
    with patch(pipe, "schedule", steps=[0, 1, 2], predictor="taylor") as done:
        run(pipe)
        one = 4 * 3 * 32 * 32 * 4
        most = (
            2 * (3 * 2 + 1) * one
        )  # two passes, three computed forwards of latents and output, the latents of the last step
        assert forwards_of(done).rows[0]["cache_bytes"] == most
        assert done._forwards is not None and done._forwards._generation is not None
        assert done._forwards._generation.bytes == 0, "after the last step"
