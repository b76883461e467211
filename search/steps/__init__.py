"""Step schedules derived, not typed: one dense generation is recorded, and what each schedule would do to it is worked out
without the model.

`trajectory`: what is recorded. `recorder`: the recording. `samples`, `spectrum`: the numbers that
errors are worked out on. `step_map`: what the scheduler does with an output, fitted. `course`: a run that predicts, as its
deviation from the recorded one. `lift`: what a deviation becomes by the end. `state_graph`, `run_errors`, `shortest_path`: the
best set of computed steps for every number of them. `replay`: what a rule that decides while it runs would do, and at which
thresholds that changes. `curve`: all of it, as choices.
"""

from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.steps.curve import DEFAULT, step_choices
from diffusers_accel.search.steps.recorder import TrajectoryRecorder, record, trajectory_identity
from diffusers_accel.search.steps.replay import ThresholdRange, replay, threshold_ranges
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep

__all__ = [
    "DEFAULT",
    "StepChoice",
    "ThresholdRange",
    "Trajectory",
    "TrajectoryRecorder",
    "TrajectoryStep",
    "record",
    "replay",
    "step_choices",
    "threshold_ranges",
    "trajectory_identity",
]
