"""The predictors that there are: one file each, imported and named here."""

from diffusers_accel.forwards.predictor import Predictor
from diffusers_accel.forwards.predictors.guided import Guided
from diffusers_accel.forwards.predictors.last import Last
from diffusers_accel.forwards.predictors.taylor import Taylor

__all__ = ["Last", "Taylor", "Guided"]

PREDICTORS: dict[str, type[Predictor]] = {cls.kind: cls for cls in map(globals().__getitem__, __all__)}
