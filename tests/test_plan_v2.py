"""Version 2 of the plan file: symbols of several characters, a section for step caches, and what version 1 becomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_accel import Plan, patch
from diffusers_accel.evals.report.render import html
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Method, Recipe, Skip
from diffusers_accel.plan import PlanError, Span
from diffusers_accel.plan_span import SYMBOL, new_symbols
from diffusers_accel.search.assign import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import Pass, Scores
from diffusers_accel.shape import ModelShape
from tests.evals import synthetic
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan, tiny_wan_call

TINY = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
BANDS = [
    Method(AxisOrder(axes), Band((number + 1) / 20)) for axes in ("fhw", "hwf", "whf", "wfh") for number in range(20)
]


def bands(spans: tuple[Span, ...] | None = None, **changes: Any) -> Plan:
    """Three methods, of which one has a long symbol."""
    methods = {".": DENSE, "band-0.5": BANDS[9], "s": Method(select=Skip())}
    rows = ((".", "band-0.5", "s", "."),) * LAYERS
    return replace(Plan("wan", TINY, methods, spans or (Span(0, 1, {"transformer": rows}),)), **changes)


# Symbols


@pytest.mark.parametrize("symbol", ["a", ".", "9", "band-0.5", "x_1", "a" * 16, ".."])
def test_symbols(symbol: str, tmp_path: Path) -> None:
    rows = (((symbol,) * HEADS),) * LAYERS
    plan = Plan("wan", TINY, {symbol: DENSE}, (Span(0, 1, {"transformer": rows}),))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("symbol", ["", " ", "a b", "-a", "_", "a" * 17, "é", "a\n", "a/b"])
def test_other_texts_are_no_symbols(symbol: str) -> None:
    rows = (((symbol,) * HEADS),) * LAYERS
    with pytest.raises(PlanError, match="methods: expected symbols of 1 to 16 characters"):
        Plan("wan", TINY, {symbol: DENSE}, (Span(0, 1, {"transformer": rows}),))


def test_a_row_given_as_a_text_is_one_of_single_characters() -> None:
    methods = {".": DENSE, "s": Method(select=Skip())}
    text, listed = (
        Plan("wan", TINY, methods, (Span(0, 1, {"transformer": rows}),))
        for rows in (("..s.",) * LAYERS, [[".", ".", "s", "."]] * LAYERS)
    )
    assert text == listed and text.spans[0].heads["transformer"][0] == (".", ".", "s", ".")
    assert text.method(0, "transformer", 1, 2).skips


def test_rows_are_written_as_the_longest_symbol_asks(tmp_path: Path) -> None:
    plan = bands()
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert text.count('". band-0.5 s ."') == LAYERS
    assert Plan.load(tmp_path / "plan.json") == plan
    short = Plan.uniform(Recipe((DENSE, BANDS[0])), "wan", TINY)
    short.save(tmp_path / "short.json")
    assert (tmp_path / "short.json").read_text().count('".a.a"') == LAYERS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (". band-0.5 s", r"transformer\[1\]: expected 4 symbols, one per head, found 3 in '\. band-0\.5 s'"),
        (".  band-0.5 s .", r"transformer\[1\]: expected 4 symbols, one per head, found 5"),
        (". band-0.4 s .", r"transformer\[1\]: expected symbols of methods .* found 'band-0\.4'"),
        (".s..", r"transformer\[1\]: expected 4 symbols, one per head, found 1 in '\.s\.\.'"),
        (None, r"transformer\[1\]: expected .* found null"),
    ],
)
def test_a_wrong_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    bands().save(path)
    data = json.loads(path.read_text())
    del data["sha256"]
    data["spans"][0]["heads"]["transformer"][1] = row
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"spans\[0\]\.heads\.{message}"):
        Plan.load(path)


@pytest.mark.parametrize("rows", [None, 3, ("....", 3, "...."), ("....", (".", ".", ".", 1), "....")])
def test_what_is_no_row_is_refused_in_memory(rows: Any) -> None:
    with pytest.raises(PlanError, match=r"spans\[0\]\.heads\.transformer(\[1\])?: expected"):
        Plan("wan", TINY, {".": DENSE}, (Span(0, 1, {"transformer": rows}),))


def test_new_symbols_do_not_end() -> None:
    made = [symbol for symbol, _ in zip(new_symbols(), range(4000))]
    assert len(set(made)) == 4000 and {".", "0"}.isdisjoint(made) and all(map(SYMBOL.fullmatch, made))
    assert made[:2] == ["a", "b"] and made[60:62] == ["9", "aa"]


def test_show_keeps_long_symbols_apart() -> None:
    assert "  layer  0  .        band-0.5 s        ." in bands().show()
    short = Plan.uniform(Recipe((DENSE, BANDS[0])), "wan", TINY)
    assert "  layer  2  .a.a" in short.show()


def scores_of_80() -> Scores:
    """What a search of 80 candidates has measured: nothing is wrong with any of them."""
    models = {"transformer": ModelShape(10, 12, HEAD_DIM)}
    candidates = (DENSE, Method(select=Skip()), *BANDS[:78])
    layout = TokenLayout(1, 1, 1)
    sums = Scores.zeros(models, 2, candidates, layout, 0)
    for name in ("samples", "density", "energy"):
        sums[f"{name}/transformer"][:] = 2
    done = Pass("a red circle", 10.0, 5.0, {"transformer": (2, 6)}, {"transformer": (2, 6)})
    return Scores("wan", models, layout, candidates, ((0.0, 0.25), (0.25, 1.0)), 0, {}, {}, (done,), sums)


def test_a_search_may_use_more_methods_than_there_are_letters(tmp_path: Path) -> None:
    """80 candidates, each taken by some head."""
    scores = scores_of_80()
    choice = {"transformer": np.arange(240).reshape(2, 10, 12) % 80}
    times = {"transformer": (1.0,) * 80}
    found = Assignment(choice, error=0.1, density=0.5, attention_ratio=0.5, speedup=1.3)
    plan = make_plan(scores, Cost(times, times, "test", 100, 1, 3), found, Budget.density(0.5))
    assert len(plan.methods) == 80 and list(plan.methods)[:4] == [".", "0", "a", "b"] and "aq" in plan.methods
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.spans == plan.spans
    assert [loaded.method(0, "transformer", 1, head) for head in range(4)] == list(scores.candidates[12:16])
    assert sum(loaded.shares().values()) == pytest.approx(1)


def test_uniform_takes_any_number_of_methods() -> None:
    models = {"transformer": ModelShape(1, 80, 16)}
    plan = Plan.uniform(Recipe(tuple(BANDS)), "wan", models)
    assert [plan.method(0, "transformer", 0, head) for head in range(80)] == BANDS


def test_a_plan_of_long_symbols_runs() -> None:
    pipe = tiny_wan()
    short = Plan(
        "wan",
        TINY,
        {".": DENSE, "b": BANDS[9], "s": Method(select=Skip())},
        (Span(0, 1, {"transformer": (".bs.",) * LAYERS}),),
    )
    frames = []
    for plan in (bands(), short):
        with patch(pipe, plan) as patched:
            frames.append(pipe(**tiny_wan_call(output_type="latent")).frames)
            assert patched.report().rows[0]["methods"]["skip"] == 10
    assert frames[0].equal(frames[1])


def test_the_report_shows_long_symbols_in_its_legend() -> None:
    report = synthetic.report({"plan": [1.2, 1.3]})
    plan = bands()
    page = html(replace(report, subjects=(replace(report.subjects[0], plan=plan),)))
    assert "one line of method symbols per layer: . band-0.5 s ., . band-0.5 s ., . band-0.5 s ." in page
    assert ">band-0.5</span>" in page and '<text class="symbol"' not in page
