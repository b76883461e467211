"""The error that each candidate would make in each head of one attention call, on sampled query rows.

A sampled row's logits against all keys are computed once per head, in fp32. Split by key block they give, for each block, the
attention output over that block alone and its log-sum-exp; a candidate's output is the merge of the blocks which its mask
reads. This is exact, and a candidate costs 1/block of a row's attention instead of a kernel call, so that a measured call
costs about (rows / tokens) * (0.5 + 0.5 * orders) of the dense attention, however many candidates there are. (A quantized
candidate needs logits of its own: each order that has some counts twice.)

The error of head h is taken where the model feels it, after its slice W_h of the output projection:

    error_c = sum_rows |W_h (O_c - O_0)|^2 / sum_rows |sum_heads W_h O_0|^2

The denominator is the whole layer's output. So the errors of heads that are wrong independently of each other add up to the
relative squared error of the layer's output, which is what a search may sum; a head that hardly contributes has a small
error whatever is done to it, which an error relative to the head's own output would hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.quantize import quantize
from diffusers_accel.kernels.quantize.quantized import FP8_MAX
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Order
from diffusers_accel.methods.order import exact_tokens, video_places

IDENTITY_SCALE = 1024.0  # lifts the columns of W_o above its bias, which would round them away in bf16


@dataclass(frozen=True)
class Deviations:
    """How far candidates are from dense in some heads: felt, mse [heads, candidates], fp64.

    felt: sum_rows |W_h (O_c - O_0)|^2. mse: mean of (O_c - O_0)^2 over rows and channels.
    """

    felt: np.ndarray
    mse: np.ndarray


def sample_rows(tokens: int, rows: int, seed: Sequence[int]) -> Tensor:
    """Query tokens, one at random from each of `rows` equal stretches of the sequence: int64 [min(rows, tokens)], ascending."""
    rows = min(rows, tokens)
    edges = np.linspace(0, tokens, rows + 1)
    lowest, highest = np.ceil(edges[:-1]), np.maximum(np.ceil(edges[1:]) - 1, np.ceil(edges[:-1]))
    return torch.from_numpy(np.random.default_rng(list(seed)).integers(lowest, highest, endpoint=True))


def projection(linear: Callable[[Tensor], Tensor], channels: int, like: Tensor) -> Tensor:
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
    video = video_places(layout).to(logits.device)
    mass = logits.softmax(-1).mean(1)[:, video]
    return mass.unflatten(1, (layout.frames, layout.height, layout.width)).mean(-1)


class BlockPartials:
    """Attention of sampled rows over each key block alone, in one token order.

    Args:
        logits: [heads, rows, keys], fp32, scaled, keys in the order.
        v: [heads, keys, D], fp32, in the order.
        query_block: int64 [rows], the block in which each row lies in the order.
        fp8: round the weights of v as `int8_fp8` does. Here they are rounded relative to the largest of their block, in the
            kernels to the largest of the row so far: the same but for weights that hardly count.
    """

    def __init__(self, logits: Tensor, v: Tensor, query_block: Tensor, fp8: bool = False) -> None:
        self.query_block = query_block
        blocks = -(-logits.shape[-1] // BLOCK)
        padding = blocks * BLOCK - logits.shape[-1]
        if padding:
            logits = nn.functional.pad(logits, (0, padding), value=-torch.inf)
            v = nn.functional.pad(v, (0, 0, 0, padding))
        logits, v = logits.unflatten(-1, (blocks, BLOCK)), v.unflatten(1, (blocks, BLOCK))
        self.lse = logits.logsumexp(-1)  # [heads, rows, blocks]
        weights = (logits - self.lse[..., None]).exp()
        if fp8:
            unit = weights.amax(-1, keepdim=True) / FP8_MAX
            weights = (weights / unit).to(torch.float8_e4m3fn).float() * unit
        self.out = (weights.transpose(1, 2) @ v).transpose(1, 2)  # [heads, rows, blocks, D]

    def take(self, heads: Sequence[int]) -> BlockPartials:
        """Of some of the heads."""
        some = object.__new__(BlockPartials)
        some.query_block, some.lse, some.out = self.query_block, self.lse[list(heads)], self.out[list(heads)]
        return some

    def merge(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' attention over the blocks that they read.

        Args:
            read: bool [candidates, 1 or heads, rows, key blocks].

        Returns:
            out [heads, candidates, rows, D] and LSE [heads, candidates, rows], fp32; 0 and -inf for rows that read nothing.
        """
        lse = self.lse.masked_fill(~read, -torch.inf)  # [candidates, heads, rows, blocks]
        weights = lse.softmax(-1).nan_to_num(0.0)
        return (weights.permute(1, 2, 0, 3) @ self.out).transpose(1, 2), lse.logsumexp(-1).transpose(0, 1)


class SampledHeads:
    """Some heads of one batch row of a call, and the query rows of them that are looked at.

    Args:
        q: [queries, heads, D]; k, v: [keys, heads, D], in the model's type and order.
        rows: int64 [rows], the sampled queries.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, layout: TokenLayout) -> None:
        self.q, self.k, self.v = q, k, v
        self.rows = rows
        self.layout = layout
        self._places: dict[Order, tuple[Tensor, Tensor, Tensor]] = {}
        self._sorted: tuple[Order, Tensor, Tensor] | None = None
        self._means: tuple[Order, Tensor, Tensor] | None = None

    @cached_property
    def logits(self) -> Tensor:
        """fp32 [heads, rows, keys], scaled, in the model's order."""
        q, k = (x.transpose(0, 1).float() for x in (self.q[self.rows], self.k))
        return q @ k.transpose(1, 2) * self.q.shape[2] ** -0.5

    @cached_property
    def values(self) -> Tensor:
        """fp32 [heads, keys, D], in the model's order."""
        return self.v.transpose(0, 1).float()

    def take(self, heads: Tensor) -> SampledHeads:
        """Some of these heads; int64 [heads]."""
        some = SampledHeads(self.q[:, heads], self.k[:, heads], self.v[:, heads], self.rows, self.layout)
        some.__dict__["logits"] = self.logits[heads]
        return some

    def sorted(self, order: Order) -> tuple[Tensor, Tensor]:
        """q [1, queries, heads, D] and k [1, keys, heads, D] in an order; those of the last one are kept."""
        if self._sorted is None or self._sorted[0] != order:
            keys, queries, _ = self._place(order)
            self._sorted = order, self.q[queries][None], self.k[keys][None]
        return self._sorted[1:]

    def means(self, order: Order) -> tuple[Tensor, Tensor]:
        """Of the blocks of q and k in an order, fp32 [1, blocks, heads, D] each; those of the last one are kept."""
        if self._means is None or self._means[0] != order:
            q, k = self.sorted(order)
            self._means = order, pool(q, BLOCK), pool(k, BLOCK)
        return self._means[1:]

    def sorted_values(self, order: Order) -> Tensor:
        """v [1, keys, heads, D] in an order."""
        return self.v[self._place(order)[0]][None]

    def query_block(self, order: Order) -> Tensor:
        """int64 [rows]: the block in which each row lies in an order."""
        return self._place(order)[2][self.rows] // BLOCK

    def partials(self, order: Order, precision: str) -> BlockPartials:
        """The rows' attention over each block, in an order and a precision."""
        keys = self._place(order)[0]
        if precision == "input":
            logits, values = self.logits, self.values
            if order.moves(self.layout):
                logits, values = logits[..., keys], values[:, keys]
            return BlockPartials(logits, values, self.query_block(order))
        x = quantize(self.q[self.rows][None], self.k[keys][None], self.v[keys][None], precision)
        q, k, v = (y[0].transpose(0, 1) for y in x.dequantize())
        # With the offset, so that the LSE is that of the true keys and partials of several steps can be merged.
        logits = (q @ k.transpose(1, 2) + x.offset[0][..., None]) * q.shape[2] ** -0.5
        return BlockPartials(logits, v, self.query_block(order), fp8=precision == "int8_fp8")

    def _place(self, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        """Which key [keys] and which query stands at each place of an order, and at which place each query: int64 [queries]."""
        if order not in self._places:
            keys, queries = (x.to(self.rows.device) for x in (order.index(self.layout), order.query_index(self.layout)))
            place = torch.empty_like(queries)
            place[queries] = torch.arange(len(queries), device=queries.device)
            self._places[order] = keys[: self.layout.keys], queries, place
        return self._places[order]


def layer_energy(dense: Tensor, weight: Tensor) -> float:
    """sum_rows |sum_heads W_h O_h|^2 of dense outputs [heads, rows, D] and the whole projection [heads * D, channels]."""
    heads, rows, dim = dense.shape
    return float((dense.permute(1, 0, 2).reshape(rows, heads * dim) @ weight).double().square().sum())


def head_grams(weight: Tensor, heads: int) -> Tensor:
    """W_h W_h' of each head, [heads, D, D]: |W_h x|^2 = x' gram x takes D * D instead of D * channels for each candidate."""
    by_head = weight.unflatten(0, (heads, -1))
    return by_head @ by_head.transpose(1, 2)


def deviations(outputs: Tensor, dense: Tensor, grams: Tensor) -> Deviations:
    """How far outputs [heads, candidates, rows, D] are from dense ones [heads, rows, D]; all fp32."""
    difference = outputs - dense[:, None]
    felt = ((difference @ grams[:, None]) * difference).sum((-2, -1)).double().clamp(min=0)
    mse = difference.square().mean((-2, -1)).double()
    return Deviations(felt.cpu().numpy(), mse.cpu().numpy())


def mean_errors(outputs: Tensor, dense: Tensor, sampled: SampledHeads) -> np.ndarray:
    """fp32 [heads, candidates, D]: the mean error of outputs [heads, candidates, rows, D] over the sampled rows of the video; 0
    where there are none."""
    tokens = sampled.rows.cpu() + sampled.layout.query_start
    video = (~exact_tokens(sampled.layout))[tokens].to(dense.device)
    if not bool(video.any()):
        return np.zeros((*outputs.shape[:2], outputs.shape[3]), "f4")
    return (outputs[:, :, video].mean(2) - dense[:, None, video].mean(2)).cpu().numpy()
