"""What is kept from step to step: when it is dropped, how much there may be of it, and what the report says of it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffusers_accel import Plan, patch
from diffusers_accel.api import Patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Recipe
from diffusers_accel.methods.rest import CacheEntry
from diffusers_accel.methods.steps import mixed
from diffusers_accel.plan import Span
from diffusers_accel.run import launch
from diffusers_accel.run import memory as memory_module
from diffusers_accel.run.memory import CacheBudget, CacheManager, LayerCache
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

TOKENS = 768  # of tiny Wan's call
ONE_HEAD = TOKENS * (4 * HEAD_DIM + 4)  # bytes of an output and an LSE in fp32
CACHED = Method(Patches(), Draft(0.34), rest=Kept(3))
WAN = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}


def frames(pipe: Any, **overrides: Any) -> np.ndarray:
    return pipe(**tiny_wan_call(output_type="latent", **overrides)).frames.numpy()


def inputs(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a bare transformer, of the size of tiny Wan's call."""
    return {
        "hidden_states": torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": text,
    }


def kept(done: Patch) -> int:
    """Bytes that a patch keeps now."""
    return sum(engine._caches.bytes(engine._layer) for engine in done._engines)


def densities(pipe: Any, done: Patch, **overrides: Any) -> list[float]:
    """Of layer 0, step by step."""
    done.clear()
    sums = [0.0]

    def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        row = done.report().rows[0]
        sums.append(row["density"] * row["calls"])
        return {}

    frames(pipe, callback_on_step_end=note, **overrides)
    branches = done.report().rows[0]["calls"] / (len(sums) - 1)
    return [(b - a) / branches for a, b in zip(sums, sums[1:], strict=False)]


# One memory


def filled(now: tuple[int, int] = (2, 9), **changes: Any) -> LayerCache:
    """A memory after a step, of one group "a"."""
    memory = LayerCache()
    memory.begin(now, *tensors(**changes), {"a"})
    pattern = BlockPattern.full(2, 64, 64)
    memory.held["a"] = CacheEntry(pattern, now[0], [now[0]] * 2, torch.zeros(1, 64, 2, 8), torch.zeros(1, 2, 64))
    return memory


def tensors(tokens: int = 64, keys: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, tokens, 2, 8, dtype=dtype), torch.zeros(1, keys, 2, 8, dtype=dtype)


def test_a_memory_lasts_while_step_follows_step() -> None:
    memory = filled()
    assert memory.bytes == 64 * 2 * (8 * 4 + 4)
    for step in (3, 4):
        memory.begin((step, 9), *tensors(), {"a"})
        assert list(memory.held) == ["a"]


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ((1, 9), {}),
        ((0, 9), {}),
        ((2, 9), {}),
        ((4, 9), {}),
        ((3, 8), {}),
        ((3, 9), {"tokens": 65}),
        ((3, 9), {"keys": 65}),
        ((3, 9), {"dtype": torch.bfloat16}),
    ],
    ids=["step back", "first step", "same step", "gap", "other schedule", "queries", "keys", "dtype"],
)
def test_a_memory_is_emptied_by(now: tuple[int, int], changes: dict[str, Any]) -> None:
    memory = filled()
    memory.begin(now, *tensors(**changes), {"a"})
    assert not memory.held and memory.bytes == 0
    memory.held["a"] = filled().held["a"]
    memory.begin((now[0] + 1, now[1]), *tensors(**changes), {"a"})
    assert list(memory.held) == ["a"], "and goes on from there"


def test_groups_that_do_not_run_any_more_are_dropped() -> None:
    memory = filled()
    memory.held["b"] = memory.held["a"]
    memory.begin((3, 9), *tensors(), {"b", "c"})
    assert list(memory.held) == ["b"]


def test_mixing_takes_each_head_from_its_pattern_whatever_their_capacity() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 2, 3, 5, 5, generator=generator) < torch.tensor([0.2, 0.9])[:, None, None, None, None]
    few, many = (BlockPattern.from_mask(mask, 640, 640) for mask in masks)
    assert few.blocks.shape[3] < many.blocks.shape[3]
    for fresh, held in ((few, many), (many, few)):
        both = mixed(fresh, held, [True, False, True])
        both.check()
        for head, source in enumerate((fresh, held, fresh)):
            assert torch.equal(both.mask()[:, head], source.mask()[:, head])


# All memories of a patch


def test_memories_are_of_one_generation_and_one_expert() -> None:
    memories = CacheManager()

    def run(transformer: str, step: int, steps: int = 9, branch: str = "cond") -> LayerCache:
        memories.at(transformer, (step, steps))
        memory = memories.of((transformer, 0), (branch, (0, 1)))
        memory.begin((step, steps), *tensors(), {"a"})
        if not memory.held:
            memory.held["a"] = filled().held["a"]
        return memory

    one = filled().bytes
    first = run("high", 0)
    assert run("high", 0, branch="uncond") is not first
    assert run("high", 1) is first and memories.bytes(("high", 0)) == 2 * one
    assert memories.bytes(("high", 1)) == 0
    run("high", 2)
    assert memories.bytes(("high", 0)) == one, (
        "the other branch did not run at step 1: nothing of it can be used any more"
    )
    run("low", 3)
    assert (memories.bytes(("high", 0)), memories.bytes(("low", 0))) == (0, one)
    second = run("low", 4)
    assert run("low", 5) is second
    assert run("low", 0) is not second, "a step back is another generation"
    third = run("low", 1)
    assert run("low", 2, steps=5) is not third, "and so is another schedule"
    memories.clear()
    assert memories.bytes(("low", 0)) == 0


# The budget


HEADS_OF_QUERIES = 4


def queries(tokens: int = 100) -> torch.Tensor:
    return torch.zeros(2, tokens, HEADS_OF_QUERIES, 8)


def one_head(tokens: int = 100) -> int:
    return 2 * tokens * (8 * 4 + 4)


def budget(heads_that_fit: float, tokens: int = 100) -> CacheBudget:
    """Half of the free memory holds so many heads."""
    made = CacheBudget(0.5, lambda device: int(2 * heads_that_fit * one_head(tokens)))
    for layer, heads, saving in ((0, 4, 0.3), (1, 2, 0.5), (2, 4, 0.4), (3, 1, 0.1)):
        made.enter(("transformer", layer), heads, saving)
    return made


def admitted(
    made: CacheBudget,
    branch: str = "cond",
    tokens: int = 100,
    transformer: str = "transformer",
    of: int = HEADS_OF_QUERIES,
) -> list[int]:
    return [layer for layer in range(4) if made.admits((transformer, layer), (branch, (0, 2)), queries(tokens), of)]


@pytest.mark.parametrize(
    ("heads", "layers"),
    [
        (0, []),
        (1, [3]),
        (1.99, [3]),
        (2, [1]),
        (3, [1, 3]),
        (6, [1, 2]),
        (7, [1, 2, 3]),
        (10, [0, 1, 2]),
        (11, [0, 1, 2, 3]),
    ],
)
def test_a_budget_admits_by_time_saved_per_byte_what_fits(heads: float, layers: list[int]) -> None:
    assert admitted(budget(heads)) == layers


@pytest.mark.parametrize(("heads", "layers"), [(0.99, []), (1, [1]), (2, [1, 3]), (4, [1, 2, 3]), (6, [0, 1, 2, 3])])
def test_a_process_with_half_of_the_heads_counts_half_of_what_is_kept(heads: float, layers: list[int]) -> None:
    assert admitted(budget(heads), of=2 * HEADS_OF_QUERIES) == layers


def test_the_second_branch_gets_what_the_first_left() -> None:
    made = budget(9)
    assert admitted(made) == [1, 2, 3] and admitted(made, "uncond") == [1]
    assert admitted(made) == [1, 2, 3], "and what is decided stays"
    made.restart()
    assert admitted(made, "uncond") == [1, 2, 3], "the next generation decides anew"


def test_a_budget_of_nothing_admits_nothing() -> None:
    made = CacheBudget(0, lambda device: 10**12)
    made.enter(("transformer", 0), 1, 0.5)
    assert admitted(made) == []


def test_another_size_is_decided_for_itself() -> None:
    made = budget(7)
    assert admitted(made) == [1, 2, 3]
    made.restart()
    assert admitted(made, tokens=200) == [1, 3], "7 heads of 100 tokens hold 3 of 200"


def test_groups_of_rows_in_one_call_do_not_overturn_each_other() -> None:
    """Prompts of different lengths run as groups of different sizes, one after the other, at every step."""
    asked = 0

    def free(device: torch.device) -> int:
        nonlocal asked
        asked += 1
        return int(2 * 6.5 * one_head()) // asked

    made = budget(7)
    made._free = free
    for _ in range(3):
        assert [
            made.admits(("transformer", layer), ("cond", (0, 2)), queries(), HEADS_OF_QUERIES) for layer in range(4)
        ] == [
            False,
            True,
            True,
            False,
        ]
        assert [
            made.admits(("transformer", layer), ("cond", (2, 3)), queries()[:1], HEADS_OF_QUERIES) for layer in range(4)
        ] == [False] * 3 + [True]
    assert asked == 1


def test_each_expert_has_the_whole_budget_in_its_turn() -> None:
    made = budget(6)
    made.enter(("transformer_2", 0), 6, 0.2)
    assert admitted(made) == [1, 2]
    made.restart()
    assert admitted(made, transformer="transformer_2") == [0]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "much"])
def test_shares_that_are_none(share: Any) -> None:
    with pytest.raises(
        ValueError, match=r"cache_memory_fraction is a share of the free memory, expected in \[0, 1\], found"
    ):
        CacheBudget(share)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert memory_module.free_bytes(torch.device("cpu")) > 1 << 20


# In a pipeline


def test_which_steps_refresh_and_what_the_report_counts() -> None:
    pipe = tiny_wan()
    with patch(pipe, "cached", density=0.34, refresh_every=3) as done:
        seen = densities(pipe, done, num_inference_steps=7)
        assert [density == 1 for density in seen] == [True, False, False] * 2 + [True], "steps 0, 3 and 6 refresh"
        assert all(0.3 < density < 0.6 for density in seen if density != 1)
        for row in done.report().rows:
            assert row["reused"] == 4 * 2 * HEADS, "four steps, two branches"
            assert row["cache_bytes"] == 2 * HEADS * ONE_HEAD
        assert done.report().cache_bytes == LAYERS * 2 * HEADS * ONE_HEAD
        assert f"reused {4 * 2 * HEADS} heads x calls" in " ".join(str(done.report()).split())
        assert kept(done) == 0, "nothing is left after the last step"


def test_refresh_steps_are_dense_in_a_pipeline() -> None:
    """Two steps: the first refreshes and is exact, the second reuses."""
    pipe = tiny_wan()
    stock = frames(pipe, num_inference_steps=1)
    with patch(pipe, CACHED):
        assert np.allclose(frames(pipe, num_inference_steps=1), stock, atol=1e-5)
    stock = frames(pipe, num_inference_steps=2)
    with patch(pipe, CACHED):
        assert not np.allclose(frames(pipe, num_inference_steps=2), stock, atol=1e-5)


@pytest.mark.parametrize("plan", [CACHED, Method(Patches(), Draft(0.34, reselect_every=3))])
def test_a_second_call_starts_clean(plan: Method) -> None:
    pipe = tiny_wan()
    with patch(pipe, plan):
        first = frames(pipe)
        frames(pipe, seed=5, num_inference_steps=3)
        assert np.array_equal(frames(pipe), first)


class Stop(Exception):
    pass


def interrupted(pipe: Any, at: int, call: Any = tiny_wan_call, **overrides: Any) -> None:
    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == at:
            raise Stop
        return {}

    with pytest.raises(Stop):
        pipe(**call(output_type="latent", callback_on_step_end=stop, **overrides))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_nothing_of_an_interrupted_generation_is_used(at: int) -> None:
    pipe = tiny_wan()
    with patch(pipe, CACHED) as done:
        clean = frames(pipe)
        interrupted(pipe, at, seed=7)
        assert kept(done) == LAYERS * 2 * HEADS * ONE_HEAD
        assert np.array_equal(frames(pipe), clean)
        assert kept(done) == 0


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
def test_interrupted_generations_do_not_pile_up(family: str) -> None:
    """Each prompt may be a pass of its own name: what was kept for it must go, and the budget be free again."""
    pipe, call = (tiny_hunyuan(), tiny_hunyuan_call) if family == "hunyuan" else (tiny_cogvideox(), tiny_cogvideox_call)
    with patch(pipe, CACHED) as done:
        interrupted(pipe, 1, call, seed=0)
        once = kept(done)
        for seed in (1, 2):
            interrupted(pipe, 1, call, seed=seed)
        assert once > 0 and kept(done) == once


def test_many_prompts_share_one_budget_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that is free holds one pass: each prompt, which is a pass of its own, must find it as the first did."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: LAYERS * HEADS * ONE_HEAD)
    transformer = tiny_wan_transformer()
    with patch(transformer, CACHED, cache_memory_fraction=1.0) as done, torch.no_grad():
        for _ in range(3):
            text = torch.zeros(1, 8, TEXT_DIM)
            done.clear()
            for step in range(3):
                done.step(step, 3)
                transformer(**inputs(text))
            assert [row["reused"] for row in done.report().rows] == [2 * HEADS] * LAYERS


def test_each_expert_reuses_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that is free holds one expert, on both branches."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: LAYERS * 2 * HEADS * ONE_HEAD)
    pipe = tiny_wan(experts=2)
    pipe.register_to_config(boundary_ratio=0.8)
    with patch(pipe, CACHED, cache_memory_fraction=1.0) as done:
        frames(pipe, num_inference_steps=7)
        assert all(row["reused"] > 0 and not row["notes"] for row in done.report().rows)


def test_prompts_of_different_lengths_are_kept_side_by_side() -> None:
    pipe = tiny_hunyuan()
    call = tiny_hunyuan_call(lengths=(7, 7, 13), output_type="latent")
    with patch(pipe, CACHED) as done:
        pipe(**call)
        for row in done.report().rows:
            assert row["calls"] == 5 * 2, "two groups of rows"
            assert row["reused"] == 3 * 2 * HEADS, "steps 1, 2 and 4"


def test_unpatch_forgets() -> None:
    pipe = tiny_wan()
    done = patch(pipe, CACHED)
    interrupted(pipe, 1)
    tensors = [
        weakref.ref(held.out) for memory in done._engines[0]._caches._kept.values() for held in memory.held.values()
    ]
    assert kept(done) > 0 and len(tensors) == LAYERS * 2
    done.unpatch()
    assert kept(done) == 0
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


@pytest.mark.parametrize(("density", "every"), [(0.34, 3), (1.0, 2)])
def test_without_memory_all_is_dense_and_the_report_says_why(density: float, every: int) -> None:
    pipe = tiny_wan()
    stock = frames(pipe)
    with patch(pipe, "cached", density=density, refresh_every=every, cache_memory_fraction=0) as done:
        assert np.array_equal(frames(pipe), stock)
        for row in done.report().rows:
            assert row["methods"] == {"dense": HEADS * 2 * 5} and row["density"] == 1 and row["cache_bytes"] == 0
            assert row["notes"] == {"its cache does not fit into 0% of the free memory: dense": 2 * 5}


def test_layers_that_do_not_fit_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for three of the six layers x branches: the first branch of all layers, as they save the same."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 2 * (3 * HEADS * ONE_HEAD + 1))
    pipe = tiny_wan()
    with patch(pipe, CACHED, cache_memory_fraction=0.5) as done:
        first = frames(pipe)
        for row in done.report().rows:
            assert row["methods"] == {CACHED.label: HEADS * 5, "dense": HEADS * 5}
            assert row["cache_bytes"] == HEADS * ONE_HEAD and list(row["notes"].values()) == [5]
        assert np.array_equal(frames(pipe), first)


def test_layers_that_save_more_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: HEADS * ONE_HEAD)
    rows = ("a" * HEADS, "b" * HEADS, "a" * HEADS)
    methods = {"a": CACHED, "b": Method(Patches(), Draft(0.17), rest=Kept(3))}
    plan = Plan("wan", WAN, methods, (Span(0, 1, {"transformer": rows}),))
    pipe = tiny_wan()
    with patch(pipe, plan, cache_memory_fraction=1.0) as done:
        frames(pipe, guidance_scale=1.0)
        assert [row["reused"] for row in done.report().rows] == [0, 3 * HEADS, 0]


def test_layers_whose_gate_reuses_more_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: HEADS * ONE_HEAD)
    gate = torch.zeros(5, LAYERS, HEADS, dtype=torch.bool)
    gate[1:3, 0], gate[2, 1], gate[2:, 2] = True, True, True
    spans = (Span(0, 1, {"transformer": ("g" * HEADS,) * LAYERS}),)
    methods = {"g": Method(Patches(), Draft(0.34), rest=Kept(gated=True))}
    plan = Plan("wan", WAN, methods, spans, tensors={"refresh/transformer": gate.byte()})
    pipe = tiny_wan()
    with patch(pipe, plan, cache_memory_fraction=1.0) as done:
        frames(pipe, guidance_scale=1.0)
        assert [row["reused"] for row in done.report().rows] == [0, 3 * HEADS, 0]


@pytest.mark.parametrize(("hold", "selections"), [(1, 5), (2, 3), (3, 2), (9, 1)])
def test_a_selection_is_made_as_often_as_asked(hold: int, selections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    original = Draft.pattern

    def counted(*args: Any) -> BlockPattern:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(Draft, "pattern", counted)
    pipe = tiny_wan()
    with patch(pipe, Method(Patches(), Draft(0.34, reselect_every=hold))) as done:
        for _ in range(2):
            count = 0
            frames(pipe)
            assert count == selections * 2 * LAYERS, "per branch and layer; the second call as the first"
        assert all(row["reused"] == 0 and row["cache_bytes"] == 0 for row in done.report().rows)


def test_what_is_kept_selects_when_it_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = Draft.pattern

    def noted(select: Draft, call: AttentionCall, *args: Any) -> BlockPattern:
        assert call.now is not None
        steps.append(call.now[0])
        return original(select, call, *args)

    monkeypatch.setattr(Draft, "pattern", noted)
    pipe = tiny_wan()
    with patch(pipe, CACHED):
        frames(pipe, num_inference_steps=7)
    assert sorted(set(steps)) == [0, 3, 6] and len(steps) == 3 * 2 * LAYERS


def test_experts_hand_the_memory_over() -> None:
    """Wan 2.2: the second expert begins with a refresh, and by then nothing is kept for the first."""
    pipe = tiny_wan(experts=2)
    pipe.register_to_config(boundary_ratio=0.8)
    sizes: list[dict[str, int]] = []
    with patch(pipe, CACHED) as done:

        def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            sizes.append(
                {
                    name: sum(
                        engine._caches.bytes(engine._layer)
                        for engine in done._engines
                        if engine.site.transformer == name
                    )
                    for name in ("transformer", "transformer_2")
                }
            )
            return {}

        frames(pipe, num_inference_steps=7, callback_on_step_end=note)
        calls = {row["transformer"]: row["calls"] // 2 for row in done.report().rows}
        whole = LAYERS * 2 * HEADS * ONE_HEAD
        assert min(calls.values()) >= 2, "both experts run more than one step"
        expected = [(whole, 0)] * calls["transformer"] + [(0, whole)] * (calls["transformer_2"] - 1) + [(0, 0)]
        assert [tuple(size.values()) for size in sizes] == expected
        assert done.report().cache_bytes == whole
        for row in done.report().rows:
            reusing = calls[row["transformer"]] - len(range(0, calls[row["transformer"]], 3))
            assert row["reused"] == reusing * 2 * HEADS


def test_spans_keep_what_goes_on_and_drop_the_rest() -> None:
    """Head 0 takes the same method in both spans, alone; the others are regrouped or become dense."""
    other = Method(AxisOrder("hwf"), Band(0.34), rest=Kept(9))
    methods = {".": DENSE, "a": Method(Patches(), Draft(0.34), rest=Kept(9)), "b": other}
    spans = (
        Span(0.0, 0.5, {"transformer": ("abb.",) * LAYERS}),
        Span(0.5, 0.8, {"transformer": ("a.bb",) * LAYERS}),
        Span(0.8, 1.0, {"transformer": ("....",) * LAYERS}),
    )
    transformer = tiny_wan_transformer()
    plan = Plan("wan", WAN, methods, spans)
    text = torch.zeros(1, 8, TEXT_DIM)
    with patch(transformer, plan) as done, torch.no_grad():
        sizes, reused = [], []
        for step in range(10):
            done.step(step, 10)
            transformer(**inputs(text))
            row = done.report().rows[0]
            sizes.append(kept(done) // (LAYERS * ONE_HEAD))
            reused.append(row["reused"])
    assert np.diff([0, *reused]).tolist() == [0, 3, 3, 3, 3, 1, 3, 3, 0, 0], (
        "at step 5 two heads refresh as a new group"
    )
    assert sizes == [3] * 9 + [0], "a step later nothing can be used any more, and it is gone"


@pytest.mark.parametrize("named", [True, False])
def test_steps_are_known_from_the_timesteps_alone(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    if not named:
        monkeypatch.setattr("diffusers_accel.attach.clock.Clock._from_context", lambda self: None)
    with patch(pipe, CACHED) as done:
        frames(pipe)
        assert [row["reused"] for row in done.report().rows] == [3 * 2 * HEADS] * LAYERS


@pytest.mark.parametrize("method", [CACHED, Method(Patches(), Draft(0.34, reselect_every=2))])
def test_an_own_loop_must_say_the_step(method: Method) -> None:
    transformer = tiny_wan_transformer()
    with (
        patch(transformer, method),
        pytest.raises(RuntimeError, match=r"reused, but neither .*Patch\.step\(i, steps\)"),
    ):
        transformer(**inputs(torch.zeros(1, 8, TEXT_DIM)))


def test_passes_that_are_never_recognised_do_not_fill_the_memory() -> None:
    """A loop that makes its text embeddings anew at every step: all are refreshes, and only what may still serve is kept."""
    transformer = tiny_wan_transformer()
    with patch(transformer, CACHED) as done, torch.no_grad():
        sizes = []
        for step in range(6):
            done.step(step, 8)
            transformer(**inputs(torch.zeros(1, 8, TEXT_DIM)))
            sizes.append(kept(done) // (LAYERS * HEADS * ONE_HEAD))
        assert sizes == [1, 2, 2, 2, 2, 2]
        assert all(row["reused"] == 0 and row["density"] == 1 for row in done.report().rows)


def test_gated_heads_that_never_reuse_are_dense_and_keep_nothing() -> None:
    gate = torch.zeros(2, LAYERS, HEADS, dtype=torch.uint8)
    gate[:, 0, :2], gate[1, 1] = 1, 1
    plan = Plan(
        "wan",
        WAN,
        {"g": Method(Patches(), Draft(0.34), rest=Kept(gated=True))},
        (Span(0, 1, {"transformer": ("g" * HEADS,) * LAYERS}),),
        tensors={"refresh/transformer": gate},
    )
    pipe = tiny_wan()
    with patch(pipe, plan) as done:
        frames(pipe, num_inference_steps=6, guidance_scale=1.0)
        rows = done.report().rows
        assert [row["cache_bytes"] for row in rows] == [2 * ONE_HEAD, 4 * ONE_HEAD, 4 * ONE_HEAD]
        assert [row["reused"] for row in rows] == [2 * 5, 4 * 4, 4 * 5], "layer 1 refreshes at steps 0 and 3"
        assert rows[0]["methods"] == {"dense": 2 * 6, "draft 8x16 0.34, cached gated": 2 * 6}


def test_a_head_is_dense_in_the_spans_in_which_its_gate_always_refreshes() -> None:
    gate = torch.zeros(4, LAYERS, HEADS, dtype=torch.uint8)
    gate[:2] = 1
    heads = {"transformer": ("g" * HEADS,) * LAYERS}
    plan = Plan(
        "wan",
        WAN,
        {"g": Method(Patches(), Draft(0.34), rest=Kept(gated=True))},
        (Span(0, 0.5, heads), Span(0.5, 1, heads)),
        tensors={"refresh/transformer": gate},
    )
    pipe = tiny_wan()
    with patch(pipe, plan) as done:
        frames(pipe, num_inference_steps=4, guidance_scale=1.0)
        for row in done.report().rows:
            assert row["methods"] == {"dense": 2 * HEADS, "draft 8x16 0.34, cached gated": 2 * HEADS}
            assert row["reused"] == HEADS, "the second span's first step refreshes, having nothing to reuse"


@pytest.mark.parametrize("call", [1, 2, 31, 32, 33])
def test_a_step_that_fails_half_way_spoils_nothing(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out between a group's pattern and its rest, at the first step or at a later refresh."""
    pipe = tiny_wan()
    with patch(pipe, Recipe((CACHED, Method(AxisOrder("hwf"), Band(0.34), rest=Kept(2))))):
        clean = frames(pipe)
        original, calls = launch.attention, 0

        def failing(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise MemoryError
            return original(*args, **options)

        monkeypatch.setattr(launch, "attention", failing)
        with pytest.raises(MemoryError):
            frames(pipe)
        assert np.array_equal(frames(pipe), clean)
