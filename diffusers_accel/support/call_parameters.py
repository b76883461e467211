"""What a pipeline's call takes: of a modular one that is not in its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import ModularPipeline


def parameters_of(pipe: Any) -> Mapping[str, Any]:
    """Name -> default of each argument of `pipe(...)`, `inspect.Parameter.empty` where it has none; of a modular pipeline the
    inputs of its blocks, of which those without a default have None."""
    if isinstance(pipe, ModularPipeline):
        return {name: value for name, value in pipe.default_call_parameters.items() if name is not None}
    given = inspect.signature(type(pipe).__call__).parameters
    return {name: each.default for name, each in given.items() if name != "self"}


def takes_any_name(pipe: Any) -> bool:
    """Whether its call has `**kwargs`. A modular pipeline's has, and ignores what none of its blocks takes."""
    given = inspect.signature(type(pipe).__call__).parameters.values()
    return not isinstance(pipe, ModularPipeline) and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in given)
