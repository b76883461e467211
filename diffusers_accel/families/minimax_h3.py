"""MiniMax-H3: one packed sequence of text, conditions or references, audio, and last the video; guidance is distilled in.

Its forward is told at which rows each of them stands, and at which coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.families.reading import last_grid, read_once
from diffusers_accel.layout import Kind, Segment, TokenLayout

INDICES: tuple[tuple[str, int, Kind], ...] = (
    ("video_indices", 7, "reference"),  # all but the last run of them, which is the video that is made
    ("audio_indices", 8, "audio"),
    ("text_indices", 9, "text"),
)
Runs = tuple[tuple[int, int], ...]


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """The grid of the video that is made, then (which of `INDICES`, start, stop) of all runs of rows."""
    found = [read_once(argument(args, kwargs, name, position), _runs) for name, position, _ in INDICES]
    runs = sorted((start, stop, kind) for kind, each in enumerate(found) for start, stop in each)
    start, stop = found[0][-1]
    frames, height, width = read_once(argument(args, kwargs, "position_ids", 6), last_grid)
    made, rest = divmod(stop - start, height * width)
    if rest or not 0 < made <= frames or runs[-1][:2] != (start, stop):
        raise ValueError(
            f"expected the last rows of a MiniMax-H3 sequence to be frames of {height} x {width}, as their position_ids say, "
            f"found the last of its video_indices in rows {start:,} to {stop:,}: pack the video that is made behind all else, "
            "frame by frame, or call diffusers_accel.unpatch(pipe)"
        )
    return (made, height, width, *(number for run in runs for number in run))


def _runs(indices: Tensor) -> Runs:
    """(start, stop) of neighbouring rows, in the order of a sequence."""
    return tuple(_neighbours(sorted(indices.tolist())))


def _neighbours(rows: list[int]) -> Iterator[tuple[int, int]]:
    for _, run in groupby(enumerate(rows), key=lambda entry: entry[1] - entry[0]):
        members = [row for _, row in run]
        yield members[0], members[-1] + 1


def _layout(config: Any, observation: Observation) -> TokenLayout:
    frames, height, width, *runs = observation
    segments = [
        Segment(INDICES[kind][2], stop - start)
        for start, stop, kind in zip(runs[::3], runs[1::3], runs[2::3], strict=True)
    ]
    return TokenLayout.of(*segments[:-1], Segment.video((frames, height, width)))


MINIMAX_H3 = Family(
    name="minimax_h3",
    transformer="diffusers.models.transformers.transformer_minimax_h3.MiniMaxH3Transformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("transformer_blocks", named="attn"),  # not the token refiner's
    observe=_observe,
    layout=_layout,
    text=text_at(2),
    latents=("hidden_states", "audio_hidden_states"),
    noisiest=torch.amin,  # its timesteps rise to 1, at which conditions are; audio is ahead of the video
    channels=2,
)
