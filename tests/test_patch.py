"""patch and unpatch on tiny real pipelines: same frames when dense, exact restoration, clocks, threads, compile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.testing import CompileCounter

from diffusers_accel import Plan, patch, unpatch
from diffusers_accel.api import attach
from diffusers_accel.attach.processor import SITES
from diffusers_accel.attach.site import Rows
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import COGVIDEOX, WAN, find, list_families
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, AxisOrder, Band, Method, Recipe, Skip, Stripe
from diffusers_accel.plan import PlanError
from diffusers_accel.run.partition import MAX_LAYOUTS
from diffusers_accel.shape import ModelShape
from tests.stages import mask_of
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

BAND = Method(select=Band(0.34))
MIXED = Recipe(heads=(DENSE, BAND, Method(AxisOrder("hwf"), Band(0.34)), Method(select=Skip())), dense_steps=0.4)


def frames(pipe: Any, **overrides: Any) -> np.ndarray:
    """The latents of the frames: decoding takes longer than denoising at this size, and adds nothing to these tests."""
    return pipe(**tiny_wan_call(output_type="latent", **overrides)).frames.numpy()


def model_inputs(size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 4, 3, size, size, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, TEXT_DIM, generator=generator),
    }


def snapshot(module: torch.nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    return {
        "attributes": {name: id(value) for name, value in vars(module).items() if name != "_diffusers_hook"},
        "keys": list(module.state_dict()),
        "processors": [id(attention.processor) for _, attention in WAN.self_attention(module)],
        "settings": [dict(vars(attention.processor)) for _, attention in WAN.self_attention(module)],
        "hooks": (
            list(module._forward_pre_hooks),
            list(module._forward_pre_hooks_with_kwargs),
            list(module._forward_hooks),
        ),
        "forward": module.forward.__func__,
    }


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("experts", [1, 2])
def test_all_dense_gives_the_very_same_frames(experts: int) -> None:
    pipe = tiny_wan(experts)
    stock = pipe(**tiny_wan_call()).frames
    with patch(pipe, "dense") as done:
        assert np.array_equal(pipe(**tiny_wan_call()).frames, stock)
        assert done.report().density == 1.0
        calls = {row["transformer"]: row["calls"] for row in done.report().rows}
    assert sum(calls.values()) == 10 and len(calls) == experts, "five steps, two branches, whichever expert ran"


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("plan", ["dense", MIXED])
def test_unpatch_restores_the_model(experts: int, plan: Any) -> None:
    pipe = tiny_wan(experts)
    stock = frames(pipe)
    before = {name: snapshot(module) for name, (module, _) in find(pipe).items()}
    patch(pipe, plan)
    patched = frames(pipe)
    unpatch(pipe)
    assert {name: snapshot(module) for name, (module, _) in find(pipe).items()} == before
    assert np.array_equal(frames(pipe), stock)
    assert np.array_equal(patched, stock) == (plan == "dense"), "the mixed plan must have changed something"


def test_state_dict_is_the_same_while_patched() -> None:
    pipe = tiny_wan()
    keys = list(pipe.transformer.state_dict())
    with patch(pipe, MIXED):
        assert list(pipe.transformer.state_dict()) == keys


def test_backend_is_carried_both_ways() -> None:
    transformer = tiny_wan_transformer()
    transformer.set_attention_backend("_native_math")
    with patch(transformer, "dense"):
        processors = [attention.processor for _, attention in WAN.self_attention(transformer)]
        assert {str(processor._attention_backend.value) for processor in processors} == {"_native_math"}
        transformer.set_attention_backend("native")
    assert {attention.processor._attention_backend.value for _, attention in WAN.self_attention(transformer)} == {
        "native"
    }
    transformer.reset_attention_backend()


def test_sparse_layers_compute_exactly_the_blocks_of_the_plan() -> None:
    """A patched layer equals masked attention written out by hand, for every kind of head at once."""
    layout = TokenLayout(3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    transformer = tiny_wan_transformer()
    with patch(transformer, Recipe(heads=MIXED.heads)) as done, torch.no_grad():
        transformer(**model_inputs(32))  # the layout is what the model last saw
        assert done.sites[0].model.rows(2, 0) == [Rows(0, 2, layout)]
        out = done.sites[0].attend(q, k, v)
    for head, method in enumerate(MIXED.heads):
        mask = mask_of(method, layout, heads=(head,))[None]
        order = method.order.index(layout)
        pattern = BlockPattern.from_mask(mask, layout.tokens, layout.tokens, BLOCK, BLOCK)
        one = slice(head, head + 1)
        expected, _ = attention(q[:, order, one], k[:, order, one], v[:, order, one], pattern, impl="reference")
        assert torch.allclose(out[:, order, one], expected, atol=2e-6)


def test_plan_spans_follow_the_schedule() -> None:
    pipe = tiny_wan()
    with patch(pipe, Recipe(heads=(Method(select=Skip()),), dense_steps=0.4)) as done:
        frames(pipe)
        for row in done.report().rows:
            assert row["methods"] == {"dense": HEADS * 2 * 2, "skip": HEADS * 2 * 3}, "steps 0 and 1 of 5 are dense"
        done.clear()
        frames(pipe, num_inference_steps=10, guidance_scale=1.0, height=32, num_frames=3)
        for row in done.report().rows:
            assert row["methods"] == {"dense": HEADS * 4, "skip": HEADS * 6}, "another call starts clean"


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("source", ["context", "timestep"])
def test_clock_reads_step_and_branch(experts: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan(experts)
    if source == "timestep":
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        monkeypatch.setattr("diffusers_accel.attach.clock.Clock._from_context", lambda self: None)
    seen: list[tuple[Any, str]] = []

    class Watch:
        def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
            if call.layer == 0:
                seen.append((call.now, call.branch))
            assert call.dense is not None
            return call.dense(q, k, v)

    with attach(pipe, lambda site: Watch()):
        frames(pipe)
        frames(pipe, num_inference_steps=3)
    expected = [((i, n), branch) for n in (5, 3) for i in range(n) for branch in ("cond", "uncond")]
    assert seen == expected


def test_own_loop_needs_the_step_said() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, MIXED) as done, torch.no_grad():
        with pytest.raises(RuntimeError, match=r"Patch\.step"):
            transformer(**model_inputs())
        done.step(0, 5)
        transformer(**model_inputs())
        done.step(4, 5)
        transformer(**model_inputs())
        assert done.report().rows[0]["methods"]["dense"] == HEADS + 1
        with pytest.raises(ValueError, match="step 5 of 5"):
            done.step(5, 5)


def test_a_single_span_needs_no_clock() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, BAND), torch.no_grad():
        transformer(**model_inputs())


@pytest.mark.parametrize(
    "plans", [(MIXED, Method(AxisOrder("hwf"), Band(0.2))), ("cached", "draft")], ids=["static", "with a memory"]
)
def test_two_pipelines_in_two_threads_do_not_mix(plans: tuple[Any, Any]) -> None:
    pipes = [tiny_wan(seed=seed) for seed in (0, 5)]
    alone = []
    for pipe, plan in zip(pipes, plans, strict=True):
        with patch(pipe, plan):
            alone.append(frames(pipe))
    together: dict[int, np.ndarray] = {}
    for pipe, plan in zip(pipes, plans, strict=True):
        patch(pipe, plan)
    threads = [threading.Thread(target=lambda i=i: together.update({i: frames(pipes[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(together[i], alone[i]) for i in range(2))


def test_an_exception_in_mid_run_leaves_the_pipeline_usable() -> None:
    pipe = tiny_wan()
    with patch(pipe, MIXED):
        good = frames(pipe)

        def fail(pipe: Any, step: int, *_: Any) -> Any:
            if step == 2:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            frames(pipe, callback_on_step_end=fail)
        assert np.array_equal(frames(pipe), good)


def test_copies_and_pickles_hold_stock_processors() -> None:
    transformer = tiny_wan_transformer()
    with torch.no_grad():
        stock = transformer(**model_inputs()).sample
        with patch(transformer, BAND):
            for other in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
                assert {type(attention.processor) for _, attention in WAN.self_attention(other)} == {WanAttnProcessor}
                with other.cache_context("cond"):
                    assert torch.equal(other(**model_inputs()).sample, stock)


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before = len(SITES)
    pipe = tiny_wan()
    patch(pipe, MIXED)
    assert len(SITES) == before + LAYERS
    del pipe
    gc.collect()
    assert len(SITES) == before


@pytest.mark.parametrize("plan", ["dense", Recipe(heads=MIXED.heads)])
def test_fullgraph_compile_of_the_whole_model_keeps_one_graph(plan: Any) -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, plan) as done, torch.no_grad():
        expected = [transformer(**{**model_inputs(32), "timestep": torch.tensor([t])}).sample for t in (900, 500)]
        counter = CompileCounter()
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        done.clear()
        for t, eager in zip((900, 500), expected, strict=True):
            out = compiled(**{**model_inputs(32), "timestep": torch.tensor([t])}).sample
            assert torch.allclose(out, eager, atol=1e-5)
        assert counter.frame_count == 1
        assert [row["calls"] for row in done.report().rows] == [2] * LAYERS, "the op ran, and at each layer's own site"


def test_compile_repeated_blocks_keeps_one_graph() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, Recipe(heads=MIXED.heads)) as done, torch.no_grad():
        eager = transformer(**model_inputs(32)).sample
        counter = CompileCounter()
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        done.clear()
        assert torch.allclose(transformer(**model_inputs(32)).sample, eager, atol=1e-5)
        assert counter.frame_count == 1
        assert [row["calls"] for row in done.report().rows] == [1] * LAYERS


def test_compiled_pipeline_is_found_inside_its_wrapper() -> None:
    pipe = tiny_wan()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with patch(pipe, MIXED) as done:
        frames(pipe)
        assert done.report().rows[0]["methods"]["skip"] == 2 * 3


def test_backward_is_refused_by_name() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, "dense"):
        out = transformer(**model_inputs()).sample
        with pytest.raises(RuntimeError, match="no backward.*unpatch"):
            out.sum().backward()


def test_calibrated_stripes_differ_by_layer() -> None:
    mass = torch.zeros(LAYERS, HEADS, 3, 16)
    for layer in range(LAYERS):
        mass[layer, :, layer] = 1.0
    rows = tuple("a" * HEADS for _ in range(LAYERS))
    plan = Plan(
        family="wan",
        models={"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)},
        methods={"a": Method(select=Stripe(0.34, first_frame=False, calibrated=True))},
        spans=(spans_of(rows),),
        tensors={"stripe_mass/transformer": mass},
    )
    transformer = tiny_wan_transformer()
    with patch(transformer, plan) as done, torch.no_grad():
        transformer(**model_inputs(32))
        patterns = [partition.launches[0].pattern for partition in done.sites[0].engine._partitions.all()]
    assert len(patterns) == LAYERS
    assert [int(p.mask()[0, 0].all(0).nonzero()[0]) for p in patterns if p is not None] == [0, 2, 4]


def spans_of(rows: tuple[str, ...]) -> Any:
    from diffusers_accel.plan import Span

    return Span(0.0, 1.0, {"transformer": rows})


def test_the_preset_stays_dense_on_short_sequences_and_says_why() -> None:
    pipe = tiny_wan()
    stock = frames(pipe)
    with patch(pipe) as done:
        assert np.array_equal(frames(pipe), stock)
        assert any("768 tokens" in reason for reason in done.report().rows[0]["notes"])


def test_block_lists_are_kept_for_a_few_layouts_only() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, BAND) as done, torch.no_grad():
        partitions = done.sites[0].engine._partitions
        sizes = []
        for size in range(16, 16 + 2 * (MAX_LAYOUTS + 1), 2):
            transformer(**model_inputs(size))
            sizes.append(len(partitions.all()))
    assert sizes == [*range(1, MAX_LAYOUTS + 1), 1]


def test_timed_measures_attention() -> None:
    pipe = tiny_wan()
    with patch(pipe, "dense") as done:
        with done.timed() as timer:
            frames(pipe)
        measured = timer.attention_ms
        assert measured > 0
        frames(pipe)
        assert timer.attention_ms == measured, "nothing is timed outside the block"


def test_reports_are_readable() -> None:
    pipe = tiny_wan(2)
    with patch(pipe, MIXED) as done:
        assert "3/3 self-attention layers patched" in repr(done) and "band hwf 0.34" in repr(done)
        assert "nothing has run yet" in str(done.report())
        frames(pipe)
        text = str(done.report())
        assert "dense + cpu" in text and "density of the whole run 0." in text
    assert "unpatched" in repr(done)


def test_cross_attention_and_the_rest_are_not_touched() -> None:
    pipe = tiny_wan()
    others = [block.attn2.processor for block in pipe.transformer.blocks]
    with patch(pipe, MIXED) as done:
        assert [block.attn2.processor for block in pipe.transformer.blocks] == others
        assert [site.name for site in done.sites] == [f"blocks.{i}.attn1" for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "message"),
    [
        (("draught",), {}, ValueError, "neither a method"),
        (("pattern",), {"densty": 0.3}, TypeError, "no parameter 'densty'"),
        (("pattern",), {"density": 1.5}, ValueError, "density"),
        (("missing.json",), {}, FileNotFoundError, "missing.json"),
        ((7,), {}, TypeError, "found an int"),
        ((BAND,), {"density": 0.3}, TypeError, "parameters go with a named method"),
    ],
)
def test_wrong_arguments_leave_the_pipeline_alone(arguments: Any, parameters: Any, error: Any, message: str) -> None:
    pipe = tiny_wan()
    before = snapshot(pipe.transformer)
    with pytest.raises(error, match=message):
        patch(pipe, *arguments, **parameters)
    assert snapshot(pipe.transformer) == before


def test_a_plan_of_another_size_is_refused() -> None:
    plan = Plan.uniform(BAND, family="wan", models={"transformer": ModelShape(LAYERS, HEADS + 1, HEAD_DIM)})
    with pytest.raises(PlanError, match="5 heads.*has 4"):
        patch(tiny_wan(), plan)


def test_patching_twice_is_refused_and_unpatching_the_unpatched_too() -> None:
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="not patched"):
        unpatch(pipe)
    patch(pipe, "dense")
    with pytest.raises(ValueError, match="already"):
        patch(pipe, BAND)
    unpatch(pipe)
    patch(pipe, BAND)


def test_unknown_models_are_refused_with_the_list() -> None:
    with pytest.raises(TypeError, match=r"Linear.*supported: wan, .*list_families"):
        patch(torch.nn.Linear(2, 2))
    assert list_families()[0] == "wan (WanTransformer3DModel)"


def test_foreign_processors_are_refused_and_nothing_is_left_behind() -> None:
    class Foreign:
        def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    transformer = tiny_wan_transformer()
    transformer.blocks[-1].attn1.set_processor(Foreign())
    before = snapshot(transformer)
    with pytest.raises(TypeError, match="Foreign"):
        patch(transformer, "dense")
    assert snapshot(transformer) == before


@pytest.mark.parametrize("unfused", ["before unpatch", "after unpatch"])
def test_fusing_projections_inside_a_patch_leaves_nothing_sparse(unfused: str) -> None:
    """The host keeps the processors that it finds, ours, and sets them again when it unfuses."""
    pipe = tiny_cogvideox()
    call = tiny_cogvideox_call(output_type="latent")
    stock = pipe(**call).frames
    done = patch(pipe, Recipe(heads=(BAND,)))
    pipe.fuse_qkv_projections()
    fused = {type(attention.processor) for _, attention in COGVIDEOX.self_attention(pipe.transformer)}
    assert fused == {FusedCogVideoXAttnProcessor2_0}
    assert "FusedCogVideoXAttnProcessor2_0" in str(done.report()) and "layers 0-2" in str(done.report())
    if unfused == "before unpatch":
        pipe.unfuse_qkv_projections()
        assert "FusedCogVideoX" not in str(done.report()), "ours are back"
        assert not torch.equal(pipe(**tiny_cogvideox_call(output_type="latent")).frames, stock)
    unpatch(pipe)
    if unfused == "after unpatch":
        pipe.unfuse_qkv_projections()
    processors = [attention.processor for _, attention in COGVIDEOX.self_attention(pipe.transformer)]
    assert {type(processor) for processor in processors} == {CogVideoXAttnProcessor2_0}
    assert not pipe.transformer._forward_pre_hooks and "cache_context" not in vars(pipe.transformer)
    assert torch.equal(pipe(**tiny_cogvideox_call(output_type="latent")).frames, stock)
    with patch(pipe, "dense"):
        assert torch.equal(pipe(**tiny_cogvideox_call(output_type="latent")).frames, stock)


def test_a_processor_that_outlives_its_patch_runs_stock_and_compiles_to_one_graph() -> None:
    transformer = tiny_wan_transformer()
    with torch.no_grad():
        stock = transformer(**model_inputs()).sample
        with patch(transformer, Recipe(heads=(BAND,))) as done:
            kept = transformer.attn_processors
            counter = CompileCounter()
            compiled = torch.compile(transformer, backend=counter, fullgraph=True)
            assert not torch.allclose(compiled(**model_inputs()).sample, stock)
            transformer.set_attention_backend("_native_math")
        ran = [row["calls"] for row in done.report().rows]
        transformer.set_attn_processor(dict(kept))
        for _, attention in WAN.self_attention(transformer):
            assert type(attention.processor) is WanAttnProcessor
            assert attention.processor._attention_backend.value == "_native_math", "with the settings that it got"
        transformer.set_attention_backend("native")
        assert torch.equal(transformer(**model_inputs()).sample, stock)
        assert torch.allclose(compiled(**model_inputs()).sample, stock, atol=1e-5)
        assert counter.frame_count == 2, "one graph while patched, and one since"
        assert [row["calls"] for row in done.report().rows] == ran


def test_unpatch_cleans_up_after_all_processors_were_replaced() -> None:
    transformer = tiny_wan_transformer()
    before = snapshot(transformer)
    done = patch(transformer, Recipe(heads=(BAND,)))
    theirs = WanAttnProcessor()
    transformer.set_attn_processor(theirs)
    assert "layers 0-2" in str(done.report()) and "no longer" in str(done.report())
    with pytest.raises(ValueError, match="already"):
        patch(transformer, "dense")
    unpatch(transformer)
    after = snapshot(transformer)
    assert after["hooks"] == before["hooks"] and after["attributes"] == before["attributes"]
    assert all(attention.processor is theirs for _, attention in WAN.self_attention(transformer)), "theirs stays"
    with pytest.raises(ValueError, match="not patched"):
        unpatch(transformer)


def test_a_processor_replaced_since_patching_is_left_as_it_is() -> None:
    transformer = tiny_wan_transformer()
    patch(transformer, "dense")
    theirs = WanAttnProcessor()
    transformer.blocks[0].attn1.set_processor(theirs)
    unpatch(transformer)
    assert transformer.blocks[0].attn1.processor is theirs
    assert type(transformer.blocks[1].attn1.processor) is WanAttnProcessor
