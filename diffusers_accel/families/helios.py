"""Helios: history in front (long ago, then nearer, then near, in ever finer patches), then the chunk that is denoised.

History also queries, and is exact. CFG is two branches; each chunk is a schedule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.families.wan import layout_of_latents, observe_latents
from diffusers_accel.layout import Segment, TokenLayout

# In the order of the sequence: its name in the forward's arguments, where its latents and indices stand there, size of patches.
HISTORY = (("long", 9, 6, 4), ("mid", 8, 5, 2), ("short", 7, 4, 1))


def _optional(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, position: int) -> Any:
    return argument(args, kwargs, name, position) if name in kwargs or len(args) > position else None


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Sizes of the chunk, then of each history, three zeros where it is absent."""
    sizes = list(observe_latents(args, kwargs))
    for name, at, indices_at, _ in HISTORY:
        latents = _optional(args, kwargs, f"latents_history_{name}", at)
        indices = _optional(args, kwargs, f"indices_latents_history_{name}", indices_at)
        sizes += (0, 0, 0) if latents is None or indices is None else latents.shape[2:]
    return tuple(sizes)


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Patches of history are whole ones: its latents are padded to them."""
    history = []
    for number, (_, _, _, factor) in enumerate(HISTORY, 1):
        sizes = observation[3 * number : 3 * number + 3]
        grid = [math.ceil(size / (patch * factor)) for size, patch in zip(sizes, config.patch_size, strict=True)]
        if math.prod(grid):
            history.append(Segment("history", math.prod(grid), (grid[0], grid[1], grid[2])))
    return TokenLayout.of(*history, Segment.video(layout_of_latents(config, observation[:3]).grid))


def _amplified_in_parallel(config: Any) -> str | None:
    if not config.is_amplify_history:
        return None
    return (
        "with is_amplify_history diffusers looks for the keys of the history by the length of a piece of the sequence"
    )


HELIOS = Family(
    name="helios",
    transformer="diffusers.models.transformers.transformer_helios.HeliosTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=_observe,
    layout=_layout,
    text=text_at(2),
    history=True,
    no_parallel=_amplified_in_parallel,
)
