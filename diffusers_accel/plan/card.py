"""A plan for people: one page in Markdown that goes along with its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.files import printable
from diffusers_accel.plan.plan import Plan
from diffusers_accel.plan.size import planned_size
from diffusers_accel.plan.told import mean_density, told, told_number, told_text
from diffusers_accel.support.markdown import as_markdown_text

LONGEST = 300  # characters of somebody's text
QUALITIES = {"psnr": ("PSNR", " dB"), "ssim": ("SSIM", ""), "lpips": ("LPIPS", "")}
MET = {True: "met", False: "not met", None: "the clips cannot tell"}
# What a call may say of the size of its video, and how the card calls it.
CALL = {
    "width": "width",
    "height": "height",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}


def card(plan: Plan, file: str) -> str:
    """What a plan is for, what it is expected to do and was seen to do, what it is made of, how it is used, and its limits.

    Nothing is measured for it: all facts are those that the plan tells, and what it does not tell is said to be not told.

    Args:
        file: the name of its file, for the lines that load it.
    """
    parts = [
        f"# Plan for {_text(told_text(plan, 'search', 'model') or plan.family)}",
        "A plan of diffusers_accel: it says which forwards of the transformers run, and how each attention head attends in each "
        "stretch of the denoising schedule. It holds no weights, and loading it executes nothing.",
        _table(("", ""), _made_for(plan)),
        "## Speed and quality",
        _table(("", "speed-up", "quality", "clips"), [_expected(plan), _measured(plan)]),
        _goal(plan),
        "## Methods",
        _table(("method", "heads"), _methods(plan)),
        *_scopes(plan),
        "## Use",
        _use(plan, file),
        "## Limits",
        "\n".join(f"- {each}" for each in _limits(plan)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_for(plan: Plan) -> list[tuple[str, str]]:
    shapes = [f"{name}: {s.layers} layers x {s.heads} heads x {s.head_dim}" for name, s in plan.models.items()]
    call = told(plan, "search", "call")
    sizes = [f"{what} {call[key]:g}" for key, what in CALL.items() if _number(call, key)]
    prompts = told(plan, "prompts")
    versions = [
        f"{name} {found}" for name in ("diffusers_accel", "diffusers", "torch") if (found := told_text(plan, name))
    ]
    device = told_text(plan, "device") or told_text(plan, "search", "device")
    facts = {
        "model": told_text(plan, "search", "model"),
        "pipeline": told_text(plan, "search", "pipeline"),
        "family": plan.family,
        "transformers": "; ".join(shapes),
        "call": ", ".join(sizes),
        "tokens": planned_size(plan),
        "searched on": device,
        "versions": ", ".join(versions),
        "prompts of the search": f"{len(prompts)}" if isinstance(prompts, list) else "",
        "asked for": ", ".join(f"{key} {value}" for key, value in plan.budget.items()),
    }
    if (merged := told(plan, "merged")) is not None:
        facts["merged of"] = f"{merged}, and neither searched nor measured as a whole"
    return [(name, _text(text) if text else "not told") for name, text in facts.items()]


def _expected(plan: Plan) -> tuple[str, ...]:
    speedup, error = told_number(plan, "predicted", "speedup"), told_number(plan, "predicted", "latents_error")
    if speedup is None:
        return "predicted", "not told", "not told", "none"
    quality = "not told" if error is None else f"relative squared error of the final latents {error:.2g}"
    return "predicted", f"{speedup:.2f}x", quality, "none"


def _measured(plan: Plan) -> tuple[str, ...]:
    speedup, clips = told_number(plan, "tuned", "speedup"), told_number(plan, "tuned", "clips")
    if speedup is None or clips is None:
        return "measured", "not told", "not told", "none"
    found = [
        (words, value) for key, words in QUALITIES.items() if (value := told_number(plan, "tuned", key)) is not None
    ]
    interval = told(plan, "tuned", "interval")
    known = isinstance(interval, list) and len(interval) == 2 and all(_is_number(each) for each in interval)
    bounds = f" (95 % interval of the mean {interval[0]:.4g} to {interval[1]:.4g})" if known else " (no interval)"
    quality = "; ".join(f"{name} {value:.4g}{unit}{bounds}" for (name, unit), value in found[:1])
    return "measured", f"{speedup:.2f}x", quality or "not told", f"{clips:.0f}"


def _goal(plan: Plan) -> str:
    met = told(plan, "tuned", "met")
    of = "These numbers are those that the plan file tells. A prediction ranks plans; it is no measurement."
    if not (goal := told_text(plan, "tuned", "goal")):
        return f"Nothing was measured on clips: `diffusers-accel report` does that. {of}"
    verdict = f": {MET[met]}" if met is None or isinstance(met, bool) else ""
    return f"The goal was {_text(goal)}{verdict}, on prompts other than those of the search. {of}"


def _methods(plan: Plan) -> list[tuple[str, str]]:
    used = ((plan.methods[symbol].label, share) for symbol, share in plan.shares().items() if share)
    return [(_text(label), f"{share:.1%}") for label, share in sorted(used, key=lambda each: -each[1])]


def _scopes(plan: Plan) -> list[str]:
    density = mean_density(plan)
    steps = f"Step cache: {_text(plan.forwards.label)}." if plan.forwards else "No step cache: every step is computed."
    reads = "not known ahead" if density is None else f"{density:.3f}"
    corrected = [f"Corrected by: {_text(plan.correct.label)}."] if plan.correct else []
    return [steps, f"Mean density of the heads in steps that are computed: {reads}.", *corrected]


def _use(plan: Plan, file: str) -> str:
    name = printable(repr(file))
    beside = (
        "\n\nThe plan's tensors are in a file beside it (`.safetensors`), which goes where the plan goes."
        if plan.tensors
        else ""
    )
    code = f"from diffusers_accel import patch\n\npatch(pipe, {name})"
    return f"```python\n{code}\n```{beside}"


def _limits(plan: Plan) -> list[str]:
    found = told(plan, "warnings")
    warnings = [f"The search warned: {_text(each)}" for each in found[:8]] if isinstance(found, list) else []
    clips = told_number(plan, "tuned", "clips")
    interval = (
        "An interval is that of the mean over clips: single clips, and other prompts than those, may lie outside."
    )
    return [
        *warnings,
        "It fits transformers of the sizes above only, and refuses others. Other weights of the same sizes are not refused: what "
        "was measured does not hold for them.",
        "Another size, number of steps or scheduler was not looked at: `diffusers-accel report` says how it does there.",
        "Times are those of the device above. On another one the speed-up differs, and may be a loss.",
        *([interval] if clips else []),
    ]


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    """Cells are Markdown already."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: object) -> str:
    """Somebody's text or data, cut where it is long."""
    whole = str(text)
    return as_markdown_text(whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} ...")


def _number(found: object, key: str) -> bool:
    return isinstance(found, Mapping) and _is_number(found.get(key))


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a plan holds finite ones only
