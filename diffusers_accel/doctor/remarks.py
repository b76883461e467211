"""What is to be said of a call beside its numbers: few steps, a slow dense path, a faster backend, unlike calls."""

from __future__ import annotations

import os
from typing import Any

import torch

from diffusers_accel.doctor.masked import MaskedAttention
from diffusers_accel.layout import TokenLayout

FEW_STEPS = 8  # schedules of distilled models
HOPPER = (9, 0)


def of_few_steps(steps: int, dense_steps: float) -> str | None:
    """Where a schedule is so short that neither scope has much to win."""
    if steps > FEW_STEPS:
        return None
    dense = sum((step + 0.5) / steps < dense_steps for step in range(steps))
    left = steps - dense
    return (
        f"{steps} steps are few: each changes much, so sparse attention harms more than in a long schedule. The preset keeps "
        f"{dense} of them dense, which leaves {left}; compare clips first, or give dense_steps as k / {steps} for k steps"
    )


def of_chunks(by_chunks: bool) -> str | None:
    """A clip of several chunks takes the loop several times."""
    if not by_chunks:
        return None
    return "this model makes a video chunk by chunk: the times of a loop are those of one chunk, of which a clip may have several"


def of_masks(found: MaskedAttention | None) -> str | None:
    """A mask over the video keeps flash attention away; a patch has none."""
    if found is None:
        return None
    measured = ""
    if found.with_ms is not None and found.without_ms is not None:
        measured = (
            f": {found.with_ms:,.1f} ms a layer with it, {found.without_ms:,.1f} ms without, on the same q, k and v"
        )
    return (
        f"the unpatched model passes a mask {list(found.mask)} to {found.calls} of {found.of} calls of attention over the video, "
        f'for which PyTorch has no flash kernel{measured}. patch(pipe, "dense") computes the same without a mask: it leaves out '
        "the keys that do not exist"
    )


def of_backend(capability: tuple[int, int] | None, backend: str, by_diffusers: bool) -> str | None:
    """Where cuDNN's attention is known to be faster than what PyTorch takes by itself.

    Published for Hopper only (huggingface/transformers pull request 48163: 1.7x to 2.3x on an H100 in its shapes, slower on an
    A100 and an RTX PRO 6000, equal on an L40S).

    Args:
        capability: of the GPU, such as (9, 0); None for other devices.
        backend: of the model's attention, as diffusers names it.
        by_diffusers: whether the model calls attention by diffusers' dispatch, which alone can be told.
    """
    if capability != HOPPER or backend != "native" or not by_diffusers:
        return None
    return (
        "on this GPU (Hopper) cuDNN's attention is published as faster than the one that PyTorch takes by itself: try "
        'pipe.transformer.set_attention_backend("_native_cudnn") before patching, and run doctor again (not measured here)'
    )


def of_layouts(counts: dict[TokenLayout, int]) -> str | None:
    """Calls of one step whose tokens lie otherwise: numbers are of the largest."""
    if len(counts) < 2:
        return None
    sizes = sorted(((layout.queries, layout.keys), calls) for layout, calls in counts.items())
    listed = ", ".join(f"{queries:,} x {keys:,} ({calls} calls)" for (queries, keys), calls in sizes)
    return f"calls of one step differ, queries x keys: {listed}. Tokens and efficiencies here are those of the largest"


def of_stages(stages: int) -> str | None:
    """A call of several stages, each of which is a schedule."""
    if stages < 2:
        return None
    return (
        f"the step is of the last of {stages} stages, the largest; earlier ones take less, and each further chunk of the "
        "video takes as long again: the time of the loop is that of all steps at this size, of one chunk"
    )


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def backend_of(processor: Any) -> str:
    """The attention backend of a stock processor, as diffusers names it."""
    own = getattr(processor, "_attention_backend", None)
    return str(getattr(own, "value", own) or os.environ.get("DIFFUSERS_ATTN_BACKEND", "native"))
