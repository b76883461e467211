"""Chunked generation: what is reused, what is computed again, and that both are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_accel.block_external import Counts, ExternalCache, attend
from diffusers_accel.block_external.drift import Calibration, drift
from diffusers_accel.block_external.gate import Gate
from diffusers_accel.kernels.dense import dense
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.merge.reference import merge as reference_merge

B, S, E, H, D = 2, 24, 40, 4, 8
F32, F64 = torch.float32, torch.float64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(seed: int = 0, *, queries: int = S, history: int = E, batch: int = B, dtype: torch.dtype = F32) -> Inputs:
    """q, k, v of a chunk, and the keys and values of its history."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, batch, queries, H, D).to(dtype).unbind(0)
    keys, values = torch.randn(2, batch, history, H, D).to(dtype).unbind(0)
    return q, k, v, keys, values


def whole(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over history and chunk at once."""
    return dense(q, torch.cat([keys, k], 1), torch.cat([values, v], 1))[0]


class Asked:
    """A history that counts how often it is asked for."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.times = 0
        self.history = keys, values

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.times += 1
        return self.history


def run(cache: ExternalCache, given: Inputs, step: int, **changes: Any) -> Tensor:
    """One call, of layer 0 and block 1 unless said otherwise."""
    q, k, v, keys, values = given
    arguments = {"layer": 0, "block": 1, "version": 0, "step": step, **changes}
    return attend(q, k, v, (keys, values), cache=cache, **arguments)


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


# The merge that everything here rests on


@pytest.mark.parametrize("borders", [(1,), (40,), (13, 14), (7, 40, 63)])
def test_merged_parts_are_the_whole_in_fp64(borders: tuple[int, ...]) -> None:
    q, k, v, keys, values = inputs(dtype=F64)
    k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    expected, expected_lse = eager(q, k, v)
    parts = [eager(q, *part) for part in zip(k.tensor_split(borders, 1), v.tensor_split(borders, 1))]
    for order in (parts, parts[::-1], [reference_merge(parts[:2]), *parts[2:]]):
        out, lse = reference_merge(order)
        assert (out - expected).abs().max() < 1e-12 and (lse - expected_lse).abs().max() < 1e-12


def test_a_part_that_saw_nothing_changes_nothing() -> None:
    out, lse = dense(*inputs()[:3])
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for parts in ([(out, lse), nothing], [nothing, (out, lse)]):
        merged, merged_lse = merge(parts)
        torch.testing.assert_close(merged, out, rtol=0, atol=1e-7)
        torch.testing.assert_close(merged_lse, lse, rtol=0, atol=1e-6)


# Exactness


@pytest.mark.parametrize(("queries", "history"), [(24, 40), (1, 1), (63, 129), (128, 64), (40, 140), (17, 65)])
def test_the_first_step_is_dense_at_any_border(queries: int, history: int) -> None:
    given = inputs(queries=queries, history=history)
    torch.testing.assert_close(run(ExternalCache(), given, 0), whole(*given), rtol=0, atol=1e-5)


def test_the_same_queries_reused_are_dense() -> None:
    cache, given = ExternalCache(), inputs()
    first = run(cache, given, 0)
    asked = Asked(*given[3:])
    again = attend(*given[:3], asked, cache=cache, layer=0, block=1, version=0, step=1)
    assert torch.equal(first, again) and asked.times == 0
    torch.testing.assert_close(again, whole(*given), rtol=0, atol=1e-5)


def test_a_reusing_step_merges_the_chunk_with_what_is_kept() -> None:
    cache, first, later = ExternalCache(), inputs(0), inputs(1)
    run(cache, first, 0)
    kept = dense(first[0], *first[3:])
    expected, _ = merge([dense(*later[:3]), kept])
    assert torch.equal(run(cache, (*later[:3], *first[3:]), 1), expected)


@pytest.mark.parametrize(
    "gate", [Gate.every(1), Gate.table(torch.ones(5, 1, H, dtype=torch.bool))], ids=["every", "table"]
)
def test_a_gate_that_always_recomputes_is_dense_and_keeps_nothing(gate: Gate) -> None:
    cache = ExternalCache(gate=gate)
    for step in range(5):
        given = inputs(step)
        torch.testing.assert_close(run(cache, given, step), whole(*given), rtol=0, atol=1e-5)
        assert cache.memory == 0
    assert cache.counts == Counts(full=5, computed_heads=5 * H)


def test_no_history_is_plain_attention() -> None:
    cache, (q, k, v, keys, values) = ExternalCache(), inputs()
    expected = dense(q, k, v)[0]
    asked = Asked(keys[:, :0], values[:, :0])
    for step, external in enumerate((None, (keys[:, :0], values[:, :0]), asked, lambda: None)):
        found = attend(q, k, v, external, cache=cache, layer=0, block=0, version=0, step=step)
        assert torch.equal(found, expected)
    assert cache.counts == Counts(full=4) and cache.memory == 0 and asked.times == 1


def test_the_output_carries_no_gradient() -> None:
    cache, given = ExternalCache(gate=Gate.table(torch.tensor([[[False, True, True, True]]] * 3))), inputs()
    given[0].requires_grad_(), given[3].requires_grad_()
    assert not run(cache, given, 0).requires_grad and not run(cache, given, 1).requires_grad


# Heads by themselves


def test_only_the_heads_of_the_gate_are_computed_and_refreshed() -> None:
    flags = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)[:, None]
    cache, steps = ExternalCache(gate=Gate.table(flags)), [inputs(step) for step in range(4)]
    history = Asked(*steps[0][3:])
    last = [0] * H  # the step at which each head last computed its part
    for step, (q, k, v, *_) in enumerate(steps):
        found = attend(q, k, v, history, cache=cache, layer=0, block=1, version=0, step=step)
        last = [step if flags[step, 0, head] else last[head] for head in range(H)]
        parts = [
            dense(steps[last[h]][0][:, :, h : h + 1], *(x[:, :, h : h + 1] for x in history.history)) for h in range(H)
        ]
        outs, lses = zip(*parts)
        expected, _ = merge([dense(q, k, v), (torch.cat(outs, 2), torch.cat(lses, 1))])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert history.times == 3
    assert cache.counts == Counts(full=1, reusing=3, computed_heads=4 + 2 + 1, reused_heads=2 + 3 + 4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), dtype=st.sampled_from([None, torch.bfloat16]), density=st.sampled_from([0.2, 0.5, 0.9])
)
def test_a_refresh_per_head_is_a_loop_over_heads(seed: int, dtype: torch.dtype | None, density: float) -> None:
    steps = 5
    flags = torch.rand(steps, 1, H, generator=torch.Generator().manual_seed(seed)) < density
    together = ExternalCache(gate=Gate.table(flags), dtype=dtype)
    alone = [ExternalCache(gate=Gate.table(flags[:, :, h : h + 1]), dtype=dtype) for h in range(H)]
    history = inputs(seed, batch=1)[3:]
    for step in range(steps):
        q, k, v, *_ = inputs(seed + step, batch=1)
        found = run(together, (q, k, v, *history), step)
        for h, cache in enumerate(alone):
            one = tuple(x[:, :, h : h + 1] for x in (q, k, v, *history))
            torch.testing.assert_close(found[:, :, h : h + 1], run(cache, one, step), rtol=0, atol=1e-6)
        if step == 0:
            assert together.memory == sum(cache.memory for cache in alone)
    for name in ("computed_heads", "reused_heads"):
        assert getattr(together.counts, name) == sum(getattr(cache.counts, name) for cache in alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_keeps_its_type_and_an_exact_lse(dtype: torch.dtype) -> None:
    cache, given = ExternalCache(), inputs(dtype=dtype)
    first = run(cache, given, 0)
    assert first.dtype == dtype and torch.equal(first, run(cache, given, 1))
    rough = (whole(*given).double() - whole(*(x.double() for x in given))).abs().max()
    error = (first.double() - whole(*(x.double() for x in given))).abs().max()
    assert error <= 2 * rough + torch.finfo(dtype).eps
    assert cache.memory == B * S * H * (D * 2 + 4)  # outs of 2 bytes, an lse of 4


# Memory


def test_only_heads_that_may_reuse_are_kept() -> None:
    flags = torch.ones(4, 2, H, dtype=torch.bool)
    flags[2, 0, 1] = flags[3, 0, 3] = False
    cache = ExternalCache(gate=Gate.table(flags))
    row = B * S * (D * 4 + 4)
    held = []
    for step in range(4):
        for layer in range(2):
            given = inputs(step)
            run(cache, given, step, layer=layer)
        held.append(cache.memory)
    # Layer 0 keeps heads 1 and 3 while they may still reuse; layer 1 keeps nothing.
    assert held == [2 * row, 2 * row, 2 * row, 2 * row]
    cache.clear()
    run(cache, inputs(), 3)
    assert cache.memory == 0, "nothing comes after the last step"


def test_outputs_may_be_kept_in_another_type() -> None:
    cache, given = ExternalCache(dtype=torch.bfloat16, gate=Gate.every(2)), inputs()
    torch.testing.assert_close(run(cache, given, 0), whole(*given), rtol=0, atol=1e-5)
    assert cache.memory == B * S * H * (D * 2 + 4)
    reused = run(cache, given, 1)
    assert reused.dtype == F32 and 1e-5 < (reused - whole(*given)).abs().max() < 1e-2
    torch.testing.assert_close(run(cache, given, 2), whole(*given), rtol=0, atol=1e-5)


def test_clear_forgets_and_counts_anew() -> None:
    cache, given = ExternalCache(), inputs()
    run(cache, given, 0), run(cache, given, 1)
    assert cache.memory == B * S * H * (D * 4 + 4) and cache.counts == Counts(1, 1, H, H)
    cache.clear()
    assert cache.memory == 0 and cache.counts == Counts()
    run(cache, given, 1)
    assert cache.counts == Counts(full=1, computed_heads=H)


def test_grouped_keys_are_refused() -> None:
    q, k, v, keys, values = inputs(0)
    with pytest.raises(ValueError, match=f"with the {H} heads of q, found 1: repeat"):
        run(ExternalCache(), (q, k[:, :, :1], v[:, :, :1], keys, values), 0)


# What drops what is kept


@pytest.mark.parametrize(
    "change",
    [{"block": 2}, {"block": "1"}, {"version": 1}, {"version": (0, 1)}, {"layer": 1}, {"branch": "uncond"}],
    ids=str,
)
def test_another_block_version_layer_or_branch_computes_in_full(change: dict[str, Any]) -> None:
    cache, first, later = ExternalCache(), inputs(0), inputs(1)
    run(cache, first, 0)
    torch.testing.assert_close(run(cache, later, 1, **change), whole(*later), rtol=0, atol=1e-5)
    assert cache.counts == Counts(full=2, computed_heads=2 * H)


@pytest.mark.parametrize("change", [{"batch": 1}, {"queries": S + 1}, {"dtype": torch.bfloat16}], ids=str)
def test_another_shape_or_type_computes_in_full(change: dict[str, Any]) -> None:
    cache, later = ExternalCache(), inputs(1, **change)
    run(cache, inputs(0), 0)
    torch.testing.assert_close(run(cache, later, 1), whole(*later), rtol=0, atol=1e-2 if "dtype" in change else 1e-5)
    assert cache.counts == Counts(full=2, computed_heads=2 * H)


@pytest.mark.gpu
def test_another_device_computes_in_full() -> None:
    cache, later = ExternalCache(), tuple(x.cuda() for x in inputs(1))
    run(cache, inputs(0), 0)
    torch.testing.assert_close(run(cache, later, 1), whole(*later), rtol=0, atol=1e-5)
    assert cache.counts == Counts(full=2, computed_heads=2 * H)


def test_a_restart_computes_in_full() -> None:
    cache, first, later = ExternalCache(), inputs(0), inputs(1)
    for step in range(3):
        run(cache, first, step)
    torch.testing.assert_close(run(cache, later, 0), whole(*later), rtol=0, atol=1e-5)
    assert cache.counts == Counts(full=2, reusing=2, computed_heads=2 * H, reused_heads=2 * H)


def test_an_old_block_is_dropped_when_the_next_begins() -> None:
    cache, (q, k, v, keys, values) = ExternalCache(), inputs()
    run(cache, (q, k, v, keys, values), 0)
    attend(q, k, v, None, cache=cache, layer=0, block=0, version=0, step=0)  # a new run without clear()
    assert cache.memory == 0


def test_branches_never_mix_and_two_runs_are_equal() -> None:
    def outputs(branches: tuple[str, ...]) -> dict[str, list[Tensor]]:
        cache = ExternalCache(gate=Gate.every(3))
        found: dict[str, list[Tensor]] = {name: [] for name in branches}
        for block in (1, 2):
            for step in range(4):
                for seed, name in enumerate(branches):
                    given = inputs(100 * seed + 10 * block + step)
                    history = inputs(100 * seed + block)[3:]
                    found[name].append(run(cache, (*given[:3], *history), step, block=block, branch=name))
        return found

    both, again, alone = outputs(("cond", "uncond")), outputs(("cond", "uncond")), outputs(("cond",))
    for name in both:
        assert all(torch.equal(a, b) for a, b in zip(both[name], again[name]))
    assert all(torch.equal(a, b) for a, b in zip(both["cond"], alone["cond"]))
    assert not torch.equal(both["cond"][1], both["uncond"][1])


# Refusals


def test_a_step_that_comes_twice_is_refused() -> None:
    cache = ExternalCache()
    run(cache, inputs(), 0)
    with pytest.raises(
        ValueError, match=r"layer 0, branch '', block 1: expected a step after 0, found 0 again. Give each gui"
    ):
        run(cache, inputs(1), 0)


def test_a_history_that_changes_needs_another_version() -> None:
    cache = ExternalCache(gate=Gate.every(2))
    run(cache, inputs(), 0)
    for external in (inputs(history=E + 1)[3:], None):
        with pytest.raises(ValueError, match=r"version 0: expected a history of 40 tokens .*, found (41|0);"):
            attend(*inputs()[:3], external, cache=cache, layer=0, block=1, version=0, step=1)
    late = Asked(*inputs(history=E - 1)[3:])
    with pytest.raises(ValueError, match="of 40 tokens .*, found 39;"):
        attend(*inputs()[:3], late, cache=cache, layer=0, block=1, version=0, step=2)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("stop", "shared"), [(41, 1), (64, 24), (40, 0), (10, 0)])
def test_a_history_that_holds_the_chunk_is_refused(stop: int, shared: int, heads_first: bool) -> None:
    q = inputs()[0]
    shape = (B, H, 80, D) if heads_first else (B, 80, H, D)
    k, v = (torch.randn(shape) for _ in range(2))
    k, v = (x.transpose(1, 2) if heads_first else x for x in (k, v))
    given = q, k[:, 40:64], v[:, 40:64], k[:, :stop], v[:, :stop]
    if shared:
        with pytest.raises(ValueError, match=f"expected 0 tokens in both, found {shared}: pass those before"):
            run(ExternalCache(), given, 0)
    else:
        torch.testing.assert_close(run(ExternalCache(), given, 0), whole(*given), rtol=0, atol=1e-5)


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v, keys, values = inputs()
    cases = [
        ((keys[:1], values), r"keys of the history must be \[2, 40, 4, 8\].*found \[1, 40, 4, 8\]"),
        ((keys[0], values), r"keys of the history must be \[2, 'E', 4, 8\].*found \[40, 4, 8\]"),
        ((keys, values[:, 1:]), r"values of the history must be \[2, 40, 4, 8\].*found \[2, 39, 4, 8\]"),
        ((keys, values.half()), r"values of the history must be .*torch.float32 on cpu.*torch.float16"),
    ]
    for external, message in cases:
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, external, cache=ExternalCache(), layer=0, block=1, version=0, step=0)
    with pytest.raises(ValueError, match=r"k must be \[2, 24, 4, 8\]|v must be"):
        run(ExternalCache(), (q, k, v[:, 1:], keys, values), 0)
    for name in ("block", "version"):
        with pytest.raises(ValueError, match=f"{name} is compared.*expected a plain value, found a tensor"):
            run(ExternalCache(), inputs(), 0, **{name: torch.tensor(3)})
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="floating-point type of two bytes or more"):
            ExternalCache(dtype=dtype)


def test_a_call_outside_the_gates_table_is_refused() -> None:
    cache = ExternalCache(gate=Gate.table(torch.zeros(3, 2, H, dtype=torch.bool)))
    for changes in ({"step": 3}, {"step": 0, "layer": 2}):
        with pytest.raises(ValueError, match=f"a table of 3 steps, 2 layers and {H} heads, found step"):
            run(cache, inputs(), **{"layer": 0, **changes})
    with pytest.raises(ValueError, match="steps count from 0, found -1"):
        run(ExternalCache(), inputs(), -1)


# The paper's schedule

BLOCKS, LAYERS, PASSES, HEADS = 40, 30, 5, 12


def recomputing(share: float) -> Tensor:
    """Random flags: every head at the first pass, `share` of the head-steps at the others, never all heads of a layer."""
    flags = torch.rand(PASSES, LAYERS, HEADS, generator=torch.Generator().manual_seed(0)) < share
    flags[0], flags[1:, :, 0] = True, False
    return flags


@pytest.mark.parametrize("share", [0.0, 0.31], ids=["never", "as measured"])
def test_the_papers_schedule_counts_as_the_paper_says(share: float) -> None:
    """120 latent frames in blocks of 3, 30 layers, 4 denoising steps and the pass that writes the clean keys.

    Full are all 5 passes of the first block, which has no history (5 x 30 = 150), and the first pass of each of the 39
    others (39 x 30 = 1,170). All other passes are candidates for reuse, the clean one too: 39 x 4 x 30 = 4,680.
    """
    flags = recomputing(share)
    cache = ExternalCache(gate=Gate.table(flags) if share else None)
    q, k, v = torch.randn(3, 1, 3, HEADS, 4).unbind(0)
    history = torch.randn(2, 1, 9, HEADS, 4)
    asked = 0
    for block in range(BLOCKS):
        frames = min(3 * block, 9)
        external = Asked(*history[:, :, :frames].unbind(0))
        for step in range(PASSES):
            for layer in range(LAYERS):
                attend(q, k, v, external, cache=cache, layer=layer, block=block, version=block, step=step)
        asked += external.times if block else 0
    computed = int(flags[1:].sum()) * (BLOCKS - 1)
    full = LAYERS * (BLOCKS - 1) * HEADS
    assert (cache.counts.full, cache.counts.reusing) == (1_320, 4_680)
    assert cache.counts.computed_heads == full + computed
    assert cache.counts.reused_heads == 4_680 * HEADS - computed
    # Once at the first pass, and wherever a head of the layer recomputes.
    assert asked == (BLOCKS - 1) * (LAYERS + int(flags[1:].any(-1).sum()))
    assert share == 0 or abs(computed / (4_680 * HEADS) - 0.29) < 0.02


# Gates


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["table", "every", "never"]), interval=st.integers(1, 4))
def test_what_may_reuse_later_is_what_does(seed: int, kind: str, interval: int) -> None:
    steps, layers = 5, 2
    flags = torch.rand(steps, layers, H, generator=torch.Generator().manual_seed(seed)) < 0.7
    gate = {"table": Gate.table(flags), "every": Gate.every(interval), "never": Gate.never()}[kind]
    for layer in range(layers):
        reuses = [
            set(range(H)) - set(gate.recomputes(step, layer, H)) for step in range(20 if kind != "table" else steps)
        ]
        for step in range(steps):
            assert set(gate.reusable(step, layer, H)) == set().union(*reuses[step + 1 :])


def test_a_gate_recomputes_as_it_says() -> None:
    every = tuple(range(H))
    assert [Gate.every(3).recomputes(step, 0, H) for step in range(5)] == [every, (), (), every, ()]
    assert Gate.never().recomputes(0, 7, H) == ()
    flags = torch.zeros(2, 1, H, dtype=torch.bool)
    gate = Gate.table(flags)
    flags[:] = True
    assert gate.recomputes(1, 0, H) == (), "the gate keeps its own copy"


def test_a_gate_that_makes_no_sense_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="positive number of steps, found 0"):
        Gate.every(0)
    for flags in (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 0, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"must be bool \[steps, layers, heads\], found"):
            Gate.table(flags)
    with pytest.raises(ValueError, match="an interval or a table, found both"):
        Gate(interval=2, flags=torch.ones(1, 1, 1, dtype=torch.bool))


# Calibration


def turned(degrees: float, heads: int = 1) -> Tensor:
    """[1, 2, heads, 2], unit vectors at an angle."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()]).expand(1, 2, heads, 2)


def test_drift_is_measured_head_by_head() -> None:
    out, cached = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    out[:, :, 0], out[:, :, 1] = 3 * cached[:, :, 0], -cached[:, :, 1]
    lse, cached_lse = torch.randn(2, 3, 5), torch.zeros(2, 3, 5)
    lse[:, 0] = 0.5
    cosine, change = drift(out, lse, cached, cached_lse)
    torch.testing.assert_close(cosine[:2], torch.tensor([1.0, -1.0]))
    expected = (out * cached).sum(-1) / (out.norm(dim=-1) * cached.norm(dim=-1))
    torch.testing.assert_close(cosine, expected.mean((0, 1)))
    torch.testing.assert_close(change, lse.abs().mean((0, 2)))


def test_queries_that_read_nothing_have_not_drifted() -> None:
    out, lse = torch.zeros(1, 2, 2, 4), torch.full((1, 2, 2), -torch.inf)
    cosine, change = drift(out, lse, out, lse)
    assert cosine.tolist() == [1, 1] and change.tolist() == [0, 0]
    now = lse.clone()
    now[0, 1, 0] = 0.0
    assert drift(out, now, out, lse)[1].tolist() == [0, torch.inf]


def test_a_head_is_compared_with_what_was_cached_last() -> None:
    calibration = Calibration(5, 1, 4)
    found = []
    for step in range(5):
        # Still; 40 degrees a step (cosine 0.77); 20 degrees (0.94, after two 0.77); and an lse that moves 0.03 a step.
        out = torch.cat([turned(0), turned(40 * step), turned(20 * step), turned(0)], 2)
        lse = torch.zeros(1, 4, 2)
        lse[:, 3] = 0.03 * step
        found.append(calibration.observe(0, step, out, lse))
    flags = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert torch.stack(found).tolist() == torch.tensor(flags, dtype=torch.bool).tolist()
    assert calibration.flags()[:, 0].tolist() == torch.tensor(flags, dtype=torch.bool).tolist()
    assert calibration.gate().recomputes(2, 0, 4) == (1, 2, 3)


@pytest.mark.parametrize(("angles", "expected"), [((40, 10), False), ((40, 25), True)])
def test_the_gate_is_decided_by_the_mean_of_all_samples(angles: tuple[int, int], expected: bool) -> None:
    """cos 40 = 0.77 fails alone; with cos 10 = 0.98 the mean passes, with cos 25 = 0.91 it does not."""
    calibration = Calibration(2, 1, 1)
    lse = torch.zeros(1, 1, 2)
    for branch, angle in zip(("cond", "uncond"), angles):
        calibration.observe(0, 0, turned(0), lse, branch=branch)
        failed = calibration.observe(0, 1, turned(angle), lse, branch=branch)
        assert failed.tolist() == [angle == 40]
    assert calibration.flags()[1].item() is expected
    torch.testing.assert_close(
        calibration.means()[0][1, 0, 0], torch.tensor(angles, dtype=F64).deg2rad().cos().mean(), rtol=0, atol=1e-6
    )


def test_a_step_that_does_not_follow_begins_a_sample() -> None:
    calibration, lse = Calibration(3, 2, 1), torch.zeros(1, 1, 2)
    for angle in (0, 90):  # another block, of which everything is different
        for step in range(2):
            assert calibration.observe(1, step, turned(angle), lse).tolist() == [step == 0]
    # Layer 0 and step 2 were never seen.
    assert calibration.flags()[..., 0].tolist() == [[True, True], [True, False], [True, True]]


def test_gamma_may_differ_from_step_to_step_and_nan_fails() -> None:
    lse = torch.zeros(1, 1, 2)
    for gamma, expected in ((0.85, [True, False, False]), ((0.0, 0.99, 0.5), [True, True, False])):
        calibration = Calibration(3, 1, 1, gamma=gamma)
        for step in range(3):
            calibration.observe(0, step, turned(15 * step), lse)
        assert calibration.flags().flatten().tolist() == expected
    calibration = Calibration(2, 1, 1)
    calibration.observe(0, 0, turned(0), lse)
    assert calibration.observe(0, 1, turned(float("nan")), lse).tolist() == [True] and calibration.flags()[1].item()


def test_what_is_observed_may_be_overwritten_by_its_owner() -> None:
    calibration, out, lse = Calibration(2, 1, 1), turned(0).clone(), torch.zeros(1, 1, 2)
    calibration.observe(0, 0, out, lse)
    out.copy_(turned(90))
    assert calibration.observe(0, 1, out, lse).tolist() == [True]


def test_calibration_names_what_does_not_fit() -> None:
    calibration, lse = Calibration(2, 1, 1), torch.zeros(1, 1, 2)
    cases: list[tuple[tuple[int, int, Tensor, Tensor], str]] = [
        ((0, 2, turned(0), lse), "2 steps and 1 layers, found step 2 and layer 0"),
        ((1, 0, turned(0), lse), "2 steps and 1 layers, found step 0 and layer 1"),
        ((0, 0, turned(0, 2), lse), r"out must be \[B, S, 1, D\], found \[1, 2, 2, 2\]"),
        ((0, 0, turned(0), lse.double()), r"lse must be fp32 \[1, 1, 2\].*found torch.float64 \[1, 1, 2\]"),
        ((0, 0, turned(0), lse[..., :1]), r"lse must be fp32 \[1, 1, 2\].*\[1, 1, 1\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            calibration.observe(*arguments)
    calibration.observe(0, 0, turned(0), lse)
    with pytest.raises(
        ValueError, match=r"had out \[1, 2, 1, 2\].*at step 0, found \[1, 1, 1, 2\].*step 1 of the same"
    ):
        calibration.observe(0, 1, turned(0)[:, :1], lse[..., :1])
    for wrong in (
        {"gamma": 1.5},
        {"gamma": (0.8, 0.8, 0.8)},
        {"max_lse_change": -1.0},
        {"max_lse_change": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Calibration(2, 1, 1, **wrong)
    with pytest.raises(ValueError, match="found 2, 0 and 1"):
        Calibration(2, 0, 1)


def test_a_step_is_judged_by_its_own_threshold() -> None:
    calibration = Calibration(4, 1, H, gamma=(1.0, -1.0, 1.0, -1.0), max_lse_change=1e9)
    found = []
    for step in range(4):
        out, lse = eager(*inputs(step)[:3])
        found.append(bool(calibration.observe(0, step, out, lse.float()).all()))
    assert found == [True, False, True, False], "at once, by which the next step is compared with what it would find"
