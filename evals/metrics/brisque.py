"""BRISQUE (Mittal, Moorthy, Bovik 2012, IEEE TIP): how unnatural a picture looks, by the statistics of its local contrast.

A stand-in for the imaging quality of VBench, whose network (MUSIQ) needs weights that no registry of packages has: it was fitted
to photographs with blur, noise and compression, and knows nothing of what a clip shows. By the package `brisque` and its model.

Unit: none. Range: any; mostly 0, a natural picture, to 100. Flat pictures have none.
"""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics.clip_metric import ClipMetric, ClipScore
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.extras import install


def _load() -> ClipScore:
    try:
        from brisque import BRISQUE as Model
    except ImportError as error:
        raise MetricUnavailable(f"{error}: {install('brisque')}") from error
    model = Model(url=False)

    def score(frames: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):  # of flat pictures, whose score is not finite
            return float(np.mean([model.score(frame.clip(0, 1)) for frame in frames]))

    return score


BRISQUE = ClipMetric(
    name="brisque",
    title="BRISQUE (stand-in)",
    unit="",
    range="any",
    better="lower",
    protocol="the package brisque and its model (Mittal et al. 2012), mean over frames, mostly 0 (natural) to 100: a stand-in "
    "for imaging quality, which was fitted to photographs.",
    comparable="none: others take other models, and VBench's imaging quality is another metric",
    smallest=32,
    load=_load,
    packages=("brisque",),
    needs="the extra `brisque`, which takes a C++ compiler to install",
    digits=2,
)
