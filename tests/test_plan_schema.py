"""The JSON schema of plan files: it is the one in docs/, and it says what the loader says of the shape of a file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from diffusers_accel import Plan, cli
from diffusers_accel.forwards import PREDICTORS, RULES
from diffusers_accel.methods import NAMED, RESTS, SELECTS
from diffusers_accel.plan import PlanError
from diffusers_accel.plan.schema import json_schema, schema_text
from diffusers_accel.shape import ModelShape
from tests.test_plan_sigma import windows
from tests.test_plan_v2 import EVERY_FORWARDS, bands, cached, every_kind, two_experts

DOCS = Path(__file__).parent.parent / "docs"
VALIDATOR = Draft202012Validator(json_schema())
MODELS = {"transformer": ModelShape(2, 4, 16)}


def plans() -> dict[str, Plan]:
    return {
        "every kind": every_kind(),
        "two experts": two_experts(),
        "long symbols": bands(),
        "windows": windows(1.0, 0.6, 0.0),
        "step cache": cached(),
        **{each.label: bands(forwards=each) for each in EVERY_FORWARDS},
        **{name: Plan.uniform(make(precision="input"), "wan", MODELS) for name, make in NAMED.items()},
    }


def data_of(plan: Plan, folder: Path) -> dict[str, Any]:
    plan.save(folder / "plan.json")
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return found


def loads(data: Any, folder: Path) -> str:
    """What the loader says of a file without a checksum; "" where it takes it."""
    (folder / "plan.json").write_text(json.dumps(data))
    try:
        Plan.load(folder / "plan.json")
    except PlanError as error:
        return str(error)
    return ""


def test_the_schema_in_docs_is_the_current_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "schema"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed == schema_text() == (DOCS / "plan.schema.json").read_text(), (
        "write it anew: diffusers-accel plan schema > docs/plan.schema.json"
    )


def test_the_schema_is_one_and_names_every_stage() -> None:
    Draft202012Validator.check_schema(json_schema())
    for kind in (*SELECTS, *RESTS, *RULES, *PREDICTORS):
        assert {"enum": [kind]} in [part.get("properties", {}).get("kind") for part in json_schema()["$defs"].values()]
    assert all(part.get("description") for part in json_schema()["$defs"].values()), "editors show it"


@pytest.mark.parametrize("name", plans())
def test_what_is_saved_fits_the_schema(name: str, tmp_path: Path) -> None:
    data = data_of(plans()[name], tmp_path)
    VALIDATOR.validate(data)
    VALIDATOR.validate({key: value for key, value in data.items() if value is not None and key != "sha256"})


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value that the format knows; what stands in budget and provenance is anybody's."""
    for key in data if isinstance(data, dict) else range(len(data)):
        yield (*path, key)
        if key not in ("budget", "provenance") and isinstance(data[key], (dict, list)):
            yield from places(data[key], (*path, key))


# Each changes the shape: another type, a key too many, a key too few.
MUTATIONS: dict[str, Any] = {
    "null": lambda holder, key: holder.__setitem__(key, None),
    "text": lambda holder, key: holder.__setitem__(key, "no such thing"),
    "number": lambda holder, key: holder.__setitem__(key, 0.5),
    "flag": lambda holder, key: holder.__setitem__(key, True),
    "list": lambda holder, key: holder.__setitem__(key, [[]]),
    "object": lambda holder, key: holder.__setitem__(key, {"more": 1}),
    "gone": lambda holder, key: holder.__delitem__(key),
    "beside": lambda holder, key: holder.update(more=1) if isinstance(holder, dict) else holder.append({"more": 1}),
}
# How the loader speaks of the shape of a file.
SHAPE = re.compile(
    r" is missing, expected |: unknown key |\.kind: expected one of |precision: expected one of "
    r"|: expected (an object|a list|int|float|bool|str|a number of|a whole number of)\b"
)


@pytest.mark.parametrize(
    "name",
    [
        "every kind",
        "windows",
        "long symbols",
        "step cache",
        "schedule of 3 shares, taylor 2 velocity, cond and uncond only",
    ],
)
def test_what_the_loader_refuses_for_its_shape_the_schema_refuses(name: str, tmp_path: Path) -> None:
    """And what the schema refuses, the loader refuses."""
    whole = data_of(plans()[name], tmp_path)
    del whole["sha256"]
    random, tried, shapes = Random(0), 0, 0
    for path in list(places(whole)):
        for kind in random.sample(sorted(MUTATIONS), 4):
            data = copy.deepcopy(whole)
            holder = data
            for key in path[:-1]:
                holder = holder[key]
            MUTATIONS[kind](holder, path[-1])
            said, fits = loads(data, tmp_path), VALIDATOR.is_valid(data)
            tried += 1
            assert said or fits, f"{kind} at {path}: the schema refuses what the loader takes"
            shape = any(
                each in said for each in (" is missing, expected ", ": unknown key ", ".kind: expected one of ")
            )
            shapes += shape
            assert not (shape and fits), f"{kind} at {path}: the schema takes what the loader refuses: {said}"
            assert len(said) < 500
    assert tried > 60 and shapes > tried / 4


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 1),
        (("version",), 3),
        (("schedule",), {}),
        (("correct",), {}),
        (("models", "transformer", "layers"), 0),
        (("models", "transformer", "layers"), "3"),
        (("heads", "methods", "a b"), {"select": {"kind": "all"}}),
        (("heads", "methods", ".", "precision"), "auto"),
        (("heads", "methods", ".", "reuse"), {"every": 3}),
        (("heads", "spans"), []),
        (("heads", "spans", 0, "from_sigma"), 1.0),
        (("heads", "spans", 0, "start"), -0.1),
        (("heads", "spans", 0, "stop"), 1.5),
        (("forwards", "rule"), {"kind": "schedule", "steps": [0, "1"]}),
        (("forwards", "rule", "threshold"), "0.1"),
        (("forwards", "branches"), "cond"),
        (("tensors",), {"file": "../x.safetensors", "sha256": "0" * 64}),
        (("tensors",), {"file": "x.pt", "sha256": "0" * 64}),
    ],
)
def test_single_mistakes(path: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    data = data_of(bands(forwards=EVERY_FORWARDS[0]), tmp_path)
    del data["sha256"]
    assert VALIDATOR.is_valid(data) and not loads(data, tmp_path)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    assert not VALIDATOR.is_valid(data) and loads(data, tmp_path)


def test_the_examples_of_the_docs_fit_the_schema_and_load(tmp_path: Path) -> None:
    examples = [each.split("```")[0] for each in (DOCS / "plan-file.md").read_text().split("```json\n")[1:]]
    data = json.loads(examples[0])
    VALIDATOR.validate(data)
    assert not loads(data, tmp_path)
    found = Plan.load(tmp_path / "plan.json")
    assert found.forwards is not None and found.shares()["d"] > 0
    two = {**data, "models": {"transformer": {"layers": 2, "heads": 4, "head_dim": 64}}}
    two["heads"] = {**data["heads"], **json.loads(f"{{{examples[1]}}}")}
    VALIDATOR.validate(two)
    assert not loads(two, tmp_path) and Plan.load(tmp_path / "plan.json").by == "sigma"
