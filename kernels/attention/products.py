"""Attention of a few bf16 queries to many keys on a CPU that multiplies bf16: two products and a softmax between them.

PyTorch's fused CPU attention goes through the keys once for 32 of less than 192 queries, 64 of less than 768, and takes as
long as for fp32. Here one product takes all queries: scores in fp32, and the weighted values in bf16. The softmax is fp32.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Scores at once. More falls out of the second-level cache of one core, less pays for more calls.
SCORE_BYTES = 1 << 20
# From here on the fused attention takes 256 queries at once.
LONG = 768
# A product of fewer queries reads its keys too often for what it multiplies.
FEWEST = 32
# Larger workspaces are given back.
KEPT_BYTES = 8 << 20

_workspaces = threading.local()


def faster(queries: int, dtype: torch.dtype) -> bool:
    """Whether `attention` is faster than PyTorch's fused one for so many queries.

    Of fp32 it is as fast and takes more calls. With AMX, which multiplies bf16 many times as fast as fp32, the fused
    attention uses that, and the scores here would not.
    """
    return (
        dtype == torch.bfloat16
        and queries < LONG
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def at_once(queries: int, keys: int) -> int:
    """How many groups of so many queries and keys are computed together."""
    return max(1, round(SCORE_BYTES / (4 * queries * keys)))


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Every query to every key of its group: q, k, v `[N, 1, S, D]`, any strides but 1 in D -> out, lse `[N, 1, S]`."""
    rows = max(FEWEST, 2 * SCORE_BYTES // (4 * q.shape[0] * k.shape[2]))
    if q.shape[2] > rows:
        parts = [attention(part, k, v, scale=scale) for part in q.split(rows, 2)]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    q, k, v = q[:, 0].float(), k[:, 0], v[:, 0]
    keys = workspace("fp32 keys", k.shape, torch.float32).copy_(k).transpose(1, 2)
    scores = workspace("scores", (q.shape[0], q.shape[1], k.shape[1]), torch.float32)
    torch.baddbmm(scores, q, keys, beta=0, alpha=scale, out=scores)
    largest = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    # The largest weight is exp(largest score - log-sum-exp). A pass for the sum of exponentials would take longer.
    lse = largest.sub_(scores.amax(-1).log_())
    weights = workspace("weights", scores.shape, v.dtype).copy_(scores)
    return torch.bmm(weights, v)[:, None], lse[:, None]


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor that is this thread's until it asks for its name again: fresh memory costs page faults."""
    size = math.prod(shape)
    kept: dict[tuple[str, torch.dtype], Tensor] = _workspaces.__dict__.setdefault("kept", {})
    found = kept.get((name, dtype))
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # one that is made inside could not be written outside
            found = torch.empty(size, dtype=dtype)
        if found.nbytes <= KEPT_BYTES:
            kept[name, dtype] = found
    return found[:size].view(*shape)
