"""Measures the points of the kernel benchmark, one after the other; a process of its own under `kernel_watch`.

Each point is checked before it is timed, and a wrong kernel gets no time. The fastest dense kernel of the run is timed
before and after each sparse point; where those two times differ too much, the point gets no efficiency.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_accel.evals.kernel_peers import Missing
from diffusers_accel.evals.kernel_points import DTYPES, Point, Row, Settings, family, key, plan
from diffusers_accel.evals.kernel_timing import ceilings, graphed, timed
from diffusers_accel.evals.kernel_works import Case, Work, work
from diffusers_accel.evals.machine import git_sha, gpu_state, machine, versions
from diffusers_accel.kernels import attention as kernel_attention

# How far the dense times before and after a point may lie apart. A CPU is rarely alone.
DRIFT = {"cuda": 0.03, "cpu": 0.10}
# Operators that are compared with dense attention.
COMPARED = ("attention", "selected")
# After one of these, no more of the same kind is tried in this run.
GIVE_UP = ("missing", "failed", "hung", "crashed")


def status_word(row: Row) -> str:
    """The first word of a row's status: ok, drift, wrong, simulated, out of memory, or one of `GIVE_UP`."""
    return str(row["status"]).partition(":")[0]


def environment(settings: Settings) -> Row:
    """What times depend on besides the point; `kernel_rows.SAME` says what of it rows must agree in to compare."""
    device = torch.device(settings.device).type
    return {
        "machine": machine() | {"device": device},
        "versions": versions(("torch", "triton", "diffusers-accel")),
        "code": _code(),
        "git_sha": git_sha(),
        "rep_ms": settings.rep_ms,
    }


def measure(
    settings: Settings,
    on_row: Callable[[Row], None],
    on_begin: Callable[[Row], None] = lambda row: None,
    done: Collection[str] = (),
    avoid: Collection[str] = (),
    dense: Sequence[tuple[str, str, str, float]] = (),
    rates: Mapping[str, float] | None = None,
) -> None:
    """Measures every point that is not there yet.

    Args:
        settings: what was asked for.
        on_row: called with each row when it is done.
        on_begin: called with the fields of the point that is begun: also when a dense kernel is timed beside a point.
        done: keys of rows that are there.
        avoid: families of which nothing is to be tried.
        dense: (shape, inputs, implementation, ms) of dense attention that is known from earlier rows.
        rates: what `ceilings` found, if it has been asked.
    """
    bench = Bench(settings, on_begin, dense, rates or ceilings(torch.device(settings.device), DTYPES[settings.dtype]))
    avoid = set(avoid)
    for point in plan(settings):
        if key(point.row) in done or family(point.row) in avoid:
            continue
        row = bench.row(point)
        if status_word(row) in GIVE_UP:
            avoid.add(family(row))
        on_row(row)


class Bench:
    """What is kept from one point to the next: inputs, ceilings, and the times of dense attention."""

    def __init__(
        self,
        settings: Settings,
        on_begin: Callable[[Row], None],
        dense: Sequence[tuple[str, str, str, float]],
        rates: Mapping[str, float],
    ) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.on_begin = on_begin
        self.rates = dict(rates)
        self._case: tuple[tuple[str, str], Case] | None = None
        self._dense: dict[tuple[str, str], dict[str, float]] = {}
        for shape, inputs, impl, ms in dense:
            self._dense.setdefault((shape, inputs), {})[impl] = ms
        self._before: tuple[Point, float] | None = (
            None  # the dense time after the point before, if that was of this case
        )

    def row(self, point: Point) -> Row:
        """The row of one point, whatever happens to it; a CUDA context that is lost is raised."""
        self.on_begin(point.row)
        row = point.row
        try:
            return row | self._measured(point)
        except Missing as error:
            return row | {"status": f"missing: {_one_line(error)}"}
        except torch.OutOfMemoryError as error:
            self._case = None
            torch.cuda.empty_cache()
            return row | {"status": f"out of memory: {_one_line(error)}"}
        except Exception as error:
            if self.device.type == "cuda":
                torch.cuda.synchronize(
                    self.device
                )  # raises again where the context is lost; another process goes on then
            return row | {"status": f"failed: {type(error).__name__}: {_one_line(error)}"}

    def _measured(self, point: Point) -> Row:
        case = self._case_of(point)
        if point.operator not in COMPARED:
            self._before = None
        todo = work(point, case)
        row = dict(todo.fields)
        self._poison(case)
        errors = todo.errors(todo.call())
        row |= {name: value if math.isfinite(value) else None for name, value in errors.items()}
        over = [name for name, limit in todo.limits.items() if not errors[name] <= limit]  # NaN compares as False
        if over:
            found = ", ".join(f"{name} {errors[name]:.2g} above {todo.limits[name]:g}" for name in over)
            return row | {"status": f"wrong: {found}"}
        if self.device.type == "cpu" and point.operator in COMPARED and point.precision != "input":
            return row | {
                "status": "simulated: on a CPU quantization shows what it does to the numbers, it has no time"
            }
        return row | (self._compared(point, todo) if point.operator in COMPARED else self._timed(point, todo))

    def _timed(self, point: Point, todo: Work) -> Row:
        """Times, rates and the state of the device."""
        rep = self.settings.rep_ms
        median, p20, p80, count = timed(todo.call, self.device, rep)
        row: Row = {"t_med_ms": median, "t_p20_ms": p20, "t_p80_ms": p80, "n_rep": count, "status": "ok"}
        row |= {name: timed(call, self.device, rep).median for name, call in todo.parts.items()}
        kernel: float = row.get("t_kernel_ms", median)
        row["t_kernel_ms"] = kernel
        if todo.flops:
            row["tflops_computed"] = 1e-9 * todo.flops / kernel
        row["tbps"] = 1e-9 * todo.bytes / kernel
        bounds = todo.flops / self.rates["gemm_tflops"], todo.bytes / self.rates["copy_tbps"]
        row |= {"roofline_share": 1e-9 * max(bounds) / kernel} | self.rates
        if point.operator == "dense" and point.precision == "input":
            self._dense.setdefault((point.shape, point.inputs), {})[point.impl] = median
        if point.operator == "selected":
            row["overhead_share"] = (row["t_prep_ms"] + row["t_select_ms"]) / kernel
            row |= self._graph(todo)
        return row | {"gpu": gpu_state(self.device)}

    def _graph(self, todo: Work) -> Row:
        """The whole call as a CUDA graph, whose launches cost Python nothing."""
        if self.device.type != "cuda":
            return {}
        try:
            return {"t_graph_ms": graphed(todo.call, self.device, self.settings.rep_ms).median}
        except RuntimeError as error:
            return {"graph": f"not captured: {_one_line(error)}"}

    def _compared(self, point: Point, todo: Work) -> Row:
        """The times of a sparse point between two of the fastest dense kernel, and how they compare."""
        known = self._dense.get((point.shape, point.inputs))
        if not known:
            return self._timed(point, todo) | {"status": "no reference: no dense attention could be timed here"}
        best = Point("dense", min(known, key=known.__getitem__), point.shape, point.inputs, point.dtype, point.seed)
        try:
            before = self._before[1] if self._before and self._before[0] == best else self._dense_ms(best, point)
        except Missing:  # its time is of an earlier run, which had it
            del known[best.impl]
            return self._compared(point, todo)
        row = self._timed(point, todo)
        after = self._dense_ms(best, point)
        self._before = (best, after)
        dense_ms, drift = (before + after) / 2, abs(after / before - 1)
        row |= {"t_dense_ms": known | {best.impl: dense_ms}, "dense": best.impl, "dense_drift": drift}
        allowed = DRIFT[self.device.type]
        if drift > allowed:
            return row | {"status": f"drift: dense times differ by {drift:.0%}, more than {allowed:.0%}"}
        kernel, density = row["t_kernel_ms"], todo.fields["density_computed"]
        total: float = row["t_graph_ms"] if "t_graph_ms" in row else row["t_med_ms"]
        return row | {
            "eta": dense_ms * density / kernel,
            "speedup_kernel": dense_ms / kernel,
            "speedup_total": dense_ms / total,
        }

    def _dense_ms(self, best: Point, point: Point) -> float:
        """The time of the dense kernel now; it is begun and ended as a point, so that a hang has the right name."""
        self.on_begin(best.row)
        ms = timed(work(best, self._case_of(best)).call, self.device, self.settings.rep_ms).median
        self.on_begin(point.row)
        return ms

    def _case_of(self, point: Point) -> Case:
        name = (point.shape, point.inputs)
        if self._case is None or self._case[0] != name:
            self._case, self._before = None, None  # first, so that two sets of inputs never lie in memory at once
            self._case = (name, Case(*name, point.dtype, point.seed, self.device))
        return self._case[1]

    def _poison(self, case: Case) -> None:
        """Leaves NaN in the memory that the allocator hands out next for an output, so that an unwritten tile shows."""
        if self.device.type == "cuda":
            torch.full_like(case.q, torch.nan)


def _one_line(error: BaseException) -> str:
    """The message without its line breaks, cut at a length that a table of reasons can hold."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _code() -> str:
    """A fingerprint of what is measured and how: rows of two states of the kernels do not compare."""
    kernels = Path(str(kernel_attention.__file__)).resolve().parent.parent
    here = Path(__file__).resolve().parent
    files = [*kernels.rglob("*.py"), *(here / f"kernel_{name}.py" for name in ("inputs", "peers", "timing", "works"))]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.as_posix()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _die_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone, however it went, nobody reads what is measured here."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Reads a job, a JSON file named on the command line; answers in lines of JSON on stdout.

    {"hello": environment}, then for each point {"begin": its fields} and {"row": the row}, and {"end": true}.
    """
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settings = Settings.load(job["settings"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print; their words go with the errors
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    device = torch.device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if device.index is not None:
        torch.cuda.set_device(device)
    rates = ceilings(
        device, DTYPES[settings.dtype]
    )  # before the first point: a device that is stuck is no kernel's fault
    say(hello=environment(settings))
    measure(
        settings,
        lambda row: say(row=row),
        lambda row: say(begin=row),
        set(job["done"]),
        set(job["avoid"]),
        [tuple(entry) for entry in job["dense"]],
        rates,
    )
    say(end=True)
    answers.close()
    os._exit(0)  # the thread waits for a parent that waits for us


if __name__ == "__main__":
    main()
