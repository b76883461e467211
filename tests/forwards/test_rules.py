"""Rules and predictors: as data, and by their formulas on models whose output is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.forwards import (
    NAMED_PREDICTORS,
    EasyCache,
    Forwards,
    Last,
    MagCache,
    Schedule,
    Taylor,
    easycache,
    schedule,
)
from tests.forwards.toys import latents, toy, walk

ALL = [
    Forwards(EasyCache(0.05, 5)),
    Forwards(EasyCache(0), Taylor(2, "residual", "step"), ("uncond",)),
    Forwards(Schedule(steps=(0, 3, 9)), Last("velocity")),
    Forwards(Schedule(shares=(0, 0.25, 0.5)), Taylor()),
]


# What is known ahead


@pytest.mark.parametrize(
    ("rule", "idle", "busy", "message"),
    [
        (EasyCache(), 11, 12, "warm_up computes the first 10, .* such as warm_up=2, or run 12 steps or more"),
        (EasyCache(warm_up=30), 25, 32, "warm_up=5, or run 32"),
        (EasyCache(warm_up=0), 3, 4, "the first 2 steps and the last one compute in any case: run 4 steps or more"),
        (MagCache((1.0,), retention=0.7), 3, 4, None),
        (MagCache((1.0,), retention=0.9), 9, 20, r"its retention=0\.9 computes the first 8"),
        (MagCache((1.0,)), 2, 3, "run 3 steps or more"),
        (Schedule(steps=(1, 2, 3)), 5, 6, "all that lie between are listed"),
        (Schedule(shares=(0, 0.25, 0.5, 0.75)), 4, 8, "all that lie between are listed"),
    ],
)
def test_a_rule_knows_that_nothing_can_be_predicted(rule: Any, idle: int, busy: int, message: str | None) -> None:
    """And it is true: a rule that is idle computes every step, of a model that could well be predicted; one step more, and
    the same rule predicts."""
    for steps in (idle, busy):
        model = toy(lambda x, t: x * 0 + 1)
        with patch(
            model, Forwards(replace(rule, **({"threshold": 1e6} if hasattr(rule, "threshold") else {})))
        ) as done:
            walk(done, model, [latents(0) + step for step in range(steps)])
            said = [note for note in done.report().notes if f"predicts none of the {steps} steps" in note]
        assert (len(model.ran) == steps) == (steps == idle), steps
        assert len(model.ran) == rule.least(steps), steps
        assert len(said) == (steps == idle) and (rule.idle(steps) is not None) == (steps == idle)
    if message:
        assert re.search(message, str(rule.idle(idle)))


def test_a_threshold_of_0_is_what_was_asked_for() -> None:
    assert EasyCache(0).idle(5) is None and MagCache((1.0,), threshold=0, retention=1).idle(5) is None
    assert EasyCache(0).least(5) == MagCache((1.0,), threshold=0).least(5) == 5


# As data


@pytest.mark.parametrize("forwards", ALL)
def test_json_round_trip(forwards: Forwards) -> None:
    data = forwards.to_json()
    assert json.loads(json.dumps(data)) == data and Forwards.from_json(data) == forwards
    assert len({each.label for each in ALL}) == len(ALL)


EASY: dict[str, Any] = {"kind": "easycache"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "forwards: expected an object, found a list"),
        ({}, "'rule' is missing"),
        ({"rule": EASY, "rules": 1}, "unknown key 'rules'"),
        (
            {"rule": {"kind": "teacup"}},
            r"rule.kind: expected one of \['easycache', .*'schedule'.*\], found 'teacup'",
        ),
        ({"rule": {"kind": ["easycache"]}}, "rule.kind"),
        ({"rule": "easycache"}, "rule.kind"),
        ({"rule": {**EASY, "treshold": 1}}, "rule 'easycache': unknown key 'treshold'"),
        ({"rule": {**EASY, "threshold": "0.1"}}, r"rule\.threshold: expected float, found '0.1'"),
        ({"rule": {**EASY, "threshold": True}}, r"rule\.threshold: expected float, found True"),
        ({"rule": {**EASY, "threshold": -1}}, "expected 0 or more"),
        ({"rule": {**EASY, "warm_up": 1.5}}, r"rule\.warm_up: expected int, found 1\.5"),
        ({"rule": {"kind": "schedule"}}, "either steps or shares"),
        ({"rule": {"kind": "schedule", "steps": [0, "1"]}}, r"rule\.steps\[1\]: expected int, found '1'"),
        ({"rule": EASY, "predictor": {"kind": "cubic"}}, "predictor.kind"),
        ({"rule": EASY, "predictor": {"kind": "taylor", "order": 0}}, "1 or more"),
        ({"rule": EASY, "branches": "uncond"}, "branches: expected a list . None, found the text 'uncond'"),
        ({"rule": EASY, "branches": []}, "one name at least"),
        ({"rule": EASY, "branches": [1]}, r"branches\[0\]: expected str, found 1"),
    ],
)
def test_anything_unexpected_in_json_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forwards.from_json(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EasyCache(float("nan")), "0 or more"),
        (lambda: EasyCache("0.1"), "found '0.1'"),  # type: ignore[arg-type]
        (lambda: EasyCache(warm_up=True), "integer"),
        (lambda: schedule(), "either steps or shares"),
        (lambda: schedule([0], [0.5]), "either steps or shares"),
        (lambda: schedule([3, 1]), "each larger"),
        (lambda: schedule([1, 1]), "each larger"),
        (lambda: schedule([-1]), "indices from 0"),
        (lambda: schedule([0.5]), "indices from 0"),  # type: ignore[list-item]
        (lambda: schedule(shares=[0.5, 1.0]), r"\[0, 1\)"),
        (lambda: Schedule(steps="01"), "list of numbers"),  # type: ignore[arg-type]
        (lambda: easycache(predictor="quadratic"), "one of residual, velocity, linear, taylor"),
        (lambda: Last("latents"), '"velocity" or "residual"'),
        (lambda: Taylor(over="sigma"), '"timestep" or "step"'),
        (lambda: Forwards("easycache"), "rule: expected one of EasyCache, .*Schedule"),  # type: ignore[arg-type]
        (lambda: Forwards(EasyCache(), EasyCache()), "predictor: expected one of Last, Taylor"),  # type: ignore[arg-type]
    ],
)
def test_what_means_nothing_cannot_be_built(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Predictors


STEPS = 7
ONLY = schedule([0, 2, 4], predictor="residual").rule  # and the last step, in any case
COMPUTED, PREDICTED = (0, 2, 4, 6), (1, 3, 5)


def outputs(f: Any, predictor: Any, ts: list[float] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(what the model gives, what it should) at each step, with steps of different sizes."""
    model, xs = toy(f), [latents(seed) * (1 + seed) for seed in range(STEPS)]
    ts = ts or [1000.0, 950.0, 850.0, 600.0, 500.0, 200.0, 50.0]
    with patch(model, Forwards(ONLY, predictor)) as done:
        found = walk(done, model, xs, ts)
        assert model.ran == pytest.approx([ts[step] for step in COMPUTED])
    return found, [f(x, torch.tensor([t])) for x, t in zip(xs, ts, strict=True)]


def test_a_residual_that_is_constant_is_exact() -> None:
    c = latents(99)
    found, expected = outputs(lambda x, t: x + c, Last("residual"))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    found, expected = outputs(lambda x, t: x + c, Last("velocity"))
    assert not any(torch.allclose(found[step], expected[step], atol=1e-2) for step in PREDICTED)


def test_the_error_of_a_residual_is_the_way_since_the_last_computed_step() -> None:
    """f(x) = 2x: x + (2x - x)_c is off by x - x_c."""
    xs = [latents(seed) * (1 + seed) for seed in range(STEPS)]
    found, expected = outputs(lambda x, t: 2 * x, Last("residual"))
    for step in PREDICTED:
        error = (found[step] - expected[step]).abs()
        assert torch.allclose(error, (xs[step] - xs[step - 1]).abs(), atol=1e-5)
    assert all(torch.equal(found[step], expected[step]) for step in COMPUTED)


@pytest.mark.parametrize("of", ["velocity", "residual"])
@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_exact_for_polynomials_of_its_order(of: str, order: int) -> None:
    """In the timestep, whose steps are uneven; as soon as that many forwards were computed, and not for one degree more."""
    a = latents(98)

    def f(degree: int) -> Any:
        return lambda x, t: a * (t / 1000) ** degree + (x if of == "residual" else 0)

    enough = [step for step in PREDICTED if sum(c < step for c in COMPUTED) > order]
    found, expected = outputs(f(order), Taylor(order, of))
    assert enough and all(torch.allclose(found[step], expected[step], atol=1e-4) for step in enough)
    found, expected = outputs(f(order + 1), Taylor(order, of))
    assert not any(torch.allclose(found[step], expected[step], atol=1e-3) for step in enough)


def test_taylor_over_steps_and_with_few_forwards() -> None:
    """Linear in the index of the step; with one computed forward it is the last one."""
    a, ts = latents(98), [9.0, 8.9, 8.0, 5.0, 4.9, 1.0, 0.5]
    index = {t: step for step, t in enumerate(ts)}

    def f(x: Tensor, t: Tensor) -> Tensor:
        return a * index[round(float(t), 1)]

    found, expected = outputs(f, Taylor(1, over="step"), ts)
    assert torch.equal(found[1], expected[0])
    for step in (3, 5):
        assert torch.allclose(found[step], expected[step], atol=1e-4)
    found, expected = outputs(f, Taylor(1), ts)
    assert not torch.allclose(found[3], expected[3], atol=0.1)


def test_equal_timesteps_count_as_no_change() -> None:
    """As schedulers of second order give them."""
    c = latents(97)
    for order in (1, 2, 3):
        found, expected = outputs(lambda x, t: c, Taylor(order), [9.0, 9.0, 9.0, 5.0, 5.0, 5.0, 1.0])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_keep_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = toy(lambda x, t: x + 1)
    for predictor in NAMED_PREDICTORS.values():
        with patch(model, Forwards(ONLY, predictor)) as done:
            out = walk(done, model, [latents(seed).to(dtype) for seed in range(STEPS)])
        assert all(each.dtype == dtype for each in out)


# EasyCache


def decisions(xs: list[Tensor], f: Any, threshold: float, warm_up: int) -> list[int]:
    """The paper's bookkeeping, step by step: which steps compute."""
    computed: list[int] = []
    error, before, cached_x, cached_v, rate = 0.0, None, None, None, None
    for step, x in enumerate(xs):
        runs = step < max(warm_up, 1) or step == len(xs) - 1 or rate is None
        if not runs:
            assert rate is not None and cached_v is not None and before is not None
            error += float(rate * (x - before).abs().mean() / cached_v.abs().mean())
            runs = error >= threshold
        if runs:
            v, error = f(x, None), 0.0
            if cached_x is not None and cached_v is not None:
                rate = (v - cached_v).abs().mean() / (x - cached_x).abs().mean()
            cached_x, cached_v = x, v
            computed.append(step)
        before = x
    return computed


@pytest.mark.parametrize(("threshold", "warm_up"), [(0.05, 3), (0.3, 0), (1.0, 2), (3.0, 5), (1e9, 0), (0, 0)])
def test_easycache_computes_where_its_formula_says(threshold: float, warm_up: int) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(30, generator=generator)
    xs = [latents(0)]
    for step in range(29):
        xs.append(xs[-1] * (1 - 0.1 * float(size[step])) + latents(step + 1) * 0.1 * float(size[step]))

    def f(x: Tensor, t: Any) -> Tensor:
        return torch.tanh(x) * 2 - x**3

    expected = decisions(xs, f, threshold, warm_up)
    model = toy(f)
    with patch(model, "easycache", threshold=threshold, warm_up=warm_up) as done:
        walk(done, model, xs)
        forwards = done.report().forwards
    assert forwards is not None
    assert forwards.rows[0]["steps"] == expected and len(model.ran) == len(expected)
    assert forwards.predicted == 30 - len(expected)
    assert (len(expected) < 30) == (threshold > 0.01), "thresholds of both kinds are tried"


def test_latents_that_stand_still_are_computed() -> None:
    """A rate of 0 / 0 says nothing: not a number never passes for a small change."""
    model = toy(lambda x, t: x)
    with patch(model, "easycache", threshold=1e9, warm_up=0) as done:
        walk(done, model, [latents(0)] * 5)
    assert len(model.ran) == 5


# Schedules


def test_a_schedule_computes_its_steps_and_the_ends() -> None:
    model = toy(lambda x, t: x)
    for given, expected in (
        ({"steps": [3, 4]}, [0, 3, 4, 9]),
        ({"steps": []}, [0, 9]),
        ({"shares": [0.25, 0.3, 0.99]}, [0, 2, 3, 9]),
    ):
        with patch(model, "schedule", **given) as done:
            walk(done, model, [latents(0)] * 10)
            forwards = done.report().forwards
        assert forwards is not None and forwards.rows[0]["steps"] == expected


def test_a_schedule_for_more_steps_is_refused_before_the_first_one_runs() -> None:
    model = toy(lambda x, t: x)
    with (
        patch(model, "schedule", steps=[0, 12]) as done,
        pytest.raises(ValueError, match=r"computes step 12.* has 10 steps \(0 to 9\): pass shares"),
    ):
        walk(done, model, [latents(0)] * 10)
    assert model.ran == []


def test_names_from_a_plan_steer_no_terminal_and_make_no_long_message() -> None:
    hostile = "\x1b[31mX\x1b]0;t\x07<b>"
    assert Forwards(EasyCache(), branches=(hostile,)).label.isprintable()
    for make in (
        lambda: Schedule(steps=tuple(range(50_000, 0, -1))),
        lambda: Schedule(shares=tuple(range(50_000))),
        lambda: Schedule(steps="x" * 1_000_000),  # type: ignore[arg-type]
        lambda: EasyCache(threshold="0" * 100_000),  # type: ignore[arg-type]
        lambda: Taylor(over="\x1b" * 50_000),
        lambda: Last("\x1b" * 50_000),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
