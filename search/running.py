"""Runs the user's own pipeline under an engine of the search, whole or only as far as is needed, and leaves it as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from diffusers_accel.api import attach
from diffusers_accel.site import DenseAttention, Engine, Site

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True)
class SiteEngine:
    """The engine of one site when one `watcher` serves them all: it attends with `watcher.attend(site, q, k, v, dense)`."""

    watcher: Any
    site: Site

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        return self.watcher.attend(self.site, q, k, v, dense)


class Enough(Exception):
    """Raised in mid-run by what has seen what it came for: the rest of the generation is not needed."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search or a calibration, whose pipeline is as it was.

    Args:
        kept: what of the work is kept, and where; the message of the exception says beside that how to go on in Python.
        go_on: how.
    """

    def __init__(self, kept: str, go_on: str) -> None:
        super().__init__(f"interrupted: {kept}. {go_on}")
        self.kept = kept


def run_pipeline(
    pipe: Any,
    make_engine: Callable[[Site], Engine],
    prompt: Prompt,
    call: Mapping[str, Any],
    seed: int,
    at_step_end: Callable[..., dict[str, Tensor]] | None = None,
) -> bool:
    """One generation with `make_engine(site)` at every self-attention; detached again whatever happens.

    Args:
        at_step_end: the pipeline's `callback_on_step_end`.

    Returns:
        True when the generation ran to its end, False when an engine or `at_step_end` said `Enough`.
    """
    arguments = {**call, **as_arguments(prompt), "generator": torch.Generator("cpu").manual_seed(seed)}
    if at_step_end is not None:
        arguments["callback_on_step_end"] = at_step_end
    with _quiet(pipe), attach(pipe, make_engine):
        try:
            pipe(**arguments)
            return True
        except BaseException as reason:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()  # what an offloaded pipeline does at the end of a call
            if not isinstance(reason, Enough):
                raise
            return False


def now(site: Site) -> tuple[int, int]:
    """(step, steps) of the running call."""
    where = site.clock.now()
    if where is None:
        raise RuntimeError(
            "a search needs to know which step runs, but neither the pipeline nor its transformer says so; "
            "search with the whole diffusers pipeline, not with a bare transformer"
        )
    return where


def as_arguments(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)


def plain(value: Any) -> Any:
    """`value` as JSON data that is equal for equal values: tensors, arrays and images by their hash."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} sha256 {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return plain(torch.from_numpy(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Image):
        return plain(np.array(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def prompt_label(prompt: Prompt) -> str:
    """The text of a prompt, or what tells one set of arguments from another."""
    return prompt if isinstance(prompt, str) else json.dumps(plain(prompt))


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar: the search shows one of its own."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
