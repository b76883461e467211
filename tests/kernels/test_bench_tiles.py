"""The sweep of tile sizes, its table, and points that are run once for a profiler."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.kernel_bench import once, report, tiles
from diffusers_accel.evals.kernel_bench.inputs import SHAPES, Shape
from diffusers_accel.evals.kernel_bench.points import TILES, Row, given_up, plan, settings
from diffusers_accel.evals.kernel_bench.worker import Bench
from diffusers_accel.files import read_json

ENVIRONMENT = {"machine": {"gpu": "A", "cpu": "X"}, "versions": {"torch": "2"}, "code": "c", "rep_ms": 1.0, "peers": {}}


def swept(tile: str, ms: float | None = None, **fields: Any) -> Row:
    point = bench.points.Point("sweep", "portable", "W13", "gaussian", "bf16", 0, "input", "random", 0.2, tile)
    times = {} if ms is None else {"t_med_ms": ms, "t_p20_ms": ms, "t_p80_ms": ms, "t_kernel_ms": ms, "status": "ok"}
    return ENVIRONMENT | point.row | times | {"density_computed": 0.2} | fields


ROWS = [
    swept("128x64x8x3", 2.0),
    swept("128x64x8x2", 1.5),
    swept("128x128x8x3", status="failed: OutOfResources: shared memory"),
    swept("128x2", 1.0, impl="hopper"),
]


@pytest.mark.parametrize("impl", TILES)
def test_every_tile_is_one_of_its_kernel(impl: str) -> None:
    module = pytest.importorskip(f"diffusers_accel.kernels.attention.{impl}", reason="the kernel needs Triton")
    own = module.config
    for tile in TILES[impl]:
        with tiles.taken(impl, tile):
            assert list(module.config(90, 128, torch.bfloat16, (128, 128))) == [int(x) for x in tile.split("x")]
    assert module.config is own and len(set(TILES[impl])) == len(TILES[impl])
    inputs = (90, 128, torch.bfloat16, (128, 128)) if impl == "portable" else (128, 128)
    assert "x".join(map(str, own(*inputs))) == TILES[impl][0]  # what the others are compared with


def test_the_fastest_tile_stands_first_and_those_without_a_time_say_why() -> None:
    found = tiles.table(list(reversed(ROWS)))
    assert list(found["tables"]) == ["hopper, head dim 128, input, bf16", "portable, head dim 128, input, bf16"]
    portable = found["tables"]["portable, head dim 128, input, bf16"]
    assert [each["tile"] for each in portable["tiles"]] == ["128x64x8x2", "128x64x8x3"]
    assert portable["best"] == "128x64x8x2" and portable["fields"] == ["block_m", "block_n", "warps", "stages"]
    assert portable["without_a_time"] == {"128x128x8x3": "failed: OutOfResources: shared memory"}
    assert found == tiles.table(ROWS) and found["measured_on"]["gpu"] == "A" and "cpu" not in found["measured_on"]


def test_a_report_has_the_table_as_a_file_and_on_its_page(tmp_path: Path) -> None:
    page = report.save(ROWS, tmp_path).read_text()
    assert "| 128x64x8x2 " in page and "OutOfResources" in page
    assert read_json(tmp_path / "tiles.json") == tiles.table(ROWS)
    assert "tiles.json" not in [path.name for path in report.save([], tmp_path / "empty").parent.iterdir()]


def test_a_tile_that_fails_says_nothing_of_the_others() -> None:
    assert given_up(ROWS[2]) == set()
    (hung,) = given_up(swept("128x64x8x2", status="hung: silent for 20 s, killed"))
    asked = settings("cuda", operators=["sweep"], shapes=["W13", "C2"])
    rest = list(bench.points.left(asked, "", (), {hung}))
    assert {(p.impl, p.shape) for p in rest} == {("hopper", "W13"), ("portable", "C2"), ("hopper", "C2")}
    assert len(plan(asked)) - len(rest) == len(TILES["portable"])


@pytest.mark.interpreter
def test_a_sweep_runs_the_tiles_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffusers_accel.kernels.attention.portable")
    launched, kernel = list[tuple[int, int]](), module.attention_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*values: Any, **named: Any) -> None:
                launched.append((named["BLOCK_M"], named["BLOCK_N"]))
                kernel[grid](*values, **named)

            return launch

    monkeypatch.setattr(module, "attention_kernel", Spy())
    monkeypatch.setitem(SHAPES, "tiny", Shape((2, 8, 12), 1, 64))
    monkeypatch.setitem(TILES, "portable", ("128x64x8x3", "64x128x4x2"))
    asked = settings("cpu", shapes=["tiny"], dtype="fp32", patterns=["text"], operators=["sweep"], rep_ms=0)
    rows = list(Bench(asked, lambda row: None, {"gemm_tflops": 1.0, "copy_tbps": 1.0}).rows())
    ours = [row for row in rows if row["impl"] == "portable"]
    assert [(row["tile"], row["status"]) for row in ours] == [("128x64x8x3", "ok"), ("64x128x4x2", "ok")]
    assert set(launched) == {(128, 64), (64, 128)} and all(row["t_kernel_ms"] > 0 for row in ours)


def test_each_of_our_kernels_can_be_run_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--device", "cpu", "--impls", "cpu,reference", "--precisions", "input", "--dtype", "fp32"]
    assert once.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.endswith(": ok")} == set(once.OURS) - {"quantize"}
    cpu = importlib.import_module("diffusers_accel.kernels.attention.cpu")
    right = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *inputs: (1.1 * right(*inputs)[0], right(*inputs)[1]))
    assert once.main([*asked, "--operators", "attention"]) == 1
    assert "attention cpu input S1: wrong: rel_err" in capsys.readouterr().out
    assert once.main(["--device", "cpu", "--operators", "pool", "--impls", "portable"]) == 0
    assert json.dumps(capsys.readouterr().out).count("missing: runs on CUDA") == 1
