"""Which step, of how many, at which noise level, on which branch: one clock for a transformer's pipelines, read at run time and
never counted.

Sources, in order of trust: `Clock.set`, for people with their own loop; what the pipeline says through
`transformer.cache_context(name, step_index=...)`; the position of `pipe._current_timestep` inside `scheduler.timesteps`, of
which it is a view, or as a row of the pipeline's table of timesteps for each frame, or that of `t` in the pipeline's loop,
which a modular pipeline hands to its blocks; the step of a modular pipeline's guider. The pipeline is the one that runs, which
need not be the one that was patched: `from_pipe` makes siblings that share the transformer. Steps are those that run:
video-to-video with a strength below 1 runs only the last part of the schedule. Nothing is counted, so a second call, another
number of steps or an exception in mid-run leave nothing to reset.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch

from diffusers_accel.families import COMPONENTS

ROUNDING = 1e-5  # of noise levels in fp32
GUIDERS = ("guider", "guider_2")  # of modular pipelines: one for each transformer


class _Context(NamedTuple):
    """What a pipeline says through `transformer.cache_context`."""

    name: str
    step: int | None
    steps: int | None
    sigma: Any


class _Loop(NamedTuple):
    """Where a pipeline's loop `for t in timesteps` stands: some set no `_current_timestep`, or one of timesteps of their own."""

    step: int
    steps: int
    place: int | None  # in all of the scheduler's timesteps


class _Set(NamedTuple):
    """What somebody with a loop of their own says."""

    now: tuple[int, int]
    sigma: float | None


class _Running(threading.local):
    """What runs in this thread: the pipeline (no reference, so that a sibling is not kept alive), what it says, what was set."""

    pipe: Callable[[], Any] | None = None
    context: _Context | None = None
    loop: _Loop | None = None
    said: _Set | None = None


class Clock:
    """The time of the pipelines that run a transformer: the one that was patched (`pipe`), or any (`pipe` None)."""

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = pipe
        self._running = _Running()
        self._set: _Set | None = None  # by any thread: a loop may hand its forwards to another
        self._levels: tuple[weakref.ref[torch.Tensor], tuple[float, ...] | None] | None = None
        self._shares: tuple[weakref.ref[torch.Tensor], tuple[float, ...] | None] | None = None

    def set(self, step: int, steps: int, sigma: float | None = None) -> None:
        """Says by hand that step `step` (from 0) of `steps` runs now, at a noise level; outranks the other sources. In a thread
        that has said nothing itself, what any thread said last holds."""
        if not 0 <= step < steps:
            raise ValueError(f"expected 0 <= step < steps, found step {step} of {steps}")
        if sigma is not None and not 0 <= sigma <= 1:
            raise ValueError(f"sigma is the noise level of flow matching, expected in 0..1, found {sigma}")
        self._running.said = self._set = _Set((step, steps), None if sigma is None else float(sigma))

    @property
    def branch(self) -> str:
        """The pipeline's name for the running branch, such as "cond" or "uncond"; "" where it has none."""
        if self._running.context:
            return self._running.context.name
        guider = _running_guider(self._running_pipe)
        return f"guided {guider._count_prepared}" if guider is not None else ""

    def now(self) -> tuple[int, int] | None:
        """(step, steps) of the running call, of the steps that run, or None where no source knows."""
        sources = (
            self._from_context,
            self._from_timestep,
            self._from_table,
            self._from_loop,
            self._from_guider,
        )
        said = self._running.said or self._set
        return said.now if said else next((now for now in (source() for source in sources) if now), None)

    def sigma(self) -> float | None:
        """The noise level of the running step in flow matching, from 1 (noise alone) to 0 (none); None where no source knows, or
        the scheduler has another measure of noise."""
        if said_by_hand := self._running.said or self._set:
            return said_by_hand.sigma
        pipe = self._running_pipe
        given = getattr(getattr(pipe, "scheduler", None), "sigmas", None)
        context = self._running.context
        said = _number(context.sigma) if context else None
        if not isinstance(given, torch.Tensor):
            known = pipe is not None and hasattr(pipe, "scheduler")  # which has none
            return said if not known and said is not None and 0 <= said <= 1 else None
        levels, place = self._flow_levels(given), self._schedule_place(pipe)
        if levels is None:
            return None
        return levels[place] if place is not None and place < len(levels) else said

    def noise(self) -> float | None:
        """The share s of noise in the latents that the model is given, which are (1 - s) video + s noise up to a factor, from 1
        to 0: sigma in flow matching; else of the ratio r of noise to video in the scheduler, r / (1 + r). None where no source
        knows."""
        sigma = self.sigma()
        if sigma is not None or self._set is not None:
            return sigma
        pipe = self._running_pipe
        timesteps, place, now = _timesteps(pipe), self._schedule_place(pipe), self.now()
        if timesteps is None:
            return None
        if place is None and now is not None and now[1] == len(timesteps):  # a pipeline that has copied them
            place = now[0]
        if self._shares is None or self._shares[0]() is not timesteps:
            self._shares = weakref.ref(timesteps), _noise_shares(pipe.scheduler, timesteps)
        shares = self._shares[1]
        return None if shares is None or place is None or place >= len(shares) else shares[place]

    def _flow_levels(self, sigmas: torch.Tensor) -> tuple[float, ...] | None:
        """A scheduler's sigmas as numbers, read once: they may be on a GPU. None where they are not those of flow matching."""
        known = self._levels  # another thread, with a scheduler of its own, may put its own there at any time
        if known is None or known[0]() is not sigmas:
            known = self._levels = weakref.ref(sigmas), _levels(sigmas)
        return known[1]

    def _schedule_place(self, pipe: Any) -> int | None:
        """Where in all of the scheduler's timesteps the running step stands."""
        timesteps = _timesteps(pipe)
        place = _place(getattr(pipe, "_current_timestep", None), timesteps)
        if place is None and self._running.loop is not None:
            place = self._running.loop.place
        return place if place is not None else _place(getattr(_running_guider(pipe), "_timestep", None), timesteps)

    def follow(self, transformer: Any) -> None:
        """Called where a forward of `transformer` begins: finds the pipeline that calls it."""
        pipe, variables = _calling_pipeline(sys._getframe(1), transformer)
        self._running.pipe = weakref.ref(pipe) if pipe is not None else None
        self._running.loop = _loop(variables, _timesteps(pipe))

    @property
    def _running_pipe(self) -> Any:
        """Whoever called the transformer; the patched pipeline where that is not to be seen, as from another thread."""
        running = self._running.pipe() if self._running.pipe else None
        return self._pipe if running is None else running

    @property
    def timesteps(self) -> torch.Tensor | None:
        """The timesteps of the running generation: each call of a pipeline makes a tensor of its own. None without one."""
        return _timesteps(self._running_pipe)

    def _from_context(self) -> tuple[int, int] | None:
        context = self._running.context
        if context is None:
            return None
        step, steps = context.step, context.steps
        return None if step is None or steps is None else (step, steps)

    def _from_timestep(self) -> tuple[int, int] | None:
        pipe = self._running_pipe
        timesteps = _timesteps(pipe)
        place = _place(getattr(pipe, "_current_timestep", None), timesteps)
        if timesteps is None or place is None:
            return None
        steps = getattr(pipe, "_num_timesteps", None)
        if not isinstance(steps, int) or not len(timesteps) - place <= steps <= len(timesteps):
            return place, len(timesteps)
        return place - (len(timesteps) - steps), steps  # what runs is the last part

    def _from_table(self) -> tuple[int, int] | None:
        """Of pipelines that give each frame its own timestep: the running row of a table with a row for each step."""
        pipe = self._running_pipe
        row, steps = getattr(pipe, "_current_timestep", None), getattr(pipe, "_num_timesteps", None)
        if not isinstance(row, torch.Tensor) or row.dim() != 1 or not isinstance(steps, int):
            return None
        if row.untyped_storage().nbytes() != steps * row.numel() * row.element_size():
            return None
        step, rest = divmod(int(row.storage_offset()), row.numel())
        return (step, steps) if rest == 0 else None

    def _from_loop(self) -> tuple[int, int] | None:
        loop = self._running.loop
        return None if loop is None else (loop.step, loop.steps)

    def _from_guider(self) -> tuple[int, int] | None:
        guider = _running_guider(self._running_pipe)
        if guider is None:
            return None
        step, steps = guider._step, guider._num_inference_steps
        if not step < steps:  # a scheduler of higher order runs more
            steps = len(self._running_pipe.scheduler.timesteps)
        return (step, steps) if 0 <= step < steps else None

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
    def _hear(self, context: _Context) -> Iterator[None]:
        before, self._running.context = self._running.context, context
        try:
            yield
        finally:
            self._running.context = before


def tells_steps(pipe: Any) -> bool:
    """Whether the clock can follow a pipeline: a modular one has no `_current_timestep`, and so needs a guider, or a denoising
    loop that hands its timestep to its blocks."""
    modular = any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)
    guided = any(hasattr(getattr(pipe, name, None), "set_state") for name in GUIDERS)
    return not modular or guided or _has_loop(getattr(pipe, "blocks", None))


def _has_loop(blocks: Any) -> bool:
    """Whether a block of a modular pipeline, or one inside it, takes a timestep."""
    if blocks is None:
        return False
    parts = getattr(blocks, "sub_blocks", None) or {}
    takes = "t" in inspect.signature(type(blocks).__call__).parameters
    return takes or any(_has_loop(part) for part in parts.values())


def _calling_pipeline(frame: FrameType | None, transformer: Any) -> tuple[Any, Mapping[str, Any]]:
    """The innermost owner of the transformer and of a scheduler whose `__call__` runs, up the stack, and the variables of that
    call, or of the one below that a modular pipeline has given its timestep `t`; None and no variables without one.

    Only frames of `__call__` are looked into: reading the variables of a frame keeps them alive until it ends.
    """
    given: Mapping[str, Any] = {}
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount and code.co_varnames[0] == "self":
            variables = frame.f_locals
            given = given or (variables if isinstance(variables.get("t"), torch.Tensor) else {})
            owner = variables.get("self")
            parts = [getattr(owner, name, None) for name in COMPONENTS] if hasattr(owner, "scheduler") else []
            if any(getattr(part, "_orig_mod", part) is transformer for part in parts):
                return owner, given
        frame = frame.f_back
    return None, {}


def _loop(variables: Mapping[str, Any], scheduled: torch.Tensor | None) -> _Loop | None:
    """Where `t` stands in `timesteps`, both variables of a pipeline's call, or in the scheduler's; None where it does in neither.
    A block of a modular pipeline has the timesteps in its `block_state`."""
    t, own = variables.get("t"), variables.get("timesteps", getattr(variables.get("block_state"), "timesteps", None))
    for timesteps in (own, scheduled):
        if isinstance(timesteps, torch.Tensor) and timesteps.dim() == 1 and (step := _place(t, timesteps)) is not None:
            return _Loop(step, len(timesteps), _place(t, scheduled))
    return None


def _number(sigma: Any) -> float | None:
    """What a pipeline says of the noise level; a tensor on a device is not waited for."""
    if isinstance(sigma, torch.Tensor):
        return float(sigma) if sigma.numel() == 1 and sigma.device.type == "cpu" else None
    return float(sigma) if isinstance(sigma, (int, float)) else None


def _levels(sigmas: torch.Tensor) -> tuple[float, ...] | None:
    """The numbers, if they fall from at most 1 to at least 0, as those of flow matching do; they may repeat."""
    levels = [float(level) for level in sigmas.flatten().tolist()]
    falling = all(a >= b - ROUNDING for a, b in zip(levels, levels[1:]))
    if not levels or not falling or not (levels[0] <= 1 + ROUNDING and levels[-1] >= -ROUNDING):
        return None
    return tuple(min(max(level, 0.0), 1.0) for level in levels)


def _noise_shares(scheduler: Any, timesteps: torch.Tensor) -> tuple[float, ...] | None:
    """Of a scheduler at each of its timesteps: where its sigmas are not those of flow matching they are ratios of noise to
    video, and alphas_cumprod are squares of the video's part. None where it has neither."""
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, torch.Tensor):
        if (levels := _levels(sigmas)) is not None:
            return levels
        ratios = [float(sigma) for sigma in sigmas.flatten().tolist()]
        return tuple(1 - 1 / (1 + ratio) for ratio in ratios) if all(ratio >= 0 for ratio in ratios) else None
    if not isinstance(alphas, torch.Tensor) or timesteps.is_floating_point():
        return None
    at = alphas.to("cpu", torch.float64)[timesteps.to("cpu", torch.int64)].clamp(0, 1)
    video, noise = at.sqrt(), (1 - at).sqrt()
    return tuple((noise / (video + noise)).tolist())


def _timesteps(pipe: Any) -> torch.Tensor | None:
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.dim() == 1 else None


def _place(timestep: Any, timesteps: torch.Tensor | None) -> int | None:
    """Where in `timesteps` the timestep lies, of which it is a view: so repeated values are told apart, and old ones."""
    if not isinstance(timestep, torch.Tensor) or timesteps is None:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    step, rest = divmod(offset, max(timesteps.stride(0), 1))
    return step if rest == 0 and 0 <= step < len(timesteps) else None


def _running_guider(pipe: Any) -> Any:
    """The guider of a modular pipeline that has been set last in the running schedule, or None."""
    timesteps = _timesteps(pipe)
    guiders = [getattr(pipe, name, None) for name in GUIDERS]
    places = [(_place(getattr(guider, "_timestep", None), timesteps), guider) for guider in guiders]
    running = [(place, guider) for place, guider in places if place is not None]
    return max(running, key=lambda entry: entry[0])[1] if running else None


class _Listener:
    """Stands in for `transformer.cache_context`; a copied or pickled transformer gets its own class's method back."""

    def __init__(self, transformer: Any, clock: Clock) -> None:
        self._transformer = transformer
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **where: Any) -> Iterator[None]:
        stock: Callable[..., AbstractContextManager[None]] = type(self._transformer).cache_context
        context = _Context(name, where.get("step_index"), where.get("num_inference_steps"), where.get("sigma"))
        with self._clock._hear(context), stock(self._transformer, name, **where):
            yield

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._transformer, "cache_context")
