"""Times a denoising step of a pipeline and its self-attention, and how sparse attention would do at that very shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall, DenseAttention
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import AxisOrder, Band
from diffusers_accel.methods.select import Inputs

SLOW_LAYER_MS = 3_000.0  # attention of one layer that takes longer is not repeated to measure the sparse efficiency
REPEATS = 5  # after one run to warm up
PROMPT = "a red fox runs through fresh snow"


class StepTiming:
    """One denoising step, run dense, and what one layer's attention was given in it.

    step_ms: the whole step, all its branches. attention_ms: self-attention's part. layout: how the tokens of a call lie.
    """

    def __init__(self) -> None:
        self.step_ms = 0.0
        self.attention_ms = 0.0
        self.layout: TokenLayout
        self._dense: DenseAttention
        self._qkv: tuple[Tensor, Tensor, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v, which a model may keep in another type than some of its weights."""
        return self._qkv[0].dtype

    @property
    def device(self) -> torch.device:
        """Where attention runs, also under offload."""
        return self._qkv[0].device

    def efficiencies(self, densities: Sequence[float]) -> dict[float, float | None]:
        """Realised density -> dense time x density / sparse time of one layer's attention; None where it is too slow to try.

        The keys are what a band of each asked density reads in this layout, so there can be fewer of them.
        """
        q, k, v = self._qkv
        patterns = {pattern.density: pattern for pattern in (self._band(density) for density in densities)}
        if _milliseconds(lambda: self._dense(q, k, v), q.device) > SLOW_LAYER_MS:
            return dict.fromkeys(patterns)
        return {density: density * self._advantage(pattern) for density, pattern in patterns.items()}

    def _advantage(self, pattern: BlockPattern) -> float:
        """Dense time / sparse time, medians of runs in turn, so that a drift of the machine hits both."""
        q, k, v = self._qkv
        times = []
        for _ in range(1 + REPEATS):
            dense = _milliseconds(lambda: self._dense(q, k, v), q.device)
            times.append((dense, _milliseconds(lambda: attention(q, k, v, pattern), q.device)))
        dense_ms, sparse_ms = (statistics.median(column) for column in zip(*times[1:], strict=True))
        return dense_ms / sparse_ms

    def _band(self, density: float) -> BlockPattern:
        q = self._qkv[0]
        call = AttentionCall(self.layout, heads=tuple(range(q.shape[2])))
        return Band(density).pattern(call, AxisOrder(), {}, Inputs(q.device))


class _Engine:
    """Attends densely, as the user has chosen, and notes what it was given."""

    def __init__(self, timing: StepTiming) -> None:
        self._timing = timing

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        self._timing._qkv, self._timing.layout, self._timing._dense = (q, k, v), call.layout, call.dense
        return call.dense(q, k, v)


def time_step(pipe: Any, call: dict[str, Any]) -> StepTiming:
    """Runs the call, without decoding a video, and times its last step.

    The pipeline computes what it always does, through the user's own attention backend, and is left as it was. A prompt and
    a seed are filled in where the call has none.

    Raises:
        ValueError: the pipeline is patched already.
    """
    timing = StepTiming()
    device = torch.device(pipe._execution_device)
    with attach(pipe, lambda site: _Engine(timing)) as attachment, attachment.timed() as timer:
        marks = [(time.perf_counter(), 0.0)]

        def mark(*_: Any) -> dict[str, Any]:
            _synchronize(device)
            marks.append((time.perf_counter(), timer.attention_ms))
            return {}

        prompt = {} if {"prompt", "prompt_embeds"} & set(call) else {"prompt": PROMPT}
        seed = {"generator": torch.Generator("cpu").manual_seed(0)}
        pipe(**{**prompt, **seed, **call, "output_type": "latent", "callback_on_step_end": mark})
    (start, before), (stop, after) = marks[-2:]
    timing.step_ms, timing.attention_ms = (stop - start) * 1e3, after - before
    return timing


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
