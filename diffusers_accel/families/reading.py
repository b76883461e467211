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
