"""Measures the points of the kernel benchmark, one after the other; a process of its own under `watch`.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffusers_accel.evals.kernel_bench.peers import PEERS, Missing
from diffusers_accel.evals.kernel_bench.points import DTYPES, BenchSettings, Point, Row, given_up, left
from diffusers_accel.evals.kernel_bench.points import settings as make_settings
from diffusers_accel.evals.kernel_bench.timing import ceilings, graphed, poisoned, timed
from diffusers_accel.evals.kernel_bench.works import Case, Work, work
from diffusers_accel.evals.machine import git_sha, gpu_state, instruction_set, machine, versions
from diffusers_accel.evals.worker_process import end_with_parent
from diffusers_accel.kernels import attention as kernel_attention

T = TypeVar("T")

# How far the dense times before and after a point may lie apart. A CPU is rarely alone.
DRIFT = {"cuda": 0.03, "cpu": 0.10}
# Operators that are compared with dense attention.
COMPARED = ("attention", "selected")
# What in this folder decides what a row says, beside the kernels.
MEASURES = ("inputs", "peers", "tiles", "timing", "worker", "works")


def environment(asked: BenchSettings) -> Row:
    """What times depend on besides the point; `rows.SAME` says what of it rows must agree in to compare."""
    device = torch.device(asked.device)
    place = {"device": device.type, "driver": gpu_state(device).get("driver"), "cpu_capability": instruction_set()}
    others = {"xformers"} | {peer.distribution for peers in PEERS.values() for peer in peers.values()}
    found = versions(("torch", "triton", "diffusers-accel"))
    return {
        "machine": machine() | place,
        "versions": found,
        "peers": {name: version for name, version in versions(sorted(others)).items() if name not in found},
        "code": code(),
        "git_sha": git_sha(),
        "rep_ms": asked.rep_ms,
    }


class Bench:
    """What is kept from one point to the next: inputs, and the times of dense attention.

    Args:
        asked: what was asked for.
        on_begin: called with the fields of the point that is begun: also when a dense kernel is timed beside a point.
        rates: what `ceilings` found.
        dense: (shape, inputs, implementation, ms) of dense attention that is known from earlier rows.
        graphs: whether CUDA graphs are tried.
        process: whose points are measured here, as of `peers.process_of`.
    """

    def __init__(
        self,
        asked: BenchSettings,
        on_begin: Callable[[Row], None],
        rates: dict[str, float],
        dense: Iterable[tuple[str, str, str, float]] = (),
        graphs: bool = True,
        process: str = "",
    ) -> None:
        self.asked, self.on_begin, self.rates, self.graphs, self.process = asked, on_begin, rates, graphs, process
        self.device = torch.device(asked.device)
        self.spoilt = False  # whether nothing more may be measured in this process
        self._case: tuple[tuple[str, str], Case] | None = None
        self._dense: dict[tuple[str, str], dict[str, float]] = {}
        for shape, inputs, impl, ms in dense:
            self._dense.setdefault((shape, inputs), {})[impl] = ms
        # The dense time after the point before, if that was of this case.
        self._before: tuple[Point, float] | None = None

    def rows(self, done: Collection[str] = (), avoid: Iterable[str] = ()) -> Iterator[Row]:
        """Every point whose key is not `done` and whose families are not to be avoided, until all are or this is spoilt."""
        lost = set(avoid)
        for point in left(self.asked, self.process, done, lost):
            row = self.row(point)
            lost |= given_up(row)
            yield row
            if self.spoilt:
                return

    def row(self, point: Point) -> Row:
        """The row of one point, whatever happens to it; a CUDA context that is lost is raised."""
        self.on_begin(point.row)
        row, status = self._tried(lambda: self._measured(point))
        if status.startswith("out of memory"):
            self._case = self._before = None
            torch.cuda.empty_cache()
        return point.row | {"status": status} | (row or {})

    def _tried(self, do: Callable[[], T]) -> tuple[T | None, str]:
        """What it returns, or None, and the status. Outside of it no exception holds the tensors of its frames."""
        try:
            return do(), "ok"
        except Missing as error:
            return None, f"missing: {_one_line(error)}"
        except torch.OutOfMemoryError as error:
            return None, f"out of memory: {_one_line(error)}"
        except Exception as error:
            if self.device.type == "cuda":  # raises again where the context is lost; another process goes on then
                torch.cuda.synchronize(self.device)
            return None, f"failed: {type(error).__name__}: {_one_line(error)}"

    def _measured(self, point: Point) -> Row:
        case = self._case_of(point)
        if point.operator not in COMPARED:
            self._before = None
        todo = work(point, case)
        with nullcontext() if todo.traced else poisoned():
            found = todo.call()
        errors = todo.errors(found)
        del found
        row = todo.fields | {name: value if math.isfinite(value) else None for name, value in errors.items()}
        over = [name for name, limit in todo.limits.items() if not errors[name] <= limit]  # NaN compares as False
        if over:
            text = ", ".join(f"{name} {errors[name]:.2g} above {todo.limits[name]:g}" for name in over)
            return row | {"status": f"wrong: {text}"}
        if self.device.type == "cpu" and point.operator in COMPARED and point.precision != "input":
            return row | {"status": "simulated: on a CPU quantization shows what it does to numbers, it has no time"}
        row |= self._compared(point, todo) if point.operator in COMPARED else self._timed(point, todo)
        return row | (self._graph(point, todo) if point.operator == "selected" else {})

    def _timed(self, point: Point, todo: Work) -> Row:
        """Times, rates and the state of the device."""
        rep = self.asked.rep_ms
        median, p20, p80, count = timed(todo.call, self.device, rep)
        row: Row = {"t_med_ms": median, "t_p20_ms": p20, "t_p80_ms": p80, "n_rep": count, "status": "ok"}
        row |= {name: timed(call, self.device, rep).median for name, call in todo.parts.items()}
        kernel: float = row.setdefault("t_kernel_ms", median)
        if todo.flops:
            row["tflops_computed"] = 1e-9 * todo.flops / kernel
        row["tbps"] = 1e-9 * todo.bytes / kernel
        bounds = todo.flops / self.rates["gemm_tflops"], todo.bytes / self.rates["copy_tbps"]
        row |= {"roofline_share": 1e-9 * max(bounds) / kernel} | self.rates
        if point.operator == "dense" and point.precision == "input":
            self._dense.setdefault((point.shape, point.inputs), {})[point.impl] = median
        if point.operator == "selected":
            row["t_scatter_ms"] = row.pop("t_back_ms") - kernel
            around = sum(row[name] for name in ("t_prep_ms", "t_select_ms", "t_scatter_ms"))
            row["overhead_share"] = around / kernel
        return row | {"gpu": gpu_state(self.device)}

    def _graph(self, point: Point, todo: Work) -> Row:
        """The whole call as a CUDA graph, whose launches cost Python nothing. Last: a failure spoils what comes after."""
        if self.device.type != "cuda" or point.impl not in ("portable", "hopper", "gluon"):
            return {}
        if os.environ.get("DIFFUSERS_ACCEL_CHECKS") == "1":
            return {"graph": "not tried: DIFFUSERS_ACCEL_CHECKS reads from the device"}
        if not self.graphs:
            return {"graph": "not tried: another was not captured"}
        try:
            return {"t_graph_ms": graphed(todo.call, self.device, self.asked.rep_ms).median}
        except Exception as error:
            self.spoilt = True
            return {"graph": f"not captured: {_one_line(error)}"}

    def _compared(self, point: Point, todo: Work) -> Row:
        """The times of a sparse point between two of the fastest dense kernel, and how they compare."""
        known = self._dense.get((point.shape, point.inputs), {})
        while known:
            best = Point("dense", min(known, key=known.__getitem__), point.shape, point.inputs, point.dtype, point.seed)
            before = self._before[1] if self._before and self._before[0] == best else self._dense_ms(best, point)
            row = self._timed(point, todo) if before else {}
            after = self._dense_ms(best, point) if before else None
            if before and after:
                self._before = (best, after)
                return row | self._ratios(row, todo, known, best.impl, before, after)
            del known[best.impl]  # not this point's fault; it may also be of an earlier run, which had it
        return self._timed(point, todo) | {"status": "no reference: no dense attention could be timed here"}

    def _ratios(self, row: Row, todo: Work, known: Mapping[str, float], best: str, before: float, after: float) -> Row:
        """How times compare with those of the dense kernel before and after them."""
        dense_ms, drift = (before + after) / 2, abs(after / before - 1)
        found: Row = {"t_dense_ms": {**known, best: dense_ms}, "dense": best, "dense_drift": drift}
        allowed = DRIFT[self.device.type]
        if drift > allowed:
            return found | {"status": f"drift: dense times differ by {drift:.0%}, more than {allowed:.0%}"}
        kernel = row["t_kernel_ms"]
        return found | {
            "eta": dense_ms * todo.fields["density_computed"] / kernel,
            "speedup_kernel": dense_ms / kernel,
            "speedup_total": dense_ms / row["t_med_ms"],
        }

    def _dense_ms(self, best: Point, point: Point) -> float | None:
        """The time of the dense kernel now, None if it fails; begun and ended as a point, so that a hang has its name."""
        self.on_begin(best.row)
        case, rep = self._case_of(best), self.asked.rep_ms
        ms, _ = self._tried(lambda: timed(work(best, case).call, self.device, rep).median)
        if ms is None:
            torch.cuda.empty_cache()
        self.on_begin(point.row)
        return ms

    def _case_of(self, point: Point) -> Case:
        name = (point.shape, point.inputs)
        if self._case is None or self._case[0] != name:
            self._case, self._before = None, None  # first, so that two sets of inputs never lie in memory at once
            self._case = (name, Case(*name, point.dtype, point.seed, self.device))
        return self._case[1]


def _one_line(error: BaseException) -> str:
    """The message without its line breaks, cut at a length that a table of reasons can hold."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def code() -> str:
    """A fingerprint of what is measured and how: rows of two states of the kernels do not compare."""
    kernels = Path(str(kernel_attention.__file__)).resolve().parent.parent
    files = [*kernels.rglob("*.py"), *(Path(__file__).resolve().with_name(f"{name}.py") for name in MEASURES)]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.as_posix()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Reads a job, a JSON file named on the command line; answers in lines of JSON on stdout.

    {"hello": environment}, then for each point {"begin": its fields} and {"row": the row}, and {"end": whether this is
    all}; if not, another worker has to go on.
    """
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    asked = make_settings(**job["settings"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print; their words go with the errors
    threading.Thread(target=end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    device = torch.device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if device.index is not None:
        torch.cuda.set_device(device)
    # Before the first point: a device that is stuck is no kernel's fault.
    rates = ceilings(device, DTYPES[asked.dtype])
    say(hello=environment(asked))
    bench = Bench(asked, lambda row: say(begin=row), rates, job["dense"], job["graphs"], job["process"])
    for row in bench.rows(set(job["done"]), job["avoid"]):
        say(row=row)
    say(end=not bench.spoilt)
    answers.close()
    os._exit(0)  # the thread waits for a parent that waits for us


if __name__ == "__main__":
    main()
