"""How guidance joins the outputs of a model's branches: seen in what the scheduler is given, not asked of the pipeline.

With guidance what reaches the latents is uncond + g (cond - uncond), in some pipelines rescaled, or with another g for each
expert. What the scheduler is given is fitted as a sum of the branches' outputs and of the latents, which pipelines with a
preconditioned model (Cosmos) add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_LEFT = 0.01  # of the energy of what the scheduler is given: above it, the branches are joined in another way


def branches_of(outputs: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The outputs of single branches, each of the shape of `like`: of batched guidance, whose output holds several, the parts.

    Returns:
        The branches, in order; none where an output does not consist of such parts.
    """
    if any(v.shape[1:] != like.shape[1:] or len(v) % len(like) for v in outputs):
        return []
    return [part for v in outputs for part in v.split(len(like))]


def joined_by(branches: Sequence[Tensor], joined: Tensor, latents: Tensor | None) -> list[float] | None:
    """The weight of each branch in what the scheduler is given, or None where that is no weighted sum of them.

    Args:
        branches: outputs of the model, of the shape of `joined`.
        joined: what the scheduler is given.
        latents: what is denoised, which may be part of the sum.
    """
    parts = [*branches, *([latents] if latents is not None and latents.shape == joined.shape else [])]
    if not branches:
        return None
    columns = torch.stack([part.detach().double().cpu().flatten() for part in parts])
    wanted = joined.detach().double().cpu().flatten()
    weights = torch.linalg.lstsq(columns @ columns.T, (columns @ wanted)[:, None], driver="gelsd").solution[:, 0]
    left = (wanted - weights @ columns).square().sum()
    if not bool(left <= MOST_LEFT * wanted.square().sum()):
        return None
    return [float(weight) for weight in weights[: len(branches)]]


@contextmanager
def told_of_steps(pipe: Any, told: Callable[[Tensor, Tensor | None], None]) -> Iterator[None]:
    """Calls `told(what the scheduler is given, the latents)` before each step of the pipeline's scheduler, if it has one."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step"):
        yield
        return
    before = vars(scheduler).copy()
    scheduler.step = _Listener(scheduler, told)  # an instance attribute in front of the class's method
    try:
        yield
    finally:
        del scheduler.step
        if "step" in before:  # somebody else's
            scheduler.step = before["step"]


class _Listener:
    """Stands in for `scheduler.step`; a copied scheduler gets its own class's method back."""

    def __init__(self, scheduler: Any, told: Callable[[Tensor, Tensor | None], None]) -> None:
        self._scheduler = scheduler
        self._stock = scheduler.step
        self._told = told
        functools.update_wrapper(self, self._stock, updated=())  # pipelines look at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("model_output", "timestep", "sample"), args)) | kwargs
        if isinstance(given.get("model_output"), Tensor):
            latents = given.get("sample")
            self._told(given["model_output"], latents if isinstance(latents, Tensor) else None)
        return self._stock(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._scheduler, "step")
