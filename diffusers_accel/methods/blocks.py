"""Blocks: into which tokens are cut, which of them hold text, and which everybody reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout

BLOCK = 128  # tokens of a query block and of a key block


def check_density(density: float) -> None:
    if isinstance(density, bool) or not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(
            f"density is the share of key blocks that are read, expected in (0, 1], found {quoted(density)}"
        )


def always_read(layout: TokenLayout, first_frame: bool) -> tuple[Tensor, Tensor]:
    """Blocks that every query reads, and those that hold text (which also read everything): bool [blocks] each."""
    text = torch.zeros(layout.blocks(BLOCK), dtype=torch.bool)
    if layout.text_tokens:
        text[layout.text_start // BLOCK : math.ceil((layout.text_start + layout.text_tokens) / BLOCK)] = True
    always = text.clone()
    if first_frame:
        first_stop = layout.video_start + layout.height * layout.width
        always[layout.video_start // BLOCK : math.ceil(first_stop / BLOCK)] = True
    return always, text


def video_blocks(layout: TokenLayout) -> tuple[int, int]:
    """[first, stop) of the blocks that hold no text."""
    if layout.text_at == "start":
        return -(-layout.text_tokens // BLOCK), layout.blocks(BLOCK)
    return 0, layout.text_start // BLOCK if layout.text_tokens else layout.blocks(BLOCK)


def part_of(now: tuple[int, int], parts: int) -> int:
    """Which of `parts` equal parts of the schedule the step belongs to."""
    step, steps = now
    return min(step * parts // steps, parts - 1)
