"""The kernel benchmark's rows for people: tables in the console and in Markdown, and a plot of efficiency over density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_accel.evals.kernel_points import Row
from diffusers_accel.evals.kernel_rows import latest
from diffusers_accel.evals.kernel_worker import GIVE_UP, status_word

TITLE = "Attention kernels"


@dataclass(frozen=True)
class Column:
    """A heading, the text of a row under it, and whether it is left out where a table has 80 columns only."""

    heading: str
    text: Callable[[Row], str]
    wide: bool = False


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        return "-" if row.get(name) is None else format(scale * row[name], form)

    return text


def _shape(row: Row) -> str:
    return str(row["shape"] if row["input_kind"] == "gaussian" else f"{row['shape']} {row['input_kind']}")


def _impl(row: Row) -> str:
    return str(row["impl"] if row["precision"] == "input" else f"{row['impl']} {row['precision']}")


def _dense_ms(row: Row) -> str:
    return f"{row['t_dense_ms'][row['dense']]:.4g}" if "dense" in row else "-"


SHAPE, IMPL = Column("shape", _shape), Column("impl", _impl)
DENSITY = Column("density", _number("density_computed", ".3f"))
MS = Column("ms", _number("t_med_ms", ".4g"))
SPREAD = Column(
    "20-80 %", lambda row: f"{row['t_p20_ms']:.4g}-{row['t_p80_ms']:.4g}" if "t_med_ms" in row else "-", True
)
TFLOPS = Column("TFLOP/s", _number("tflops_computed", ".3g"))
RATE = Column("TB/s", _number("tbps", ".3g"), True)
ROOF = Column("roof", _number("roofline_share", ".2f"))
ERROR = Column("error", _number("rel_err", ".1e"), True)
STATUS = Column("status", status_word)
DENSE = (Column("dense", _dense_ms, True), Column("by", lambda row: str(row.get("dense", "-")), True))
EFFICIENCY = Column("eff.", _number("eta", ".2f"))
# Title, operators, columns; in this order.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[Column, ...]], ...] = (
    (
        "Sparse attention",
        ("attention",),
        (SHAPE, Column("pattern", lambda row: str(row["pattern"])), DENSITY, IMPL, MS, SPREAD, *DENSE)
        + (Column("speed", _number("speedup_total", ".2f")), EFFICIENCY, TFLOPS)
        + (Column("roof", ROOF.text, True), ERROR, STATUS),
    ),
    (
        "Prep, selection and attention",
        ("selected",),
        (
            SHAPE,
            DENSITY,
            IMPL,
            Column("prep", _number("t_prep_ms", ".3g")),
            Column("select", _number("t_select_ms", ".3g")),
        )
        + (Column("attend", _number("t_kernel_ms", ".4g")), Column("share %", _number("overhead_share", ".1f", 100.0)))
        + (Column("all", MS.text, True), Column("graph", _number("t_graph_ms", ".4g"), True))
        + (*DENSE, Column("speed", _number("speedup_total", ".2f")), STATUS),
    ),
    ("Dense attention", ("dense",), (SHAPE, IMPL, MS, SPREAD, TFLOPS, ROOF, ERROR, STATUS)),
    (
        "Operators beside attention",
        ("pool", "select", "prep", "quantize", "merge", "block_stats"),
        (SHAPE, Column("operator", lambda row: str(row["operator"])), IMPL, MS, SPREAD, TFLOPS)
        + (Column("TB/s", RATE.text), ROOF, ERROR, STATUS),
    ),
)


def tables(rows: Sequence[Row]) -> list[Any]:
    """The rows as rich tables that fit into 80 columns; reasons in full are in the Markdown and in the rows."""
    from rich import box
    from rich.table import Table

    found = []
    for title, columns, part in _parts(rows):
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        narrow = [column for column in columns if not column.wide]
        cells = [[column.text(row) for column in narrow] for row in part]
        for place, column in enumerate(narrow):
            # A cell of two words may take two lines, but no word is cut.
            words = [word for line in cells for word in (column.heading, *line[place].split())]
            left = column.heading in ("shape", "pattern", "operator", "impl", "status")
            table.add_column(column.heading, justify="left" if left else "right", min_width=max(map(len, words)))
        for line in cells:
            table.add_row(*line)
        found.append(table)
    return found


def markdown(rows: Sequence[Row], picture: str | None = None) -> str:
    """The rows as a page: where they were measured, the picture, the tables, and what could not be measured and why."""
    if not rows:
        return f"# {TITLE}\n\nNothing has been measured.\n"
    first = rows[0]
    facts = [f"{name} {value}" for part in ("machine", "versions") for name, value in first[part].items()]
    facts += [f"revision {first['git_sha']}", f"kernels {first['code']}", f"dtype {', '.join(_values(rows, 'dtype'))}"]
    lines = [f"# {TITLE}", "", "; ".join(facts) + f". {len(latest(rows))} rows.", ""]
    if picture:
        lines += [f"![Sparse efficiency over density]({picture})", ""]
    for title, columns, part in _parts(rows):
        lines += [f"## {title}", "", _line(column.heading for column in columns), _line("---" for _ in columns)]
        lines += [_line(column.text(row) for column in columns) for row in part] + [""]
    if reasons := not_measured(rows):
        lines += ["## Not measured", "", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines)


def not_measured(rows: Sequence[Row]) -> list[str]:
    """Who has no time, each reason once, with the first point where it was found."""
    found: dict[tuple[str, ...], str] = {}
    for row in latest(rows):
        if row["status"] != "ok" and status_word(row) != "drift":
            where = f"{row['operator']} {_impl(row)}, head dim {row['D']}"
            at = "" if status_word(row) == "missing" else f" (at {_shape(row)}, density {row['density_requested']})"
            found.setdefault((where, row["status"]), f"{where}: {row['status']}{at}")
    return list(found.values())


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draws sparse efficiency over density, a panel per shape; False where there is nothing to draw or no matplotlib."""
    drawn = [row for row in latest(rows) if row["operator"] == "attention" and "eta" in row]
    drawn = [row for row in drawn if all(row[x] == drawn[0][x] for x in ("input_kind", "pattern", "dtype"))]
    if not drawn:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
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
    figure.savefig(path, dpi=150)
    return True


def save(rows: Sequence[Row], folder: Path) -> Path:
    """Writes `kernels.md`, and `kernels.png` where matplotlib is installed, into a folder that is made; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = "kernels.png" if plot(rows, folder / "kernels.png") else None
    page = folder / "kernels.md"
    page.write_text(markdown(rows, picture), encoding="utf-8")
    return page


def _parts(rows: Sequence[Row]) -> list[tuple[str, tuple[Column, ...], list[Row]]]:
    """Title, columns and rows of each table that has rows; what could never run is not in them."""
    shown = [row for row in latest(rows) if status_word(row) not in GIVE_UP]
    parts = [(title, columns, [r for r in shown if r["operator"] in operators]) for title, operators, columns in TABLES]
    return [part for part in parts if part[2]]


def _values(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
