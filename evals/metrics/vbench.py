"""The dimensions of VBench (Huang et al. 2023, arXiv 2311.17982) that take clips of any prompt, by VBench's own program.

It runs in an environment of its own (`evals.vbench`), on lossless films of 8 bits. There is no total score of such clips.
"""

from __future__ import annotations

from functools import partial

from diffusers_accel.evals.metrics.clip_set import ClipSet
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.evals.metrics.set_metric import SetMetric, SetScore
from diffusers_accel.evals.vbench import environment
from diffusers_accel.evals.vbench.clips import Clips, Film
from diffusers_accel.evals.vbench.dimensions import CUSTOM, DIMENSIONS
from diffusers_accel.evals.vbench.process import VBenchFailed, measure
from diffusers_accel.evals.vbench.run import check_ready
from diffusers_accel.files import FileError

PREFIX = "vbench_"


def _load(dimension: str) -> SetScore:
    try:
        place = environment.find()
        check_ready([dimension], place, standard=False)
    except FileError as error:
        raise MetricUnavailable(str(error)) from error
    device = environment.device(place, None)
    return lambda clips: _score(dimension, clips, place, device)


def _score(dimension: str, clips: ClipSet, place: environment.Environment, device: str) -> float:
    films = {each.path.name: Film(each.path, each.prompt) for each in clips.clips}
    try:
        return measure(dimension, Clips(films), place, device).score
    except VBenchFailed as error:
        raise MetricUnavailable(str(error)) from error


VBENCH = tuple(
    SetMetric(
        name=PREFIX + name,
        title=f"VBench {DIMENSIONS[name].title.lower()}",
        unit="",
        range="0 to 1",
        # More of these is less motion; the others say that a clip is good or does what was asked for.
        better="closer" if name in ("temporal_flickering", "dynamic_degree") else "higher",
        protocol=f"VBench's dimension {name} by its own program, version 0.1.5, custom input; not normalised.",
        comparable="VBench of custom input only; its tables are of its own prompts, see `diffusers-accel vbench run`",
        load=partial(_load, name),
        needs="`diffusers-accel vbench setup`" + (" and weights" if DIMENSIONS[name].weights else ""),
    )
    for name in CUSTOM
)
