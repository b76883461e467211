"""Times of calls on a device, and what the device could do at best in the same run."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

CEILING_MS = 100.0
WARM_UP_MS = 50.0


class Times(NamedTuple):
    """Median, 20th and 80th percentile in ms, and the number of repetitions."""

    median: float
    p20: float
    p80: float
    repetitions: int


def timed(call: Callable[[], object], device: torch.device, rep_ms: float) -> Times:
    """Times of a call, repeated for `rep_ms` after a warm-up; on a GPU the L2 cache is flushed before each repetition.

    On a CPU at least 5 and at most 200 repetitions.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        times = do_bench(call, warmup=WARM_UP_MS, rep=rep_ms, return_mode="all")
    else:
        times = []
        call()
        begin = time.perf_counter()
        while len(times) < 5 or (1e3 * (time.perf_counter() - begin) < rep_ms and len(times) < 200):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times)
    return Times(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5], len(times))


def graphed(call: Callable[[], object], device: torch.device, rep_ms: float) -> Times:
    """Times of a call that was captured in a CUDA graph: what the GPU needs, without the launches from Python.

    A capture that fails may leave its stream current and PyTorch's allocator on the graph's pool: measure no more then.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, device, rep_ms)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, PyTorch fills what it allocates with NaN, or the largest integer, so that an unwritten tile shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory belongs to it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches now: TFLOP/s of a matrix product in `dtype`, and TB/s of a copy (read and written)."""
    size, elements = (8192, 2**28) if device.type == "cuda" else (1024, 2**23)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    gemm = timed(partial(torch.matmul, a, b), device, CEILING_MS).median
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = timed(partial(target.copy_, source), device, CEILING_MS).median
    return {"gemm_tflops": 2e-9 * size**3 / gemm, "copy_tbps": 2e-9 * source.nbytes / copy}


def relative(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference as a share of the norm of what is exact."""
    wide = exact.float()
    return float((found.float() - wide).norm() / wide.norm())


def error_row(out: Tensor, lse: Tensor | None, exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """How far attention is from the exact one; `lse` None where it gives none."""
    reference = exact[0]
    difference = out.float() - reference
    row = {
        "rel_err": float(difference.norm() / reference.norm()),
        "max_err": float(difference.abs().max()),
        "cos": float(torch.nn.functional.cosine_similarity(out.float().flatten(), reference.flatten(), 0)),
    }
    if lse is not None:
        read = exact[1].isfinite()
        largest = (lse - exact[1])[read].abs().max() if bool(read.any()) else torch.zeros(())
        row["lse_err"] = float(largest) if torch.equal(read, lse.isfinite()) else float("nan")
    return row
