"""Times of a few layers of a transformer, stock and under each method, and the whole model that follows from them.

Every method is measured between two runs of the stock transformer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from diffusers_accel.api import Patch, patch
from diffusers_accel.evals.kernel_bench.peers import Missing
from diffusers_accel.evals.machine import gpu_state
from diffusers_accel.evals.step_bench.models import BenchModel, Size
from diffusers_accel.evals.step_bench.rivals import Rival, is_rival, rival
from diffusers_accel.methods import NAMED
from diffusers_accel.methods.named import FOR_EVERY_MODEL

STOCK = "stock"  # diffusers' own attention, unpatched
STEPS = 6
WARM_UP = 2  # steps
Row: TypeAlias = dict[str, Any]


@dataclass
class Marks:
    """When each forward call and each layer of it begins and ends, read without waiting for the device."""

    device: torch.device
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    layers: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """The length of each (begin, end); waits for the device."""
        if self.device.type != "cuda":
            return [1e3 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]

    @contextmanager
    def watching(self, transformer: nn.Module, stacks: Mapping[str, int]) -> Iterator[None]:
        """Inside, the layers of these stacks are timed."""
        begun: list[Any] = []
        handles = []
        for name in stacks:
            pairs = self.layers.setdefault(name, [])
            for block in getattr(transformer, name):
                handles.append(block.register_forward_pre_hook(lambda *_: begun.append(self.now())))
                handles.append(
                    block.register_forward_hook(lambda *_, pairs=pairs: pairs.append((begun.pop(), self.now())))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def measure(
    name: str,
    model: BenchModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: Size | None = None,
    layers: int = 2,
    steps: int = STEPS,
    methods: Sequence[str] = FOR_EVERY_MODEL,
    on_row: Callable[[Row], None] = lambda row: None,
    on_begin: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Time the forward calls of a schedule, as they are and with each method, and extrapolate them to the whole model.

    Args:
        size: (frames, height, width) of the latents; None is the model's own.
        layers: of each kind that are built.
        steps: of the schedule. Steps that a method leaves dense, or at which it refreshes, are part of what it costs.
        methods: names of `FOR_EVERY_MODEL`, or of rivals (`rivals`), which are measured in the same way.
        on_row: called with each row as it is done.
        on_begin: called with the fields of the row before each run that belongs to it.

    Returns:
        One row for the first run of the stock transformer and one for each method; means over layers and steps, in ms. A
        method that fails has a status instead of times.

    Raises:
        ValueError: an unknown method, or latents that are not whole tokens.
    """
    size = size or model.size
    model.check(size)
    check_methods(methods)
    here = place(name, model, size, dtype, layers, steps)
    transformer = _built(model, layers, device, dtype)
    inputs = model.inputs(size, device, dtype)
    run = partial(_schedule, transformer, inputs, model, device, steps)

    on_begin(here | {"method": STOCK})
    before = run(None)
    rows = [here | {"method": STOCK} | _whole(model, before, before, 0) | _state(device)]
    on_row(rows[-1])
    for method in methods:
        on_begin(here | {"method": method})
        row = here | {"method": method}
        try:
            with _applied(method, transformer, name, steps) as applied:
                times = run(applied)
                done = _told(applied, method, model)
        except Missing as error:
            row |= {"status": f"missing: {one_line(error)}"}
        except Exception as error:
            if device.type == "cuda":  # raises again where the context is lost; another process goes on then
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
            row |= {"status": f"failed: {type(error).__name__}: {one_line(error)}"}
        else:
            on_begin(row)  # a stock transformer that has run once hangs by what came between
            after = run(None)
            row |= _compared(model, times, before, after, done) | _state(device)
            before = after
        rows.append(row)
        on_row(row)
    return rows


def check_methods(methods: Sequence[str]) -> None:
    """Raises ValueError where one is neither a named method nor a rival."""
    if unknown := [method for method in methods if method not in FOR_EVERY_MODEL and not is_rival(method)]:
        known = f"{', '.join(FOR_EVERY_MODEL)}, or sparsevideo:<its method>"
        raise ValueError(f"methods must be among {known}, found {', '.join(unknown)}")


def place(name: str, model: BenchModel, size: Size, dtype: torch.dtype, layers: int, steps: int) -> Row:
    """The fields of a row that say what was to be measured, but for the method."""
    return {
        "model": name, "latents": list(size), "dtype": str(dtype).removeprefix("torch."), "layers_measured": layers,
        "layers": dict(model.stacks), "steps": steps, "passes": model.passes,
    }  # fmt: skip


def one_line(error: BaseException) -> str:
    """The message without its line breaks, cut at a length that a list of reasons can hold."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@contextmanager
def _applied(method: str, transformer: nn.Module, name: str, steps: int) -> Iterator[Patch | Rival]:
    """Inside, the transformer attends by this method, in all layers that there are."""
    if is_rival(method):
        with rival(method, transformer, name, steps) as other:
            yield other
        return
    # Of the few layers none is kept dense; what a recipe keeps is added in the extrapolation.
    with patch(transformer, method, dense_layers=0) if method != "dense" else patch(transformer, method) as patched:
        yield patched


def _told(applied: Patch | Rival, method: str, model: BenchModel) -> Row:
    """What a method says of itself: the layers of the whole model that it keeps dense, and of ours density, cache and kernels."""
    total = sum(model.stacks.values())
    if isinstance(applied, Rival):
        ratio = applied.dense_layer_ratio
        return {"kept": max(1, int(ratio * total)) if ratio > 0 else 0, "config": applied.config}
    kept, done = NAMED[method]().dense_layers, applied.report()
    return {
        "kept": kept,
        "density": (kept + (total - kept) * (done.density or 0.0)) / total,
        "cache_bytes": done.cache_bytes * (total - kept) // len(done.rows) * model.passes,
        "kernels": sorted({kernel for each in done.rows for kernel in each["kernels"]}),
        "notes": sorted({note for each in done.rows for note in each["notes"]} | set(done.notes)),
    }


def _compared(model: BenchModel, times: Row, before: Row, after: Row, done: Row) -> Row:
    """The whole model under a method, beside the stock runs before and after it."""
    stock = {key: (before[key] + after[key]) / 2 for key in before}
    row, stock_row = _whole(model, times, stock, done["kept"]), _whole(model, stock, stock, 0)
    return (
        row
        | {
            "stock_ms_step": stock_row["ms_step"],
            "stock_drift": sum(after.values()) / sum(before.values()) - 1,
            "speedup": stock_row["ms_step"] / row["ms_step"],
        }
        | {name: value for name, value in done.items() if name != "kept"}
    )


def _state(device: torch.device) -> Row:
    return {"status": "ok"} | ({"gpu": gpu_state(device)} if device.type == "cuda" else {})


@torch.no_grad()
def _built(model: BenchModel, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer in `dtype`, but for what diffusers keeps in fp32 when it loads a checkpoint."""
    with torch.device(device):
        transformer = model.build(layers).eval()
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return transformer


def _whole(model: BenchModel, times: Row, stock: Row, kept: int) -> Row:
    """What a pass and a step of the whole model take, its first `kept` layers as in stock."""
    ms_pass = times["around"]
    for name, number in model.stacks.items():
        as_stock = min(kept, number)
        ms_pass += as_stock * stock[name] + (number - as_stock) * times[name]
        kept -= as_stock
    layers = {name: times[name] for name in model.stacks}
    return {"ms_layer": layers, "ms_around": times["around"], "ms_pass": ms_pass, "ms_step": model.passes * ms_pass}


@torch.no_grad()
def _schedule(
    transformer: nn.Module,
    inputs: dict[str, Any],
    model: BenchModel,
    device: torch.device,
    steps: int,
    applied: Patch | Rival | None,
) -> Row:
    """Means over a whole schedule in ms: a layer of each stack, and what is `around` the layers of a call.

    Means, as dense steps and refreshes count. Warmed up by the last steps of a schedule, at which every method does what it
    does: a kernel is compiled, memory is taken, something that can be kept is kept and reused.
    """
    _steps(transformer, inputs, device, steps, range(max(0, steps - WARM_UP), steps), applied)
    marks = Marks(device)
    with marks.watching(transformer, model.stacks):
        marks.calls = _steps(transformer, inputs, device, steps, range(steps), applied)
    layers = {name: marks.milliseconds(pairs) for name, pairs in marks.layers.items()}
    around = sum(marks.milliseconds(marks.calls)) - sum(sum(times) for times in layers.values())
    return {"around": around / steps} | {name: statistics.fmean(times) for name, times in layers.items()}


def _steps(
    transformer: nn.Module,
    inputs: dict[str, Any],
    device: torch.device,
    steps: int,
    which: range,
    applied: Patch | Rival | None,
) -> list[tuple[Any, Any]]:
    """Runs these steps of a schedule after a fresh start; when each begins and ends."""
    marks = Marks(device)
    if applied is not None:
        applied.clear()
    # Others know a step by its timestep. All are made first, so that none waits for the device.
    times = [torch.full_like(inputs["timestep"], 1000 - 999 * step // steps) for step in range(steps)]
    for step in which:
        if applied is not None:
            applied.step(step, steps)
        begin = marks.now()
        transformer(**inputs | {"timestep": times[step]}, return_dict=False)
        marks.calls.append((begin, marks.now()))
    return marks.calls
