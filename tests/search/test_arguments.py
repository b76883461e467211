"""What a search and a calibration are given is refused before anything runs, with what was expected and what was found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_accel.files import check_json
from diffusers_accel.methods import DENSE, Band, Method
from diffusers_accel.search.arguments import check_budget, dense_share
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.gates import calibrate_gates
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.support.identity import plain
from tests.search.test_gates import tiny_plan
from tests.search.test_search import METHODS, a_call, a_prompt
from tests.tiny import tiny_wan

NAN, INF = math.nan, math.inf


def refused(error: type[Exception], message: str, **change: Any) -> None:
    pipe = tiny_wan()
    pipe.transformer.forward = None  # nothing may be generated
    options = {
        "pipe": pipe,
        "prompts": [a_prompt(0)],
        "call": a_call(),
        "budget": Budget.density(0.6),
        "candidates": METHODS,
        "progress": False,
    }
    given = {**options, **change}
    with pytest.raises(error, match=message) as found:
        search_plan(given.pop("pipe"), given.pop("prompts"), **given)
    assert len(str(found.value)) < 700


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (lambda: tiny_wan().transformer, "expected a loaded diffusers pipeline, .* found a bare transformer"),
        (lambda: "Wan-AI/Wan2.1", "expected a loaded diffusers pipeline, .* found a str"),
        (lambda: None, "expected a loaded diffusers pipeline, .* found a NoneType"),
        (lambda: tiny_wan, "expected a loaded diffusers pipeline, .* found a function"),
    ],
)
def test_what_is_no_pipeline(pipe: Any, message: str) -> None:
    refused(TypeError, message, pipe=pipe())
    refused(TypeError, message, pipe=pipe(), candidates=None)
    with pytest.raises(TypeError, match=message):
        calibrate_gates(pipe(), tiny_plan(), [a_prompt(0)], call=a_call())


def test_a_pipeline_of_no_family() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    refused(
        TypeError,
        "found a DDPMPipeline with no transformer or transformer_2 or transformer_ref; supported: wan",
        pipe=DDPMPipeline(unet, DDPMScheduler()),
    )


PROMPTS: list[tuple[type[Exception], Any, str]] = [
    (TypeError, "a red circle", r"prompts: expected a list of texts, found one text: give \['a red circle'\]"),
    (TypeError, {"prompt": "a red circle"}, "prompts: expected a list of texts or of mappings, found"),
    (TypeError, None, "prompts: expected a list of texts or of mappings, found None"),
    (TypeError, 3, "prompts: expected a list of texts or of mappings, found 3"),
    (ValueError, [], "at least one calibration prompt"),
    (ValueError, ["  "], r"prompts\[0\]: expected a text, found an empty one"),
    (TypeError, ["a cat", 3], r"prompts\[1\]: expected a text or a mapping of arguments, found 3"),
    (ValueError, [{}], r"prompts\[0\]: expected arguments such as prompt_embeds, found an empty mapping"),
    (ValueError, [{"promt": "a cat"}], r"prompts\[0\]: WanPipeline takes no 'promt'"),
    (ValueError, [{"prompt": "a cat", "generator": None}], r'prompts\[0\]: "generator" is set by the search'),
    (ValueError, ["\ud800"], r"prompts\[0\]: expected Unicode text, found half a character"),
]


@pytest.mark.parametrize(("error", "prompts", "message"), PROMPTS)
def test_wrong_prompts(error: type[Exception], prompts: Any, message: str) -> None:
    refused(error, message, prompts=prompts)
    pipe = tiny_wan()
    pipe.transformer.forward = None
    with pytest.raises(error, match=message):
        calibrate_gates(pipe, tiny_plan(), prompts, call=a_call())


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (TypeError, {"call": None}, "call: expected a mapping of the pipeline's arguments, .* found None"),
        (TypeError, {"call": [("height", 64)]}, "call: expected a mapping"),
        (TypeError, {"call": {3: 4}}, "call: expected names of arguments, found 3"),
        (ValueError, {"call": {"heigth": 64}}, "call: WanPipeline takes no 'heigth'; did you mean 'height'"),
        (ValueError, {"call": {"zzz": 64}}, "call: WanPipeline takes no 'zzz'; it takes .*height"),
        (ValueError, {"call": a_call(guidance_scale=NAN)}, "call.guidance_scale: expected a finite number, found nan"),
        (
            TypeError,
            {"budget": 1.4},
            r"budget: expected a Budget, found 1.4; is it Budget.speedup\(1.4\) that you mean",
        ),
        (
            TypeError,
            {"budget": 0.3},
            r"budget: expected a Budget, found 0.3; is it Budget.density\(0.3\) that you mean",
        ),
        (TypeError, {"budget": "1.4x"}, r"budget: expected a Budget, found '1.4x'; give Budget.speedup\(1.4\)"),
        (TypeError, {"budget": None}, "budget: expected a Budget, found None"),
        (TypeError, {"candidates": "draft"}, "candidates: expected a list of methods, .* found 'draft'"),
        (TypeError, {"candidates": DENSE}, "candidates: expected a list of methods"),
        (TypeError, {"candidates": ["dense", "draft"]}, r"candidates\[0\]: expected a Method, found 'dense'"),
        (TypeError, {"candidates": 3}, "candidates: expected a list of methods"),
        (ValueError, {"candidates": []}, "the first candidate, and no other, must be dense"),
        (TypeError, {"rows": 64.0}, "rows: expected a whole number of 2 or more, found 64.0"),
        (TypeError, {"rows": True}, "rows: expected a whole number of 2 or more, found True"),
        (ValueError, {"rows": 1}, "rows: expected a whole number in 2 to"),
        (TypeError, {"probe_steps": "2"}, "probe_steps: expected a whole number of 1 or more, found '2'"),
        (ValueError, {"seed": -1}, "seed: expected a whole number in 0 to"),
        (ValueError, {"seed": 2**64}, "seed: expected a whole number in 0 to"),
        (TypeError, {"seed": None}, "seed: expected a whole number"),
        (TypeError, {"dense_steps": "0.2"}, "dense_steps: expected a number, found '0.2'"),
        (TypeError, {"dense_steps": True}, "dense_steps: expected a number, found True"),
        (ValueError, {"dense_steps": NAN}, r"dense_steps: expected a share of the schedule in \[0, 1\], found nan"),
        (
            ValueError,
            {"dense_steps": 0.2, "spans": (0.5,)},
            r"dense_steps: expected 0, 1 or one of the borders .* \[0.5\]",
        ),
        (ValueError, {"dense_steps": 99}, r"dense_steps: expected at most the \d steps of the call, found 99"),
        (ValueError, {"dense_steps": 10**400}, r"dense_steps: expected at most the \d steps of the call, found 1000"),
        (ValueError, {"dense_steps": -1}, r"dense_steps: expected a share of the schedule in \[0, 1\], found -1"),
        (TypeError, {"spans": 0.5}, "spans: expected a list of numbers, found 0.5"),
        (TypeError, {"spans": "0.5"}, "spans: expected a list of numbers, found '0.5'"),
        (TypeError, {"spans": [None]}, r"spans\[0\]: expected a number, found None"),
        (ValueError, {"spans": [NAN]}, "spans: expected inner borders"),
        (ValueError, {"span_weights": (1, 2)}, "span_weights: expected 4 positive numbers, one per span, found"),
        (ValueError, {"span_weights": (1, 1, 1, NAN)}, "span_weights: expected 4 positive numbers"),
        (ValueError, {"span_weights": (1, 1, 1, 10**400)}, r"span_weights\[3\]: expected a number that a float holds"),
        (TypeError, {"span_weights": "1111"}, "span_weights: expected a list of numbers"),
        (TypeError, {"span_weights": 1.0}, "span_weights: expected a list of numbers"),
    ],
)
def test_wrong_arguments(error: type[Exception], change: dict[str, Any], message: str) -> None:
    refused(error, message, **change)


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (ValueError, lambda: Budget.density(0), r"expected in \(0, 1\], found 0; 0 would leave no attention at all"),
        (ValueError, lambda: Budget.density(NAN), r"expected in \(0, 1\], found nan"),
        (ValueError, lambda: Budget.speedup(INF), "expected 1 or more, found inf"),
        (ValueError, lambda: Budget.speedup(NAN), "expected 1 or more, found nan"),
        (ValueError, lambda: Budget.speedup(10**400), "Budget.speedup: expected a number that a float holds"),
        (TypeError, lambda: Budget.speedup("1.4"), "Budget.speedup: expected a number, found '1.4'"),
        (TypeError, lambda: Budget.density(True), "Budget.density: expected a number, found True"),
        (TypeError, lambda: Budget.density(None), "Budget.density: expected a number, found None"),
        (TypeError, lambda: Budget.sparse_vdit(1.0, "0.5"), "Budget.sparse_vdit: expected a number, found '0.5'"),
        (ValueError, lambda: Budget.sparse_vdit(NAN), "epsilon and lambda are 0 or more"),
        (ValueError, lambda: Budget.sparse_vdit(mse="max"), "mse: expected one of mean, relative, found 'max'"),
        (
            ValueError,
            lambda: Budget.sparse_vdit(cost=["time"]),
            r"cost: expected one of time, blocks, found \['time'\]",
        ),
        (ValueError, lambda: Budget("fast", 2.0), "kind: expected one of speedup, density, sparse_vdit, found 'fast'"),
    ],
)
def test_wrong_budgets(error: type[Exception], make: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_budgets_are_plain_data() -> None:
    for budget in (Budget.density(np.float32(0.5)), Budget.speedup(np.int64(2)), Budget.sparse_vdit(INF)):
        check_budget(budget)
        check_json(budget.to_json(), "budget")
    assert Budget.sparse_vdit(INF).to_json()["epsilon"] == "infinity"


def test_a_calibration_needs_a_plan() -> None:
    with pytest.raises(TypeError, match=r"plan: expected a Plan \(Plan.load reads one\), found 'plan.json'"):
        calibrate_gates(tiny_wan(), "plan.json", [a_prompt(0)], call=a_call())
    with pytest.raises(TypeError, match="seed: expected a whole number"):
        calibrate_gates(tiny_wan(), tiny_plan(), [a_prompt(0)], call=a_call(), seed="0")
    with pytest.raises(TypeError, match="call: expected a mapping"):
        calibrate_gates(tiny_wan(), tiny_plan(), [a_prompt(0)], call=[])


def test_what_tells_two_searches_apart() -> None:
    """Equal data for equal arguments, and only for these: a search goes on with no other image's, dtype's or scale's scores."""
    images = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 1)]
    assert plain(images[0]) == plain(images[0].copy()) != plain(images[1])
    assert plain({"video": images}) != plain({"video": images[::-1]})
    assert plain(np.float32(3)) == 3.0 and plain(np.int64(3)) == 3
    assert plain(torch.float16) != plain(torch.bfloat16)


def test_methods_may_come_as_any_list() -> None:
    refused(
        ValueError, "at least one calibration prompt", prompts=iter([]), candidates=[DENSE, Method(select=Band(0.4))]
    )


def test_dense_steps_are_a_share_or_a_count() -> None:
    pipe = tiny_wan()
    assert [dense_share(pipe, {"num_inference_steps": 10}, given) for given in (0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert [dense_share(pipe, {"num_inference_steps": 10}, given) for given in (1, 3, np.int64(10))] == [0.1, 0.3, 1.0]
    assert dense_share(pipe, {}, 5) == 0.1, "of the 50 steps that this pipeline takes"
    for call in ({"num_inference_steps": None}, {"timesteps": [9, 1]}, {"strength": 0.5}):
        with pytest.raises(ValueError, match="found 2, a count of steps, .* give a share of the schedule"):
            dense_share(pipe, call, 2)
