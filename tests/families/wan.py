"""Wan 2.1, tiny."""

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import tiny_wan, tiny_wan_call

WAN = TinyFamily(tiny_wan, tiny_wan_call, TokenLayout(3, 16, 16), ("cond", "uncond"))
