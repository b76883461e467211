"""toy: a small text-to-video model that a checkout of the project holds, and the only input of its tests and examples.

    pipe = load_pipeline()
    video = pipe("a red circle moves left on a navy background", **CALL).frames[0]

The pipeline is the host's own `WanPipeline`; a call without `CALL` would take its default of 480 x 832 x 81.
"""

from __future__ import annotations

from typing import Any

from diffusers_accel.evals.toy.render import held_out_prompts
from diffusers_accel.evals.toy.weights_folder import WEIGHTS, load_pipeline, verify_weights

# The call that the model was trained for: 17 x 16 x 16 = 4,352 video tokens.
CALL: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "num_inference_steps": 10,
    "guidance_scale": 3.0,
}

__all__ = ["CALL", "WEIGHTS", "held_out_prompts", "load_pipeline", "verify_weights"]
