"""What each candidate costs here: the time of its kernel, per head, on this device at this shape.

The paper counts skipped blocks. A block is not a unit of time: short rows, gathered keys and the re-layout of an order cost
extra, and by how much depends on the device, so a search that counts blocks picks candidates that save nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.engine import Launch, deal, run
from diffusers_accel.files import read_json, write_json
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Context, Method
from diffusers_accel.shape import ModelShape
from diffusers_accel.site import DenseAttention

FORMAT, VERSION = "diffusers_accel.cost", 1
MIN_ROUNDS = 3
MIN_SECONDS = 0.002  # calls shorter than this are repeated within one timing


@dataclass(frozen=True)
class Cost:
    """Time per head and call of each candidate.

    Args:
        ms: per transformer, one time in ms per candidate, in the order of the candidates; the first is dense.
        device: what it was measured on.
        tokens: sequence length.
        batch: batch rows of a call.
        rounds: how often each candidate was timed; `ms` is the median.
    """

    ms: dict[str, tuple[float, ...]]
    device: str
    tokens: int
    batch: int
    rounds: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON under a temporary name and renames it."""
        times = {name: list(each) for name, each in self.ms.items()}
        data = {"format": FORMAT, "version": VERSION, "ms": times, "device": self.device}
        write_json(Path(path), {**data, "tokens": self.tokens, "batch": self.batch, "rounds": self.rounds})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cost:
        """Reads what `save` wrote; anything else is refused with a ValueError."""
        data: Any = read_json(Path(path))
        expected = {"format", "version", "ms", "device", "tokens", "batch", "rounds"}
        if (
            not isinstance(data, dict)
            or set(data) != expected
            or (data["format"], data["version"]) != (FORMAT, VERSION)
        ):
            what = f"{FORMAT} version {VERSION} with the keys {sorted(expected)}"
            raise ValueError(f"{path}: expected {what}; measure the cost again")
        times = {name: tuple(float(each) for each in row) for name, row in data["ms"].items()}
        if not all(np.isfinite(row).all() and min(row) >= 0 for row in times.values()):
            raise ValueError(f"{path}: expected times of 0 ms or more, found {times}; measure the cost again")
        return cls(times, data["device"], data["tokens"], data["batch"], data["rounds"])


def launches(
    candidates: tuple[Method, ...],
    layout: TokenLayout,
    transformer: str,
    model: ModelShape,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> list[Launch]:
    """For each candidate the launch in which all heads of the first layer take it."""
    heads = tuple(range(model.heads))
    return [
        deal((method,) * model.heads, Context(layout, transformer, 0, heads, tensors), device) for method in candidates
    ]


def time_candidates(
    planned: list[Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: DenseAttention,
    seconds: float,
    on_round: Callable[[float], None] = lambda share: None,
) -> tuple[np.ndarray, int]:
    """Times every launch on q, k, v [B, S, H, D], in rounds.

    In each round a dense call stands before every few candidates, and a candidate's time is taken relative to the dense
    calls of its round: what slows the machine down for a while slows both.

    Args:
        planned: `launches`; the first is dense.
        dense: the user's own attention.
        seconds: rounds go on until then, at least three.
        on_round: called after each round with the share of `seconds` that is over.

    Returns:
        ms per head of each candidate (median over rounds), and the number of rounds.
    """

    def timed(launch: Launch) -> float:
        return _time(lambda: dense(q, k, v) if launch is planned[0] else run(launch, q, k, v, dense), q.device)

    for launch in planned:  # compile, load and touch everything once
        timed(launch)
    ratios: list[list[float]] = []
    dense_ms: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < MIN_ROUNDS or time.perf_counter() - begin < seconds:
        row, anchors = [], []
        for index, launch in enumerate(planned[1:]):
            if index % 4 == 0:
                anchors.append(timed(planned[0]))
            row.append(timed(launch))
        reference = float(np.median([*anchors, timed(planned[0])]))
        ratios.append([each / reference for each in row])
        dense_ms.append(reference)
        on_round(min(1.0, (time.perf_counter() - begin) / seconds))
    per_head = float(np.median(dense_ms)) / q.shape[2]
    return per_head * np.array([1.0, *np.median(ratios, axis=0)]), len(ratios)


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
