"""What the kernel benchmark is run on: shapes of real models, block patterns, and tokens that resemble a video's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern

BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Self-attention of a model: video tokens as (frames, rows, columns), text tokens after them, heads and head dim."""

    grid: tuple[int, int, int]
    heads: int
    dim: int
    text: int = 0

    @property
    def tokens(self) -> int:
        """Video and text tokens together."""
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text


# The large ones have fewer heads than the model where one head fills a GPU for long enough.
SHAPES = {
    "W13": Shape((21, 30, 52), 12, 128),  # Wan 2.1 1.3B, 480p, 81 frames
    "W14": Shape((21, 45, 80), 8, 128),  # Wan 2.1 14B, 720p, 81 frames; 8 of 40 heads
    "HY": Shape((33, 45, 80), 4, 128, text=256),  # HunyuanVideo, 720p, 129 frames; 4 of 24 heads
    "C2": Shape((13, 30, 45), 30, 64, text=226),  # CogVideoX-2B, 480p, 49 frames
    "C15": Shape((11, 48, 85), 8, 64, text=226),  # CogVideoX1.5-5B, 768p, 81 frames; 8 of 48 heads
    "toy": Shape((17, 16, 16), 4, 64),  # the small model of this project
    "S8": Shape((8, 32, 32), 4, 64),  # 8,192 tokens, for a CPU
    "S1": Shape((3, 16, 20), 2, 64, text=40),  # 1,000 tokens, to see that everything runs
    "S4": Shape((16, 16, 16), 12, 128),  # 4,096 tokens with the heads of Wan 2.1 1.3B, for a CPU
}
# Present names of shapes by their former ones, which rows of earlier runs hold.
FORMER_SHAPES = {"shapes": "toy"}
PATTERNS = ("random", "unequal", "window", "diagonals", "tiles", "text")
INPUTS = ("gaussian", "video")
# Channels that rotate with (frame, row, column), as the models split them.
ROTARY = {64: (16, 24, 24), 128: (44, 42, 42)}


def pattern(kind: str, shape: Shape, density: float, seed: int) -> BlockPattern:
    """A pattern of 128 x 128 blocks with about `density` of the pairs, on the CPU; the seed fixes it.

    random: any blocks, the same number in each row. unequal: 0.2 to 1.8 times as many, as top-p selection gives.
    window: the first block and those around the diagonal. diagonals: the same place in every frame, nearest first.
    tiles: the nearest boxes, if each block were one of 4 frames x 4 rows x 8 columns (sliding tile attention).
    text: random, and every query reads the last blocks (the text), whose queries read everything.
    """
    if kind not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, found {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-shape.tokens // BLOCK)
    count = min(blocks, max(1, round(density * blocks)))
    noise = torch.rand(1, shape.heads, blocks, blocks, generator=generator)
    here, there = torch.arange(blocks)[:, None], torch.arange(blocks)
    budget = torch.full((1, shape.heads, blocks, 1), count)
    order = noise
    if kind == "unequal":
        spread = 0.2 + 1.6 * torch.rand(budget.shape, generator=generator)
        budget = (density * blocks * spread).round().long().clamp(1, blocks)
    elif kind == "window":
        order = ((here - there).abs() - blocks * (there == 0)).expand_as(noise)
    elif kind == "diagonals":
        frame = max(2, round(shape.grid[1] * shape.grid[2] / BLOCK))
        offset = (here - there).abs() % frame
        order = (torch.minimum(offset, frame - offset) * blocks + (here - there).abs()).expand_as(noise)
    elif kind == "tiles":
        frames, rows, columns = (-(-tokens // box) for tokens, box in zip(shape.grid, (4, 4, 8)))
        place = there.clamp(max=frames * rows * columns - 1)  # text is beside the last box
        box = torch.stack([place // (rows * columns), place // columns % rows, place % columns])
        apart = (box[:, :, None] - box[:, None]).abs().amax(0)
        order = (apart * blocks + (here - there).abs()).expand_as(noise)
    mask = order.argsort(dim=-1, stable=True).argsort(-1) < budget
    if kind == "text":
        text = max(1, shape.text // BLOCK)
        mask[..., -text:, :] = mask[..., -text:] = True
    return BlockPattern.from_mask(mask, shape.tokens, shape.tokens)


def qkv(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[1, S, H, D]`: `gaussian`, or `video`, which are correlated as the tokens of a video are."""
    if kind not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}, found {kind!r}")
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "gaussian":
        size = (1, shape.tokens, shape.heads, shape.dim)
        q, k, v = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3))
        return q, k, v
    heads = [_video_head(shape, i / shape.heads, generator, device) for i in range(shape.heads)]
    q, k, v = (torch.stack(parts, 1)[None].to(dtype) for parts in zip(*heads))
    return q, k, v


def _video_head(shape: Shape, share: float, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """One head's q, k, v `[S, D]`. By `share` of the heads: 40 % local, 30 % temporal, 20 % by content, 10 % diffuse."""

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    latent = noise(*shape.grid, 64)
    for axis, length in enumerate((2.0, 4.0, 4.0)):  # correlation lengths in frames, rows and columns
        place = torch.arange(shape.grid[axis], device=device, dtype=torch.float32)
        near = torch.exp(-((place[:, None] - place) ** 2) / (2 * length**2))
        latent = torch.tensordot(near, latent.movedim(axis, 0), 1).movedim(0, axis)
    latent = torch.cat([(latent / latent.std()).flatten(0, 2), noise(shape.text, 64)])
    to_q, to_v = noise(64, shape.dim) / 8, noise(64, shape.dim) / 8
    to_k = to_q + 0.3 * noise(64, shape.dim) / 8
    q, k, v = (latent @ weight + 0.3 * noise(shape.tokens, shape.dim) for weight in (to_q, to_k, to_v))
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    if share < 0.4:
        axes, gain = (True, True, True), 1.6
    elif share < 0.7:
        axes, gain = (False, True, True), 1.3
    else:
        axes, gain = (False, False, False), 1.0 if share < 0.9 else 0.4
    q, k = (_rotate(gain * x, shape, axes) for x in (q, k))
    outliers = (2 + torch.rand(shape.dim, generator=generator, device=device)) * (noise(shape.dim) > 1.5)
    return q, k + gain * outliers, v


def _rotate(x: Tensor, shape: Shape, axes: tuple[bool, bool, bool]) -> Tensor:
    """Rotary embedding of the video tokens of `[S, D]` along the axes that carry position."""
    places = torch.cartesian_prod(*(torch.arange(n, device=x.device, dtype=torch.float32) for n in shape.grid))
    angles = []
    for axis, channels in enumerate(ROTARY[shape.dim]):
        step = 10_000.0 ** -(torch.arange(0, channels, 2, device=x.device) / channels)
        angles.append(places[:, axis, None] * step * axes[axis])
    turn = torch.cat(angles, 1)
    video, text = x.split([len(turn), len(x) - len(turn)])
    even, odd = video[:, ::2], video[:, 1::2]
    turned = torch.stack([even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()], -1)
    return torch.cat([turned.flatten(1), text])
