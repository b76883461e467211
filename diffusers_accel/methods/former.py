"""Parameters of methods by their former names, which are still understood: what each is called now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers_accel.support.former import warn_former
from diffusers_accel.support.suggest import closest

_NAMES = {
    "mass": "top_p",
    "floor": "min_blocks",
    "rule": "per",
    "hold": "reselect_every",
    "every": "refresh_every",
}


def present_name(name: str, known: Collection[str]) -> str | None:
    """Which of the `known` parameters had this name; None where none had, or one has it now."""
    present = _NAMES.get(name)
    return present if present in known and name not in known else None


def no_parameter(what: str, name: str, known: Collection[str]) -> TypeError:
    """The error for a parameter that `what` does not have, with the one that was meant."""
    if present := present_name(name, known):
        return TypeError(f"{what} has no parameter {name!r}, which is now called {present!r}: write that instead")
    near = closest(name, known)
    meant = f"did you mean {near!r}? " if near else ""
    return TypeError(f"{what} has no parameter {name!r}; {meant}it has {', '.join(known) or 'none'}")


def by_present_names(given: Mapping[str, Any], known: Collection[str], where: str, warn: bool = True) -> dict[str, Any]:
    """Parameters under the names that they have now.

    Args:
        known: the names that there are; a former name of another one stays as it is.
        where: what they are parameters of, for messages.
        warn: whether a former name is remarked on.

    Raises:
        ValueError: one was given under both names.
    """
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = present_name(key, known)
        if name is None:
            found[key] = value
            continue
        if name in given:
            raise ValueError(f"{where}: {key!r} is the former name of {name!r}, found both: leave {key!r} out")
        if warn:
            warn_former(key, name, where)
        found[name] = "head" if name == "per" and value == "quantile" else value
    return found
