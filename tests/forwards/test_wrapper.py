"""The wrapper around a transformer's forward: it leaves nothing behind, outlives accelerate, and is not compiled."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from diffusers_accel import patch, unpatch
from diffusers_accel.forwards import schedule
from diffusers_accel.forwards.wrapper import _Wrapper
from diffusers_accel.methods import Band, Method
from tests.tiny import TEXT_DIM, tiny_wan, tiny_wan_call, tiny_wan_transformer

STEPS = 6
CACHE = schedule([0, 3])  # and 5
CPU = torch.device("cpu")
TEXT = torch.randn(1, 8, TEXT_DIM, generator=torch.Generator().manual_seed(99))


def inputs(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 4, 3, 16, 16, generator=generator),
        "timestep": torch.tensor([900 - 100 * step]),
        "encoder_hidden_states": TEXT,  # one tensor for all steps, as pipelines have it: passes are told apart by it
    }


def loop(model: Any, done: Any = None) -> list[torch.Tensor]:
    out = []
    with torch.no_grad():
        for step in range(STEPS):
            if done is not None:
                done.step(step, STEPS)
            out.append(model(**inputs(step)).sample)
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(module: torch.nn.Module) -> Any:
    return (
        {name: id(value) for name, value in vars(module).items()},
        list(module._forward_pre_hooks.values()),
        list(module._forward_hooks.values()),
    )


STOCK = loop(tiny_wan_transformer())
with patch(tiny_wan_transformer(), CACHE) as _done:
    CACHED = loop(_done._models[0].module, _done)


def wrapped(model: torch.nn.Module) -> list[str]:
    return [name for name, value in vars(model).items() if isinstance(value, _Wrapper)]


# On and off


def test_nothing_is_left_behind() -> None:
    model = tiny_wan_transformer()
    before = snapshot(model)
    done = patch(model, CACHE)
    assert wrapped(model) == ["forward"] and list(model.state_dict()) == list(tiny_wan_transformer().state_dict())
    assert same(loop(model, done), CACHED) and not same(CACHED, STOCK)
    unpatch(model)
    assert snapshot(model) == before and same(loop(model), STOCK)
    done.unpatch()
    assert snapshot(model) == before


def test_a_failed_patch_leaves_nothing_behind() -> None:
    pipe = tiny_wan(2)
    before = [snapshot(pipe.transformer), snapshot(pipe.transformer_2)]

    class Other(type(pipe.transformer_2)):  # type: ignore[misc]
        def forward(self, latents: Any, timestep: Any, encoder_hidden_states: Any) -> Any: ...

    pipe.transformer_2.__class__ = Other
    with pytest.raises(TypeError, match="an argument 'hidden_states'"):
        patch(pipe, [CACHE, "draft"])
    assert [snapshot(pipe.transformer), snapshot(pipe.transformer_2)] == before


def align(model: Any) -> Callable[[], None]:
    """What model offload hangs on a transformer, with the CPU for both devices."""
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return lambda: remove_hook_from_module(model)


def cycle(model: Any) -> None:
    """What model offload does after every call of a pipeline."""
    if hasattr(model, "_hf_hook"):
        remove_hook_from_module(model, recurse=True)
        align(model)


@pytest.mark.parametrize(
    "order", ["patch hook unhook unpatch", "patch hook unpatch unhook", "hook patch unhook unpatch"]
)
@pytest.mark.parametrize("again", [False, True])
def test_accelerate_hooks_in_every_order(order: str, again: bool) -> None:
    """`again`: as many calls of a pipeline take all hooks off and put them on again."""
    model, done, unhook = tiny_wan_transformer(), None, None
    for what in order.split():
        if what == "patch":
            done = patch(model, CACHE)
        elif what == "unpatch":
            assert done is not None
            done.unpatch()
            done = None
        elif what == "hook":
            unhook = align(model)
        else:
            assert unhook is not None
            unhook()
        for _ in range(1 + 2 * again):
            assert same(loop(model, done), CACHED if done else STOCK)
            if again:
                cycle(model)
        if what == "unpatch":
            assert not wrapped(model)
    assert not hasattr(model, "_old_forward") and not wrapped(model)


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_a_pipeline_that_offloads_its_models_call_after_call(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With diffusers' own hooks on the CPU: they are hung on anew after each call."""
    pipe, plain = tiny_wan(), tiny_wan()
    call = {"output_type": "latent"}
    with patch(plain, CACHE):
        expected = plain(**tiny_wan_call(num_inference_steps=STEPS, **call)).frames
    stock = plain(**tiny_wan_call(num_inference_steps=STEPS, **call)).frames
    for what in (first, *({"patch", "offload"} - {first})):
        if what == "patch":
            done = patch(pipe, CACHE)
        else:
            offload(pipe, monkeypatch)
    for _ in range(3):
        done.clear()
        assert torch.equal(pipe(**tiny_wan_call(num_inference_steps=STEPS, **call)).frames, expected)
        assert done.report().forwards.predicted == 2 * 3
        assert wrapped(pipe.transformer) == ["_old_forward"]
    done.unpatch()
    for _ in range(2):
        assert torch.equal(pipe(**tiny_wan_call(num_inference_steps=STEPS, **call)).frames, stock)
        assert not wrapped(pipe.transformer)


def offload(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable_model_cpu_offload`, which refuses a machine without an accelerator, by its own means."""

    def hang_on() -> None:
        for name in ("transformer", "vae"):
            align(getattr(pipe, name))

    def maybe_free_model_hooks() -> None:
        pipe.remove_all_hooks()
        hang_on()

    hang_on()
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", maybe_free_model_hooks)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_group_offload(first: str, kind: str) -> None:
    model = tiny_wan_transformer()
    given: dict[str, Any] = {"offload_type": kind, **({"num_blocks_per_group": 1} if kind == "block_level" else {})}
    if first == "patch":
        done = patch(model, CACHE)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **given)
    if first == "offload":
        done = patch(model, CACHE)
    for _ in range(2):
        assert same(loop(model, done), CACHED)
    done.unpatch()
    assert same(loop(model), STOCK)


def test_below_another_hook_it_is_disarmed() -> None:
    """Another hook holds it: nothing is written over, and it passes straight through."""
    model = tiny_wan_transformer()
    done = patch(model, CACHE)
    inner = model.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = theirs
    assert same(loop(model, done), CACHED)
    done.unpatch()
    assert model.forward is theirs and same(loop(model), STOCK)
    with patch(model, CACHE) as again:
        assert same(loop(model, again), CACHED)
    assert model.forward is theirs and same(loop(model), STOCK)


def test_a_forward_that_was_replaced_since_is_noticed() -> None:
    model = tiny_wan_transformer()
    stock = model.forward
    done = patch(model, CACHE)
    loop(model, done)
    model.forward = stock
    with pytest.raises(RuntimeError, match="something has replaced it.*patch it again"):
        loop(model, done)
    done.unpatch()
    assert same(loop(model), STOCK)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_of_the_model_alone(how: str) -> None:
    model = tiny_wan_transformer()
    with patch(model, [CACHE, Method(select=Band(0.34))]) as done:
        loop(model, done)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        computed = done.report().forwards.computed
        assert not wrapped(twin) and twin.forward.__self__ is twin
        twin.proj_out.weight.data.zero_()
        assert all(out.std() < 1 for out in loop(twin)), "the copy runs its own weights"
        assert done.report().forwards.computed == computed
        with patch(twin, CACHE) as other:
            loop(twin, other)
            assert other.report().forwards.predicted == 3
    assert same(loop(model), STOCK)


def test_the_signature_is_the_models_own() -> None:
    model = tiny_wan_transformer()
    before = inspect.signature(model.forward)
    with patch(model, CACHE):
        assert inspect.signature(model.forward) == before and model.forward.__doc__ == type(model).forward.__doc__


# torch.compile


SPELLINGS = ("torch.compile(model)", "model.compile()", "model.compile_repeated_blocks()")


def spell(how: str, model: Any, counter: CompileCounter) -> Any:
    if how == "torch.compile(model)":
        return torch.compile(model, backend=counter, fullgraph=True)
    if how == "model.compile()":
        model.compile(backend=counter, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


@functools.cache
def operators(how: str, heads: str | None) -> int:
    """Of the compiled model without a step cache."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny_wan_transformer(layers=1)
    if heads:
        patch(model, heads)
    with torch.no_grad():
        spell(how, model, counter)(**inputs(0))
    return counter.op_count


@pytest.mark.parametrize(
    ("how", "first", "heads"),
    [(how, first, None) for how in SPELLINGS for first in ("compile", "patch")] + [(SPELLINGS[0], "patch", "dense")],
)
def test_one_graph_and_no_recompilation(how: str, first: str, heads: str | None) -> None:
    """Over computed and predicted steps of two generations; what decides is not in a graph, or it would be seen as one.

    Where the whole model is compiled, predicted forwards have a graph too, of an operator that does nothing.
    """
    alone = operators(how, heads)
    torch._dynamo.reset()
    model, counter = tiny_wan_transformer(layers=1), CompileCounter()
    stock = loop(model)
    with patch(model, CACHE) as done:
        cached = loop(model, done)
    target: Any = model
    if first == "compile":
        target = spell(how, model, counter)
    done = patch(target, [CACHE, heads] if heads else CACHE)
    if first == "patch":
        target = spell(how, model, counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for a, b in zip(loop(target, done), cached, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    graphs = 1 if "repeated" in how else 2
    assert (counter.frame_count, counter.op_count - alone) == (graphs, graphs - 1)
    forwards = done.report().forwards
    assert (forwards.computed, forwards.predicted) == (6, 6)
    done.unpatch()
    for a, b in zip(loop(target), stock, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert counter.frame_count == graphs + bool(heads), "the attention of the model is its own again"


# LoRA, and diffusers' own caches


@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_lora(first: str) -> None:
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)

    def add(model: Any) -> None:
        torch.manual_seed(1)
        model.add_adapter(adapter)

    model, adapted = tiny_wan_transformer(), tiny_wan_transformer()
    add(adapted)
    stock = loop(adapted)
    if first == "adapter":
        add(model)
    done = patch(model, CACHE)
    if first == "patch":
        add(model)
    found = loop(model, done)
    assert all(torch.equal(found[step], stock[step]) for step in (0, 3, 5)) and not same(found, CACHED)
    assert torch.allclose(found[1], inputs(1)["hidden_states"] + stock[0] - inputs(0)["hidden_states"], atol=1e-5)
    model.disable_adapters()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loop(model, done), CACHED, strict=True))
    done.unpatch()
    model.delete_adapters("default")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loop(model), STOCK, strict=True))


def host_caches(pipe: Any) -> dict[str, Any]:
    return {
        "first block": FirstBlockCacheConfig(threshold=0.05),
        "broadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: int(pipe.current_timestep),
        ),
        "faster": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 681),
            current_timestep_callback=lambda: int(pipe.current_timestep),
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
            tensor_format="BCFHW",
        ),
    }


@pytest.mark.parametrize("first", ["patch", "cache"])
@pytest.mark.parametrize("name", ["first block", "broadcast", "faster"])
def test_diffusers_caches_beside_it(name: str, first: str) -> None:
    """They act in the forwards that run; the clock counts true steps, so the schedule stays the same."""
    pipe = tiny_wan()
    call: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
    stock = pipe(**tiny_wan_call(**call)).frames
    config = host_caches(pipe)[name]
    if first == "cache":
        pipe.transformer.enable_cache(config)
    done = patch(pipe, CACHE)
    if first == "patch":
        pipe.transformer.enable_cache(config)
    for _ in range(2):
        done.clear()
        frames = pipe(**tiny_wan_call(**call)).frames
        row = done.report().forwards.rows[0]
        assert torch.isfinite(frames).all() and row["steps"] == [0, 3, 5]
        assert (row["computed"], row["predicted"]) == (2 * 3, 2 * 3)
    done.unpatch()
    pipe.transformer.disable_cache()
    for _ in range(2):
        assert np.allclose(pipe(**tiny_wan_call(**call)).frames, stock, atol=1e-5)
        with patch(pipe, CACHE):  # takes the place of what disable_cache has put back, a wrapper that is off
            pass
        assert not wrapped(pipe.transformer)
