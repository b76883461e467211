"""The selections that there are: one file each, imported and named here."""

from diffusers_accel.methods.select import Select
from diffusers_accel.methods.selects.all import All
from diffusers_accel.methods.selects.band import Band
from diffusers_accel.methods.selects.chunk import ChunkOnly
from diffusers_accel.methods.selects.draft import Draft
from diffusers_accel.methods.selects.radial import Radial
from diffusers_accel.methods.selects.skip import Skip
from diffusers_accel.methods.selects.stored import Stored
from diffusers_accel.methods.selects.stripe import Stripe
from diffusers_accel.methods.selects.subblock import SubBlock
from diffusers_accel.methods.selects.top_history import TopHistory

__all__ = ["All", "Skip", "Band", "Stripe", "Draft", "Stored", "Radial", "SubBlock", "ChunkOnly", "TopHistory"]

SELECTS: dict[str, type[Select]] = {each.kind: each for each in map(globals().__getitem__, __all__)}
