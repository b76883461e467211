"""What a patch says about itself: sizes, densities, kernels, diffusers' own caches; and what it leaves behind."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig

from diffusers_accel import Plan, patch, unpatch
from diffusers_accel.kernels import pattern as patterns
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, NAMED, AxisOrder, Draft, Method, Radial, Recipe, Skip, Stored
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import PlanError
from diffusers_accel.run import launch
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.log import LOG
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan, tiny_wan_call

LAYOUT = TokenLayout(3, 16, 16)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    LOG.addHandler(handler)
    yield said
    LOG.removeHandler(handler)


def run(pipe: Any, **overrides: Any) -> None:
    pipe(**tiny_wan_call(output_type="latent", **overrides))


def _searched() -> Plan:
    methods = Recipe((Method(select=Skip()), Method(select=Radial())))
    return Plan.uniform(methods, "wan", {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})


@pytest.mark.parametrize(
    "plan",
    ["draft", "pattern", "cached", "reordered", Method(select=Draft(0.3)), NAMED["draft"](0.3), _searched()],
    ids=["draft", "pattern", "cached", "reordered", "method", "recipe", "plan"],
)
def test_any_plan_below_its_size_says_so_once(plan: Any, warnings: list[str]) -> None:
    pipe = tiny_wan()
    with patch(pipe, plan) as done:
        run(pipe)
        run(pipe)
        found = [note for note in done.report().notes if "768 tokens are 6 blocks of 128, too few" in note]
        assert len(found) == 1 and "note: " + found[0] in str(done.report())
    assert warnings.count(found[0]) == 1
    for without in ("dense", Method(precision="int8"), Method(select=Skip())):
        with patch(pipe, without) as done:
            run(pipe)
            assert done.report().notes == []


def test_a_step_cache_that_never_predicts_says_so_before_the_first_step(warnings: list[str]) -> None:
    pipe = tiny_wan()
    ran: list[list[str]] = []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda *_: ran.append(list(warnings)))
    with patch(pipe, "easycache") as done:
        run(pipe, num_inference_steps=10)
        run(pipe, num_inference_steps=10)
        (note,) = done.report().notes
        assert note.startswith("easycache 0.025: predicts none of the 10 steps") and f"note: {note}" in str(
            done.report()
        )
        assert ran[0] == warnings == [note], "once, and before anything is computed"
        done.clear()
        run(pipe, num_inference_steps=12)
        assert done.report().notes == []


def test_realised_density_is_held_against_what_was_asked_for() -> None:
    pipe = tiny_wan()
    with patch(pipe, "draft", density=0.3, dense_steps=0.0, dense_layers=0) as done:
        run(pipe)
        report = done.report()
    (note,) = (note for note in report.notes if "was asked for" in note)
    assert (
        f"density 0.3 was asked for, {report.density:.2f} was read" in note and "6 blocks of 128 tokens in 768" in note
    )
    with patch(pipe, "draft", density=0.9) as done:
        run(pipe)
        assert not any("was asked for" in note for note in done.report().notes)


def test_rows_that_a_selection_starves_are_counted() -> None:
    pipe = tiny_wan()
    bare = {"density": 0.15, "diagonal": False, "first_frame": False, "dense_steps": 0.0, "dense_layers": 0}
    with patch(pipe, "draft", min_blocks=0, **bare) as done:
        run(pipe)
        (note,) = (note for note in done.report().notes if "read no block of the video" in note)
    assert 0 < float(note.partition(": ")[2].partition("%")[0]) < 100
    with patch(pipe, "draft", min_blocks=1, **bare) as done:
        run(pipe)
        assert not any("read no block" in note for note in done.report().notes)


def test_refreshes_are_not_held_against_the_density() -> None:
    pipe = tiny_wan()
    with patch(pipe, NAMED["draft"](0.9)) as done:
        run(pipe)
        assert not any("was asked for" in note for note in done.report().notes)
    with patch(pipe, "cached", density=0.9, refresh_every=2) as done:
        run(pipe)
        assert not any("was asked for" in note for note in done.report().notes)


def test_dense_steps_that_no_step_passes_are_named(warnings: list[str]) -> None:
    pipe = tiny_wan()
    with patch(pipe, Recipe((Method(select=Skip()),), dense_steps=0.95)) as done:
        run(pipe)
        (note,) = done.report().notes
        assert "all 5 steps of this call are dense" in note and "95%" in note
        assert warnings == [note]
        done.clear()
        assert done.report().notes == []


def test_the_report_names_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is of the implementation that the launch called, not of what would be chosen now."""
    pipe = tiny_wan()
    called: list[str] = []
    original = launch.attention

    def watched(*args: Any, impl: str, **options: Any) -> Any:
        called.append(impl)
        return original(*args, impl=impl, **options)

    monkeypatch.setattr(launch, "attention", watched)
    with patch(pipe, Recipe((Method(select=Draft(0.4)),))) as done:
        monkeypatch.setenv("DIFFUSERS_ACCEL_KERNEL", "reference")
        run(pipe, num_inference_steps=1)
        monkeypatch.delenv("DIFFUSERS_ACCEL_KERNEL")
        run(pipe, num_inference_steps=1)
        assert done.report().rows[0]["kernels"] == {"reference": 2, "cpu": 2}
    assert called == ["reference"] * 2 * LAYERS + ["cpu"] * 2 * LAYERS


def test_first_block_cache_beside_a_patch_is_named() -> None:
    pipe = tiny_wan()
    with patch(pipe, Recipe((Method(select=Skip()),), dense_steps=0.2)) as done:
        run(pipe)
        assert not done.report().notes
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        done.clear()
        run(pipe)
        assert [row["methods"].get("skip", 0) for row in done.report().rows] == [4 * 2 * HEADS, 0, 0], "two look dense"
        pipe.transformer.disable_cache()
        (note,) = done.report().notes
        assert "FirstBlockCache is on" in note and "docs/choosing.md" in note
        done.clear()
        run(pipe)
        assert not done.report().notes, "it is off again"


def test_mag_cache_beside_cached_is_named() -> None:
    pipe = tiny_wan()
    with patch(pipe, "cached", refresh_every=2) as done:
        pipe.transformer.enable_cache(
            MagCacheConfig(
                num_inference_steps=6, mag_ratios=[1.0] * 6, threshold=1.0, max_skip_steps=1, retention_ratio=0.0
            )
        )
        run(pipe, num_inference_steps=6)
        report = done.report()
    assert sum(row["reused"] for row in report.rows) == 0
    assert any("MagCache is on" in note and '"cached"' in note for note in report.notes)


def test_unpatch_frees_what_was_kept_though_the_patch_is_held() -> None:
    """By either way to unpatch; tensors kept for the process go with the last patch."""
    for take_off in (lambda pipe, done: unpatch(pipe), lambda pipe, done: done.unpatch()):
        pipe = tiny_wan()
        done = patch(pipe, "cached", refresh_every=3)
        stop_at = 3

        def stop(pipe: Any, step: int, *_: Any, stop_at: int = stop_at) -> Any:
            if step == stop_at:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        (engine, *_) = (site.engine for site in done.sites)
        kept = [weakref.ref(held.out) for memory in engine._caches._kept.values() for held in memory.held.values()]
        small = weakref.ref(patterns.head_index((0, 2), torch.device("cpu")))
        assert kept and all(ref() is not None for ref in kept) and engine._partitions.all() and small() is not None
        calls = done.report().rows[0]["calls"]
        take_off(pipe, done)
        gc.collect()
        assert not engine._partitions.all() and all(ref() is None for ref in kept) and small() is None
        assert done.report().rows[0]["calls"] == calls, "what ran is still known"


def test_what_is_kept_for_the_process_goes_with_the_last_patch() -> None:
    first, second = tiny_wan(), tiny_wan(seed=5)
    patch(first, "dense")
    patch(second, "dense")
    small = weakref.ref(patterns.head_flags((True, False), torch.device("cpu")))
    unpatch(first)
    assert small() is not None
    del second  # without unpatching
    gc.collect()
    assert small() is None


def stored_plan(provenance: dict[str, Any]) -> Plan:
    method = Method(AxisOrder("hwf"), Stored(0.5))
    bits, heads = method.select.names(method.order, "transformer")
    blocks = LAYOUT.blocks(BLOCK)
    plan = Plan.uniform(Method(select=Draft(0.5)), "wan", {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})
    (symbol,) = plan.methods
    tensors = {
        bits: packed(torch.ones(1, 1, blocks, blocks, dtype=torch.bool)),
        heads: torch.zeros(LAYERS, HEADS, dtype=torch.int32),
    }
    return replace(plan, methods={symbol: method}, tensors=tensors, provenance=provenance)


@pytest.mark.parametrize(
    ("provenance", "size", "message"),
    [
        (
            {},
            {"height": 96},
            r"are for 6 blocks of 128 tokens; this call has 3 x 24 x 16 tokens .* 9 blocks.*search a plan",
        ),
        (
            {"layout": {"frames": 3, "height": 16, "width": 16}},
            {"num_frames": 9},
            r"are for 3 x 16 x 16 tokens, 6 blocks.* this call has 5 x 16 x 16 tokens",
        ),
        (
            {"layout": {"frames": 3, "height": 8, "width": 32}},
            {},
            r"are for 3 x 8 x 32 tokens, 6 blocks.* this call has 3 x 16 x 16 tokens",  # as many blocks, but other ones
        ),
    ],
)
def test_stored_masks_of_another_size_are_refused_before_the_model_runs(
    provenance: dict[str, Any], size: dict[str, Any], message: str
) -> None:
    pipe = tiny_wan()
    ran: list[int] = []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda *_: ran.append(1))
    with patch(pipe, stored_plan(provenance)) as done:
        with pytest.raises(PlanError, match=message):
            run(pipe, **size)
        assert not ran
        with pytest.raises(PlanError, match=message):
            run(pipe, **size)
        assert ("plan made for 3 x " in repr(done)) == bool(provenance)


def test_stored_masks_of_this_size_run() -> None:
    pipe = tiny_wan()
    with patch(pipe, stored_plan({"layout": {"frames": 3, "height": 16, "width": 16}})) as done:
        run(pipe)
        assert done.report().density == 1.0
