"""What must hold of a plan's stored masks: there is one for each head that reads one, and no video row of it is empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusers_accel.files import FileError
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK
from diffusers_accel.methods.draft import video_blocks

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan


def check_masks(plan: Plan, transformer: str, symbol: str, bits: tuple[str, Tensor], heads: tuple[str, Tensor]) -> None:
    """Checks one method's masks and which of them each head takes, both with the name of their tensor.

    Raises:
        FileError: a tensor has another type or shape, a head has no mask, or a row of video would read nothing.
    """
    _check_bits(*bits)
    _check_heads(plan, transformer, *heads, len(bits[1]))
    used = _used(plan, transformer, symbol, *heads)
    _check_size(plan, *bits)
    _check_rows(plan, used, *bits)


def check_sizes(masks: Mapping[str, Tensor]) -> None:
    """All masks of a plan are for one number of blocks and of parts; otherwise some would be refused when they are read."""
    first: tuple[str, tuple[int, ...]] | None = None
    for key, bits in masks.items():
        found = (bits.shape[1], bits.shape[2])
        if first and found != first[1]:
            raise FileError(
                f"tensors.{key}: expected {first[1][0]} parts and {first[1][1]} blocks, as {first[0]} has, "
                f"found {found[0]} and {found[1]}; search the plan again"
            )
        first = first or (key, found)


def _check_bits(key: str, bits: Tensor) -> None:
    if bits.dtype != torch.uint8 or bits.dim() != 4 or 0 in bits.shape or bits.shape[3] != -(-bits.shape[2] // 8):
        raise FileError(
            f"tensors.{key}: expected uint8 [masks, parts, blocks, blocks / 8, rounded up], "
            f"found {bits.dtype} {list(bits.shape)}"
        )
    blocks = bits.shape[2]
    if blocks % 8 and bool((bits[..., -1] >> blocks % 8).any()):
        raise FileError(
            f"tensors.{key}: expected no bit beyond the last of {blocks} blocks, found some; search the plan again"
        )


def _check_heads(plan: Plan, transformer: str, key: str, heads: Tensor, masks: int) -> None:
    shape = plan.models[transformer]
    if heads.dtype != torch.int32 or heads.shape != (shape.layers, shape.heads):
        raise FileError(
            f"tensors.{key}: expected int32 [{shape.layers} layers, {shape.heads} heads], "
            f"found {heads.dtype} {list(heads.shape)}"
        )
    lowest, highest = int(heads.min()), int(heads.max())
    if lowest < -1 or highest >= masks:
        raise FileError(
            f"tensors.{key}: expected -1 or the number of one of {masks} masks, found {lowest} to {highest}"
        )


def _used(plan: Plan, transformer: str, symbol: str, key: str, heads: Tensor) -> dict[int, tuple[int, int]]:
    """Mask -> a layer and head that takes it; every head that takes the method must have one."""
    used: dict[int, tuple[int, int]] = {}
    numbers = heads.tolist()
    for span in plan.spans:
        for layer, row in enumerate(span.heads[transformer]):
            for head in (head for head, each in enumerate(row) if each == symbol):
                if (number := numbers[layer][head]) < 0:
                    raise FileError(
                        f"tensors.{key}: expected a mask for head {head} of layer {layer}, which takes the method "
                        f"{symbol!r}, found none; search the plan again"
                    )
                used[number] = (layer, head)
    return used


def _check_size(plan: Plan, key: str, bits: Tensor) -> None:
    layouts = _layouts(plan)
    if layouts and bits.shape[2] != (blocks := layouts[0].blocks(BLOCK)):
        raise FileError(
            f"tensors.{key}: expected masks of {blocks} blocks, for the {layouts[0].tokens:,} tokens of provenance.layout, "
            f"found {bits.shape[2]}; search the plan again"
        )


def _check_rows(plan: Plan, used: Mapping[int, tuple[int, int]], key: str, bits: Tensor) -> None:
    """In every mask that a head takes, every row of video reads a block. Rows of text need none: they read everything."""
    numbers = sorted(used)
    empty = bits[numbers].amax(3) == 0  # [masks, parts, blocks]
    if not bool(empty.any()):
        return
    if any(not bool(empty[..., slice(*video)].any()) for video in _videos(plan, empty)):
        return
    mask, part, row = (int(each) for each in empty.nonzero()[0])
    layer, head = used[numbers[mask]]
    raise FileError(
        f"tensors.{key}: expected every row of video blocks to read at least one block, found nothing in row {row} of part "
        f"{part} of mask {numbers[mask]}, which head {head} of layer {layer} takes: it would attend to nothing; "
        f"search the plan again"
    )


def _videos(plan: Plan, empty: Tensor) -> list[tuple[int, int]]:
    """[first, stop) of the rows that hold no text: by the layout that the plan was made for, for each place of the text.

    A plan that does not tell its layout may have text at one end, in rows that are empty in all of its masks.
    """
    if layouts := _layouts(plan):
        return [video_blocks(layout) for layout in layouts]
    filled = (~empty.flatten(0, 1).all(0)).nonzero()
    if not len(filled):
        return [(0, empty.shape[-1])]
    return [(0, int(filled[-1]) + 1), (int(filled[0]), empty.shape[-1])]


def _layouts(plan: Plan) -> list[TokenLayout]:
    """The layout that provenance tells, which does not say at which end the text is; none where it tells none."""
    told = plan.provenance.get("layout")
    names = ("frames", "height", "width", "text_tokens")
    if not isinstance(told, Mapping) or any(type(told.get(name)) is not int for name in names):
        return []
    frames, height, width, text = (told[name] for name in names)
    if min(frames, height, width) < 1 or text < 0:
        return []
    if not text:
        return [TokenLayout(frames, height, width)]
    return [TokenLayout(frames, height, width, text, place) for place in ("end", "start")]
