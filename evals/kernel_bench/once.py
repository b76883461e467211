"""Runs points of the kernel benchmark without timing them: what a profiler or a sanitizer is started with.

`compute-sanitizer python -m diffusers_accel.evals.kernel_bench.once --shapes S1 --impls portable` runs each of our kernels on
1,000 tokens; `--warm-up 1` runs a call before the one that counts, which `ncu --profile-from-start off` alone looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch

from diffusers_accel.evals.kernel_bench.inputs import SHAPES
from diffusers_accel.evals.kernel_bench.peers import Missing
from diffusers_accel.evals.kernel_bench.points import OPERATORS, Point, plan, settings, status_word
from diffusers_accel.evals.kernel_bench.works import Case, work
from diffusers_accel.kernels.attention import IMPLEMENTATIONS, PRECISIONS

OURS = tuple(name for name in OPERATORS if name not in ("sweep", "dense"))


def run(points: Sequence[Point], device: torch.device, warm_up: int = 0) -> Iterator[tuple[Point, str]]:
    """Each point with its status: ok, wrong, or missing with the reason. What fails raises: a sanitizer ends there."""
    cases: dict[tuple[str, str], Case] = {}
    for point in points:
        name = (point.shape, point.inputs)
        case = cases.setdefault(name, Case(*name, point.dtype, point.seed, device))
        try:
            todo = work(point, case)
        except Missing as error:
            yield point, f"missing: {error}"
            continue
        for _ in range(warm_up):
            todo.call()
        with _profiled(device):
            found = todo.call()
        errors = todo.errors(found)
        wrong = [name for name, limit in todo.limits.items() if not errors[name] <= limit]
        yield point, f"wrong: {', '.join(wrong)}" if wrong else "ok"


@contextlib.contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    """Inside, a profiler that waits for it looks on."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a result is wrong.

    Raises:
        ValueError: an unknown name, as of `points.settings`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="S1", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--operators", default=",".join(OURS), help="comma-separated")
    parser.add_argument("--impls", default="portable", help=f"comma-separated, of {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--density", type=float, default=0.3, help="of attention")
    parser.add_argument("--warm-up", type=int, default=0, help="calls before the one that a profiler sees")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    lists = {name: vars(given)[name].split(",") for name in ("shapes", "operators", "impls", "precisions")}
    asked = settings(given.device, dtype=given.dtype, densities=[given.density], patterns=["text"], **lists)
    points = [point for point in plan(asked) if point.operator != "dense" and point.inputs == asked.inputs[0]]
    bad = 0
    for point, status in run(points, torch.device(given.device), given.warm_up):
        print(f"{point.operator} {point.impl} {point.precision} {point.shape}: {status}", flush=True)
        bad += status_word({"status": status}) == "wrong"
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
