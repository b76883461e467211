"""ChronoEdit: edits an image as a video from it to the result; Wan's tokens, video only.

Its two passes of CFG have no names, and are told apart by their text embeddings. With temporal reasoning the frames between are
dropped after some steps, so that the video has other sizes from there on.
"""

from __future__ import annotations

from diffusers_accel.families.family import Family, attention_of, text_at
from diffusers_accel.families.wan import TIME_EMBEDDINGS, layout_of_latents, observe_latents

CHRONOEDIT = Family(
    name="chronoedit",
    transformer="diffusers.models.transformers.transformer_chronoedit.ChronoEditTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=observe_latents,
    layout=layout_of_latents,
    text=text_at(2),
    indicators=TIME_EMBEDDINGS,
)
