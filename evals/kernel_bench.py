"""Times the attention kernels on this device against its best dense attention: `diffusers-accel bench`.

Every point is checked against the reference before it is timed; a wrong kernel gets no time. Dense attention is timed
before and after each point, and a point whose two dense times differ too much gets no efficiency. Sparse efficiency is
dense time x density / sparse time, against the fastest dense kernel of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_accel.evals.kernel_inputs import BLOCK, INPUTS, PATTERNS, SHAPES, pattern, qkv
from diffusers_accel.evals.machine import git_sha, machine, versions
from diffusers_accel.kernels.attention import IMPLEMENTATIONS, PRECISIONS, attention, choices
from diffusers_accel.kernels.quantize import quantize

Row: TypeAlias = dict[str, Any]
Call: TypeAlias = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative error against fp32 attention on the same inputs; rounding the output alone costs up to half of the first two.
LIMITS = {"bf16": 5e-3, "fp16": 7e-4, "fp32": 1e-5}
LSE_LIMIT = 1e-3
# Of quantized attention, in any dtype. On Gaussian inputs, which average nothing out, it errs by 1.1e-2 and 3.8e-2; the
# largest error of an LSE is on video-like inputs, whose keys are larger.
QUANTIZED_LIMITS = {"int8": 2e-2, "int8_fp8": 6e-2}
QUANTIZED_LSE_LIMIT = 0.2
# How far the dense times before and after a point may lie apart. A CPU is rarely alone.
DRIFT = {"cuda": 0.03, "cpu": 0.10}
CPU_SECONDS = 1.5  # of repetitions for one time; a GPU gets 0.3
DEFAULTS = {
    "cuda": (("W13", "W14", "HY", "C2", "C15"), (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)),
    "cpu": (("shapes", "S8"), (1.0, 0.25, 0.1)),
}


def run(
    device: torch.device | str,
    shapes: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    patterns: Sequence[str] = ("random", "window"),
    dtype: str = "bf16",
    inputs: Sequence[str] = ("gaussian",),
    precisions: Sequence[str] = ("input",),
    impls: Sequence[str] | None = None,
    seed: int = 0,
    seconds: float | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measures every combination; one row of plain JSON values each, times in ms.

    Args:
        device: where to run.
        shapes: names from `SHAPES`; None takes the device's defaults, as for `densities` (0..1, of block pairs).
        patterns: from `PATTERNS`. At density 1 all are the same and only the first is run.
        dtype: bf16, fp16 or fp32.
        inputs: from `INPUTS`.
        precisions: from `PRECISIONS`; the time of a quantized one includes its quantization, which `t_prep_ms` has alone.
            On a CPU, where it is a simulation, its rows have errors and no times.
        impls: names of implementations; None takes all that can run but the reference.
        seed: fixes inputs and patterns.
        seconds: begin no new point after so long.
        on_row: called with each row as it is done.

    Raises:
        ValueError: an unknown name, or a density outside 0..1.
    """
    device = torch.device(device)
    if device.type not in DEFAULTS:
        raise ValueError(f"the benchmark runs on {' and '.join(DEFAULTS)}, found {device.type}")
    shapes, densities = shapes or DEFAULTS[device.type][0], densities or DEFAULTS[device.type][1]
    known: tuple[Any, ...] = (("shapes", shapes, SHAPES), ("patterns", patterns, PATTERNS), ("inputs", inputs, INPUTS))
    known += (
        ("precisions", precisions, PRECISIONS),
        ("dtype", [dtype], DTYPES),
        ("impls", impls or (), IMPLEMENTATIONS),
    )
    for name, given, allowed in known:
        if unknown := [x for x in given if x not in allowed]:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, found {', '.join(unknown)}")
    if wrong := [x for x in densities if not 0 < x <= 1]:
        raise ValueError(f"densities must lie in 0..1, above 0, found {wrong}")
    common = {"run_id": uuid.uuid4().hex[:12], "seed": seed, "dtype": dtype, "git_sha": git_sha()}
    common |= {"machine": machine(), "versions": versions(("torch", "triton", "diffusers-accel"))}
    end = time.monotonic() + (seconds if seconds is not None else float("inf"))
    rows = []
    for shape, kind in product(shapes, inputs):
        for row in _shape_rows(device, shape, kind, densities, patterns, dtype, precisions, impls, seed, end):
            rows.append(common | {"time_utc": datetime.now(UTC).isoformat(timespec="seconds")} | row)
            on_row(rows[-1])
    return rows


def _shape_rows(
    device: torch.device,
    name: str,
    kind: str,
    densities: Sequence[float],
    patterns: Sequence[str],
    dtype: str,
    precisions: Sequence[str],
    impls: Sequence[str] | None,
    seed: int,
    end: float,
) -> Iterator[Row]:
    """The rows of one shape with one kind of input; each dense time serves the point before it and the one after."""
    if time.monotonic() > end:
        return
    shape = SHAPES[name]
    kernels = [
        (precision, impl)
        for precision in precisions
        for impl in impls or _usable(device, DTYPES[dtype], shape.dim, precision)
    ]
    q, k, v = qkv(kind, shape, DTYPES[dtype], device, seed)
    dense = {backend: _timed(call, device)[0] for backend, call in _dense_calls(q, k, v).items()}
    best = min(dense, key=dense.__getitem__)
    before = dense[best]
    for density, which, (precision, impl) in product(densities, patterns, kernels):
        if time.monotonic() > end:
            return
        if density == 1 and which != patterns[0]:
            continue
        blocks = pattern(which, shape, density, seed)
        row: Row = {
            "shape": name, "B": 1, "H": shape.heads, "N": shape.tokens, "D": shape.dim, "input_kind": kind,
            "pattern": which, "block_m": BLOCK, "block_n": BLOCK, "density_requested": density,
            "density_computed": blocks.density, "rows_min_blocks": int(blocks.counts.min()),
            "rows_max_blocks": int(blocks.counts.max()), "precision": precision, "impl": impl,
        }  # fmt: skip
        blocks = blocks.to(device)
        exact = attention(q.float(), k.float(), v.float(), blocks, impl="reference")
        call = partial(attention, q, k, v, blocks, precision=precision, impl=impl)
        row |= _errors(call(), exact)
        del exact
        limit, lse_limit = _limits(dtype, precision)
        if not (row["rel_err"] <= limit and row["lse_err"] <= lse_limit):
            yield row | {"status": f"wrong: rel_err above {limit} or lse_err above {lse_limit}"}
            continue
        if device.type == "cpu" and precision != "input":
            yield row | {"status": "simulated: on a CPU quantization shows what it does to the numbers, it has no time"}
            continue
        if precision != "input":
            row["t_prep_ms"] = _timed(partial(quantize, q, k, v, precision), device)[0]
        median, p20, p80, count = _timed(call, device)
        after = _timed(_dense_calls(q, k, v)[best], device)[0]
        dense_ms, drift = (before + after) / 2, abs(after / before - 1)
        row |= {
            "t_med_ms": median,
            "t_p20_ms": p20,
            "t_p80_ms": p80,
            "n_rep": count,
            "t_dense_ms": dense | {best: dense_ms},
        }
        row |= {"dense": best, "dense_drift": drift}
        row["tflops_computed"] = 4e-9 * shape.tokens**2 * shape.dim * shape.heads * blocks.density / median
        before = after
        if drift > DRIFT[device.type]:
            yield row | {"status": f"drift: dense times differ by {drift:.0%}, more than {DRIFT[device.type]:.0%}"}
            continue
        yield row | {"eta": dense_ms * blocks.density / median, "speedup_kernel": dense_ms / median, "status": "ok"}


def _usable(device: torch.device, dtype: torch.dtype, head_dim: int, precision: str) -> list[str]:
    """The implementations that can run, but for the reference."""
    options = choices(device, dtype, head_dim, (BLOCK, BLOCK), precision)
    return [option.name for option in options if option.reason is None and option.name != "reference"]


def _limits(dtype: str, precision: str) -> tuple[float, float]:
    """How far out (relative) and lse (absolute) may be from fp32 attention."""
    return (LIMITS[dtype], LSE_LIMIT) if precision == "input" else (QUANTIZED_LIMITS[precision], QUANTIZED_LSE_LIMIT)


def _dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """The dense kernels that run on these inputs, by name."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def with_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    if q.device.type == "cpu":
        return {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)}
    calls: dict[str, Call] = {}
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in backends:
        try:
            with_backend(backend)
        except RuntimeError:  # how PyTorch says that this backend does not take such inputs here
            continue
        calls[backend.name.removesuffix("_ATTENTION").lower()] = partial(with_backend, backend)
    return calls


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Row:
    out, reference = found[0].float(), exact[0]
    read = exact[1].isfinite()
    lse_error = (found[1] - exact[1])[read].abs().max() if bool(read.any()) else torch.zeros(())
    return {
        "rel_err": float((out - reference).norm() / reference.norm()),
        "max_err": float((out - reference).abs().max()),
        "lse_err": float(lse_error) if torch.equal(read, found[1].isfinite()) else float("nan"),
        "cos": float(torch.nn.functional.cosine_similarity(out.flatten(), reference.flatten(), 0)),
    }


def _timed(call: Call, device: torch.device) -> tuple[float, float, float, int]:
    """Median, 20th and 80th percentile in ms, and the number of repetitions."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times = do_bench(call, warmup=50, rep=300, return_mode="all")
    else:
        times, begin = [], time.perf_counter()
        call()
        while len(times) < 5 or (time.perf_counter() - begin < CPU_SECONDS and len(times) < 200):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times)
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5], len(times)


def table(rows: Sequence[Row]) -> Any:
    """The rows as a rich table, 80 columns wide; `status` in full is in the rows."""
    from rich import box
    from rich.table import Table

    out = Table(
        "shape", "pattern", "density", "impl", title="Attention kernels", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("ms", "dense", "speed", "eff."):
        out.add_column(heading, justify="right")
    out.add_column("status")
    for row in rows:
        times = ["-"] * 4
        if "t_med_ms" in row:
            times[:2] = f"{row['t_med_ms']:.1f}", f"{row['t_dense_ms'][row['dense']]:.1f}"
        if "eta" in row:
            times[2:] = f"{row['speedup_kernel']:.2f}x", f"{row['eta']:.2f}"
        shape = row["shape"] if row["input_kind"] == "gaussian" else f"{row['shape']} {row['input_kind']}"
        status = row["status"].partition(":")[0]
        impl = row["impl"] if row["precision"] == "input" else f"{row['impl']} {row['precision']}"
        out.add_row(shape, row["pattern"], f"{row['density_computed']:.3f}", impl, *times, status)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `diffusers-accel bench` and `python -m diffusers_accel.evals.kernel_bench`."""
    from rich.console import Console

    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="diffusers-accel bench",
        description="Times the attention kernels on this device against its best dense attention.",
        epilog="Lists are separated by commas. Without a GPU the defaults are small enough for a laptop.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=words, help=f"from {', '.join(SHAPES)}")
    parser.add_argument("--densities", type=numbers, help="share of block pairs, 0..1")
    parser.add_argument("--patterns", type=words, default=["random", "window"], help=f"from {', '.join(PATTERNS)}")
    parser.add_argument("--dtype", default="bf16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--inputs", type=words, default=["gaussian"], help=f"from {', '.join(INPUTS)}")
    parser.add_argument("--precisions", type=words, default=["input"], help=f"from {', '.join(PRECISIONS)}")
    parser.add_argument("--impls", type=words, help="implementations; all that can run, if not given")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no new point after so many seconds")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="append each row as a line of JSON when it is done"
    )
    options = vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
    out, threads = options.pop("out"), options.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)

    def on_row(row: Row) -> None:
        time_ms = f"{row['t_med_ms']:.2f} ms" if "t_med_ms" in row else "no time"
        console.print(
            f"{row['shape']} {row['pattern']} {row['density_computed']:.3f} {row['precision']} {row['impl']}: "
            f"{time_ms}, {row['status']}"
        )
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    Console().print(table(run(**options, on_row=on_row)))


if __name__ == "__main__":
    main()
