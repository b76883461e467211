"""The rules that there are: one file each, imported and named here."""

from diffusers_accel.forwards.rule import Rule
from diffusers_accel.forwards.rules.easycache import EasyCache
from diffusers_accel.forwards.rules.firstblock import FirstBlock
from diffusers_accel.forwards.rules.interval import Interval
from diffusers_accel.forwards.rules.magcache import MagCache
from diffusers_accel.forwards.rules.schedule import Schedule
from diffusers_accel.forwards.rules.seacache import SeaCache
from diffusers_accel.forwards.rules.teacache import TeaCache

__all__ = ["EasyCache", "Schedule", "Interval", "MagCache", "SeaCache", "TeaCache", "FirstBlock"]

RULES: dict[str, type[Rule]] = {cls.kind: cls for cls in map(globals().__getitem__, __all__)}
