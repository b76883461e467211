"""Stages on their own: the call that a layer would make, and what a method reads of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_accel.call import AttentionCall, DenseAttention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method
from diffusers_accel.methods.select import Inputs
from diffusers_accel.run.launch import Output, run
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import Partition, partition

CPU = torch.device("cpu")
NONE: Mapping[str, Tensor] = {}


def call_of(
    layout: TokenLayout,
    heads: int | Sequence[int] = 1,
    *,
    layer: int = 0,
    now: tuple[int, int] | None = None,
    dense: DenseAttention | None = None,
) -> AttentionCall:
    """A call of the model "transformer"; `heads`: how many there are, or their numbers."""
    numbers = tuple(range(heads)) if isinstance(heads, int) else tuple(heads)
    return AttentionCall(layout, "transformer", layer, numbers, now=now, dense=dense)


def mask_of(
    method: Method,
    layout: TokenLayout,
    tensors: Mapping[str, Tensor] = NONE,
    heads: int | Sequence[int] = 1,
    *,
    layer: int = 0,
    now: tuple[int, int] | None = None,
) -> Tensor:
    """bool [heads, query blocks, key blocks]: what heads read whose selection looks at neither q nor k."""
    call = call_of(layout, heads, layer=layer, now=now)
    return method.select.pattern(call, method.order, tensors, Inputs(CPU)).mask()[0]


def pattern_of(
    method: Method,
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    tensors: Mapping[str, Tensor] = NONE,
    heads: int | Sequence[int] | None = None,
    *,
    layer: int = 0,
    now: tuple[int, int] | None = None,
) -> BlockPattern:
    """What heads read of q [B, S, H, D] and k [B, keys, H, D], which lie in the method's order; by default all H heads."""
    call = call_of(layout, q.shape[2] if heads is None else heads, layer=layer, now=now)
    return method.select.pattern(
        call, method.order, tensors, Inputs(q.device, (pool(q, BLOCK), pool(k, BLOCK)), (q, k))
    )


def partition_of(
    methods: Sequence[Method],
    layout: TokenLayout,
    tensors: Mapping[str, Tensor] = NONE,
    now: tuple[int, int] | None = None,
) -> Partition:
    """The heads of layer 0, of which each has its method."""
    return partition(tuple(methods), call_of(layout, len(methods), now=now), tensors, CPU)


def attend(
    methods: Sequence[Method],
    layout: TokenLayout,
    qkv: tuple[Tensor, Tensor, Tensor],
    tensors: Mapping[str, Tensor] = NONE,
    memory: LayerCache | None = None,
    *,
    now: tuple[int, int] | None = None,
) -> Output:
    """One call of a patched layer 0, whose heads have these methods: q [B, S, H, D], k and v [B, keys, H, D]."""
    call = call_of(layout, len(methods), now=now, dense=sdpa)
    return run(partition(tuple(methods), call, tensors, qkv[0].device), call, *qkv, memory)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention as a model would compute it, [B, S, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
