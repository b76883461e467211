"""Runs the user's own pipeline under an engine of the search, whole or only as far as is needed, and leaves it as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.api import attach, patch
from diffusers_accel.attach.site import AttachedModel, Engine, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.forwards import Forwards
from diffusers_accel.forwards.wrapper import Interceptor
from diffusers_accel.support.identity import plain
from diffusers_accel.support.seeded import seeded

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True)
class SiteEngine:
    """The engine of one site when one `watcher` serves them all: it attends with `watcher.attend(site, call, q, k, v)`."""

    watcher: Any
    site: Site

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.watcher.attend(self.site, call, q, k, v)


class Enough(BaseException):
    """Raised in mid-run by what has seen what it came for: the rest of the generation is not needed. A modular pipeline reports
    an Exception as an error of its block."""


class Schedules:
    """Tells to which schedule of a generation a call belongs, from 0: a video that is made chunk by chunk, or segment by segment,
    has one for each."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}  # transformer -> schedule and step of its last call

    def of(self, call: AttentionCall) -> int:
        """Of the call that begins now; each call is asked for, in turn."""
        schedule, last = self._last.get(call.transformer, (0, 0))
        step, _ = now(call)
        schedule += step < last
        self._last[call.transformer] = schedule, step
        return schedule


def run_pipeline(
    pipe: Any,
    make_engine: Callable[[Site], Engine] | None,
    prompt: Prompt,
    call: Mapping[str, Any],
    seed: int,
    at_step_end: Callable[..., dict[str, Tensor]] | None = None,
    around: Callable[[AttachedModel], Interceptor] | None = None,
    forwards: Forwards | None = None,
) -> bool:
    """One generation with `make_engine(site)` at every self-attention; detached again whatever happens.

    Args:
        make_engine: None leaves attention as it is.
        at_step_end: the pipeline's `callback_on_step_end`.
        around: what stands around the forwards of each transformer, such as a `TrajectoryRecorder`'s.
        forwards: a step cache, in place of an engine: attention is as it is.

    Returns:
        True when the generation ran to its end, False when an engine or `at_step_end` said `Enough`.
    """
    arguments = {**call, **as_arguments(prompt)}
    if at_step_end is not None:
        arguments["callback_on_step_end"] = at_step_end
    device = torch.device(pipe._execution_device)
    attached = attach(pipe, make_engine) if forwards is None else patch(pipe, forwards)
    with attached, _quiet(pipe), seeded(seed, device) as generator:
        if around is not None:
            attached.watch(around)
        try:
            pipe(**arguments, generator=generator)
            return True
        except BaseException as reason:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()  # what an offloaded pipeline does at the end of a call
            if not isinstance(reason, Enough):
                raise
            return False


def now(call: AttentionCall) -> tuple[int, int]:
    """(step, steps) of the running call."""
    return known(call.now)


def known(found: tuple[int, int] | None) -> tuple[int, int]:
    """(step, steps) where somebody says them; raises RuntimeError where nobody does."""
    if found is None:
        raise RuntimeError(
            "a search needs to know which step runs, but neither the pipeline nor its transformer says so; "
            "search with the whole diffusers pipeline, not with a bare transformer"
        )
    return found


def as_arguments(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)


def prompt_label(prompt: Prompt) -> str:
    """The text of a prompt, or what tells one set of arguments from another."""
    return prompt if isinstance(prompt, str) else json.dumps(plain(prompt))


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars: the search shows one of its own."""
    bars = [(part, vars(part).get("_progress_bar_config")) for part in _with_bars(pipe)]
    for part, before in bars:
        part.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        for part, before in bars:
            if before is None:
                del part._progress_bar_config
            else:
                part._progress_bar_config = before


def _with_bars(part: Any) -> Iterator[Any]:
    """Whatever shows a progress bar: a pipeline, or of a modular one the blocks that loop, however deep they stand."""
    blocks = getattr(part, "_blocks", part)  # those that run: `blocks` gives a copy
    if hasattr(blocks, "set_progress_bar_config"):
        yield blocks
    for each in getattr(blocks, "sub_blocks", {}).values():
        yield from _with_bars(each)
