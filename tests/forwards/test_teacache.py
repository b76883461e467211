"""TeaCache: its polynomial, schedules that follow from timesteps alone, indicators as the model has them, its tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from diffusers_accel import patch
from diffusers_accel.attach.site import AttachedModel
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.forwards import Forwards, TeaCache, teacache
from diffusers_accel.forwards.indicator import check_indicator, indicator
from diffusers_accel.forwards.teacache_tables import TABLES
from tests.families import TINY
from tests.tiny import (
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

STEPS = 12
LINE = (1.0, 0.0)
PIPELINES: dict[str, tuple[Any, Any, int]] = {  # with the branches of a step
    "wan": (tiny_wan, tiny_wan_call, 2),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call, 2),
    "hunyuan_video with true cfg": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given), 2),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, 1),
}


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **overrides}
    frames: np.ndarray = pipe(**call(**given)).frames.numpy()
    return frames


@pytest.mark.parametrize("degree", range(6))
def test_a_polynomial_of_any_degree(degree: int) -> None:
    coefficients = tuple(float(x) for x in np.random.default_rng(degree).normal(size=degree + 1))
    for change in (0.0, 0.01, 0.3, 2.0):
        found = TeaCache(coefficients).scaled(change)
        assert found == pytest.approx(float(np.polyval(coefficients, change)))


# Schedules that are known ahead


def precomputed(indicators: list[Tensor], rule: TeaCache) -> list[int]:
    """Which steps compute, from the embeddings of the timesteps alone."""
    found, error = [], 0.0
    for step, m in enumerate(indicators):
        if step:
            change = float((m - indicators[step - 1]).abs().mean() / indicators[step - 1].abs().mean())
            error += float(np.polyval(rule.coefficients, change))
        if step < max(rule.warm_up, 1) or step == len(indicators) - 1 or error >= rule.threshold:
            found.append(step)
            error = 0.0
    return found


def embeddings(pipe: Any, name: str) -> list[Tensor]:
    """Of all timesteps of the pipeline's last call, by the model's own modules."""
    model = pipe.transformer
    with torch.no_grad():
        if hasattr(model, "condition_embedder"):
            parts = model.condition_embedder
            time = [parts.time_embedder(parts.timesteps_proj(t[None])) for t in pipe.scheduler.timesteps]
            return time if name == "time" else [parts.time_proj(parts.act_fn(each)) for each in time]
        return [model.time_embedding(model.time_proj(t[None])) for t in pipe.scheduler.timesteps]


@pytest.mark.parametrize("name", ["time", "time_projection"])
@pytest.mark.parametrize(("threshold", "warm_up"), [(0.05, 1), (0.8, 3), (1.5, 0), (1e9, 5), (0.0, 0)])
def test_wan_follows_a_list_that_is_known_ahead(name: str, threshold: float, warm_up: int) -> None:
    """For every prompt, and in both branches."""
    rule = TeaCache((0.5, 0.2, 0.001), threshold, warm_up, name)
    pipe = tiny_wan()
    stock = run(pipe)
    expected = precomputed(embeddings(pipe, name), rule) if threshold else list(range(STEPS))
    with patch(pipe, Forwards(rule)) as done:
        for seed in (0, 1):
            frames = run(pipe, seed=seed)
            row = done.report().forwards.rows[0]
            assert row["steps"] == expected
            assert row["computed"] == 2 * len(expected) * (seed + 1)
            assert np.array_equal(frames, stock) == (len(expected) == STEPS and seed == 0)
    assert (len(expected) < STEPS) == (threshold > 0.1), "thresholds of both kinds are tried"


def test_cogvideox_follows_a_list_that_is_known_ahead() -> None:
    rule = TeaCache((3.0, 0.5), 5.0, 1, "time")
    pipe = tiny_cogvideox()
    run(pipe, tiny_cogvideox_call)
    expected = precomputed(embeddings(pipe, "time"), rule)
    with patch(pipe, Forwards(rule)) as done:
        run(pipe, tiny_cogvideox_call)
        assert done.report().forwards.rows[0]["steps"] == expected and 2 < len(expected) < STEPS


# Indicators


def given_and_tokens(pipe: Any, call: dict[str, Any], family: Any) -> tuple[Any, Tensor]:
    """What the last forward of a call was given, and what its first self-attention was given in it."""
    seen: dict[str, Any] = {}
    _, attention = family.self_attention(pipe.transformer)[0]

    def at_model(_: Any, args: Any, kwargs: Any) -> None:
        seen["given"] = args, kwargs

    def at_attention(_: Any, args: Any, kwargs: Any) -> None:
        seen["tokens"] = kwargs.get("hidden_states", args[0] if args else None).clone()

    hooks = [
        pipe.transformer.register_forward_pre_hook(at_model, with_kwargs=True),
        attention.register_forward_pre_hook(at_attention, with_kwargs=True),
    ]
    pipe(**call)
    for hook in hooks:
        hook.remove()
    return seen["given"], seen["tokens"]


@pytest.mark.parametrize("key", ["hunyuan_video", "hunyuan_video15", "ltx", "mochi", "cosmos, 1", "wan"])
def test_tokens_are_what_the_first_self_attention_is_given(key: str) -> None:
    tiny = TINY[key]
    pipe = tiny.pipe()
    module, family = find(pipe)["transformer"]
    hooks = [(each._forward_hooks.copy(), each._forward_pre_hooks.copy()) for each in module.modules()]
    (args, kwargs), expected = given_and_tokens(pipe, tiny.call(num_inference_steps=2), family)
    blocks: list[int] = []
    block = family.self_attention(module)[-1][1]
    counter = block.register_forward_hook(lambda *_: blocks.append(1))
    with torch.no_grad():
        found = indicator("tokens", module, family, module.forward, args, kwargs)
    counter.remove()
    assert torch.equal(found, expected) and not blocks, "and no block has run"
    assert [(each._forward_hooks, each._forward_pre_hooks) for each in module.modules()] == hooks


def test_a_model_without_the_indicator_is_refused_before_anything_is_patched() -> None:
    pipe = tiny_hunyuan()
    with pytest.raises(
        ValueError, match=r"indicator: expected one that hunyuan_video has \(tokens, first_block\), found 'time'"
    ):
        patch(pipe, "teacache", coefficients=LINE, indicator="time")
    patch(pipe, "dense").unpatch()


def test_a_forward_that_never_comes_by_says_so() -> None:
    model = tiny_wan_transformer()
    with pytest.raises(RuntimeError, match="to come by its indicator 'time'"):
        indicator("time", model, find(model)["transformer"][1], lambda: None, (), {})


def test_an_error_of_the_model_is_the_models_own() -> None:
    model = tiny_wan_transformer()

    def fails() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        indicator("tokens", model, find(model)["transformer"][1], fails, (), {})
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile_repeated_blocks()"])
@pytest.mark.parametrize(("name", "threshold"), [("tokens", 3.0), ("time", 0.8), ("first_block", 1.0)])
def test_one_graph_of_the_model_and_no_recompilation(name: str, threshold: float, how: str) -> None:
    """What comes by the indicator is never traced."""
    torch._dynamo.reset()
    model, counter = tiny_wan_transformer(layers=1), CompileCounter()
    text = torch.randn(1, 8, model.config.text_dim, generator=torch.Generator().manual_seed(9))

    def loop(target: Any, done: Any) -> list[Tensor]:
        out = []
        with torch.no_grad():
            for step in range(6):
                done.step(step, 6)
                x = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
                out.append(target(x, torch.tensor([900 - 100 * step]), text).sample)
        return out

    cache = Forwards(TeaCache(LINE, threshold, 1, name))
    with patch(model, cache) as done:
        eager = loop(model, done)
        predicted = done.report().forwards.predicted
    assert 0 < predicted < 4
    done = patch(model, cache)
    compiled: Any = model
    if "repeated" in how:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for a, b in zip(loop(compiled, done), eager, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    graphs = 1 if "repeated" in how else 2  # that of the model, and of nothing for a predicted forward
    assert counter.frame_count == graphs
    assert done.report().forwards.predicted == 2 * predicted


@pytest.mark.parametrize("name", ["tokens", "time", "first_block"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "accelerate"])
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_models_come_by_the_indicator(name: str, kind: str, first: str) -> None:
    """A forward that ends early leaves hooks of diffusers and accelerate as they were."""
    cache = Forwards(TeaCache(LINE, 1.0, 1, name))
    pipe, plain = tiny_wan(), tiny_wan()
    with patch(plain, cache) as done:
        expected, predicted = run(plain), done.report().forwards.predicted
    assert predicted > 0
    for what in (first, *({"patch", "offload"} - {first})):
        if what == "patch":
            done = patch(pipe, cache)
        elif kind == "accelerate":
            for module in pipe.transformer.modules():
                if not [*module.children()]:
                    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        else:
            size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            cpu = torch.device("cpu")
            pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **size)
    for _ in range(2):
        done.clear()
        assert np.array_equal(run(pipe), expected)
        assert done.report().forwards.predicted == predicted
    done.unpatch()


# Real pipelines


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("coefficients", [LINE, (-5.0, -0.1)], ids=["rising", "negative"])
def test_a_threshold_of_0_is_the_unpatched_pipeline_bit_for_bit(name: str, coefficients: tuple[float, ...]) -> None:
    make, call, branches = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "teacache", coefficients=coefficients, threshold=0) as done:
        assert np.array_equal(run(pipe, call), stock)
        assert done.report().forwards.computed == STEPS * branches
    assert np.array_equal(run(pipe, call), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_calls_and_branches_do_not_mix(name: str) -> None:
    make, call, branches = PIPELINES[name]
    pipe, given = make(), {"coefficients": LINE, "threshold": 0.7}
    with patch(pipe, "teacache", **given) as done:
        frames = [run(pipe, call, seed=seed) for seed in (0, 1, 0)]
        forwards = done.report().forwards
        assert forwards.predicted > 0 and forwards.computed + forwards.predicted == 3 * STEPS * branches
        assert all(row["computed"] % branches == 0 for row in forwards.rows)
        assert max(row["cache_bytes"] for row in forwards.rows) > 0
    assert np.array_equal(frames[0], frames[2])
    for seed in (0, 1):
        fresh = make()
        with patch(fresh, "teacache", **given):
            assert np.array_equal(run(fresh, call, seed=seed), frames[seed])


def test_the_indicator_is_counted_in_what_is_kept() -> None:
    pipe, kept = tiny_wan(), {}
    for indicator_name in ("time", "tokens"):
        with patch(pipe, "teacache", coefficients=LINE, threshold=1e9, indicator=indicator_name) as done:
            run(pipe)
            kept[indicator_name] = done.report().forwards.rows[0]["cache_bytes"]
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    more = kept["tokens"] - kept["time"]
    assert more > 0 and more % (4 * width) == 0, "tokens x width in fp32, less the embedding"


def test_an_expert_begins_anew() -> None:
    pipe = tiny_wan(2)
    with patch(pipe, "teacache", coefficients=LINE, threshold=1e9) as done:
        run(pipe)
        first, second = (row["steps"] for row in done.report().forwards.rows)
    assert first == [0] and second == [second[0], STEPS - 1] and 0 < second[0] < STEPS - 1


# Tables


@pytest.mark.parametrize("name", TABLES)
def test_each_table_fits_its_family(name: str) -> None:
    table, forwards = TABLES[name], teacache(name)
    family = next(each for each in FAMILIES.values() if table.made_for.startswith(f"{each.name}, "))
    check_indicator(table.indicator, family)
    rule = forwards.rule
    assert isinstance(rule, TeaCache)
    assert (rule.made_for, rule.indicator, rule.coefficients) == (
        table.made_for,
        table.indicator,
        table.coefficients,
    )
    assert (rule.threshold, rule.warm_up) == (table.threshold or 0.1, table.warm_up)
    assert len(table.coefficients) in (5, 6)
    assert teacache(name, threshold=0.3, warm_up=7).rule.label == "teacache 0.3"
    assert Forwards.from_json(forwards.to_json()) == forwards


def test_a_model_of_another_size_is_refused_before_anything_is_patched() -> None:
    pipe = tiny_wan()
    label = "wan, 30 layers of 12 heads"
    with pytest.raises(ValueError, match=rf"made for \({label}\), found wan, 3 layers of \d+ heads: .*seacache"):
        patch(pipe, "teacache", checkpoint="wan2.1-t2v-1.3b")
    patch(pipe, "dense").unpatch()


def test_a_table_is_taken_for_the_model_that_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttachedModel, "label", "wan, 30 layers of 12 heads")
    pipe = tiny_wan()
    with patch(pipe, "teacache", checkpoint="wan2.1-t2v-1.3b", threshold=1e9) as done:
        run(pipe)
        assert done.report().forwards.rows[0]["steps"] == [0, 1, 2, 3, 4, STEPS - 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either"),
        ({"checkpoint": "wan2.1-t2v-14b", "coefficients": LINE}, "give either"),
        ({"checkpoint": "wan2.1-t2v-1.3B"}, "did you mean 'wan2.1-t2v-1.3b'"),
        ({"checkpoint": "flux"}, "expected one that has a table .docs/teacache.md.*found 'flux'"),
        ({"checkpoint": "mochi-1", "indicator": "time"}, "belong to 'tokens', found 'time'"),
        ({"coefficients": ()}, "coefficients: expected the numbers of a polynomial"),
        ({"coefficients": (1.0, float("inf"))}, "coefficients: expected the numbers"),
        ({"coefficients": LINE, "threshold": -1}, "expected 0 or more and finite, found -1"),
        ({"coefficients": LINE, "warm_up": -1}, "expected an integer of 0 or more, found -1"),
        ({"coefficients": LINE, "indicator": "noise"}, "indicator: expected a name .* found 'noise'"),
    ],
)
def test_wrong_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        teacache(**given)
    assert len(str(caught.value)) < 500
