"""One clip of a pipeline: the same prompt, seed and initial noise whatever is patched, timed, with its peak memory."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusers_accel.support.seeded import drawn, seeded

# What a report sets itself, with what the user should do instead.
RESERVED = {
    "prompt": "give it in `prompts`",
    "prompt_embeds": "give {'prompt_embeds': ...} as an item of `prompts`",
    "generator": "give `seeds`",
    "latents": "give `seeds`; the noise of a clip is made once and shared",
    "output_type": "frames are always raw arrays",
    "return_dict": "leave it out",
    "num_videos_per_prompt": "give more `seeds`",
    "callback_on_step_end": "the progress bar and the metrics of latents use it",
}
RSS_PERIOD_S = 0.02

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True)
class PipelineRun:
    """One call of the pipeline.

    frames: [F, H, W, 3] float32 in 0..1, before any video encoder. milliseconds: of the whole call, text encoder and
    decoder included. peak_bytes: highest memory during the call (see `memory_kind`). middle: ms at half of the call, on the
    process's clock. latents: what denoising ended with, float32 in the pipeline's own shape, of each chunk where it
    makes several; none where its `callback_on_step_end` shows none.
    """

    frames: np.ndarray
    milliseconds: float
    peak_bytes: int
    middle: float = 0.0
    latents: tuple[np.ndarray, ...] = ()


def prompt_text(prompt: Prompt, number: int) -> str:
    """What a report prints for a prompt."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    return text if isinstance(text, str) else f"embedded prompt {number + 1}"


class SharedNoise:
    """Makes sure that every run of a clip gets the same noise, bit for bit.

    The noise comes from a CPU generator of the clip's seed, fresh for each run; what the pipeline made of it at the start of the
    first run is kept and later runs are held against it. So is how much was drawn by each later chunk and by the end, as the
    same seed gives the same noise for as long as as much is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first: list[torch.Tensor] | None = None
        self._drawn: list[list[torch.Tensor]] | None = None

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[torch.Generator]:
        """A fresh generator; the pipeline's `prepare_latents` is observed meanwhile."""
        stock = getattr(pipe, "prepare_latents", None)
        if stock is None:
            raise TypeError(
                f"expected a pipeline with prepare_latents, by which runs are known to start from one noise, found none in "
                f"{type(pipe).__name__}: its clips cannot be compared"
            )
        device, states = device_of(pipe), []

        def observed(*args: Any, **kwargs: Any) -> Any:
            made = stock(*args, **kwargs)
            states.append(drawn(generator, device))
            if len(states) > 1:  # a later chunk, which may hold what was generated before it
                return made
            parts = made if isinstance(made, tuple) else (made,)
            noise = [part.detach().cpu().clone() for part in parts if isinstance(part, torch.Tensor)]
            if self._first is None:
                self._first = noise
            elif len(noise) != len(self._first) or not all(map(torch.equal, noise, self._first)):
                raise RuntimeError(
                    f"seed {self.seed}: expected the clip's initial noise again, found another, so nothing can be compared; "
                    f"does {type(pipe).__name__} draw noise from elsewhere than its generator?"
                )
            return made

        with attribute(pipe, "prepare_latents", observed), seeded(self.seed, device) as generator:
            yield generator
            states.append(drawn(generator, device))
        self._check_drawn(pipe, states)

    def _check_drawn(self, pipe: Any, states: list[list[torch.Tensor]]) -> None:
        if self._drawn is None:
            self._drawn = states
            return
        pairs = zip(states, self._drawn, strict=False)
        alike = [all(map(torch.equal, mine, first)) for mine, first in pairs]
        if len(states) != len(self._drawn) or not all(alike):
            raise RuntimeError(
                f"seed {self.seed}: expected a run to draw as much noise as the first of this clip, found more or less in one of "
                f"its chunks, so nothing can be compared; does {type(pipe).__name__} draw by what it has generated?"
            )


@contextmanager
def attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this very object set for a while; afterwards its `__dict__` is as it was."""
    before = vars(thing).copy()
    setattr(thing, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(thing, name, before[name])
        else:
            delattr(thing, name)


def generate(
    pipe: Any, prompt: Prompt, noise: SharedNoise, call: Mapping[str, Any], on_step: Callable[[], None] | None = None
) -> PipelineRun:
    """Run the pipeline once, as it is."""
    arguments = {**call, **({"prompt": prompt} if isinstance(prompt, str) else prompt), "output_type": "np"}
    ends = _Ends(on_step)
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        arguments["callback_on_step_end"] = ends
    with noise.watching(pipe) as generator, _PeakMemory(pipe) as memory:
        start = time.perf_counter()
        output = pipe(**arguments, generator=generator)
        memory.synchronize()
        milliseconds = (time.perf_counter() - start) * 1e3
    frames = np.asarray(output.frames if hasattr(output, "frames") else output.video)  # Cosmos 3 calls it so
    if frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3:
        raise TypeError(f"expected frames [1, F, H, W, 3] of {type(pipe).__name__}, found {list(frames.shape)}")
    return PipelineRun(
        np.ascontiguousarray(frames[0], dtype=np.float32),
        milliseconds,
        memory.peak,
        start * 1e3 + milliseconds / 2,
        tuple(each.float().cpu().numpy() for each in ends.latents),
    )


class _Ends:
    """A callback of a pipeline for the end of each step, which keeps the latents that the last one leaves, of each chunk."""

    def __init__(self, on_step: Callable[[], None] | None) -> None:
        self.latents: list[torch.Tensor] = []
        self._on_step, self._step = on_step, -1

    def __call__(self, pipe: Any, step: int, timestep: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        latents = given.get("latents")
        if isinstance(latents, torch.Tensor):
            if step > self._step and self.latents:  # else another chunk begins
                self.latents.pop()
            self.latents.append(latents.detach().clone())
            self._step = step
        if self._on_step:
            self._on_step()
        return {}


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes, also under offload."""
    return torch.device(pipe._execution_device)


def memory_kind(pipe: Any) -> str:
    """What `PipelineRun.peak_bytes` counts."""
    return (
        "CUDA allocator"
        if device_of(pipe).type == "cuda"
        else "resident set of the whole process, sampled: the model is in it"
    )


class _PeakMemory:
    """Peak bytes inside a `with`: of the CUDA allocator, elsewhere of the process's resident set."""

    def __init__(self, pipe: Any) -> None:
        device = device_of(pipe)
        self._cuda = device if device.type == "cuda" else None
        self._stop = threading.Event()
        self.peak = 0

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)

    def __enter__(self) -> _PeakMemory:
        if self._cuda:
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated(self._cuda)
        else:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._stop.wait(RSS_PERIOD_S):
                break
