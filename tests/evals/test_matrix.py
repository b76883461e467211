"""Subjects of every kind beside each other: ours, diffusers' own caches and backends, and stacks of them; killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from diffusers_accel.api import patch
from diffusers_accel.evals.host_use import CACHES, HostUse, apart, parameters_of, switched_on
from diffusers_accel.evals.metrics.latent_cosine import cosine
from diffusers_accel.evals.metrics.psnr import PSNR
from diffusers_accel.evals.report import Report, render
from diffusers_accel.methods import Band, Method
from tests.evals.test_compare import CALL, PROMPT, state
from tests.evals.test_kept import KILLED, lasting, run
from tests.tiny import LAYERS, tiny_wan, tiny_wan_call

OTHER = {key: value * 0.5 for key, value in PROMPT.items()}
BAND = Method(select=Band(0.34))
FBC = ("first_block_cache", {"threshold": 0.3})
SUBJECTS: dict[str, Any] = {
    "band": BAND,
    "step cache": ("schedule", {"steps": [0, 1, 3]}),
    "first block": FBC,
    "broadcast": ("pyramid_attention_broadcast", {"spatial_attention_block_skip_range": 2}),
    "stack": [FBC, BAND],
    "math": ("backend", {"name": "_native_math"}),
}
MATRIX: dict[str, Any] = {"subjects": SUBJECTS, "prompts": [PROMPT], "seeds": [0], "call": CALL, "show": 1}
MATRIX["metrics"] = ("psnr", "latent_cosine")
TO_KILL: dict[str, Any] = {**MATRIX, "prompts": [PROMPT, OTHER], "call": {**CALL, "num_inference_steps": 2}}
TO_KILL["subjects"] = {name: SUBJECTS[name] for name in ("step cache", "stack", "math")}
TO_KILL["subjects"]["step cache"] = ("schedule", {"steps": [0]})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def found(pipe: Any) -> dict[str, Any]:
    before = state(pipe)
    report = run(pipe, None, **MATRIX)
    return {"report": report, "before": before, "after": state(pipe)}


def frames(pipe: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(**PROMPT, **CALL, generator=generator, **{"output_type": "np", **more}).frames[0]


def caches_by_hand(pipe: Any) -> dict[str, Callable[[], Any]]:
    return {
        "first block": lambda: FirstBlockCacheConfig(threshold=0.3),
        "broadcast": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
        ),
    }


def value(report: Report, metric: str, name: str, place: int | None = None) -> float:
    row = report.row(metric, name, None if place is None else report.clips[place])
    assert row and row.value is not None, (metric, name)
    return row.value


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    values = PSNR.load()(a, b)
    return float(values[np.isfinite(values)].mean())


def test_a_cache_of_diffusers_makes_what_it_makes_without_us(found: dict[str, Any], pipe: Any) -> None:
    report, dense = found["report"], frames(pipe)
    latents = frames(pipe, output_type="latent").numpy()
    for name, made in caches_by_hand(pipe).items():
        pipe.transformer.enable_cache(made())
        by_hand, its_latents = frames(pipe), frames(pipe, output_type="latent").numpy()
        pipe.transformer.disable_cache()
        assert value(report, "psnr", name, 0) == pytest.approx(psnr(dense, by_hand), abs=1e-3)
        assert value(report, "latent_cosine", name, 0) == pytest.approx(cosine([latents], [its_latents]), abs=1e-6)
        assert value(report, "latent_cosine", name, 0) < 1
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with patch(pipe, BAND):
        both = frames(pipe)
    pipe.transformer.disable_cache()
    assert value(report, "psnr", "stack", 0) == pytest.approx(psnr(dense, both), abs=1e-3)


def test_what_a_cache_leaves_out_counts_as_not_computed(found: dict[str, Any], pipe: Any) -> None:
    report: Report = found["report"]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with patch(pipe, "dense") as patched:
        frames(pipe)
        calls = [row["calls"] for row in patched.report().rows]
    pipe.transformer.disable_cache()
    whole = 2 * CALL["num_inference_steps"]  # both branches of each step
    assert calls[0] == whole and 0 < calls[1] < whole, "the first block is computed at every step"
    (subject,) = [each for each in report.subjects if each.name == "first block"]
    of_last = [row["density"] for row in subject.layers]
    assert of_last[0] == 1 and all(0 < each < 1 for each in of_last[1:])
    assert sum(calls) / (LAYERS * whole) < 1
    assert value(report, "density", "first block") < 1 and value(report, "density", "math") == 1
    assert value(report, "density", "stack") < value(report, "density", "band")


def test_another_backend_is_the_one_that_runs(
    pipe: Any, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models import attention_dispatch as dispatch

    seen: list[str] = []
    stock = dispatch._AttentionBackendRegistry._backends
    name = dispatch.AttentionBackendName._NATIVE_MATH
    math = stock[name]
    monkeypatch.setitem(stock, name, lambda *a, **k: (seen.append("math"), math(*a, **k))[1])
    active = dispatch._AttentionBackendRegistry._active_backend
    with switched_on(pipe, HostUse(backend="_native_math"), 4), patch(pipe, "dense"):
        frames(pipe)
    assert len(seen) >= 2 * CALL["num_inference_steps"] * LAYERS
    seen.clear()
    frames(pipe)
    assert not seen and dispatch._AttentionBackendRegistry._active_backend == active
    assert (
        found["report"].row("psnr", "math", found["report"].clips[0]).value is None
        or value(found["report"], "psnr", "math", 0) > 60
    )


def test_the_pipeline_is_left_as_it_was(found: dict[str, Any], pipe: Any) -> None:
    assert found["before"] == found["after"] and not pipe.transformer.is_cache_enabled
    processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    assert {each._attention_backend for each in processors} == {None}


def test_a_failure_switches_off_what_was_on(pipe: Any) -> None:
    use = HostUse("first_block_cache", {"threshold": 0.3}, "_native_math")
    with pytest.raises(RuntimeError, match="out of luck"), switched_on(pipe, use, 4):
        assert pipe.transformer.is_cache_enabled
        raise RuntimeError("out of luck")
    assert not pipe.transformer.is_cache_enabled
    processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    assert {each._attention_backend for each in processors} == {None}


def test_a_page_says_what_of_diffusers_was_on(found: dict[str, Any]) -> None:
    page = render.html(found["report"])
    assert "Of diffusers itself: FirstBlockCache (threshold 0.3)." in page
    assert "Of diffusers itself: attention in its backend _native_math." in page
    assert found["report"].provenance["diffusers"]["stack"] == "FirstBlockCache (threshold 0.3)"
    assert "band" not in found["report"].provenance["diffusers"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_matrix_goes_on(pipe: Any, tmp_path: Path) -> None:
    """After kill -9 while its second clip is written it ends with the same numbers."""
    script = KILLED.replace("from tests.evals.test_kept import FEW,", "from tests.evals.test_matrix import TO_KILL as FEW\n"
                            "from tests.evals.test_kept import")  # fmt: skip
    assert script != KILLED
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "8"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    expected = [repr(row) for row in lasting(run(pipe, None, **TO_KILL))]
    assert json.loads((tmp_path / "8.rows").read_text()) == expected


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_of_diffusers_has_its_parameters_and_runs(name: str) -> None:
    given: dict[str, dict[str, Any]] = {
        "mag_cache": {"mag_ratios": [1.0] * 4, "threshold": 0.3, "max_skip_steps": 2},
        "sea_cache": {"threshold": 0.9},
        "taylorseer_cache": {
            "cache_interval": 3,
            "disable_cache_before_step": 2,
            "cache_identifiers": ["blocks.*attn1"],
        },
        "faster_cache": {"spatial_attention_timestep_skip_range": (-1, 901), "is_guidance_distilled": True},
    }
    pipe, parameters = tiny_wan(), given.get(name, {})
    assert set(parameters) <= set(parameters_of(name)) and "current_timestep_callback" not in parameters_of(name)
    use, rest, left = apart(name, parameters)
    assert (use.cache, rest, left) == (name, "dense", {}) and CACHES[name].removesuffix("Config") in use.label
    stock = pipe(**tiny_wan_call(num_inference_steps=4, output_type="latent")).frames
    with switched_on(pipe, use, 4), patch(pipe, "dense") as patched:
        pipe(**tiny_wan_call(num_inference_steps=4, output_type="latent"))
        assert any("diffusers'" in note for note in patched.report().notes)
    assert torch.equal(pipe(**tiny_wan_call(num_inference_steps=4, output_type="latent")).frames, stock)


def test_what_is_diffusers_and_what_is_ours_is_sorted() -> None:
    assert apart("draft", {"density": 0.3}) == (HostUse(), "draft", {"density": 0.3})
    assert apart([FBC, ("draft", {"density": 0.3})], {"cache_memory_fraction": 0.5}) == (
        HostUse(*FBC),
        ("draft", {"density": 0.3}),
        {"cache_memory_fraction": 0.5},
    )
    assert apart([FBC, "easycache", "draft"], {})[1] == ["easycache", "draft"]
    assert apart(dict([FBC]), {}) == (HostUse(*FBC), "dense", {})
    assert apart([FBC, ("backend", {"name": "native"})], {})[0] == HostUse(*FBC, "native")


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (("first_block_cache", {"treshold": 0.1}), "has no parameter 'treshold'; did you mean"),
        (("first_block_cache", {"threshold": "much"}), "threshold of 'first_block_cache': .*found 'much'"),
        (["first_block_cache", "mag_cache"], "one cache and one backend of attention at a time"),
        ("backend", "expected the name of one of diffusers'.*found None"),
        (("backend", {"name": "_native_mth"}), "did you mean"),
        (("mag_cache", {}), "`mag_ratios` must be provided"),
        (("backend", {"name": "flash"}), "flash-attn|Flash Attention|not usable"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_clip(
    subject: Any, says: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe), "prepare_latents", None)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"(?s)subjects\['x'\]: .*({says})"):
        run(pipe, None, **{**MATRIX, "subjects": {"x": subject}})


def test_a_cache_that_is_on_already_is_refused(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    try:
        with pytest.raises(ValueError, match=r"subjects\['x'\]: transformer: a cache of diffusers is on already"):
            run(pipe, None, **{**MATRIX, "subjects": {"x": FBC}})
    finally:
        pipe.transformer.disable_cache()
