"""MagCache: against its bookkeeping step by step, on models of known magnitude, in real pipelines, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from diffusers_accel import patch
from diffusers_accel.forwards import Forwards, Last, Taylor
from diffusers_accel.forwards.rules.magcache import MagCache
from tests.forwards.toys import latents, toy, walk
from tests.tiny import (
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

ONES = (1.0,)


def stretched(table: Sequence[float], steps: int) -> list[float]:
    """The authors' table for another number of steps: that of the nearest place."""
    places = np.round(np.arange(steps) * (len(table) - 1) / (steps - 1)).astype(int)
    return [table[place] for place in places]


def computed(
    tables: Sequence[Sequence[float]], steps: int, threshold: float, skips: int, retention: float
) -> list[int]:
    """The authors' bookkeeping, step by step: which steps compute."""
    found, size, error, skipped = [], [1.0] * len(tables), [0.0] * len(tables), 0
    ratios = [stretched(table, steps) for table in tables]
    for step in range(steps):
        runs = step == 0 or step == steps - 1 or step < int(retention * steps)
        if not runs:
            skipped += 1
            for number, table in enumerate(ratios):
                size[number] *= table[step]
                error[number] += abs(1 - size[number])
            runs = skipped > skips or max(error) >= threshold
        if runs:
            found.append(step)
            size, error, skipped = [1.0] * len(tables), [0.0] * len(tables), 0
    return found


def steps_of(forwards: Forwards, steps: int) -> list[int]:
    """Which steps compute in a loop over a toy."""
    model = toy(lambda x, t: x)
    with patch(model, forwards) as done:
        walk(done, model, [latents(0)] * steps)
        report = done.report().forwards
    assert report is not None and len(model.ran) == len(report.rows[0]["steps"]) == steps - report.predicted
    steps_found: list[int] = report.rows[0]["steps"]
    return steps_found


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("length", [1, 25, 50])
@pytest.mark.parametrize(
    ("threshold", "skips", "retention"),
    [(0.12, 2, 0.2), (0.24, 6, 0.2), (0.06, 2, 0.4), (0.02, 3, 0.0), (1e9, 4, 0.1), (0.0, 4, 0.0), (0.5, 50, 1.0)],
)
def test_steps_compute_where_the_bookkeeping_says(
    steps: int, length: int, threshold: float, skips: int, retention: float
) -> None:
    """With a table as of Wan 2.1: near 1 for long, and falling to 0.8 at the end."""
    noise = torch.rand(length, generator=torch.Generator().manual_seed(length)).tolist()
    table = [1 - 0.2 * (place / length) ** 4 + 0.03 * (each - 0.5) for place, each in enumerate(noise)]
    expected = computed([table], steps, threshold, skips, retention)
    rule = MagCache(tuple(table), threshold, skips, retention)
    assert steps_of(Forwards(rule), steps) == expected
    assert (len(expected) < steps) == (threshold > 0 and retention < 1)


def test_skips_are_bounded_and_begin_after_the_retention() -> None:
    assert steps_of(Forwards(MagCache(ONES, 1e9, 3, 0.25)), 16) == [0, 1, 2, 3, 7, 11, 15]
    assert steps_of(Forwards(MagCache(ONES, 1e9, 1, 0.0)), 6) == [0, 2, 4, 5]
    assert steps_of(Forwards(MagCache(ONES, 0, 9, 0.0)), 6) == list(range(6)), (
        "also where the table sees no change at all"
    )


def test_a_computed_step_begins_anew() -> None:
    """Each step errs by 0.1, then by 0.19 more: a threshold of 0.2 lets one pass, however many came before."""
    assert steps_of(Forwards(MagCache((0.9,), 0.2, 9, 0.0)), 9) == [0, 2, 4, 6, 8]
    assert steps_of(Forwards(MagCache((0.9,), 0.3, 9, 0.0)), 8) == [0, 3, 6, 7]


def test_the_error_is_that_of_a_residual_whose_magnitude_is_known() -> None:
    """f(x) = x + c a^t: the last residual is off by |1 - a^n| of itself, which is what the rule adds up."""
    c, a, steps = latents(9), 0.97, 12
    model = toy(lambda x, t: x + c * a ** (steps - float(t)))
    xs = [latents(seed) for seed in range(steps)]
    with patch(model, Forwards(MagCache((a,), 0.2, 9, 0.0))) as done:
        found = walk(done, model, xs)
        report = done.report().forwards
    assert report is not None
    ran, error = report.rows[0]["steps"], 0.0
    assert ran == computed([[a]], steps, 0.2, 9, 0.0) and len(ran) < steps / 2
    for step, x in enumerate(xs):
        last = max(each for each in ran if each <= step)
        off = float((found[step] - x - c * a**step).norm() / (c * a**last).norm())
        error = error + off if step > last else 0.0
        assert off == pytest.approx(abs(1 - a ** (step - last)), abs=1e-5) and error < 0.2


# Branches of guidance


def ran_at(forwards: Forwards, names: Sequence[str], steps: int = 8) -> dict[str, list[int]]:
    """Name -> steps at which the branch ran."""
    model = toy(lambda x, t: x)
    found: dict[str, list[int]] = {name: [] for name in names}
    with patch(model, forwards) as done, torch.no_grad():
        for step in range(steps):
            done.step(step, steps)
            for place, name in enumerate(names):
                before = len(model.ran)
                with model.cache_context(name):
                    model(
                        latents(step), torch.tensor([float(steps - step)]), torch.full((1, 3, TEXT_DIM), float(place))
                    )
                found[name] += [step] * (len(model.ran) - before)
    return found


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_a_step_is_predicted_where_every_branch_allows_it(order: tuple[str, ...]) -> None:
    """In whichever order they run, all follow the one that changes most."""
    tables = {"cond": (1.0,) * 8, "uncond": (1.0, 1.0, 1.0, 0.7, 1.0, 1.0, 0.7, 1.0)}
    found = ran_at(Forwards(MagCache(tables, 0.1, 9, 0.0)), order)
    assert found["cond"] == found["uncond"] == computed(list(tables.values()), 8, 0.1, 9, 0.0) == [0, 3, 6, 7]
    assert ran_at(Forwards(MagCache({"cond": tables["cond"], "uncond": ONES}, 0.1, 9, 0.0)), order)["cond"] == [0, 7]


def test_one_branch_alone() -> None:
    rule = MagCache({"uncond": (1.0, 0.5)}, 0.2, 9, 0.0)
    found = ran_at(Forwards(rule, branches=("uncond",)), ("cond", "uncond"))
    assert (
        found["cond"] == list(range(8)) and found["uncond"] == computed([[1.0, 0.5]], 8, 0.2, 9, 0.0) != found["cond"]
    )
    with pytest.raises(
        ValueError, match="a table for the branch 'cond', which is to be predicted, found those of \\['uncond'"
    ):
        ran_at(Forwards(rule), ("cond", "uncond"))


# Real pipelines

STEPS = 8
PIPELINES: dict[str, tuple[Any, Any, int]] = {  # with the branches of a step
    "wan": (tiny_wan, tiny_wan_call, 2),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call, 2),
    "hunyuan_video with true cfg": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given), 2),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, 1),
}


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    frames: np.ndarray = pipe(**call(num_inference_steps=STEPS, output_type="latent", **overrides)).frames.numpy()
    return frames


def ratios(pipe: Any, call: Any, number: int) -> list[list[float]]:
    """The recipe of docs/magcache.md: a table for each branch, from one call of the unpatched pipeline."""
    sizes: list[float] = []

    def note(module: Any, args: Any, given: Any, output: Any) -> None:
        x, v = given["hidden_states"].float(), output[0].float()
        channels = 2 if isinstance(module, CogVideoXTransformer3DModel) else 1
        sizes.append(float((v - x).norm(dim=channels).mean()))

    hooks = [
        model.register_forward_hook(note, with_kwargs=True)
        for model in (pipe.transformer, getattr(pipe, "transformer_2", None))
        if model is not None
    ]
    run(pipe, call)
    for hook in hooks:
        hook.remove()
    found = [sizes[first::number] for first in range(number)]
    return [[1.0] + [later / earlier for earlier, later in zip(each, each[1:])] for each in found]


@pytest.mark.parametrize("name", PIPELINES)
def test_measured_and_replayed(name: str) -> None:
    """A threshold of 0 is the unpatched pipeline bit for bit; above, as many forwards run as the table says."""
    make, call, number = PIPELINES[name]
    pipe = make()
    stock, tables = run(pipe, call), ratios(pipe, call, number)
    assert all(len(table) == STEPS for table in tables)
    table: Any = tuple(tables[0]) if number == 1 else dict(zip(("cond", "uncond"), map(tuple, tables)))
    with patch(pipe, Forwards(MagCache(table, 0.0, 9, 0.0))) as done:
        assert np.array_equal(run(pipe, call), stock)
        report = done.report().forwards
    assert report is not None and (report.computed, report.predicted) == (STEPS * number, 0)
    with patch(pipe, Forwards(MagCache(table, 0.3, 3, 0.2))) as done:
        frames = run(pipe, call)
        report = done.report().forwards
        assert report is not None and report.predicted > 0 and np.isfinite(frames).all()
        if name != "wan 2.2":
            expected = computed(tables, STEPS, 0.3, 3, 0.2)
            assert report.rows[0]["steps"] == expected and report.computed == len(expected) * number
        assert np.array_equal(run(pipe, call), frames), "a second call begins anew"
    assert np.array_equal(run(pipe, call), stock)


def test_each_expert_begins_anew() -> None:
    """The first step of the second one computes, whatever the table allows, and counts as computed."""
    pipe = tiny_wan(2)
    with patch(pipe, Forwards(MagCache(ONES, 1e9, 2, 0.0))) as done:
        run(pipe)
        report = done.report().forwards
    assert report is not None
    first, second = (row["steps"] for row in report.rows)
    begins = second[0]
    assert first == list(range(0, begins, 3)) and 0 < begins < STEPS - 1
    assert second == [*range(begins, STEPS - 1, 3), STEPS - 1]


def test_after_an_exception_the_next_call_begins_anew() -> None:
    pipe = tiny_wan()
    with patch(pipe, Forwards(MagCache(ONES, 1e9, 2, 0.0))) as done:
        whole = run(pipe)

        def fails(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if step == 4:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=fails)
        done.clear()
        assert np.array_equal(run(pipe), whole)
        report = done.report().forwards
    assert report is not None and report.rows[0]["steps"] == [0, 3, 6, 7]


def test_above_a_method_for_the_heads() -> None:
    pipe = tiny_wan()
    with patch(pipe, [Forwards(MagCache(ONES, 1e9, 1, 0.0), Taylor(1)), "draft"]) as done:
        assert np.isfinite(run(pipe)).all()
        report = done.report()
    assert report.forwards is not None and report.forwards.label == "magcache 1e+09, linear velocity"
    assert report.forwards.rows[0]["steps"] == [0, 2, 4, 6, 7]


# As data


@pytest.mark.parametrize("ratios", [(1.0, 0.98), {"cond": (1.0, 0.98), "uncond": (1.0,)}], ids=str)
def test_json_round_trip(ratios: Any) -> None:
    forwards = Forwards(MagCache(ratios, 0.24, 6, 0.1), Last("velocity"))
    data = forwards.to_json()
    assert json.loads(json.dumps(data)) == data
    again = Forwards.from_json(json.loads(json.dumps(data)))
    assert again == forwards and hash(again) == hash(forwards) and forwards.label == "magcache 0.24, last velocity"
    assert Forwards.from_json({"rule": {"kind": "magcache", "ratios": [1, 0.98]}}).rule == MagCache((1.0, 0.98))


def test_a_table_may_be_any_list() -> None:
    assert MagCache([1, 0.9]) == MagCache((1.0, 0.9))  # type: ignore[arg-type]
    assert MagCache({"cond": [1, 0.9]}) == MagCache({"cond": (1.0, 0.9)})  # type: ignore[dict-item]
    assert MagCache((1.0,)) != MagCache((0.9,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratios": []}, r"ratios: expected a list of numbers above 0, one for each step, found \[\]"),
        ({"ratios": "1"}, "ratios: expected a list"),
        ({"ratios": 1.0}, "ratios: expected a list"),
        ({"ratios": [1.0, -1.0]}, "numbers above 0"),
        ({"ratios": [1.0, math.nan]}, "numbers above 0"),
        ({"ratios": [True]}, "numbers above 0"),
        ({"ratios": {}}, "a table for each branch by its name"),
        ({"ratios": {1: [1.0]}}, "a table for each branch by its name"),
        ({"ratios": {"cond": [0]}}, "ratios of 'cond': expected a list of numbers above 0"),
        ({"threshold": -0.1}, "threshold is a relative change, expected 0 or more and finite, found -0.1"),
        ({"threshold": math.nan}, "expected 0 or more and finite, found nan"),
        ({"max_skips": 0}, "expected an integer of 1 or more, found 0"),
        ({"max_skips": 1.5}, "expected an integer of 1 or more, found 1.5"),
        ({"retention": 1.1}, r"expected in \[0, 1\], found 1.1"),
    ],
)
def test_what_means_nothing_cannot_be_built(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MagCache(**{"ratios": ONES, **given})


def test_wrong_json() -> None:
    for rule, message in (
        ({}, "'ratios' is missing"),
        ({"ratios": ["1"]}, r"ratios\[0\]: expected float, found '1'"),
        ({"ratios": {"cond": [-1.0]}}, "numbers above 0"),
        ({"ratios": [1.0], "skips": 2}, "unknown key 'skips'"),
    ):
        with pytest.raises(ValueError, match=message):
            Forwards.from_json({"rule": {"kind": "magcache", **rule}})
