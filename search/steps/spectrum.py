"""Latents as cosine coefficients, of which the coarse ones come first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 16  # of frequencies, finer where they are low


def cosine_transform(x: Tensor, axes: Sequence[int], keep: Sequence[int]) -> Tensor:
    """The orthonormal cosine transform (DCT-II) along some axes: of each, the `keep` lowest frequencies. fp32."""
    for axis, kept in zip(axes, keep, strict=True):
        x = torch.tensordot(x, _cosines(x.shape[axis], kept), dims=([axis], [1])).movedim(-1, axis)
    return x


def kept_frequencies(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """How many of each axis are kept, so that their product is at most `most`; as large a share of each."""
    share = min(1.0, (most / math.prod(sizes)) ** (1 / max(1, len(sizes))))
    return tuple(size if share == 1 else max(1, int(size * share)) for size in sizes)


def smoothed(power: Tensor, channel: int, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Each coefficient's power by the mean of those of its channel and about its frequency, over all rows.

    Args:
        power: [rows, ...], of the coefficients that were kept.
        channel, axes: dimensions of `power`: that of channels, and those that were transformed.
        sizes: of these before coefficients were dropped.
    """
    squares = torch.zeros([power.shape[axis] for axis in axes])
    for number, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        shape = [1] * len(axes)
        shape[number] = -1
        squares = squares + (torch.arange(power.shape[axis]) / size).square().reshape(shape)
    radius = (squares / max(1, len(axes))).sqrt().flatten()
    place = torch.bucketize(radius, (torch.linspace(0, 1, BINS + 1) ** 1.5)[1:-1])
    rest = (0, channel, *axes)
    flat = power.permute(*rest).flatten(2)  # rows, channels, frequencies
    means = torch.zeros(flat.shape[1], BINS).index_add_(1, place, flat.mean(0))
    counts = torch.zeros(BINS).index_add_(0, place, torch.ones(len(place))).clamp(min=1)
    found = (means / counts)[:, place].expand_as(flat).reshape([power.shape[dim] for dim in rest])
    return found.permute(*[rest.index(dim) for dim in range(power.dim())])


def _cosines(size: int, keep: int) -> Tensor:
    """[keep, size]: orthonormal rows."""
    frequency, place = torch.arange(keep, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * frequency * (2 * place + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.float()
