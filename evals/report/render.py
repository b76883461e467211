"""The report as one page that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.evals.metrics import METRICS, AnyMetric
from diffusers_accel.evals.report import charts, pair_table, words
from diffusers_accel.evals.report.colours import Colour, method_colours
from diffusers_accel.evals.report.findings import FLOOR, Clip, Findings, Subject
from diffusers_accel.evals.report.page_films import fitting
from diffusers_accel.evals.report.worst import ranked_by, worst_first
from diffusers_accel.files import printable
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.plan.span import compact, row_text
from diffusers_accel.plan.uses import made_for
from diffusers_accel.support.markdown import as_markdown_text

FOLDER = Path(__file__).parent
MOST_LINES = 2_000  # of the table of clips
LETTERS_UP_TO = 16  # heads; a wider plan gets small cells without letters
LETTER = 7  # pixels of a symbol's character; where symbols are wider than a cell, only the legend has them


def html(report: Findings) -> str:
    """The page: style, script, charts and clips inside it."""
    template = _environment(autoescape=True).get_template("report.html.j2")
    shown, films_left_out = fitting([clip for clip in worst_first(report) if clip.media])
    colours = method_colours(method for subject in report.subjects for method in subject.plan.methods.values())
    return template.render(
        **_shared(report),
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "player.js").read_text(encoding="utf-8")),
        quality_charts=[Markup(svg) for svg in charts.quality_speed(report)],
        density_charts=[Markup(svg) for svg in charts.density_per_layer(report)],
        plans=[_plan(subject, colours, _layout(report.provenance)) for subject in report.subjects],
        shown=[_clip(report, clip) for clip in shown],
        shown_are=_shown_are(report, len(shown)),
        films_left_out=films_left_out,
        fps=next((clip.media.fps for clip in shown if clip.media), 1),
    )


def markdown(report: Findings) -> str:
    """The numbers, without plans and clips."""
    environment = _environment(autoescape=False)
    environment.filters["text"] = as_markdown_text
    return environment.get_template("report.md.j2").render(**_shared(report)).rstrip() + "\n"


def front_page(chart: str, caution: str, device: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The page of a search's front: its chart, SVG, and a table of its plans."""
    style = Markup((FOLDER / "report.css").read_text(encoding="utf-8"))
    template = _environment(autoescape=True).get_template("front.html.j2")
    return template.render(style=style, chart=Markup(chart), caution=caution, device=device, columns=columns, rows=rows)


def _environment(autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: object) -> object:
    """What is put into a template, in one line and without control characters; `Markup` is ours and stays as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shared(report: Findings) -> dict[str, Any]:
    names = [subject.name for subject in report.subjects]
    titles = [metric.title for metric in _per_clip(report)]
    return {
        "sentences": [words.sentence(report, name) for name in names],
        "verdicts": [words.faster(report, name) for name in names],
        "headings": words.headings(report),
        "table": [words.cells(report, name) for name in ("dense", *report.names)],
        "notes": _notes(report),
        "clip_headings": ("prompt", "seed", "subject", "speed-up", "time", *titles),
        **_clip_table(report),
        "pair_headings": pair_table.HEADINGS,
        "pair_table": pair_table.lines(report),
        "intervals": words.intervals(report),
        "protocol": report.provenance["protocol"],
        "provenance": _facts(report.provenance),
    }


def _clip_table(report: Findings) -> dict[str, Any]:
    """A line for each subject of the worst clips, and a sentence about the clips that have none."""
    clips = worst_first(report)
    told = clips[: max(1, MOST_LINES // len(report.names))]
    untold = len(clips) - len(told)
    left_out = f" These are the worst {len(told):,}; the other {untold:,} are in report.json." if untold else ""
    return {
        "clip_table": [_clip_row(report, clip, name) for clip in told for name in report.names],
        "clips_are": f"The worst clip comes first.{left_out}",
    }


def _shown_are(report: Findings, count: int) -> str:
    """Which clips have films on the page, where not all have."""
    metric = ranked_by(report)
    if count == len(report.clips) or metric is None:
        return ""
    which = "The worst clip" if count == 1 else f"The {count} worst clips"
    return f"{which} of {len(report.clips):,}, by the lowest quality of any subject ({metric.title} first)."


def _clip_row(report: Findings, clip: Clip, name: str) -> tuple[str, ...]:
    times = (words.number(report.row(metric, name, clip)) for metric in ("speedup", "time"))
    qualities = (words.quality(report, metric, name, clip) for metric in _per_clip(report))
    return clip.prompt, str(clip.seed), name, *times, *qualities


def _per_clip(report: Findings) -> list[AnyMetric]:
    return [metric for metric in words.measured(report) if metric.scores_clips]


def _notes(report: Findings) -> list[str]:
    """What was left out or could not be measured, and what the dense runs say about the measurement itself."""
    found: dict[str, list[str]] = {}
    for row in report.rows:
        if row.metric in METRICS and row.clip is None and row.note:
            found.setdefault(f"{METRICS[row.metric].title}: {row.note}", []).append(row.subject)
    notes = [f"{', '.join(subjects)}: {note}." for note, subjects in found.items()]
    drift, repeat, patched = (
        report.row(m, "dense") for m in ("dense_drift", "repeat_difference", "dense_patch_difference")
    )
    assert drift and drift.value is not None and repeat and patched  # every report has these rows
    apart = f"the last took {drift.value:.1%} more or less time than the first (median of the sizes; {drift.note})"
    return [
        *notes,
        f"Dense runs of the same clip: {_difference(repeat)}; {apart}.",
        *_floor(report),
        *_warm_up(report),
        f"Dense under an all-dense patch against dense unpatched: {_difference(patched)}.",
    ]


def _floor(report: Findings) -> list[str]:
    if FLOOR not in report.names:
        return []
    kernel = report.provenance[FLOOR]
    return [
        f"Floor: dense attention in another exact kernel, {kernel}, on the same clips. What is no worse than the floor cannot be "
        "told from a change of kernel."
    ]


def _warm_up(report: Findings) -> list[str]:
    rows = [row for row in report.rows if row.metric == "warm_up"]
    took = ", ".join(f"{row.subject} {words.number(row)}" for row in rows)
    return [f"Warm-up, which is in no time above: {took}."] if rows else []


def _difference(row: Measurement) -> str:
    return f"frames differ by up to {row.value:.2g} of full range" if row.value else "identical frames"


def _facts(provenance: Any) -> list[tuple[str, str]]:
    """Machine, versions, shapes and settings, as pairs of text."""
    keys = ("machine", "versions", "pipeline", "call", "clip", "tokens", "prompts", "seeds", "order")
    return [(key, _flat(provenance[key])) for key in keys if provenance.get(key)]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(
            json.dumps(item, ensure_ascii=False) if isinstance(item, str) else _flat(item) for item in value
        )
    return str(value)


def _layout(provenance: Mapping[str, Any]) -> TokenLayout | None:
    """How the tokens of the compared calls lay, as far as a report says it."""
    tokens = provenance.get("tokens")
    return made_for({"layout": {**tokens, "text_tokens": tokens.get("text")}}) if isinstance(tokens, Mapping) else None


def _plan(subject: Subject, colours: Mapping[Method, Colour], layout: TokenLayout | None) -> dict[str, Any]:
    """The heat maps of one plan: a panel per span and transformer, and a legend."""
    plan = subject.plan
    densities = {symbol: method.expected_density(layout) for symbol, method in plan.methods.items()}
    longest = max(map(len, plan.methods))
    panels: list[dict[str, Any]] = []
    for span in plan.spans:
        for name, rows in span.heads.items():
            asked = [densities[symbol] for row in rows for symbol in row]
            title = span.label + (f", {name}" if len(span.heads) > 1 else "")
            cell = (34 if len(rows[0]) <= 8 else 24) if len(rows[0]) <= LETTERS_UP_TO else 11
            known = [density for density in asked if density is not None]
            mean = sum(known) / len(known) if len(known) == len(asked) else None
            said = (" " if compact(plan.methods) else ", ").join(row_text(row, plan.methods) for row in rows)
            letters = cell > LETTERS_UP_TO and longest * LETTER < cell
            panels.append(
                {"title": title, "rows": rows, "said": said, "density": mean, "cell": cell, "letters": letters}
            )
    legend = [
        {
            "symbol": symbol,
            "label": plan.methods[symbol].label,
            "share": share,
            "density": densities[symbol],
        }
        for symbol, share in plan.shares().items()
    ]
    forwards = plan.forwards.label if plan.forwards else None
    shown: dict[str, Any] = {
        "name": subject.name,
        "forwards": forwards,
        "host": subject.host,
        "ran": words.ran(subject),
    }
    shown |= {"panels": panels, "legend": legend}
    by_symbol = {symbol: colours[method] for symbol, method in plan.methods.items()}
    return {**shown, "colours": by_symbol, "methods": plan.methods}


def _clip(report: Findings, clip: Clip) -> dict[str, Any]:
    """The films of one clip: a stack for each run, its difference from dense below it."""
    assert clip.media
    stacks = []
    for name, film in clip.media.videos.items():
        found = [(metric, report.row(metric.name, name, clip)) for metric in _per_clip(report)]
        scores = [
            f"{m.title} {words.quality(report, m, name, clip)}" for m, row in found if row and row.value is not None
        ]
        note = ", ".join(["baseline", *scores] if name == "dense" else scores)
        stacks.append([{"title": name, "data": _base64(film), "note": note}])
        if name in clip.media.differences:
            gain = clip.media.gain
            note = f"|{name} − dense| × {gain}"
            difference = _base64(clip.media.differences[name])
            stacks[-1].append({"title": f"difference × {gain}", "data": difference, "note": note})
    return {"prompt": clip.prompt, "seed": clip.seed, "stacks": stacks}


def _base64(film: bytes) -> str:
    return base64.b64encode(film).decode("ascii")
