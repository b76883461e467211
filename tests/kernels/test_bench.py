"""The kernel benchmark on a shape that takes milliseconds, and its watchdog on workers that take none."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.kernel_bench.inputs import PATTERNS, SHAPES, Shape, pattern, qkv
from diffusers_accel.evals.kernel_bench.peers import PEERS
from diffusers_accel.evals.kernel_bench.points import Row
from diffusers_accel.evals.kernel_bench.worker import Bench
from diffusers_accel.files import WriteError, encode_line
from diffusers_accel.kernels.attention import cpu

TINY = Shape((3, 16, 20), 5, 64, text=40)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(bench.worker.DRIFT, "cpu", float("inf"))  # a test machine is never idle
    monkeypatch.setenv("CXX", "/no/compiler")  # which FlexAttention would use for half a minute


def settings(**asked: Any) -> bench.points.BenchSettings:
    usual = {"shapes": ["tiny"], "dtype": "fp32", "patterns": ["window"], "operators": ["attention"], "rep_ms": 0}
    return bench.points.settings("cpu", **{**usual, **asked})


def made(asked: bench.points.BenchSettings, **known: Any) -> Bench:
    return Bench(asked, lambda row: None, {"gemm_tflops": 1.0, "copy_tbps": 0.01}, **known)


def rows_of(asked: bench.points.BenchSettings, **known: Any) -> list[Row]:
    """Everything that is asked for, measured in this process."""
    return list(made(asked, **known).rows())


def measured(operator: str = "attention", **asked: Any) -> list[Row]:
    """The rows of one operator; what cannot run on a CPU is left out."""
    rows = rows_of(settings(**{"operators": [operator], **asked}))
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
    rows = rows_of(settings(densities=[0.25]))
    times = {row["impl"]: row["t_med_ms"] for row in rows if row["operator"] == "dense" and row["status"] == "ok"}
    (sparse,) = (row for row in rows if row["operator"] == "attention" and row["status"] == "ok")
    assert {"sdpa-math", "cpu"} == times.keys() == sparse["t_dense_ms"].keys()
    assert sparse["dense"] == min(times, key=times.__getitem__)


def test_every_operator_is_checked_and_timed() -> None:
    asked = settings(operators=bench.points.OPERATORS, precisions=["input", "int8_fp8"], densities=[0.25])
    rows = rows_of(asked)
    ok = [row for row in rows if row["status"] == "ok"]
    assert {row["operator"] for row in ok} == set(bench.points.OPERATORS) - {"sweep"}  # a CPU's kernel has no tiles
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
    around = row["t_prep_ms"] + row["t_select_ms"] + row["t_scatter_ms"]
    assert row["overhead_share"] == pytest.approx(around / row["t_kernel_ms"]) and "t_back_ms" not in row
    dense_ms = row["t_dense_ms"][row["dense"]]
    assert row["speedup_total"] == pytest.approx(dense_ms / row["t_med_ms"])
    assert row["speedup_kernel"] == pytest.approx(dense_ms / row["t_kernel_ms"])


def test_a_whole_call_writes_its_output_into_the_models_order_as_a_layer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's end where it has one; the time of that is what attention takes longer for it."""
    right, ends = cpu.attention, []

    def slower_where_rows_have_places(*inputs: Any) -> tuple[Tensor, Tensor]:
        ends.append(inputs[-1])
        if inputs[-1] is not None:
            assert inputs[-1].rows.dtype == torch.int32 and inputs[-1].part is None
            time.sleep(0.2)
        return right(*inputs)

    monkeypatch.setattr(cpu, "attention", slower_where_rows_have_places)
    (row,) = measured("selected", densities=[0.25])
    assert row["status"] == "ok" and ends[0] is not None and None in ends
    assert 150 < row["t_scatter_ms"] < row["t_med_ms"]


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention

    def wrong(*inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*inputs)
        return out * 1.001, lse

    monkeypatch.setattr(cpu, "attention", wrong)
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("wrong: rel_err") and row["rel_err"] == pytest.approx(1e-3, rel=0.1)
    assert not {"t_med_ms", "eta", "speedup_kernel"} & row.keys()
    assert bench.report.not_measured([row]) == [f"attention cpu, head dim 64: {row['status']} (at tiny, density 0.5)"]


def test_nan_is_wrong_and_no_number_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *inputs: (right(*inputs)[0] * torch.nan, right(*inputs)[1]))
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("wrong: rel_err nan") and row["rel_err"] is None
    json.dumps(row, allow_nan=False)


def test_a_machine_that_drifts_gives_no_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.worker.DRIFT, "cpu", -1.0)
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
    assert "cpu int8_fp8 | - " in bench.report.markdown([row | environment() for row in rows])


def test_a_quantized_kernel_may_not_err_more_than_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.quantized_attention
    monkeypatch.setattr(cpu, "quantized_attention", lambda *inputs: (1.03 * right(*inputs)[0], right(*inputs)[1]))
    (row,) = measured(densities=[0.5], precisions=["int8"])
    assert row["status"].startswith("wrong: rel_err") and "above 0.02" in row["status"] and 0.02 < row["rel_err"] < 0.05


def test_what_fails_once_is_not_tried_again_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(cpu, "attention", broken)
    rows = rows_of(settings(densities=[0.5, 0.25], operators=["attention", "pool"]))
    failed = [row for row in rows if row["status"].startswith("failed")]
    assert [row["status"] for row in failed] == ["failed: RuntimeError: no such kernel"]
    assert [row["status"] for row in rows if row["operator"] == "pool"] == ["ok"]


def test_a_peer_that_is_missing_says_why_once() -> None:
    rows = rows_of(settings(densities=[0.5, 0.25], impls=["flex", "flex-tuned", "vsa"]))
    peers = {row["impl"]: row["status"] for row in rows if row["operator"] == "attention"}
    assert [row["impl"] for row in rows if row["operator"] == "attention"] == ["flex", "vsa", "flex-tuned"]
    assert peers["flex"].startswith(
        "missing: torch.compile needs a C++ compiler on a CPU, and '/no/compiler' is not found"
    )
    assert peers["flex-tuned"] == "missing: torch.compile tunes it on CUDA only, found cpu: see flex"
    assert peers["vsa"] == "missing: runs on CUDA, found cpu"
    assert "attention flex, head dim 64: missing: torch.compile needs" in "".join(bench.report.not_measured(rows))


def test_a_peer_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> bench.peers.Call:
        return lambda: cpu.attention(q, k, v, blocks, q.shape[3] ** -0.5)[0]

    monkeypatch.setitem(PEERS["attention"], "vsa", bench.peers.Peer(ours, "torch"))
    (row,) = measured(densities=[0.5], impls=["vsa"])
    assert row["status"] == "ok" and "lse_err" not in row and row["impl_version"].startswith(torch.__version__[:3])


def test_memory_that_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here PyTorch's own fill: what `poisoned_empty` of these tests does not reach."""

    def lazy(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        lse = q.new_zeros(1, q.shape[2], q.shape[1])
        return torch.empty_strided(q.shape, q.stride()), lse

    monkeypatch.setattr(cpu, "attention", lazy)
    (row,) = measured(densities=[0.5])
    assert row["status"].startswith("wrong: rel_err nan")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_hang_of_attention_gives_up_what_attends_by_it() -> None:
    """A whole call by the kernel that hangs would hang as long; another precision, and another operator, would not."""
    asked = settings(operators=["attention", "selected", "pool"], densities=[0.5, 0.25], impls=["cpu", "reference"])
    points = bench.points.plan(asked)
    hung = next(p for p in points if (p.operator, p.impl) == ("attention", "cpu"))
    for status, given_up in (("hung: silent", True), ("crashed: exit code -9", True), ("wrong: rel_err", False)):
        lost = bench.points.given_up(hung.row | {"status": status})
        rest = {(p.operator, p.impl) for p in bench.points.left(asked, "", (), lost)}
        assert (("selected", "cpu") not in rest) == (("attention", "cpu") not in rest) == given_up
        assert {("selected", "reference"), ("pool", "reference")} <= rest
    selected = next(p for p in points if (p.operator, p.impl) == ("selected", "cpu"))
    lost = bench.points.given_up(selected.row | {"status": "hung: silent"})
    assert ("attention", "cpu") in {(p.operator, p.impl) for p in bench.points.left(asked, "", (), lost)}


def test_what_fails_on_one_shape_is_tried_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attention
    monkeypatch.setitem(SHAPES, "small", Shape((2, 8, 16), 2, 64))
    monkeypatch.setattr(bench.peers, "CPU_SCORES", 3 * 4 * 2 * 256**2)

    def only_small(q: Tensor, *rest: Any) -> Any:
        if q.shape[1] > 256:
            raise RuntimeError("too long")
        return right(q, *rest)

    monkeypatch.setattr(cpu, "attention", only_small)
    rows = rows_of(settings(shapes=["tiny", "small"], densities=[0.5, 0.25], impls=["cpu"]))
    found = [(row["shape"], row["status"]) for row in rows if row["operator"] == "attention"]
    assert found == [("tiny", "failed: RuntimeError: too long"), ("small", "ok"), ("small", "ok")]
    math = [row["status"] for row in rows if row["impl"] == "sdpa-math"]
    assert math[0].startswith("out of memory: holds all scores") and math[1:] == ["ok"]


@pytest.mark.parametrize("good_calls", [0, 1])
def test_a_dense_kernel_that_fails_is_not_the_sparse_kernels_fault(
    monkeypatch: pytest.MonkeyPatch, good_calls: int
) -> None:
    """Whether it fails before the sparse kernel is timed or after it, the next best takes its place."""
    asked = settings(densities=[0.5, 0.25], impls=["cpu"])
    begun, timed = list[str](), bench.worker.timed

    def counting(call: Any, *rest: Any) -> Any:
        if getattr(call, "keywords", {}).get("impl") == "cpu" and call.func.__name__ == "dense":
            begun.append("cpu")
            if len(begun) > good_calls:
                raise RuntimeError("no longer")
        return timed(call, *rest)

    monkeypatch.setattr(bench.worker, "timed", counting)
    done = {bench.points.key(point.row) for point in bench.points.plan(asked) if point.operator == "dense"}
    known = [("tiny", "gaussian", "cpu", 0.001), ("tiny", "gaussian", "sdpa-math", 1.0)]
    rows = list(made(asked, dense=known).rows(done))
    assert [(row["status"], row["dense"]) for row in rows] == [("ok", "sdpa-math")] * 2
    assert len(begun) == good_calls + 1


def test_a_capture_that_fails_is_said_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*call: Any) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(bench.worker, "graphed", fail)
    todo = bench.worker.Work(lambda: None, lambda found: {}, {})
    ours = bench.points.Point("selected", "portable", "tiny", "gaussian", "bf16", 0, density=0.3)
    for graphs, checks, expected in ((True, "0", "not captured: operation"), (False, "0", "not tried: another")) + (
        (True, "1", "not tried: DIFFUSERS_ACCEL_CHECKS"),
    ):
        monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", checks)
        new = made(settings(), graphs=graphs)
        assert new._graph(ours, todo) == {}  # a CPU has none
        new.device = torch.device("cuda")
        assert new._graph(ours, todo)["graph"].startswith(expected)
        assert new.spoilt == expected.startswith("not captured")


def test_flex_reads_the_same_blocks() -> None:
    blocks = pattern("unequal", TINY, 0.3, seed=0)
    mask = bench.peers.flex_mask(blocks)
    assert mask.shape == (1, 5, 1000, 1000)
    assert torch.equal(mask.to_dense().bool(), blocks.mask())


def test_unknown_names_are_refused() -> None:
    for asked, message in (
        ({"patterns": ["spiral"]}, "patterns must be among .*window.*found 'spiral'"),
        ({"densities": [0.0]}, r"densities must lie in 0\.\.1"),
        ({"precisions": ["int4"]}, "precisions must be among input, int8, int8_fp8, found 'int4'"),
        ({"impls": ["magic"]}, "impls must be among .*portable.*flex.*found 'magic'"),
        ({"operators": ["sort"]}, "operators must be among sweep, attention.*found 'sort'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**asked)
    with pytest.raises(ValueError, match="runs on cuda and cpu, found meta"):
        bench.points.settings("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: PyTorch sees no GPU here"):
            bench.run("cuda")
    with pytest.raises(ValueError, match="minutes must be 0 or more"):
        bench.run("cpu", minutes=-1)


@pytest.mark.gpu
def test_everything_of_ours_runs_and_is_right_on_a_gpu() -> None:
    ours_alone = ["portable", "hopper"]  # peers compile for minutes
    asked = bench.points.settings(
        "cuda", shapes=["S1", "S4"], densities=[0.3], patterns=["text"], impls=ours_alone, rep_ms=5
    )
    rows = rows_of(asked)
    ours = [row for row in rows if row["impl"] not in {name for peers in PEERS.values() for name in peers}]
    ours = [row for row in ours if row["operator"] != "sweep"]  # of which some fit no shared memory
    bad = [row for row in ours if row["status"].partition(":")[0] in ("wrong", "failed", "out of memory")]
    assert not [(row["operator"], row["impl"], row["status"]) for row in bad]
    timed = {row["operator"] for row in rows if "t_med_ms" in row}
    assert timed == set(bench.points.OPERATORS)
    best = bench.tiles.table(rows)["tables"]["portable, head dim 64, input, bf16"]["best"]
    assert best in bench.points.TILES["portable"]
    assert all("t_graph_ms" in row for row in rows if row["operator"] == "selected" and "t_med_ms" in row)


# The order of the points


def swept_and_rest(asked: bench.points.Settings) -> tuple[list[bench.points.Point], list[bench.points.Point]]:
    """The plan, cut behind the points of its sweep."""
    found = bench.points.plan(asked)
    cut = next(i for i, point in enumerate(found) if point.operator != "sweep")
    assert all(point.operator != "sweep" for point in found[cut:])
    return found[:cut], found[cut:]


def test_the_most_telling_points_come_first() -> None:
    swept, points = swept_and_rest(bench.points.settings("cuda"))
    assert {(p.shape, p.impl) for p in swept} == {(s, i) for s in ("W13", "C2") for i in ("portable", "hopper")}
    assert all(len({p.tile for p in swept if (p.shape, p.impl) == ("W13", i)}) > 5 for i in ("portable", "hopper"))
    keys = [bench.points.key(point.row) for point in points]
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
        ours = [(p.density, p.impl) for p in here if p.operator == "attention"]
        assert ours == [
            (density, impl) for density in (0.1, 0.3, 1.0) for impl in ("portable", "hopper", "gluon", "fa4")
        ]
        assert {"fa3", "fa4", "cudnn", "flash"} <= {p.impl for p in here if p.operator == "dense"}
        assert [p.operator for p in here] == sorted((p.operator for p in here), reverse=True)  # dense before attention
    places = {name: next(i for i, p in enumerate(points) if p.impl == name) for name in ("flex", "vsa")}
    assert max(places.values()) < len(points) // 3
    assert points[-1].inputs == "video" and {point.pattern for point in points} == {None, "random"}
    tuned = next(i for i, p in enumerate(points) if p.impl == "flex-tuned")
    assert tuned > max(i for i, p in enumerate(points) if p.operator == "block_stats")  # it compiles for minutes
    every = swept_and_rest(bench.points.settings("cuda", every=True))[1]
    assert every[: len(points)] == points and every[-1].inputs == "video" and every[-1].pattern != "random"
    named = bench.points.plan(
        bench.points.settings("cuda", densities=[0.1, 0.2], impls=["flex"], operators=["attention"])
    )
    assert {p.density for p in named if p.impl == "flex" and p.pattern == "text"} == {0.1, 0.2}


def test_the_small_models_former_name_is_understood() -> None:
    with pytest.warns(FutureWarning, match="shapes: 'shapes' is now called 'toy'"):
        asked = bench.points.settings("cpu", shapes=["S8", "shapes"])
    assert asked.shapes == ("S8", "toy")


def test_a_run_goes_on_with_rows_that_have_the_small_models_former_name(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    present = row(**bench.points.Point("attention", "cpu", "toy", "gaussian", "fp32", 0, "input", "random", 0.1).row)
    out.write_bytes(encode_line(present | {"shape": "shapes"}))
    assert bench.rows.read(out) == [present]


def test_settings_survive_json() -> None:
    asked = bench.points.settings("cuda:1", shapes=["W13"], threads=2)
    assert not asked.every and asked.shapes == ("W13",) and asked.seed == 0
    assert bench.points.settings(**json.loads(json.dumps(dataclasses.asdict(asked)))) == asked
    with pytest.raises(TypeError, match="shape"):
        settings(shape=["W13"])


def test_dense_attention_is_always_there_to_compare_with() -> None:
    points = bench.points.plan(settings(operators=["attention"], inputs=["gaussian", "video"], impls=["portable"]))
    for kind in ("gaussian", "video"):
        of_kind = [point for point in points if point.inputs == kind]
        assert of_kind[0].operator == "dense" and {p.impl for p in of_kind if p.operator == "attention"} == {"portable"}
    asked = bench.points.plan(settings(operators=["attention"], impls=["reference"]))
    assert {p.impl for p in asked if p.operator == "attention"} == {"reference"}  # only when asked for
    assert bench.points.plan(settings(operators=["pool"]))[0].operator == "pool"


def changed(line: str, **fields: Any) -> str:
    """A line of a file of rows with other values and their checksum."""
    row = {**json.loads(line), **fields}
    row.pop("sha256")
    return encode_line(row).decode()


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
say(hello={"machine": {"gpu": "A"}, "versions": {"torch": "1"}, "code": "c", "git_sha": None, "rep_ms": 300.0,
           "peers": PEERS})
for impl in ("first", "bad", "last"):
    row = {"operator": "dense", "impl": impl, "precision": "input", "dtype": "bf16", "shape": "tiny", "H": 5, "N": 1000,
           "D": 64, "input_kind": "gaussian", "seed": 0, "pattern": None, "density_requested": None}
    if "|".join(str(row.get(k)) for k in KEY) in job["done"] or any(impl in family for family in job["avoid"]):
        continue
    say(begin=row)
    if impl == "bad" and WAY == "hang":
        child = subprocess.Popen(["sleep", "600"])
        open(FOLDER + "/pid", "w").write(str(child.pid))
        time.sleep(600)
    if impl == "bad" and WAY == "die":
        sys.exit("Traceback\\ntorch.AcceleratorError: illegal memory access\\nFor debugging consider")
    if impl == "bad" and WAY == "missing":
        say(row=row | {"status": "missing: not here"})
        continue
    graph = {"graph": "not captured: x"} if impl == "first" and WAY == "spoilt" else {}
    times = {"t_med_ms": 1.0, "t_p20_ms": 1.0, "t_p80_ms": 1.0}
    say(row=row | times | {"status": "ok", "n_rep": len(job["dense"]), "graphs": job["graphs"]} | graph)
    if graph:
        say(end=False)
        time.sleep(600)
say(end=True)
"""


def watched(
    folder: Path,
    way: str,
    timeout: float = 30.0,
    minutes: float = 1.0,
    peers: dict[str, str] | None = None,
    **options: Any,
) -> list[Row]:
    """A run whose worker behaves in some way: well, hang, die, silent, broken, missing, spoilt."""
    script = folder / f"{way}.py"
    names = f"WAY, FOLDER, KEY, PEERS = {way!r}, {str(folder)!r}, {bench.points.KEY!r}, {peers or {}!r}"
    script.write_text(f"{names}\n{WORKER}")
    with mock.patch.object(bench.watch, "COMMAND", (sys.executable, "-I", str(script))):
        return bench.run("cpu", timeout=timeout, minutes=minutes, **options)


def test_a_kernel_that_hangs_is_killed_with_its_children_and_the_run_goes_on(tmp_path: Path) -> None:
    first, bad, last = watched(tmp_path, "hang", timeout=3.0)
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
    first, bad, last = watched(tmp_path, "die")
    assert (first["status"], last["status"]) == ("ok", "ok")
    assert bad["status"] == "crashed: exit code 1: torch.AcceleratorError: illegal memory access"


def test_a_worker_that_the_driver_holds_ends_the_run_behind_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = bench.watch.Worker.kill
    monkeypatch.setattr(bench.watch.Worker, "kill", lambda self: kill(self) or "is still there")
    out = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="is still there"):
        watched(tmp_path, "hang", timeout=2.0, out=out)
    assert [row["status"] for row in bench.rows.read(out)] == ["ok", "hung: silent for 2 s, killed"]


def test_who_hung_in_an_earlier_run_is_tried_again_only_without_its_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    watched(tmp_path, "hang", timeout=2.0, out=out)
    first, bad, last = out.read_text().splitlines(keepends=True)
    out.write_text(first + changed(bad, shape="other") + last)  # another point of that family
    assert [row["impl"] for row in watched(tmp_path, "well", out=out)] == ["first", "bad", "last"]
    assert len(out.read_text().splitlines()) == 3
    out.write_text(first + last)
    assert watched(tmp_path, "well", out=out)[-1]["status"] == "ok"
    assert '"bad"' in out.read_text()


def test_a_peer_that_may_spoil_its_process_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After everybody else, and only where its package is there and something of it is left to do."""
    jobs, begin = list[tuple[str, bool]](), bench.watch.Worker

    def recording(job: Row, command: Any) -> Any:
        jobs.append((job["process"], any("|vsa|" in key for key in job["done"])))
        return begin(job, command)

    monkeypatch.setattr(bench.watch, "Worker", recording)
    asked = {"shapes": ["tiny"], "operators": ["attention"], "impls": ["cpu", "vsa"], "densities": [0.5]}
    watched(tmp_path, "well", **asked)
    assert jobs == [("", False)]
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", sys)  # something that is found
    jobs.clear()
    watched(tmp_path, "well", **asked)
    assert jobs == [("", False), ("vsa", False)]
    given = settings(**asked)
    assert {p.impl for p in bench.points.left(given, "vsa", (), ())} == {"vsa"}
    assert "vsa" not in {p.impl for p in bench.points.left(given, "", (), ())}
    assert {row["impl"] for row in made(given, process="vsa").rows()} == {"vsa"}


def test_a_failed_capture_starts_a_new_worker_without_captures(tmp_path: Path) -> None:
    first, bad, last = watched(tmp_path, "spoilt")
    assert (first["status"], first["graphs"]) == ("ok", True)
    assert [(row["impl"], row["status"], row["graphs"]) for row in (bad, last)] == [
        ("bad", "ok", False),
        ("last", "ok", False),
    ]


def test_what_was_missing_is_tried_again_and_written_once(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert [row["impl"] for row in watched(tmp_path, "missing", out=out)] == ["first", "bad", "last"]
        assert len(out.read_text().splitlines()) == 3
    assert [row["status"] for row in watched(tmp_path, "well", peers={"new": "1"}, out=out)] == ["ok"] * 3
    with pytest.raises(ValueError, match="measured with peers new 1, this run has 2; such rows do not compare"):
        watched(tmp_path, "well", peers={"new": "2"}, out=out)


def test_peers_that_compile_have_longer() -> None:
    row = bench.points.Point("attention", "flex", "tiny", "gaussian", "bf16", 0).row
    assert bench.watch._compilation(row) == PEERS["attention"]["flex"].seconds > bench.TIMEOUT["cuda"] == 20
    assert bench.watch._compilation(row | {"impl": "portable"}) == bench.watch._compilation(None) == 0


def test_a_worker_that_cannot_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="before it could use the device.*It crashed: exit code 1: no such device"):
        watched(tmp_path, "broken")
    monkeypatch.setattr(bench.watch, "START_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="before it could use the device.*It hung: silent for 0.5 s"):
        watched(tmp_path, "silent")


def test_a_run_stops_when_its_time_is_over(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    begin = time.monotonic()
    rows = watched(tmp_path, "hang", timeout=500.0, minutes=0.1, out=out)
    assert time.monotonic() - begin < 30
    assert [row["impl"] for row in rows] == ["first"]  # the one that was cut off may be tried again
    rows = watched(tmp_path, "well", out=out)
    assert [row["impl"] for row in rows] == ["first", "bad", "last"]


def test_a_second_run_goes_on_behind_the_first(tmp_path: Path) -> None:
    out, seen = tmp_path / "rows.jsonl", list[Row]()
    watched(tmp_path, "well", out=out)
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["impl"] for line in lines] == ["first", "bad", "last"]
    out.write_text("".join(lines[:2]) + lines[2][:40])  # as a power cut leaves it
    rows = watched(tmp_path, "well", out=out, on_row=seen.append)
    assert [row["impl"] for row in seen] == ["last"] and len(rows) == 3
    assert [json.loads(line)["impl"] for line in out.read_text().splitlines()] == ["first", "bad", "last"]


def test_a_whole_last_row_counts_and_only_a_new_one_changes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    last = encode_line(row(impl="last")).decode().rstrip()
    for tail, kept in ((last, ["portable", "last"]), ('{"impl": "la', ["portable"]), (f"{last[:-2]}0}}", ["portable"])):
        text = encode_line(row()).decode() + tail
        out.write_text(text)
        assert [row["impl"] for row in bench.run("cpu", minutes=0, out=out)] == kept
        with bench.rows.appending(out) as append:
            assert out.read_text() == text
            append(row(impl="new"))
        assert [row["impl"] for row in bench.rows.read(out)] == [*kept, "new"] and out.read_text().endswith("\n")


def test_a_rented_gpu_may_have_another_host_and_driver(tmp_path: Path) -> None:
    """They are recorded, and do not keep a second lease from going on with the rows of the first."""
    out = tmp_path / "rows.jsonl"
    watched(tmp_path, "well", out=out)
    first, bad, last = out.read_text().splitlines(keepends=True)
    other = {"gpu": "A", "cpu": "another", "driver": "580.1", "cpu_capability": "AVX2"}
    out.write_text("".join(changed(line, machine=other) for line in (first, last)))
    assert [row["impl"] for row in watched(tmp_path, "well", out=out)] == ["first", "last", "bad"]
    assert bench.rows.read(out)[0]["machine"]["driver"] == "580.1"
    # On a CPU its instructions decide the times.
    here, there = ({"device": "cpu", "cpu": name, "cpu_capability": name} for name in ("AVX2", "AVX512"))
    with pytest.raises(ValueError, match="machine cpu_capability AVX2, this run has AVX512"):
        bench.rows.check_same(out, [environment() | {"machine": here}], environment() | {"machine": there})


def test_rows_say_which_instructions_a_cpu_has() -> None:
    found = bench.worker.environment(settings())["machine"]
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability() and found["cpu"] and "driver" in found


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with bench.rows.appending(out), pytest.raises(ValueError, match="another run measures into it; wait"):
        watched(tmp_path, "well", out=out)
    assert len(watched(tmp_path, "well", out=out)) == 3


def test_rows_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    watched(tmp_path, "well", out=out)
    text = out.read_text().splitlines(keepends=True)
    for other, message in (
        ({"machine": {"gpu": "B"}}, "machine gpu B, this run has A"),
        ({"code": "B"}, "code B, this run has c"),
    ):
        out.write_text(changed(text[0], **other))
        before = out.read_text()
        with pytest.raises(ValueError, match=f"{message}.*give another --out"):
            watched(tmp_path, "well", out=out)
        assert out.read_text() == before
    out.write_bytes(encode_line({"shape": "W13"}))
    with pytest.raises(ValueError, match="line 1: expected a row of this version's benchmark: expected the key"):
        watched(tmp_path, "well", out=out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": None}, "status: expected str, found null"),
        ({"seed": "0"}, "seed: expected int, found str"),
        ({"t_med_ms": "2"}, "t_med_ms: expected float, found str"),
        ({"machine": []}, "machine: expected object, found array"),
        ({"dense": "fa9"}, "expected the time of 'fa9' in t_dense_ms, found none"),
        ({"t_dense_ms": {"cudnn": True}}, r"t_dense_ms\[...\]: expected float, found bool"),
        ({"density_computed": None}, "density_computed beside eta"),
    ],
)
def test_rows_of_other_types_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_bytes(encode_line(row()) + encode_line(row(**fields)))
    with pytest.raises(
        ValueError, match=f"line 2: expected a row of this version's benchmark: .*{message}.*another --out"
    ):
        bench.run("cpu", minutes=0, out=out)


def test_what_is_no_line_of_json_is_refused(tmp_path: Path) -> None:
    out, good = tmp_path / "rows.jsonl", encode_line(row())
    for line, message in (
        (json.dumps(row()).encode() + b"\n", "it has no sha256: it was written by an earlier version"),
        (b'{"a": 1, "a": 2}\n', "'a' twice"),
        (b'{"a": NaN}\n', "expected a finite number"),
        (b"[" * 100_000 + b"\n", "cannot be read"),
        (b"[]\n", "it is no object"),
        (b"\x80\x04K\x01.\n", "pickle"),
        (b"x" * 5_000_000 + b"\n", "expected JSON"),
    ):
        out.write_bytes(good + line + good)
        with pytest.raises(ValueError, match=f"line 2: .*{message}") as caught:
            bench.rows.read(out)
        assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="found a folder"):
        bench.rows.read(tmp_path)


def test_a_flipped_bit_in_a_row_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = [row(), row(impl="flex"), row(impl="last")]
    whole = b"".join(encode_line(each) for each in rows)
    for place in range(0, len(whole), 3):
        out.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = bench.rows.read(out)
        except ValueError as error:
            assert str(error).startswith(f"{out}, line ") and len(str(error)) < 500
        else:
            assert found in (rows, rows[:2] if place == len(whole) - 1 else rows)


def test_a_full_disk_keeps_the_rows_before_it_and_names_the_file(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from diffusers_accel.files import append_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "for number in range(9): append_line(Path(sys.argv[1]), {'number': number})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True)
    assert f"WriteError: {out}: cannot be written: File too large; the rows before are kept" in done.stderr
    assert [each["number"] for each in bench.rows.read_lines(out, "a row", "")] == [0, 1, 2]
    assert out.read_bytes().endswith(b"}\n")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        with pytest.raises((WriteError, ValueError), match="cannot be written"):
            watched(tmp_path, "well", out=out)


def test_the_rows_of_the_repository_are_readable() -> None:
    found = list((Path(__file__).parents[2] / "docs" / "results").rglob("rows.jsonl"))
    assert found and all(bench.run("cpu", minutes=0, out=path) for path in found)


def test_a_worker_ends_with_its_parent() -> None:
    """Also in the middle of a kernel, of which only another thread can know."""
    program = (
        "import threading, time; from diffusers_accel.evals.worker_process import end_with_parent\n"
        "threading.Thread(target=end_with_parent, daemon=True).start(); print('begun', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout and child.stdout.readline() == b"begun\n"
    child.stdin.close()
    assert child.wait(60) == 1
    child.stdout.close()


def test_the_command_measures_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real worker, in a process of its own, from the command line."""
    out, report = tmp_path / "rows" / "rows.jsonl", tmp_path / "report"
    asked = f"--device cpu --shapes S1 --dtype fp32 --patterns text --rep-ms 0 --out {out}".split()
    asked += ["--operators", "attention", "--timeout", "300", "--minutes", "20"]
    bench.main([*asked, "--densities", "0.5"])
    first = out.read_text()
    bench.main([*asked, "--densities", "0.5,0.25"])
    assert out.read_text().startswith(first)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    own = [row for row in rows if row["operator"] == "attention" and row["impl"] == "cpu"]
    assert [row["density_requested"] for row in own] == [0.5, 0.25] and all("t_med_ms" in row for row in own)
    assert {"run_id", "git_sha", "time_utc", "machine", "versions", "code", "rep_ms"} <= own[0].keys()
    capsys.readouterr()
    before = out.read_text()
    bench.main(["--device", "cpu", "--minutes", "0", "--out", str(out), "--report", str(report)])
    assert out.read_text() == before
    shown = capsys.readouterr()
    assert "S1" in shown.out and "Sparse attention" in shown.out and "missing: torch.compile needs a C++" in shown.out
    page = (report / "kernels.md").read_text()
    assert "| S1    | text    |" in page and "## Not measured" in page and own[0]["code"] in page
    assert (report / "kernels.png").exists() == ("kernels.png" in page)


def test_a_run_that_fails_shows_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bench.rows.appending(tmp_path / "rows.jsonl") as append:
        append(row())

    def fail(**options: Any) -> list[Row]:
        raise RuntimeError("the driver holds it")

    monkeypatch.setattr(bench, "run", fail)
    with pytest.raises(RuntimeError, match="driver"):
        bench.main(["--out", str(tmp_path / "rows.jsonl"), "--report", str(tmp_path)])
    assert "W13" in capsys.readouterr().out and "W13" in (tmp_path / "kernels.md").read_text()


def test_a_dense_time_of_an_earlier_run_needs_its_kernel_to_be_there() -> None:
    done = {bench.points.key(point.row) for point in bench.points.plan(settings()) if point.operator == "dense"}
    known = [("tiny", "gaussian", "fa4", 0.001), ("tiny", "gaussian", "cpu", 1.0)]
    (sparse,) = made(settings(densities=[0.5], impls=["cpu"]), dense=known).rows(done)
    assert sparse["status"] == "ok" and sparse["dense"] == "cpu" and sparse["t_dense_ms"].keys() == {"cpu"}


# What the rows look like


def environment() -> Row:
    same = {"machine": {"gpu": "A"}, "versions": {"torch": "1"}, "code": "c", "rep_ms": 300.0}
    return same | {"git_sha": None, "peers": {}}


def row(**fields: Any) -> Row:
    usual = bench.points.Point("attention", "portable", "W13", "gaussian", "bf16", 0, "input", "random", 0.1).row
    times = {"t_med_ms": 2.0, "t_p20_ms": 1.9, "t_p80_ms": 2.1, "t_kernel_ms": 2.0, "status": "ok"}
    dense = {"t_dense_ms": {"cudnn": 16.0}, "dense": "cudnn", "eta": 0.8, "speedup_total": 8.0, "density_computed": 0.1}
    return environment() | usual | times | dense | fields


def test_the_page_names_the_reference_of_every_ratio() -> None:
    rows = [row(tflops_computed=512.3), row(density_requested=0.3, eta=0.9, status="drift: 9 %")]
    rows += [row(operator="selected", pattern=None, t_prep_ms=0.1, t_select_ms=0.05, overhead_share=0.075)]
    rows += [row(operator="dense", impl="sdpa-efficient"), row(operator="block_stats", precision="int8_fp8")]
    page = bench.report.markdown([*rows, row(impl="flex", status="missing: none")])
    assert "| W13   | random  | 0.100   | portable | 2  | 1.9-2.1 | 16    | cudnn | 8.00  | 0.80 |" in page
    assert "portable int8_fp8" in page and "7.5" in page
    assert "flex |" not in page and "- attention flex, head dim 128: missing: none" in page
    for title in ("Sparse attention", "Prep, selection and attention", "Dense attention", "Operators beside attention"):
        lines = page.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
        assert len(lines) >= 3 and len({len(line) for line in lines}) == 1 and set(lines[1]) == set("| -")
    assert bench.report.markdown([]).endswith("Nothing has been measured.\n")


def test_the_last_row_of_a_point_counts() -> None:
    assert bench.rows.latest([row(eta=0.1), row(impl="flex"), row(eta=0.7)])[0]["eta"] == 0.7


def test_the_plot_needs_something_to_draw() -> None:
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
    assert bench.report.plot([row(operator="dense")]) is None
    picture = bench.report.plot([row(), row(density_computed=0.3), row(shape="C2")])
    assert picture is not None and picture.startswith(b"\x89PNG")


def test_what_was_measured_is_shown_also_where_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, on_row: Any, out: Path, **__: Any) -> list[Row]:
        with bench.rows.appending(out) as append:
            append(row())
        on_row(row())
        raise bench.WriteError(out, "No space left on device", "free space")

    monkeypatch.setattr(bench, "run", failing)
    with pytest.raises(bench.WriteError, match="No space left"):
        bench.main(["--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    assert "| W13 " in capsys.readouterr().out


# The inputs


def test_the_shapes_are_those_of_the_models() -> None:
    assert {name: (s.tokens, s.dim) for name, s in SHAPES.items() if name != "tiny"} == {
        "W13": (32_760, 128), "W14": (75_600, 128), "HY": (119_056, 128), "C2": (17_776, 64), "C15": (45_106, 64),
        "toy": (4_352, 64), "S8": (8_192, 64), "S4": (4_096, 128), "S1": (1_000, 64),
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
