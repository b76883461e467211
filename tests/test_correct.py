"""Correction of a plan's output: what is constant in an error is removed to rounding, and nothing exact is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_accel import Plan, patch
from diffusers_accel.attach.site import Engine, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.forwards import Forwards, easycache
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import AUTO, DENSE, NAMED, AxisOrder, Band, Draft, Kept, MeanError, Method, Patches, Skip
from diffusers_accel.plan import Span
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.running import SiteEngine, now, run_pipeline
from diffusers_accel.search.schedule import chosen_steps
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape
from tests.search.test_search import a_call, a_prompt, search
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_hunyuan, tiny_wan, tiny_wan_call

SHAPE = ModelShape(LAYERS, HEADS, HEAD_DIM)
TENSOR = "mean_error/transformer"
TEXT_FIRST, TEXT_LAST = (TokenLayout(3, 16, 16, 20, place) for place in ("start", "end"))


@pytest.fixture(autouse=True)
def short_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_accel.search.plan_search.COST_SECONDS", 0.05)


def vectors(spans: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(spans, LAYERS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def plan_of(*methods: Method, family: str = "wan", mean_error: Tensor | None = None, **fields: Any) -> Plan:
    """The heads of every layer take the methods in turn."""
    symbols = {chr(ord("a") + index): method for index, method in enumerate(methods)}
    row = tuple([*symbols][head % len(symbols)] for head in range(HEADS))
    span = Span(0.0, 1.0, {"transformer": (row,) * LAYERS})
    if mean_error is not None:
        fields = {**fields, "correct": MeanError(), "tensors": {TENSOR: mean_error}}
    return Plan(family, {"transformer": SHAPE}, symbols, (span,), **fields)


def attended(plan: Plan, layout: TokenLayout, steps: int = 1, layer: int = 1) -> list[Tensor]:
    """What one layer gives at each step, of the same q, k and v."""
    pipe = tiny_hunyuan() if plan.family == "hunyuan_video" else tiny_wan()
    q, k, v = qkv(layout)
    out = []
    with patch(pipe, plan) as patched:
        for step in range(steps):
            call = AttentionCall(layout, "transformer", layer, tuple(range(HEADS)), now=(step, steps + 1), dense=dense)
            out.append(patched.sites[layer].engine.attend(call, q, k, v).clone())
    return out


def qkv(layout: TokenLayout) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, layout.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("layout", [TokenLayout(3, 16, 16), TEXT_FIRST, TEXT_LAST], ids=["wan", "first", "last"])
def test_an_error_that_is_constant_over_tokens_is_removed(layout: TokenLayout) -> None:
    """A head whose values are all alike gives these; skipped, it errs by them at every token. Text, where skipped too, stays."""
    q, k, v = qkv(layout)
    constant = torch.randn(HEADS, HEAD_DIM)
    error = torch.zeros(1, LAYERS, HEADS, HEAD_DIM)
    error[0, 1] = -constant
    plan = plan_of(Method(select=Skip()), mean_error=error)
    call = AttentionCall(layout, "transformer", 1, tuple(range(HEADS)), now=(0, 1), dense=dense)
    with patch(tiny_wan(), plan) as patched:
        out = patched.sites[1].engine.attend(call, q, k, constant.expand_as(v).contiguous())
    (video,) = layout.video_queries
    reference = dense(q, k, constant.expand_as(v))[:, video]
    assert torch.allclose(out[:, video], reference, atol=1e-6)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[video] = False
    assert (out[:, text] == 0).all() and text.sum() == layout.text_tokens


# "history" is for models that make a video chunk by chunk.
@pytest.mark.parametrize("name", sorted({*NAMED} - {"dense", "history"}))
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_every_named_method_is_corrected_but_for_text_and_dense_heads(name: str, family: str) -> None:
    layout = TokenLayout(3, 16, 16) if family == "wan" else TEXT_LAST
    sparse = [replace(m, precision="input") if m.precision == AUTO else m for m in NAMED[name]().heads]
    methods = [DENSE, *(method for method in sparse if not method.dense)]
    error = vectors()
    plain = attended(plan_of(*methods, family=family), layout, steps=3)
    corrected = attended(plan_of(*methods, family=family, mean_error=error), layout, steps=3)
    expected = error[0, 1].clone()
    expected[:: len(methods)] = 0  # dense heads
    (video,) = layout.video_queries
    for before, after in zip(plain, corrected, strict=True):
        assert torch.allclose(before[:, video] - after[:, video], expected.expand_as(after[:, video]), atol=1e-5)
        assert torch.equal(before[:, video, :: len(methods)], after[:, video, :: len(methods)])
        assert torch.equal(before[:, video.stop :], after[:, video.stop :])


def test_each_span_and_layer_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    error, layout = vectors(spans=2), TokenLayout(3, 16, 16)
    plain = plan_of(Method(select=Band(0.4)))
    halves = tuple(Span(start, start + 0.5, plain.spans[0].heads) for start in (0.0, 0.5))
    plan = replace(plain, spans=halves, correct=MeanError(), tensors={TENSOR: error})
    q, k, v = qkv(layout)
    with patch(tiny_wan(), plan) as patched:
        for layer in (0, 2, 0):
            for step in (0, 3, 1):
                call = AttentionCall(layout, "transformer", layer, tuple(range(HEADS)), now=(step, 4), dense=dense)
                out = patched.sites[layer].engine.attend(call, q, k, v)
                expected = error[step // 2, layer]
                off = attended(plain, layout, layer=layer)[0] - out
                assert torch.allclose(off, expected.expand_as(off), atol=1e-5)


def test_some_heads_of_a_model_get_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where processes share the heads of a layer."""
    layout, error, heads = TokenLayout(3, 16, 16), vectors(), (3, 1)
    q, k, v = (x[:, :, list(heads)] for x in qkv(layout))
    call = AttentionCall(layout, "transformer", 1, heads, now=(0, 1), dense=dense)
    outs = []
    for mean_error in (None, error):
        with patch(tiny_wan(), plan_of(Method(select=Band(0.4)), mean_error=mean_error)) as patched:
            outs.append(patched.sites[1].engine.attend(call, q, k, v))
    assert torch.allclose(outs[0] - outs[1], error[0, 1, list(heads)].expand_as(outs[0]), atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 10.0])
def test_a_corrected_plan_runs_under_a_step_cache(threshold: float) -> None:
    """At threshold 0 every forward is computed and corrected; above it, predicted ones come from corrected ones."""
    pipe = tiny_wan()

    def latents(plan: Plan) -> Tensor:
        with patch(pipe, plan) as patched:
            found: Tensor = pipe(**tiny_wan_call(output_type="latent")).frames
            report = patched.report()
        if plan.forwards is not None:
            assert (report.rows[0]["calls"] == 10) == (threshold == 0.0)  # of five steps of two branches
        return found

    methods = (DENSE, Method(select=Band(0.4)), Method(Patches(), Draft(0.4)))
    corrected = plan_of(*methods, mean_error=vectors())
    cache: Forwards = easycache(threshold=threshold, warm_up=1)
    under = latents(replace(corrected, forwards=cache))
    assert torch.equal(under, latents(corrected)) == (threshold == 0.0)
    assert not torch.equal(under, latents(plan_of(*methods, forwards=cache)))


def test_corrected_plans_are_saved_and_loaded(tmp_path: Path) -> None:
    plan = plan_of(Method(select=Band(0.4)), mean_error=vectors())
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.correct == MeanError() and torch.equal(loaded.tensors[TENSOR], vectors())
    assert loaded != replace(plan, correct=None) and "correct: mean error" in loaded.show()


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": ({}, "tensors: expected 'mean_error/transformer', which the correction reads, found none"),
    "spans": ({TENSOR: vectors(spans=2)}, r"tensors.mean_error/transformer: expected float32 \[1 spans, 3 layers"),
    "heads": ({TENSOR: vectors()[:, :, :3]}, r"4 heads, 16 channels\], found torch.float32 \[1, 3, 3, 16\]"),
    "channels": ({TENSOR: vectors()[..., :8].clone()}, r"16 channels\], found torch.float32 \[1, 3, 4, 8\]"),
    "type": ({TENSOR: vectors().half()}, "expected float32 .* found torch.float16"),
    "numbers": ({TENSOR: vectors() * torch.nan}, "expected finite numbers, found NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(case: str) -> None:
    tensors, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        replace(plan_of(Method(select=Band(0.4))), correct=MeanError(), tensors=tensors)


def test_what_is_no_correction_is_refused() -> None:
    wrong: Any = "mean_error"
    with pytest.raises(
        ValueError, match=r"correct: expected a correction such as MeanError\(\) or None, found 'mean_error'"
    ):
        replace(plan_of(Method(select=Band(0.4))), correct=wrong)


# A search records mean errors

SKIP, BAND, KEPT = Method(select=Skip()), Method(select=Band(0.4)), Method(AxisOrder("hwf"), Draft(0.4), rest=Kept(3))


class Watcher:
    """Dense, and the sums of outputs over tokens at the measured steps."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], list[Tensor]] = {}

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        out = call.dense(q, k, v)
        self.sums.setdefault((now(call)[0], call.layer), []).append(out.double().mean((0, 1)))
        return out


def test_the_mean_error_of_a_skipped_head_is_its_mean_output(tmp_path: Path) -> None:
    pipe, spans = tiny_wan(), ((0.0, 0.5), (0.5, 1.0))
    candidates = (DENSE, SKIP, BAND)
    options = {"prompts": 1, "candidates": candidates, "rows": 768, "spans": (0.5,), "span_weights": (1, 1)}
    search(pipe, tmp_path / "s.safetensors", **options)
    found = Scores.load(tmp_path / "s.safetensors").mean_error("transformer")
    assert found.shape == (2, LAYERS, HEADS, 3, HEAD_DIM) and found.dtype == np.float32
    assert (found[:, :, :, 0] == 0).all() and (found[:, :, :, 2] != 0).all()
    watcher = Watcher()
    run_pipeline(pipe, watcher.engine, a_prompt(0), a_call(output_type="latent"), 0)
    for span, step in enumerate(sorted(chosen_steps(spans, 5, 1))):
        for layer in range(LAYERS):
            outputs = watcher.sums[step, layer]
            assert len(outputs) == 2  # branches
            assert found[span, layer, :, 1] == pytest.approx(-torch.stack(outputs).mean(0).numpy(), abs=1e-5)


def test_a_search_makes_a_corrected_plan(tmp_path: Path) -> None:
    candidates = (DENSE, SKIP, BAND, KEPT)
    plan = search(tiny_wan(), tmp_path / "s.safetensors", candidates=candidates, correct=True)
    scores = Scores.load(tmp_path / "s.safetensors")
    errors = plan.tensors[TENSOR]
    assert plan.correct == MeanError() and len(errors) == len(plan.spans) == len(scores.spans)
    used = set()
    for span in range(len(plan.spans)):
        for layer in range(LAYERS):
            for head in range(HEADS):
                method = plan.method(span, "transformer", layer, head)
                index = candidates.index(method)
                used.add(index)
                expected = scores.mean_error("transformer")[span, layer, head, index] * (not method.rest.remembers)
                assert errors[span, layer, head].numpy() == pytest.approx(expected)
    assert {0} < used
    assert search(tiny_wan(), tmp_path / "s.safetensors", candidates=candidates).correct is None


def test_heads_that_keep_something_are_not_corrected(tmp_path: Path) -> None:
    plan = search(
        tiny_wan(),
        tmp_path / "s.safetensors",
        candidates=(DENSE, KEPT),
        correct=True,
        prompts=1,
        budget=Budget.density(0.9),
    )
    assert KEPT in plan.methods.values() and (plan.tensors[TENSOR] == 0).all()


def test_correct_is_a_flag() -> None:
    with pytest.raises(TypeError, match="correct: expected True or False, found 'yes'"):
        search(tiny_wan(), correct="yes")
