"""The kernel benchmark on a shape that takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals import kernel_bench, kernel_inputs
from diffusers_accel.evals.kernel_inputs import PATTERNS, SHAPES, Shape, pattern, qkv
from diffusers_accel.kernels.attention import cpu

TINY = Shape((3, 16, 20), 5, 64, text=40)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_inputs.SHAPES, "tiny", TINY)
    monkeypatch.setitem(kernel_bench.DRIFT, "cpu", float("inf"))  # a test machine is never idle
    monkeypatch.setattr(kernel_bench, "CPU_SECONDS", 0.0)


def run(**options: Any) -> list[kernel_bench.Row]:
    return kernel_bench.run("cpu", **{"shapes": ["tiny"], "dtype": "fp32", "patterns": ["window"], **options})


def test_rows_say_what_was_measured_and_how() -> None:
    dense, sparse = run(densities=[1.0, 0.25])
    assert dense["density_computed"] == 1 and sparse["rows_min_blocks"] == sparse["rows_max_blocks"] == 2
    for row in (dense, sparse):
        assert row["status"] == "ok" and row["impl"] == "cpu" and row["N"] == 1000 and row["n_rep"] >= 5
        assert row["t_p20_ms"] <= row["t_med_ms"] <= row["t_p80_ms"]
        assert row["eta"] == pytest.approx(row["speedup_kernel"] * row["density_computed"])
        assert row["speedup_kernel"] == pytest.approx(row["t_dense_ms"][row["dense"]] / row["t_med_ms"])
        assert {"run_id", "git_sha", "time_utc", "machine", "versions", "seed"} <= row.keys()
        assert json.loads(json.dumps(row)) == row
    assert "window" in "".join(str(cell) for column in kernel_bench.table([sparse]).columns for cell in column.cells)


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention

    def wrong(*inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*inputs)
        return out * 1.001, lse

    monkeypatch.setattr(cpu, "attention", wrong)
    (row,) = run(densities=[0.5])
    assert row["status"].startswith("wrong") and row["rel_err"] == pytest.approx(1e-3, rel=0.1)
    assert not {"t_med_ms", "eta", "speedup_kernel"} & row.keys()


def test_a_machine_that_drifts_gives_no_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_bench.DRIFT, "cpu", -1.0)
    (row,) = run(densities=[0.5])
    assert row["status"].startswith("drift") and "t_med_ms" in row and "eta" not in row


def test_rows_are_written_when_they_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--patterns", "text", "--out", str(out)]
    kernel_bench.main([*arguments, "--densities", "0.5,0.25"])
    kernel_bench.main([*arguments, "--densities", "1", "--seconds", "0"])  # no time: no point is begun
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["density_requested"] for row in rows] == [0.5, 0.25]
    assert "tiny" in capsys.readouterr().out


def test_a_simulation_has_errors_and_no_time() -> None:
    rows = run(densities=[0.5], precisions=["input", "int8", "int8_fp8"], inputs=["video"])
    assert [(row["precision"], row["impl"]) for row in rows] == [(p, "cpu") for p in ("input", "int8", "int8_fp8")]
    exact, *simulated = rows
    assert exact["status"] == "ok"
    for row in simulated:
        assert row["status"].startswith("simulated") and row["cos"] > 0.999 and "t_med_ms" not in row
    assert exact["rel_err"] < simulated[0]["rel_err"] < simulated[1]["rel_err"]
    cells = "".join(str(cell) for column in kernel_bench.table(rows).columns for cell in column.cells)
    assert "cpu int8_fp8" in cells and "simulated" in cells


def test_a_quantized_kernel_may_not_err_more_than_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.quantized_attention
    monkeypatch.setattr(cpu, "quantized_attention", lambda *inputs: (1.03 * right(*inputs)[0], right(*inputs)[1]))
    (row,) = run(densities=[0.5], precisions=["int8"])
    assert row["status"].startswith("wrong: rel_err above 0.02") and 0.02 < row["rel_err"] < 0.05


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="patterns must be among .*window.*found spiral"):
        run(patterns=["spiral"])
    with pytest.raises(ValueError, match=r"densities must lie in 0\.\.1"):
        run(densities=[0.0])
    with pytest.raises(ValueError, match="runs on cuda and cpu, found meta"):
        kernel_bench.run("meta")
    with pytest.raises(ValueError, match="precisions must be among input, int8, int8_fp8, found int4"):
        run(precisions=["int4"])


def test_the_shapes_are_those_of_the_models() -> None:
    assert {name: (s.tokens, s.dim) for name, s in SHAPES.items() if name != "tiny"} == {
        "W13": (32_760, 128), "W14": (75_600, 128), "HY": (119_056, 128), "C2": (17_776, 64), "C15": (45_106, 64),
        "shapes": (4_352, 64), "S8": (8_192, 64), "S4": (4_096, 128),
    }  # fmt: skip


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_have_the_density_asked_for(kind: str) -> None:
    shape = Shape((8, 16, 16), 4, 64)
    found = pattern(kind, shape, 0.25, seed=1)
    found.check()
    counts = found.counts.unique().tolist()
    if kind == "text":
        assert counts[-1] == 16 and bool(found.mask()[..., -1].all())
    elif kind == "unequal":
        assert len(counts) > 2 and found.density == pytest.approx(0.25, abs=0.05)
    else:
        assert counts == [4]
    if kind == "diagonals":  # two blocks a frame: the same half of other frames
        assert torch.equal(found.mask()[0, 0, 8].nonzero()[:, 0] % 2, torch.zeros(4, dtype=torch.long))
    assert torch.equal(found.mask(), pattern(kind, shape, 0.25, seed=1).mask())


def test_video_inputs_are_as_concentrated_as_a_video() -> None:
    """A tenth of the blocks holds most of the mass of the local heads and hardly more than its share of the diffuse."""
    shape = Shape((10, 16, 16), 10, 64)
    q, k, _ = qkv("video", shape, torch.float32, torch.device("cpu"), seed=0)
    p = torch.einsum("bqhd,bkhd->hqk", q, k).mul(shape.dim**-0.5).softmax(-1)
    mass = p.unflatten(2, (20, 128)).sum(3).unflatten(1, (20, 128)).mean(2)
    recall = mass.sort(-1, descending=True).values[..., :2].sum(-1).mean(-1)
    assert (recall[:4] > 0.7).all() and recall[-1] < 0.3
