"""What a test of every family needs to know of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusers_accel.layout import TokenLayout


def lively(transformer: Any, by: float = 2.0) -> Any:
    """The same with larger weights, for models whose output attention of fresh weights hardly changes."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() > 1:
                parameter.mul_(by)
    return transformer.eval()


def noisy(transformer: Any, std: float = 0.1) -> Any:
    """The same with small noise for weights of zero, for models whose blocks change nothing at first."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return transformer.eval()


def run_pipeline(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """The frames of a pipeline's call, or the latents, as its output_type says."""
    return np.asarray(pipe(**call).frames)


@dataclass(frozen=True, eq=False)
class TinyFamily:
    """A pipeline of random weights with several layers of self-attention, without text encoders.

    Args:
        pipe: makes it, with the same weights each time.
        call: makes arguments for `pipe(**...)`, fresh ones each time, with overrides of some; 5 steps, output_type "np" and
            guidance.
        layout: what the tokens of that call are.
        branches: of each step of that call, in order, as the pipeline names them.
        bitwise: whether all-dense attention equals the stock code bit for bit, which holds where that masks nothing.
        others: layouts of layers that differ, where some do.
        alone: overrides under which the call has no guidance.
        size: overrides of another size.
        several: overrides by which two videos are made.
        run: how the pipeline is called, and its frames or latents as an array, for those that do it differently.
        whole: whether diffusers' own forward can be compiled as one graph (`fullgraph=True`).
        least: fewest steps that its scheduler takes.
    """

    pipe: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    layout: TokenLayout
    branches: tuple[str, ...]
    bitwise: bool = True
    others: tuple[TokenLayout, ...] = ()
    alone: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    size: dict[str, Any] = field(default_factory=lambda: {"width": 96})
    several: dict[str, Any] = field(default_factory=lambda: {"num_videos_per_prompt": 2})
    run: Callable[[Any, dict[str, Any]], np.ndarray] = run_pipeline
    whole: bool = True
    least: int = 1
