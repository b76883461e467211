"""One self-attention module at run time: where it is, how its tokens lie now, and what attends for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_accel.clock import Clock
from diffusers_accel.families import Family
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Engine(Protocol):
    """What attends at a site: a plan at work, or a search that watches."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        """q, k, v: [B, S, H, D] after norm and RoPE -> the attention output, same shape and dtype.

        `dense(q, k, v)` is the attention that the user has chosen for the model, for any number of heads.
        """
        ...


class Model:
    """A transformer of a pipeline, as its sites see it; a forward pre-hook that notes how its tokens lie."""

    def __init__(self, name: str, module: nn.Module, family: Family, clock: Clock) -> None:
        self.name = name
        self.module = module
        self.family = family
        self.clock = clock
        self.shape: ModelShape = family.shape(module)
        self._observation: tuple[int, ...] | None = None
        self._layouts: dict[tuple[int, ...], TokenLayout] = {}

    def observe(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Traced by torch.compile: it stores sizes and leaves the rest to run time.
        self._observation = self.family.observe(args, kwargs)

    def layout(self) -> TokenLayout:
        """How the tokens of the running call lie."""
        observation = self._observation
        if observation is None:
            raise RuntimeError(
                f"self-attention of {self.name} was called outside the model's own forward: its layout is unknown"
            )
        if observation not in self._layouts:
            self._layouts[observation] = self.family.layout(self.module.config, observation)
        return self._layouts[observation]


@dataclass
class Timer:
    """Adds up the time spent in attention while it is attached to sites."""

    _cpu_seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def run(self, call: Callable[[], Tensor], device: torch.device) -> Tensor:
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out = call()
            stop.record()
            self._events.append((start, stop))
            return out
        begin = time.perf_counter()
        out = call()
        self._cpu_seconds += time.perf_counter() - begin
        return out

    @property
    def attention_ms(self) -> float:
        """Milliseconds so far; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        return self._cpu_seconds * 1e3 + sum(start.elapsed_time(stop) for start, stop in self._events)


class Site:
    """One self-attention module: what attends there (`engine`) and what a search may want to know about it."""

    def __init__(self, model: Model, layer: int, name: str, module: nn.Module, dense: DenseAttention) -> None:
        self.model = model
        self.layer = layer
        self.name = name
        self.module = module
        self.dense = dense
        self.engine: Engine
        self.attachment: Any = None
        self.timer: Timer | None = None

    @property
    def transformer(self) -> str:
        """The pipeline's name of the model that this site belongs to."""
        return self.model.name

    @property
    def clock(self) -> Clock:
        return self.model.clock

    def layout(self) -> TokenLayout:
        return self.model.layout()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, H, D] -> [B, S, H, D]."""
        if self.timer is None:
            return self.engine.attend(q, k, v, self.dense)
        return self.timer.run(lambda: self.engine.attend(q, k, v, self.dense), q.device)
