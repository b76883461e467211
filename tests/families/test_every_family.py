"""What must hold of every family, on a tiny real pipeline of each."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_accel import patch
from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.forwards import Magnitudes
from diffusers_accel.forwards.named import NAMED_FORWARDS, schedule
from diffusers_accel.methods import AxisOrder, Band, Draft, Method, Patches
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from diffusers_accel.methods.order import exact_tokens
from diffusers_accel.run.launch import run
from diffusers_accel.run.partition import partition
from tests.families import TINY, TinyFamily

# Of a family's kinds of pipelines the first: what goes through the same code for all kinds runs on that one.
FIRST = {next(key for key in TINY if key.partition(",")[0] == family.name): family.name for family in FAMILIES.values()}
METHODS = sorted(set(FOR_EVERY_MODEL) - {"dense"})
every_kind = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
every_family = pytest.mark.parametrize("tiny", [TINY[key] for key in FIRST], ids=FIRST)
PACKED = {key: tiny for key, tiny in TINY.items() if any(each.exact and each.queries for each in tiny.layout.segments)}
# Nothing stays dense, and nothing that is read is left out.
WHOLE = {"density": 1.0, "dense_steps": 0.0, "dense_layers": 0}
SPARSE = {**WHOLE, "density": 0.4}


def latents(tiny: TinyFamily, pipe: Any, **overrides: Any) -> np.ndarray:
    return tiny.run(pipe, tiny.call(**{"output_type": "latent", **overrides}))


@cache
def shared(tiny: TinyFamily) -> Any:
    """One pipeline for all tests that take off what they put on: `unpatch` gives it back as it was, see below."""
    return tiny.pipe()


@cache
def stock_latents(tiny: TinyFamily, steps: int) -> np.ndarray:
    return latents(tiny, shared(tiny), num_inference_steps=steps)


def processors_of(pipe: Any) -> dict[str, int]:
    """Which processor each attention module has."""
    modules = find(pipe)["transformer"][0].named_modules()
    return {name: id(module.processor) for name, module in modules if hasattr(module, "processor")}


def layers_of(pipe: Any) -> int:
    (module, family) = find(pipe)["transformer"]
    return len(family.self_attention(module))


class Watch:
    """Attends densely and keeps the calls."""

    def __init__(self, seen: list[AttentionCall]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert call.dense is not None
        self.seen.append(call)
        return call.dense(q, k, v)


class Compare:
    """Attends densely, and keeps how far sparse attention of the same q, k and v is from that, in exact and in video rows."""

    METHODS = (Method(select=Band(0.4)), Method(Patches(), Draft(0.4)), Method(AxisOrder("hwf"), Band(0.4)))

    def __init__(self, seen: list[tuple[AttentionCall, float, float]]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert call.dense is not None
        dense = call.dense(q, k, v)
        methods = tuple(self.METHODS[head % len(self.METHODS)] for head in call.heads)
        sparse = run(partition(methods, call, {}, q.device), call, q, k, v).out
        away = (sparse - dense).abs().amax(dim=(0, 2, 3)) / dense.abs().max()  # [queries]
        exact = exact_tokens(call.layout)[call.layout.query_start :][: call.layout.queries]
        self.seen.append((call, float(away[exact].max()), float(away[~exact].max())))
        return dense


def test_every_family_is_here() -> None:
    """By its name, or as "name, variant" where a family has several kinds of pipelines."""
    assert {key.partition(",")[0] for key in TINY} == {family.name for family in FAMILIES.values()}


@every_kind
def test_each_layer_knows_step_branch_and_tokens(tiny: TinyFamily) -> None:
    pipe, seen = shared(tiny), []
    module, _ = find(pipe)["transformer"]
    self_attention = {name for name, one in module.named_modules() if hasattr(one, "processor")}
    with attach(pipe, lambda site: Watch(seen)) as attachment:
        latents(tiny, pipe, num_inference_steps=3)
        assert {site.name for site in attachment.sites} <= self_attention
        read = type(module.config)(
            json.loads(json.dumps(dict(module.config)))
        )  # as from a checkpoint: lists for tuples
        model = attachment.sites[0].model
        sizes = model._forward.sizes
        assert model.family.layout(read, sizes) == model.family.layout(module.config, sizes)
    layers = range(layers_of(pipe))
    expected = [((step, 3), name, layer) for step in range(3) for name in tiny.branches for layer in layers]
    assert [(call.now, call.branch, call.layer) for call in seen] == expected
    assert {call.layout for call in seen if call.branch == tiny.branches[0]} == {tiny.layout, *tiny.others}


@pytest.mark.parametrize("tiny", PACKED.values(), ids=PACKED)
def test_sparse_attention_changes_rows_of_the_video_only(tiny: TinyFamily) -> None:
    """Whatever else stands in the sequence (text, audio, references) is computed exactly, in every layer."""
    pipe, seen = shared(tiny), []
    with attach(pipe, lambda site: Compare(seen)):
        latents(tiny, pipe, num_inference_steps=2)
    assert {call.layer for call, _, _ in seen} == {*range(layers_of(pipe))}
    for call, exact, video in seen:
        assert exact < 1e-5 < 1e-4 < video, f"layer {call.layer}, {call.layout}"


@every_kind
def test_dense_gives_the_frames_of_the_stock_pipeline_and_unpatch_restores_it(tiny: TinyFamily) -> None:
    pipe = tiny.pipe()
    stock = tiny.run(pipe, tiny.call(num_inference_steps=2))
    processors = processors_of(pipe)
    with patch(pipe, "dense") as done:
        dense = tiny.run(pipe, tiny.call(num_inference_steps=2))
        assert all(row["calls"] == 2 * len(tiny.branches) for row in done.report().rows)
    assert np.array_equal(dense, stock) if tiny.bitwise else np.allclose(dense, stock, atol=1e-4)
    assert processors_of(pipe) == processors
    assert np.array_equal(tiny.run(pipe, tiny.call(num_inference_steps=2)), stock) and stock.std() > 0.01


@pytest.mark.parametrize(
    ("tiny", "name"),
    [
        pytest.param(tiny, name, id=f"{key}-{name}")
        for key, tiny in TINY.items()
        for name in (METHODS if key in FIRST else ["draft"])
    ],
)
def test_each_method_is_dense_at_density_1_and_another_below(tiny: TinyFamily, name: str) -> None:
    """Exact only if the layout says where each token lies."""
    steps = 5 if name == "cached" else 3  # of which it is dense at two
    pipe, stock = shared(tiny), stock_latents(tiny, steps)
    with patch(pipe, name, **WHOLE):
        assert np.abs(latents(tiny, pipe, num_inference_steps=steps) - stock).max() <= 1e-4 * np.abs(stock).max()
    with patch(pipe, name, **SPARSE) as done:
        sparse = latents(tiny, pipe, num_inference_steps=steps)
        assert np.isfinite(sparse).all() and np.abs(sparse - stock).max() > 1e-4 * np.abs(stock).max()
        assert done.report().density < 1


STEP_CACHES: dict[str, dict[str, Any]] = {
    "schedule": {"steps": (0, 1, 4)},
    "easycache": {"threshold": 10.0, "warm_up": 1},
    "seacache": {"threshold": 10.0},
    "teacache": {"coefficients": (1.0, 0.0), "threshold": 10.0},
    "magcache": {"threshold": 10.0, "max_skips": 2, "retention": 0.0},
    "firstblock": {"threshold": 10.0},
    "guidance": {"every": 3, "retention": 0.0},
}


@every_family
@pytest.mark.parametrize("name", sorted(NAMED_FORWARDS))
def test_each_step_cache_skips_forwards(tiny: TinyFamily, name: str, tmp_path: Path) -> None:
    pipe, stock, options = shared(tiny), stock_latents(tiny, 5), STEP_CACHES[name]
    if name == "magcache":
        path = tmp_path / "table.json"
        Magnitudes({"": (1.0,) * 5}, {"": (0.0,) * 5}).save(path)
        options = {**options, "table": str(path)}
    with patch(pipe, name, **options) as done:
        out = latents(tiny, pipe)
        forwards = done.report().forwards
        if name == "guidance" and (len(tiny.branches) == 1 or tiny.branches[0] == "cond_uncond"):
            assert np.array_equal(out, stock) and forwards.predicted == 0
            assert any("predicts nothing" in note for note in done.report().notes)
            pytest.skip("one forward a step: guidance is one batch, or distilled into the model")
        assert np.isfinite(out).all() and not np.array_equal(out, stock)
        assert forwards.predicted >= (1 if name == "guidance" else len(tiny.branches))


@every_family
def test_a_schedule_of_all_steps_is_the_stock_pipeline_bit_for_bit(tiny: TinyFamily) -> None:
    pipe, stock = shared(tiny), stock_latents(tiny, 3)
    with patch(pipe, schedule(steps=range(3))):
        assert np.array_equal(latents(tiny, pipe, num_inference_steps=3), stock)


@every_family
def test_calls_of_other_kinds_follow_each_other(tiny: TinyFamily) -> None:
    pipe = shared(tiny)
    calls = [
        {"num_inference_steps": 2, **each}
        for each in ({}, {"num_inference_steps": 3}, tiny.size, tiny.alone, tiny.several)
    ]
    stock = [latents(tiny, pipe, **overrides) for overrides in calls]
    calls, stock = [*calls, calls[0]], [*stock, stock[0]]
    with patch(pipe, "cached", **WHOLE):
        for overrides, expected in zip(calls, stock, strict=True):
            assert np.abs(latents(tiny, pipe, **overrides) - expected).max() <= 1e-4 * np.abs(expected).max()


@every_family
@pytest.mark.parametrize("whole", [True, False], ids=["fullgraph", "repeated blocks"])
def test_compiling_keeps_the_graphs_of_the_stock_model(tiny: TinyFamily, whole: bool) -> None:
    transformer = shared(tiny).transformer
    repeated = {type(each).__name__ for each in transformer.modules()} & {*(transformer._repeated_blocks or ())}
    if not whole and not repeated:
        pytest.skip(f"diffusers names no repeated blocks of {type(transformer).__name__}")
    if whole and not tiny.whole:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            graphs(tiny, whole, patched=False)
        pytest.skip(f"the forward of {type(transformer).__name__} cannot be one graph, without a patch either")
    found, fewest = graphs(tiny, whole, patched=True), 1 if whole else len(repeated)
    assert found == fewest or found == graphs(tiny, whole, patched=False)  # no model has fewer


def graphs(tiny: TinyFamily, whole: bool, patched: bool) -> int:
    """How many are compiled in two steps, of the whole forward or block by block. The output is that of the stock model."""
    torch._dynamo.reset()
    pipe, counter = tiny.pipe(), CompileCounter()
    if patched:
        patch(pipe, "draft", **WHOLE)
    if whole:
        pipe.transformer.compile(backend=counter, fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    stock = stock_latents(tiny, 2)
    assert np.abs(latents(tiny, pipe, num_inference_steps=2) - stock).max() <= 1e-3 * np.abs(stock).max()
    torch._dynamo.reset()
    return counter.frame_count
