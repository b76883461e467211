"""The error that each candidate would make in each head of one attention call, on sampled query rows.

A sampled row's logits against all keys are computed once per head, in fp32. Split by key block they give, for each block, the
attention output over that block alone and its log-sum-exp; a candidate's output is the merge of the blocks which its mask
reads. This is exact, and a candidate costs 1/block of a row's attention instead of a kernel call, so that a measured call
costs about (rows / tokens) * (0.5 + 0.5 * orders) of the dense attention, however many candidates there are.

The error of head h is taken where the model feels it, after its slice W_h of the output projection:

    error_c = sum_rows |W_h (O_c - O_0)|^2 / sum_rows |sum_heads W_h O_0|^2

The denominator is the whole layer's output. So the errors of heads that are wrong independently of each other add up to the
relative squared error of the layer's output, which is what a search may sum; a head that hardly contributes has a small
error whatever is done to it, which an error relative to the head's own output would hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, AxisOrder

IDENTITY_SCALE = 1024.0  # lifts the columns of W_o above its bias, which would round them away in bf16


@dataclass(frozen=True)
class HeadErrors:
    """Of one batch row of one call: error, mse [heads, candidates], energy [heads], all fp64 on the CPU."""

    error: np.ndarray
    mse: np.ndarray
    energy: np.ndarray


def sample_rows(tokens: int, rows: int, seed: Sequence[int]) -> Tensor:
    """Query tokens, one at random from each of `rows` equal stretches of the sequence: int64 [min(rows, tokens)], ascending."""
    rows = min(rows, tokens)
    edges = np.linspace(0, tokens, rows + 1)
    lowest, highest = np.ceil(edges[:-1]), np.maximum(np.ceil(edges[1:]) - 1, np.ceil(edges[:-1]))
    return torch.from_numpy(np.random.default_rng(list(seed)).integers(lowest, highest, endpoint=True))


def projection(linear: nn.Module, channels: int, like: Tensor) -> Tensor:
    """The matrix of an output projection, [channels in, channels out], fp32, without its bias.

    It is read by sending the identity through the module, so that LoRA, quantised weights and offload hooks all count.
    """
    probe = torch.zeros(channels + 1, channels, dtype=like.dtype, device=like.device)
    probe[:channels].fill_diagonal_(IDENTITY_SCALE)
    answer = linear(probe).float()
    return (answer[:channels] - answer[channels]) / IDENTITY_SCALE


def column_mass(logits: Tensor, layout: TokenLayout) -> Tensor:
    """Mean attention probability that a key in each (latent frame, token row) receives.

    Args:
        logits: [heads, rows, tokens], fp32.

    Returns:
        [heads, frames, height], fp32.
    """
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    mass = logits.softmax(-1).mean(1)[:, video]
    return mass.unflatten(1, (layout.frames, layout.height, layout.width)).mean(-1)


class BlockParts:
    """Attention of sampled rows over each key block alone, in one token order.

    Args:
        logits: [heads, rows, tokens], fp32, scaled, in the model's order.
        v: [heads, tokens, D], fp32, in the model's order.
        rows: int64 [rows], the sampled tokens.
    """

    def __init__(self, logits: Tensor, v: Tensor, rows: Tensor, order: AxisOrder, layout: TokenLayout) -> None:
        tokens = torch.arange(layout.tokens, device=logits.device)
        sequence = order.index(layout).to(logits.device)
        place = torch.empty_like(sequence)
        place[sequence] = tokens
        self.query_block = place[rows] // BLOCK
        blocks = layout.blocks(BLOCK)
        padding = blocks * BLOCK - layout.tokens
        if not order.identity:
            logits, v = logits[..., sequence], v[:, sequence]
        logits = nn.functional.pad(logits, (0, padding), value=-torch.inf).unflatten(-1, (blocks, BLOCK))
        v = nn.functional.pad(v, (0, 0, 0, padding)).unflatten(1, (blocks, BLOCK))
        self.lse = logits.logsumexp(-1)  # [heads, rows, blocks]
        weights = (logits - self.lse[..., None]).exp().transpose(1, 2)
        self.out = (weights @ v).transpose(1, 2)  # [heads, rows, blocks, D]

    def merge(self, masks: Tensor) -> Tensor:
        """Outputs of the rows under block masks.

        Args:
            masks: bool [candidates, 1 or heads, query blocks, key blocks].

        Returns:
            [heads, candidates, rows, D], fp32; 0 for rows that read nothing.
        """
        read = masks[:, :, self.query_block].expand(-1, self.lse.shape[0], -1, -1)  # [C, heads, rows, blocks]
        weights = self.lse.masked_fill(~read, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights.permute(1, 2, 0, 3) @ self.out).transpose(1, 2)


def head_errors(outputs: Tensor, weight: Tensor) -> HeadErrors:
    """Errors of candidates against the first of them.

    Args:
        outputs: [heads, candidates, rows, D], fp32; candidate 0 is dense.
        weight: [heads * D, channels out], fp32, the output projection without its bias.
    """
    heads, _, rows, dim = outputs.shape
    dense = outputs[:, 0]
    layer_energy = (dense.permute(1, 0, 2).reshape(rows, heads * dim) @ weight).double().square().sum()
    by_head = weight.unflatten(0, (heads, dim))
    gram = by_head @ by_head.transpose(1, 2)  # |W_h x|^2 = x' gram x: D * D instead of D * channels for each candidate
    difference = outputs - dense[:, None]
    felt = ((difference @ gram[:, None]) * difference).sum((-2, -1)).double().clamp(min=0)
    error = felt / layer_energy if layer_energy > 0 else torch.zeros_like(felt)
    mse = difference.square().mean((-2, -1)).double()
    energy = dense.square().mean((-2, -1)).double()
    return HeadErrors(*(tensor.cpu().numpy() for tensor in (error, mse, energy)))
