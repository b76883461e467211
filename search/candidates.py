"""The methods among which a search chooses for each head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusers_accel.families import Family, find
from diffusers_accel.files import quoted
from diffusers_accel.kernels.ranking import eight_bits_left_out
from diffusers_accel.methods import (
    DENSE,
    AxisOrder,
    Band,
    ChunkOnly,
    Draft,
    Kept,
    Method,
    Patches,
    Skip,
    Stored,
    Stripe,
    TopHistory,
)
from diffusers_accel.search.recorders import recorders
from diffusers_accel.support.suggest import did_you_mean

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
AXES = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")


def candidates(
    densities: Sequence[float] = DENSITIES,
    *,
    methods: Sequence[str] | None = None,
    stripes: bool = True,
    quantized: bool = False,
    stored: bool = True,
    chunks: bool = False,
) -> tuple[Method, ...]:
    """Dense, and what of each method is worth a look at each of several densities.

    Papers fix one density per method for a whole model; heads that this suits badly are the limitation that they name. Here
    a head may take the sparse pattern where that is enough and the dense one where it is not. Where a method is offered at
    "every other density", that is because its time lies close enough to its neighbour's for the others to be of little use.

    - "pattern" (Sparse-vDiT): skip; band, multi-diagonal (band in "hwf" order) and calibrated stripe at all densities.
    - "draft" (DraftAttention): in patches at all densities, in "hwf" order at every other one.
    - "cached" (FlashBlock): refreshed as often as `Kept` does by itself, on a draft in patches at every other density.
    - "reordered" (PAROAttention): stored masks at every other density, in each of the six orders. A head may only take its
      own best order, so they count as one.
    - "history" (FlashBlock as it was meant), where a video is made chunk by chunk: all but the history is read, and of that
      nothing or its best blocks at every other density; what the rest of it gave is kept as long as a span lasts (longer
      by heads that the next span leaves as they are: they read less than is predicted, and err more).

    Args:
        densities: shares of key blocks, each in (0, 1].
        methods: some of `SETS`; None: all that the other arguments leave. Dense is always there.
        stripes: offer calibrated stripes; without them the probe spends all its rows on errors.
        quantized: for a device whose kernels multiply INT8 faster: dense, draft in patches (at every other density) and cached
            also in "int8", stored masks in "int8" only, as in PAROAttention.
        stored: offer "reordered" where no `methods` are named.
        chunks: offer "history" where no `methods` are named: for a model that makes a video chunk by chunk.

    Returns:
        The candidates, the first of them dense, each set from sparse to dense.
    """
    ordered = sorted(set(densities))
    if not ordered:
        raise ValueError("candidates need at least one density, found none")
    left = {"reordered": stored, "history": chunks}
    names = check_sets(methods) if methods else tuple(name for name in SETS if left.get(name, True))
    found = [method for name in names for method in SETS[name](ordered, quantized)]
    if quantized:
        found.append(replace(DENSE, precision="int8"))
    kept = [method for method in found if stripes or not any(each.splits_rows for each in recorders([method]))]
    return (DENSE, *dict.fromkeys(kept))


def candidates_for(pipe: Any, methods: Sequence[str] | None = None) -> tuple[Method, ...]:
    """`candidates()` for a loaded pipeline: quantized ones where its GPU has a kernel and they are not left out."""
    quantized = replace(DENSE, precision="int8")
    device = torch.device(pipe._execution_device)
    found: dict[str, Any] = find(pipe)
    reasons = [
        quantized.refuses(family.shape(module).head_dim, device, module.dtype) for module, family in found.values()
    ]
    families = [family for _, family in found.values()]
    return candidates(
        methods=methods,
        quantized=device.type != "cpu" and not any(reasons) and eight_bits_left_out(device) is None,
        chunks=any(family.history for family in families),
        stripes=_same_places(families),
        stored=_same_places(families),
    )


def _pattern(densities: list[float], quantized: bool) -> list[Method]:
    bands = [Method(order, Band(density)) for order in (AxisOrder(), AxisOrder("hwf")) for density in densities]
    return [Method(select=Skip()), *bands, *(Method(select=Stripe(density, calibrated=True)) for density in densities)]


def _draft(densities: list[float], quantized: bool) -> list[Method]:
    patches = [Method(Patches(), Draft(density)) for density in densities]
    found = patches + [Method(AxisOrder("hwf"), Draft(density)) for density in _every_other(densities)]
    if quantized:
        found += [Method(Patches(), Draft(density), "int8") for density in _every_other(densities)]
    return found


def _cached(densities: list[float], quantized: bool) -> list[Method]:
    precisions = ("input", "int8") if quantized else ("input",)
    return [
        Method(Patches(), Draft(density), precision, Kept())
        for precision in precisions
        for density in _every_other(densities)
    ]


def _reordered(densities: list[float], quantized: bool) -> list[Method]:
    precision = "int8" if quantized else "input"
    return [Method(AxisOrder(axes), Stored(density), precision) for axes in AXES for density in _every_other(densities)]


def _history(densities: list[float], quantized: bool) -> list[Method]:
    selects = [ChunkOnly(), *(TopHistory(density) for density in _every_other(densities))]
    return [Method(select=select, rest=Kept(None)) for select in selects]


def _every_other(densities: list[float]) -> list[float]:
    return densities[1::2] or densities


SETS: dict[str, Callable[[list[float], bool], list[Method]]] = {
    "pattern": _pattern,
    "draft": _draft,
    "cached": _cached,
    "reordered": _reordered,
    "history": _history,
}


def check_candidates(methods: Sequence[Method], families: Iterable[Family] = ()) -> tuple[Method, ...]:
    """`methods` as a tuple, once it is clear that the first one and only that is dense, that none repeats, and that all can be
    measured on models of these families."""
    families = tuple(families)
    if isinstance(methods, (str, Method)) or not isinstance(methods, Sequence):
        raise TypeError(
            f"candidates: expected a list of methods, the first of them dense, found {quoted(methods)}; "
            "start from diffusers_accel.search.candidates.candidates()"
        )
    for index, method in enumerate(methods):
        if not isinstance(method, Method):
            raise TypeError(f"candidates[{index}]: expected a Method, found {quoted(method)}")
    if not methods or not methods[0].dense or any(method.dense for method in methods[1:]):
        raise ValueError(
            f"the first candidate, and no other, must be dense, found {[method.label for method in methods]}; "
            "start from diffusers_accel.search.candidates.candidates()"
        )
    if len(methods) < 2:
        raise ValueError("a search needs something to choose from, found only the dense candidate")
    for method in methods:
        if reason := _unmeasured(method, families):
            raise ValueError(f"{method.label!r} cannot be searched: {reason}; leave it out")
    if len(set(methods)) < len(methods):
        raise ValueError(f"a candidate is given twice in {[method.label for method in methods]}")
    return tuple(methods)


def check_sets(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as a tuple, once it is clear that each is one of `SETS`."""
    for name in names:
        if name not in SETS:
            raise ValueError(
                f"methods: expected some of {', '.join(SETS)}, found {quoted(name)}{did_you_mean(name, SETS)}"
            )
    return tuple(names)


def _unmeasured(method: Method, families: Sequence[Family]) -> str | None:
    """Why a probe cannot tell the error of a method, or None."""
    if method.select.needs_history and not any(family.history for family in families):
        return "it is for video that is made chunk by chunk, and this model makes all frames together"
    if method.select.records and not _same_places(families):
        return "it reads what a search records of places of the video, which are others in other chunks or layers of this model"
    return method.rest.unmeasured


def _same_places(families: Iterable[Family]) -> bool:
    """Whether tokens lie alike in all calls: in each chunk, in each layer."""
    return not any(family.history or family.layout_in for family in families)
