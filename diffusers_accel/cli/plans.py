"""What `--plan` is given, read and checked before a model is loaded.

    [NAME=]PART[+PART]      PART is a plan file, or METHOD[:PARAMETER=VALUE]..., with "/" between the values of a list

None of these letters means anything to a shell.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from diffusers_accel.arguments import NAMES, checked_parameters
from diffusers_accel.evals.export import PlanFile
from diffusers_accel.evals.host_use import HOSTS, apart, named_host, parameters_of
from diffusers_accel.files import printable, quoted
from diffusers_accel.methods.former import by_present_names, no_parameter
from diffusers_accel.plan import Plan
from diffusers_accel.stage_names import stage_named, stage_names
from diffusers_accel.subject import split
from diffusers_accel.support.suggest import did_you_mean, did_you_mean_file

Part = Plan | str | tuple[str, Mapping[str, Any]]
Subject = Part | list[Part]


def read_plan(path: Path) -> Plan:
    try:
        return Plan.load(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{did_you_mean_file(path)}") from error


def read_subjects(plans: Sequence[str], *, of_diffusers: bool = False) -> dict[str, Subject]:
    """Name -> what `compare` takes, of its own caches and backends too where `of_diffusers`."""
    return {name: _subject(value, of_diffusers) for name, value in named(plans).items()}


def named(plans: Sequence[str]) -> dict[str, str]:
    """Name -> plan. The name is what stands before "=", else the plan as it is given, files by their stems."""
    given: dict[str, str] = {}
    for item in plans:
        name, separator, value = item.partition("=")
        if not separator or ":" in name or os.path.isfile(item):  # "=" behind ":" is that of a parameter
            name, value = "+".join(map(_short, composed(item))), item
        if name in given:
            first, second = printable(given[name]), printable(value)
            raise ValueError(
                f"--plan: two plans are called {quoted(name)}; give them names: --plan first={first} --plan second={second}"
            )
        given[name] = value
    return given


def given_plans(plans: Sequence[str]) -> list[tuple[str, list[str | PlanFile]]]:
    """What stands before "=" in each, or "", and its parts, those that are files as what is in them: see `evals.export`."""
    found: list[tuple[str, list[str | PlanFile]]] = []
    for item, (name, value) in zip(plans, named(plans).items(), strict=True):
        parts = [(part, _part(part, of_diffusers=True)) for part in composed(value)]
        spelled = [PlanFile(Path(text).name, part) if isinstance(part, Plan) else text for text, part in parts]
        found.append(("" if item == value else name, spelled))
    return found


def check_steps(subjects: Mapping[str, Subject], call: Mapping[str, Any]) -> None:
    """Refuses step caches that do not fit the steps of a call, as far as it says them."""
    from diffusers_accel.evals.arguments import check_step_caches

    if "num_inference_steps" in call:
        found = {name: split(_of_patch(subject), {}).forwards for name, subject in subjects.items()}
        check_step_caches({name: each for name, each in found.items() if each}, call["num_inference_steps"])


def _short(part: str) -> str:
    name = part.partition(":")[0]
    return part if name in NAMES or named_host(name) else Path(part).stem


def composed(value: str) -> list[str]:
    """What stands between the "+" of a composition; all of it where that is a file."""
    return [value] if os.path.exists(value) else value.split("+")


def _subject(value: str, of_diffusers: bool) -> Subject:
    parts = [_part(part, of_diffusers) for part in composed(value)]
    subject = parts if len(parts) > 1 else parts[0]
    try:
        split(_of_patch(subject), {})
        for part in parts:
            if isinstance(part, tuple) and not named_host(part[0]):
                name, parameters = part
                NAMES[name](**checked_parameters(name, parameters))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--plan {printable(value)}: {error}") from error
    return subject


def _of_patch(subject: Subject) -> Any:
    """What is left for `patch` without what diffusers does itself, which is checked."""
    _, others, parameters = apart(*(subject if isinstance(subject, tuple) else (subject, {})))
    return (others, parameters) if parameters else others


def _part(value: str, of_diffusers: bool) -> Part:
    if value in NAMES or (named_host(value) and of_diffusers):
        return value
    path = Path(value)
    name, parameters = value.partition(":")[::2]
    if named_host(name) and not of_diffusers:
        raise ValueError(f"--plan: {quoted(name)} is diffusers' own, which a report compares with, and no plan")
    exists = bool(value) and os.path.exists(path)
    if exists or (
        path.suffix == ".json" and name not in NAMES
    ):  # a parameter may be a file, as of magcache:table=wan.json
        return read_plan(path)
    if named_host(name) or name in NAMES:
        try:
            return name, _parameters(name, parameters)
        except ValueError as error:
            raise ValueError(f"--plan {printable(value)}: {error}") from error
    if stage := stage_named(name):
        raise ValueError(
            f"--plan: {quoted(name)} is {stage.what}, and no method by itself. In Python, this writes a plan file of it: "
            f'{stage.line}.plan.save("{name.casefold()}.json")'
        )
    hosts = HOSTS if of_diffusers else ()
    meant = did_you_mean(name, [*NAMES, *stage_names(), *hosts]) or did_you_mean_file(path)
    of_host = ", or a cache of diffusers" if hosts else ""
    raise ValueError(
        f"--plan: expected a method ({', '.join(NAMES)}), with parameters such as draft:density=0.3, a plan file, or a step "
        f"cache and one of these with + between them{of_host}, found {quoted(value)}{meant}"
    )


def _parameters(name: str, text: str) -> dict[str, Any]:
    """Of the named method, from "density=0.3:per=row"."""
    given: dict[str, str] = {}
    for item in text.split(":"):
        parameter, separator, value = item.partition("=")
        if not (parameter and separator and value):
            raise ValueError(
                f"expected {name}:PARAMETER=VALUE, as in draft:density=0.3:per=row or schedule:steps=0/4/8, found {quoted(item)}"
            )
        if parameter in given:
            raise ValueError(f"expected {parameter!r} of {name!r} once, found it twice: leave one out")
        given[parameter] = value
    kinds = parameters_of(name) if named_host(name) else get_type_hints(NAMES[name])
    known = kinds if named_host(name) else inspect.signature(NAMES[name]).parameters
    found: dict[str, Any] = {}
    for parameter, value in by_present_names(given, known, f"{name!r}").items():
        if parameter not in known:
            raise ValueError(str(no_parameter(repr(name), parameter, known)))
        found[parameter] = _value(f"{parameter} of {name!r}", value, kinds[parameter])
    return found


def _value(what: str, text: str, kind: Any) -> Any:
    """A text as the value of a parameter of that type: a word, number or flag, several of them, or as many as a tuple has."""
    if NoneType in get_args(kind):  # is what leaving the parameter out means
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    item, *others = get_args(kind) or (kind,)
    several = get_origin(kind) is not None
    count = 1 + len(others) if get_origin(kind) is tuple else None
    read, one, many = _KINDS[item]
    try:
        values = [read(each) for each in (text.split("/") if several else [text])]
    except ValueError:
        values = []
    if not values or count not in (None, len(values)):
        wanted = f"{f'{count} ' if count else ''}{many} with / between them" if several else one
        raise ValueError(f"{what}: expected {wanted}, found {quoted(text)}")
    if not several:
        return values[0]
    return tuple(values) if count else values


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _flag(text: str) -> bool:
    if text.casefold() not in ("true", "false"):
        raise ValueError
    return text.casefold() == "true"


_KINDS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    int: (int, "a whole number", "whole numbers"),
    float: (_number, "a number", "numbers"),
    bool: (_flag, "true or false", "flags"),
    str: (str, "a word", "words"),
}
