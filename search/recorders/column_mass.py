"""How much attention each row of keys receives, for calibrated stripes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.methods.selects.stripe import mass_name
from diffusers_accel.search.measure import SampledHeads, column_mass
from diffusers_accel.search.recorders.recorder import Kinds, Recorder
from diffusers_accel.search.scores_file import Array
from diffusers_accel.shape import ModelShape


class ColumnMass(Recorder):
    """The mean over all samples of all runs, by which a plan's stripes are chosen.

    They are measured by the running mean over the samples so far of this run, this sample's own other rows included, and of the
    first run: not by all earlier runs, so that a run finds the same in whichever order and process the others are made.
    """

    splits_rows: ClassVar[bool] = True
    first_run_first: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_first = not any(self.before[f"first_mass_samples/{name}"].any() for name in self.models)
        self._mean = {
            mass_name(name): torch.zeros(self.sums[f"mass/{name}"].shape, dtype=torch.float64) for name in self.models
        }

    @classmethod
    def arrays(cls, candidates: Sequence[Method], shape: ModelShape, layout: TokenLayout, segments: int) -> Kinds:
        mass, samples = ((shape.layers, shape.heads, layout.frames, layout.height), "f8"), ((shape.layers,), "i8")
        return {"mass": mass, "mass_samples": samples, "first_mass": mass, "first_mass_samples": samples}

    @classmethod
    def tensors(
        cls, candidates: Sequence[Method], sums: Mapping[str, Array], transformer: str, method: Method, heads: Array
    ) -> dict[str, Tensor]:
        """fp32 [layers, heads, frames, rows]: mean attention probability that a key in that (frame, token row) receives."""
        count = np.maximum(sums[f"mass_samples/{transformer}"], 1)
        mass = (sums[f"mass/{transformer}"] / count[:, None, None, None]).astype(np.float32)
        return {mass_name(transformer): torch.from_numpy(mass)}

    def found(self) -> dict[str, Tensor]:
        return self._mean

    def add_rows(self, call: AttentionCall, heads: slice, sampled: SampledHeads) -> None:
        name, layer = call.place
        mass, samples = self.sums[f"mass/{name}"], self.sums[f"mass_samples/{name}"]
        mass[layer, heads] += column_mass(sampled.logits, call.layout).double().cpu().numpy()
        if heads.start == 0:
            samples[layer] += 1
        first, first_samples = self.before[f"first_mass/{name}"], self.before[f"first_mass_samples/{name}"]
        mean = (mass[layer, heads] + first[layer, heads]) / (samples[layer] + first_samples[layer])
        self._mean[mass_name(name)][layer, heads] = torch.from_numpy(mean)
        if self._is_first:
            self.sums[f"first_mass/{name}"][layer, heads] = mass[layer, heads]
            self.sums[f"first_mass_samples/{name}"][layer] = samples[layer]
