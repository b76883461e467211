"""The floor: dense attention in another exact kernel, and how far from it the subjects are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals import floor as floors
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.floor import another_kernel, attend_otherwise, describe
from diffusers_accel.evals.floor_rows import worse
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report import Report, charts, render
from diffusers_accel.methods import Band, Method
from tests.evals import synthetic
from tests.evals.test_compare import CALL, PROMPT, state
from tests.tiny import tiny_wan

SHORT = {**CALL, "num_inference_steps": 2}
ASKED: dict[str, Any] = {"call": SHORT, "seeds": (0, 1), "metrics": ("psnr", "temporal_flickering"), "show": 1}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison that was stopped after its first clip, and the pipeline's state around it."""
    keep, before = tmp_path_factory.mktemp("floor") / "kept", state(pipe)
    stock, clips = comparing._Session.clip, []

    def clip(self: Any, index: int, *arguments: Any, **more: Any) -> Any:
        clips.append(index)
        if clips == [0, 1]:
            raise KeyboardInterrupt
        return stock(self, index, *arguments, **more)

    subjects = {"band": Method(select=Band(0.34)), "dense too": "dense"}
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(comparing._Session, "clip", clip)
        with pytest.raises(KeyboardInterrupt):
            compare(pipe, subjects, [PROMPT], **ASKED, progress=False, keep=keep)
        report = compare(pipe, subjects, [PROMPT], **ASKED, progress=False, keep=keep)
    assert clips == [0, 1, 1]
    return {"report": report, "before": before, "after": state(pipe)}


def test_it_is_exact_and_rounds_otherwise() -> None:
    """Also where several heads share a key head."""
    for dtype, closeness in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k = torch.randn(2, 300, 4, 32, dtype=dtype), torch.randn(2, 300, 2, 32, dtype=dtype)
        v = torch.randn(2, 300, 2, 32, dtype=dtype)
        by_torch = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(
            1, 2
        )
        out = attend_otherwise(q, k, v)
        assert out.dtype == dtype and not torch.equal(out, by_torch)
        torch.testing.assert_close(out, by_torch, atol=closeness, rtol=closeness)


def test_its_kernel_is_named() -> None:
    said = {(d, t): describe(torch.device(d), t) for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16)}
    assert said["cpu", torch.float32] == said["cuda", torch.float32] == "torch's attention in float64"
    assert said["cpu", torch.bfloat16] == "torch's attention in float32"
    assert said["cuda", torch.bfloat16] == "torch's memory-efficient attention"


def test_every_comparison_has_one(found: dict[str, Any]) -> None:
    report: Report = found["report"]
    assert found["before"] == found["after"]
    assert (
        report.names == ["floor", "band", "dense too"] and [each.name for each in report.subjects] == report.names[1:]
    )
    psnr = report.row("psnr", "floor")
    assert psnr and psnr.value and 80 < psnr.value < 200, "near dense, and not the same"
    assert sorted(report.provenance["order"]["first"]) == sorted(report.names)
    assert report.provenance["floor"] == "torch's attention in float64"
    for metric in ("time", "speedup", "attention_share", "peak_memory", "warm_up"):
        row = report.row(metric, "floor")
        assert row and row.value and row.value > 0, metric
    (shown,) = [clip.media for clip in report.clips if clip.media]
    assert list(shown.videos) == ["dense", "band", "dense too"]


def test_quality_is_its_distance_from_the_floor(found: dict[str, Any], tmp_path: Path) -> None:
    report: Report = found["report"]

    def values(metric: str, name: str) -> np.ndarray:
        return np.array([report.row(metric, name, clip).value for clip in report.clips])  # type: ignore[union-attr]

    psnr = report.row("psnr_from_floor", "band")
    assert psnr and psnr.value == pytest.approx(np.mean(values("psnr", "floor") - values("psnr", "band")))
    assert psnr.value > 0 and psnr.baseline == "floor" and psnr.better == "lower"
    flicker = {name: values("temporal_flickering", name) for name in ("dense", "floor", "band")}
    far, near = (np.abs(flicker[name] - flicker["dense"]) for name in ("band", "floor"))
    row = report.row("temporal_flickering_from_floor", "band")
    assert row and row.value == pytest.approx(np.mean(far - near))
    same = report.row("psnr_from_floor", "dense too")
    assert same and same.value is None and same.note == "identical"
    report.save(tmp_path / "report")
    assert read_rows(tmp_path / "report" / "report.json") == report.rows
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"({psnr.value:.2f} worse than the floor)" in text
    table = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert table[2:6] == ["| dense", "| floor", "| band", "| dense too"]
    assert text.count("| floor |") == 1 + 2 and "Floor: dense attention in another exact kernel" in text


@pytest.mark.parametrize(
    ("metric", "mine", "floor", "dense", "expected"),
    [
        ("psnr", 40.0, 60.0, None, 20.0),
        ("psnr", 60.0, 40.0, None, -20.0),
        ("lpips", 0.3, 0.1, None, 0.2),
        ("temporal_flickering", 0.7, 0.95, 0.9, 0.15),
        ("temporal_flickering", 0.92, 1.0, 0.9, -0.08),
    ],
)
def test_worse_is_above_zero_whichever_way_a_metric_points(
    metric: str, mine: float, floor: float, dense: float | None, expected: float
) -> None:
    value, note = worse(METRICS[metric], (mine, None), (floor, None), (dense, None))
    assert value == pytest.approx(expected) and note is None


def test_without_a_number_there_is_a_reason() -> None:
    psnr = METRICS["psnr"]
    assert worse(psnr, (40.0, None), (None, "identical"), (None, None)) == (None, "the floor is identical to dense")
    assert worse(psnr, (None, "identical"), (60.0, None), (None, None)) == (None, "identical")
    assert worse(psnr, (40.0, None), (None, "not measured: x"), (None, None)) == (None, "not measured: x")


def test_it_can_be_left_out(pipe: Any) -> None:
    report = compare(
        pipe, {"band": "dense"}, [PROMPT], **{**ASKED, "seeds": (0,), "show": 0}, floor=False, progress=False
    )
    assert report.names == ["band"] and "floor" not in {row.subject for row in report.rows}
    assert "floor" not in report.provenance and "Floor" not in render.markdown(report)


def test_where_it_cannot_run_the_message_says_what_to_do(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("No available kernel")

    before = state(pipe)
    monkeypatch.setattr(floors, "attend_otherwise", fail)
    with pytest.raises(RuntimeError, match=r"in float64\), cannot run here: .*No available kernel.*floor=False"):
        compare(pipe, {"band": "dense"}, [PROMPT], **ASKED, progress=False)
    assert state(pipe) == before


def test_it_stands_in_every_chart() -> None:
    near, far, none = (synthetic.report({"a": [1.4, 1.5]}, floor=value) for value in (29.5, 128.0, None))
    for report, says in ((near, "floor 29.50"), (far, "floor 128.00, beyond this edge")):
        (psnr, *others) = charts.quality_speed(report)
        assert f">{says}<" in psnr and "floor at" in psnr.split(">")[0]
        assert all(">floor " in chart for chart in others)
    assert not any(">floor" in chart for chart in charts.quality_speed(none))
    highest = [max(map(float, ticks(charts.quality_speed(each)[0]))) for each in (far, none)]
    assert highest[0] == pytest.approx(highest[1], abs=2), "a floor far off leaves the others apart"


def ticks(chart: str) -> list[str]:
    """Labels of an axis of PSNR, in dB."""
    return [text for text in re.findall(r">(\d\d\.\d)<", chart) if math.isfinite(float(text))]


def test_attaching_it_leaves_nothing_behind(pipe: Any) -> None:
    before = state(pipe)
    with another_kernel(pipe):
        assert state(pipe) != before
    assert state(pipe) == before
