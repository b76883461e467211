"""What `patch(pipe)` takes when it is told nothing: a method, what the family keeps dense, and a density for each size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from diffusers_accel.families import Family
from diffusers_accel.methods import NAMED, Recipe
from diffusers_accel.plan import Plan
from diffusers_accel.run.by_size import BySize

PRESET = "draft"  # it looks at each head and needs no search (docs/choosing.md)
Found = Mapping[str, tuple[nn.Module, Family]]


def preset_recipe(found: Found, parameters: Mapping[str, Any]) -> Recipe:
    """The method, with the dense steps and layers of the family where `parameters`, which are checked, name no others.

    A model of very few layers keeps one that is not dense.
    """
    preset = next(iter(found.values()))[1].preset
    fewest = min(family.shape(module).layers for module, family in found.values())
    kept = {"dense_steps": preset.dense_steps, "dense_layers": min(preset.dense_layers, fewest - 1)}
    return NAMED[PRESET](**{**kept, **parameters})


def preset_by_size(recipe: Recipe, resolved: Plan, found: Found, parameters: Mapping[str, Any]) -> BySize:
    """The plans of the preset: `resolved`, which is `recipe`, at the density of each size, unless the user has asked for one."""

    def plan_at(density: float | None) -> Plan:
        if density is None:
            return resolved
        sized = preset_recipe(found, {**parameters, "density": density})
        heads = tuple(
            replace(one, precision=settled.precision) for one, settled in zip(sized.heads, recipe.heads, strict=True)
        )
        return _uniform(replace(sized, heads=heads), resolved)

    return BySize(
        name=resolved.family,
        kept=kept_dense(recipe),
        method=PRESET,
        shapes=dict(resolved.models),
        plan_at=plan_at,
        dense=_uniform(NAMED["dense"](), resolved),
        given=not {"density", "top_p"}.isdisjoint(parameters),
    )


def kept_dense(recipe: Recipe) -> str:
    """What a recipe leaves dense, in words."""
    layers = {0: "", 1: " and the first layer"}.get(recipe.dense_layers, f" and the first {recipe.dense_layers} layers")
    if not recipe.dense_steps:
        return f"{layers.removeprefix(' and ')} stay dense" if layers else "nothing stays dense"
    return f"the first {recipe.dense_steps:.0%} of the steps{layers} stay dense"


def _uniform(recipe: Recipe, like: Plan) -> Plan:
    made = Plan.uniform(recipe, family=like.family, models=like.models)
    return replace(made, forwards=like.forwards)
