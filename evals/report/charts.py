"""The report's charts: matplotlib draws them, the page's style sheet colours them (light and dark)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.evals.metrics import METRICS, AnyMetric
from diffusers_accel.evals.report.findings import FLOOR, Findings
from diffusers_accel.files import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that become CSS variables once the SVG is inside the page.
INK, LINE = "#000001", "#000002"
SERIES = tuple(f"#00001{i}" for i in range(6))
SHORT, LONGEST = 14, 28  # characters of a name in a legend of two columns, and in any
BETTER = {"higher": "↑ better", "lower": "↓ better", "closer": "nearer dense: better"}
DASHED, DOTTED = (0, (4, 3)), (0, (1, 2))
MARKERS = ("o", "s", "D", "^", "v", "P")
_VARIABLES = {INK: "var(--ink)", LINE: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffusers_accel",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
}


def quality_speed(report: Findings) -> list[str]:
    """One SVG per metric that has values: speed-up across, quality up; small dots are clips, large ones subjects."""
    charts = []
    for metric in METRICS.values():
        points = [_point(report, metric.name, subject.name) for subject in report.subjects]
        if any(points):
            dense, floor = (report.row(metric.name, name) for name in ("dense", FLOOR))
            charts.append(_quality_chart(metric, dense, floor, points))
    return charts


def density_per_layer(report: Findings) -> list[str]:
    """One SVG per transformer: realised density of each self-attention layer, a line per subject."""
    names = list(dict.fromkeys(row["transformer"] for subject in report.subjects for row in subject.layers))
    return [_density_chart(report, name) for name in names]


def expected_front(curves: Mapping[str, Sequence[tuple[float, float]]], plans: Sequence[tuple[float, float]]) -> str:
    """One SVG: expected speed-up across, expected error up, on a logarithmic scale; a line per curve, a mark per plan. Errors of
    0 have no place on it."""
    drawn = {name: [point for point in curve if point[1] > 0] for name, curve in curves.items()}

    def draw(axes: Axes) -> None:
        for i, (name, points) in enumerate(drawn.items()):
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linestyle": ("-", DASHED, DOTTED)[i % 3]}
            axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.6, label=_label(name), **style)
        marks = [point for point in plans if point[1] > 0]
        axes.plot([x for x, _ in marks], [y for _, y in marks], color=INK, marker="o", linestyle="none", label="plans")
        if any(drawn.values()) or marks:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(
                lambda value, _: f"{value:g}"
            )  # its own labels are formulas, which no page shows
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("expected speed-up, end to end (x)   faster →")
        axes.set_ylabel("expected error of the final latents   ↓ better")
        _legend(axes)

    found = "; ".join(
        f"{name}: up to {points[-1][0]:.2f}x, at an error of {points[-1][1]:.2g}"
        for name, points in drawn.items()
        if points
    )
    return _svg("front", f"Expected error against expected speed-up. {found}", draw, (6.4, 3.9))


def _point(
    report: Findings, metric: str, subject: str
) -> tuple[str, Measurement, Measurement, list[tuple[float, float]]] | None:
    speed, quality = report.row("speedup", subject), report.row(metric, subject)
    if speed is None or quality is None or speed.value is None or quality.value is None:
        return None
    clips = [(report.row("speedup", subject, clip), report.row(metric, subject, clip)) for clip in report.clips]
    dots = [(a.value, b.value) for a, b in clips if a and b and a.value is not None and b.value is not None]
    return subject, speed, quality, dots


def _quality_chart(
    metric: AnyMetric, dense: Measurement | None, floor: Measurement | None, points: Sequence[Any]
) -> str:
    """With a second dashed line where dense has a value of its own, and a dotted one at the floor."""

    def draw(axes: Axes) -> None:
        axes.axvline(1.0, color=INK, linewidth=1, linestyle=DASHED)
        if dense and dense.value is not None:
            axes.axhline(dense.value, color=INK, linewidth=1, linestyle=DASHED)
        for i, point in enumerate(points):
            if point is None:
                continue
            subject, speed, quality, dots = point
            style: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": "none",
            }
            style["clip_on"] = False  # a mark at the end of the range is whole
            axes.plot([x for x, _ in dots], [y for _, y in dots], markersize=3.5, alpha=0.55, **style)
            spread: dict[str, Any] = {"xerr": _std(speed), "yerr": _std(quality)}
            axes.errorbar(speed.value, quality.value, fmt="none", ecolor=style["color"], capsize=3, **spread)
            axes.plot(speed.value, quality.value, markersize=9, label=_label(subject), **style)
        axes.margins(0.18)
        _keep_within(axes, metric)
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
        axes.annotate("dense", (1.0, 1.0), xytext=(4, 0), **at)
        if floor and floor.value is not None:
            _draw_floor(axes, floor.value, metric)
        axes.set_xlabel("speed-up, end to end (x)   faster →")
        unit = f" ({metric.unit})" if metric.unit else ""
        axes.set_ylabel(f"{metric.title}{unit}   {BETTER[metric.better]}")
        _legend(axes)

    found = "; ".join(f"{p[0]}: {p[1].value:.2f}x at {p[2].value:.{metric.digits}f}" for p in points if p)
    found += f"; floor at {floor.value:.{metric.digits}f}" if floor and floor.value is not None else ""
    return _svg(f"quality-{metric.name}", f"{metric.title} against speed-up. {found}", draw, (4.4, 3.3))


def _keep_within(axes: Axes, metric: AnyMetric) -> None:
    """Axes that show no value which cannot be: none beyond the range of the metric, and no speed below 0."""
    low, high = axes.get_ylim()
    least, most = metric.limits
    axes.set_ylim(max(low, least), min(high, most))
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.0))


def _draw_floor(axes: Axes, value: float, metric: AnyMetric) -> None:
    """A dotted line; at the edge where the floor is so far off that nothing else could be told apart."""
    low, high = axes.get_ylim()
    beyond = not low - (high - low) <= value <= high + (high - low)
    at = min(max(value, low), high) if beyond else value
    if not beyond:
        least, most = metric.limits
        room = 0.08 * (high - low)
        low, high = max(least, min(low, value - room)), min(most, max(high, value + room))
    axes.axhline(at, color=INK, linewidth=1, linestyle=DOTTED, clip_on=low < at < high)
    axes.set_ylim(low, high)
    text = f"floor {value:.{metric.digits}f}{', beyond this edge' if beyond else ''}"
    where: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
    below = at > high - 0.1 * (high - low)  # where there is no room above
    axes.annotate(text, (1.0, at), xytext=(0, -3 if below else 3), va="top" if below else "bottom", **where)


def _density_chart(report: Findings, transformer: str) -> str:
    lines = {}
    for subject in report.subjects:
        rows = [row for row in subject.layers if row["transformer"] == transformer and row["density"] is not None]
        lines[subject.name] = ([row["layer"] for row in rows], [row["density"] for row in rows])
    layers = max((max(x) + 1 for x, _ in lines.values() if x), default=1)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for i, (subject, (x, y)) in enumerate(lines.items()):
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(
                x, y, markersize=5 if layers <= 24 else 3, linewidth=1.2, label=_label(subject), clip_on=False, **style
            )
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.5, layers - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"layer of {transformer}")
        axes.set_ylabel("density of the whole run")
        _legend(axes)

    means = "; ".join(f"{name}: {min(y):.2f} to {max(y):.2f}" for name, (_, y) in lines.items() if y)
    return _svg(f"density-{transformer}", f"Realised density per layer of {transformer}. {means}", draw, (6.4, 2.9))


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    _, labels = axes.get_legend_handles_labels()
    columns = 2 if all(len(label) <= SHORT for label in labels) else 1
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _label(name: str) -> str:
    """A subject's name as a legend shows it. One that begins with an underscore matplotlib would leave out."""
    shown = printable(name)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _std(row: Measurement) -> float | None:
    return row.spread.std if row.spread else None


def _svg(name: str, description: str, draw: Callable[[Axes], None], inches: tuple[float, float]) -> str:
    """What `draw` puts on axes, as inline SVG: no XML head, no outside addresses, ids of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names are text in the page, in the reader's fonts; matplotlib's own only estimate their width.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(description))}"', 1)


def _tag(tag: str, name: str) -> str:
    """A tag with ids of this chart's own and the page's colours. What stands between tags is text, such as a subject's name."""
    tag = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r'\bid="|(?<=url\()#|(?<=href=")#', lambda m: f"{m.group()}{name}-", tag)
    for stand_in, variable in _VARIABLES.items():
        tag = tag.replace(stand_in, variable)
    return tag
