"""Which files of a checkout are about a family, a run of them, and two runs side by side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers_accel
from diffusers_accel.families import FAMILIES
from diffusers_accel.families.family import Family
from tests.diffusers_own.diffusers_own_plugin import OVER, RESULT, SEAM, SECONDS

FOLDERS = {"pipelines": "tests/pipelines", "lora": "tests/lora", "models": "tests/models/transformers"}
KINDS = tuple(FOLDERS)
HERE, ROOT = Path(__file__).parent, Path(diffusers_accel.__file__).parents[1]


@dataclass
class Comparison:
    """What became of the tests of one family and kind.

    Args:
        tests: that ran in both runs; skipped ones do not count.
        passed: in both.
        failed_unpatched: in the run without a patch, whatever they did in the other.
        failed_patched: only under the patch, each with the end of its error.
        attention: calls of attention under the patch.
        finished: whether both runs came to their end in the time that they had.
    """

    family: str
    kind: str
    files: list[str]
    tests: int = 0
    passed: int = 0
    failed_unpatched: int = 0
    failed_patched: dict[str, str] = field(default_factory=dict)
    attention: int = 0
    finished: bool = True
    unpatched_reasons: dict[str, int] = field(default_factory=dict)


def chosen(names: Sequence[str]) -> list[Family]:
    known = {family.name: family for family in FAMILIES.values()}
    if unknown := sorted({*names} - {*known}):
        raise SystemExit(f"expected names of families, found {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def files_about(checkout: Path, family: Family, kind: str) -> list[str]:
    """Test files that name the family's transformer class."""
    name = re.compile(rf"\b{family.transformer.rpartition('.')[2]}\b")
    found = sorted((checkout / FOLDERS[kind]).rglob("test_*.py"))
    return [path.relative_to(checkout).as_posix() for path in found if name.search(path.read_text(encoding="utf-8"))]


def ended_with(why: str) -> str:
    """The first two lines of an error that say something, without what differs from run to run."""
    lines = [line.strip() for line in why.replace("`", "'").splitlines() if line.strip()]
    return re.sub(r"0x[0-9a-f]+|/\S*/|\d+\.\d+(e-?\d+)?", "…", " ".join(lines[:2]) or "no reason given")[:120].strip()


def version_of(checkout: Path) -> str:
    """As its setup.py says it, which is read and not run."""
    said = checkout / "setup.py"
    found = re.search(r'^\s+version="([^"]+)"', said.read_text(encoding="utf-8"), re.M) if said.exists() else None
    return found[1] if found else "of an unknown version"


def compared(checkout: Path, results: Path, cache: Path, family: Family, kind: str, seconds: float) -> Comparison:
    """Runs what is not yet in `results`, and keeps it there."""
    kept_at = results / f"{family.name}.{kind}.json"
    if kept_at.exists():
        return Comparison(**json.loads(kept_at.read_text(encoding="utf-8")))
    results.mkdir(parents=True, exist_ok=True)
    done = Comparison(family.name, kind, files_about(checkout, family, kind))
    if done.files:
        stock, ended = _run(checkout, done.files, cache, results / f"{family.name}.{kind}.stock.jsonl", seconds, "")
        seam = "models" if kind == "models" else "pipelines"
        dense, also = _run(checkout, done.files, cache, results / f"{family.name}.{kind}.dense.jsonl", seconds, seam)
        done.finished = ended and also
        if also:  # a test that is missing where all ran was lost by the patch
            dense = {test: {"outcome": "failed", "attention": 0, "why": "did not run"} for test in stock} | dense
        _compare(done, stock, dense)
    kept_at.write_text(json.dumps(asdict(done), indent=1), encoding="utf-8")
    return done


def kept(results: Path) -> list[Comparison]:
    return [Comparison(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.glob("*.json"))]


def _run(
    checkout: Path, files: Sequence[str], cache: Path, result: Path, seconds: float, seam: str
) -> tuple[dict[str, dict[str, str]], bool]:
    """Test -> its line, of the plugin; and whether all of them ran."""
    result.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_ACCEL_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        SEAM: seam,
        RESULT: str(result),
        SECONDS: str(seconds),
    }
    options = [
        "-q",
        "-p",
        "diffusers_own_plugin",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--no-header",
        "--tb=short",
    ]
    command = [sys.executable, "-m", "pytest", *options, *files]
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=seconds + 600)
    if not result.exists():
        raise SystemExit(f"no test of {', '.join(files)} ran:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    lines = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    by_test: dict[str, dict[str, str]] = {}
    for line in lines:  # a teardown that fails comes after its call
        if line["outcome"] != "passed" or line["test"] not in by_test:
            by_test[line["test"]] = line
    over = OVER in ran.stdout
    if ran.returncode not in (0, 1) and not over:  # 1: tests failed; anything else: pytest itself was stopped
        raise SystemExit(f"pytest ended with {ran.returncode}:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    return by_test, not over


def _compare(done: Comparison, stock: dict[str, dict[str, str]], dense: dict[str, dict[str, str]]) -> None:
    for test in stock.keys() & dense.keys():
        alone, patched = stock[test]["outcome"], dense[test]["outcome"]
        if alone == "skipped" and patched != "failed":
            continue
        done.tests += 1
        done.attention += int(dense[test]["attention"])
        if alone == "failed":
            done.failed_unpatched += 1
            reason = ended_with(stock[test]["why"])
            done.unpatched_reasons[reason] = done.unpatched_reasons.get(reason, 0) + 1
        elif patched != "passed":
            done.failed_patched[test] = dense[test]["why"] or patched
        else:
            done.passed += 1
