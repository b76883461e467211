"""The first minutes on a GPU, with stages that are small programs, and once on a CPU with the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals import first_hour
from diffusers_accel.evals.first_hour import running, summary
from diffusers_accel.evals.first_hour import stages as stages_module
from diffusers_accel.evals.first_hour.stages import ROWS, STEPS, HourStage, find_tool, planned
from diffusers_accel.evals.kernel_bench import rows as bench_rows
from diffusers_accel.files import append_line, read_json, write_json
from diffusers_accel.support.interrupted import Interrupted
from tests.kernels.test_bench import row as bench_row


def program(name: str, code: str, share: float = 1.0, **options: Any) -> HourStage:
    """A stage that runs these lines of Python."""
    return HourStage(name, share, lambda seconds: [sys.executable, "-c", f"SECONDS = {seconds}\n{code}"], **options)


@pytest.fixture(autouse=True)
def begun_with_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_hour, "LEAST", 0.1)
    monkeypatch.setattr(running, "GRACE_SECONDS", 1.0)


def run(folder: Path, *todo: HourStage, minutes: float = 1.0) -> dict[str, summary.Record]:
    return {record.name: record for record in first_hour.run(todo, "cpu", folder, minutes)}


def gone(number: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    for _ in range(100):
        status = Path(f"/proc/{number}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


SLEEPS = "import subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\nopen('pid', 'w').write(str(child.pid))\n"
DEAF = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEPS}time.sleep(600)"


def test_a_stage_that_hangs_costs_its_share_and_no_more(tmp_path: Path) -> None:
    begin = time.monotonic()
    todo = (program("hangs", DEAF), program("after", "print('here')", 2.0))
    found = run(tmp_path, *todo, minutes=0.2)
    took = time.monotonic() - begin
    assert 4 < took < 12 and found["hangs"].status == "out of time" and 3 < found["hangs"].seconds < 6
    assert found["after"].status == "done" and found["after"].wrote == ["log-after.txt"]
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_a_stage_leaves_over_goes_to_the_next_and_no_minute_more_is_spent(tmp_path: Path) -> None:
    todo = [
        program("short", "pass"),
        program("long", "print(SECONDS)"),
        program("hangs", DEAF),
        program("late", "pass"),
    ]
    begin = time.monotonic()
    found = run(tmp_path, *todo[:3], minutes=0.3)
    assert time.monotonic() - begin < 18 + 2 and found["hangs"].status == "out of time"
    assert (
        6 < float((tmp_path / "log-long.txt").read_text().split()[-1]) < 9
    )  # half of what is left, not a third of all
    found = run(tmp_path, *todo, minutes=0.0001)
    assert found["late"].status == "not begun" and found["late"].why == "0 s were left for it"


def test_a_stage_that_is_interrupted_says_what_it_had(tmp_path: Path) -> None:
    code = (
        "import time\ntry:\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    print('= 3 passed, 1 failed in 2.00s =', flush=True)"
    )
    found = run(tmp_path, program("tests", code), minutes=0.1)["tests"]
    assert found.status == "out of time" and found.why.endswith("; 3 passed, 1 failed in 2.00s")


def test_no_failure_stops_the_others(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        program("finds", "print('2 failed, 3 passed in 1s'); raise SystemExit(1)", findings={1: "tests failed"}),
        program("fails", "raise RuntimeError('no | such\\nGPU')"),
        program("dies", "import os; os.kill(os.getpid(), 9)"),
        HourStage("absent", 1.0, lambda seconds: [], missing=lambda: "no such tool"),
        program("partly", "pass", left=lambda: "3 points are left"),
        program("works", "open('out.txt', 'w').write('x')", writes=("out.txt", "other.txt")),
    )
    assert {name: record.status for name, record in found.items()} == {
        "finds": "findings", "fails": "failed", "dies": "failed", "absent": "skipped", "partly": "unfinished",
        "works": "done",
    }  # fmt: skip
    assert found["finds"].why == "tests failed: 2 failed, 3 passed in 1s" and found["absent"].why == "no such tool"
    assert found["fails"].why == "exit code 1: RuntimeError: no | such" and found["dies"].why.startswith(
        "exit code 137"
    )
    assert found["works"].wrote == ["out.txt", "log-works.txt"] and found["partly"].why == "3 points are left"
    page = (tmp_path / "summary.md").read_text()
    assert "| works | done |" in page and "no \\| such" in page and "Nothing has been measured yet." in page
    data = read_json(tmp_path / "summary.json")
    assert [stage["name"] for stage in data["stages"]] == list(found) and data["stages"][3]["why"] == "no such tool"


def test_a_second_run_goes_on_with_what_is_unfinished(tmp_path: Path) -> None:
    counts = "from pathlib import Path; Path(NAME).open('a').write('x')"
    ready: list[str] = []

    def todo() -> list[HourStage]:
        return [
            program("done", counts.replace("NAME", "'a'")),
            program("finds", counts.replace("NAME", "'b'") + "; raise SystemExit(1)", findings={1: "found"}),
            program("fails", counts.replace("NAME", "'c'") + "; raise SystemExit(2)"),
            HourStage("tool", 1.0, program("", "pass").command, missing=lambda: None if ready else "not here"),
            program("partly", "pass", left=lambda: "" if ready else "3 are left"),
        ]

    first = run(tmp_path, *todo())
    assert [record.status for record in first.values()] == ["done", "findings", "failed", "skipped", "unfinished"]
    ready.append("now")
    again = run(tmp_path, *todo())
    assert [record.status for record in again.values()] == ["done", "findings", "failed", "done", "done"]
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "x", "xx"]
    # Another choice of stages forgets none.
    assert list(run(tmp_path, program("new", "pass"))) == ["new"]
    assert {stage["name"] for stage in read_json(tmp_path / "summary.json")["stages"]} == {*first, "new"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, program("a", "pass"))
    with pytest.raises(ValueError, match="expected stages on a device cuda, found cpu; name another --out"):
        first_hour.run([program("a", "pass")], "cuda", tmp_path, 1.0)
    monkeypatch.setattr(summary, "code", lambda: "other")
    with pytest.raises(ValueError, match="expected stages on kernels other, found .*; name another --out"):
        run(tmp_path, program("a", "pass"))
    write_json(tmp_path / "summary.json", {"device": "cpu"})
    with pytest.raises(ValueError, match="expected a summary of this command"):
        run(tmp_path, program("a", "pass"))
    assert read_json(tmp_path / "summary.json") == {"device": "cpu"}


SCRIPT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in its background ignore it
from diffusers_accel.evals import first_hour
from diffusers_accel.evals.first_hour.stages import HourStage
CODE = sys.argv[2]
todo = [HourStage("first", 1.0, lambda seconds: [sys.executable, "-c", "pass"]),
        HourStage("hangs", 1.0, lambda seconds: [sys.executable, "-c", CODE])]
try:
    first_hour.run(todo, "cpu", Path(sys.argv[1]), 9.0)
except KeyboardInterrupt as error:
    sys.exit(str(error))
"""


def begun(folder: Path) -> subprocess.Popen[str]:
    """A run in a process of its own, whose second stage has begun and hangs."""
    command = [sys.executable, "-c", SCRIPT, str(folder), DEAF]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(900):
        if (folder / "pid").exists() and (folder / "pid").read_text():
            return process
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the stage has not begun: {process.communicate()[1]}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "running"), (signal.SIGINT, "interrupted")])
def test_a_killed_run_leaves_whole_files_and_no_process(tmp_path: Path, number: int, status: str) -> None:
    process = begun(tmp_path)
    os.kill(process.pid, number)
    assert process.stderr is not None
    words = process.stderr.read()
    process.wait(60)
    assert gone(int((tmp_path / "pid").read_text()))
    assert ("what the stages have written is kept in" in words) == (status == "interrupted")
    data = read_json(tmp_path / "summary.json")
    assert [(stage["name"], stage["status"]) for stage in data["stages"]] == [("first", "done"), ("hangs", status)]
    found = run(tmp_path, program("first", "raise SystemExit(1)"), program("hangs", "pass"))
    assert [record.status for record in found.values()] == ["done", "done"]


def test_ctrl_c_is_told_in_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(first_hour, "run_command", interrupt)
    with pytest.raises(Interrupted, match="is kept in"):
        run(tmp_path, program("a", "pass"))
    assert read_json(tmp_path / "summary.json")["stages"][0]["status"] == "interrupted"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    process = begun(tmp_path)
    try:
        with pytest.raises(ValueError, match="another run writes into this folder"):
            run(tmp_path, program("a", "pass"))
    finally:
        process.kill()
        process.communicate()


def test_the_summary_shows_the_steps_then_the_kernels_then_the_stages(tmp_path: Path) -> None:
    with bench_rows.appending(tmp_path / ROWS) as append:
        append(bench_row(eta=0.875))
        swept = {"operator": "sweep", "tile": "128x64x8x2", "eta": None, "shape": "C2"}
        append({name: value for name, value in bench_row(**swept).items() if value is not None})
    place = {"model": "wan", "latents": [1, 2, 3], "dtype": "bf16", "layers_measured": 1, "steps": 6, "status": "ok"}
    place |= {"machine": {"gpu": "H200"}, "versions": {"torch": "2"}, "ms_step": 10.0}
    for method, more in (("stock", {}), ("draft", {"speedup": 1.5}), ("pattern", {"speedup": 2.0, "density": 0.5})):
        append_line(tmp_path / STEPS, {**place, "method": method, **more})
    run(tmp_path, program("a", "pass"))
    page = (tmp_path / "summary.md").read_text()
    places = [
        page.index(x) for x in ("| pattern | 2.00x", "| draft | 1.50x", "| 0.88 |", "128x64x8x2 2 ms", "| a | done |")
    ]
    assert places == sorted(places)
    data = read_json(tmp_path / "summary.json")
    assert len(data["steps"]) == 3 and [row["eta"] for row in data["kernels"]] == [0.875] and data["tiles"]["tables"]
    (tmp_path / ROWS).write_text("{}\n")
    run(tmp_path, program("b", "pass"))
    page = (tmp_path / "summary.md").read_text()
    assert "**" in page and "expected a row" in page and "| b | done |" in page and "2.00x" in page


def test_what_a_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {stage.name: stage for stage in planned("cuda", tmp_path)}
    sanitizers = ["sanitizer-portable", "sanitizer-hopper", "sanitizer-gluon"]
    order = ["tests", *sanitizers, "sweep", "kernels", "steps", "ncu"]
    assert list(found) == order and sum(stage.share for stage in found.values()) == 100
    for name in ("compute-sanitizer", "ncu"):
        monkeypatch.setattr(stages_module, "TOOL_FOLDERS", ())
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CUDA_HOME", raising=False)
        stage = found["ncu" if name == "ncu" else "sanitizer-hopper"]
        assert stage.missing() == f"{name} is not found: it comes with the CUDA toolkit; put it on the PATH"
        tool = tmp_path / "2026.1" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        monkeypatch.setattr(stages_module, "TOOL_FOLDERS", (str(tmp_path),))
        assert find_tool(name) == tool and stage.missing() is None
        command = stage.command(30.0)
        assert command[0] == str(tool) and "diffusers_accel.evals.kernel_bench.once" in command
    sweep, kernels = (found[name].command(120.0) for name in ("sweep", "kernels"))
    assert sweep[sweep.index("--operators") + 1] == "sweep" and sweep[sweep.index("--minutes") + 1] == "1.800"
    assert "sweep" not in kernels[kernels.index("--operators") + 1].split(",")
    assert found["sanitizer-portable"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in sanitizers:  # `portable` has other operators, too
        command = found[name].command(30.0)
        assert command[command.index("--impls") + 1] == name.partition("-")[2]
        assert ("--operators" in command) == (name != "sanitizer-portable")
    profiled = found["ncu"].command(30.0)
    impls = profiled[profiled.index("--impls") + 1].split(",")
    assert profiled[profiled.index("--launch-count") + 1] == str(len(impls)) and "gluon" in impls
    assert all(stage.left() != "" for stage in (found["sweep"], found["kernels"], found["steps"]))


def test_what_a_machine_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = planned("cuda", tmp_path)[0]
    assert tests.missing() is None
    monkeypatch.setattr(stages_module, "ROOT", tmp_path)
    assert tests.missing() == "the tests are not installed with the package: run from a checkout, with pip install -e ."
    monkeypatch.setattr(stages_module.importlib.util, "find_spec", lambda name: None)
    assert tests.missing() == "pytest is not installed: pip install pytest" and "-n" not in tests.command(9.0)


def test_tests_that_passed_are_not_run_again_where_there_was_no_time_for_all(tmp_path: Path) -> None:
    (tmp_path / "log-tests.txt").write_text(
        "tests/kernels/test_a.py::test_x[a-gpu] PASSED [ 1%]\n"
        "tests/kernels/test_a.py::test_y[a-gpu] FAILED [ 2%]\n"
        "tests/kernels/test_a.py::test_z PASSED [ 3%]\n"  # which is the beginning of other names
        "[gw1] [ 37%] PASSED tests/kernels/test_b.py::test_x[b-gpu] \n"
        "tests/kernels/test_b.py::test_hangs[b-gpu] \n"
    )
    command = planned("cpu", tmp_path)[0].command(9.0)
    assert [word for word in command if word.startswith("--deselect")] == [
        "--deselect=tests/kernels/test_a.py::test_x[a-gpu]",
        "--deselect=tests/kernels/test_b.py::test_x[b-gpu]",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device must be cuda or cpu, found 'tpu'"),
        (["--dry", "--minutes", "0"], "minutes must be more than 0"),
        (["--dry", "--stages", "sweeps"], "stages must be among tests, .*found 'sweeps'; did you mean .sweep"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_hour.main([*arguments, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_machine_without_a_gpu_is_told_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_hour.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no GPU here; --device cpu is a dry run"):
        first_hour.main(["--out", str(tmp_path / "new")])


def test_a_dry_run_goes_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real commands, on a CPU."""
    monkeypatch.setattr(running, "GRACE_SECONDS", 5.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on which the tests of kernels would run for long
    arguments = ["--dry", "--out", str(tmp_path), "--minutes", "9"]
    assert first_hour.main(arguments) == 0
    data = read_json(tmp_path / "summary.json")
    assert {stage["name"]: stage["status"] for stage in data["stages"]} == {
        "tests": "done", "sanitizer-portable": "skipped", "sanitizer-hopper": "skipped", "sanitizer-gluon": "skipped",
        "sweep": "done", "kernels": "done", "steps": "done", "ncu": "skipped",
    }, data["stages"]  # fmt: skip
    assert "skipped" in data["stages"][0]["why"], "each says that it needs a GPU"
    assert [row["method"] for row in data["steps"]] == ["stock", "pattern"]
    found = bench_rows.read(tmp_path / ROWS)
    attention = [row for row in found if row["operator"] == "attention" and row["impl"] == "cpu"]
    assert attention and attention[-1]["t_med_ms"] > 0 and attention[-1]["status"].startswith(("ok", "drift"))
    if attention[-1]["status"] == "ok":  # on a busy machine dense times may differ too much for a speed-up
        assert data["kernels"][0]["impl"] == "cpu"
    assert all((tmp_path / name).exists() for name in ("kernels.md", "tiles.json", "rows.jsonl", "steps.jsonl"))
    before = (tmp_path / ROWS).read_bytes(), (tmp_path / STEPS).read_bytes()
    assert first_hour.main(arguments) == 0  # nothing is left to do
    assert before == ((tmp_path / ROWS).read_bytes(), (tmp_path / STEPS).read_bytes())
