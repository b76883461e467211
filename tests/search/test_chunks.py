"""A search on models that make a video chunk by chunk, each chunk with a schedule of its own and most with a history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import find
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, Band, ChunkOnly, Draft, Kept, Method, Patches, Stripe, TopHistory
from diffusers_accel.search import plan_search
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import candidates_for, check_candidates
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.running import Enough, Schedules
from diffusers_accel.search.scores import Scores
from tests.families.anyflow_far import tiny_far
from tests.families.framepack import FRAMEPACK, tiny_framepack
from tests.families.helios import helios_call, tiny_helios
from tests.families.motif_video import MOTIF_VIDEO, tiny_motif_video
from tests.families.skyreels_v2 import forcing_call, tiny_forcing
from tests.families.test_other_calls import far_chunks, pyramid, pyramid_call
from tests.families.wan_animate import animate_call, tiny_animate
from tests.tiny import tiny_wan

STEPS = 4
CHUNK = Method(select=ChunkOnly(), rest=Kept(None))
FOR_ALL = (DENSE, Method(select=Band(0.4)), Method(Patches(), Draft(0.4)), Method(Patches(), Draft(0.3), rest=Kept(2)))


@dataclass(frozen=True)
class Chunked:
    """A pipeline, its call of 4 steps a chunk, how many chunks, which of them stands for all, whether they have a history."""

    pipe: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    chunks: int
    usual: int = 0
    history: bool = True


FOUR = {"num_inference_steps": STEPS, "output_type": "latent"}
PIPELINES = {
    "AnyFlow-FAR": Chunked(tiny_far, partial(far_chunks, **FOUR), 3, usual=1),
    "Helios": Chunked(tiny_helios, partial(helios_call, num_frames=10, **FOUR), 2),
    "FramePack": Chunked(tiny_framepack, partial(FRAMEPACK.call, num_frames=18, **FOUR), 2),
    "diffusion forcing, long": Chunked(
        tiny_forcing,
        partial(forcing_call, num_frames=9, base_num_frames=5, overlap_history=3, **FOUR),
        3,
        history=False,
    ),
    "Wan Animate, two segments": Chunked(
        tiny_animate, partial(animate_call, frames=17, guidance_scale=1.0, **FOUR), 2, history=False
    ),
}
every_pipeline = pytest.mark.parametrize("chunked", PIPELINES.values(), ids=PIPELINES)


def search(pipe: Any, call: dict[str, Any], path: Path, **overrides: Any) -> Any:
    prompt = {name: value for name, value in call.items() if name != "generator"}
    options = {
        "call": {},
        "budget": Budget.density(0.9),
        "candidates": FOR_ALL,
        "rows": 32,
        "spans": (0.5,),
        "scores_path": path,
        "progress": False,
    }
    return search_plan(pipe, [prompt], **{**options, **overrides})


@every_pipeline
def test_all_chunks_are_measured_and_the_plan_keeps_its_word(chunked: Chunked, tmp_path: Path) -> None:
    pipe, path = chunked.pipe(), tmp_path / "s.safetensors"
    methods = (*FOR_ALL, CHUNK, Method(select=TopHistory(0.5), rest=Kept(None))) if chunked.history else FOR_ALL
    plan = search(pipe, chunked.call(), path, candidates=methods)
    scores = Scores.load(path)
    assert scores.runs[0].chunk == chunked.usual
    (calls,) = (scores.calls(name) for name in scores.models)
    branches = calls[0] / (chunked.chunks * STEPS / 2)
    assert branches in (1, 2) and calls.tolist() == [branches * chunked.chunks * STEPS / 2] * 2
    samples = scores.samples("transformer")
    rows = samples[0, 0, 0, 0] / (branches * chunked.chunks)
    assert rows in (1, 2) and (samples == rows * branches * chunked.chunks).all(), "one step of each span and chunk"
    assert len(scores.impacts) == 2 and all((scores.measured_impacts(name) > 0).all() for name in scores.models)
    if chunked.history:
        error, density = (each("transformer")[..., methods.index(CHUNK)] for each in (scores.error, scores.density))
        assert (error > 0).all() and ((density > 0.3) & (density < 1)).all()
    if chunked.usual:
        check_chunks_that_grow(scores, Cost.load(tmp_path / "s.cost.json"), methods.index(CHUNK))
    with patch(pipe, plan) as done:
        pipe(**chunked.call(generator=torch.Generator().manual_seed(0)))
        realised = done.report().density
    predicted = plan.provenance["predicted"]["density"]
    if any(method.rest == Kept(None) for method in plan.methods.values()):
        assert predicted - 0.1 < realised < predicted + 0.01, (
            "heads that stay as they are keep it for longer than a span"
        )
    else:
        assert realised == pytest.approx(predicted, abs=0.01)


def check_chunks_that_grow(scores: Scores, cost: Cost, chunk: int) -> None:
    """Kernels are timed at the chunk that stands for all. Its history is clean and stays as it is: what is kept of that is off by
    what changes in the queries alone, so less than what a band drops."""
    assert cost.tokens == 640, "the first chunk has 320"
    assert cost.ms["transformer"][chunk] != cost.ms["transformer"][0], (
        "it leaves out a history, which the first has not"
    )
    error = scores.error("transformer").sum((1, 2))  # [spans, candidates]
    assert (error[:, chunk] < error[:, 1]).all()


def test_what_is_known_of_the_first_chunk_is_not_taken_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has nothing before it to attend to; and the decoder runs once, in the calibration run: where spans are weighed, the run
    ends with the last step of the last chunk."""
    pipe, decoded, reached = tiny_far(), [], []
    stock = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **options: (decoded.append(1), stock(*args, **options))[1])
    monkeypatch.setattr(plan_search, "check_reach", lambda budget, share, open_share, of: reached.append(of))
    call = far_chunks(num_inference_steps=2, output_type="np")
    pipe(**call)
    once = len(decoded)
    search(pipe, call, tmp_path / "s.safetensors", progress=True, candidates=FOR_ALL[:2])
    assert len(decoded) == 2 * once > 0
    assert reached == ["a generation"]
    assert "for each chunk of a video" in capsys.readouterr().err


def test_another_picture_is_refused(tmp_path: Path) -> None:
    """Another prompt may bring another number of frames to its later chunks, but not another picture."""
    calls = [far_chunks(num_inference_steps=1, width=width) for width in (80, 64)]
    prompts = [{name: value for name, value in call.items() if name != "generator"} for call in calls]
    options = {"call": {}, "budget": Budget.density(0.85), "candidates": FOR_ALL[:2], "rows": 16, "progress": False}
    with pytest.raises(RuntimeError, match="expected one layout per search"):
        search_plan(
            tiny_far(), prompts, **options, spans=(), scores_path=tmp_path / "s.safetensors", span_weights=(1.0,)
        )


def test_the_latents_of_every_chunk_are_compared() -> None:
    last, shares = LastLatents(5), []
    last._on_share = shares.append
    pipe, latents = SimpleNamespace(), torch.zeros(1)
    for step in (0, 1, 2, 0):
        latents += 1  # in place, as some pipelines do
        assert last(pipe, step, None, {"latents": latents}) == {}
    with pytest.raises(Enough):
        last(pipe, 1, None, {"latents": torch.tensor([9.0, 8.0])})
    assert last.ending.latents.tolist() == [3.0, 9.0, 8.0] and last.ending.steps == 5
    assert last.ending.latents.dtype == torch.float64 and shares == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_schedules_are_told_apart_by_their_first_step() -> None:
    layout, schedules = TokenLayout(1, 2, 2), Schedules()
    nows = [("a", 0), ("a", 0), ("a", 1), ("b", 2), ("a", 0), ("b", 2), ("b", 1)]
    found = [schedules.of(AttentionCall(layout, transformer=name, now=(step, 3))) for name, step in nows]
    assert found == [0, 0, 0, 0, 1, 0, 1]


def test_methods_are_those_of_chunks() -> None:
    found = candidates_for(tiny_far())
    assert CHUNK in found and not any(method.select.records for method in found)
    assert {method.select.kind for method in found} == {"all", "skip", "band", "draft", "chunk", "top_history"}
    assert not any(method.select.needs_history for method in candidates_for(tiny_wan()))
    assert {method.select.kind for method in candidates_for(tiny_motif_video())} == {"all", "skip", "band", "draft"}
    assert any(method.select.records for method in candidates_for(tiny_wan()))


@pytest.mark.parametrize(
    ("pipe", "methods", "message"),
    [
        (tiny_far, (DENSE, Method(select=Stripe(0.4, calibrated=True))), "are others in other chunks or layers"),
        (
            tiny_motif_video,
            (DENSE, Method(select=Stripe(0.4, calibrated=True))),
            "are others in other chunks or layers",
        ),
        (tiny_wan, (DENSE, CHUNK), "this model makes all frames together"),
    ],
)
def test_methods_that_cannot_be_measured_are_refused(pipe: Callable[[], Any], methods: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be searched: it .*{message}"):
        search_plan(pipe(), ["a prompt"], call={}, budget=Budget.density(0.5), candidates=methods)
    with pytest.raises(ValueError, match="leave it out"):
        check_candidates(methods, [family for _, family in find(pipe()).values()])


def test_a_pyramid_is_refused() -> None:
    with pytest.raises(ValueError, match="HeliosPyramidPipeline: each stage of its pyramid is a schedule of its own"):
        search_plan(pyramid(), [pyramid_call()], call={}, budget=Budget.density(0.5))


def test_layers_that_see_other_tokens_have_times_of_their_own(tmp_path: Path) -> None:
    """Motif-Video's decoder sees the encoded video beside its own: twice the tokens, of which half stay exact."""
    pipe, path = tiny_motif_video(), tmp_path / "s.safetensors"
    plan = search(pipe, MOTIF_VIDEO.call(**FOUR), path)
    scores, cost = Scores.load(path), Cost.load(tmp_path / "s.cost.json")
    assert cost.kinds == {"transformer": ("transformer", "transformer", "transformer, 1")}
    ms, refresh_ms = cost.of_layers("transformer")
    assert ms.shape == refresh_ms.shape == (3, len(FOR_ALL)) and (ms[0] == ms[1]).all() and ms[2, 0] > ms[0, 0]
    density = scores.density("transformer")[1, :, 0, 1]
    assert density[2] > 1.2 * density[0], "of the decoder's pairs a fourth can be left out"
    with patch(pipe, plan) as done:
        MOTIF_VIDEO.run(pipe, MOTIF_VIDEO.call(**FOUR))
        realised = done.report().density
    assert realised == pytest.approx(plan.provenance["predicted"]["density"], abs=0.01)
    slow = {
        name: (dense, *[0.1 * dense] * (len(FOR_ALL) - 1)) for name, dense in zip(cost.ms, (1.0, 10.0), strict=True)
    }
    found = assign(scores, Cost(slow, slow, "a device", 1, 1, 1, cost.kinds), Budget.density(0.9))
    by_hand = [10 if layer == 2 else 1 for layer in range(3)]
    sparse = (found.choice["transformer"] > 0).mean((0, 2))  # of each layer
    left = sum(weight * (1 - 0.9 * share) for weight, share in zip(by_hand, sparse, strict=True)) / sum(by_hand)
    assert found.attention_ratio == pytest.approx(left)
