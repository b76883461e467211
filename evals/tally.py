"""What one comparison saw of each subject, and the rows that this makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from diffusers_accel.evals.clip_record import ClipNumbers
from diffusers_accel.evals.intervals import FEWEST, estimate, summarise
from diffusers_accel.evals.measurement import Measurement, Spread
from diffusers_accel.evals.metrics import METRICS, AnyMetric, Scored
from diffusers_accel.evals.report import Clip

BASELINE = "dense"
WARM_UP_STEPS = 2


@dataclass
class SubjectTally:
    """What was seen of one subject (or of the dense baseline)."""

    name: str = ""
    times: list[list[float]] = field(default_factory=list)  # [clip][run], ms
    middles: list[list[float]] = field(default_factory=list)  # the same, when half of a run was over
    attention: list[float] = field(default_factory=list)  # ms per run
    shares: list[float] = field(default_factory=list)  # of attention in the time of that very run
    peaks: list[int] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    scores: dict[str, list[Scored]] = field(default_factory=dict)  # metric -> per clip
    sets: Mapping[str, Scored] = field(default_factory=dict)  # metric -> of all clips together
    layers: list[dict[str, Any]] = field(default_factory=list)  # rows of `Patch.report()`, of the last run
    remarks: list[str] = field(default_factory=list)  # its notes on the patch as a whole, of all clips

    @staticmethod
    def of(name: str, clips: Sequence[ClipNumbers], sets: Mapping[str, Scored]) -> SubjectTally:
        """Of all clips of one subject."""
        tally = SubjectTally(name, sets=sets)
        for seen in (clip.seen[name] for clip in clips):
            tally.times.append(seen.times)
            tally.middles.append(seen.middles)
            tally.attention += seen.attention
            tally.shares += seen.shares
            tally.peaks += seen.peaks
            tally.densities += seen.densities
            for metric, score in seen.scores.items():
                tally.scores.setdefault(metric, []).append(score)
            tally.layers = [msgspec.structs.asdict(row) for row in seen.layers]
            tally.remarks += [note for note in seen.notes if note not in tally.remarks]
        return tally

    def over(self, dense_calls: Mapping[str, Sequence[int]], clips: Sequence[ClipNumbers]) -> SubjectTally:
        """With densities of the whole run, where a cache of diffusers has left calls out: what never ran counts as 0."""
        every = sum(sum(calls) for calls in dense_calls.values())
        densities = [
            sum(row.calls * (row.density or 0.0) for row in clip.seen[self.name].layers) / every for clip in clips
        ]
        layers = [
            {**row, "density": row["calls"] * (row["density"] or 0.0) / dense_calls[row["transformer"]][row["layer"]]}
            for row in self.layers
        ]
        return replace(self, densities=densities, layers=layers)

    def speedups(self, dense: SubjectTally) -> list[float]:
        """Of each clip: the time of dense at the middle of a run, between the dense runs beside it, over what the run took."""
        clips = zip(self.middles, self.times, dense.middles, dense.times, strict=True)
        return [
            float(np.median(np.interp(middles, dense_middles, dense_times) / np.asarray(times)))
            for middles, times, dense_middles, dense_times in clips
        ]

    @property
    def notes(self) -> str | None:
        """What the patch noted, such as why layers stayed dense, that products were simulated, or that the size is too small."""
        calls = sum(row["calls"] for row in self.layers)
        noted: Counter[str] = sum((Counter(row["notes"]) for row in self.layers), Counter())
        layers = [why if n == calls else f"{why} ({n} of {calls} calls)" for why, n in noted.items()]
        return "; ".join([*layers, *self.remarks]) or None


def over_clips(
    found: Sequence[Scored], prompts: Sequence[str], comparisons: int
) -> tuple[float | None, Spread | None, str | None]:
    """Mean and spread over the clips that have a value, and a note about the others; `prompts` are those of the clips."""
    there = [(value, prompt) for (value, _), prompt in zip(found, prompts, strict=True) if value is not None]
    notes = list(dict.fromkeys(note for value, note in found if value is None and note))
    if not there:
        return None, None, "; ".join(notes)
    values, of = zip(*there, strict=True)
    mean, spread = estimate(values, of, comparisons=comparisons)
    missing = len(found) - len(values)
    return mean, spread, f"{missing} of {len(found)} clips left out: {'; '.join(notes)}" if missing else None


def quality_rows(
    name: str,
    tally: SubjectTally,
    dense: SubjectTally | None,
    clips: Sequence[Clip],
    provenance: dict[str, Any],
    comparisons: int = 1,
) -> Iterator[Measurement]:
    """Each metric over all clips and its change from `dense`, then per clip; of dense itself where `dense` is None."""
    prompts = [clip.prompt for clip in clips]
    for metric_name, found in tally.scores.items():
        metric = METRICS[metric_name]
        yield _over_all(metric, name, found, prompts, provenance, comparisons)
        if beside := dense.scores.get(metric_name) if dense else None:
            yield _over_all(metric, name, changes(found, beside), prompts, provenance, comparisons, metric.change)
        for clip, scored in zip(clips, found, strict=True):
            yield _row(metric, name, scored, provenance, clip.key)
    for metric_name, scored in tally.sets.items():
        metric = METRICS[metric_name]
        yield _of_set(metric, name, scored, provenance)
        if dense:
            yield _of_set(metric, name, change(scored, dense.sets[metric_name]), provenance, metric.change)


def _over_all(
    metric: AnyMetric,
    name: str,
    found: Sequence[Scored],
    prompts: Sequence[str],
    provenance: dict[str, Any],
    comparisons: int,
    label: str = "",
) -> Measurement:
    mean, spread, note = over_clips(found, prompts, comparisons)
    return _row(metric, name, (mean, note), provenance, spread=spread, label=label)


def _of_set(metric: AnyMetric, name: str, scored: Scored, provenance: dict[str, Any], label: str = "") -> Measurement:
    """One number of all clips together: nothing says how far it would be for others."""
    value, note = scored
    spread = None if value is None else Spread(1)
    return _row(metric, name, (value, None if spread else note), provenance, spread=spread, label=label)


def _row(
    metric: AnyMetric,
    name: str,
    scored: Scored,
    provenance: dict[str, Any],
    clip: Mapping[str, Any] | None = None,
    spread: Spread | None = None,
    label: str = "",
) -> Measurement:
    value, note = scored
    baseline = None if name == BASELINE else BASELINE
    label = label or metric.name
    return Measurement(label, value, metric.unit, metric.better, name, baseline, provenance, spread, clip, note)


def changes(mine: Sequence[Scored], theirs: Sequence[Scored]) -> list[Scored]:
    """Clip by clip."""
    return [change(a, b) for a, b in zip(mine, theirs, strict=True)]


def change(mine: Scored, theirs: Scored) -> Scored:
    """What the first has more; none where one of them has no value, and why."""
    if mine[0] is None or theirs[0] is None:
        return None, mine[1] if mine[0] is None else theirs[1]
    return mine[0] - theirs[0], None


def cost_rows(
    name: str, tally: SubjectTally, baseline: str | None, provenance: dict[str, Any], memory: str
) -> Iterator[Measurement]:
    """Time, attention's time and share, density and memory over all clips."""
    median, spread = summarise([value for clip in tally.times for value in clip], "median")
    yield Measurement("time", median, "ms", "lower", name, baseline, provenance, spread, note=tally.notes)
    attention, spread = summarise(tally.attention, "median")
    note = "one clip, through an all-dense patch" if baseline is None else None
    yield Measurement("attention_time", attention, "ms", "lower", name, baseline, provenance, spread, note=note)
    share, spread = summarise(tally.shares, "median")
    yield Measurement("attention_share", share, "", "neither", name, baseline, provenance, spread, note=note)
    density, spread = summarise(tally.densities or [1.0], "mean")
    yield Measurement("density", density, "", "neither", name, baseline, provenance, spread)
    yield Measurement("peak_memory", float(max(tally.peaks)), "bytes", "lower", name, baseline, provenance, note=memory)


def speed_rows(
    name: str,
    tally: SubjectTally,
    dense: SubjectTally,
    clips: Sequence[Clip],
    provenance: dict[str, Any],
    comparisons: int = 1,
) -> Iterator[Measurement]:
    """Speed-up over all clips, then speed-up and time per clip."""
    ratios = tally.speedups(dense)
    mean, spread = estimate(ratios, [clip.prompt for clip in clips], comparisons=comparisons, ratio=True)
    yield Measurement("speedup", mean, "x", "higher", name, BASELINE, provenance, spread)
    for clip, ratio, times in zip(clips, ratios, tally.times, strict=True):
        yield Measurement("speedup", ratio, "x", "higher", name, BASELINE, provenance, clip=clip.key)
        yield Measurement("time", float(np.median(times)), "ms", "lower", name, BASELINE, provenance, clip=clip.key)


def noise_rows(
    dense: SubjectTally, repeat: Sequence[float], patch_difference: float, provenance: dict[str, Any]
) -> Iterator[Measurement]:
    """How far the dense runs are from each other: what no difference below should be read into."""
    drifts = [clip[-1] / clip[0] - 1 for clip in dense.times]
    size, spread = summarise([abs(drift) for drift in drifts], "median")  # of sizes: +20 % and -20 % are no rest
    ends = f"{min(drifts):+.1%} to {max(drifts):+.1%}" if len(drifts) > 1 else f"{drifts[0]:+.1%} in the one clip"
    yield Measurement("dense_drift", size, "", "neither", BASELINE, BASELINE, provenance, spread, note=ends)
    for metric, value in (("repeat_difference", max(repeat)), ("dense_patch_difference", patch_difference)):
        yield Measurement(
            metric, value, "", "lower", BASELINE, BASELINE, provenance, note=None if value else "identical"
        )


def warm_up_rows(clips: Sequence[ClipNumbers], provenance: dict[str, Any]) -> Iterator[Measurement]:
    """What the warm-up took of each, compilation and first allocations included; of several processes the longest."""
    seen = [clip.warm_up for clip in clips if clip.warm_up]
    for name in seen[0] if seen else ():
        longest = max(each[name] for each in seen)
        baseline = None if name == BASELINE else BASELINE
        yield Measurement("warm_up", longest, "ms", "lower", name, baseline, provenance)


def protocol(
    metrics: Iterable[str],
    clips: int,
    rounds: int,
    memory: str,
    processes: int = 1,
    shared: bool = False,
    floor: str | None = None,
) -> list[str]:
    """How the numbers were made, in sentences; by several processes on devices of their own, or on a `shared` CPU.

    floor: its kernel, where there is one.
    """
    return [
        f"{clips} clips (every prompt with every seed). The baseline is the same pipeline, unpatched. For each clip the initial "
        "noise comes from a CPU generator of its seed and was checked to be the same, bit for bit, in every run.",
        f"Each clip was run dense, then with each subject, then dense again ({rounds} such round{'s' * (rounds > 1)}), after a "
        f"warm-up of {WARM_UP_STEPS} steps, which is in no time below. The subjects' order is a seeded one, turned by one place "
        "with each clip and round. Time is the wall time of the whole pipeline call, text encoder and decoder included; "
        "each patched clip starts from a fresh patch, so that making its block lists is inside its time.",
        *([_of_floor(floor)] if floor else []),
        "A run's speed-up is the time of dense at the middle of that run, on the line between the dense runs before and after "
        "it, over its own time; a clip's is the median over its runs, a subject's the geometric mean over clips.",
        *_of_metrics([METRICS[name] for name in metrics]),
        "± is the sample standard deviation over clips. Intervals are Student's t on what is paired clip by clip (same prompt, "
        "seed and noise), of speed-ups on their logarithms; seeds of one prompt count once, by their mean. 95 % hold for all "
        "subjects together, and for all pairs of subjects together (Bonferroni). Below "
        f"{FEWEST} prompts there is no interval: too few clips to tell.",
        "Density is the computed share of block pairs over the whole run, dense steps and layers included.",
        "Attention time is the time inside self-attention; that of the baseline comes from one extra run of the first clip "
        "under an all-dense patch.",
        f"Peak memory: {memory}.",
        *([_side_by_side(processes, shared)] if processes > 1 else []),
    ]


def _of_floor(kernel: str) -> str:
    return (
        f"The floor is one more run of each clip, with self-attention dense as before but in another exact kernel, {kernel}; its "
        "place among the subjects turns with theirs. A subject's distance from it is paired clip by clip and above 0 where the "
        "subject is worse, whichever way the metric points."
    )


def _side_by_side(processes: int, shared: bool) -> str:
    """What several processes at a time mean for times and memory."""
    ran = f"{processes} processes ran side by side, each with clips of its own; all runs of a clip are of one process"
    if shared:
        return (
            f"{ran}. They shared one CPU, so that each run took longer than it would alone: quality is that of one process, "
            "times are not."
        )
    return (
        f"{ran}. Times and memory are those of one device, while the others worked too: they share the host's CPU, memory, power "
        "and cooling, which one process would have for itself."
    )


def _of_metrics(metrics: Sequence[AnyMetric]) -> list[str]:
    """A line for each kind of metric that is measured."""
    lines = {metric.about: [each for each in metrics if each.about == metric.about] for metric in metrics}
    return [" ".join([about, *(f"{each.title}: {each.protocol}" for each in some)]) for about, some in lines.items()]
