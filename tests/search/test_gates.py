"""Calibrated gates: what is compared with what, step by step, and what comes of it on tiny real pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_accel.api import patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import find
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Skip, Stored
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import Plan, PlanError, Span
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.search import gates
from diffusers_accel.search.gates import WATCHED, Watch, calibrate_gates, summary, watched_blocks
from diffusers_accel.shape import ModelShape
from tests.search.test_search import a_call, a_prompt, processors
from tests.stages import attend
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_hunyuan, tiny_hunyuan_call, tiny_wan

LAYOUT = TokenLayout(3, 16, 16)
DRAFT = Method(Patches(), Draft(0.34), rest=Kept(3))
BAND = Method(AxisOrder("hwf"), Band(0.34), rest=Kept(2))
GATED = Kept(gated=True)
NEVER, ALWAYS = {"gamma": -1.0, "max_lse_change": 1e9}, {"gamma": 1.0, "max_lse_change": 0.0}

Call = tuple[Tensor, Tensor, Tensor]


# What is compared with what


def one_layer(methods: tuple[Method, ...], tensors: dict[str, Tensor] | None = None, *borders: float) -> Plan:
    """A layer with a head for each method, the same in every span."""
    symbols = "abcdef"[: len(methods)]
    edges = (0.0, *borders, 1.0)
    return Plan(
        family="wan",
        models={"transformer": ModelShape(1, len(methods), HEAD_DIM)},
        methods=dict(zip(symbols, methods, strict=True)),
        spans=tuple(Span(start, stop, {"transformer": (symbols,)}) for start, stop in zip(edges, edges[1:])),
        tensors=tensors or {},
    )


def watched(plan: Plan, generations: list[list[Call]], branch: str = "cond", **thresholds: float) -> Tensor:
    """bool [steps, heads]: the gate of a plan of one layer after these generations of one call per step."""
    watch = Watch(plan, **{"gamma": 0.85, "max_lse_change": 0.05, **thresholds})
    for calls in generations:
        watch.begin()
        for step, qkv in enumerate(calls):
            show(watch, qkv, step, len(calls), branch)
    return watch.gate("transformer")[:, 0].bool()


def show(watch: Any, qkv: Call, step: int, steps: int, branch: str = "cond") -> None:
    """One call of a layer at a step, whose dense attention is the queries themselves."""
    heads = tuple(range(qkv[0].shape[2]))
    call = AttentionCall(LAYOUT, "transformer", 0, heads, branch, now=(step, steps), dense=lambda q, k, v: q)
    assert watch.attend(call, *qkv) is qkv[0]


def inputs(heads: int, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, LAYOUT.tokens, heads, HEAD_DIM, generator=generator) for _ in range(3))
    return q, k, v


def columns(gate: Tensor) -> list[str]:
    """Per head the steps as a string, such as "100"."""
    return ["".join(str(int(flag)) for flag in head) for head in gate.T]


@pytest.mark.parametrize("method", [DRAFT, BAND], ids=["selected", "fixed"])
def test_what_is_watched_is_what_a_plan_at_work_keeps(method: Method) -> None:
    plan, memory = one_layer((method,) * 2), LayerCache()
    attend((method,) * 2, LAYOUT, inputs(2), memory=memory, now=(0, 2))
    (held,) = memory.held.values()
    watch = Watch(plan, 0.85, 0.05)
    show(watch, inputs(2), 0, 2)
    ((_, out, lse),) = (each for calibration in watch._calibrations.values() for each in calibration._cached.values())
    torch.testing.assert_close(out, held.out)
    torch.testing.assert_close(lse, held.lse)


@pytest.mark.parametrize("method", [DRAFT, BAND], ids=["selected", "fixed"])
def test_heads_that_drift_are_flagged(method: Method) -> None:
    """Head 0 stays; the values of head 1 change altogether; the keys of head 2 move by a constant: its log-sum-exp alone does."""
    q, k, v = inputs(3)
    calls = []
    for step in range(4):
        keys, values = k.clone(), v.clone()
        values[:, :, 1] = inputs(3, seed=10 + step)[2][:, :, 1]
        keys[:, :, 2] += step
        calls.append((q, keys, values))
    plan = one_layer((method,) * 3)
    assert columns(watched(plan, [calls])) == ["1000", "1111", "1111"]
    assert columns(watched(plan, [calls], gamma=-1.0)) == ["1000", "1000", "1111"]
    assert columns(watched(plan, [calls], max_lse_change=99.0)) == ["1000", "1111", "1000"]
    assert columns(watched(plan, [calls], **NEVER)) == ["1000"] * 3


def test_a_head_is_compared_with_its_last_refresh() -> None:
    """Values turn by 20 degrees a step: 20 are reused at a cosine of 0.94, 40 are not at one of 0.77."""
    q, k, v = inputs(1)
    other = inputs(1, seed=1)[2]
    angles = torch.tensor(20.0).deg2rad() * torch.arange(5)
    calls = [(q, k, angle.cos() * v + angle.sin() * other) for angle in angles]
    assert columns(watched(one_layer((BAND,)), [calls])) == ["10101"]
    assert columns(watched(one_layer((BAND,), None, 0.5), [calls])) == ["10101"], "step 2 begins a span"
    assert columns(watched(one_layer((BAND,), None, 0.25), [calls])) == ["11010"], "and here step 1 does"


def test_a_refresh_selects_anew() -> None:
    """All changes at step 1 and stays: what is kept then is the rest of the new selection, of head 1 as well as of head 0."""
    early, late = inputs(2), inputs(2, seed=1)
    mixed = [torch.cat([a[:, :, :1], b[:, :, 1:]], 2) for a, b in zip(late, early, strict=True)]
    calls = [early, (mixed[0], mixed[1], mixed[2]), late, late]
    strict = {"gamma": 0.9999, "max_lse_change": 1e-4}
    assert columns(watched(one_layer((DRAFT, DRAFT)), [calls], **strict)) == ["1100", "1010"]
    bits, index = Stored(0.5).names(AxisOrder(), "transformer")
    masks = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors = {bits: packed(masks), index: torch.arange(2, dtype=torch.int32)[None]}
    stored = one_layer((Method(select=Stored(0.5), rest=Kept()),) * 2, tensors)
    assert columns(watched(stored, [calls], **strict)) == ["1100", "1010"], "masks that change wait for a refresh"


def test_a_refresh_reads_what_matters_then() -> None:
    """Blocks 0 and 1 get the attention at step 0, then 4 and 5, whose values change: they are read by then, not kept."""
    _, noise, values = inputs(1)
    q = torch.full_like(noise, 1.0)
    calls: list[Call] = []
    for seen, seed in ((slice(0, 256), 0), (slice(512, 768), 0), (slice(512, 768), 1)):
        k, v = 0.1 * noise, values.clone()
        k[:, seen] += 1
        v[:, 512:] = inputs(1, seed)[2][:, 512:]
        calls.append((q, k, v))
    method = Method(select=Draft(1 / 3, diagonal=False, first_frame=False), rest=Kept())
    assert columns(watched(one_layer((method,)), [calls])) == ["110"]


def test_nothing_is_held_of_what_runs_no_more() -> None:
    plan = one_layer((DRAFT, BAND), None, 0.5)
    watch = Watch(plan, 0.85, 0.05)

    def held() -> tuple[int, int]:
        return len(watch._unread), sum(len(each._cached) for each in watch._calibrations.values())

    for generation in range(2):
        watch.begin()
        assert held() == (0, 0)
        for step in range(4):
            for branch in ("cond", f"branch {generation}"):
                show(watch, inputs(2), step, 4, branch)
            assert held() == (4, 4), "two methods, two branches, one span"


def test_each_chunk_of_a_generation_selects_for_itself() -> None:
    """Its schedule begins anew, with another history of the same length."""
    plan = one_layer((Method(Patches(), Draft(0.7), rest=Kept(3)),) * 4)  # more than what is read in any case
    first, chunks, last = (Watch(plan, -1.0, 99.0) for _ in range(3))
    for seed in (0, 1):
        for step in (0, 1):
            show(chunks, inputs(4, seed), step, 2)
    show(first, inputs(4, 0), 0, 2)
    show(last, inputs(4, 1), 0, 2)
    other, held, expected = (next(iter(watch._unread.values())).mask() for watch in (first, chunks, last))
    assert torch.equal(held, expected) and not torch.equal(other, expected)


def test_all_branches_and_generations_are_samples() -> None:
    """A head drifts in one of three generations; each begins anew, though the last one ended with other values."""
    same = [inputs(1)] * 3
    other = [inputs(1, seed=seed) for seed in range(3)]
    plan = one_layer((BAND,))
    lenient = {"max_lse_change": 99.0}
    assert columns(watched(plan, [same, same, other], gamma=0.6, **lenient)) == ["100"]
    assert columns(watched(plan, [other, same, other], gamma=0.6, **lenient)) == ["111"]
    assert columns(watched(plan, [same, [inputs(1, seed=5)] * 3], gamma=0.99)) == ["100"]


def test_a_head_that_does_not_reuse_has_flags_and_a_sample_of_the_queries_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = one_layer((DENSE, DRAFT, Method(select=Skip()), BAND))
    calls = [inputs(4)] * 3
    assert columns(watched(plan, [calls])) == ["111", "100", "111", "100"]
    monkeypatch.setattr(gates, "WATCHED", 2)
    assert columns(watched(plan, [calls])) == ["111", "100", "111", "100"]


@pytest.mark.parametrize(
    ("layout", "first", "stop"),
    [
        (LAYOUT, 0, 6),
        (TokenLayout(21, 45, 80), 0, 591),
        (TokenLayout(13, 30, 45, 226, "start"), 2, 139),
        (TokenLayout(3, 16, 16, 20, "end"), 0, 6),
        (TokenLayout(1, 4, 4, 20, "end"), 0, 1),
    ],
)
def test_watched_blocks_are_spread_over_the_video(layout: TokenLayout, first: int, stop: int) -> None:
    blocks = watched_blocks(layout).tolist()
    assert blocks == sorted(set(blocks)) and len(blocks) == min(WATCHED, stop - first)
    gaps = np.diff([*blocks, stop])
    assert blocks[0] == first and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


# On pipelines


def tiny_plan(models: dict[str, ModelShape] | None = None) -> Plan:
    """In 5 steps: step 0 and 1, then the others, with heads that go on, that begin to reuse, and that never do."""
    models = models or {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
    methods = {".": DENSE, "a": DRAFT, "b": BAND}
    first, second = ("aa..",) * LAYERS, ("aabb", "abb.", "abab")
    spans = (Span(0.0, 0.4, dict.fromkeys(models, first)), Span(0.4, 1.0, dict.fromkeys(models, second)))
    return Plan("wan", models, methods, spans, provenance={"note": "by hand"})


def calibrated(pipe: Any, plan: Plan | None = None, prompts: int = 1, **options: Any) -> Plan:
    call = a_call(output_type="latent")
    return calibrate_gates(
        pipe, plan or tiny_plan(), [a_prompt(i) for i in range(prompts)], **{"call": call, "progress": False, **options}
    )


def latents(pipe: Any) -> np.ndarray:
    call = {**a_call(output_type="latent"), **a_prompt(0)}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames.numpy()


def patched(pipe: Any, plan: Plan) -> tuple[np.ndarray, int]:
    """Latents, and how many heads x calls reused."""
    with patch(pipe, plan, cache_memory_fraction=1.0) as done:
        return latents(pipe), sum(row["reused"] for row in done.report().rows)


def reusing(plan: Plan) -> Tensor:
    """bool [5, layers, heads], of the one transformer."""
    rows = [plan.spans[plan.span_at(step, 5)].heads["transformer"] for step in range(5)]
    return torch.tensor([[[plan.methods[symbol].rest.remembers for symbol in row] for row in each] for each in rows])


def test_a_gate_that_always_refreshes_is_dense() -> None:
    pipe = tiny_wan()
    plan = calibrated(pipe, **ALWAYS)
    assert plan.tensors["refresh/transformer"].tolist() == torch.ones(5, LAYERS, HEADS).tolist()
    out, reused = patched(pipe, plan)
    assert np.array_equal(out, latents(pipe)) and reused == 0


def test_a_gate_that_never_fails_refreshes_at_the_first_step_of_a_span(tmp_path: Any) -> None:
    pipe = tiny_wan()
    before = processors(pipe)
    plan = calibrated(pipe, prompts=2, seed=3, **NEVER)
    assert processors(pipe) == before
    assert plan.methods == {".": DENSE, "a": Method(Patches(), Draft(0.34), rest=GATED)} | {
        "b": Method(AxisOrder("hwf"), Band(0.34), rest=GATED)
    }
    assert plan.spans == tiny_plan().spans
    first = torch.tensor([True, False, True, False, False])[:, None, None]
    assert torch.equal(plan.tensors["refresh/transformer"].bool(), first | ~reusing(plan))
    record = plan.provenance["gates"]
    head_steps = int(reusing(plan).sum())
    assert head_steps == 6 * 2 + (4 + 3 + 4) * 3 and record["head_steps"] == head_steps
    assert (record["heads"], record["steps"], record["seed"], len(record["prompts"])) == (11, 5, 3, 2)
    # In 2 steps each interval refreshes once; in 3, that of 5 heads (every third step) once and of 6 (every second) twice.
    refreshes = 6 + 11
    assert (record["refreshes"], record["by_interval"]) == (refreshes, 6 + 5 + 2 * 6)
    assert plan.provenance["note"] == "by hand"
    assert summary(plan) == (
        "11 heads reuse, in 4.1 of 5 steps each: 1.5 refreshes per head (38%) by the gate, "
        "2.1 refreshes per head (51%) by the interval"
    )
    plan.save(tmp_path / "gated.json")
    assert Plan.load(tmp_path / "gated.json") == plan
    assert patched(pipe, Plan.load(tmp_path / "gated.json"))[1] == 2 * (head_steps - refreshes), "on both branches"


def test_a_gate_between_the_extremes_errs_between_them() -> None:
    pipe = tiny_wan()
    exact = latents(pipe)
    errors, reused = [], []
    for thresholds in (ALWAYS, {"gamma": 0.5, "max_lse_change": 0.05}, NEVER):
        plan = calibrated(pipe, **thresholds)
        out, count = patched(pipe, plan)
        errors.append(float(np.square(out - exact).sum()))
        reused.append(count)
        again = calibrated(pipe, plan, **thresholds).tensors["refresh/transformer"]
        assert torch.equal(again, plan.tensors["refresh/transformer"]), "the gate that a plan has does not matter"
    assert errors[0] == 0 < errors[1] < errors[2]
    assert reused[0] == 0 < reused[1] < reused[2]


def test_each_step_may_have_a_threshold_of_its_own() -> None:
    pipe = tiny_wan()
    steps = a_call()["num_inference_steps"]
    last = [-1.0] * (steps - 1) + [1.0]
    gate = calibrated(pipe, gamma=last, max_lse_change=1e9).tensors["refresh/transformer"]
    never = calibrated(pipe, **NEVER).tensors["refresh/transformer"]
    always = calibrated(pipe, **ALWAYS).tensors["refresh/transformer"]
    assert torch.equal(gate[:-1], never[:-1]) and torch.equal(gate[-1], always[-1]) and not torch.equal(gate, never)
    with pytest.raises(ValueError, match=f"one for each of {steps} steps"):
        calibrated(pipe, gamma=[0.5] * (steps + 1))


def test_each_expert_has_a_gate_of_the_steps_at_which_it_runs() -> None:
    pipe = tiny_wan(experts=2)
    pipe.register_to_config(boundary_ratio=0.8)
    models = {name: family.shape(module) for name, (module, family) in find(pipe).items()}
    plan = calibrated(pipe, tiny_plan(models), call=a_call(output_type="latent", num_inference_steps=7), **NEVER)
    found = [plan.tensors[f"refresh/{name}"][:, 0, 0].bool() for name in ("transformer", "transformer_2")]
    ran = [torch.zeros(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)]
    with patch(pipe, DENSE) as done:
        counts: list[list[int]] = [[0, 0]]

        def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            rows = {row["transformer"]: row["calls"] for row in done.report().rows}
            counts.append([rows[name] for name in models])
            return {}

        call = a_call(output_type="latent", num_inference_steps=7)
        pipe(**call, **a_prompt(0), callback_on_step_end=note, generator=torch.Generator().manual_seed(0))
    for which in range(2):
        ran[which] = torch.tensor([after[which] > before[which] for before, after in zip(counts, counts[1:])])
    assert not (ran[0] & ran[1]).any() and (ran[0] | ran[1]).all() and min(int(each.sum()) for each in ran) >= 2
    begins = torch.tensor([plan.span_at(step, 7) != plan.span_at(step - 1, 7) if step else True for step in range(7)])
    for own, gate in zip(ran, found, strict=True):
        takes_over = own & ~torch.cat([torch.zeros(1, dtype=torch.bool), own[:-1]])
        assert torch.equal(gate, ~own | takes_over | begins)


def test_prompts_of_different_lengths_are_watched_apart() -> None:
    pipe = tiny_hunyuan()
    models = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
    plan = Plan.uniform(DRAFT, "hunyuan_video", models)
    call = tiny_hunyuan_call(lengths=(7, 13), num_inference_steps=3, output_type="latent")
    call.pop("generator")
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    prompt = {name: call.pop(name) for name in names}
    found = calibrate_gates(pipe, plan, [prompt], call=call, progress=False, **NEVER)
    assert found.tensors["refresh/transformer"].float().mean((1, 2)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plan": Plan.uniform(Method(select=Band(0.3)), "wan", tiny_plan().models)},
            "heads that reuse, found a plan with 'band 0.3': search with the method set cached",
        ),
        ({"gamma": 1.5}, r"gamma must be one number in -1..1 .* found 1.5"),
        ({"max_lse_change": float("inf")}, "must be finite, .* 1e9 leaves the decision to gamma"),
        ({"max_lse_change": -1.0}, "max_lse_change must be 0 or more, found -1.0"),
        ({"prompts": 0}, "at least one calibration prompt"),
        ({"call": {"generator": None}}, '"generator" is set by the search'),
        ({"plan": tiny_plan({"transformer": ModelShape(LAYERS, HEADS, 99)})}, "the plan has 99 channels a head"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    pipe = tiny_wan()
    pipe.transformer.forward = None  # nothing may be generated
    with pytest.raises((ValueError, PlanError), match=message):
        calibrated(pipe, **options)


def test_what_cannot_be_compared_is_refused_and_the_pipeline_left_as_it_was() -> None:
    pipe = tiny_wan()
    before = processors(pipe)
    with pytest.raises(ValueError, match="a call of 2 steps no head .* calibrate with more steps"):
        calibrated(pipe, call=a_call(output_type="latent", num_inference_steps=2))
    one, other = a_prompt(0), {**a_prompt(1), "num_inference_steps": 4}
    with pytest.raises(RuntimeError, match="expected 5 steps as in the first call of the pipeline, found 4"):
        calibrate_gates(pipe, tiny_plan(), [one, other], call=a_call(output_type="latent"), progress=False)
    assert processors(pipe) == before


def test_progress_is_shown_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated(tiny_wan(), progress=True)
    shown = capsys.readouterr()
    assert "gates" in shown.err and "100 %" in shown.err and shown.out == ""
    calibrated(tiny_wan())
    assert capsys.readouterr().err == ""
