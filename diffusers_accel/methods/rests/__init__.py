"""The rests that there are: one file each, imported and named here."""

from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests.drop import Drop
from diffusers_accel.methods.rests.kept import Kept
from diffusers_accel.methods.rests.pooled import Pooled

__all__ = ["Drop", "Kept", "Pooled"]

RESTS: dict[str, type[Rest]] = {each.kind: each for each in map(globals().__getitem__, __all__)}
