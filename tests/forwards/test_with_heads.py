"""A step cache above methods of the heads: what they keep follows the computed forwards, and ages by steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusers_accel import Plan, patch
from diffusers_accel.forwards import easycache, schedule
from diffusers_accel.methods import Draft, Kept, Method, Patches, Recipe
from diffusers_accel.plan import Span
from diffusers_accel.shape import ModelShape
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, tiny_wan, tiny_wan_call, tiny_wan_transformer

STEPS = 9
TEXTS = {name: torch.full((1, 8, TEXT_DIM), float(len(name))) for name in ("cond", "uncond")}


def reused(
    method: Any, forwards: Any, names: tuple[str, ...] = ("cond",), steps: range = range(STEPS)
) -> dict[int, int]:
    """Step -> heads of the first layer that reused a kept part, at the steps that ran."""
    model, found = tiny_wan_transformer(), {}
    with patch(model, [method, forwards]) as done, torch.no_grad():
        for step in steps:
            done.step(step, STEPS)
            for name in names:
                x = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
                with model.cache_context(name):
                    model(x, torch.tensor([1000 - step]), TEXTS[name])
            row = done.report().rows[0]
            if row["calls"]:
                found[step] = row["reused"]
            done.clear()
    return found


def caching(every: int) -> Method:
    return Method(Patches(), Draft(0.34), rest=Kept(every))


def test_a_predicted_step_does_not_empty_what_is_kept() -> None:
    assert reused(caching(4), schedule([0, 2, 3, 5])) == {0: 0, 2: HEADS, 3: HEADS, 5: 0, 8: HEADS}
    assert reused(caching(9), schedule([0, 7])) == {0: 0, 7: HEADS, 8: HEADS}


def test_parts_age_by_steps_not_by_computed_steps() -> None:
    assert reused(caching(2), schedule([0, 2, 3, 5])) == {0: 0, 2: 0, 3: HEADS, 5: 0, 8: 0}
    assert reused(caching(3), schedule(list(range(STEPS)))) == {step: HEADS * bool(step % 3) for step in range(STEPS)}


def test_steps_that_nobody_ran_still_empty_what_is_kept() -> None:
    """A generation that broke off: what it kept is not of the one that goes on later."""
    model = tiny_wan_transformer()
    with patch(model, [caching(9), schedule([0, 1, 4, 5])]) as done, torch.no_grad():
        for step in (0, 1, 4, 5):
            done.step(step, STEPS)
            model(torch.ones(1, 4, 3, 32, 32), torch.tensor([1]), TEXTS["cond"])
        assert done.report().rows[0]["reused"] == 2 * HEADS, "at steps 1 and 5"


@pytest.mark.parametrize("names", [("cond", "uncond"), ("uncond", "cond")])
def test_each_pass_keeps_its_own_through_its_own_gaps(names: tuple[str, ...]) -> None:
    """cond runs at every step, uncond at 0, 3 and 8."""
    found = reused(caching(5), schedule([0, 3], branches=["uncond"]), names)
    refreshes = {"cond": {0, 5}, "uncond": {0, 8}}
    runs = {"cond": set(range(STEPS)), "uncond": {0, 3, 8}}
    assert found == {
        step: HEADS * sum(step in runs[name] and step not in refreshes[name] for name in runs) for step in range(STEPS)
    }


def gated(flagged: set[int]) -> Plan:
    """A plan whose gate refreshes all heads at these steps."""
    gate = torch.zeros(STEPS, LAYERS, HEADS, dtype=torch.uint8)
    gate[sorted(flagged)] = 1
    return Plan(
        family="wan",
        models={"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)},
        methods={"a": Method(Patches(), Draft(0.34), rest=Kept(gated=True))},
        spans=(Span(0.0, 1.0, {"transformer": ("a" * HEADS,) * LAYERS}),),
        tensors={"refresh/transformer": gate},
    )


def test_a_gates_flag_at_a_predicted_step_holds_for_the_next_that_runs() -> None:
    assert reused(gated({0, 3}), schedule([0, 2, 5, 6])) == {0: 0, 2: HEADS, 5: 0, 6: HEADS, 8: HEADS}
    assert reused(gated({0, 5}), schedule([0, 2, 5, 6])) == {0: 0, 2: HEADS, 5: 0, 6: HEADS, 8: HEADS}
    assert reused(gated({0}), schedule([0, 2, 5, 6])) == {0: 0, 2: HEADS, 5: HEADS, 6: HEADS, 8: HEADS}


def selections(hold: int, computed: list[int]) -> int:
    """How often a draft selects anew."""
    model, count = tiny_wan_transformer(layers=1), 0
    original = Draft.pattern

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    held = Method(Patches(), Draft(0.34, reselect_every=hold))
    with pytest.MonkeyPatch.context() as patched, patch(model, [held, schedule(computed)]) as done, torch.no_grad():
        patched.setattr(Draft, "pattern", counted)
        for step in range(STEPS):
            done.step(step, STEPS)
            model(torch.ones(1, 4, 3, 32, 32), torch.tensor([1]), TEXTS["cond"])
    return count


def test_a_held_selection_ages_by_steps() -> None:
    assert selections(4, [0, 2, 3, 5, 6]) == 2, "at 0 and 5; at 8 it is 3 steps old"
    assert selections(2, [0, 1, 2, 3, 5, 6]) == 4, "at 0, 2, 5 and 8"


# One verb


@pytest.mark.parametrize(
    "subject",
    [
        ["easycache", ("draft", {"density": 0.4})],
        [("draft", {"density": 0.4}), "easycache"],
        ("easycache", "draft"),
        {"easycache": {"threshold": 0.025}, "draft": {"density": 0.25}},
        [easycache(), Recipe((caching(3),))],
        [caching(3), easycache()],
    ],
)
def test_scopes_compose(subject: Any) -> None:
    pipe = tiny_wan()
    with patch(pipe, subject) as done:
        assert done.forwards == easycache()
        assert "draft" in repr(done) and "forwards: easycache 0.025, last residual" in repr(done)
        pipe(**tiny_wan_call(output_type="latent"))
        report = done.report()
        assert report.forwards is not None and report.forwards.computed == 10
        assert any("draft" in label for label in report.rows[-1]["methods"])
    given = dict(subject) if isinstance(subject, Mapping) else {}
    assert not given or set(given) == {"easycache", "draft"}, "what was given is not changed"


def test_a_plan_and_a_step_cache() -> None:
    plan = Plan.uniform(caching(3), family="wan", models={"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})
    pipe = tiny_wan()
    with patch(pipe, [plan, "easycache"]) as done:
        assert done.plan == replace(plan, forwards=easycache()) and done.forwards == easycache()
    with patch(pipe, plan) as done:
        assert done.plan is plan and done.forwards is None
    with patch(pipe, ("easycache", {"threshold": 0.2})) as done:
        assert done.forwards == easycache(threshold=0.2) and done.sites == []
    with patch(pipe, "draft") as done:
        assert done.forwards is None and done.report().forwards is None


@pytest.mark.parametrize(
    ("subject", "parameters", "error", "message"),
    [
        (["draft", "pattern"], {}, ValueError, r"a head attends by one method, found 2 .*searched plan mixes"),
        (["easycache", ("schedule", {"steps": [0]})], {}, ValueError, "one step cache decides.*found 2"),
        (["easycache", easycache(), "draft"], {}, ValueError, "one step cache"),
        ([], {}, ValueError, "one method at least"),
        ({}, {}, TypeError, "found a dict.*methods with their parameters are name: {parameter: value}"),
        (
            ["easycache", "draft"],
            {"density": 0.3},
            TypeError,
            r"parameters of several go with each.*found \['density'\]",
        ),
        ([("draft", 0.3)], {}, TypeError, "a pair of a name and its parameters"),
        ([("draft", {}, 1)], {}, TypeError, "a pair of a name and its parameters"),
        ({"draft": 0.3}, {}, TypeError, "found a dict"),
        (
            "easycache",
            {"treshold": 0.1},
            TypeError,
            "'easycache' has no parameter 'treshold'; did you mean 'threshold'",
        ),
        ([("easycache", {"density": 0.1})], {}, TypeError, "no parameter 'density'"),
        (easycache(), {"threshold": 0.1}, TypeError, "parameters go with a name"),
        ("easycache", {"threshold": -1}, ValueError, "0 or more"),
        (["easycache", 7], {}, TypeError, "found an int"),
        (["easycache", "draught"], {}, ValueError, "neither a method .*easycache"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(
    subject: Any, parameters: Any, error: Any, message: str
) -> None:
    pipe = tiny_wan()
    before = dict(vars(pipe.transformer))
    with pytest.raises(error, match=message):
        patch(pipe, subject, **parameters)
    assert vars(pipe.transformer) == before
