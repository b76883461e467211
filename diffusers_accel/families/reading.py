"""What a family needs to know of a tensor's values, read once: reading waits for the device, and pipelines give the same tensors
at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_READ = WeakTensorKeyDictionary()  # tensor -> how it was read -> (its version then, what was found)


def read_once(tensor: Tensor, how: Callable[[Tensor], T]) -> T:
    """`how(tensor)`, and the same again while nobody writes to the tensor.

    Args:
        tensor: any, on any device. One of inference mode is read anew each time: it does not tell when it is written to.
        how: a function of a module (not made anew at each call), whose result does not keep the tensor.
    """
    if tensor.is_inference():
        return how(tensor)
    known: dict[Any, tuple[int, Any]] = _READ.setdefault(tensor, {})
    if how not in known or known[how][0] != tensor._version:
        known[how] = tensor._version, how(tensor)
    value: T = known[how][1]
    return value


def row_sums(mask: Tensor) -> tuple[int, ...]:
    """How many are set in each row of a mask [B, tokens], of 0 and 1 in any dtype."""
    return tuple(mask.sum(dim=1, dtype=torch.int32).tolist())


def last_grid(coordinates: Tensor) -> tuple[int, int, int]:
    """(frames, height, width) of the video at the end of a sequence, whose tokens have these coordinates (time, height, width).

    A frame is what has one time, a row of it what has one height. The video is as many frames as have the places of the last one
    and later and later times.
    """
    time, height, _ = coordinates.T
    frame = _equal_at_end(time)
    row = _equal_at_end(height[-frame:])
    frames = coordinates[len(coordinates) % frame :].view(-1, frame, 3)
    alike = ((frames[:, :, 1:] == frames[-1, :, 1:]) & (frames[:, :, :1] == frames[:, :1, :1])).all(dim=2).all(dim=1)
    later = torch.cat([frames[1:, 0, 0] > frames[:-1, 0, 0], alike[-1:]])
    return _equal_at_end(alike & later), frame // row, row


def _equal_at_end(values: Tensor) -> int:
    """How many values are equal to the last."""
    others = (values != values[-1]).nonzero()
    return len(values) - 1 - int(others[-1]) if len(others) else len(values)
