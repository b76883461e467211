"""The kernel benchmark's rows for people: a page in Markdown, whose columns line up in a console too, and a plot."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from diffusers_accel.evals.kernel_bench import tiles
from diffusers_accel.evals.kernel_bench.points import Row, given_up, status_word
from diffusers_accel.evals.kernel_bench.rows import latest
from diffusers_accel.files import prepare_folder, write_whole

Column: TypeAlias = tuple[str, Callable[[Row], str]]


def _number(heading: str, name: str, form: str, scale: float = 1.0) -> Column:
    return heading, lambda row: "-" if row.get(name) is None else format(scale * row[name], form)


def _shape(row: Row) -> str:
    return str(row["shape"] if row["input_kind"] == "gaussian" else f"{row['shape']} {row['input_kind']}")


def _impl(row: Row) -> str:
    return str(row["impl"] if row["precision"] == "input" else f"{row['impl']} {row['precision']}")


def _spread(row: Row) -> str:
    return f"{row['t_p20_ms']:.4g}-{row['t_p80_ms']:.4g}" if "t_med_ms" in row else "-"


def _dense_ms(row: Row) -> str:
    return f"{row['t_dense_ms'][row['dense']]:.4g}" if "dense" in row else "-"


SHAPE, IMPL, DENSITY = ("shape", _shape), ("impl", _impl), _number("density", "density_computed", ".3f")
TIMES = (_number("ms", "t_med_ms", ".4g"), ("20-80 %", _spread))
DENSE = (("dense", _dense_ms), ("by", lambda row: str(row.get("dense", "-"))))
SPEED = _number("speed", "speedup_total", ".2f")
TFLOPS, ROOF = _number("TFLOP/s", "tflops_computed", ".3g"), _number("roof", "roofline_share", ".2f")
END = (ROOF, _number("error", "rel_err", ".1e"), ("status", status_word))
# Title, operators, columns; in this order.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[Column, ...]], ...] = (
    (
        "Sparse attention",
        ("attention",),
        (SHAPE, ("pattern", lambda row: str(row["pattern"])), DENSITY, IMPL, *TIMES, *DENSE, SPEED)
        + (_number("eff.", "eta", ".2f"), TFLOPS, *END),
    ),
    (
        "Prep, selection and attention",
        ("selected",),
        (SHAPE, DENSITY, IMPL, _number("prep", "t_prep_ms", ".3g"), _number("select", "t_select_ms", ".3g"))
        + (_number("back", "t_scatter_ms", ".3g"),)
        + (_number("attend", "t_kernel_ms", ".4g"), _number("share %", "overhead_share", ".1f", 100.0), *TIMES)
        + (_number("graph", "t_graph_ms", ".4g"), *DENSE, SPEED, END[-1]),
    ),
    ("Dense attention", ("dense",), (SHAPE, IMPL, *TIMES, TFLOPS, *END)),
    ("Tiles", ("sweep",), (SHAPE, DENSITY, IMPL, ("tile", lambda row: str(row.get("tile"))), *TIMES, TFLOPS, *END)),
    (
        "Operators beside attention",
        ("pool", "select", "prep", "quantize", "merge", "block_stats"),
        (SHAPE, ("operator", lambda row: str(row["operator"])), IMPL, *TIMES, TFLOPS, _number("TB/s", "tbps", ".3g"))
        + END,
    ),
)


def markdown(rows: Sequence[Row], picture: str | None = None) -> str:
    """The rows as a page: where they were measured, the picture, the tables, and what could not be measured and why."""
    if not rows:
        return "# Attention kernels\n\nNothing has been measured.\n"
    first, last = rows[0], latest(rows)
    facts = [f"{name} {value}" for part in ("machine", "versions") for name, value in first[part].items() if value]
    facts += [
        f"revision {first.get('git_sha') or 'unknown'}",
        f"kernels {first['code']}",
        f"dtype {', '.join(_values(rows, 'dtype'))}",
    ]
    lines = ["# Attention kernels", "", "; ".join(facts) + f". {len(last)} rows.", ""]
    if picture:
        lines += [f"![Sparse efficiency over density]({picture})", ""]
    for title, *_ in TABLES:
        lines += section(title, last)
    if reasons := not_measured(last):
        lines += ["## Not measured", "", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines)


def section(title: str, rows: Sequence[Row]) -> list[str]:
    """The lines of one table of the page, without the rows of others and those that say why there is no time."""
    operators, columns = next((names, columns) for name, names, columns in TABLES if name == title)
    part = [row for row in rows if row["operator"] in operators and not given_up(row)]
    return [f"## {title}", "", *_table(columns, part), ""] if part else []


def not_measured(rows: Sequence[Row]) -> list[str]:
    """Who has no time, each reason once, with the first point where it was found."""
    found: dict[tuple[str, ...], str] = {}
    for row in latest(rows):
        if row["status"] != "ok" and status_word(row) != "drift":
            where = f"{row['operator']} {_impl(row)}, head dim {row['D']}"
            at = "" if status_word(row) == "missing" else f" (at {_shape(row)}, density {row['density_requested']})"
            found.setdefault((where, row["status"]), f"{where}: {row['status']}{at}")
    return list(found.values())


def plot(rows: Sequence[Row]) -> bytes | None:
    """Sparse efficiency over density as a PNG, a panel per shape; None where there is nothing to draw or no matplotlib."""
    drawn = [row for row in latest(rows) if row["operator"] == "attention" and "eta" in row]
    drawn = [row for row in drawn if all(row[x] == drawn[0][x] for x in ("input_kind", "pattern", "dtype"))]
    if not drawn:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    shapes, names = _values(drawn, "shape"), list(dict.fromkeys(_impl(row) for row in drawn))
    densities = sorted({row["density_requested"] for row in drawn})
    figure = Figure(figsize=(1.0 + 3.0 * len(shapes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes):
        of_shape = [row for row in drawn if row["shape"] == shape]
        for i, name in enumerate(names):
            points = sorted((row["density_computed"], row["eta"]) for row in of_shape if _impl(row) == name)
            panel.plot([x for x, _ in points], [y for _, y in points], f"o-C{i}", markersize=3, label=name)
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set_title(f"{shape}, {of_shape[0]['N']} tokens, head dim {of_shape[0]['D']}", fontsize=9)
        panel.set(xlabel="density", xscale="log")
        panel.set_xticks(densities, [f"{x:g}" for x in densities])
        panel.minorticks_off()
        panel.grid(linewidth=0.3)
    panels[0].set(ylabel="dense time x density / sparse time", ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    return picture.getvalue()


def save(rows: Sequence[Row], folder: Path) -> Path:
    """Writes `kernels.md`, `tiles.json` of a sweep, and `kernels.png` where matplotlib is installed, into a folder that is made.

    Returns:
        The path of the page.

    Raises:
        WriteError: they cannot be written; each is whole or as it was.
    """
    prepare_folder(folder)
    picture, page = plot(rows), folder / "kernels.md"
    if any(row["operator"] == "sweep" for row in rows):
        tiles.save(rows, folder / "tiles.json")
    if picture is not None:
        write_whole(folder / "kernels.png", picture)
    write_whole(page, markdown(rows, "kernels.png" if picture else None).encode())
    return page


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    cells = [[heading for heading, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in cells]


def _values(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))
