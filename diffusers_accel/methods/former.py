"""Parameters of methods by their former names, which are still understood: what each is called now."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from diffusers_accel.files import FileError
from diffusers_accel.methods.rests import RESTS
from diffusers_accel.methods.selects import SELECTS
from diffusers_accel.support.former import warn_former

_NAMES = {
    "mass": "top_p",
    "floor": "min_blocks",
    "rule": "per",
    "hold": "reselect_every",
    "every": "refresh_every",
}
_STAGES: dict[str, Mapping[str, type]] = {"select": SELECTS, "rest": RESTS}


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
        name = _NAMES.get(key)
        if name is None or name not in known or key in known:
            found[key] = value
            continue
        if name in given:
            raise ValueError(f"{where}: {key!r} is the former name of {name!r}, found both: leave {key!r} out")
        if warn:
            warn_former(key, name, where)
        found[name] = "head" if name == "per" and value == "quantile" else value
    return found


def stages_by_present_names(method: object, warn: bool = True) -> object:
    """A method's JSON data with the parameters of its stages under the names that they have now.

    Raises:
        FileError: one was given under both names.
    """
    if not isinstance(method, Mapping):
        return method
    found = dict(method)
    for stage, kinds in _STAGES.items():
        part = found.get(stage)
        kind = part.get("kind") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and isinstance(kind, str) and kind in kinds:
            known = [field.name for field in dataclasses.fields(kinds[kind])]
            try:
                found[stage] = by_present_names(part, known, stage, warn)
            except ValueError as error:
                raise FileError(str(error)) from error
    return found
