"""The step caches that users call by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers_accel.files import quoted
from diffusers_accel.forwards.forwards import Forwards
from diffusers_accel.forwards.magnitudes import Magnitudes
from diffusers_accel.forwards.predictor import Predictor
from diffusers_accel.forwards.predictors import Guided, Last, Taylor
from diffusers_accel.forwards.rules import EasyCache, FirstBlock, Interval, Schedule, SeaCache, TeaCache
from diffusers_accel.forwards.teacache_tables import TABLES
from diffusers_accel.support.suggest import closest

NAMED_PREDICTORS: dict[str, Predictor] = {
    "residual": Last("residual"),
    "velocity": Last("velocity"),
    "linear": Taylor(1),
    "taylor": Taylor(2),
    "linear_residual": Taylor(1, "residual", "step"),
}


def easycache(
    threshold: float = 0.025,
    warm_up: int = 10,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """EasyCache (arXiv 2507.02860): runs the model again once its output is expected to have changed by `threshold`.

    The authors take threshold=0.05 with warm_up=10 for Wan 2.1 and 0.025 with 5 for HunyuanVideo; the defaults are the more
    careful of each. They decide on the conditional branch, which is the first of a step in diffusers too.

    Args:
        threshold: relative change of the output, added up over predicted steps; 0 computes every step.
        warm_up: number of first steps that compute; a call of fewer than warm_up + 2 steps predicts nothing, and says so.
        predictor: "residual" (the paper's), "velocity", "linear", "taylor" (of order 2) or "linear_residual"; others as
            Forwards(rule, predictor).
        branches: those that may be predicted; None: all.
    """
    return Forwards(EasyCache(threshold, warm_up), _predictor(predictor), _names(branches))


def schedule(
    steps: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """Computes these steps and predicts the others; the first and the last step compute in any case.

    Args:
        steps: indices from 0, for one number of steps.
        shares: shares of the schedule in [0, 1), for any number of steps. Give one of the two.
        predictor: as of `easycache`.
        branches: those that may be predicted; None: all.
    """
    rule = Schedule(None if steps is None else tuple(steps), None if shares is None else tuple(shares))
    return Forwards(rule, _predictor(predictor), _names(branches))


def seacache(
    threshold: float = 0.25,
    max_skips: int = 2,
    predictor: str = "linear_residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """SeaCache (arXiv 2602.18993): runs the model again once the latents, filtered for what is video in them, have changed by
    `threshold`. It needs the noise level of each step and neither a table nor a calibration.

    Args:
        threshold: relative change, added up over predicted steps; the authors take 0.2 to 0.3. 0 computes every step.
        max_skips: most steps in a row that are predicted.
        predictor: "linear_residual" (the authors': the residual continued through the last two computed steps), or another as of
            `easycache`.
        branches: those that may be predicted; None: all.
    """
    return Forwards(SeaCache(threshold, max_skips), _predictor(predictor), _names(branches))


def teacache(
    checkpoint: str | None = None,
    threshold: float | None = None,
    coefficients: Sequence[float] | None = None,
    warm_up: int | None = None,
    indicator: str | None = None,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """TeaCache (arXiv 2411.19108): runs the model again once an indicator of the step, scaled by a polynomial that was fitted to
    the checkpoint, has changed by `threshold`.

    Args:
        checkpoint: whose polynomial to take, such as "wan2.1-t2v-1.3b" (`forwards/teacache_tables.py` has them all): a model of
            another family or size is refused. Checkpoints of one size, such as text and image to video, are told apart by you.
        threshold: added up change; None: where the authors of the table report about 1.6 times the speed, else 0.1. 0 computes
            every step.
        coefficients: the polynomial of a checkpoint that has no table, that of the highest degree first, instead of `checkpoint`.
        warm_up: number of first steps that compute; None: as the table says, else 1.
        indicator: what the coefficients belong to: "tokens" (the default), "time" or "time_projection". A table has its own.
        predictor: "residual" (the authors'), or another as of `easycache`.
        branches: those that may be predicted; None: all.

    Raises:
        ValueError: there is no such table, or not exactly one of checkpoint and coefficients is given.
    """
    if (checkpoint is None) == (coefficients is None):
        raise ValueError(
            'teacache takes the polynomial of a checkpoint, as in checkpoint="wan2.1-t2v-1.3b", or coefficients of your own, as '
            "in coefficients=(1.0, 0.0): give either; seacache and easycache need none"
        )
    if checkpoint is None:
        rule = TeaCache(
            coefficients=tuple(coefficients or ()),
            threshold=0.1 if threshold is None else threshold,
            warm_up=1 if warm_up is None else warm_up,
            indicator=indicator or "tokens",
        )
        return Forwards(rule, _predictor(predictor), _names(branches))
    if checkpoint not in TABLES:
        near = closest(checkpoint, TABLES) if isinstance(checkpoint, str) else None
        raise ValueError(
            f"checkpoint: {f'did you mean {near!r}? ' if near else ''}expected one that has a table (docs/teacache.md lists "
            f"them), found {quoted(checkpoint)}: for another one give coefficients=(...), or take seacache, which needs none"
        )
    table = TABLES[checkpoint]
    if indicator not in (None, table.indicator):
        raise ValueError(
            f"indicator: the coefficients of {checkpoint} belong to {table.indicator!r}, found {quoted(indicator)}: leave it out"
        )
    rule = TeaCache(
        coefficients=table.coefficients,
        threshold=(table.threshold or 0.1) if threshold is None else threshold,
        warm_up=table.warm_up if warm_up is None else warm_up,
        indicator=table.indicator,
        made_for=table.made_for,
    )
    return Forwards(rule, _predictor(predictor), _names(branches))


def firstblock(
    threshold: float = 0.05,
    max_skips: int = 4,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """First block caching (ParaAttention's FBCache): runs the model again once what its first block adds to the tokens has
    changed by `threshold` since it ran last.

    The first block runs a second time at steps that compute, and densely: one block of thirty or more. It needs no table.

    Args:
        threshold: relative change; diffusers' FirstBlockCache takes 0.05. 0 computes every step.
        max_skips: most steps in a row that are predicted.
        predictor: "residual", or another as of `easycache`.
        branches: those that may be predicted; None: all.
    """
    return Forwards(FirstBlock(threshold, max_skips), _predictor(predictor), _names(branches))


def magcache(
    table: str | None = None,
    threshold: float = 0.12,
    max_skips: int = 2,
    retention: float = 0.2,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """MagCache (arXiv 2506.09045): runs the model again once the errors that a table of magnitudes foretells have added up to
    `threshold`.

    Args:
        table: path of a file that `search.magnitudes.calibrate_magnitudes` has written. Another model, number of
            steps or noise schedule than it was made for is refused. A table of your own: `Forwards(MagCache(ratios=...))`.
        threshold: added up error; the authors take 0.12 for Wan 2.1 1.3B and 0.24 for 14B and HunyuanVideo. 0 computes every
            step.
        max_skips: most steps in a row that are predicted.
        retention: share of the schedule, from its start, that computes.
        predictor: "residual" (the authors'), or another as of `easycache`.
        branches: those that may be predicted; None: all.

    Raises:
        ValueError: no table is given, or it is no such table, or damaged.
        FileNotFoundError: there is no such file.
    """
    if table is None:
        raise ValueError(
            "magcache takes a table of your model: table=PATH of one that calibrate_magnitudes(pipe, prompts).save(PATH) has "
            "written, or Forwards(MagCache(ratios=(...))); seacache and easycache need none"
        )
    rule = Magnitudes.load(table).rule(threshold, max_skips, retention)
    return Forwards(rule, _predictor(predictor), _names(branches))


def guidance(
    every: int = 5,
    retention: float = 0.36,
    low: float = 1.0,
    high: float = 1.0,
    turn: float = 0.7,
    branches: Sequence[str] | None = None,
) -> Forwards:
    """The unconditional pass predicted from the conditional one of the same step (the idea of FasterCache, arXiv 2410.19355).

    The first branch of each step computes; of the others one step in `every` does, and at the steps between them their last
    difference to the first branch is added to what that gives now. For pipelines whose guidance takes two forwards a step: where
    both are one batch, nothing is predicted, and the report says so.

    Args:
        every: 1 or more; 1 computes all.
        retention: share of the schedule, from its start, in which all branches compute. FasterCache computes down to timestep
            641.
        low, high: factors of the low and high frequencies of that difference, see `Guided`. FasterCache takes 1.1 for both.
        turn: share of the schedule at which `high` takes over from `low`.
        branches: those that may be predicted; None: all but the first of each step.
    """
    return Forwards(Interval(every, retention), Guided(low, high, turn), _names(branches))


def _predictor(name: str) -> Predictor:
    if name not in NAMED_PREDICTORS:
        raise ValueError(f"predictor: expected one of {', '.join(NAMED_PREDICTORS)}, found {quoted(name)}")
    return NAMED_PREDICTORS[name]


def _names(branches: Any) -> Any:  # what is no list of names is refused by Forwards
    return branches if branches is None or isinstance(branches, str) else tuple(branches)


NAMED_FORWARDS: dict[str, Callable[..., Forwards]] = {
    "easycache": easycache,
    "schedule": schedule,
    "seacache": seacache,
    "teacache": teacache,
    "magcache": magcache,
    "firstblock": firstblock,
    "guidance": guidance,
}
