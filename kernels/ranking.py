"""Which implementation `auto` takes, as one table, and what has to be asked for by name.

Plain data: names, numbers and texts. An implementation is a module `kernels/<operator>/<name>.py` and its line in
`IMPLEMENTATIONS`. A benchmark that has measured it on a GPU adds a row to `RANKING`, above those that it narrows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffusers_accel.kernels import hardware

UNMEASURED = "must be asked for until measured on a GPU"
UNRANKED = "must be asked for here: no row of kernels/ranking.py has it"

# Operator -> implementation -> why `auto` leaves it out where no row below has it; None for those that every row has.
IMPLEMENTATIONS: dict[str, dict[str, str | None]] = {
    "attention": {
        "cpu": None,
        "portable": None,
        "hopper": UNMEASURED,
        "gluon": UNMEASURED,
        "fa4": UNMEASURED,
        "reference": None,
    },
    "dense": {
        "cudnn": None,
        "flash": None,
        "xformers": None,
        "cpu": None,
        "portable": None,
        "reference": None,
    },
}


class Row(NamedTuple):
    """What `auto` tries on such inputs, fastest first. All ranges hold both their ends.

    Args:
        operator: "attention" or "dense".
        capability: compute capabilities of NVIDIA GPUs, 90 for Hopper; 0 for all else, CPUs and ROCm.
        precision: in what the products are computed; None is every one.
        head_dim: channels of a head.
        order: names of `IMPLEMENTATIONS`.
    """

    operator: str
    capability: tuple[int, int]
    precision: str | None
    head_dim: tuple[int, int]
    order: tuple[str, ...]


ANYWHERE, ANY_DIM = (0, 999), (1, 65_536)

# The first row that holds the inputs counts. Nothing of this project has been measured on a GPU yet, so there is no row for
# one compute capability, precision or head dim but what is known of the kernels of others: cuDNN's are ahead of
# FlashAttention-2's on server GPUs from Hopper on, and behind elsewhere, which is PyTorch's own order too.
RANKING: tuple[Row, ...] = (
    Row("attention", ANYWHERE, None, ANY_DIM, ("cpu", "portable", "reference")),
    Row("dense", (90, 109), "input", ANY_DIM, ("cudnn", "flash", "xformers", "cpu", "portable", "reference")),
    Row("dense", ANYWHERE, "input", ANY_DIM, ("flash", "cudnn", "xformers", "cpu", "portable", "reference")),
)

# (Lowest and highest compute capability, why): where nothing takes eight bits by itself although kernels have them. To be
# removed, or to get more rows, when they have been measured there.
EIGHT_BITS_IF_ASKED: tuple[tuple[tuple[int, int], str], ...] = (
    (
        (90, 90),
        "eight bits must be asked for on Hopper until measured: with tiles of 64 keys they are bound by the issue of "
        "instructions",
    ),
)


def eight_bits_left_out(device: torch.device) -> str | None:
    """Why nothing may take eight bits there unless it was told to, or None. What is asked for is obeyed all the same."""
    found = place(device)
    return next((why for (lowest, highest), why in EIGHT_BITS_IF_ASKED if lowest <= found <= highest), None)


def order(operator: str, device: torch.device, precision: str, head_dim: int) -> tuple[str, ...]:
    """What `auto` tries there, fastest first: the `order` of the first row that holds the inputs."""
    capability = place(device)
    return next(
        row.order
        for row in RANKING
        if row.operator == operator
        and row.capability[0] <= capability <= row.capability[1]
        and row.precision in (None, precision)
        and row.head_dim[0] <= head_dim <= row.head_dim[1]
    )


def place(device: torch.device) -> int:
    """What rows call `capability`: that of an NVIDIA GPU which torch sees, else 0."""
    nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return hardware.capability(device) if nvidia else 0
