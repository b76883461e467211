"""Does the error that a search predicts tell a good plan from a bad one? Rank correlations over many plans, on new prompts.

python -m diffusers_accel.evals.error_model --plans 40 --prompts 2 --out error_model

One search of the toy model measures all candidates. From its scores half of the plans are searched ones, at densities from sparse
to nearly dense; the others are random. Each is run on prompts that the search has not seen. The drift of the final latents and
the PSNR of the clip are held against what was predicted, with three sets of weights: none, one for each span, and one for each
(span, layer), which is what a search uses. The plans that are searched with the last are run with correction too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from diffusers_accel import __version__, patch
from diffusers_accel.evals import toy
from diffusers_accel.evals.generate import attribute
from diffusers_accel.evals.toy.weights_folder import weights_digest
from diffusers_accel.files import prepare_folder, write_whole
from diffusers_accel.methods import MeanError
from diffusers_accel.plan import Plan
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.plan_making import chosen_spans, joined_spans, mean_errors, plan_tensors
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.predicted import heads_error, layer_errors
from diffusers_accel.search.scores import DENSE, Array, Scores
from diffusers_accel.search.sensitivity import drift, span_choice
from diffusers_accel.support.seeded import seeded

PLANS, PROMPTS, SEARCH_PROMPTS = 40, 2, 2
SPARSEST, DENSEST = 0.15, 0.6
RESAMPLES = 2000
NONE, BY_SPAN, BY_LAYER = "none", "one per span", "one per span and layer"
CORRECTED = ", corrected"

Choice = Mapping[str, Array]


@dataclass(frozen=True)
class PlanOutcome:
    """What one plan did.

    Args:
        name: of the plan.
        predicted: by each set of weights.
        drifts: relative squared error of the final latents, per prompt.
        psnrs: mean over the frames of a clip, in dB, per prompt.
    """

    name: str
    predicted: dict[str, float]
    drifts: tuple[float, ...]
    psnrs: tuple[float, ...]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("error_model"), help="folder for the scores and error_model.md"
    )
    parser.add_argument("--plans", type=int, default=PLANS, help="of which half are searched, 4 or more")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="to measure on; none of them is searched with")
    parser.add_argument("--search-prompts", type=int, default=SEARCH_PROMPTS, help="to search with, 2 or more")
    parser.add_argument("--steps", type=int, default=toy.CALL["num_inference_steps"], help="of a generation")
    parser.add_argument("--guidance", type=float, default=toy.CALL["guidance_scale"], help="1 for none")
    options = parser.parse_args(arguments)
    if options.plans < 4 or options.prompts < 1 or options.search_prompts < 2:
        raise ValueError(
            f"expected 4 plans or more, 1 prompt or more to measure on and 2 or more to search with, found {options.plans}, "
            f"{options.prompts} and {options.search_prompts}"
        )
    prepare_folder(options.out)
    pipe = toy.load_pipeline()
    call = {**toy.CALL, "num_inference_steps": options.steps, "guidance_scale": options.guidance}
    prompts = toy.held_out_prompts(options.search_prompts + options.prompts, seed=0)
    digest = weights_digest(toy.verify_weights())
    path = options.out / f"search-{__version__}-{digest[:12]}-{options.steps}-{options.guidance:g}.safetensors"
    search_plan(pipe, prompts[: options.search_prompts], call=call, budget=Budget.density(DENSEST), scores_path=path)
    scores, cost = Scores.load(path), Cost.load(path.with_suffix(".cost.json"))
    choices = {**searched(scores, cost, options.plans // 2), **drawn(scores, cost, options.plans - options.plans // 2)}
    console = Console(highlight=False, soft_wrap=True, markup=False)
    found = measure(pipe, scores, choices, prompts[options.search_prompts :], call, console)
    text = summary(scores, found, options.steps, options.guidance)
    write_whole(options.out / "error_model.md", text.encode())
    console.print(text)


def span_impacts(scores: Scores) -> Array:
    """[spans]: the drift of the final latents per unit of error, whatever the layer, as the same generations tell it."""
    found = np.zeros(len(scores.spans))
    for span in range(len(scores.spans)):
        errors = layer_errors(scores, span_choice(scores, span))
        total = sum(float(each[span].sum()) for each in errors.values())
        moved = sum(float(scores.measured_impacts(name)[span] @ each[span]) for name, each in errors.items())
        found[span] = moved / total if total else 0.0
    return found


def predictions(scores: Scores, choice: Choice) -> dict[str, float]:
    """The error of a choice by each set of weights."""
    by_span = np.sum([each.sum(1) for each in layer_errors(scores, choice).values()], axis=0)
    by_layer = heads_error(scores, choice)
    assert by_layer is not None  # `main` has searched without span_weights
    return {NONE: float(by_span.sum()), BY_SPAN: float(by_span @ span_impacts(scores)), BY_LAYER: by_layer}


def searched(scores: Scores, cost: Cost, count: int) -> dict[str, Choice]:
    """Plans of least predicted error: of each density one by the weights of spans and one by those of spans and layers."""
    impacts = span_impacts(scores)
    weights = np.maximum(impacts, impacts.max() / 20).tolist()
    found: dict[str, Choice] = {}
    for density in np.linspace(SPARSEST, DENSEST, -(-count // 2)):
        budget = Budget.density(float(density))
        found[f"{BY_LAYER}, density {density:.3f}"] = assign(scores, cost, budget).choice
        found[f"{BY_SPAN}, density {density:.3f}"] = assign(scores, cost, budget, span_weights=weights).choice
    return dict(list(found.items())[:count])


def drawn(scores: Scores, cost: Cost, count: int) -> dict[str, Choice]:
    """Random plans: in turn one of least error by random weights at a random density, and one with a random candidate for all
    heads of each layer in each span, or dense."""
    random = np.random.default_rng(0)
    found: dict[str, Choice] = {}
    for number in range(count):
        if number % 2 == 0:
            impacts = tuple(
                {name: tuple(random.lognormal(0, 1.5, model.layers)) for name, model in scores.models.items()}
                for _ in scores.spans
            )
            budget = Budget.density(float(random.uniform(SPARSEST, DENSEST)))
            found[f"random weights {number}"] = assign(replace(scores, impacts=impacts), cost, budget).choice
        else:
            found[f"random candidates {number}"] = _any(scores, random)
    return found


def _any(scores: Scores, random: np.random.Generator) -> Choice:
    sparse_share = random.uniform(0.2, 1.0)
    choice = {}
    for name, model in scores.models.items():
        measured = np.all(scores.samples(name) > 0, axis=2)  # [spans, layers, candidates], of all heads
        chosen = np.full((len(scores.spans), model.layers), DENSE)
        for at in np.ndindex(chosen.shape):
            options = np.flatnonzero(measured[at])
            if len(options) and random.random() < sparse_share:
                chosen[at] = random.choice(options)
        choice[name] = np.repeat(chosen[..., None], model.heads, 2)
    return choice


def measure(
    pipe: Any,
    scores: Scores,
    choices: Mapping[str, Choice],
    prompts: Sequence[str],
    call: Mapping[str, Any],
    console: Console,
) -> list[PlanOutcome]:
    """Runs every choice on every prompt, but for those that are all dense."""
    dense = [_clip(pipe, prompt, number, call) for number, prompt in enumerate(prompts)]
    plans = {name: (choice, plan_of(scores, choice)) for name, choice in choices.items()}
    plans |= {
        name + CORRECTED: (each, plan_of(scores, each, True)) for name, each in choices.items() if BY_LAYER in name
    }
    found = []
    for name, (choice, plan) in plans.items():
        if plan.dense:
            continue
        drifts, psnrs = [], []
        for number, prompt in enumerate(prompts):
            with patch(pipe, plan):
                latents, frames = _clip(pipe, prompt, number, call)
            drifts.append(drift(latents, dense[number][0]))
            psnrs.append(float(np.mean(-10 * np.log10(((frames - dense[number][1]) ** 2).mean((1, 2, 3))))))
        found.append(PlanOutcome(name, predictions(scores, choice), tuple(drifts), tuple(psnrs)))
        console.print(f"{len(found)} of {len(plans)}: {name}: {np.mean(psnrs):.2f} dB")
    return found


def plan_of(scores: Scores, choice: Choice, correct: bool = False) -> Plan:
    """The plan of a choice, without a provenance."""
    methods, spans = chosen_spans(scores, choice)
    return Plan(
        scores.family,
        dict(scores.models),
        methods,
        tuple(spans) if correct else joined_spans(spans),
        tensors=plan_tensors(scores, choice) | (mean_errors(scores, choice) if correct else {}),
        correct=MeanError() if correct else None,
    )


def _clip(pipe: Any, prompt: str, number: int, call: Mapping[str, Any]) -> tuple[Any, np.ndarray]:
    """Final latents and frames [F, H, W, 3]."""
    last = LastLatents()
    with (
        attribute(pipe, "_progress_bar_config", {"disable": True}),
        seeded(number, pipe._execution_device) as generator,
    ):
        frames = pipe(prompt, **call, generator=generator, output_type="np", callback_on_step_end=last).frames
    return last.ending.latents, np.asarray(frames[0], np.float64)


def correlations(found: Sequence[PlanOutcome], weights: str) -> tuple[float, float]:
    """Spearman's rank correlation, over plans, of the predicted error with the measured drift, and of its opposite with PSNR;
    means over prompts."""
    predicted = [each.predicted[weights] for each in found]
    drifts = [np.mean(each.drifts) for each in found]
    psnrs = [-np.mean(each.psnrs) for each in found]
    return float(spearmanr(predicted, drifts)[0]), float(spearmanr(predicted, psnrs)[0])


def gain_interval(found: Sequence[PlanOutcome], measure: int) -> tuple[float, float, float]:
    """By how much (span, layer) weights raise a correlation (0: with drift, 1: with PSNR) over weights per span, and the 95 %
    interval of that, from plans drawn again."""
    random = np.random.default_rng(0)

    def gain(some: Sequence[PlanOutcome]) -> float:
        return correlations(some, BY_LAYER)[measure] - correlations(some, BY_SPAN)[measure]

    draws = [gain([found[each] for each in random.integers(0, len(found), len(found))]) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return gain(found), float(low), float(high)


def summary(scores: Scores, found: Sequence[PlanOutcome], steps: int, guidance: float) -> str:
    """The tables, in Markdown."""
    every, found = found, [each for each in found if CORRECTED not in each.name]
    prompts = len(found[0].drifts)
    lines = [
        "# Predicted against measured error",
        "",
        f"{len(found)} plans of the toy model on {prompts} held-out prompt{'s' * (prompts > 1)}, {steps} steps, guidance "
        f"{guidance:g}. Spearman's rank correlation over plans, and what is measured per unit of what is predicted.",
        "",
        "| weights | with drift | with PSNR | measured / predicted drift: median, 10 % and 90 % of plans |",
        "| --- | --- | --- | --- |",
    ]
    for weights in (NONE, BY_SPAN, BY_LAYER):
        with_drift, with_psnr = correlations(found, weights)
        ratio = [np.mean(each.drifts) / each.predicted[weights] for each in found if each.predicted[weights] > 0]
        middle, low, high = np.percentile(ratio, (50, 10, 90))
        spread = "no prediction of drift" if weights == NONE else f"{middle:.2f}, {low:.2f} and {high:.2f}"
        lines.append(f"| {weights} | {with_drift:.3f} | {with_psnr:.3f} | {spread} |")
    lines.append("")
    for measure, name in enumerate(("drift", "PSNR")):
        gain, low, high = gain_interval(found, measure)
        lines.append(
            f"- {BY_LAYER} instead of {BY_SPAN}: {gain:+.3f} in the correlation with {name} (95 % interval over plans "
            f"{low:+.3f} to {high:+.3f})."
        )
    lines += [
        _at_equal_density(found),
        _by_correction(every),
        "",
        "| plan | predicted drift | measured | PSNR |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.name} | {each.predicted[BY_LAYER]:.2e} | {np.mean(each.drifts):.2e} | {np.mean(each.psnrs):.2f} |"
        for each in every
    ]
    lines += ["", "Impacts, per span and layer:", ""]
    for name in scores.models:
        rows = (", ".join(f"{each:.2e}" for each in row) for row in scores.measured_impacts(name))
        lines += [f"- {name}, span {span}: {row}" for span, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def _at_equal_density(found: Sequence[PlanOutcome]) -> str:
    """By how much searched plans gain in PSNR, of the same density and prompt."""
    plans = {each.name: each for each in found}
    pairs = [(each, plans.get(name.replace(BY_LAYER, BY_SPAN))) for name, each in plans.items() if BY_LAYER in name]
    gains = [np.subtract(new.psnrs, old.psnrs) for new, old in pairs if old is not None and CORRECTED not in new.name]
    return f"- Searched plans of equal density, {BY_LAYER} instead of {BY_SPAN}: {_gained(gains)}."


def _by_correction(found: Sequence[PlanOutcome]) -> str:
    """By how much plans gain in PSNR, and how much less they drift, when they are corrected."""
    plans = {each.name: each for each in found}
    pairs = [(each, plans[name.removesuffix(CORRECTED)]) for name, each in plans.items() if CORRECTED in name]
    gains = [np.subtract(new.psnrs, old.psnrs) for new, old in pairs]
    ratios = [np.log(np.divide(new.drifts, old.drifts)) for new, old in pairs]
    drifts = f"drift {np.exp(np.concatenate(ratios).mean()):.2f} of what it was (geometric mean), " if ratios else ""
    return f"- Correction of the same plans: {drifts}{_gained(gains)}."


def _gained(gains: Sequence[np.ndarray]) -> str:
    """Differences of PSNR, pair by pair."""
    if not gains:
        return "no pairs of plans"
    every = np.concatenate(gains)
    spread = f"sd {every.std(ddof=1):.2f} dB over " if len(every) > 1 else ""
    return f"{every.mean():+.2f} dB ({spread}{len(every)} pairs of clips, {int((every > 0).sum())} of them above 0)"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run it again and the search goes on from where it was")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
