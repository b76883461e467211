"""FlashBlock where it was meant: attention over the history of a chunk is kept from step to step, on real pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel import Plan, patch
from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import BLOCK, NAMED, AxisOrder, Band, ChunkOnly, Drop, Kept, Method, Pooled, TopHistory
from diffusers_accel.methods.select import Inputs
from diffusers_accel.search.candidates import candidates, check_candidates
from diffusers_accel.search.gates import calibrate_gates, summary
from tests.families.anyflow_far import tiny_far
from tests.families.framepack import FRAMEPACK, tiny_framepack
from tests.families.helios import helios_call, tiny_helios
from tests.families.test_other_calls import far_chunks
from tests.stages import attend, sdpa
from tests.tiny import tiny_wan

ORDER = AxisOrder()
Merged = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Chunked:
    """A pipeline, its call of 3 steps a chunk, and of each chunk in turn whether it has whole blocks of history."""

    pipe: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    history: list[bool]
    branches: int


THREE = {"num_inference_steps": 3, "output_type": "latent"}
PIPELINES = {
    "anyflow_far": Chunked(tiny_far, partial(far_chunks, **THREE), [False, True, True], 1),
    "helios": Chunked(tiny_helios, partial(helios_call, num_frames=10, **THREE), [True, True], 2),
    "framepack": Chunked(
        tiny_framepack, partial(FRAMEPACK.call, num_frames=18, **FRAMEPACK.alone, **THREE), [True, True], 1
    ),
}
every_pipeline = pytest.mark.parametrize("chunked", PIPELINES.values(), ids=PIPELINES)


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> Merged:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).double() * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


class Reference:
    """The paper's equations, over all blocks that hold nothing but history, refreshed at every n-th step of a chunk."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.kept: dict[tuple[str, int], Merged] = {}

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.now is not None and call.dense is not None
        place = call.branch, call.layer
        dense, video = call.dense(q, k, v), call.layout.video_runs[0]
        history = video.start // BLOCK * BLOCK  # it comes first in all of them
        first, last = (-(-(video.start - call.layout.query_start) // BLOCK), (video.stop - call.layout.query_start))
        last = last // BLOCK if last < q.shape[1] else -(-last // BLOCK)
        rows = slice(max(first, 0) * BLOCK, last * BLOCK)  # whole blocks of video: others are exact
        if not history:
            return dense
        if call.now[0] % self.every == 0:
            self.kept[place] = partial_attention(q[:, rows], k[:, :history], v[:, :history])
        (out, lse), (own, own_lse) = self.kept[place], partial_attention(q[:, rows], k[:, history:], v[:, history:])
        weight = torch.sigmoid(lse - own_lse).transpose(1, 2)[..., None]
        dense = dense.clone()
        dense[:, rows] = (weight * out + (1 - weight) * own).to(dense.dtype)
        return dense


def latents(pipe: Any, chunked: Chunked) -> Tensor:
    frames = pipe(**chunked.call()).frames
    return (
        torch.cat([torch.as_tensor(each) for each in frames], -3)
        if isinstance(frames, list)
        else torch.as_tensor(frames)
    )


@every_pipeline
def test_the_history_is_kept_within_a_chunk_as_the_paper_says(chunked: Chunked) -> None:
    pipe = chunked.pipe()
    stock, layers = latents(pipe, chunked), len(find(pipe)["transformer"][1].self_attention(pipe.transformer))
    heads = find(pipe)["transformer"][1].shape(pipe.transformer).heads
    for every, reused in ((None, 2), (2, 1)):
        reference = Reference(every or 99)
        with attach(pipe, lambda site, reference=reference: reference):
            expected = latents(pipe, chunked)
        with patch(pipe, "history", refresh_every=every) as done:
            found, report = latents(pipe, chunked), done.report()
        assert (found - expected).abs().max() <= 1e-4 * stock.abs().max() < 10 * (found - stock).abs().max()
        steps = reused * sum(chunked.history) * chunked.branches * layers
        assert sum(row["reused"] for row in report.rows) == steps * heads, "counted on the pipeline"


def test_reading_the_best_of_the_history_lies_between_all_and_none() -> None:
    chunked = PIPELINES["anyflow_far"]
    pipe = chunked.pipe()
    stock, errors = latents(pipe, chunked), {}
    for density in (0.0, 0.5, 1.0):
        with patch(pipe, "history", density=density) as done:
            errors[density] = float((latents(pipe, chunked) - stock).abs().mean())
            assert done.report().density == 1.0 if density == 1 else done.report().density < 1
    assert errors[1.0] <= 1e-5 < errors[0.5] < errors[0.0]


@pytest.mark.parametrize("name", ["anyflow_far", "helios"])
def test_a_gate_is_calibrated_chunk_by_chunk(name: str) -> None:
    chunked = PIPELINES[name]
    pipe = chunked.pipe()
    module, family = find(pipe)["transformer"]
    plan = Plan.uniform(NAMED["history"](), family.name, {"transformer": family.shape(module)})
    stock, call = latents(pipe, chunked), chunked.call()
    prompt = {name: call.pop(name) for name in list(call) if name.startswith(("prompt", "pooled", "negative"))}
    call.pop("generator", None)
    never = calibrate_gates(pipe, plan, [prompt], call=call, gamma=-1.0, max_lse_change=1e9, progress=False)
    gate = never.tensors["refresh/transformer"]
    assert gate[0].all() and not gate[1:].any() and len(gate) == 3, summary(never)
    always = calibrate_gates(pipe, plan, [prompt], call=call, gamma=1.0, max_lse_change=0.0, progress=False)
    assert always.tensors["refresh/transformer"].all()
    with patch(pipe, always):
        assert (latents(pipe, chunked) - stock).abs().max() <= 1e-4 * stock.abs().max()


def test_which_blocks_are_history() -> None:
    layout = TokenLayout.of(
        Segment("history", 200, queries=False), Segment("history", 200), Segment.video((2, 8, 16)), Segment("text", 40)
    )
    mask = ChunkOnly().pattern(AttentionCall(layout), ORDER, {}, Inputs(torch.device("cpu"))).mask()[0, 0]
    # 400 tokens of history are 3 whole blocks of keys. Queries begin at token 200: 200 of history, 256 of video, 40 of text
    assert mask.shape == (4, 6) and mask[:, 3:].all()
    assert mask[:, :3].any(1).tolist() == [True, True, False, True]
    assert ChunkOnly().expected_density(ORDER, layout) == 0.5 and ChunkOnly().expected_density(ORDER) is None
    assert TopHistory(0.4).expected_density(ORDER, layout) == pytest.approx(4 / 6)
    short = TokenLayout.of(Segment("history", 100), Segment.video((2, 8, 16)))
    assert ChunkOnly().reads_all_in(ORDER, short) and not ChunkOnly().reads_all_in(ORDER, layout)


def test_models_without_a_history_refuse_it_before_anything_is_attached() -> None:
    pipe = tiny_wan()
    with pytest.raises(ValueError, match=r"\(anyflow_far, helios, framepack\), found wan, .* take \"cached\""):
        patch(pipe, "history")
    assert {family.name for family in FAMILIES.values() if family.history} == set(PIPELINES)
    with pytest.raises(
        ValueError,
        match="cannot be searched: it is for video that is made chunk by chunk, and this model makes all frames together",
    ):
        check_candidates((*candidates(), Method(select=ChunkOnly(), rest=Kept())))


def test_orders_make_no_difference_to_it() -> None:
    for select in (ChunkOnly(), TopHistory(0.3)):
        with pytest.raises(ValueError, match="leave the order out"):
            Method(AxisOrder("hwf"), select)


def test_a_call_without_a_history_calibrates_no_gate() -> None:
    pipe = tiny_far()
    module, family = find(pipe)["transformer"]
    plan = Plan.uniform(NAMED["history"](), family.name, {"transformer": family.shape(module)})
    call = far_chunks(chunk_partition=[3], num_frames=5, num_inference_steps=2)
    prompt = {name: call.pop(name) for name in list(call) if name.startswith(("prompt", "negative"))}
    call.pop("generator")
    with pytest.raises(ValueError, match="nothing could be compared: .* with a call of several chunks"):
        calibrate_gates(pipe, plan, [prompt], call=call, progress=False)


def test_a_history_in_pieces_is_refused_by_those_that_need_it_alone() -> None:
    part = Segment("history", 256)
    call = AttentionCall(TokenLayout.of(part, Segment.video((2, 8, 16)), part))
    assert Band(0.5).pattern(call, ORDER, {}, Inputs(torch.device("cpu"))).key_blocks == 6
    with pytest.raises(ValueError, match="expected the history of a video in one place"):
        ChunkOnly().pattern(call, ORDER, {}, Inputs(torch.device("cpu")))


def test_a_pooled_history_of_equal_tokens_is_all_of_it() -> None:
    layout = TokenLayout.of(Segment("history", 256, queries=False), Segment.video((2, 8, 16)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 16, generator=generator) for tokens in (256, 512, 512))
    for x in (k, v):
        x[:, :256] = x[:, :256:128].repeat_interleave(128, dim=1)
    pooled, dropped = (Method(select=ChunkOnly(), rest=rest) for rest in (Pooled(), Drop()))
    expected = sdpa(q, k, v)
    torch.testing.assert_close(attend((pooled,) * 2, layout, (q, k, v)).out, expected)
    assert (attend((dropped,) * 2, layout, (q, k, v)).out - expected).abs().max() > 0.05
