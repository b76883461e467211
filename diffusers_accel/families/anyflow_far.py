"""AnyFlow-FAR: chunk after chunk; keys of earlier chunks from a cache (the far ones in coarser patches), then the chunk itself.

The cached keys are a history without queries. The stock model fills its keys up to whole blocks of 128 with zeros that nothing
masks, so that queries read these, too: they are part of what the model computes, and stand at the end. The pass that fills the
cache, once a chunk, lets no chunk see a later one by a mask, and runs as it would without us. Both branches of CFG are one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, attention_of, optional, text_at
from diffusers_accel.layout import Segment, TokenLayout

BLOCK = 128  # of the stock model's mask
CACHES = (("compressed_cache", "num_cached_compressed_tokens"), ("full_cache", "num_cached_full_tokens"))


def _flag(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    given = optional(args, kwargs, "kv_cache_flag", 9)
    if given is None:
        raise ValueError(
            "expected AnyFlow-FAR with a KV cache, found none: without one a mask lets each chunk see the earlier ones only, "
            "which is not supported. Call the pipeline with use_kv_cache=True, or diffusers_accel.unpatch(pipe)"
        )
    flag: Mapping[str, Any] = given
    return flag


def _prepares(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(_flag(args, kwargs).get("is_cache_step"))


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Sizes of the chunk, how many chunks are cached, frames of each chunk so far."""
    _, frames, _, height, width = argument(args, kwargs, "hidden_states", 0).shape
    chunks = argument(args, kwargs, "chunk_partition", 4)
    return frames, height, width, _flag(args, kwargs)["num_cached_chunks"], *chunks


def _layout(config: Any, observation: Observation) -> TokenLayout:
    frames, height, width, cached, *chunks = observation
    far = max(cached + 1 - config.full_chunk_limit, 0)  # chunks in coarse patches
    cached_frames = ((config.compressed_patch_size, sum(chunks[:far])), (config.patch_size, sum(chunks[far:cached])))
    grids = [(count, height // patch[1], width // patch[2]) for patch, count in cached_frames if count]
    history = [
        Segment("history", count * rows * columns, (count, rows, columns), queries=False)
        for count, rows, columns in grids
    ]
    video = Segment.video((frames, height // config.patch_size[1], width // config.patch_size[2]))
    zeros = -video.tokens % BLOCK
    return TokenLayout.of(*history, video, *([Segment("condition", zeros, queries=False)] if zeros else []))


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """[B, H, tokens, D] with neighbouring pairs of channels turned by complex numbers [1, 1, tokens, D / 2]."""
    precise = x.to(torch.float64 if turns.dtype == torch.complex128 else torch.float32)
    pairs = torch.view_as_complex(precise.unflatten(3, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)


def _call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Any = None,
    rotary_emb: Any = None,
    kv_cache: Any = None,
    kv_cache_flag: Any = None,
) -> Tensor:
    """A chunk that reads the cache; the pass that fills it is the stock processor's."""
    if kv_cache_flag["is_cache_step"]:
        stock: Tensor = super(type(processor), processor).__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, kv_cache, kv_cache_flag
        )
        return stock
    q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
    q, k, v = (x.to(hidden_states.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    known = [kv_cache[name][:, :, :, : kv_cache_flag[tokens]] for name, tokens in CACHES]
    k = torch.cat([*(cache[0] for cache in known), k], dim=2)
    v = torch.cat([*(cache[1] for cache in known), v], dim=2)
    q, k = _rotated(q, rotary_emb["query"]), _rotated(k, rotary_emb["key"])
    zeros = k.new_zeros(*k.shape[:2], -q.shape[2] % BLOCK, k.shape[3])
    k, v = torch.cat([k, zeros], dim=2), torch.cat([v, zeros], dim=2)
    out = attend(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


ANYFLOW_FAR = Family(
    name="anyflow_far",
    transformer="diffusers.models.transformers.transformer_anyflow_far.AnyFlowFARTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=_observe,
    layout=_layout,
    text=text_at(3),
    call={"AnyFlowCausalAttnProcessor": _call},
    prepares=_prepares,
    hands_back=True,
    history=True,
    channels=2,
)
