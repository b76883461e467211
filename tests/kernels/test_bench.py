"""The kernel benchmark on a shape that takes milliseconds, and its watchdog on workers that take none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals import (
    kernel_bench,
    kernel_inputs,
    kernel_peers,
    kernel_points,
    kernel_report,
    kernel_rows,
    kernel_watch,
    kernel_worker,
)
from diffusers_accel.evals.kernel_inputs import PATTERNS, SHAPES, Shape, pattern, qkv
from diffusers_accel.evals.kernel_points import Row
from diffusers_accel.kernels.attention import cpu

TINY = Shape((3, 16, 20), 5, 64, text=40)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_inputs.SHAPES, "tiny", TINY)
    monkeypatch.setitem(kernel_worker.DRIFT, "cpu", float("inf"))  # a test machine is never idle


def settings(**asked: Any) -> kernel_points.Settings:
    usual = {"shapes": ["tiny"], "dtype": "fp32", "patterns": ["window"], "operators": ["attention"], "rep_ms": 0}
    return kernel_points.settings("cpu", **{**usual, **asked})


def measured(operator: str = "attention", **asked: Any) -> list[Row]:
    """The rows of one operator, measured in this process; what cannot run on a CPU is left out."""
    rows: list[Row] = []
    asked = {"operators": [operator], **asked}
    kernel_worker.measure(settings(**asked), rows.append, dense=[("tiny", "gaussian", "sdpa-flash", 1.0)])
    return [row for row in rows if row["operator"] == operator and not row["status"].startswith("missing")]


def test_rows_say_what_was_measured_and_how() -> None:
    sparse, dense = measured(densities=[0.1, 1.0])
    assert dense["density_computed"] == 1 and sparse["rows_min_blocks"] == sparse["rows_max_blocks"] == 1
    for row in (dense, sparse):
        assert row["status"] == "ok" and row["impl"] == "cpu" and row["N"] == 1000 and row["n_rep"] >= 5
        assert row["t_p20_ms"] <= row["t_med_ms"] <= row["t_p80_ms"] and row["t_kernel_ms"] == row["t_med_ms"]
        assert row["eta"] == pytest.approx(row["speedup_kernel"] * row["density_computed"])
        assert row["speedup_kernel"] == pytest.approx(row["t_dense_ms"][row["dense"]] / row["t_kernel_ms"])
        pairs = 1000**2 * row["density_computed"]
        assert row["tflops_computed"] == pytest.approx(1e-9 * 4 * pairs * 64 * 5 / row["t_kernel_ms"])
        assert row["roofline_share"] > 0 and row["gemm_tflops"] > 0 and row["copy_tbps"] > 0
        assert {"dtype", "seed", "precision", "rel_err", "max_err", "lse_err", "cos", "dense_drift"} <= row.keys()
        assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_fastest_dense_kernel_of_the_run_is_what_sparse_ones_are_compared_with() -> None:
    rows: list[Row] = []
    kernel_worker.measure(settings(densities=[0.25]), rows.append)
    times = {row["impl"]: row["t_med_ms"] for row in rows if row["operator"] == "dense" and row["status"] == "ok"}
    (sparse,) = (row for row in rows if row["operator"] == "attention" and row["status"] == "ok")
    assert {"sdpa-flash", "sdpa-math", "cpu"} == times.keys() == sparse["t_dense_ms"].keys()
    assert sparse["dense"] == min(times, key=times.__getitem__)


def test_every_operator_is_checked_and_timed() -> None:
    asked = settings(operators=kernel_points.OPERATORS, precisions=["input", "int8_fp8"], densities=[0.25])
    rows: list[Row] = []
    kernel_worker.measure(asked, rows.append)
    ok = [row for row in rows if row["status"] == "ok"]
    assert {row["operator"] for row in ok} == set(kernel_points.OPERATORS)
    assert {(r["operator"], r["precision"]) for r in ok if r["precision"] != "input"} == {
        ("prep", "int8_fp8"),
        ("quantize", "int8_fp8"),
    }
    bad = {row["status"].partition(":")[0] for row in rows} - {"ok"}
    assert bad == {"missing", "simulated"}
    for row in ok:
        assert row["t_med_ms"] > 0 and row["tbps"] > 0 and row["roofline_share"] > 0


def test_selection_and_prep_are_a_share_of_the_attention_that_they_serve() -> None:
    (row,) = measured("selected", densities=[0.25])
    assert row["status"] == "ok" and 0.2 < row["density_computed"] < 0.4
    assert row["overhead_share"] == pytest.approx((row["t_prep_ms"] + row["t_select_ms"]) / row["t_kernel_ms"])
    assert row["speedup_total"] < row["speedup_kernel"]


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention

    def wrong(*inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*inputs)
        return out * 1.001, lse

    monkeypatch.setattr(cpu, "attention", wrong)
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("wrong: rel_err") and row["rel_err"] == pytest.approx(1e-3, rel=0.1)
    assert not {"t_med_ms", "eta", "speedup_kernel"} & row.keys()
    assert kernel_report.not_measured([row]) == [f"attention cpu, head dim 64: {row['status']} (at tiny, density 0.5)"]


def test_nan_is_wrong_and_no_number_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *inputs: (right(*inputs)[0] * torch.nan, right(*inputs)[1]))
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("wrong: rel_err nan") and row["rel_err"] is None
    json.dumps(row, allow_nan=False)


def test_a_machine_that_drifts_gives_no_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_worker.DRIFT, "cpu", -1.0)
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("drift") and "t_med_ms" in row and "eta" not in row


def test_a_simulation_has_errors_and_no_time() -> None:
    rows = measured(densities=[0.5], precisions=["input", "int8", "int8_fp8"], inputs=["video"])
    assert [(row["precision"], row["impl"]) for row in rows] == [(p, "cpu") for p in ("input", "int8", "int8_fp8")]
    exact, *simulated = rows
    assert exact["status"] == "ok"
    for row in simulated:
        assert row["status"].startswith("simulated") and row["cos"] > 0.999 and "t_med_ms" not in row
    assert exact["rel_err"] < simulated[0]["rel_err"] < simulated[1]["rel_err"]
    assert "cpu int8_fp8 | - " in kernel_report.markdown([row | environment() for row in rows])


def test_a_quantized_kernel_may_not_err_more_than_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.quantized_attention
    monkeypatch.setattr(cpu, "quantized_attention", lambda *inputs: (1.03 * right(*inputs)[0], right(*inputs)[1]))
    (row,) = measured(densities=[0.5], precisions=["int8"])
    assert row["status"].startswith("wrong: rel_err") and "above 0.02" in row["status"] and 0.02 < row["rel_err"] < 0.05


def test_what_fails_once_is_not_tried_again_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(cpu, "attention", broken)
    rows: list[Row] = []
    kernel_worker.measure(settings(densities=[0.5, 0.25], operators=["attention", "pool"]), rows.append)
    failed = [row for row in rows if row["status"].startswith("failed")]
    assert [row["status"] for row in failed] == ["failed: RuntimeError: no such kernel"]
    assert rows[-1]["operator"] == "pool" and rows[-1]["status"] == "ok"


def test_a_peer_that_is_missing_says_why_once() -> None:
    rows: list[Row] = []
    kernel_worker.measure(settings(densities=[0.5, 0.25], impls=["flex", "vsa"]), rows.append)
    peers = {row["impl"]: row["status"] for row in rows if row["operator"] == "attention"}
    assert [row["impl"] for row in rows if row["operator"] == "attention"] == ["flex", "vsa"]
    assert peers["flex"] == "missing: compiled FlexAttention is compared on GPUs only"
    assert peers["vsa"] == "missing: runs on CUDA, found cpu"
    assert "attention flex, head dim 64: missing: compiled" in "".join(kernel_report.not_measured(rows))


def test_a_peer_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> kernel_peers.Call:
        return lambda: cpu.attention(q, k, v, blocks, q.shape[3] ** -0.5)[0]

    monkeypatch.setitem(kernel_peers.PEERS["attention"], "ours", kernel_peers.Peer(ours, "input", "torch"))
    (row,) = measured(densities=[0.5], impls=["ours"])
    assert row["status"] == "ok" and "lse_err" not in row and row["impl_version"].startswith(torch.__version__[:3])


def test_flex_reads_the_same_blocks() -> None:
    blocks = pattern("unequal", TINY, 0.3, seed=0)
    mask = kernel_peers.flex_mask(blocks)
    assert mask.shape == (1, 5, 1000, 1000)
    assert torch.equal(mask.to_dense().bool(), blocks.mask())


def test_unknown_names_are_refused() -> None:
    for asked, message in (
        ({"patterns": ["spiral"]}, "patterns must be among .*window.*found spiral"),
        ({"densities": [0.0]}, r"densities must lie in 0\.\.1"),
        ({"precisions": ["int4"]}, "precisions must be among input, int8, int8_fp8, found int4"),
        ({"impls": ["magic"]}, "impls must be among .*portable.*flex.*found magic"),
        ({"operators": ["sort"]}, "operators must be among attention.*found sort"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**asked)
    with pytest.raises(ValueError, match="runs on cuda and cpu, found meta"):
        kernel_points.settings("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: PyTorch sees no GPU here"):
            kernel_bench.run("cuda")
    with pytest.raises(ValueError, match="minutes must be 0 or more"):
        kernel_bench.run("cpu", minutes=-1)


@pytest.mark.gpu
def test_everything_of_ours_runs_and_is_right_on_a_gpu() -> None:
    rows: list[Row] = []
    asked = kernel_points.settings("cuda", shapes=["S1", "S4"], densities=[0.3], patterns=["text"], rep_ms=5)
    kernel_worker.measure(asked, rows.append)
    ours = [row for row in rows if row["impl"] not in {name for peers in kernel_peers.PEERS.values() for name in peers}]
    bad = [row for row in ours if row["status"].partition(":")[0] in ("wrong", "failed", "out of memory")]
    assert not [(row["operator"], row["impl"], row["status"]) for row in bad]
    timed = {row["operator"] for row in rows if "t_med_ms" in row}
    assert timed == set(kernel_points.OPERATORS)
    assert all("t_graph_ms" in row for row in rows if row["operator"] == "selected" and "t_med_ms" in row)


# The order of the points


def test_the_most_telling_points_come_first() -> None:
    points = kernel_points.plan(kernel_points.settings("cuda"))
    keys = [kernel_points.key(point.row) for point in points]
    assert len(set(keys)) == len(keys)
    first = points[: next(i for i, point in enumerate(points) if point.operator == "selected")]
    assert {point.operator for point in first} == {"attention", "dense"}
    for shape in (
        "W13",
        "C2",
        "HY",
        "W14",
        "C15",
    ):  # before anything else, ours on every shape, against all dense kernels
        here = [point for point in first if point.shape == shape]
        assert [p.density for p in here if p.operator == "attention"] == [0.1, 0.3, 1.0]
        assert {p.impl for p in here if p.operator == "attention"} == {"portable"}
        assert {"sdpa-cudnn", "sdpa-flash", "fa3", "fa4", "cudnn"} <= {p.impl for p in here if p.operator == "dense"}
        assert [p.operator for p in here] == sorted((p.operator for p in here), reverse=True)  # dense before attention
    places = {name: next(i for i, p in enumerate(points) if p.impl == name) for name in ("flex", "vsa")}
    assert max(places.values()) < len(points) // 4
    assert points[-1].inputs == "video" and points[-1].pattern != "random"


def test_dense_attention_is_always_there_to_compare_with() -> None:
    points = kernel_points.plan(settings(operators=["attention"], inputs=["gaussian", "video"], impls=["portable"]))
    for kind in ("gaussian", "video"):
        of_kind = [point for point in points if point.inputs == kind]
        assert of_kind[0].operator == "dense" and {p.impl for p in of_kind if p.operator == "attention"} == {"portable"}
    asked = kernel_points.plan(settings(operators=["attention"], impls=["reference"]))
    assert {p.impl for p in asked if p.operator == "attention"} == {"reference"}  # only when asked for
    assert kernel_points.plan(settings(operators=["pool"]))[0].operator == "pool"


# The watchdog, with workers that measure nothing

WORKER = """
import json, subprocess, sys, time
job = json.load(open(sys.argv[1]))
def say(**message):
    print(json.dumps(message), flush=True)
if WAY == "silent":
    time.sleep(600)
if WAY == "broken":
    sys.exit("no such device")
say(hello={"machine": {"gpu": "A"}, "versions": {"torch": "1"}, "code": "c", "git_sha": None, "rep_ms": 300.0})
for impl in ("first", "bad", "last"):
    row = {"operator": "dense", "impl": impl, "precision": "input", "dtype": "bf16", "shape": "tiny", "H": 5, "N": 1000,
           "D": 64, "input_kind": "gaussian", "seed": 0, "pattern": None, "density_requested": None}
    if "|".join(str(row[k]) for k in KEY) in job["done"]:
        continue
    say(begin=row)
    if impl == "bad" and WAY == "hang":
        child = subprocess.Popen(["sleep", "600"])
        open(FOLDER + "/pid", "w").write(str(child.pid))
        time.sleep(600)
    if impl == "bad" and WAY == "die":
        sys.exit("Traceback\\ntorch.AcceleratorError: illegal memory access\\nFor debugging consider")
    say(row=row | {"status": "ok", "t_med_ms": 1.0, "n_rep": len(job["dense"])})
say(end=True)
"""


def worker(folder: Path, way: str) -> tuple[str, ...]:
    """A command that behaves in some way: well, hang, die, silent, broken."""
    script = folder / f"{way}.py"
    script.write_text(f"WAY, FOLDER, KEY = {way!r}, {str(folder)!r}, {kernel_points.KEY!r}\n{WORKER}")
    return (sys.executable, "-I", str(script))


def watched(command: Sequence[str], timeout: float = 30.0, minutes: float = 1.0, **options: Any) -> list[Row]:
    return kernel_bench.run("cpu", command=command, timeout=timeout, minutes=minutes, **options)


def test_a_kernel_that_hangs_is_killed_with_its_children_and_the_run_goes_on(tmp_path: Path) -> None:
    first, bad, last = watched(worker(tmp_path, "hang"), timeout=3.0)
    assert (first["status"], last["status"]) == ("ok", "ok")
    assert bad["impl"] == "bad" and bad["status"] == "hung: silent for 3 s, killed" and "t_med_ms" not in bad
    assert last["n_rep"] == 1  # the new worker was told the dense time of the first
    assert first["run_id"] == bad["run_id"] == last["run_id"] and bad["machine"] == {"gpu": "A"}
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the hanging worker's child is still there")


def test_a_kernel_that_kills_its_process_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    first, bad, last = watched(worker(tmp_path, "die"))
    assert (first["status"], last["status"]) == ("ok", "ok")
    assert bad["status"] == "crashed: exit code 1: torch.AcceleratorError: illegal memory access"


def test_a_worker_that_cannot_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="before it could use the device.*It crashed: exit code 1: no such device"):
        watched(worker(tmp_path, "broken"))
    monkeypatch.setattr(kernel_watch, "START_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="before it could use the device.*It hung: silent for 0.5 s"):
        watched(worker(tmp_path, "silent"))


def test_a_run_stops_when_its_time_is_over(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    begin = time.monotonic()
    rows = watched(worker(tmp_path, "hang"), timeout=500.0, minutes=0.1, out=out)
    assert time.monotonic() - begin < 30
    assert [row["impl"] for row in rows] == ["first"]  # the one that was cut off may be tried again
    rows = watched(worker(tmp_path, "well"), out=out)
    assert [row["impl"] for row in rows] == ["first", "bad", "last"]


def test_a_second_run_goes_on_behind_the_first(tmp_path: Path) -> None:
    out, seen = tmp_path / "rows.jsonl", list[Row]()
    watched(worker(tmp_path, "well"), out=out)
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["impl"] for line in lines] == ["first", "bad", "last"]
    out.write_text("".join(lines[:2]) + lines[2][:40])  # as a power cut leaves it
    rows = watched(worker(tmp_path, "well"), out=out, on_row=seen.append)
    assert [row["impl"] for row in seen] == ["last"] and len(rows) == 3
    assert [json.loads(line)["impl"] for line in out.read_text().splitlines()] == ["first", "bad", "last"]


def test_rows_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    watched(worker(tmp_path, "well"), out=out)
    text = out.read_text().splitlines(keepends=True)
    for there, message in (('"gpu": "A"', "machine gpu B, this run has A"), ('"code": "c"', "code B, this run has c")):
        name, _, _ = there.rpartition(" ")
        out.write_text("".join(text[:1]).replace(there, f'{name} "B"'))
        before = out.read_text()
        with pytest.raises(ValueError, match=f"{message}.*give another --out"):
            watched(worker(tmp_path, "well"), out=out)
        assert out.read_text() == before
    out.write_text('{"shape": "W13"}\n')
    with pytest.raises(ValueError, match="line 1: expected a row of this version's benchmark"):
        watched(worker(tmp_path, "well"), out=out)


def test_a_worker_ends_with_its_parent() -> None:
    """Also in the middle of a kernel, of which only another thread can know."""
    program = (
        "import threading, time; from diffusers_accel.evals.kernel_worker import _die_with_parent as die\n"
        "threading.Thread(target=die, daemon=True).start(); print('begun', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout and child.stdout.readline() == b"begun\n"
    child.stdin.close()
    assert child.wait(60) == 1
    child.stdout.close()


def test_the_command_measures_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real worker, in a process of its own, from the command line."""
    out, report = tmp_path / "rows" / "rows.jsonl", tmp_path / "report"
    asked = [
        "--device",
        "cpu",
        "--shapes",
        "S1",
        "--dtype",
        "fp32",
        "--patterns",
        "text",
        "--rep-ms",
        "0",
        "--out",
        str(out),
    ]
    asked += ["--operators", "attention", "--timeout", "300", "--minutes", "20"]
    kernel_bench.main([*asked, "--densities", "0.5"])
    first = out.read_text()
    kernel_bench.main([*asked, "--densities", "0.5,0.25"])
    assert out.read_text().startswith(first)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    own = [row for row in rows if row["operator"] == "attention" and row["impl"] == "cpu"]
    assert [row["density_requested"] for row in own] == [0.5, 0.25] and all("t_med_ms" in row for row in own)
    assert {"run_id", "git_sha", "time_utc", "machine", "versions", "code", "rep_ms"} <= own[0].keys()
    capsys.readouterr()
    before = out.read_text()
    kernel_bench.main(["--device", "cpu", "--minutes", "0", "--out", str(out), "--report", str(report)])
    assert out.read_text() == before
    shown = capsys.readouterr()
    assert "S1" in shown.out and "Sparse attention" in shown.out and "missing: compiled FlexAttention" in shown.err
    page = (report / "kernels.md").read_text()
    assert "| S1 | text |" in page and "## Not measured" in page and own[0]["code"] in page
    assert (report / "kernels.png").exists() == ("kernels.png" in page)


def test_a_run_that_fails_shows_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel_rows.append(tmp_path / "rows.jsonl", row())

    def fail(**options: Any) -> list[Row]:
        raise RuntimeError("the driver holds it")

    monkeypatch.setattr(kernel_bench, "run", fail)
    with pytest.raises(RuntimeError, match="driver"):
        kernel_bench.main(["--out", str(tmp_path / "rows.jsonl"), "--report", str(tmp_path)])
    assert "W13" in capsys.readouterr().out and "W13" in (tmp_path / "kernels.md").read_text()


def test_a_dense_time_of_an_earlier_run_needs_its_kernel_to_be_there() -> None:
    rows: list[Row] = []
    done = {kernel_points.key(point.row) for point in kernel_points.plan(settings()) if point.operator == "dense"}
    known = [("tiny", "gaussian", "fa4", 0.001), ("tiny", "gaussian", "cpu", 1.0)]
    kernel_worker.measure(settings(densities=[0.5], impls=["cpu"]), rows.append, done=done, dense=known)
    (sparse,) = rows
    assert sparse["status"] == "ok" and sparse["dense"] == "cpu" and sparse["t_dense_ms"].keys() == {"cpu"}


# What the rows look like


def environment() -> Row:
    return {"machine": {"gpu": "A"}, "versions": {"torch": "1"}, "code": "c", "git_sha": None, "rep_ms": 300.0}


def row(**fields: Any) -> Row:
    usual = kernel_points.Point("attention", "portable", "W13", "gaussian", "bf16", 0, "input", "random", 0.1).row
    times = {"t_med_ms": 2.0, "t_p20_ms": 1.9, "t_p80_ms": 2.1, "t_kernel_ms": 2.0, "status": "ok"}
    dense = {"t_dense_ms": {"cudnn": 16.0}, "dense": "cudnn", "eta": 0.8, "speedup_total": 8.0, "density_computed": 0.1}
    return environment() | usual | times | dense | fields


def test_tables_fit_into_a_console() -> None:
    from rich.console import Console

    rows = [
        row(tflops_computed=512.3),
        row(pattern="diagonals", status="drift: 9 %"),
        row(operator="selected", pattern=None, t_prep_ms=0.1, t_select_ms=0.05, overhead_share=0.075),
    ]
    rows += [row(operator="dense", impl="sdpa-efficient"), row(operator="block_stats", precision="int8_fp8")]
    rows += [
        r | {"t_med_ms": 12.345678, "t_kernel_ms": 12.345678, "precision": "int8_fp8", "input_kind": "video"}
        for r in rows
    ]
    rows += [r | {"shape": "W14", "status": "simulated: no time"} for r in rows]
    for table, title in zip(kernel_report.tables(rows), ("Sparse", "Prep", "Dense", "Operators"), strict=True):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table)
        lines = capture.get().splitlines()
        heading = next(line for line in lines if "status" in line)  # the last column: nothing is cut off
        assert title in lines[0] and "…" not in capture.get() and heading.split()[-1] == "status"


def test_the_page_names_the_reference_of_every_ratio() -> None:
    page = kernel_report.markdown(
        [row(), row(density_requested=0.3, eta=0.9), row(impl="flex", status="missing: none")]
    )
    assert "| W13 | random | 0.100 | portable | 2 | 1.9-2.1 | 16 | cudnn | 8.00 | 0.80 |" in page
    assert "flex |" not in page and "- attention flex, head dim 128: missing: none" in page
    assert kernel_report.markdown([]).endswith("Nothing has been measured.\n")


def test_the_last_row_of_a_point_counts() -> None:
    assert kernel_rows.latest([row(eta=0.1), row(impl="flex"), row(eta=0.7)])[0]["eta"] == 0.7


def test_the_plot_needs_something_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
    assert not kernel_report.plot([row(operator="dense")], tmp_path / "plot.png")
    assert kernel_report.plot([row(), row(density_computed=0.3), row(shape="C2")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


# The inputs


def test_the_shapes_are_those_of_the_models() -> None:
    assert {name: (s.tokens, s.dim) for name, s in SHAPES.items() if name != "tiny"} == {
        "W13": (32_760, 128), "W14": (75_600, 128), "HY": (119_056, 128), "C2": (17_776, 64), "C15": (45_106, 64),
        "shapes": (4_352, 64), "S8": (8_192, 64), "S4": (4_096, 128), "S1": (1_000, 64),
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
    if kind == "tiles":  # 2 x 4 x 2 boxes: the neighbours of a corner in frame, row and column
        assert found.mask()[0, 0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
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
