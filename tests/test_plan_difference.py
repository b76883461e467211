"""What two plans do otherwise: figures that can be counted by hand, in 80 columns, whatever the plans say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from diffusers_accel.forwards import easycache
from diffusers_accel.methods import Band, Method, Skip
from diffusers_accel.plan import Plan, Span
from diffusers_accel.plan.difference import difference
from diffusers_accel.plan.pieces import Piece, pieces
from diffusers_accel.shape import ModelShape

METHODS = {".": Method(), "a": Method(select=Band(0.5)), "0": Method(select=Skip())}


def plan(*spans: tuple[float, float, str, str], **changes: Any) -> Plan:
    """Two layers of four heads."""
    made = tuple(Span(start, stop, {"transformer": (one, two)}) for start, stop, one, two in spans)
    base = Plan("wan", {"transformer": ModelShape(2, 4, 16)}, METHODS, made, {"kind": "density"})
    return replace(base, **changes)


ONE = plan((0.0, 0.25, "....", "...."), (0.25, 1.0, "aa..", "aa.."))
OTHER = plan((0.0, 0.5, "....", "...."), (0.5, 1.0, "aa.0", "aa.0"), forwards=easycache(), budget={})


def lines(text: str) -> list[list[str]]:
    """Cells, between which there are two spaces or more."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_the_schedule_is_cut_where_either_plan_begins_a_span() -> None:
    assert pieces(ONE, OTHER) == [Piece(0.0, 0.25, 0, 0), Piece(0.25, 0.5, 1, 0), Piece(0.5, 1.0, 1, 1)]
    falling = [
        Plan("wan", ONE.models, METHODS, tuple(Span(a, b, ONE.spans[0].heads, "sigma") for a, b in edges))
        for edges in (((1.0, 0.6), (0.6, 0.0)), ((1.0, 0.0),))
    ]
    assert pieces(falling[0], falling[1]) == [Piece(1.0, 0.6, 0, 0), Piece(0.6, 0.0, 1, 0)]


def test_what_differs_is_told_and_counted() -> None:
    found = lines(difference(ONE, OTHER, ("one", "other")))
    assert ["forwards", "all computed", "easycache 0.025, last residual"] in found
    assert ["budget", '{"kind": "density"}', "not told"] in found
    # Of all heads over the schedule: 0.25 + 0.75 / 2 are dense, against 0.5 + 0.5 / 4.
    assert ["dense", "62.5%", "62.5%", "+0.0"] in found
    assert ["band 0.5", "37.5%", "25.0%", "-12.5"] in found
    assert ["skip", "0.0%", "12.5%", "+12.5"] in found
    assert ["0% to 25% of the steps", "0 of 8", "1.000", "1.000"] in found
    assert ["25% to 50% of the steps", "4 of 8", "0.750", "1.000"] in found
    assert ["50% to 100% of the steps", "2 of 8", "0.750", "0.500"] in found
    # Both layers changed alike, and share a line.
    assert found[-2:] == [["25% to 50% of the steps", "0-1", "0-1"], ["50% to 100% of the steps", "0-1", "3"]]
    assert any(line[0].startswith("the same in both: family, layers x heads, spans") for line in found if line)


def test_equal_plans_and_symbols_that_mean_the_same() -> None:
    assert difference(ONE, replace(ONE)) == "the plans are the same"
    renamed = {".": Method(), "0": Method(select=Band(0.5)), "a": Method(select=Skip())}
    other = plan((0.0, 0.25, "....", "...."), (0.25, 1.0, "00..", "00.."), methods=renamed)
    found = difference(ONE, other)
    assert "no head takes another method" in found and "0 of 8" in found and "of 8" in found


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (replace(ONE, family="hunyuan_video"), "the plans are for other models"),
        (Plan.uniform(Method(), "wan", {"transformer": ModelShape(2, 8, 16)}), "the plans are for other models"),
        (Plan("wan", ONE.models, METHODS, (Span(1.0, 0.0, ONE.spans[1].heads, "sigma"),)), "the other by sigma"),
    ],
)
def test_heads_of_other_models_are_not_compared(other: Plan, reason: str) -> None:
    found = difference(ONE, other)
    assert reason in found and "stretch" not in found and "share of heads" in found


def test_no_text_of_a_plan_widens_the_table_or_steers_a_terminal() -> None:
    hostile = "\x1b[31m[bold]" + "世" * 500 + "\n|" + "x" * 3000
    name = "transformer" + "y" * 300
    heads = {name: ("....", "....")}
    other = Plan("wan" * 50, {name: ModelShape(2, 4, 16)}, METHODS, (Span(0.0, 1.0, heads),), {"kind": hostile})
    told = replace(other, provenance={"device": hostile, "search": {"model": hostile, "call": {hostile: 1}}})
    wide = Plan.uniform(Method(select=Band(0.5)), "wan" * 50, {name: ModelShape(60, 40, 16)})
    for one, two in (
        (ONE, told),
        (other, replace(told, spans=(Span(0.0, 1.0, {name: ("a.a.", ".a.a")}),))),
        (wide, told),
    ):
        text = difference(one, two, (hostile, "B"))
        assert max(map(cell_len, text.splitlines())) <= 80
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "[bold]" in text
        assert text.count("世") >= 500, "what is long takes several lines, and loses nothing"
