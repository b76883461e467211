"""CogVideoX 1.0, tiny."""

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import TEXT_TOKENS, tiny_cogvideox, tiny_cogvideox_call

COGVIDEOX = TinyFamily(
    tiny_cogvideox, tiny_cogvideox_call, TokenLayout(3, 16, 16, TEXT_TOKENS, "start"), ("cond_uncond",)
)
