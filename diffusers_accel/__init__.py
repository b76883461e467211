"""Sparse attention for diffusers' video pipelines.

Four verbs and the file between them: `patch(pipe, plan)` makes a loaded pipeline faster in place, `search_plan` profiles
its heads and steps and returns a `Plan`, `tune_plan` corrects one by real clips until it does what was asked, `compare`
reports what a plan wins and what it costs. Everything is imported at first use,
so that `diffusers_accel.kernels` needs torch only.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_accel.api import patch, unpatch
    from diffusers_accel.evals.compare import compare
    from diffusers_accel.families import Family, list_families, register_family
    from diffusers_accel.methods import Method
    from diffusers_accel.plan import Plan
    from diffusers_accel.search.budget import Budget
    from diffusers_accel.search.plan_search import search_plan
    from diffusers_accel.tune import Goal, tune_plan

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Family",
    "Goal",
    "Method",
    "Plan",
    "compare",
    "list_families",
    "patch",
    "register_family",
    "search_plan",
    "tune_plan",
    "unpatch",
]

# In a source checkout kernels/, search/ and evals/ stand beside this folder; an installed wheel holds them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

_HOMES = {
    "Budget": "diffusers_accel.search.budget",
    "Family": "diffusers_accel.families",
    "Goal": "diffusers_accel.tune",
    "Method": "diffusers_accel.methods",
    "Plan": "diffusers_accel.plan",
    "compare": "diffusers_accel.evals.compare",
    "list_families": "diffusers_accel.families",
    "patch": "diffusers_accel.api",
    "register_family": "diffusers_accel.families",
    "search_plan": "diffusers_accel.search.plan_search",
    "tune_plan": "diffusers_accel.tune",
    "unpatch": "diffusers_accel.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffusers_accel' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
