"""The rules that there are: one file each, imported and named here."""

from diffusers_accel.forwards.rule import Rule
from diffusers_accel.forwards.rules.easycache import EasyCache
from diffusers_accel.forwards.rules.magcache import MagCache
from diffusers_accel.forwards.rules.schedule import Schedule

__all__ = ["EasyCache", "Schedule", "MagCache"]

RULES: dict[str, type[Rule]] = {cls.kind: cls for cls in map(globals().__getitem__, __all__)}
