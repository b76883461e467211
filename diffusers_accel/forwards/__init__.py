"""The scope above attention: which forwards of a transformer are computed, and which are predicted from earlier ones."""

from __future__ import annotations

from diffusers_accel.forwards.easycache import EasyCache
from diffusers_accel.forwards.forwards import RULES, Forwards
from diffusers_accel.forwards.magcache import MagCache
from diffusers_accel.forwards.named import NAMED_FORWARDS, NAMED_PREDICTORS, easycache, schedule
from diffusers_accel.forwards.predictors import PREDICTORS, Last, Predictor, Taylor
from diffusers_accel.forwards.rule import Computed, Decision, Now, Rule
from diffusers_accel.forwards.schedule import Schedule

__all__ = [
    "NAMED_FORWARDS",
    "NAMED_PREDICTORS",
    "PREDICTORS",
    "RULES",
    "Computed",
    "Decision",
    "EasyCache",
    "Forwards",
    "Last",
    "MagCache",
    "Now",
    "Predictor",
    "Rule",
    "Schedule",
    "Taylor",
    "easycache",
    "schedule",
]
