"""What must hold of a plan's stored masks: there is one for each head that reads one, and no video row of it is empty."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.files import FileError
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.uses import Uses

Named = tuple[str, Tensor]  # a tensor of a plan with its name


def check_masks(order: Order, uses: Uses, bits: Named, heads: Named) -> None:
    """Checks one method's masks and which of them each head takes.

    Raises:
        FileError: a tensor has another type or shape, a head has no mask, or a row of video would read nothing.
    """
    _check_bits(*bits)
    _check_heads(uses, *heads, len(bits[1]))
    used = _used(uses, *heads)
    _check_size(uses, *bits)
    _check_rows(order, uses, used, *bits)


def refuses_layout(layout: TokenLayout) -> str | None:
    """Why masks cannot be stored for a layout, or None."""
    if layout.queries == layout.tokens:
        return None
    return (
        f"stored masks are for calls in which every token queries, found {layout.queries:,} queries for {layout.tokens:,} "
        "tokens, as with a history of keys alone. Take another selection there, such as a band or a draft"
    )


def check_call(order: Order, uses: Uses, bits: Tensor, heads: Tensor, layout: TokenLayout) -> None:
    """Checks that the masks hold for a call of this layout.

    Raises:
        FileError: they are for another size, or leave rows of video without any block.
    """
    here = layout.grid
    if reason := refuses_layout(layout):
        raise FileError(f"{uses.label!r}: {reason}")
    if bits.shape[2] != layout.blocks(BLOCK) or uses.grid not in (None, here):
        size = f"{' x '.join(map(str, uses.grid))} tokens, " if uses.grid else ""
        text = f" and {layout.text_tokens} of text" if layout.text_tokens else ""
        raise FileError(
            f"the plan's stored masks are for {size}{bits.shape[2]} blocks of {BLOCK} tokens; this call has "
            f"{' x '.join(map(str, here))} tokens (frames x rows x columns){text}, {layout.blocks(BLOCK)} blocks. Stored masks "
            "hold for the size that was searched: generate at that size, or search a plan for this one"
        )
    used = sorted({int(heads[place]) for place in uses.heads})
    # In a plan that does not tell its layout, rows without a block may have been text.
    if bool((bits[used][:, :, slice(*arrangement(order, layout).video_keys)].amax(3) == 0).any()):
        raise FileError(
            f"the plan's stored masks {uses.label!r} leave rows of video without any block to read, which would be text in "
            f"another layout; this call has {layout.text_tokens} tokens of text. Search a plan for this model"
        )


def _check_bits(name: str, bits: Tensor) -> None:
    if bits.dtype != torch.uint8 or bits.dim() != 4 or 0 in bits.shape or bits.shape[3] != -(-bits.shape[2] // 8):
        raise FileError(
            f"tensors.{name}: expected uint8 [masks, segments, blocks, blocks / 8, rounded up], "
            f"found {bits.dtype} {list(bits.shape)}"
        )
    blocks = bits.shape[2]
    if blocks % 8 and bool((bits[..., -1] >> blocks % 8).any()):
        raise FileError(
            f"tensors.{name}: expected no bit beyond the last of {blocks} blocks, found some; search the plan again"
        )


def _check_heads(uses: Uses, name: str, heads: Tensor, masks: int) -> None:
    uses.check_size(name, heads, torch.int32, "layers, heads")
    lowest, highest = int(heads.min()), int(heads.max())
    if lowest < -1 or highest >= masks:
        raise FileError(
            f"tensors.{name}: expected -1 or the number of one of {masks} masks, found {lowest} to {highest}"
        )


def _used(uses: Uses, name: str, heads: Tensor) -> dict[int, tuple[int, int]]:
    """Mask -> a layer and head that takes it; every head that takes the method must have one."""
    used: dict[int, tuple[int, int]] = {}
    numbers = heads.tolist()
    for layer, head in uses.heads:
        if (number := numbers[layer][head]) < 0:
            raise FileError(
                f"tensors.{name}: expected a mask for head {head} of layer {layer}, which takes the method "
                f"{uses.symbol!r}, found none; search the plan again"
            )
        used[number] = (layer, head)
    return used


def _check_size(uses: Uses, name: str, bits: Tensor) -> None:
    if uses.layouts and bits.shape[2] != (blocks := uses.layouts[0].blocks(BLOCK)):
        raise FileError(
            f"tensors.{name}: expected masks of {blocks} blocks, for the {uses.layouts[0].tokens:,} tokens of "
            f"provenance.layout, found {bits.shape[2]}; search the plan again"
        )


def _check_rows(order: Order, uses: Uses, used: dict[int, tuple[int, int]], name: str, bits: Tensor) -> None:
    """In every mask that a head takes, every row of video reads a block. Rows of text need none: they read everything."""
    numbers = sorted(used)
    empty = bits[numbers].amax(3) == 0  # [masks, segments, blocks]
    if not bool(empty.any()):
        return
    if any(not bool(empty[..., slice(*video)].any()) for video in _videos(order, uses, empty)):
        return
    mask, segment, row = (int(each) for each in empty.nonzero()[0])
    layer, head = used[numbers[mask]]
    raise FileError(
        f"tensors.{name}: expected every row of video blocks to read at least one block, found nothing in row {row} of "
        f"segment {segment} of mask {numbers[mask]}, which head {head} of layer {layer} takes: it would attend to nothing; "
        f"search the plan again"
    )


def _videos(order: Order, uses: Uses, empty: Tensor) -> list[tuple[int, int]]:
    """[first, stop) of the rows that hold no text: by the layout that the plan was made for, for each place of the text.

    A plan that does not tell its layout may have text at one end, in rows that are empty in all of its masks.
    """
    if uses.layouts:
        return [arrangement(order, layout).video_keys for layout in uses.layouts]
    filled = (~empty.flatten(0, 1).all(0)).nonzero()
    if not len(filled):
        return [(0, empty.shape[-1])]
    return [(0, int(filled[-1]) + 1), (int(filled[0]), empty.shape[-1])]
