"""What each candidate costs here: the time of its kernel, per head, on this device at this shape.

The paper counts skipped blocks. A block is not a unit of time: short rows, gathered keys and the re-layout of an order cost
extra, and by how much depends on the device, so a search that counts blocks picks candidates that save nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import Kind, Schema, load_document, printable, quoted, save_document
from diffusers_accel.methods import Method
from diffusers_accel.methods.blocks import FOREVER
from diffusers_accel.methods.uses import Tensors
from diffusers_accel.run.launch import run
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import Partition, partition

KIND = Kind("diffusers_accel.cost", 3, "delete the file and measure the cost again")
MIN_ROUNDS = 3
MIN_SECONDS = 0.002  # calls shorter than this are repeated within one timing


class Cost(Schema, frozen=True):
    """Time per head and call of each candidate.

    Args:
        ms: per transformer, one time in ms per candidate, in the order of the candidates; the first is dense. Of a candidate
            that reuses, a call that does so.
        refresh_ms: of such a candidate a call that refreshes; for all others as `ms`.
        device: what it was measured on.
        tokens: sequence length.
        batch: batch rows of a call.
        rounds: how often each candidate was timed; `ms` is the median.
        kinds: of a transformer whose layers see other tokens, the table of each layer by its name in `ms`, which has further ones
            for them. Layers of all others have that of their transformer.

    Raises:
        ValueError: a time is no finite number of 0 or more, of dense above 0, the tables are not of the same transformers and
            candidates, or a layer has none.
    """

    ms: dict[str, tuple[float, ...]]
    refresh_ms: dict[str, tuple[float, ...]]
    device: str
    tokens: int
    batch: int
    rounds: int
    kinds: dict[str, tuple[str, ...]] = {}

    def __post_init__(self) -> None:
        if not self.ms or set(self.ms) != set(self.refresh_ms):
            found = (quoted(sorted(each)) for each in (self.ms, self.refresh_ms))
            raise ValueError("ms, refresh_ms: expected times of the same transformers, found {} and {}".format(*found))
        candidates = len(next(iter(self.ms.values())))
        for kind, times in (("ms", self.ms), ("refresh_ms", self.refresh_ms)):
            for name, row in times.items():
                path = f"{kind}.{printable(name[:60])}"
                if not row or len(row) != candidates:
                    raise ValueError(
                        f"{path}: expected {max(1, candidates)} times, one per candidate, found {len(row)}"
                    )
                if not np.isfinite(row).all() or min(row) < 0:
                    raise ValueError(f"{path}: expected finite times of 0 ms or more, found {quoted(row)}")
                if row[0] == 0:
                    raise ValueError(f"{path}[0]: expected a time above 0 ms of dense attention, found 0")
        for name, tables in self.kinds.items():
            if unknown := sorted({name, *tables} - set(self.ms)):
                raise ValueError(
                    f"kinds.{printable(name[:60])}: expected names of tables in ms, found {quoted(unknown[0])}"
                )
        for what in ("tokens", "batch", "rounds"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what}: expected 1 or more, found {quoted(getattr(self, what))}")

    def of_layers(self, transformer: str) -> tuple[np.ndarray, np.ndarray]:
        """ms and refresh_ms of a transformer's layers, fp64 [layers, candidates]; [1, candidates] where they are all alike."""
        tables = self.kinds.get(transformer, (transformer,))
        ms, refresh_ms = (np.array([times[name] for name in tables]) for times in (self.ms, self.refresh_ms))
        return ms, refresh_ms

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        save_document(Path(path), KIND, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cost:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            FileError: it is something else, of another version, or damaged; the message says which and what to do.
        """
        return load_document(Path(path), KIND, Cost)


def alike(method: Method) -> Method:
    """A method that costs the same and stands for all that do: into which order tokens are sorted makes no difference."""
    return Method(
        method.order.representative, method.select.representative, method.precision, method.rest.representative
    )


def launch_all(method: Method, call: AttentionCall, tensors: Tensors, device: torch.device) -> Partition:
    """The launch in which all heads of a call take a method."""
    return partition((method,) * len(call.heads), call, tensors, device)


def time_candidates(
    planned: Sequence[Partition],
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seconds: float,
    on_round: Callable[[float], None] = lambda share: None,
) -> tuple[np.ndarray, int]:
    """Times every launch on q, k, v [B, S, H, D], in rounds.

    In each round a dense call stands before every few candidates, and a candidate's time is taken relative to the dense
    calls of its round: what slows the machine down for a while slows both. Of a launch that reuses, a call that refreshes
    and one that does not are timed one after the other, and what it keeps is dropped again.

    Args:
        planned: of `launch_all`, and of `alike` methods where they keep something; the first is dense.
        call: whose heads they partition.
        seconds: rounds go on until then, at least three.
        on_round: called after each round with the share of `seconds` that is over.

    Returns:
        ms per head of each launch, fp64 [launches, 2]: of a call, and of one that refreshes; medians over rounds. And the
        number of rounds.
    """

    dense = call.dense
    assert dense is not None

    def timed(launch: Partition) -> tuple[float, float]:
        if launch is planned[0]:
            ms = _time(lambda: dense(q, k, v), q.device)
        elif not any(method.timed for method in launch.methods):
            ms = _time(lambda: run(launch, call, q, k, v).out, q.device)
        else:
            cycle = _Cycle(launch, call, q, k, v)
            refresh = _time(cycle.refresh, q.device)
            return _time(cycle.go_on, q.device), refresh
        return ms, ms

    for launch in planned:  # compile, load and touch everything once
        timed(launch)
    ratios: list[np.ndarray] = []
    dense_ms: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < MIN_ROUNDS or time.perf_counter() - begin < seconds:
        row, anchors = [], []
        for index, launch in enumerate(planned[1:]):
            if index % 4 == 0:
                anchors.append(timed(planned[0])[0])
            row.append(timed(launch))
        reference = float(np.median([*anchors, timed(planned[0])[0]]))
        ratios.append(np.array([(reference, reference), *row]) / reference)
        dense_ms.append(reference)
        on_round(min(1.0, (time.perf_counter() - begin) / seconds))
    per_head = float(np.median(dense_ms)) / q.shape[2]
    return per_head * np.median(ratios, axis=0), len(ratios)


class _Cycle:
    """The calls of a launch that keeps something, step by step."""

    def __init__(self, launch: Partition, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._launch, self._call, self._qkv = launch, call, (q, k, v)

    def refresh(self) -> Tensor:
        """The first step of a generation."""
        self._cache, self._step = LayerCache(), 0
        return self._run()

    def go_on(self) -> Tensor:
        """The next one."""
        self._step += 1
        return self._run()

    def _run(self) -> Tensor:
        now = (self._step, FOREVER)
        return run(self._launch, replace(self._call, now=now), *self._qkv, self._cache).out


def describe_device(device: torch.device) -> str:
    """The device's name and, on a CPU, the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _time(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of one call, which is repeated when it is too short for the clock."""
    _wait(device)
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        _wait(device)
        spent = time.perf_counter() - begin
        if spent >= MIN_SECONDS:
            return spent * 1e3 / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
