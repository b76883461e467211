"""Attention of a chunk of video that is denoised against a clean, growing history, reusing the history's part between steps.

FlashBlock (arXiv 2602.05305, 2026). A chunk of queries attends to its own keys, which change at every denoising step, and
to those of the history, which do not. Its attention over the history changes little from step to step, so the output and
log-sum-exp of that part are kept: the first step of a chunk computes both parts, later steps compute the chunk's own and
merge it with what is kept. A gate says which heads compute the history's part anew, and refresh what is kept of it.

What is done differently: any kernel that returns a log-sum-exp will do, instead of a fork of one; the two sets of keys are
two arguments, so that their border is exact at any length (the paper's video kernel rounds it to a tile); the log-sum-exp
stays fp32 (theirs is rounded to the activations' type, whose spacing is that of the gate's threshold); each head is refreshed by
itself; and the history is asked for only at a step that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_accel.block_external.gate import Gate
from diffusers_accel.kernels.dense import dense
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import head_index

__all__ = ["Counts", "ExternalCache", "Gate", "attend"]

History = tuple[Tensor, Tensor]  # keys and values, [B, E, H, D]


@dataclass
class Counts:
    """What a cache has done since it was made or cleared.

    full: calls in which no head reused anything: those without a history, and those in which every head computed its part.
    reusing: all other calls.
    computed_heads, reused_heads: heads x calls whose part over the history was computed, or reused. Calls without a history
        count in neither.
    """

    full: int = 0
    reusing: int = 0
    computed_heads: int = 0
    reused_heads: int = 0


@dataclass
class _CachedPartial:
    """What is kept of one layer and branch.

    fits: block, version, and shape, dtype and device of q, of which none may change.
    step: the last step that used it.
    tokens: length of the history.
    heads: which heads are kept, ascending.
    out, lse: [B, S, kept heads, D] and fp32 [B, kept heads, S].
    """

    fits: tuple[object, ...]
    step: int
    tokens: int
    heads: tuple[int, ...]
    out: Tensor
    lse: Tensor


class ExternalCache:
    """What one run of one model keeps of its attention over the history, for each layer and branch.

    A layer and branch keep one block at a time. Another block, KV version, batch size, length, dtype or device, and a step
    that lies before the last one, drop what is kept, and the call is computed in full. `clear` it for a new prompt.

    Args:
        gate: which heads compute their part anew at a step; None reuses at every step but the first of a block. Only heads
            that may reuse at a later step are kept.
        dtype: of the kept outputs; None keeps them in the dtype of q. The log-sum-exp is kept in fp32.

    Raises:
        ValueError: dtype is not a floating-point type of two bytes or more.
    """

    def __init__(self, *, gate: Gate | None = None, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
            raise ValueError(f"outputs are kept in a floating-point type of two bytes or more, found {dtype}")
        self._gate = Gate.never() if gate is None else gate
        self._dtype = dtype
        self.clear()

    def clear(self) -> None:
        """Drops all that is kept and starts the counts anew."""
        self.counts = Counts()
        self._cached: dict[tuple[int, str], _CachedPartial] = {}

    @property
    def memory(self) -> int:
        """Bytes of what is kept now."""
        return sum(each.out.nbytes + each.lse.nbytes for each in self._cached.values())

    def _find(self, layer: int, branch: str, fits: tuple[object, ...], step: int) -> _CachedPartial | None:
        """What may be reused; what no longer may is dropped."""
        cached = self._cached.get((layer, branch))
        if cached is None:
            return None
        if cached.fits != fits or step < cached.step:
            del self._cached[layer, branch]
            return None
        if step == cached.step:
            raise ValueError(
                f"layer {layer}, branch {branch!r}, block {fits[0]!r}: expected a step after {step}, found {step} again. Give "
                "each guidance branch a name and each evaluation of a solver its own step, or clear() the cache between runs"
            )
        return cached

    def _keep(self, layer: int, branch: str, partial: _CachedPartial) -> None:
        """Keeps, of what every head has just computed, the heads that may reuse theirs."""
        heads = self._gate.reusable(partial.step, layer, len(partial.heads))
        if not heads:
            self._cached.pop((layer, branch), None)
            return
        out, lse = partial.out, partial.lse
        if heads != partial.heads:
            index = head_index(heads, out.device)
            out, lse = out.index_select(2, index), lse.index_select(1, index)
        self._cached[layer, branch] = replace(partial, heads=heads, out=out.to(self._dtype or out.dtype), lse=lse)

    def _renew(
        self, partial: _CachedPartial, step: int, stale: tuple[int, ...], q: Tensor, history: History | None
    ) -> tuple[Tensor, Tensor]:
        """The part over the history, (out, lse) of every head, of which the `stale` ones are computed and refreshed."""
        partial.step = step
        out, lse = partial.out, partial.lse
        kept = head_index(partial.heads, q.device)
        whole = len(partial.heads) == q.shape[2] and out.dtype == q.dtype
        if not whole:
            out = q.new_empty(q.shape).index_copy_(2, kept, out.to(q.dtype))
            lse = lse.new_empty(q.shape[0], q.shape[2], q.shape[1]).index_copy_(1, kept, lse)
        if stale:
            assert history is not None
            index = head_index(stale, q.device)
            fresh, fresh_lse = dense(*(x.index_select(2, index) for x in (q, *history)))
            out.index_copy_(2, index, fresh)
            lse.index_copy_(1, index, fresh_lse)
            if not whole:
                partial.out.copy_(out.index_select(2, kept))
                partial.lse.copy_(lse.index_select(1, kept))
        return out, lse

    def _count(self, computed: int, heads: int) -> None:
        if computed < heads:
            self.counts.reusing += 1
        else:
            self.counts.full += 1
        self.counts.computed_heads += computed
        self.counts.reused_heads += heads - computed


@torch.no_grad()
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    external: Callable[[], History | None] | History | None,
    *,
    cache: ExternalCache,
    layer: int,
    branch: str = "",
    block: Hashable,
    version: Hashable,
    step: int,
) -> Tensor:
    """Attention of a chunk over its own keys and those of its history. Inference only: the output carries no gradient.

    Args:
        q: `[B, S, H, D]`, the chunk's queries, after norm and rotary embedding: fp16, bf16 or fp32.
        k, v: `[B, S, H, D]`, the chunk's own keys and values, and no others.
        external: keys and values of the history, `[B, E, H, D]` each, without those of the chunk; or a function that returns
            them, which is called only at a step at which some head reads them. None, or E = 0, without a history: the
            chunk is then attended to densely and nothing is kept.
        cache: what this model keeps. Models do not share one.
        layer: number of the attention layer, from 0.
        branch: name of the guidance branch, such as "cond" and "uncond", where they run one after the other.
        block: which chunk of the video this is.
        version: changes whenever the keys or values of the history do (an eviction, a rewrite); for a history that only changes
            with the block, any constant.
        step: number of the denoising step of this chunk, from 0, ascending. A pass that only writes the clean keys is one too.

    Returns:
        `[B, S, H, D]` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the history shares tokens with the chunk; it changed its length
            without changing its version; a step came twice; or the gate has no such layer or step.
    """
    for name, x in (("block", block), ("version", version)):
        if isinstance(x, Tensor):  # changed in place it would always equal itself
            raise ValueError(f"{name} is compared with that of an earlier step: expected a plain value, found a tensor")
    if k.dim() == 4 and q.dim() == 4 and k.shape[2] != q.shape[2]:
        raise ValueError(
            f"expected k and v with the {q.shape[2]} heads of q, found {k.shape[2]}: repeat those that several heads share, "
            "as what is kept and refreshed is chosen head by head"
        )
    own = dense(q, k, v)
    heads = tuple(range(q.shape[2]))
    fits = (block, version, q.shape, q.dtype, q.device)
    cached = cache._find(layer, branch, fits, step)
    stale = cache._gate.recomputes(step, layer, len(heads))
    if cached is None:
        stale = heads
    history = external() if callable(external) and stale else external
    if callable(history):
        history = None  # nobody reads it
    else:
        tokens = _tokens(k, v, history)
        if cached is not None and tokens != cached.tokens:
            raise ValueError(
                f"layer {layer}, block {block!r}, version {version!r}: expected a history of {cached.tokens} tokens as at an "
                f"earlier step, found {tokens}; a history that changes needs another version"
            )
        if tokens == 0:
            cache.counts.full += 1
            return own[0]
    cache._count(len(stale), len(heads))
    if cached is not None and stale != heads:
        whole = cache._renew(cached, step, stale, q, history)
    else:
        assert history is not None
        whole = dense(q, *history)
        cache._keep(layer, branch, _CachedPartial(fits, step, history[0].shape[1], heads, *whole))
    return merge([own, whole])[0]


def _tokens(k: Tensor, v: Tensor, history: History | None) -> int:
    """Length of a history that fits the chunk's own k and v."""
    if history is None:
        return 0
    keys, values = history
    length = keys.shape[1] if keys.dim() == 4 else "E"
    for name, own, x in (("keys", k, keys), ("values", v, values)):
        expected = [own.shape[0], length, *own.shape[2:]]
        if list(x.shape) != expected or x.dtype != own.dtype or x.device != own.device:
            raise ValueError(
                f"{name} of the history must be {expected}, {own.dtype} on {own.device} as the chunk's own, "
                f"found {list(x.shape)}, {x.dtype} on {x.device}"
            )
        if shared := _shared(own, x):
            raise ValueError(
                f"{name} of the history must not hold the chunk's own, expected 0 tokens in both, found {shared}: pass "
                "those before the chunk only"
            )
    return keys.shape[1]


def _shared(a: Tensor, b: Tensor) -> int:
    """How many tokens two `[B, S, H, D]` views of one buffer have in common; 0 where they have no common layout."""
    if a.stride() != b.stride() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return 0
    start, rest = divmod(int(b.storage_offset()) - int(a.storage_offset()), max(a.stride(1), 1))
    return 0 if rest else max(0, min(a.shape[1], start + b.shape[1]) - max(0, start))
