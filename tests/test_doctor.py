"""The doctor on a tiny Wan: what it measures, what it works out, and that it leaves the pipeline alone."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from diffusers_accel import doctor, patch, step_timing
from diffusers_accel.doctor import Expectation, diagnose, speedup
from diffusers_accel.kernels.attention import Choice
from diffusers_accel.shape import ModelShape
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan, tiny_wan_call


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
    readings_of_attention = 2 * LAYERS * 2  # passes x layers x (start, stop), each of which moves the clock by 10
    assert timing.step_ms == pytest.approx((readings_of_attention + 1) * 10e3)
    assert timing.attention_ms == pytest.approx(2 * LAYERS * 10e3)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = tiny_wan()
    before = pipe(**tiny_wan_call()).frames
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    diagnose(pipe, call(), densities=(0.5,))
    assert all(type(a) is type(b.attn1.processor) for a, b in zip(processors, pipe.transformer.blocks, strict=True))
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
        doctor, "choices", lambda *_: [Choice("cpu", "needs a processor"), Choice("portable", "needs a GPU")]
    )
    diagnosis = diagnose(tiny_wan(), call())
    assert diagnosis.call is not None and diagnosis.call.expectations == ()
    assert "No sparse kernel can run" in str(diagnosis) and "needs a processor" in str(diagnosis)


def test_what_has_to_be_asked_for_promises_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [Choice("reference", None), Choice("hopper", None, "must be asked for until measured on a GPU")]
    monkeypatch.setattr(doctor, "choices", lambda *_: options)
    diagnosis = diagnose(tiny_wan(), call())
    assert diagnosis.call is not None and diagnosis.call.expectations == ()
    assert "usable; must be asked for until measured on a GPU" in str(diagnosis)


def test_kernels_that_are_ranked_otherwise_keep_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head dim may have its own order."""
    options = [Choice("cpu", None), Choice("portable", "needs a GPU")]
    monkeypatch.setattr(doctor, "choices", lambda *kind: options[:: 1 if kind[2] == 64 else -1])
    (row,) = (line for line in str(diagnose()).splitlines() if "portable" in line)
    assert "needs a GPU" in row and "usable" not in row


def test_the_text_says_it_all(diagnosis: doctor.Diagnosis) -> None:
    text = str(diagnosis)
    assert f"python {platform.python_version()}" in text and f"torch {torch.__version__}" in text
    assert "768 = 3 frames x 16 x 16" in text
    assert "transformer 3 layers x 4 heads x 16" in text
    assert "usable" in text and "portable" in text
    assert "0.50" in text and "0.44" in text


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
    assert doctor._expect(0.5, 0.2, 0.5, 0.3) == Expectation(
        0.5, 0.3, pytest.approx(4 / 3), pytest.approx(0.789, abs=1e-3)
    )
