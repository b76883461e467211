"""What `patch` is given, checked before anything is touched: names, types, and what was probably meant."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from diffusers_accel.files import quoted
from diffusers_accel.forwards import NAMED_FORWARDS, PREDICTORS, RULES, Forwards
from diffusers_accel.methods import NAMED, Recipe
from diffusers_accel.methods.former import by_present_names, no_parameter
from diffusers_accel.methods.stage import Stage
from diffusers_accel.stage_names import stage_named, stage_names
from diffusers_accel.starter import PLANNERS, Starter
from diffusers_accel.support.suggest import closest

NAMES: dict[str, Callable[..., Recipe | Starter | Forwards]] = {**NAMED, **PLANNERS, **NAMED_FORWARDS}

_INSTEAD = {
    "Budget": "a budget is what a search is asked for: give it to search_plan, and patch with the plan that comes back",
    "Patch": "give its .plan",
    "dict": "write it as a plan file, or build a Plan; methods with their parameters are name: {parameter: value}",
}


def meant(name: str, known: Iterable[str]) -> str:
    """Such as "did you mean 'draft'? ", with a blank behind it; "" where nothing is near."""
    near = closest(name, known)
    return f"did you mean {near!r}? " if near else ""


def checked_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the named method `name`, under their present names.

    Raises:
        TypeError: an unknown parameter, or a value of the wrong type.
        ValueError: a parameter under its former name and under the present one.
    """
    recipe = NAMES[name]
    known, types = inspect.signature(recipe).parameters, get_type_hints(recipe)
    given = by_present_names(parameters, known, f"{name!r}")
    for parameter, value in given.items():
        if parameter not in known:
            raise no_parameter(repr(name), parameter, known)
        try:
            msgspec.convert(value, types[parameter])
        except msgspec.ValidationError:
            usual = known[parameter]
            raise TypeError(
                f"{parameter} of {name!r}: expected {usual.annotation}, as in {parameter}={usual.default!r}, found "
                f"{quoted(value)}, {_kind(value)}"
            ) from None
    return given


def plan_path(plan: str | os.PathLike[str]) -> Path:
    """The plan file that is meant.

    Raises:
        ValueError: a word that is neither a method nor a file, or a folder.
        FileNotFoundError: there is no such file; the message names one that is spelt alike.
    """
    path = Path(plan)
    if os.path.isdir(path):  # unlike those of Path, these take any text
        raise ValueError(f"expected a plan file, found the folder {quoted(str(path))}: {_files_in(path)}")
    if os.path.exists(path):
        return path
    if isinstance(plan, str) and path.suffix != ".json" and len(path.parts) == 1:
        if stage := stage_named(plan):
            raise ValueError(f"{quoted(plan)} is {stage.what}, and no method by itself: {stage.line}")
        known = [*NAMES, *stage_names(), *_plans(path.parent)]
        raise ValueError(
            f"{quoted(plan)} is neither a method nor a plan file that exists: {meant(plan, known)}"
            f"The methods are {', '.join(NAMES)}"
        )
    folder = "" if os.path.isdir(path.parent) else f"there is no folder {quoted(str(path.parent))} either; "
    raise FileNotFoundError(
        f"no plan file {quoted(str(path))}: {folder}{meant(path.name, _plans(path.parent))}"
        f"A method would be one of {', '.join(NAMES)}; a search writes plan files"
    )


def wrong_plan(plan: object) -> TypeError:
    """The error for something that is no plan at all."""
    instead = _INSTEAD.get(type(plan).__name__, "")
    if isinstance(plan, Stage):
        instead = f"give it as {plan.given_as}"
    if isinstance(plan, tuple(RULES.values())):
        instead = "give it as Forwards(rule)"
    if isinstance(plan, tuple(PREDICTORS.values())):
        instead = "give it as Forwards(rule, predictor)"
    return TypeError(
        "expected a Plan, a path, a method's name, a Method, a Recipe, Forwards, or a list of one for the heads and one for "
        "the forwards, found "
        f"{_kind(plan)}{': ' if instead else ''}{instead}"
    )


def _plans(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.json")) if os.path.isdir(folder) else []


def _files_in(folder: Path) -> str:
    names = _plans(folder)[:5]
    return f"in it are {', '.join(map(repr, names))}" if names else 'there is no ".json" file in it'


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
