"""Scores: what a probe measured, in one file that is worth keeping, because it holds the GPU hours of a search.

The file (`search.scores_file`) is written whole or not at all, so that a kill leaves the calibration runs that were finished
before. It holds sums, not means, so that a search can go on where it stopped with the very same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.methods.cycle import mean_age, refresh_share
from diffusers_accel.search.recorders import RECORDERS
from diffusers_accel.search.scores_check import check_scores, check_size
from diffusers_accel.search.scores_data import ScoresData
from diffusers_accel.search.scores_file import Array, CalibrationRun, read, refused, write
from diffusers_accel.shape import ModelShape

__all__ = ["DENSE", "Array", "CalibrationRun", "Scores"]

DENSE = 0  # index of the dense candidate
LEAST_WEIGHT = 0.01  # of the largest


@dataclass(frozen=True)
class Scores(ScoresData):
    """Errors of every candidate for every (span, layer, head) of each transformer, as sums over samples.

    A sample is one attention call (one prompt, step, branch and batch row) in which a candidate could be measured. What a
    candidate that reuses does at its refresh steps is not sampled but known: no error, density 1. Its error is divided by
    the age of what it reused; the means below are those of its cycle, exact where errors grow evenly with age.

    Args:
        family: name of the model family.
        models: layers, heads and head dim per transformer.
        layout: how the tokens lie at the calibration size, whole text.
        candidates: the methods; the first is dense.
        spans: (start, stop) fractions of the schedule, ascending, covering [0, 1].
        segments: equal segments of the schedule that have stored masks of their own; 0 without such candidates.
        config: what a resumed search must agree with (model, call, seed, rows ...).
        provenance: what is worth knowing but may change between runs (versions, device).
        runs: the finished calibration runs, one generation each.
        sums: arrays per transformer `t`, fp64 unless said otherwise, with S spans, L layers, H heads, C candidates:
            `samples/t` (int64), `error/t`, `error_square/t`, `mse/t`, `density/t` [S, L, H, C]; `energy/t` [S, L, H];
            `mean_error/t` (fp32) [S, L, H, C, D];
            `mass/t` [L, H, frames, rows]; `mass_samples/t` (int64) [L]; the same of the first run, `first_mass/t` and
            `first_mass_samples/t`. With stored candidates of O orders also the calibration of the first run:
            `order_sparse/t`, `order_quant/t` [L, H, O] and `levels/t` (uint8) [segments, L, H, blocks, blocks], see
            `search.stored_masks`.
        impacts: of each span, as far as measured, per transformer and layer the relative squared error of the final latents per
            unit of summed error (`search.sensitivity`); 0 for a span without a call.

    Raises:
        FileError: a part is wrong or does not fit the others; the message begins with its path.
    """

    def __post_init__(self) -> None:
        check_size(self)
        check_scores(self, _arrays(self.models, len(self.spans), self.candidates, self.layout, self.segments))

    @staticmethod
    def zeros(
        models: Mapping[str, ModelShape], spans: int, candidates: tuple[Method, ...], layout: TokenLayout, segments: int
    ) -> dict[str, Array]:
        """`sums` of no sample at all."""
        arrays = _arrays(models, spans, candidates, layout, segments)
        return {name: np.zeros(shape, kind) for name, (shape, kind) in arrays.items()}

    def plus(self, done: CalibrationRun, sums: Mapping[str, Array]) -> Scores:
        """These scores and one more calibration run; of its `sums`, those that hold nothing may be left out."""
        total = {name: old + sums[name] if name in sums else old for name, old in self.sums.items()}
        return replace(self, runs=(*self.runs, done), sums=total)

    def samples(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: attention calls in which that candidate was measured."""
        return self.sums[f"samples/{transformer}"]

    def error(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: mean relative squared error, 0 or more; NaN where there is no sample.

        The unit is the energy of the layer's whole attention output, so that the errors of a layer's heads add up.
        """
        return self._mean("error", transformer) * self._ages(transformer)

    def error_std(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: standard deviation of that error over samples."""
        mean = self._mean("error", transformer)
        spread = np.sqrt(np.maximum(self._mean("error_square", transformer) - mean**2, 0))
        return spread * self._ages(transformer)

    def mse(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: the paper's MSE(O_i, O_0), in squared units of the activations."""
        return self._mean("mse", transformer) * self._ages(transformer)

    def density(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: mean realised share of computed block pairs, 0..1, refresh steps included;
        NaN where there is no sample."""
        selected = self._mean("density", transformer)
        refreshed = self._of_cycles(transformer, self._kept_for, refresh_share, 0.0)[:, None, None]  # is dense
        return selected + refreshed * (1 - selected)

    def mean_error(self, transformer: str) -> Array:
        """fp32 [spans, layers, heads, candidates, D]: mean error of each channel over the video; 0 where there is no sample."""
        count = np.maximum(self.samples(transformer), 1).astype("f4")
        return self.sums[f"mean_error/{transformer}"] / count[..., None]

    def energy(self, transformer: str) -> Array:
        """[spans, layers, heads]: mean square of the dense output, by which an MSE becomes relative."""
        count = self.samples(transformer)[..., DENSE]
        return self.sums[f"energy/{transformer}"] / np.where(count, count, np.nan)

    def steps(self, transformer: str) -> Array:
        """int [spans]: steps of a generation at which the transformer runs."""
        return np.max([done.steps[transformer] for done in self.runs], axis=0)

    def refreshed(self, transformer: str) -> Array:
        """[spans, candidates]: share of the steps at which a candidate makes anew what it uses again; 0 for one that does not."""
        return self._of_cycles(transformer, [method.period for method in self.candidates], refresh_share, 0.0)

    def _ages(self, transformer: str) -> Array:
        """[spans, 1, 1, candidates]: mean age of the output that is reused; 1 for a candidate that keeps none."""
        return self._of_cycles(transformer, self._kept_for, mean_age, 1.0)[:, None, None]

    @property
    def _kept_for(self) -> list[int | None]:
        """For how many steps each candidate keeps an output."""
        return [method.rest.period for method in self.candidates]

    def _of_cycles(
        self, transformer: str, periods: list[int | None], figure: Callable[[int, int], float], without: float
    ) -> Array:
        rows = [
            [figure(period, int(steps)) if period else without for period in periods]
            for steps in self.steps(transformer)
        ]
        return np.array(rows)

    def calls(self, transformer: str) -> Array:
        """[spans]: self-attention calls of each layer in one generation, mean over runs."""
        return np.mean([done.calls[transformer] for done in self.runs], axis=0)

    def measured_impacts(self, transformer: str) -> Array:
        """[measured spans, layers]: the impacts of one transformer."""
        rows = [span[transformer] for span in self.impacts]
        return np.array(rows, "f8").reshape(-1, self.models[transformer].layers)

    def weights(self, transformer: str) -> Array:
        """[spans, layers]: how much an error matters there: the measured impacts; all 1 until every span has them.

        They come from one prompt, so a layer in a span counts at least a hundredth of the one that matters most.
        """
        most = max((max(each) for span in self.impacts for each in span.values()), default=0.0)
        if len(self.impacts) < len(self.spans) or most == 0:
            return np.ones((len(self.spans), self.models[transformer].layers))
        return np.maximum(self.measured_impacts(transformer), LEAST_WEIGHT * most)

    @property
    def attention_share(self) -> float:
        """Share of a dense generation's wall time that goes to self-attention: median over runs, 0..1."""
        return float(np.median([done.attention_seconds / done.seconds for done in self.runs]))

    @property
    def seconds(self) -> float:
        """Wall time of a dense generation, without what was measured in it: median over runs."""
        return float(np.median([done.seconds for done in self.runs]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all, so that a failed save leaves the old one; makes its folder.

        Raises:
            OSError: it cannot be written.
        """
        write(Path(path), vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            FileError: the file is not scores, of another version, or damaged; the message says which and what to do.
        """
        path = Path(path)
        found = read(path)
        try:
            return cls(**found)
        except ValueError as error:
            raise refused(path, error) from error

    def _mean(self, name: str, transformer: str) -> Array:
        count = self.samples(transformer)
        return self.sums[f"{name}/{transformer}"] / np.where(count, count, np.nan)


def _arrays(
    models: Mapping[str, ModelShape], spans: int, candidates: tuple[Method, ...], layout: TokenLayout, segments: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of `sums`."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, model in models.items():
        layers, heads = model.layers, model.heads
        full = (spans, layers, heads, len(candidates))
        arrays[f"samples/{name}"] = full, "i8"
        arrays |= {f"{kind}/{name}": (full, "f8") for kind in ("error", "error_square", "mse", "density")}
        arrays[f"energy/{name}"] = full[:3], "f8"
        arrays[f"mean_error/{name}"] = (*full, model.head_dim), "f4"
        for recorder in RECORDERS.values():
            kinds = recorder.arrays(candidates, model, layout, segments)
            arrays |= {f"{kind}/{name}": array for kind, array in kinds.items()}
    return arrays
