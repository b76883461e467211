"""HunyuanVideo with true guidance, tiny."""

from functools import partial

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import TEXT_TOKENS, tiny_hunyuan, tiny_hunyuan_call

HUNYUAN_VIDEO = TinyFamily(
    tiny_hunyuan,
    partial(tiny_hunyuan_call, true_cfg=True),
    TokenLayout(3, 16, 16, TEXT_TOKENS, "end", 7),
    ("cond", "uncond"),
    bitwise=False,  # keys are cut instead of masked
    alone={"true_cfg_scale": 1.0},
)
