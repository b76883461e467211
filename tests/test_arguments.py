"""What `patch` is given is checked before anything is touched, and the message says what was expected, found and meant."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_accel import Plan, patch, unpatch
from diffusers_accel.families import find
from diffusers_accel.forwards import NAMED_PREDICTORS, PREDICTORS, RULES
from diffusers_accel.kernels.attention import PRECISIONS
from diffusers_accel.methods import (
    NAMED,
    RESTS,
    SELECTS,
    AxisOrder,
    Band,
    Draft,
    Drop,
    Kept,
    Method,
    Pooled,
    Recipe,
    SubBlock,
)
from diffusers_accel.stage_names import stage_named
from tests.tiny import LAYERS, tiny_wan


@dataclasses.dataclass
class Budget:
    """Stands for the search's: only its name counts."""

    density: float = 0.3


@pytest.mark.parametrize(
    ("plan", "parameters", "error", "message"),
    [
        ("drat", {}, ValueError, r"'drat' is neither a method nor a plan file .* did you mean 'draft'\?"),
        ("radal", {}, ValueError, r"neither a method nor a plan file that exists: did you mean 'radial'\?"),
        ("zzz", {}, ValueError, r"neither a method nor a plan file that exists: The methods are dense, pattern"),
        ("draft", {"densty": 0.3}, TypeError, r"no parameter 'densty'; did you mean 'density'\? it has density, top_p"),
        (None, {"densty": 0.3}, TypeError, r"'draft' has no parameter 'densty'"),
        ("draft", {"density": "0.3"}, TypeError, r"density of 'draft': expected float \| None.* found '0\.3', a str"),
        ("pattern", {"density": True}, TypeError, r"expected float, as in density=0\.5, found True, a bool"),
        ("draft", {"patch": 16}, TypeError, r"patch of 'draft': expected tuple\[int, int\], as in patch=\(8, 16\), found 16"),
        ("draft", {"reselect_every": 1.5}, TypeError, r"reselect_every of 'draft': expected int"),
        ("dense", {"density": 0.3}, TypeError, r"'dense' has no parameter 'density'"),
        ("draft", {"cache_memory_fraction": "0.3"}, ValueError, r"cache_memory_fraction .* in \[0, 1\], found '0\.3'"),
        ("draft", {"cache_memory_fraction": True}, ValueError, r"cache_memory_fraction .* found True"),
        (Budget(), {}, TypeError, r"found a Budget: a budget is what a search is asked for"),
        (Draft(0.3), {}, TypeError, r"found a Draft: give it as Method\(select=\.\.\.\)"),
        (Kept(), {}, TypeError, r"found a Kept: give it as Method\(select=\.\.\., rest=\.\.\.\)"),
        (AxisOrder("hwf"), {}, TypeError, r"found an AxisOrder: give it as Method\(order=\.\.\., select=\.\.\.\)"),
        ({}, {}, TypeError, r"found a dict: write it as a plan file"),
        ("draft", {"dense_layers": 99}, ValueError, rf"=99 .* {LAYERS} self-attention layers: give at most {LAYERS - 1}"),
        ("draft", {"dense_layers": LAYERS}, ValueError, rf"dense_layers={LAYERS} leaves nothing"),
        ("draft", {"dense_steps": 1.0}, ValueError, r"dense_steps=1 leaves all steps dense"),
        (Recipe((Method(select=Draft(0.3)),), dense_layers=99), {}, ValueError, "dense_layers=99"),
        ("x" * 5_000_000, {}, ValueError, "neither a method"),
    ],
)  # fmt: skip
def test_wrong_plans_and_parameters(plan: Any, parameters: Any, error: Any, message: str) -> None:
    pipe = tiny_wan()
    before = _state(pipe)
    with pytest.raises(error, match=message) as caught:
        patch(pipe, plan, **parameters)
    assert _state(pipe) == before and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Draft("0.3"), r"density is .* expected in \(0, 1\], found '0\.3'"),
        (lambda: Band(True), r"density .* found True"),
        (lambda: Recipe((Method(),), dense_steps="0.2"), r"dense_steps .* found '0\.2'"),
        (lambda: Recipe((Method(),), dense_layers=1.5), r"dense_layers .* found 1\.5"),
    ],
)
def test_stages_of_the_wrong_type(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


PARTS = {
    "radial": "a selection, and no method by itself: from diffusers_accel.methods import Method, Radial; patch(pipe, Method(sel",
    "Band": "a selection, and no method by itself",
    "subblock": "a selection",
    "stored": "a selection that reads what a search has found",
    "kept": "a rest, which goes with a selection",
    "hwf": "an order, which goes with a selection",
    "8x16": "an order",
    "int8": "a precision",
    "interval": "a rule of a step cache",
    "taylor": "a predictor of a step cache",
    "last": "a predictor of a step cache",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_name_of_a_part_says_what_it_is_and_a_line_that_works(name: str) -> None:
    pipe = tiny_wan()
    with pytest.raises(ValueError, match=re.escape(PARTS[name])) as caught:
        patch(pipe, name)
    line = str(caught.value).partition("by itself: ")[2]
    assert line.endswith(")"), line
    searched = Plan.uniform(Method(select=Band(0.25)), "wan", {n: f.shape(m) for n, (m, f) in find(pipe).items()})
    given = {"pipe": pipe, "prompts": [], "ratios": [1.0, 1.1], "search_plan": lambda *_: searched}
    exec(line.removeprefix("from diffusers_accel import search_plan; "), {"patch": patch, **given})
    unpatch(pipe)


def test_every_part_is_told() -> None:
    for name in (*SELECTS, *RESTS, *PRECISIONS, *RULES, *PREDICTORS, *NAMED_PREDICTORS, "fhw", "whf", "8x16"):
        part = stage_named(name)
        assert part is not None and stage_named(name.upper()) == part, name
        compile(part.line, name, "exec")
    assert stage_named("nothing") is None


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        (Draft, {"mass": 0.9}, "Draft has no parameter 'mass', which is now called 'top_p': write that instead"),
        (Draft, {"density": 0.3, "floor": 2}, "'floor', which is now called 'min_blocks'"),
        (Draft, {"hold": 2}, "'hold', which is now called 'reselect_every'"),
        (Draft, {"rule": "row"}, "'rule', which is now called 'per'"),
        (SubBlock, {"floor": 2}, "SubBlock has no parameter 'floor', which is now called 'min_blocks'"),
        (Kept, {"every": 2}, "Kept has no parameter 'every', which is now called 'refresh_every'"),
        (Draft, {"densty": 0.3}, "no parameter 'densty'; did you mean 'density'? it has density, top_p"),
        (Band, {"mass": 0.3}, "Band has no parameter 'mass'; it has density, first_frame"),
        (AxisOrder, {"axis": "hwf"}, "AxisOrder has no parameter 'axis'; did you mean 'axes'? it has axes"),
        (Pooled, {"every": 2}, "Pooled has no parameter 'every'; it has none"),
    ],
)
def test_parameters_that_a_stage_does_not_have(stage: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        stage(**given)


@pytest.mark.parametrize(
    "stage", [Draft(0.3, min_blocks=2), SubBlock(parts=2), Band(0.4), Kept(refresh_every=2), Drop()]
)
def test_stages_are_copied_and_pickled(stage: Any) -> None:
    assert copy.deepcopy(stage) == pickle.loads(pickle.dumps(stage)) == replace(stage) == stage


def test_files_that_are_not_there(tmp_path: Path) -> None:
    pipe = tiny_wan()
    Plan.uniform(NAMED["pattern"](), "wan", {name: family.shape(m) for name, (m, family) in find(pipe).items()}).save(
        tmp_path / "wan-480p.json"
    )
    before = _state(pipe)
    with pytest.raises(FileNotFoundError, match=r"wan-480.json.*did you mean 'wan-480p\.json'\?"):
        patch(pipe, tmp_path / "wan-480.json")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*plans"):
        patch(pipe, str(tmp_path / "plans" / "wan.json"))
    with pytest.raises(ValueError, match=r"found the folder .*in it are 'wan-480p\.json'"):
        patch(pipe, tmp_path)
    assert _state(pipe) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", r"found the text 'Wan-AI.*load it first.*from_pretrained.*supported: wan"),
        ([tiny_wan], r"found a list with no transformer or transformer_2 or transformer_ref; supported: wan"),
        (None, r"found a NoneType with no transformer"),
        (torch.nn.Linear(2, 2), r"transformer is a Linear, supported: wan"),
    ],
)
def test_what_is_no_pipeline(target: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        patch(target, "draft")


def test_a_pipeline_whose_transformer_is_not_loaded() -> None:
    pipe = tiny_wan()
    pipe.transformer = None
    with pytest.raises(TypeError, match=r"found a WanPipeline whose transformer is not loaded"):
        patch(pipe, "draft")


def test_right_arguments_of_every_kind_still_work() -> None:
    pipe = tiny_wan()
    for parameters in ({"density": 1}, {"density": None, "top_p": 0.5}, {"patch": [4, 4]}, {"diagonal": False}):
        with patch(pipe, "draft", **parameters):
            pass


def _state(pipe: Any) -> Any:
    module = pipe.transformer
    return (
        {name: id(value) for name, value in vars(module).items()},
        [id(block.attn1.processor) for block in module.blocks],
        list(module._forward_pre_hooks),
    )
