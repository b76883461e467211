"""Plans for well-known checkpoints from published statistics of their heads, to start from until a search has run."""

from __future__ import annotations

from collections.abc import Callable

from diffusers_accel.starter.starter import Starter

# By name: what makes a plan of a pipeline's transformers, with nothing measured on them.
PLANNERS: dict[str, Callable[..., Starter]] = {"starter": Starter}

__all__ = ["PLANNERS", "Starter"]
