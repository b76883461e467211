"""Numbers as people read them, and the sentences that say what was found."""

from __future__ import annotations

from collections import Counter

from diffusers_accel.evals.intervals import FEWEST
from diffusers_accel.evals.measurement import Measurement, Spread
from diffusers_accel.evals.metrics import METRICS, AnyMetric
from diffusers_accel.evals.report.findings import Clip, Findings, Subject
from diffusers_accel.evals.report.worst import clip_name, worst_of

UNSTEADY = 0.05  # drift between dense runs above which times are called rough
TOO_FEW = "too few clips to tell"
DIGITS = {"speedup": 2, "speed_ratio": 2, "density": 3}  # a metric says its own


def measured(report: Findings) -> list[AnyMetric]:
    """The metrics that a report has rows of."""
    names = {row.metric for row in report.rows}
    return [metric for metric in METRICS.values() if metric.name in names]


def headings(report: Findings) -> tuple[str, ...]:
    """Of the table."""
    titles = (metric.title for metric in measured(report))
    memory = report.row("peak_memory", "dense")
    whole = " of the process" if memory and "whole process" in (memory.note or "") else ""
    return ("", "speed-up", "time a clip", "in attention", "density", *titles, f"peak memory{whole}")


def seconds(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.2f} s"


def number(row: Measurement | None) -> str:
    """A row's value with its unit, of a ratio or a quality ± its standard deviation and [its interval]; "" without a row."""
    if row is None:
        return ""
    if row.value is None:
        return "identical" if row.note == "identical" else "not measured"
    if row.unit == "ms":
        return seconds(row.value)
    if row.unit == "bytes":
        return f"{row.value / 2**30:.2f} GiB"
    digits = METRICS[row.metric].digits if row.metric in METRICS else DIGITS.get(row.metric, 3)
    std = row.spread.std if row.spread and row.metric != "density" else None
    text = (
        f"{row.value:.{digits}f}"
        + ("x" if row.unit == "x" else "")
        + (f" ± {std:.{digits}f}" if std is not None else "")
    )
    text = f"{text} {row.unit}" if row.unit not in ("", "x") else text
    return f"{text} [{bounds(row, digits)}]" if told(row) else text


def told(row: Measurement | None) -> bool:
    """Whether a number has an interval, and so says something of other clips than these."""
    return row is not None and row.spread is not None and row.spread.low is not None


def bounds(row: Measurement, digits: int) -> str:
    """The interval of a number that has one."""
    assert row.spread and row.spread.low is not None
    return f"{row.spread.low:.{digits}f} to {row.spread.high:.{digits}f}"


def basis(spread: Spread) -> str:
    """What an interval rests on, or why there is none."""
    if spread.low is None:
        return TOO_FEW
    several = f", Bonferroni over {spread.comparisons}" if spread.comparisons > 1 else ""
    return f"t over {spread.prompts} prompts{several}"


def intervals(report: Findings) -> str:
    """What ± and [ ] mean in the table, or why it has no intervals."""
    prompts = len({clip.prompt for clip in report.clips})
    found = f"{prompts} prompt{'s' * (prompts > 1)}"
    if prompts < FEWEST:
        return f"± is the standard deviation over clips. No intervals: {found}, {TOO_FEW} ({FEWEST} prompts or more)."
    speedup = report.row("speedup", report.subjects[0].name)
    assert speedup and speedup.spread
    return (
        "± is the standard deviation over clips, [ ] the 95 % interval of the mean over such prompts "
        f"({basis(speedup.spread)}{' subjects' if speedup.spread.comparisons > 1 else ''})."
    )


def quality(report: Findings, metric: AnyMetric, subject: str, clip: Clip | None = None) -> str:
    """A metric of a subject, its change from dense where that has one too, and over all clips how far from the floor it is; ""
    without a row."""
    row = report.row(metric.name, subject, clip)
    beside = []
    if (change := _change(report, metric, subject, clip)) is not None:
        beside.append(f"{change:+.{metric.digits}f} from dense")
    if clip is None and (floor := report.row(metric.from_floor, subject)) and floor.value is not None:
        beside.append(_from_floor(floor, metric.digits))
    return number(row) + (f" ({', '.join(beside)})" if beside else "")


def _from_floor(row: Measurement, digits: int) -> str:
    """How far a subject is from the floor, with its interval where there is one; of a better one both are turned round."""
    assert row.value is not None
    sign, word = (-1, "better") if row.value < 0 else (1, "worse")
    text = f"{abs(row.value):.{digits}f} {word} than the floor"
    if row.spread is None or row.spread.low is None or row.spread.high is None:
        return text
    low, high = sorted(sign * bound for bound in (row.spread.low, row.spread.high))
    apart = "" if low > 0 else ", not told apart from it"
    return f"{text} [{low:.{digits}f} to {high:.{digits}f}]{apart}"


def _change(report: Findings, metric: AnyMetric, subject: str, clip: Clip | None) -> float | None:
    if clip is None:
        row = report.row(metric.change, subject)
        return row.value if row else None
    mine, dense = report.row(metric.name, subject, clip), report.row(metric.name, "dense", clip)
    if subject == "dense" or mine is None or dense is None or mine.value is None or dense.value is None:
        return None
    return mine.value - dense.value


def cells(report: Findings, subject: str) -> tuple[str, ...]:
    """One line of the table, in the order of `headings`."""
    reference = "reference" if subject == "dense" else ""
    attention = number(report.row("attention_time", subject))
    if share := report.row("attention_share", subject):
        attention += f" ({share.value:.0%})"
    costs = (number(report.row("time", subject)), attention, number(report.row("density", subject)))
    qualities = tuple(quality(report, metric, subject) or reference for metric in measured(report))
    return (
        subject,
        number(report.row("speedup", subject)) or "baseline",
        *costs,
        *qualities,
        number(report.row("peak_memory", subject)),
    )


def sentence(report: Findings, subject: str) -> str:
    """What was found about one subject: whether it was faster, or NOT, and what it cost."""
    speedup, dense, patched = (report.row(*at) for at in (("speedup", subject), ("time", "dense"), ("time", subject)))
    assert speedup and dense and patched and dense.value and patched.value  # every report has these rows
    clips, spread = len(report.clips), speedup.spread
    assert spread
    if told(speedup):
        found = f"geometric mean of {clips} clips, 95 % interval {bounds(speedup, 2)} by {basis(spread)}"
        found += " subjects" if spread.comparisons > 1 else ""
    else:
        found = f"geometric mean of {clips} clips ± {spread.std:.2f}" if clips > 1 else "one clip"
        found += f", {TOO_FEW}"
    drift = _drift(report)
    found += f", while dense itself drifted by {drift:.0%}, so times are rough" if drift > UNSTEADY else ""
    times = f"{found}; {seconds(dense.value)} → {seconds(patched.value)} a clip"
    note = f" Note: {patched.note}." if patched.note else ""
    return f"{subject} {_verdict(report, speedup)} ({times}), at {_quality(report, subject)}{_worst(report, subject)}.{note}"


def ran(subject: Subject) -> str:
    """Which kernels a subject's attention ran in, and what it kept, in its last run."""
    kernels = sum((Counter(row["kernels"]) for row in subject.layers), Counter[str]())
    calls = sum(kernels.values())
    shares = ", ".join(f"{name} ({count / calls:.0%} of the calls)" for name, count in kernels.most_common())
    text = f"Attention ran in {shares}"
    if reused := sum(row["reused"] for row in subject.layers):
        heads = sum(sum(row["methods"].values()) for row in subject.layers)
        kept = sum(row["cache_bytes"] for row in subject.layers) / 2**20
        text += f"; {reused / heads:.0%} of heads x calls merged a kept part, which took {kept:,.1f} MiB"
    return f"{text}."


def faster(report: Findings, subject: str) -> bool | None:
    """True or False where the runs can tell for such prompts; None where they are too few, or within their own noise."""
    speedup = report.row("speedup", subject)
    assert speedup
    return _beyond_noise(report, speedup) if told(speedup) else None


def _beyond_noise(report: Findings, speedup: Measurement) -> bool | None:
    """Whether it was faster by more than the drift of dense: by its interval or, without one, in each of these clips."""
    assert speedup.value and speedup.spread
    clips = [row.value for clip in report.clips if (row := report.row("speedup", speedup.subject, clip))]
    interval = [speedup.spread.low, speedup.spread.high] if told(speedup) else clips
    ends = [value for value in interval if value is not None]
    if min(ends) <= 1 <= max(ends) or abs(speedup.value - 1) <= _drift(report):
        return None
    return speedup.value > 1


def _drift(report: Findings) -> float:
    """How far the first and last dense runs of a clip are apart, as a share of time; the median of the sizes."""
    row = report.row("dense_drift", "dense")
    assert row and row.value is not None  # every report has it
    return row.value


def _verdict(report: Findings, speedup: Measurement) -> str:
    ratio, clips = f"{speedup.value:.2f}x", len(report.clips)
    where = "" if told(speedup) else " on this clip" if clips == 1 else f" on these {clips} clips"
    match _beyond_noise(report, speedup):
        case True:
            return f"ran {ratio} as fast as dense, end to end{where}"
        case False:
            return f"was NOT faster than dense: {ratio}, end to end{where}"
        case None:
            return f"was not measurably faster or slower than dense: {ratio}, end to end{where}, within the noise of the runs"


def _quality(report: Findings, subject: str) -> str:
    metrics = [metric for metric in measured(report) if report.row(metric.name, subject)]
    if not metrics:
        return "a quality that was not measured"
    if any(row.note == "identical" for metric in metrics if (row := report.row(metric.name, subject))):
        return "frames identical to dense"
    return ", ".join(f"{metric.title} {quality(report, metric, subject)}" for metric in metrics)


def _worst(report: Findings, subject: str) -> str:
    """Which of several clips came out worst, by the first metric that has a direction."""
    for metric in measured(report):
        if len(report.clips) > 1 and (found := worst_of(report, metric, subject)):
            value, clip = found
            return f"; worst {metric.title} {value:.{metric.digits}f} in {clip_name(clip)}"
    return ""
