"""Two plans as one: whose step cache and whose heads, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_accel.forwards import easycache
from diffusers_accel.methods import AxisOrder, Band, MeanError, Method, Skip, Stripe
from diffusers_accel.plan import Plan, PlanError, Span
from diffusers_accel.plan.merge import merge_plans
from diffusers_accel.shape import ModelShape

MODELS = {"transformer": ModelShape(1, 3, 16)}
DENSE, BAND, OTHER, STRIPE = (
    Method(),
    Method(select=Band(0.5)),
    Method(AxisOrder("hwf"), Band(0.25)),
    Method(select=Stripe(0.25, calibrated=True)),
)


def plan(methods: dict[str, Method], *spans: tuple[float, float, str], by: Any = "share", **changes: Any) -> Plan:
    made = tuple(Span(start, stop, {"transformer": (row,)}, by) for start, stop, row in spans)
    return Plan("wan", MODELS, methods, made, {"kind": "density", "value": 0.5}, told(), **changes)


def told(**changes: Any) -> dict[str, Any]:
    search = {"model": "toy", "weights": "abc", "call": {"num_inference_steps": 10}, "device": "cpu", **changes}
    return {"search": search, "layout": {"frames": 1}, "predicted": {"speedup": 2.0}, "tuned": {"speedup": 1.9}}


FIRST = plan({".": DENSE, "a": BAND}, (0.0, 0.2, "..."), (0.2, 1.0, "aa."), forwards=easycache())
SECOND = plan({".": DENSE, "a": OTHER, "b": BAND}, (0.0, 0.5, "a.."), (0.5, 1.0, "abb"))


def heads(found: Plan, step: int, steps: int = 10) -> list[Method]:
    return [found.method(found.span_at(step, steps), "transformer", 0, head) for head in range(3)]


def test_the_step_cache_of_one_with_the_heads_of_the_other(tmp_path: Path) -> None:
    found = merge_plans(FIRST, SECOND, labels=("a.json", "b.json"))
    assert found.forwards == easycache() and (found.spans, found.methods) == (SECOND.spans, SECOND.methods)
    assert merge_plans(FIRST, SECOND, forwards="second").forwards is None
    # Nothing that was found of either plan holds for the merger.
    assert found.budget == {} and not {"predicted", "tuned", "cost"} & set(found.provenance)
    assert found.provenance["merged"] == {"forwards": "a.json", "heads": "b.json"}
    assert found.provenance["search"] == SECOND.provenance["search"]
    found.save(tmp_path / "c.json")
    assert Plan.load(tmp_path / "c.json") == found


@pytest.mark.parametrize("until", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_every_step_has_the_heads_of_its_plan(until: float) -> None:
    """The same symbol means two methods in the plans, and two symbols mean one."""
    found = merge_plans(FIRST, SECOND, until=until)
    for step in range(10):
        source = FIRST if (step + 0.5) / 10 < until else SECOND
        assert heads(found, step) == heads(source, step), step
    used = {symbol for span in found.spans for row in span.heads["transformer"] for symbol in row}
    assert set(found.methods) == used and len(set(found.methods.values())) == len(used)
    assert found.forwards == easycache() and found.provenance["merged"]["until"] == until


def test_spans_by_sigma_are_cut_at_a_noise_level() -> None:
    first = plan({".": DENSE, "a": BAND}, (1.0, 0.6, "..."), (0.6, 0.0, "aaa"), by="sigma")
    second = plan({"s": Method(select=Skip())}, (1.0, 0.0, "sss"), by="sigma")
    found = merge_plans(first, second, until=0.4)
    assert [(span.start, span.stop) for span in found.spans] == [(1.0, 0.6), (0.6, 0.4), (0.4, 0.0)]
    assert [span.heads["transformer"][0][0] for span in found.spans] == [".", "a", "s"]


def other(**changes: Any) -> Plan:
    return replace(SECOND, provenance=told(**changes))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (replace(SECOND, family="latte"), "one family, found 'wan' and 'latte'"),
        (Plan.uniform(DENSE, "wan", {"transformer": ModelShape(1, 4, 16)}), r"1 x 3 x 16.* and .*1 x 4 x 16"),
        (other(weights="xyz"), "the same weights .*found 'abc' and 'xyz'"),
        (other(call={"num_inference_steps": 20}), r"same call .*found \{'num_inference_steps': 10\} and .*20"),
        (replace(SECOND, provenance={**told(), "layout": {"frames": 2}}), "layout of the tokens"),
    ],
)
@pytest.mark.parametrize("until", [None, 0.5])
def test_plans_of_another_model_or_call_are_refused(second: Plan, message: str, until: float | None) -> None:
    with pytest.raises(PlanError, match=message):
        merge_plans(FIRST, second, until=until)


def test_another_device_or_nothing_told_is_no_reason_to_refuse() -> None:
    assert merge_plans(FIRST, other(device="cuda")).provenance["search"]["device"] == "cuda"
    assert merge_plans(FIRST, replace(SECOND, provenance={})).provenance["search"] == FIRST.provenance["search"]


def test_tensors_that_do_not_go_together_are_refused() -> None:
    mass = {"stripe_mass/transformer": torch.rand(1, 3, 2, 2)}
    first = plan({"a": STRIPE}, (0.0, 1.0, "aaa"), tensors=mass)
    same = merge_plans(first, first, until=0.5)
    assert same.tensors.keys() == mass.keys() and set(same.methods) == {"a"}
    doubled = replace(first, tensors={name: 2 * each for name, each in mass.items()})
    with pytest.raises(PlanError, match="tensors.stripe_mass/transformer: expected the same in both plans"):
        merge_plans(first, doubled, until=0.5)
    assert merge_plans(first, doubled).tensors == doubled.tensors
    corrected = plan(
        {"a": BAND},
        (0.0, 1.0, "aaa"),
        correct=MeanError(),
        tensors={"mean_error/transformer": torch.zeros(1, 1, 3, 16)},
    )
    assert merge_plans(FIRST, corrected).correct == MeanError()
    for pair in ((FIRST, corrected), (corrected, FIRST)):
        with pytest.raises(PlanError, match="without a correction"):
            merge_plans(*pair, until=0.5)


def test_arguments_without_a_meaning_are_refused() -> None:
    for until in (0.0, 1.0, -1, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="until: expected a share"):
            merge_plans(FIRST, SECOND, until=until)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='forwards: expected "first" or "second"'):
        merge_plans(FIRST, SECOND, forwards="third")  # type: ignore[arg-type]
    sigma = plan({".": DENSE}, (1.0, 0.0, "..."), by="sigma")
    with pytest.raises(PlanError, match="one of each"):
        merge_plans(FIRST, sigma, until=0.5)
