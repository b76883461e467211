"""HunyuanVideo 1.5: video, then image and text tokens in one sequence, existing ones first; a guider runs the passes of guidance.

The stock processor makes a mask of tokens x tokens in every layer. The one here makes none: keys are cut to those that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.families.projections import heads_of
from diffusers_accel.families.reading import read_once, row_sums
from diffusers_accel.layout import Segment, TokenLayout

_text = text_at(2)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Latents, tokens of the two texts, of the image, and whether there is an image."""
    image = argument(args, kwargs, "image_embeds", 7)
    texts = _text(args, kwargs).shape[1] + argument(args, kwargs, "encoder_hidden_states_2", 5).shape[1]
    sizes = argument(args, kwargs, "hidden_states", 0).shape[2:]
    return (*sizes, texts, image.shape[1], int(read_once(image, _has_image)))


def _has_image(embeds: Tensor) -> bool:
    """The model takes embeddings of zeros for none, and hides their tokens."""
    return bool((embeds != 0).any())


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches, then an image, then text; tokens of no image are padding behind that."""
    frames, height, width, texts, image, has_image = observation
    patch = config.patch_size
    video = Segment.video((frames // config.patch_size_t, height // patch, width // patch))
    if has_image:
        return TokenLayout.of(video, Segment("image", image), Segment("text", texts))
    return TokenLayout.of(video, Segment("text", texts + image))


def _text_valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    masks = argument(args, kwargs, "encoder_attention_mask", 3), argument(args, kwargs, "encoder_attention_mask_2", 6)
    first, second = (read_once(mask, row_sums) for mask in masks)
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of video and text together; of the mask, the layout knows how many tokens exist."""
    from diffusers.models.embeddings import apply_rotary_emb

    heads = partial(heads_of, attn)
    q, k = heads(hidden_states, attn.to_q, attn.norm_q), heads(hidden_states, attn.to_k, attn.norm_k)
    if image_rotary_emb is not None:
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
    text_q = heads(encoder_hidden_states, attn.add_q_proj, attn.norm_added_q)
    text_k = heads(encoder_hidden_states, attn.add_k_proj, attn.norm_added_k)
    v, text_v = heads(hidden_states, attn.to_v), heads(encoder_hidden_states, attn.add_v_proj)
    out = attend(torch.cat([q, text_q], 1), torch.cat([k, text_k], 1), torch.cat([v, text_v], 1))
    video, text = out.flatten(2).to(q.dtype).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


HUNYUAN_VIDEO15 = Family(
    name="hunyuan_video15",
    transformer="diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("transformer_blocks", named="attn"),
    observe=_observe,
    layout=_layout,
    text=_text,
    text_valid=_text_valid,
    call={"HunyuanVideo15AttnProcessor2_0": _call},
)
