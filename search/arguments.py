"""What a search is given, checked before anything runs: each refusal says what was expected, what was found, what to do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from diffusers_accel.families import Family, find
from diffusers_accel.files import check_json, quoted
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.checks import real_number
from diffusers_accel.search.running import Prompt, prompt_label
from diffusers_accel.search.schedule import is_border
from diffusers_accel.support.call_parameters import parameters_of, takes_any_name
from diffusers_accel.support.identity import plain
from diffusers_accel.support.suggest import closest

SPANS = (0.1, 0.3, 0.6)  # borders: short spans first, where one step differs most from the next

STAGES = "pyramid_num_inference_steps_list"  # of pipelines that go through several sizes

# What a search gives to the call itself.
OURS = ("prompt", "generator", "latents", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
OURS_BESIDE_PROMPTS = ("generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs")


def check_pipeline(pipe: Any) -> dict[str, tuple[nn.Module, Family]]:
    """The transformers of a whole diffusers pipeline of a supported family; anything else is refused."""
    if not isinstance(pipe, (DiffusionPipeline, ModularPipeline)):
        what = "a bare transformer" if isinstance(pipe, nn.Module) else f"a {type(pipe).__name__}"
        raise TypeError(
            f"expected a loaded diffusers pipeline, such as WanPipeline, found {what}: a search runs whole generations and "
            "must know which step runs"
        )
    found = find(pipe)
    for name, (module, _) in found.items():
        if getattr(module, "_parallel_config", None) is not None:
            raise ValueError(
                f"{name} runs on several devices, where each process has some of its heads: search with one, and run the plan on "
                "several"
            )
    return found


def makes_chunks(found: Mapping[str, tuple[nn.Module, Family]]) -> bool:
    """Whether a video is made chunk by chunk, each with a history."""
    return any(family.history for _, family in found.values())


def check_searchable(pipe: Any, found: Mapping[str, tuple[nn.Module, Family]]) -> None:
    """Refuses families and pipelines that a search cannot measure."""
    if STAGES in parameters_of(pipe):
        raise ValueError(
            f"a search cannot measure a {type(pipe).__name__}: each stage of its pyramid is a schedule of its own, at another "
            'size, and a plan is for one. Patch it with a named method and its density, such as patch(pipe, "draft", density=0.3)'
        )
    for _, family in found.values():
        if family.no_search is not None:
            raise ValueError(
                f"a search cannot measure {family.name} yet: {family.no_search}. Patch it with a named method and its density, "
                'such as patch(pipe, "draft", density=0.3)'
            )


def check_prompts(pipe: Any, prompts: Any) -> tuple[Prompt, ...]:
    """The calibration prompts: texts, or mappings of arguments that the pipeline takes."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts, found one text: give [{quoted(prompts)}]")
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: expected a list of texts or of mappings, found {quoted(prompts)}")
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError("prompts: expected at least one calibration prompt, found none")
    for number, prompt in enumerate(prompts):
        where = f"prompts[{number}]"
        if isinstance(prompt, Mapping):
            if not prompt:
                raise ValueError(f"{where}: expected arguments such as prompt_embeds, found an empty mapping")
            _check_names(pipe, prompt, where, OURS_BESIDE_PROMPTS)
        elif not isinstance(prompt, str):
            raise TypeError(f"{where}: expected a text or a mapping of arguments, found {quoted(prompt)}")
        elif not prompt.strip():
            raise ValueError(f"{where}: expected a text, found an empty one")
        check_json(prompt_label(prompt), where)
    return prompts


def check_call(pipe: Any, call: Any) -> dict[str, Any]:
    """The arguments of the pipeline's call; refuses those that it does not take, and those that a search gives itself."""
    if not isinstance(call, Mapping):
        raise TypeError(
            f"call: expected a mapping of the pipeline's arguments, such as dict(height=480, width=832), found {quoted(call)}"
        )
    _check_names(pipe, call, "call", OURS)
    check_json(plain(call), "call")
    return dict(call)


def check_callback(pipe: Any) -> None:
    """Refuses a pipeline that does not show its latents, by which the spans are weighed."""
    if "callback_on_step_end" not in parameters_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} has no callback_on_step_end, by which a search measures how much each span matters: "
            "say it yourself with span_weights, one number per span"
        )


def check_budget(budget: Any) -> None:
    """Refuses what is no `Budget`, and says how the number that it may be is given."""
    if isinstance(budget, Budget):
        return
    hint = "give Budget.speedup(1.4), Budget.density(0.3) or Budget.sparse_vdit(epsilon, lam)"
    with contextlib.suppress(TypeError, ValueError):
        if 0 < (number := real_number("budget", budget)) < math.inf:
            hint = f"is it Budget.{'speedup' if number > 1 else 'density'}({number:g}) that you mean?"
    raise TypeError(f"budget: expected a Budget, found {quoted(budget)}; {hint}")


def dense_share(pipe: Any, call: Mapping[str, Any], dense_steps: Any) -> float:
    """The share of the schedule that `dense_steps` is: itself as a float, and as a whole number of 1 or more a count of the
    steps of `call`."""
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, Integral) or dense_steps < 1:
        return real_number("dense_steps", dense_steps)
    count = int(dense_steps)
    steps = call.get("num_inference_steps", parameters_of(pipe).get("num_inference_steps"))
    if others := [name for name in ("timesteps", "sigmas", "strength") if call.get(name) is not None]:
        steps = None  # which say themselves how many run
    if not isinstance(steps, Integral):
        because = f"with {' and '.join(others)}" if others else "without num_inference_steps"
        raise ValueError(
            f"dense_steps: found {quoted(count)}, a count of steps, of a call {because}, so that their number is not known: give "
            "a share of the schedule, a float in [0, 1]"
        )
    if count > steps:
        raise ValueError(f"dense_steps: expected at most the {steps} steps of the call, found {quoted(count)}")
    return count / int(steps)


def borders(spans: Any, dense_steps: Any) -> tuple[tuple[float, float], ...]:
    """The stretches of the schedule by their inner borders; `dense_steps` is one of their ends."""
    if not 0 <= real_number("dense_steps", dense_steps) <= 1:
        raise ValueError(f"dense_steps: expected a share of the schedule in [0, 1], found {dense_steps}")
    if spans is None:
        inner = sorted({*SPANS, float(dense_steps)} - {0.0, 1.0})
    else:
        inner = [real_number(f"spans[{index}]", border) for index, border in enumerate(_sequence("spans", spans))]
    if any(not 0 < border < 1 for border in inner) or sorted(set(inner)) != inner:
        raise ValueError(f"spans: expected inner borders of the schedule, ascending in (0, 1), found {quoted(spans)}")
    edges = [0.0, *inner, 1.0]
    found = tuple(zip(edges, edges[1:]))
    if not is_border(found, dense_steps):
        raise ValueError(
            f"dense_steps: expected 0, 1 or one of the borders that spans has, {inner}, found {dense_steps}; add it to spans"
        )
    return found


def check_weights(weights: Any, spans: int) -> tuple[float, ...] | None:
    """One positive number for each span, or None."""
    if weights is None:
        return None
    found = [
        real_number(f"span_weights[{index}]", each) for index, each in enumerate(_sequence("span_weights", weights))
    ]
    if len(found) != spans or not all(math.isfinite(each) and each > 0 for each in found):
        raise ValueError(f"span_weights: expected {spans} positive numbers, one per span, found {quoted(weights)}")
    return tuple(found)


def _check_names(pipe: Any, arguments: Mapping[Any, Any], where: str, ours: Sequence[str]) -> None:
    parameters = parameters_of(pipe)
    known = sorted(set(parameters) - {*OURS})
    for name in arguments:
        if name in ours:
            raise ValueError(f'{where}: "{name}" is set by the search (from prompts and seed), take it out')
        if not isinstance(name, str):
            raise TypeError(f"{where}: expected names of arguments, found {quoted(name)}")
        if name not in parameters and not takes_any_name(pipe):
            near = closest(name, known)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{where}: {type(pipe).__name__} takes no {quoted(name)}; {hint}")


def _sequence(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of numbers, found {quoted(value)}")
    return list(value)
