"""Times a denoising step of a pipeline and its self-attention, and how sparse attention would do at that very shape."""

from __future__ import annotations

import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import Tensor

from diffusers_accel.api import attach
from diffusers_accel.attach.forward_timer import ForwardTimer
from diffusers_accel.attach.site import Timer
from diffusers_accel.call import AttentionCall, DenseAttention
from diffusers_accel.families import find
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import AxisOrder, Band, Method
from diffusers_accel.methods.select import Inputs
from diffusers_accel.run.launch import run
from diffusers_accel.run.partition import partition
from diffusers_accel.support.call_parameters import parameters_of

SLOW_LAYER_MS = 3_000.0  # attention of one layer that takes longer is not repeated to measure the sparse efficiency
REPEATS = 5  # after one run to warm up
PROMPT = "a red fox runs through fresh snow"
CALLBACK = "callback_on_step_end"
STEPS, STAGES = "num_inference_steps", "pyramid_num_inference_steps_list"  # of which a pipeline has one


class StepTiming:
    """One denoising step, run dense, and what the largest attention of it was given.

    step_ms: the whole step, all its branches. attention_ms: self-attention's part; forward_ms: that of the transformer's
    `forwards`. layouts: how the tokens of its calls lay, and how many calls lay so. layout: of the largest.
    """

    def __init__(self) -> None:
        self.step_ms = 0.0
        self.attention_ms = 0.0
        self.forward_ms = 0.0
        self.forwards = 0
        self.layouts: Counter[TokenLayout] = Counter()
        self.layout: TokenLayout
        self._dense: DenseAttention
        self._qkv: tuple[Tensor, Tensor, Tensor]
        self._largest = 0  # queries x keys

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v, which a model may keep in another type than some of its weights."""
        return self._qkv[0].dtype

    @property
    def device(self) -> torch.device:
        """Where attention runs, also under offload."""
        return self._qkv[0].device

    def begin(self) -> None:
        """A step begins: what was noted of the last one is left out."""
        self.layouts.clear()
        self._largest = 0

    def note(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keeps the largest call of the step: branches, layers and batch rows may differ."""
        assert call.dense is not None
        self.layouts[call.layout] += 1
        size = len(q) * q.shape[1] * k.shape[1]
        if size > self._largest:
            self._largest = size
            self._qkv, self.layout, self._dense = (q, k, v), call.layout, call.dense

    def efficiencies(self, densities: Sequence[float]) -> dict[float, tuple[float, float | None]]:
        """Density -> what a band of it reads in this layout, and dense time x that / sparse time of one layer's attention; None
        where that is too slow to try."""
        q, k, v = self._qkv
        patterns = {density: self._band(density) for density in densities}
        if _milliseconds(lambda: self._dense(q, k, v), q.device) > SLOW_LAYER_MS:
            return {density: (pattern.density, None) for density, pattern in patterns.items()}
        known = {pattern.density: pattern for pattern in patterns.values()}  # on small grids several read the same
        found = {density: density * self._advantage(pattern) for density, pattern in known.items()}
        return {density: (pattern.density, found[pattern.density]) for density, pattern in patterns.items()}

    def read(self, method: Method) -> float:
        """The share of block pairs that a method reads here of the first head."""
        q, k, v = (x[:, :, :1] for x in self._qkv)
        call = AttentionCall(self.layout, heads=(0,))
        return float(run(partition((method,), call, {}, q.device), call, q, k, v).density)

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


class _Mark:
    """Where a step ends and the next begins: what the clock, attention and the forwards had come to."""

    def __init__(self, attention: Timer, forwards: ForwardTimer, device: torch.device) -> None:
        _synchronize(device)
        self.seconds = time.perf_counter()
        self.attention_ms = attention.attention_ms
        self.forward_ms, self.forwards = forwards.milliseconds, forwards.count


class SeenEnough(BaseException):
    """Raised in mid-run by what has seen enough. A modular pipeline reports an Exception as an error of its block."""


class _Engine:
    """Attends densely, as the user has chosen, and notes what it was given; says where a step begins, and which."""

    def __init__(self, timing: StepTiming, stepped: Callable[[tuple[int, int] | None], object]) -> None:
        self._timing = timing
        self._stepped = stepped
        self._now: tuple[int, int] | None = None

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        if call.now != self._now:
            self._now = call.now
            self._timing.begin()
            self._stepped(call.now)
        self._timing.note(call, q, k, v)
        return call.dense(q, k, v)


def asked_steps(pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """How many denoising steps a call takes, in each of its stages, of which most pipelines have one.

    Raises:
        TypeError: the pipeline has no argument that says so.
    """
    defaults = parameters_of(pipe)
    given = {**defaults, **call}
    asked = given.get(STEPS) if STEPS in defaults else given.get(STAGES)
    if not isinstance(asked, (int, list, tuple)):
        raise TypeError(
            f"expected a pipeline that takes {STEPS}, of which a few can be run, found a {type(pipe).__name__} that takes none. "
            'Run it once yourself: with patch(pipe, "dense") as p, p.timed() as timer gives timer.attention_ms'
        )
    return tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)


def time_step(pipe: Any, call: Mapping[str, Any], most: int | None = None) -> StepTiming:
    """Runs the call, without decoding a video, and times its last step; without a callback the last but one, after which a
    modular pipeline, which would decode, is stopped.

    The pipeline computes what it always does, through the user's own attention backend, and is left as it was. A prompt and
    a seed are filled in where the call has none.

    Args:
        most: steps that are run, of each stage where there are several; None: as the call says.

    Raises:
        ValueError: the pipeline is patched already.
    """
    timing = StepTiming()
    device = _device_of(pipe)
    has_callback = CALLBACK in parameters_of(pipe)
    forwards, marks = ForwardTimer(device), []
    engine = _Engine(
        timing, lambda now: None if has_callback else begun(now)
    )  # one for all sites, which sees each step once
    with attach(pipe, lambda site: engine) as attachment, attachment.timed() as timer:

        def mark(*_: Any) -> dict[str, Any]:
            marks.append(_Mark(timer, forwards, device))
            return {}

        def begun(now: tuple[int, int] | None) -> None:
            mark()
            if isinstance(pipe, ModularPipeline) and now is not None and now[0] == now[1] - 1 and len(marks) > 1:
                raise SeenEnough

        with forwards.on([model.module for model in attachment._models]):
            if has_callback:
                mark()
            until_seen(pipe, {**full_call(pipe, call, most), **({CALLBACK: mark} if has_callback else {})})
            if len(marks) == 1:  # a single step
                mark()
    if len(marks) < 2:
        raise TypeError(f"expected a pipeline that says which step runs, found a {type(pipe).__name__} that does not")
    before, after = marks[-2:]
    timing.step_ms = (after.seconds - before.seconds) * 1e3
    timing.attention_ms = after.attention_ms - before.attention_ms
    timing.forward_ms, timing.forwards = after.forward_ms - before.forward_ms, after.forwards - before.forwards
    return timing


def until_seen(pipe: Any, call: Mapping[str, Any]) -> None:
    """Runs the call until it ends or something in it says `SeenEnough`."""
    try:
        pipe(**call)
    except SeenEnough:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # what an offloaded pipeline does at the end of a call


def full_call(pipe: Any, call: Mapping[str, Any], most: int | None = None) -> dict[str, Any]:
    """The arguments of a call that decodes as little as it can, with a prompt and a seed, and of at most so many steps."""
    defaults = parameters_of(pipe)
    prompt = {} if "prompt" not in defaults or {"prompt", "prompt_embeds"} & set(call) else {"prompt": PROMPT}
    seed: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(0)}
    output: dict[str, Any] = {"output_type": _cheapest_output(pipe)}
    if isinstance(pipe, ModularPipeline):  # which warns of inputs that none of its blocks takes
        seed, output = ({name: each for name, each in some.items() if name in defaults} for some in (seed, output))
    steps: dict[str, Any] = {}
    if most is not None:
        name = STEPS if STEPS in defaults else STAGES
        asked = call.get(name, defaults[name])
        steps = {name: min(most, asked) if isinstance(asked, int) else [min(most, each) for each in asked]}
    return {**prompt, **seed, **call, **steps, **output}


def _cheapest_output(pipe: Any) -> str:
    """Latents; a tensor of frames where a pipeline decodes in any case, as Kandinsky6SRPipeline does, tile by tile."""
    return "latent" if '"latent"' in inspect.getsource(type(pipe).__call__) else "pt"


def _device_of(pipe: Any) -> torch.device:
    """Where the pipeline runs, also under offload; some do not say it."""
    model, _ = next(iter(find(pipe).values()))
    return torch.device(getattr(pipe, "_execution_device", None) or next(model.parameters()).device)


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
