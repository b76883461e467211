"""The closed loop: plans that a search expects to do what is asked are generated with, and the search is corrected by that.

`goal`: what is asked. `lab`: real clips. `model`: what they have shown of the predictions. `propose`: which plans to try next.
`tuning`: the loop, and what decides. `tune`: all of it, from the search on.
"""

from diffusers_accel.tune.goal import Goal
from diffusers_accel.tune.tune import tune_plan
from diffusers_accel.tune.tuned import Tuned

__all__ = ["Goal", "Tuned", "tune_plan"]
