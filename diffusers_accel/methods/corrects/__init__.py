"""The corrections that there are: one file each, imported and named here."""

from diffusers_accel.methods.correct import Correct
from diffusers_accel.methods.corrects.mean_error import MeanError

__all__ = ["MeanError"]

CORRECTS: dict[str, type[Correct]] = {each.kind: each for each in map(globals().__getitem__, __all__)}
