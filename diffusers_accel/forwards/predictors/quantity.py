"""What predictors continue of a computed forward: its output, or what the model added to its input."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.forwards.rule import Computed, Now

QUANTITIES = ("velocity", "residual")


def quantity(of: str, computed: Computed) -> Tensor:
    """The one named `of`, in fp32 or wider."""
    return wide(computed.v) if of == "velocity" else wide(computed.v) - wide(computed.x)


def restore(of: str, value: Tensor, now: Now) -> Tensor:
    """The output of which the quantity `of` is `value`."""
    return value if of == "velocity" else wide(now.x) + value


def check_quantity(of: str) -> None:
    """Raises ValueError where `of` names none of `QUANTITIES`."""
    if of not in QUANTITIES:
        raise ValueError(f'of: expected "velocity" or "residual", found {quoted(of)}')


def wide(x: Tensor) -> Tensor:
    """In fp32 or wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
