"""The methods that users call by name, on tiny pipelines of every family."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_accel import Plan, patch, unpatch
from diffusers_accel.families import find
from diffusers_accel.methods import AUTO, NAMED, Band, Draft, Method, Patches, Stored
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import PlanError, Span
from diffusers_accel.shape import ModelShape
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

PIPELINES: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Any]]]] = {
    "wan": (tiny_wan, tiny_wan_call),
    "wan, two experts": (partial(tiny_wan, 2), tiny_wan_call),
    "hunyuan, two prompts": (tiny_hunyuan, partial(tiny_hunyuan_call, lengths=(7, 13))),
    "hunyuan, true CFG": (tiny_hunyuan, partial(tiny_hunyuan_call, true_cfg=True)),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call),
}
SPARSE = ("pattern", "draft", "cached", "reordered")
NOW = {"dense_steps": 0.0, "dense_layers": 0}
SIMULATED = "quantized products are simulated on a CPU: their numbers, not their speed"


def latents(pipe: Any, call: Callable[..., dict[str, Any]], **overrides: Any) -> np.ndarray:
    return pipe(**call(output_type="latent", **overrides)).frames.numpy()


def processors(pipe: Any) -> list[int]:
    return [id(one.processor) for module, family in find(pipe).values() for _, one in family.self_attention(module)]


def inputs(step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 4, 3, 32, 32, generator=generator),
        "timestep": torch.tensor([900 - 100 * step]),
        "encoder_hidden_states": torch.ones(1, 8, TEXT_DIM),
    }


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", SPARSE)
def test_named_methods_run_and_are_sparse(name: str, family: str) -> None:
    """With its own dense steps and layers; twice, with the same frames; and unpatched, the stock pipeline is back."""
    pipe, call = PIPELINES[family][0](), PIPELINES[family][1]
    before, stock = processors(pipe), latents(pipe, call)
    with patch(pipe, name, density=0.25) as done:
        first = latents(pipe, call)
        report = done.report()
        assert np.array_equal(latents(pipe, call), first)
    assert np.isfinite(first).all() and not np.allclose(first, stock, atol=1e-4)
    assert report.density is not None and 0.25 < report.density < 0.95
    assert sum(row["calls"] > 0 for row in report.rows) == len(report.rows), "every layer of every expert ran"
    assert {row["reused"] > 0 for row in report.rows} == {name == "cached"}
    assert processors(pipe) == before
    assert np.array_equal(latents(pipe, call), stock)


@pytest.mark.parametrize("family", PIPELINES)
def test_the_report_of_a_named_method_adds_up(family: str) -> None:
    """Every head of every call is counted, under the right method, whatever the batch and the number of passes."""
    pipe, call = PIPELINES[family][0](), PIPELINES[family][1]
    with patch(pipe, "draft", density=0.25) as done:
        latents(pipe, call)
        rows = done.report().rows
    for row in rows:
        assert sum(row["methods"].values()) == row["calls"] * HEADS
        assert sum(row["kernels"].values()) == row["calls"]
        label = Method(Patches(), Draft(0.25)).label
        if row["layer"] == 0:
            assert row["methods"].keys() <= {"dense"}, "the first layer stays dense"
        elif family != "wan, two experts":
            assert row["methods"] == {"dense": row["calls"] // 5 * HEADS, label: row["calls"] * 4 // 5 * HEADS}
            assert row["density"] is not None and row["density"] < 0.8


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", SPARSE)
def test_density_1_gives_the_dense_frames(name: str, family: str) -> None:
    pipe, call = PIPELINES[family][0](), PIPELINES[family][1]
    stock = latents(pipe, call)
    with patch(pipe, name, density=1.0, **NOW) as done:
        ours = latents(pipe, call)
        assert done.report().density == 1
        assert all("dense" not in row["methods"] for row in done.report().rows), "it went through our kernels"
    assert np.allclose(ours, stock, atol=2e-4 * max(1.0, np.abs(stock).max()))


@pytest.mark.parametrize("family", PIPELINES)
def test_dense_is_the_very_stock_pipeline(family: str) -> None:
    pipe, call = PIPELINES[family][0](), PIPELINES[family][1]
    stock = latents(pipe, call)
    with patch(pipe, "dense") as done:
        assert np.allclose(latents(pipe, call), stock, atol=1e-5 * max(1.0, np.abs(stock).max()))
        assert done.report().density == 1


@pytest.mark.parametrize("name", ["dense", *SPARSE])
def test_int8_runs_on_a_cpu_and_says_that_it_is_simulated(name: str) -> None:
    pipe = tiny_wan()
    parameters = {} if name == "dense" else {"density": 0.34, **NOW}
    with patch(pipe, name, **parameters, precision="input"):
        exact = latents(pipe, tiny_wan_call)
    with patch(pipe, name, **parameters, precision="int8") as done:
        rounded = latents(pipe, tiny_wan_call)
        for row in done.report().rows:
            assert row["notes"] == {SIMULATED: 5 * 2} and row["kernels"] == {"cpu int8 simulated": 5 * 2}
            assert all("int8" in label for label in row["methods"])
        assert "simulated" in str(done.report())
    assert not np.array_equal(rounded, exact)
    assert np.corrcoef(rounded.ravel(), exact.ravel())[0, 1] > 0.99


def test_int8_fp8_runs_on_a_cpu_too() -> None:
    pipe = tiny_wan()
    with patch(pipe, "reordered", precision="int8_fp8") as done:
        assert np.isfinite(latents(pipe, tiny_wan_call, num_inference_steps=2)).all()
        assert done.report().rows[0]["kernels"] == {"cpu int8_fp8 simulated": 2 * 2}


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "precision"),
    [
        (torch.device("cpu"), torch.float32, 80, "input"),
        (torch.device("cuda", 62), torch.bfloat16, 89, "int8"),
        (torch.device("cuda", 62), torch.float32, 89, "input"),
        (torch.device("cuda", 62), torch.bfloat16, 90, "input"),
    ],
    ids=["cpu", "gpu", "gpu, fp32", "hopper"],
)
def test_reordered_takes_int8_where_it_may_be_fast(
    device: torch.device, dtype: torch.dtype, capability: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on Hopper, where a kernel has it but nothing says that it is faster."""
    pytest.importorskip("triton", reason="without Triton no kernel of a GPU says anything")
    monkeypatch.setattr("diffusers_accel.kernels.hardware.capability", lambda device: capability)
    monkeypatch.setattr("diffusers_accel.kernels.ranking.torch.cuda.is_available", lambda: device.type == "cuda")
    monkeypatch.setattr("diffusers_accel.api._device", lambda pipe, module: device)
    assert NAMED["reordered"]().heads[0].precision == AUTO
    pipe = tiny_wan()
    pipe.transformer.to(dtype)
    with patch(pipe, "reordered") as done:
        assert [method.precision for method in done.plan.methods.values()] == [precision]
    for asked in ("input", "int8")[: 2 if dtype == torch.bfloat16 else 1]:
        with patch(pipe, "reordered", precision=asked) as done:
            assert [method.precision for method in done.plan.methods.values()] == [asked], "what is asked for is obeyed"


@pytest.mark.parametrize("name", ["draft", "cached"])
def test_fullgraph_compile_keeps_one_graph_through_all_steps(name: str) -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, name, density=0.34, **NOW) as done, torch.no_grad():

        def steps(model: Any) -> list[torch.Tensor]:
            out = []
            for step in range(4):
                done.step(step, 4)
                out.append(model(**{**inputs(step), "encoder_hidden_states": text}).sample)
            return out

        text = inputs()["encoder_hidden_states"]
        eager = steps(transformer)
        reused = done.report().rows[0]["reused"]
        assert reused == (2 * HEADS if name == "cached" else 0)
        counter = CompileCounterWithBackend("aot_eager")
        done.clear()
        for a, b in zip(steps(torch.compile(transformer, backend=counter, fullgraph=True)), eager, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert counter.frame_count == 1
        assert [(row["calls"], row["reused"]) for row in done.report().rows] == [(4, reused)] * LAYERS


# Bad input


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density is the share .* expected in \(0, 1\], found 0"),
        ({"density": 1.5}, ValueError, r"density is the share .* expected in \(0, 1\], found 1.5"),
        ({"density": float("nan")}, ValueError, r"expected in \(0, 1\], found nan"),
        ({"sparsity": 0.5}, TypeError, "has no parameter 'sparsity'; it has density"),
        ({"precision": "fp4"}, ValueError, "precision is one of input, int8, int8_fp8, found 'fp4'"),
        ({"dense_steps": 1.5}, ValueError, r"dense_steps is a share .* found 1.5"),
        (
            {"dense_steps": 4},
            ValueError,
            r"found 4, a count of steps: .* Give dense_steps=4 / num_inference_steps, or 1.0",
        ),
        ({"dense_steps": True}, TypeError, "dense_steps of .* expected float, .* found True"),
        ({"dense_layers": -1}, ValueError, "dense_layers is a number of layers, expected 0 or more, found -1"),
        ({"cache_memory_fraction": 1.5}, ValueError, r"cache_memory_fraction is a share .* found 1.5"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_touched(
    name: str, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe = tiny_wan()
    before = processors(pipe)
    with pytest.raises(error, match=message):
        patch(pipe, name, **parameters)
    assert processors(pipe) == before
    with pytest.raises(ValueError, match="not patched"):
        unpatch(pipe)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cached", {"refresh_every": 1}, "expected 2 or more, found 1"),
        ("draft", {"reselect_every": 0}, "reselect_every >= 1, found 1 and 0"),
        ("draft", {"density": 0.3, "top_p": 0.5}, "either a density or a top_p"),
        ("draft", {"per": "best"}, "found 'best'"),
        ("draft", {"patch": (0, 16)}, "Patches.height is a number of tokens, expected 1 to 65,536, found 0"),
        ("reordered", {"axes": "hw"}, "permutation"),
        ("dense", {"precision": "fp4"}, "found 'fp4'"),
    ],
)
def test_wrong_parameters_of_one_method(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch(tiny_wan_transformer(), name, **parameters)


@pytest.mark.parametrize(
    ("name", "former", "present"),
    [
        ("draft", {"density": None, "mass": 0.6}, {"density": None, "top_p": 0.6}),
        ("draft", {"rule": "quantile", "floor": 2, "hold": 2}, {"per": "head", "min_blocks": 2, "reselect_every": 2}),
        ("draft", {"rule": "row"}, {"per": "row"}),
        ("cached", {"every": 2}, {"refresh_every": 2}),
    ],
)
def test_former_names_of_parameters_are_understood_with_a_warning(
    name: str, former: dict[str, Any], present: dict[str, Any]
) -> None:
    with pytest.warns(FutureWarning, match=f"'{name}': '{list(former)[-1]}' is now called '{list(present)[-1]}'"):
        done = patch(tiny_wan_transformer(), name, **former)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(tiny_wan_transformer(), name, **former)
    assert {each.filename for each in caught if each.category is FutureWarning} == {__file__}, "at the user's own line"
    assert done.plan == patch(tiny_wan_transformer(), name, **present).plan
    with pytest.raises(ValueError, match="is the former name of .* found both"):
        patch(tiny_wan_transformer(), name, **former, **{list(present)[-1]: list(present.values())[-1]})


def test_the_former_name_of_the_memory_is_understood_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="patch: 'max_cache' is now called 'cache_memory_fraction'"):
        done = patch(tiny_wan_transformer(), "cached", max_cache=0.5)
    assert {engine._caches.budget.share for engine in done._engines} == {0.5}
    with pytest.raises(ValueError, match="'max_cache' is the former name of 'cache_memory_fraction', found both"):
        patch(tiny_wan_transformer(), "cached", max_cache=0.5, cache_memory_fraction=0.4)


def test_auto_is_for_recipes_only(tmp_path: Any) -> None:
    """A plan says what it means: on another device the same file must compute the same."""
    path = tmp_path / "plan.json"
    Plan.uniform(Method(select=Band(0.5), precision="int8"), "wan", {"transformer": ModelShape(3, 4, 16)}).save(path)
    data = json.loads(path.read_text().replace('"int8"', '"auto"'))
    path.write_text(json.dumps({key: value for key, value in data.items() if key != "sha256"}))
    with pytest.raises(PlanError, match="precision: expected one of input, int8, int8_fp8, found 'auto'"):
        patch(tiny_wan_transformer(), path)
    with pytest.raises(ValueError, match='expected the precision of a device, found "auto"'):
        patch(tiny_wan_transformer(), Method(select=Band(0.5), precision=AUTO))


def test_what_no_kernel_takes_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="without Triton no kernel of a GPU says anything")
    monkeypatch.setattr("diffusers_accel.kernels.hardware.capability", lambda device: 90)
    monkeypatch.setattr("diffusers_accel.api._device", lambda pipe, module: torch.device("cuda", 61))
    pipe = tiny_wan()
    before = processors(pipe)
    message = (
        r'"draft 8x16 0\.25 int8" cannot run here: cpu: runs on cpu tensors, found cuda; '
        r"portable: int8 takes float16 and bfloat16, found torch\.float32; "
        r"hopper: takes float16 and bfloat16, found torch\.float32; gluon: takes precision input, found int8; "
        r'fa4: computes in the type of q, k and v only, found precision int8\. Use "dense"'
    )
    with pytest.raises(ValueError, match=message):
        patch(pipe, "draft", precision="int8")
    assert processors(pipe) == before


def test_a_kernel_that_the_environment_rules_out_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ACCEL_KERNEL", "reference")  # skips nothing
    with pytest.raises(ValueError, match="cpu: DIFFUSERS_ACCEL_KERNEL=reference asks for another"):
        patch(tiny_wan(), "draft")


@pytest.mark.parametrize("name", ["dense", *SPARSE])
def test_nan_is_refused_where_checks_are_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_wan_transformer()
    call = inputs()
    call["hidden_states"][0, 0, 0, 0, 0] = torch.nan
    with patch(transformer, name) as done, torch.no_grad():
        done.step(0, 5)
        monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
        with pytest.raises(ValueError, match=r"blocks\.0\.attn1 of transformer: expected numbers, found .* NaN among"):
            transformer(**call)
        assert torch.isfinite(transformer(**inputs()).sample).all()


def stored_plan(masks: Tensor) -> Plan:
    """Every head takes the first of these packed masks, uint8 [masks, parts, Q, ceil(K / 8)]."""
    bits, index = Stored(0.5).names(Method(select=Stored(0.5)).order, "transformer")
    plan = Plan.uniform(Method(select=Band(0.5)), "wan", {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})
    tensors = {bits: masks, index: torch.zeros(LAYERS, HEADS, dtype=torch.int32)}
    tensors["stripe_mass/transformer"] = torch.zeros(LAYERS, HEADS, 3, 16)
    return Plan("wan", plan.models, {"a": Method(select=Stored(0.5))}, plan.spans, tensors=tensors)


def test_stored_masks_of_another_size_are_refused_when_they_are_met() -> None:
    transformer = tiny_wan_transformer()
    with (
        patch(transformer, stored_plan(packed(torch.eye(9, dtype=torch.bool)[None, None]))),
        torch.no_grad(),
        pytest.raises(ValueError, match="stored masks are for 9 blocks of 128 tokens; this call has .* 6 blocks"),
    ):
        transformer(**inputs())


def test_block_lists_of_one_part_of_the_schedule_are_held() -> None:
    """Each part's masks are obeyed, those of an earlier part are dropped, and the first part's come back."""
    transformer = tiny_wan_transformer()
    masks = packed(torch.stack([torch.eye(6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool)]))
    with patch(transformer, stored_plan(masks[None])) as done, torch.no_grad():
        partitions = done._engines[0]._partitions
        for step, density in ((0, 1 / 6), (1, 1.0), (0, 1 / 6)):
            done.clear()
            done.step(step, 2)
            transformer(**inputs())
            assert done.report().density == pytest.approx(density)
            assert len(partitions.all()) == LAYERS


def test_block_lists_of_stored_masks_go_when_another_method_takes_over() -> None:
    transformer = tiny_wan_transformer()
    plan = stored_plan(packed(torch.eye(6, dtype=torch.bool)[None, None]))
    heads = {symbol: {"transformer": (symbol * HEADS,) * LAYERS} for symbol in "ab"}
    spans = (Span(0, 0.5, heads["a"]), Span(0.5, 1, heads["b"]))
    plan = Plan("wan", plan.models, {**plan.methods, "b": Method(select=Band(0.5))}, spans, tensors=plan.tensors)
    with patch(transformer, plan) as done, torch.no_grad():
        partitions = done._engines[0]._partitions
        for step, held in ((0, LAYERS), (1, 1), (0, 1 + LAYERS)):  # the layers share the lists of a band
            done.step(step, 2)
            transformer(**inputs())
            assert len(partitions.all()) == held
