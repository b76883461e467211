"""What `patch` can be told to do, sorted by scope: which forwards run, and how the heads attend in those that do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusers_accel.arguments import NAMES, checked_parameters, plan_path, wrong_plan
from diffusers_accel.files import quoted
from diffusers_accel.forwards import NAMED_FORWARDS, Forwards
from diffusers_accel.methods import Method, Recipe
from diffusers_accel.plan import Plan

One = Plan | Recipe | Method | Forwards | str | os.PathLike[str]
Patchable = (
    One | tuple[str, Mapping[str, Any]] | Sequence[One | tuple[str, Mapping[str, Any]]] | Mapping[str, Any] | None
)


_WITHOUT = ". A plan has one of its own here: dataclasses.replace(plan, forwards=None) is the plan without it"


class Scopes(NamedTuple):
    """What is asked for in each scope.

    Args:
        heads: for the heads; None: what suits. A path is read: it is the Plan.
        parameters: of the name that `heads` is.
        forwards: a step cache, or None.
        attends: whether anything was asked for the heads; if not, the model's own attention is left as it is.
    """

    heads: Any
    parameters: dict[str, Any]
    forwards: Forwards | None
    attends: bool = True

    @property
    def speaks_for_heads(self) -> bool:
        """A plan does, also one that holds a step cache and leaves all heads dense."""
        return self.attends or isinstance(self.heads, Plan)


def split(subject: Patchable, parameters: Mapping[str, Any]) -> Scopes:
    """Sorts what `patch` was given; a step cache alone leaves the model's attention as it is, in a plan too.

    Args:
        subject: one thing, a pair (name, parameters), a list of such, or a mapping name -> parameters.
        parameters: of the one thing, if it is a name.

    Raises:
        TypeError: a parameter that the name does not have, or parameters beside a list.
        ValueError: two of one scope, or none.
        FileNotFoundError, PlanError: a path to nothing, or to what is no plan.
    """
    items = _items(subject)
    if items is None:
        return _only(subject, dict(parameters))
    if parameters:
        raise TypeError(
            f'parameters of several go with each, as in ["easycache", ("draft", {{"density": 0.3}})]; found '
            f"{sorted(parameters)} beside {quoted(subject)}"
        )
    scopes = [_only(name, dict(given)) for name, given in items]
    heads = [each for each in scopes if each.speaks_for_heads]
    forwards = [each for each in scopes if each.forwards is not None]
    if not scopes:
        raise ValueError(f"expected one method at least, found {quoted(subject)}; methods: {', '.join(NAMES)}")
    if len(heads) > 1:
        raise ValueError(
            f"a head attends by one method, found {len(heads)} of them in {quoted(subject)}. Give one; a searched plan mixes "
            "them head by head"
        )
    if len(forwards) > 1:
        raise ValueError(
            f"one step cache decides which forwards run, found {len(forwards)} of them in {quoted(subject)}: give one"
            f"{_WITHOUT if any(isinstance(each.heads, Plan) for each in forwards) else ''}"
        )
    chosen = heads[0] if heads else forwards[0]
    return Scopes(chosen.heads, chosen.parameters, forwards[0].forwards if forwards else None, chosen.attends)


def _items(subject: Any) -> list[tuple[Any, Mapping[str, Any]]] | None:
    """The single things of a list or mapping with their parameters; None for a single thing."""
    if isinstance(subject, Mapping):
        if not subject or not all(isinstance(given, Mapping) for given in subject.values()):
            raise wrong_plan(subject)
        return [_pair(item) for item in subject.items()]
    if isinstance(subject, tuple) and len(subject) == 2 and isinstance(subject[1], Mapping):
        return [_pair(subject)]
    if isinstance(subject, (list, tuple)):
        return [_pair(item) if isinstance(item, tuple) else (item, {}) for item in subject]
    return None


def _pair(item: tuple[Any, ...]) -> tuple[Any, Mapping[str, Any]]:
    if len(item) != 2 or not isinstance(item[0], str) or not isinstance(item[1], Mapping):
        raise TypeError(
            f'expected a pair of a name and its parameters, as ("draft", {{"density": 0.3}}), found {quoted(item)}'
        )
    return item[0], item[1]


def _only(subject: Any, parameters: dict[str, Any]) -> Scopes:
    """One thing, in its scope."""
    if isinstance(subject, str) and subject in NAMED_FORWARDS:
        make = NAMED_FORWARDS[subject]
        return Scopes("dense", {}, make(**checked_parameters(subject, parameters)), attends=False)
    if isinstance(subject, Forwards):
        if parameters:
            raise TypeError(f"parameters go with a name, found {sorted(parameters)} beside {quoted(subject)}")
        return Scopes("dense", {}, subject, attends=False)
    if isinstance(subject, (str, os.PathLike)) and subject not in NAMES:
        path = plan_path(subject)
        _check_no_parameters(subject, parameters)
        subject = Plan.load(path)
    if isinstance(subject, (Plan, Recipe, Method)):
        _check_no_parameters(subject, parameters)
    if isinstance(subject, Plan) and subject.forwards is not None:
        return Scopes(subject, {}, subject.forwards, attends=not subject.dense)
    return Scopes(subject, parameters, None)


def _check_no_parameters(subject: Any, parameters: Mapping[str, Any]) -> None:
    if parameters:
        raise TypeError(
            f"parameters go with a named method ({', '.join(NAMES)}), found {sorted(parameters)} beside {quoted(subject)}"
        )
