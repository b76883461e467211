"""The rests that there are: one file each, and one line here."""

from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests.drop import Drop
from diffusers_accel.methods.rests.kept import Kept
from diffusers_accel.methods.rests.pooled import Pooled

RESTS: dict[str, type[Rest]] = {each.kind: each for each in (Drop, Kept, Pooled)}
