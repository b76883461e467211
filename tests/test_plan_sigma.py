"""Spans by sigma: the noise level of the running step, and the methods that a plan gives for it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from diffusers_accel import Plan, patch
from diffusers_accel.api import attach
from diffusers_accel.attach import clock
from diffusers_accel.call import AttentionCall
from diffusers_accel.evals.report.render import html
from diffusers_accel.methods import DENSE, Draft, Kept, Method, Patches, Skip
from diffusers_accel.plan import PlanError, Span
from diffusers_accel.plan.span import By
from diffusers_accel.search.gates import calibrate_gates
from diffusers_accel.shape import ModelShape
from tests.evals import synthetic
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

TINY = ModelShape(LAYERS, HEADS, HEAD_DIM)
METHODS = {"a": DENSE, "b": Method(select=Skip())}


def windows(*edges: float, by: By = "sigma", names: tuple[str, ...] = ("transformer",), **changes: Any) -> Plan:
    """Dense and skipping spans in turn, with these borders."""
    spans = tuple(
        Span(start, stop, dict.fromkeys(names, ("ab"[number % 2] * HEADS,) * LAYERS), by)
        for number, (start, stop) in enumerate(zip(edges, edges[1:]))
    )
    given = {"family": "wan", "models": dict.fromkeys(names, TINY), "methods": METHODS, "spans": spans}
    return Plan(**{**given, **changes})


class Watch:
    """An engine that notes the noise level at the first layer."""

    def __init__(self, seen: list[AttentionCall]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert call.dense is not None
        if call.layer == 0:
            self.seen.append(call)
        return call.dense(q, k, v)


def seen(target: Any, run: Any) -> list[float | None]:
    """What calls are told, once a step."""
    calls: list[AttentionCall] = []
    with attach(target, lambda site: Watch(calls)):
        run()
    steps = {call.now: call.sigma for call in calls}
    assert all(steps[call.now] == call.sigma for call in calls), "the passes of a step are told the same"
    return list(steps.values())


def wan(scheduler: Any = None, **given: Any) -> WanPipeline:
    pipe = tiny_wan(**given)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def latents(pipe: Any, steps: int = 5, **given: Any) -> Any:
    return pipe(**tiny_wan_call(output_type="latent", num_inference_steps=steps, **given)).frames


# The noise level


@pytest.mark.parametrize("patched", ["pipeline", "transformer"])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=7.0, use_karras_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    ],
    ids=lambda each: type(each).__name__,
)
def test_sigma_is_the_schedulers_own(scheduler: Any, patched: str) -> None:
    pipe = wan(scheduler)
    target = pipe if patched == "pipeline" else pipe.transformer
    found = seen(target, lambda: latents(pipe))
    assert len(found) == 5 and found == pytest.approx(scheduler.sigmas[:5].tolist(), abs=1e-6)
    assert found == sorted(found, reverse=True) and 0.9 < found[0] <= 1


def test_a_scheduler_of_second_order_tells_each_of_its_evaluations() -> None:
    pipe = wan(FlowMatchHeunDiscreteScheduler(shift=3.0))
    found = seen(pipe, lambda: latents(pipe, steps=3))
    assert found == pytest.approx(pipe.scheduler.sigmas[:-1].tolist(), abs=1e-6) and len(found) == 5


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_video_to_video_begins_later(strength: float) -> None:
    pipe = WanVideoToVideoPipeline.from_pipe(tiny_wan())
    pipe.set_progress_bar_config(disable=True)
    edit = {
        "video": [np.zeros((64, 64, 3), dtype=np.uint8)] * 5,
        "prompt_embeds": torch.ones(1, 8, TEXT_DIM),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_inference_steps": 8,
        "strength": strength,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    found = seen(pipe, lambda: pipe(**edit))
    assert found == pytest.approx(pipe.scheduler.sigmas[8 - len(found) : 8].tolist())
    assert len(found) == int(8 * strength)
    with patch(pipe, windows(1.0, 0.8, 0.0)) as done:
        pipe(**edit)
        ran = done.report().rows[0]["methods"]
        low = sum(sigma <= 0.8 for sigma in found)
        assert ran.get("skip", 0) == low * HEADS and ran.get("dense", 0) == (len(found) - low) * HEADS


def test_hunyuan_tells_it_too() -> None:
    pipe = tiny_hunyuan()
    found = seen(pipe, lambda: pipe(**tiny_hunyuan_call(true_cfg=True, output_type="latent")))
    assert found == pytest.approx(pipe.scheduler.sigmas[:5].tolist())


def test_a_modular_pipeline_tells_it_through_its_guider() -> None:
    pipe: Any = WanCoreDenoiseStep().init_pipeline()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.update_components(transformer=tiny_wan_transformer(), scheduler=scheduler)
    given = {
        "prompt_embeds": torch.ones(1, 8, TEXT_DIM),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
        "latents": torch.ones(1, 4, 3, 32, 32),
        "num_inference_steps": 4,
    }
    found = seen(pipe, lambda: pipe(**given, height=256, width=256, num_frames=9))
    assert found == pytest.approx(pipe.scheduler.sigmas[:4].tolist())


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM", "UniPC"])
def test_other_measures_of_noise_are_not_taken_for_sigma(scheduler: str) -> None:
    if scheduler == "UniPC":  # the sigmas of variance preserving diffusion end within 0..1, but begin far above
        pipe: Any = wan(UniPCMultistepScheduler())
        run = lambda: latents(pipe)  # noqa: E731
        plan = windows(1.0, 0.5, 0.0)
    else:
        pipe = tiny_cogvideox()
        if scheduler == "DPM":
            pipe.scheduler = CogVideoXDPMScheduler()
        run = lambda: pipe(**tiny_cogvideox_call(output_type="latent"))  # noqa: E731
        plan = windows(1.0, 0.5, 0.0, family="cogvideox")
    assert set(seen(pipe, run)) == {None}
    with patch(pipe, plan) as done:
        with pytest.raises(RuntimeError, match=r"windows of sigma, but nobody says .*scheduler\.sigmas .*Patch\.step"):
            run()
        assert [row["calls"] for row in done.report().rows] == [0] * LAYERS, "refused before any attention"


@pytest.mark.parametrize(
    ("sigmas", "levels"),
    [
        ([1.0, 0.5, 0.0], (1.0, 0.5, 0.0)),
        ([1.0000001, 0.5, 0.5, -1e-7], (1.0, 0.5, 0.5, 0.0)),
        ([0.0, 0.5, 1.0], None),  # of a scheduler that inverts them
        ([14.6, 0.5, 0.0], None),
        ([1.0, 0.5, -0.5], None),
        ([1.0, math.nan, 0.0], None),
        ([], None),
    ],
)
def test_which_sigmas_are_those_of_flow_matching(sigmas: list[float], levels: Any) -> None:
    found = clock._levels(torch.tensor(sigmas))
    assert found == (None if levels is None else pytest.approx(levels))


def test_sigmas_are_read_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie on a GPU, which each reading would wait for."""
    pipe, reads = tiny_wan(), []
    original = clock._levels
    monkeypatch.setattr(clock, "_levels", lambda sigmas: reads.append(1) or original(sigmas))
    with patch(pipe, windows(1.0, 0.5, 0.0)):
        latents(pipe)
        latents(pipe)
    assert len(reads) == 2


def test_a_loop_of_your_own_says_it() -> None:
    model = tiny_wan_transformer()
    given = torch.zeros(1, 4, 3, 32, 32), torch.tensor([1]), torch.zeros(1, 8, TEXT_DIM)
    with patch(model, windows(1.0, 0.5, 0.0)) as done, torch.no_grad():
        for sigma, skipped in ((1.0, 0), (0.75, 0), (0.5, HEADS), (0.0, 2 * HEADS)):
            done.step(0, 4, sigma=sigma)
            model(*given)
            assert done.report().rows[0]["methods"].get("skip", 0) == skipped
        for sigma in (None, 1.1, -0.1, math.nan):
            with pytest.raises((RuntimeError, ValueError), match="sigma"):
                done.step(0, 4, sigma=sigma)
                model(*given)
    with patch(model, windows(1.0, 0.5, 0.0)) as done, torch.no_grad():
        with pytest.raises(RuntimeError, match="nobody says the noise level"):
            model(*given)
        with model.cache_context("cond", step_index=1, num_inference_steps=4, sigma=0.25):
            model(*given)
        assert done.report().rows[0]["methods"] == {"skip": HEADS}
        with pytest.raises(RuntimeError, match="nobody says"), model.cache_context("cond", sigma=14.6):
            model(*given)


# Plans by sigma


def test_windows_hold_their_beginning_and_not_their_end() -> None:
    plan = windows(1.0, 0.6, 0.25, 0.0)
    places = {1.0: 0, 0.61: 0, 0.6: 1, 0.26: 1, 0.25: 2, 1e-9: 2, 0.0: 2}
    assert {sigma: plan.span_at_sigma(sigma) for sigma in places} == places
    assert plan.by == "sigma" and windows(0.0, 1.0, by="share").by == "share"
    for sigma in (-0.1, 1.1, math.nan):
        with pytest.raises(PlanError, match="sigma: expected a noise level in 0..1, found"):
            plan.span_at_sigma(sigma)
    with pytest.raises(PlanError, match="windows of sigma.*ask span_at_sigma"):
        plan.span_at(0, 4)
    with pytest.raises(PlanError, match="shares of the steps.*ask span_at"):
        windows(0.0, 1.0, by="share").span_at_sigma(0.5)


WRONG: dict[str, tuple[Any, str]] = {
    "ascending": ((0.0, 0.5, 1.0), r"spans\[0\]\.from_sigma: expected 1, where the schedule begins, found 0"),
    "early end": ((1.0, 0.1), r"spans\[0\]\.to_sigma: expected 0, the end of the schedule, found 0\.1"),
    "late start": ((0.9, 0.0), r"spans\[0\]\.from_sigma: expected 1, .*found 0\.9: there is a gap; spans cover 1 to 0"),
    "empty": ((1.0, 0.5, 0.5, 0.0), r"spans\[1\]\.to_sigma: expected less than its from_sigma 0\.5, found 0\.5"),
    "backward": ((1.0, 0.5, 0.7, 0.0), r"spans\[1\]\.to_sigma: expected less than its from_sigma 0\.5, found 0\.7"),
    "above 1": ((1.5, 0.0), r"spans\[0\]\.from_sigma: expected a noise level in 0\.\.1, found 1\.5"),
    "nan": ((1.0, math.nan, 0.0), r"spans\[0\]\.to_sigma: expected a noise level .*found nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_windows_are_refused(case: str) -> None:
    edges, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        windows(*edges)


def test_gaps_overlaps_and_mixtures_are_refused() -> None:
    heads = windows(1.0, 0.0).spans[0].heads

    def spans(*given: tuple[float, float, Any]) -> Plan:
        return windows(1.0, 0.0, spans=tuple(Span(start, stop, heads, by) for start, stop, by in given))

    with pytest.raises(
        PlanError, match=r"spans\[1\]\.from_sigma: expected 0\.6, where spans\[0\] stops, found 0\.5: there is a gap"
    ):
        spans((1.0, 0.6, "sigma"), (0.5, 0.0, "sigma"))
    with pytest.raises(PlanError, match=r"spans\[1\]\.from_sigma: expected 0\.6, .*found 0\.7: they overlap"):
        spans((1.0, 0.6, "sigma"), (0.7, 0.0, "sigma"))
    with pytest.raises(
        PlanError, match=r"spans\[1\]: expected a span by sigma, as the one before it, found one by share"
    ):
        spans((1.0, 0.6, "sigma"), (0.6, 1.0, "share"))
    with pytest.raises(PlanError, match=r"spans\[0\]\.by: expected one of share, sigma, found 'step'"):
        spans((1.0, 0.0, "step"))


def test_windows_come_back_from_a_file(tmp_path: Path) -> None:
    plan, path = windows(1.0, 0.6, 0.0), tmp_path / "plan.json"
    plan.save(path)
    spans = json.loads(path.read_text())["heads"]["spans"]
    assert [(span["from_sigma"], span["to_sigma"], "start" in span) for span in spans] == [
        (1.0, 0.6, False),
        (0.6, 0.0, False),
    ]
    assert Plan.load(path) == plan != windows(1.0, 0.5, 0.0)
    assert "sigma 1 to 0.6, transformer" in plan.show() and "over all of sigma" in plan.show()
    assert plan.shares() == pytest.approx({"a": 0.4, "b": 0.6})


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"from_sigma": 1.0, "stop": 0.0}, r"heads\.spans\[0\]: .*'stop'"),
        ({"start": 0.0, "to_sigma": 0.0}, r"heads\.spans\[0\]: .*'start'"),
        ({"from_sigma": "1", "to_sigma": 0.0}, r"heads\.spans\[0\]\.from_sigma: expected .*found '1'"),
        ({"from_sigma": True, "to_sigma": 0.0}, r"heads\.spans\[0\]\.from_sigma: expected .*found True"),
        ({"from_sigma": 1.0}, r"heads\.spans\[0\]: .*'to_sigma'"),
    ],
)
def test_a_wrong_window_in_a_file_is_named(span: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    windows(1.0, 0.0).save(path)
    data = json.loads(path.read_text())
    del data["sha256"]
    data["heads"]["spans"] = [{"heads": data["heads"]["spans"][0]["heads"], **span}]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_version_1_had_no_windows(tmp_path: Path) -> None:
    data = json.loads((Path(__file__).parent / "data" / "two-experts-v1.json").read_text())
    del data["sha256"]
    for span in data["spans"]:
        span["from_sigma"], span["to_sigma"] = 1 - span.pop("start"), 1 - span.pop("stop")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r": spans\[0\]: .*unknown key 'from_sigma'"):
        Plan.load(tmp_path / "plan.json")


def test_a_window_follows_the_shift_of_the_scheduler_not_the_share_of_its_steps() -> None:
    for shift, dense in ((1.0, 4), (3.0, 6), (12.0, 7)):
        pipe = wan(FlowMatchEulerDiscreteScheduler(shift=shift))
        with patch(pipe, windows(1.0, 0.5, 0.0)) as done:
            latents(pipe, steps=8, guidance_scale=1.0)
            levels = [sigma > 0.5 for sigma in pipe.scheduler.sigmas[:8].tolist()]
            assert done.report().rows[0]["methods"]["dense"] == sum(levels) * HEADS
            assert abs(sum(levels) - dense) <= 1


def test_windows_and_shares_that_hold_the_same_steps_give_the_same_frames() -> None:
    """Two of five steps, with methods that keep something from step to step, on both experts."""
    kept = Method(Patches(), Draft(0.34), rest=Kept(2))
    names = ("transformer", "transformer_2")
    methods = {"a": DENSE, "b": kept}
    pipe = tiny_wan(experts=2)
    pipe.scheduler.set_timesteps(6)
    border = float(pipe.scheduler.sigmas[2])
    frames = []
    for plan in (
        windows(0.0, 0.4, 1.0, by="share", names=names, methods=methods),
        windows(1.0, math.nextafter(border, 2), 0.0, names=names, methods=methods),
    ):
        with patch(pipe, plan) as done:
            frames.append(latents(pipe, steps=6))
            assert any(row["reused"] for row in done.report().rows)
    assert frames[0].equal(frames[1])


def test_gates_are_calibrated_for_windows_too() -> None:
    methods = {"a": DENSE, "b": Method(Patches(), Draft(0.34), rest=Kept(3))}
    plan = windows(1.0, 0.7, 0.0, methods=methods)
    call = {
        key: value for key, value in tiny_wan_call().items() if key not in ("generator", "prompt_embeds", "output_type")
    }
    pipe = tiny_wan()
    prompt = {"prompt_embeds": tiny_wan_call()["prompt_embeds"]}
    found = calibrate_gates(pipe, plan, [prompt], call=call, gamma=-1.0, max_lse_change=99.0, progress=False)
    levels = pipe.scheduler.sigmas[:5].tolist()
    first = next(step for step, sigma in enumerate(levels) if sigma <= 0.7)
    gate = found.tensors["refresh/transformer"]
    assert gate.flatten(1).any(1).tolist() == [step <= first for step in range(5)], (
        "dense steps, and the first of the window"
    )
    with patch(pipe, found) as done:
        latents(pipe)
        assert done.report().rows[0]["reused"] == 2 * HEADS * (4 - first)


def test_the_report_names_windows() -> None:
    report = synthetic.report({"plan": [1.2, 1.3]})
    page = html(
        dataclasses.replace(report, subjects=(dataclasses.replace(report.subjects[0], plan=windows(1.0, 0.6, 0.0)),))
    )
    assert "sigma 1 to 0.6" in page and "sigma 0.6 to 0" in page
