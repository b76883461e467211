"""The doctor on a tiny Wan: what it measures, what it works out, and that it leaves the pipeline alone."""

from __future__ import annotations

import functools
import platform
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from diffusers_accel import doctor, patch, step_timing
from diffusers_accel.doctor import Expectation, diagnose, examine, remarks, speedup
from diffusers_accel.doctor.caches import outlooks
from diffusers_accel.doctor.diagnosis import tokens_of
from diffusers_accel.doctor.masked import MaskedAttention, masked_attention
from diffusers_accel.kernels.attention import Choice
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.run import by_size
from diffusers_accel.shape import ModelShape
from diffusers_accel.step_timing import full_call
from tests.families import hunyuan_video15
from tests.families.kandinsky6_sr import tiny_kandinsky6_sr
from tests.families.minimax_h3 import MINIMAX_H3
from tests.families.test_other_calls import pyramid, pyramid_call
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_TOKENS, tiny_hunyuan, tiny_hunyuan_call, tiny_wan, tiny_wan_call


def call(**overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), "num_inference_steps": 7, **overrides}


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    return diagnose(tiny_wan(), call(), densities=(0.5, 0.34))


def test_speedup_is_amdahls_law() -> None:
    assert speedup(0.7, 1.0) == pytest.approx(1.0)
    assert speedup(0.7, 0.0) == pytest.approx(1 / 0.3)
    assert speedup(0.85, 0.1) == pytest.approx(4.255, abs=1e-3)
    assert speedup(0.5, 0.25, efficiency=0.5, dense=0.2) == pytest.approx(1 / (0.5 + 0.5 * (0.2 + 0.8 * 0.5)))
    assert speedup(0.5, 0.5, efficiency=0.25) < 1, "a kernel that is slower than dense must show as slower"


def test_the_call_is_measured(diagnosis: doctor.Diagnosis) -> None:
    found = diagnosis.call
    assert found is not None
    assert (found.family, found.models) == ("wan", {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})
    assert (found.layout.frames, found.layout.height, found.layout.width) == (3, 16, 16)
    assert found.layout.tokens == 768 and found.steps == 7
    assert 0 < found.attention_ms < found.step_ms
    assert found.share == pytest.approx(found.attention_ms / found.step_ms)
    assert found.attention_ms < found.forward_ms < found.step_ms and found.forwards == 2


def test_the_expectations_follow_from_what_was_measured(diagnosis: doctor.Diagnosis) -> None:
    found = diagnosis.call
    assert found is not None
    assert [row.density for row in found.expectations] == [0.5, 4 / 9], (
        "a band that always reads the first frame cannot read a third"
    )
    for row in found.expectations:
        assert row.efficiency is not None and row.efficiency > 0
        assert row.best == pytest.approx(speedup(found.share, row.density))
        assert row.expected == pytest.approx(
            speedup(found.share, row.density, efficiency=row.efficiency, dense=found.dense_steps)
        )
    assert found.dense_steps == 0.2


def test_kernels_are_judged_for_the_dtype_of_attention() -> None:
    """The first parameter of a bfloat16 Wan is kept in float32."""
    pipe = tiny_wan()
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.scale_shift_table.data = pipe.transformer.scale_shift_table.data.float()
    diagnosis = diagnose(pipe, call(), densities=(0.5,))
    assert list(diagnosis.kernels) == [("cpu", "bfloat16", HEAD_DIM)]


def test_only_the_last_of_a_few_steps_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step and attention are differences between the ends of two steps, so that warming up is left out."""
    pipe = tiny_wan()
    calls: list[int] = []
    stock = type(pipe.transformer).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", counted)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: float(next(clock)))
    timing = step_timing.time_step(pipe, call(num_inference_steps=2))
    assert len(calls) == 4, "two steps of two passes"
    # passes x layers x (start, stop), and the start and stop of each pass, each of which moves the clock by 10
    assert timing.step_ms == pytest.approx((2 * LAYERS * 2 + 2 * 2 + 1) * 10e3)
    assert timing.attention_ms == pytest.approx(2 * LAYERS * 10e3)
    assert timing.forward_ms == pytest.approx(2 * (LAYERS * 2 + 1) * 10e3) and timing.forwards == 2


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = tiny_wan()
    before = pipe(**tiny_wan_call()).frames
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    diagnose(pipe, call(), densities=(0.5,))
    assert all(type(a) is type(b.attn1.processor) for a, b in zip(processors, pipe.transformer.blocks, strict=True))
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    assert (pipe(**tiny_wan_call()).frames == before).all()
    with patch(pipe, "dense"), pytest.raises(ValueError, match="patched already"):
        diagnose(pipe, call())


def test_both_experts_are_counted() -> None:
    found = diagnose(tiny_wan(experts=2), call(), densities=(0.5,)).call
    assert found is not None and set(found.models) == {"transformer", "transformer_2"}


def test_a_layer_that_is_slow_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "SLOW_LAYER_MS", 0.0)
    monkeypatch.setattr(step_timing, "attention", lambda *_: pytest.fail("measured all the same"))
    diagnosis = diagnose(tiny_wan(), call(), densities=(0.5,))
    assert diagnosis.call is not None
    (row,) = diagnosis.call.expectations
    assert row.efficiency is None
    assert row.expected == pytest.approx(speedup(diagnosis.call.share, row.density, efficiency=0.8, dense=0.2))
    assert "0.8 (assumed)" in str(diagnosis)


def test_without_a_kernel_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        examine, "choices", lambda *_: [Choice("cpu", "needs a processor"), Choice("portable", "needs a GPU")]
    )
    diagnosis = diagnose(tiny_wan(), call())
    assert diagnosis.call is not None and diagnosis.call.expectations == ()
    assert "No sparse kernel can run" in str(diagnosis) and "needs a processor" in str(diagnosis)


def test_what_has_to_be_asked_for_promises_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [Choice("reference", None), Choice("hopper", None, "must be asked for until measured on a GPU")]
    monkeypatch.setattr(examine, "choices", lambda *_: options)
    diagnosis = diagnose(tiny_wan(), call())
    assert diagnosis.call is not None and diagnosis.call.expectations == ()
    assert "usable; must be asked for until measured on a GPU" in str(diagnosis)


def test_kernels_that_are_ranked_otherwise_keep_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head dim may have its own order."""
    options = [Choice("cpu", None), Choice("portable", "needs a GPU")]
    monkeypatch.setattr(examine, "choices", lambda *kind: options[:: 1 if kind[2] == 64 else -1])
    (row,) = (line for line in str(diagnose()).splitlines() if "portable" in line)
    assert "needs a GPU" in row and "usable" not in row


def test_the_text_says_it_all(diagnosis: doctor.Diagnosis) -> None:
    text = str(diagnosis)
    assert f"python {platform.python_version()}" in text and f"torch {torch.__version__}" in text
    assert "768 = 3 frames x 16 x 16" in text
    assert "transformer 3 layers x 4 heads x 16" in text
    assert "usable" in text and "portable" in text
    assert "0.50" in text and "0.44" in text


def test_what_could_be_won_stands_before_what_is_there(diagnosis: doctor.Diagnosis) -> None:
    lines = str(diagnosis).splitlines()
    assert lines[0].startswith("model     wan: transformer 3 layers")
    assert lines.index(next(line for line in lines if line.startswith("machine"))) > 10
    assert "WanTransformer3DModel" not in str(diagnosis), "whoever has a pipeline needs no list of others"
    alone = str(diagnose()).splitlines()
    assert alone[0].startswith("machine") and "(WanTransformer3DModel)" in str(diagnose())
    assert next(index for index, line in enumerate(alone) if line.startswith("families")) > len(alone) / 2


def test_a_modular_pipeline_is_measured_without_its_decoder() -> None:
    """Its last step is not run: after that it would decode, and nothing can be told to leave that out."""
    pipe, call = MINIMAX_H3.pipe(), MINIMAX_H3.call(num_inference_steps=9)
    del call["output_type"]
    ran: list[int] = []
    stock = pipe.transformer.forward

    @functools.wraps(stock)  # the blocks give what its signature asks for
    def forward(*args: Any, **given: Any) -> Any:
        ran.append(1)
        return stock(*args, **given)

    pipe.transformer.forward = forward
    found = diagnose(pipe, call, densities=(0.5,)).call
    assert found is not None and found.layout == MINIMAX_H3.layout and found.steps == 9
    assert found.forwards == 1 and 0 < found.attention_ms < found.forward_ms < found.step_ms
    assert len(ran) == 3 + 1, (
        "of four steps that it is asked for its end is one; then one forward in which masks are seen"
    )
    assert diagnose(pipe, call, densities=(0.5,)).call is not None, "as before"


def test_inputs_that_no_block_takes_are_not_given_to_a_modular_pipeline() -> None:
    pipe = MINIMAX_H3.pipe()
    given = full_call(pipe, {"num_inference_steps": 9}, most=4)
    assert {*given} == {"num_inference_steps", "generator"} and given["num_inference_steps"] == 4


def test_the_machine_alone() -> None:
    diagnosis = diagnose()
    assert diagnosis.call is None
    assert {dim for _, _, dim in diagnosis.kernels} == {64, 128}
    assert all(
        {"cpu", "portable", "reference"} <= {option.name for option in row} for row in diagnosis.kernels.values()
    )
    assert "attention kernel" in str(diagnosis)


def test_densities_out_of_range_are_refused() -> None:
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"densities: expected shares of key blocks in \(0, 1\], found {density}"):
            diagnose(densities=(density,))


def test_an_expectation_that_is_slower_shows() -> None:
    assert examine._expect(0.5, 0.2, 0.4, 0.5, 0.3, {}) == Expectation(
        0.5, 0.3, pytest.approx(4 / 3), pytest.approx(0.789, abs=1e-3), 0.4, {}
    )


def test_what_small_grids_really_read_stands_beside_what_is_asked(diagnosis: doctor.Diagnosis) -> None:
    """As `report()` says it of a patch that has run."""
    found = diagnosis.call
    assert found is not None
    assert [row.asked for row in found.expectations] == [0.5, 0.34]
    pipe = tiny_wan()
    for name in ("pattern", "draft"):  # all heads of draft read the same
        with patch(pipe, name, density=0.34, dense_steps=0.0, dense_layers=0) as done:
            pipe(**tiny_wan_call(num_inference_steps=1, output_type="latent"))
            real = done.report().density
        assert found.expectations[1].reads[name] == pytest.approx(real)
    assert "0.44 (!)" in str(diagnosis) and "(!) a small grid" in str(diagnosis)


def test_tokens_beside_the_video_are_named() -> None:
    layout = TokenLayout.of(
        Segment("history", 300, queries=False),
        Segment("reference", 40),
        Segment("audio", 7),
        Segment.video((3, 16, 16)),
        Segment("video", 768, (3, 16, 16)),
        Segment("image", 5),
        Segment("text", 20, valid=7),
    )
    assert tokens_of(layout) == (
        "1,908 = 3 frames x 16 x 16 + 300 of history (keys only) + 40 of reference + 7 of audio + 768 of video that stays "
        "exact + 5 of image + 20 of text (7 exist)"
    )


@pytest.mark.parametrize(
    ("stages", "least"), [((50,), (11, 18, 24, 26)), ((4,), (4, 2, 2, 3)), ((10, 20), (21, 4 + 8, 5 + 10, 6 + 11))]
)
def test_step_caches_are_bounded_by_the_forwards_that_they_compute(
    stages: tuple[int, ...], least: tuple[int, ...]
) -> None:
    found = outlooks(stages, 0.9)
    assert tuple(row.least for row in found) == least
    for row in found:
        assert row.best == pytest.approx(1 / (0.1 + 0.9 * row.least / sum(stages)))
    assert [row.expected is None for row in found] == [True, True, True, False], "the others depend on the clip"
    assert (found[0].idle is None) == (max(stages) >= 12)


def test_few_steps_are_warned_of() -> None:
    assert remarks.of_few_steps(9, 0.25) is None
    said = remarks.of_few_steps(8, 0.25)
    assert said is not None and said.startswith("8 steps are few") and "2 of them dense, which leaves 6" in said


@pytest.mark.parametrize(
    ("capability", "backend", "by_diffusers", "advised"),
    [
        ((9, 0), "native", True, True),
        ((8, 0), "native", True, False),
        ((10, 0), "native", True, False),
        (None, "native", True, False),
        ((9, 0), "_native_cudnn", True, False),
        ((9, 0), "native", False, False),
    ],
)
def test_cudnn_is_advised_where_it_is_published_as_faster(
    capability: Any, backend: str, by_diffusers: bool, advised: bool
) -> None:
    assert bool(remarks.of_backend(capability, backend, by_diffusers)) == advised


def test_the_backend_that_the_user_has_set_is_seen() -> None:
    transformer = tiny_wan().transformer
    assert remarks.backend_of(transformer.blocks[0].attn1.processor) == "native"
    transformer.set_attention_backend("_native_math")
    assert remarks.backend_of(transformer.blocks[0].attn1.processor) == "_native_math"
    transformer.set_attention_backend("native")


def test_a_mask_of_the_stock_forward_is_found_and_the_largest_call_is_shown() -> None:
    """HunyuanVideo masks its text; the second branch of its true guidance has a shorter prompt."""
    found = diagnose(tiny_hunyuan(), tiny_hunyuan_call(true_cfg=True), densities=(0.5,)).call
    assert found is not None and found.forwards == 2
    assert found.layout.text_valid == 7, "that of the last call has 4"
    few, masked, unlike = found.remarks
    assert f"passes a mask [1, 1, 1, 788] to {LAYERS} of {LAYERS} calls" in masked and "ms a layer with it" in masked
    assert f"788 x 772 ({LAYERS} calls), 788 x 775 ({LAYERS} calls)" in unlike and "5 steps are few" in few


def test_a_pipeline_without_a_step_callback_is_timed_by_the_steps_of_its_attention() -> None:
    pipe = hunyuan_video15.tiny_hunyuan15()
    found = diagnose(pipe, hunyuan_video15.tiny_hunyuan15_call(), densities=(0.5,)).call
    assert found is not None and found.forwards == 2 and 0 < found.attention_ms < found.forward_ms
    assert any("passes a mask [1, 1, 812, 812]" in remark for remark in found.remarks)


def test_a_pyramid_of_stages_is_timed_at_its_last() -> None:
    found = diagnose(pyramid(), pyramid_call(), densities=(0.5,)).call
    assert found is not None and found.steps == 2 + 3 and found.forwards == 2
    assert (found.layout.height, found.layout.width) == (16, 16), "stages of 8 x 8 and 16 x 16"
    assert any("the last of 2 stages" in remark for remark in found.remarks)


def test_a_pipeline_without_a_prompt_is_given_none() -> None:
    class Upscaler:
        def __call__(self, video: Any = None, num_inference_steps: int = 4) -> None: ...

    given = step_timing.full_call(Upscaler(), {"video": 0}, most=2)
    assert {*given} == {"video", "generator", "num_inference_steps", "output_type"} and given[
        "num_inference_steps"
    ] == 2


def test_a_pipeline_that_takes_no_number_of_steps_is_refused() -> None:
    class Modular:
        def __call__(self, state: Any = None, **inputs: Any) -> None: ...

    with pytest.raises(TypeError, match=r"takes num_inference_steps, .* found a Modular that takes none\. .*timed"):
        step_timing.asked_steps(Modular(), {})


def test_the_preset_of_the_call_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_size, "WINS_FROM", {"cpu": 500})
    found = diagnose(tiny_wan(), call(), densities=(0.5,)).call
    assert found is not None
    assert (
        found.preset.startswith("wan, 768 tokens: draft at density 0.5 ") and "first layer stay dense" in found.preset
    )
    assert "It reads 0.5" in found.preset and "expected" in found.preset
    (few,) = found.remarks  # and no mask
    assert few.startswith("7 steps are few")


def test_a_mask_is_told_with_its_price() -> None:
    assert remarks.of_masks(None) is None
    said = remarks.of_masks(MaskedAttention(2, 3, (1, 1, 9, 9), 4.25, 1.5))
    assert (
        said is not None and "[1, 1, 9, 9] to 2 of 3 calls" in said and "4.2 ms a layer with it, 1.5 ms without" in said
    )
    assert "ms a layer" not in str(remarks.of_masks(MaskedAttention(2, 3, (1, 1, 9, 9), None, None)))


def test_masks_of_other_attention_do_not_count() -> None:
    """Such as those of a text encoder, which may have as many tokens as a small video, or of cross-attention."""
    pipe = tiny_wan()
    q = torch.zeros(1, 1, 768, 8)

    def encode(*_: Any, **__: Any) -> None:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(768, 768, dtype=torch.bool))

    def cross(*_: Any) -> None:
        F.scaled_dot_product_attention(
            q, q[:, :, :512], q[:, :, :512], attn_mask=torch.ones(768, 512, dtype=torch.bool)
        )

    pipe.check_inputs = encode
    pipe.transformer.blocks[0].register_forward_pre_hook(cross)
    assert masked_attention(pipe, [pipe.transformer], tiny_wan_call(), [TokenLayout(3, 16, 16)]) is None


def test_a_compiled_model_is_looked_at_without_its_graph() -> None:
    pipe, counter = tiny_hunyuan(), CompileCounter()
    pipe.transformer.compile(backend=counter, fullgraph=True)
    layouts = [TokenLayout(3, 16, 16, TEXT_TOKENS, "end", 7)]
    found = masked_attention(pipe, [pipe.transformer], tiny_hunyuan_call(), layouts)
    assert found is not None and (found.calls, found.of, found.mask) == (LAYERS, LAYERS, (1, 1, 1, 788))
    assert counter.frame_count == 0


def test_a_pipeline_that_decodes_in_any_case_is_asked_for_a_tensor() -> None:
    assert [full_call(pipe, {})["output_type"] for pipe in (tiny_wan(), tiny_kandinsky6_sr())] == ["latent", "pt"]
