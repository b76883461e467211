"""The vertical stripe: all queries read the same key columns."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import FileError
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement, wanted_blocks
from diffusers_accel.methods.blocks import BLOCK, check_density
from diffusers_accel.methods.order import Order, video_places
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.uses import Tensors, Uses, planned


@dataclass(frozen=True)
class Stripe(StaticSelect):
    """All queries read the same key columns (M4, vertical stripe), and each block itself.

    Args:
        density: share of the video's key blocks that a video query block reads, in (0, 1], the first frame's included; text is
            always read beside them.
        first_frame: always read the first frame's keys.
        calibrated: take the columns that got most attention during the search, from the plan's tensor
            "stripe_mass/<transformer>", [layers, heads, frames, height]: the mean probability that a key in that latent
            frame and token row receives, resized where the layout differs. Otherwise columns are spread evenly.
        text_counts: count text blocks in the density, as plans of version 1 did.
    """

    density: float
    first_frame: bool = True
    calibrated: bool = False
    text_counts: bool = False
    kind: ClassVar[str] = "stripe"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def name(self) -> str:
        return "stripe calibrated" if self.calibrated else "stripe"

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float:
        return self.density

    @property
    def records(self) -> str | None:
        return "column mass" if self.calibrated else None

    def refuses(self, order: Order) -> str | None:
        if order.identity:
            return None
        return f'a stripe is a set of frame rows: it goes with the order "fhw" only, found {order}'

    def depends(self, call: AttentionCall, order: Order, tensors: Tensors) -> Hashable:
        return call.place if self.calibrated else None

    def check(self, order: Order, uses: Uses, tensors: Tensors) -> None:
        if self.calibrated:
            name = mass_name(uses.transformer)
            _check_mass(name, uses.tensor(tensors, name), uses)

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        blocks, places = call.layout.blocks(BLOCK), arrangement(order, call.layout)
        always = places.always(self.first_frame)
        score = _column_score(call, order, tensors) if self.calibrated else _spread(blocks)[None]
        ranked = score.masked_fill(always, math.inf).argsort(dim=1, descending=True, stable=True)
        rank = ranked.argsort(dim=1)
        wanted = wanted_blocks(self.density, places, self.text_counts)
        # A row whose own block is not among the best columns reads it instead of the last of them.
        best, all_but_one = (rank < wanted) | always, (rank < wanted - 1) | always
        among = ~(places.own & ~best[:, None]).any(2, keepdim=True)
        mask = torch.where(among, best[:, None], all_but_one[:, None]) | places.own
        mask[:, places.exact_queries] = True
        return mask


def mass_name(transformer: str) -> str:
    """Of the tensor with the mass that each key row received in the search."""
    return f"stripe_mass/{transformer}"


def _column_score(call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
    """[heads, key blocks], fp64: the attention mass that each key block received in the search."""
    layout = call.layout
    mass = planned(tensors, mass_name(call.transformer), "a calibrated stripe")[call.layer, list(call.heads)].double()
    if mass.shape[1:] != (layout.frames, layout.height):
        size = (layout.frames, layout.height)
        mass = torch.nn.functional.interpolate(mass[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    per_token = mass[..., None].expand(-1, -1, -1, layout.width).flatten(1)
    sequence = torch.zeros(len(call.heads), layout.blocks(BLOCK) * BLOCK, dtype=torch.float64)
    sequence[:, video_places(layout)] = per_token
    sequence[:, : layout.tokens] = sequence[:, order.index(layout)]
    return sequence.unflatten(1, (-1, BLOCK)).sum(-1)


def _check_mass(name: str, mass: Tensor, uses: Uses) -> None:
    shape = uses.shape
    fits = mass.dim() == 4 and mass.shape[:2] == (shape.layers, shape.heads) and 0 not in mass.shape
    if not (fits and mass.is_floating_point()):
        raise FileError(
            f"tensors.{name}: expected a floating [{shape.layers} layers, {shape.heads} heads, frames, height], "
            f"found {mass.dtype} {list(mass.shape)}"
        )
    if not bool(torch.isfinite(mass).all()):
        raise FileError(f"tensors.{name}: expected finite numbers, found NaN or infinity")


def _spread(blocks: int) -> Tensor:
    """A score by which any prefix of the ranking is spread evenly: the bit-reversed (van der Corput) index."""
    bits = max(1, math.ceil(math.log2(max(blocks, 2))))
    return torch.tensor([-int(f"{index:0{bits}b}"[::-1], 2) for index in range(blocks)], dtype=torch.float64)
