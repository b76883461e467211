"""ConsisID: CogVideoX's blocks with a face beside them. Text in front of the video in one sequence, both branches in one forward.

The face enters by cross-attention between the blocks, which has no processor and is left alone.
"""

from __future__ import annotations

from dataclasses import replace

from diffusers_accel.families.cogvideox import COGVIDEOX

CONSISID = replace(
    COGVIDEOX,
    name="consisid",
    transformer="diffusers.models.transformers.consisid_transformer_3d.ConsisIDTransformer3DModel",
)
