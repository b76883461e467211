"""The time of whole forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusers_accel.attach.site import Timer


class ForwardTimer:
    """Adds up the time of the forwards of some transformers, and counts them."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._timer = Timer()
        self._device = device
        self._running: list[Any] = []

    @property
    def milliseconds(self) -> float:
        return self._timer.attention_ms

    @contextmanager
    def on(self, modules: Sequence[nn.Module]) -> Iterator[ForwardTimer]:
        hooks = [module.register_forward_pre_hook(self._begin) for module in modules]
        hooks += [module.register_forward_hook(self._end) for module in modules]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @torch.compiler.disable(reason="reads a clock")
    def _begin(self, *_: Any) -> None:
        running = self._timer.running(self._device)
        running.__enter__()
        self._running.append(running)

    @torch.compiler.disable(reason="reads a clock")
    def _end(self, *_: Any) -> None:
        self._running.pop().__exit__(None, None, None)
        self.count += 1
