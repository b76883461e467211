"""What is done with a GPU in its first minutes, in this order: is it right, which tiles, how fast, and why not faster."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_accel.evals import kernel_bench, step_bench
from diffusers_accel.evals.kernel_bench.points import OPERATORS

ROOT = Path(__file__).resolve().parents[2]  # of a checkout
ROWS, STEPS, PROFILE = "rows.jsonl", "steps.jsonl", "ncu.txt"
ATTENTION = ("portable", "hopper", "gluon")  # this project's kernels of it for a GPU
REST = 12.0  # seconds of a benchmark's limit that are left for its start and its report
# Where tools of the CUDA toolkit lie that are not on the PATH.
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")


@dataclass(frozen=True)
class HourStage:
    """One stage.

    Args:
        name: a word, also of its log.
        share: of the time, beside those of the other stages that are still to come.
        command: from the seconds that it may take.
        writes: files in the folder.
        missing: why it cannot run here, or None.
        findings: exit codes that say that it came to its end and found something wrong.
        left: what it has not come to although it ended well, as a text; "" is nothing.
        env: added to the environment.
        cwd: where it runs; None is the folder.
    """

    name: str
    share: float
    command: Callable[[float], list[str]]
    writes: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    findings: Mapping[int, str] = field(default_factory=dict)
    left: Callable[[], str] = lambda: ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None


def planned(device: str, folder: Path) -> list[HourStage]:
    """All stages on a device; on a CPU each is small, and those that need a GPU's tools are left out with that reason."""
    gpu = device != "cpu"
    sweep: dict[str, Any] = {"operators": ["sweep"]}
    kernels: dict[str, Any] = {"operators": [name for name in OPERATORS if name != "sweep"]}
    steps: dict[str, Any] = {"layers": 1}
    if not gpu:
        small = {"shapes": ["S1"], "densities": [0.5], "patterns": ["text"], "rep_ms": 0.0, "dtype": "fp32"}
        sweep |= small
        kernels |= {**small, "operators": ["attention", "selected"], "impls": ["cpu"]}
        steps |= {"models": "wan2.1-1.3b 480p", "methods": "pattern", "size": "1x8x8", "steps": 2, "dtype": "fp32"}
    out, pages = folder / ROWS, ("rows.jsonl", "kernels.md", "kernels.png", "tiles.json")
    return [
        HourStage(
            "tests",
            18,
            partial(_pytest, gpu, folder / "log-tests.txt"),
            missing=_no_tests,
            findings={1: "tests failed", 2: "some tests could not be collected"},
            cwd=ROOT,
        ),
        *(_sanitizer(impl, gpu) for impl in ATTENTION),
        HourStage(
            "sweep", 14, partial(_bench, device, out, folder, sweep), pages, left=partial(_points, device, out, sweep)
        ),
        HourStage(
            "kernels",
            34,
            partial(_bench, device, out, folder, kernels),
            pages,
            left=partial(_points, device, out, kernels),
        ),
        HourStage(
            "steps",
            16,
            partial(_steps, device, folder / STEPS, steps),
            (STEPS,),
            left=partial(_methods, device, folder / STEPS, steps),
        ),
        HourStage("ncu", 6, _ncu, (PROFILE,), missing=partial(_no_tool, "ncu", gpu)),
    ]


def _pytest(gpu: bool, log: Path, seconds: float) -> list[str]:
    """The tests that a GPU is needed for, without those that passed in an earlier run which had no time for all."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", "-v", "--tb=short", "--color=no"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    if gpu and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, min(8, (os.cpu_count() or 2) // 2)))]
    words = log.read_text(errors="replace") if log.exists() else ""
    # Of one process, and of several. Pytest deselects whatever begins so: only what ends with its parameters is safe.
    passed = re.findall(r"^(tests/\S+\]) PASSED|PASSED (tests/\S+\])\s*$", words, re.MULTILINE)
    return [*command, *sorted({f"--deselect={one or other}" for one, other in passed})]


def _no_tests() -> str | None:
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: pip install pytest"
    if not (ROOT / "tests" / "kernels" / "conftest.py").is_file():
        return "the tests are not installed with the package: run from a checkout, with pip install -e ."
    return None


def _sanitizer(impl: str, gpu: bool) -> HourStage:
    """Each kernel on 1,000 tokens under memcheck. Without PyTorch's caching of memory, in which a neighbour would lie."""

    def command(seconds: float) -> list[str]:
        tool = [str(find_tool("compute-sanitizer")), "--tool", "memcheck", "--error-exitcode", "9"]
        operators = ["--operators", "attention"] if impl != "portable" else []
        return [*tool, *_once("S1"), "--impls", impl, *operators]

    name = f"sanitizer-{impl}"
    return HourStage(
        name,
        4,
        command,
        missing=partial(_no_tool, "compute-sanitizer", gpu),
        findings={9: "memory is read or written where nothing was allocated", 1: "a result is wrong"},
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _ncu(seconds: float) -> list[str]:
    tool = [str(find_tool("ncu")), "--profile-from-start", "off", "--clock-control", "none", "--set", "full"]
    tool += ["--kernel-name", "regex:attention_kernel", "--launch-count", str(len(ATTENTION)), "--log-file", PROFILE]
    attention = ["--operators", "attention", "--precisions", "input", "--warm-up", "1"]
    return [*tool, *_once("W13"), "--impls", ",".join(ATTENTION), *attention]


def _once(shape: str) -> list[str]:
    return [sys.executable, "-m", "diffusers_accel.evals.kernel_bench.once", "--device", "cuda", "--shapes", shape]


def find_tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit, on the PATH or where the toolkit puts it."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    for folder in TOOL_FOLDERS:
        places += [Path(folder), *sorted(Path(folder).glob("*/"), reverse=True)]  # Nsight has a folder a version
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))
    return Path(found) if found else None


def _no_tool(name: str, gpu: bool) -> str | None:
    if not gpu:
        return f"{name} looks at a GPU"
    return None if find_tool(name) else f"{name} is not found: it comes with the CUDA toolkit; put it on the PATH"


def _bench(device: str, out: Path, folder: Path, asked: dict[str, Any], seconds: float) -> list[str]:
    command = [sys.executable, "-m", "diffusers_accel.evals.kernel_bench", "--device", device, "--out", str(out)]
    return [*command, "--report", str(folder), "--minutes", _minutes(seconds), *_options(asked)]


def _steps(device: str, out: Path, asked: dict[str, Any], seconds: float) -> list[str]:
    command = [sys.executable, "-m", "diffusers_accel.evals.step_bench", "--device", device, "--out", str(out)]
    return [*command, "--minutes", _minutes(seconds), *_options(asked)]


def _options(asked: dict[str, Any]) -> list[str]:
    words = []
    for name, value in asked.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def _minutes(seconds: float) -> str:
    return f"{max(seconds - REST, seconds / 2) / 60:.3f}"


def _points(device: str, out: Path, asked: dict[str, Any]) -> str:
    number = kernel_bench.left_over(device, out, **asked)
    return f"{number} points are left" if number else ""


def _methods(device: str, out: Path, asked: dict[str, Any]) -> str:
    number = step_bench.left_over(out, **asked)
    return f"{number} methods are left" if number else ""
