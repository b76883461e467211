"""What two plans do otherwise, as text for a terminal of 80 columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusers_accel.files import printable
from diffusers_accel.plan.pieces import Piece, pieces
from diffusers_accel.plan.plan import SHOWN, Plan
from diffusers_accel.plan.span import Span
from diffusers_accel.plan.told import heads_density, mean_density, told, told_number
from diffusers_accel.support.ranges import ranges

WIDTH = 80
Names = tuple[str, str]


def difference(first: Plan, second: Plan, names: Names = ("A", "B")) -> str:
    """What differs: facts of the two plans, the share of the heads that take each method, then, where both are of the same model,
    how many heads take another method in which stretch of the schedule, and which. No line is wider than 80 columns.

    Args:
        names: of the two, for headings.
    """
    if first == second:
        return "the plans are the same"
    parts = [_facts(first, second, names), _methods(first, second, names)]
    if reason := _not_comparable(first, second):
        parts.append(f"heads are not compared one by one: {reason}")
    else:
        cut = pieces(first, second)
        parts += [_stretches(first, second, cut, names), _where(first, second, cut)]
    return "\n\n".join(part.rstrip() for part in parts if part)


def _facts(first: Plan, second: Plan, names: Names) -> str:
    table = _table("", *names)
    mine, theirs = dict(_told(first)), dict(_told(second))
    alike = [name for name, text in mine.items() if text == theirs[name]]
    for name, text in mine.items():
        if name not in alike:
            _add(table, name, text, theirs[name])
    same = _wrapped(f"the same in both: {', '.join(alike)}") if alike else ""
    return "\n".join(part for part in (_drawn(table).rstrip() if table.row_count else "", same) if part)


def _told(plan: Plan) -> Iterator[tuple[str, str]]:
    shapes = [f"{name} {s.layers} x {s.heads} x {s.head_dim}" for name, s in plan.models.items()]
    density, speedup, error = mean_density(plan), *(told_number(plan, "predicted", key) for key in ("speedup", "error"))
    measured = told_number(plan, "tuned", "speedup")
    yield "family", plan.family
    yield "layers x heads", "; ".join(shapes)
    yield "forwards", plan.forwards.label if plan.forwards else "all computed"
    yield "spans", f"{len(plan.spans)} by {'share of the steps' if plan.by == 'share' else 'sigma'}"
    yield "density of heads", "not known ahead" if density is None else f"{density:.3f}"
    yield "correct", plan.correct.label if plan.correct else "nothing"
    yield "budget", _data(plan.budget)
    yield (
        "predicted",
        "not told" if speedup is None else f"{speedup:.2f}x" + ("" if error is None else f", error {error:.2g}"),
    )
    yield "measured", "not told" if measured is None else f"{measured:.2f}x"
    yield "call", _data(told(plan, "search", "call"))
    yield "model", _data(told(plan, "search", "model"))
    yield "device", _data(told(plan, "device"))
    yield "tensors", ", ".join(plan.tensors) or "none"


def _methods(first: Plan, second: Plan, names: Names) -> str:
    shares = [_by_label(plan) for plan in (first, second)]
    table = _table("share of heads", *names, "change", right=True)
    for label in sorted({**shares[0], **shares[1]}, key=lambda each: -max(share.get(each, 0.0) for share in shares)):
        mine, theirs = (share.get(label, 0.0) for share in shares)
        _add(table, label, f"{mine:.1%}", f"{theirs:.1%}", f"{100 * (theirs - mine):+.1f}")
    return _drawn(table)


def _by_label(plan: Plan) -> dict[str, float]:
    found: dict[str, float] = {}
    for symbol, share in plan.shares().items():
        label = plan.methods[symbol].label
        found[label] = found.get(label, 0.0) + share
    return found


def _not_comparable(first: Plan, second: Plan) -> str | None:
    if first.family != second.family or first.models != second.models:
        return "the plans are for other models"
    if first.by != second.by:
        return "one has spans by share of the steps, the other by sigma"
    return None


def _stretches(first: Plan, second: Plan, cut: list[Piece], names: Names) -> str:
    table = _table("stretch", "heads changed", *(f"density {name}" for name in names), right=True)
    total = sum(shape.layers * shape.heads for shape in first.models.values())
    for piece in cut:
        changed = sum(len(heads) for heads in _changed(first, second, piece).values())
        densities = (heads_density(first, piece.first), heads_density(second, piece.second))
        shown = ["?" if each is None else f"{each:.3f}" for each in densities]
        _add(table, _label(first, piece), f"{changed:,} of {total:,}", *shown)
    return _drawn(table)


def _where(first: Plan, second: Plan, cut: list[Piece]) -> str:
    """Which heads take another method: layers in which the same heads do share a line."""
    table = _table("where heads changed", "layers", "heads")
    for piece in cut:
        alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for (name, layer), changed in _changed(first, second, piece).items():
            alike.setdefault((name, tuple(changed)), []).append(layer)
        title = _label(first, piece)
        for (name, heads), layers in alike.items():
            where = f"{title}, {name}" if len(first.models) > 1 else title
            _add(table, where, ranges(layers), ranges(heads))
    return _drawn(table) if table.row_count else "no head takes another method"


def _changed(first: Plan, second: Plan, piece: Piece) -> dict[tuple[str, int], list[int]]:
    """(transformer, layer) -> its heads whose methods differ."""
    mine, theirs = first.spans[piece.first], second.spans[piece.second]
    found: dict[tuple[str, int], list[int]] = {}
    for name, shape in first.models.items():
        for layer in range(shape.layers):
            pairs = enumerate(zip(mine.heads[name][layer], theirs.heads[name][layer]))
            heads = [head for head, (one, other) in pairs if first.methods[one] != second.methods[other]]
            if heads:
                found[name, layer] = heads
    return found


def _label(plan: Plan, piece: Piece) -> str:
    return Span(piece.start, piece.stop, {}, plan.by).label


def _data(value: object) -> str:
    """JSON data, cut where it is long."""
    if value is None or value == {}:
        return "not told"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"


def _table(first: str, *others: str, right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(Text(printable(first)), overflow="fold")
    for other in others:
        table.add_column(Text(printable(other)), overflow="fold", justify="right" if right else "left")
    return table


def _add(table: Table, *cells: str) -> None:
    """Anybody may have written these texts: they steer no terminal and are no markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _drawn(what: Table | Text) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _wrapped(text: str) -> str:
    return _drawn(Text(printable(text)))
