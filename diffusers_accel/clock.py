"""Which step, of how many, on which branch: one clock for a pipeline, read at run time and never counted.

Sources, in order of trust: what the pipeline says through `transformer.cache_context(name, step_index=...)`; the position of
`pipe._current_timestep` inside `scheduler.timesteps`, of which it is a view; `Clock.set`, for people with their own loop.
Nothing is counted, so a second call, another number of steps or an exception in mid-run leave nothing to reset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class Clock:
    """The time of one pipeline (`pipe`), or of a bare transformer (`pipe` None)."""

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = pipe
        self._context: tuple[str, int | None, int | None] | None = None
        self._set: tuple[int, int] | None = None

    def set(self, step: int, steps: int) -> None:
        """Says by hand that step `step` (from 0) of `steps` runs now; outranks the other sources."""
        if not 0 <= step < steps:
            raise ValueError(f"expected 0 <= step < steps, found step {step} of {steps}")
        self._set = (step, steps)

    @property
    def branch(self) -> str:
        """The pipeline's name for the running pass, such as "cond" or "uncond"; "" where it has none."""
        return self._context[0] if self._context else ""

    def now(self) -> tuple[int, int] | None:
        """(step, steps) of the running call, or None where no source knows."""
        return self._set or self._from_context() or self._from_timestep()

    def _from_context(self) -> tuple[int, int] | None:
        if self._context is None:
            return None
        _, step, steps = self._context
        return None if step is None or steps is None else (step, steps)

    def _from_timestep(self) -> tuple[int, int] | None:
        timestep = getattr(self._pipe, "_current_timestep", None)
        timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1:
            return None
        if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
        offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
        step, rest = divmod(offset, max(timesteps.stride(0), 1))
        return (step, len(timesteps)) if rest == 0 and 0 <= step < len(timesteps) else None

    def listen(self, transformer: Any) -> Callable[[], None]:
        """Hears what the pipeline says through `transformer.cache_context`; returns the function that stops it."""
        if not hasattr(transformer, "cache_context"):
            return lambda: None
        transformer.cache_context = _Listener(transformer, self)  # an instance attribute in front of the class's method

        def stop() -> None:
            if isinstance(vars(transformer).get("cache_context"), _Listener):
                del transformer.cache_context

        return stop

    @contextmanager
    def _hear(self, context: tuple[str, int | None, int | None]) -> Iterator[None]:
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before


class _Listener:
    """Stands in for `transformer.cache_context`; a copied or pickled transformer gets its own class's method back."""

    def __init__(self, transformer: Any, clock: Clock) -> None:
        self._transformer = transformer
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **where: Any) -> Iterator[None]:
        stock: Callable[..., AbstractContextManager[None]] = type(self._transformer).cache_context
        context = (name, where.get("step_index"), where.get("num_inference_steps"))
        with self._clock._hear(context), stock(self._transformer, name, **where):
            yield

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._transformer, "cache_context")
