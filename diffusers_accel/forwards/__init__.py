"""The scope above attention: which forwards of a transformer are computed, and which are predicted from earlier ones."""

from __future__ import annotations

from diffusers_accel.forwards import predictors, rules
from diffusers_accel.forwards.forwards import Forwards
from diffusers_accel.forwards.magnitudes import Magnitudes
from diffusers_accel.forwards.named import (
    NAMED_FORWARDS,
    NAMED_PREDICTORS,
    easycache,
    firstblock,
    guidance,
    magcache,
    schedule,
    seacache,
    teacache,
)
from diffusers_accel.forwards.predictor import Predictor
from diffusers_accel.forwards.predictors import *  # noqa: F403  # the members, which their folder lists
from diffusers_accel.forwards.predictors import PREDICTORS
from diffusers_accel.forwards.rule import Computed, Decision, Now, Rule
from diffusers_accel.forwards.rules import *  # noqa: F403
from diffusers_accel.forwards.rules import RULES

__all__ = [
    "NAMED_FORWARDS",
    "NAMED_PREDICTORS",
    "PREDICTORS",
    "RULES",
    "Computed",
    "Decision",
    "Forwards",
    "Magnitudes",
    "Now",
    "Predictor",
    "Rule",
    "easycache",
    "firstblock",
    "guidance",
    "magcache",
    "schedule",
    "seacache",
    "teacache",
    *predictors.__all__,
    *rules.__all__,
]
