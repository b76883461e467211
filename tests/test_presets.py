"""`patch(pipe)` without a method: a density for each size, dense below what can win, and one line that says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel import Plan, patch
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.families.preset import Preset
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.preset import preset_recipe
from diffusers_accel.run import by_size
from diffusers_accel.run.by_size import PUBLISHED, density_at, preset_density, wins_from
from diffusers_accel.shape import ModelShape
from diffusers_accel.starter.checkpoints import CHECKPOINTS
from diffusers_accel.support.log import LOG
from tests.tiny import HEADS, LAYERS, tiny_cogvideox, tiny_hunyuan, tiny_wan, tiny_wan_call

WIDE = ModelShape(40, 40, 128)
NARROW = ModelShape(30, 12, 128)  # Wan 2.1 1.3B


def tables() -> list[str]:
    """What docs/choosing.md says of the presets, as Markdown."""
    sizes = [f"| {tokens:,} | {density:g} | {source} |" for tokens, density, source in PUBLISHED]
    kinds: dict[Preset, list[str]] = {}
    for family in FAMILIES.values():
        kinds.setdefault(family.preset, []).append(f"`{family.name}`")
    others = [
        f"| {', '.join(names)} | {preset.dense_steps:.0%} | {preset.dense_layers} | {preset.source} |"
        for preset, names in kinds.items()
        if preset != Preset()
    ]
    usual = Preset()
    kept = [*others, f"| all others | {usual.dense_steps:.0%} | {usual.dense_layers} | {usual.source} |"]
    return [
        "\n".join(["| video tokens | density | published by |", "|---|---|---|", *sizes]),
        "\n".join(["| family | first steps | first layers | published values |", "|---|---|---|---|", *kept]),
    ]


@pytest.fixture
def logged() -> Iterator[list[tuple[int, str]]]:
    said: list[tuple[int, str]] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield said
    LOG.removeHandler(handler)
    LOG.setLevel(level)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule at the sizes of tiny models, which it takes for wide ones."""
    monkeypatch.setattr(by_size, "WINS_FROM", {"cpu": 500})
    monkeypatch.setattr(by_size, "NARROW", 1)
    monkeypatch.setattr(by_size, "PUBLISHED", ((500, 0.9, ""), (768, 0.6, "")))


def frames(pipe: Any, **overrides: Any) -> np.ndarray:
    return pipe(**tiny_wan_call(output_type="latent", **overrides)).frames.numpy()


def test_more_tokens_never_take_a_higher_density() -> None:
    sizes = [*range(1_000, 200_000, 997), *(tokens for tokens, _, _ in PUBLISHED)]
    found = [density_at(tokens) for tokens in sorted(sizes)]
    assert all(before >= after for before, after in pairwise(found))
    assert (found[0], found[-1]) == (PUBLISHED[0][1], PUBLISHED[-1][1])
    assert {round(density * 20, 9) % 1 for density in found} == {0.0}, "multiples of .05"


def test_published_sizes_take_what_is_published() -> None:
    assert [density_at(tokens) for tokens, _, _ in PUBLISHED] == [density for _, density, _ in PUBLISHED]
    assert density_at(45_106) == 0.4, "CogVideoX1.5: between two of them, by the logarithm, rounded up"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda each: each.key)
def test_no_checkpoint_is_given_less_than_its_heads_need(checkpoint: Any) -> None:
    """At 720p, where the densities are lowest."""
    tokens = 118_800 if checkpoint.family == "hunyuan_video" else 75_600
    shape = ModelShape(*checkpoint.size, 128)
    need = float(torch.cat([*checkpoint.needs().values()]).mean())
    density = preset_density(tokens, "cuda", shape)
    assert density is not None and density >= need


def test_narrow_models_read_half_whatever_the_size() -> None:
    assert [preset_density(75_600, "cuda", shape) for shape in (WIDE, NARROW)] == [0.3, 0.5]


def test_a_small_chunk_is_told_of_its_history() -> None:
    chunk = TokenLayout.of(Segment("history", 9000, queries=False), Segment.video((3, 16, 16)))
    model = ModelShape(2, 2, 16)
    plan = Plan.uniform(Method(), "anyflow_far", {"transformer": model})
    sized = by_size.BySize("anyflow_far", "", "draft", {"transformer": model}, lambda density: plan, plan, False)
    assert sized.choose(chunk, "transformer", "cpu").line.endswith('attention over its history: patch(pipe, "history")')


@pytest.mark.parametrize(("device", "least"), [("cpu", 4_096), ("cuda", 16_384)])
def test_it_is_dense_below_what_can_win_on_a_device(device: str, least: int) -> None:
    assert wins_from(device) == least
    assert preset_density(least - 1, device, WIDE) is None
    assert preset_density(least, device, WIDE) == 0.5


def test_one_pipeline_is_called_at_several_sizes(small_sizes: None, logged: list[tuple[int, str]]) -> None:
    pipe = tiny_wan()
    stock = frames(pipe, height=32)
    with patch(pipe) as done:
        del logged[:]
        for _ in range(2):  # a line a size, once
            frames(pipe)
            assert "draft 8x16 0.6" in done.plan.show()
            assert np.array_equal(frames(pipe, height=32), stock)
            assert done.plan.dense
        frames(pipe, width=48)
        report = done.report()
    small = (
        "dense: 384 tokens; sparse attention cannot win below 500 here (cpu). Generate more frames or a larger picture, or "
        'name a method, as in patch(pipe, "draft")'
    )
    kept = "the first 25% of the steps and the first layer stay dense"
    large = f"wan, 768 tokens: draft at density 0.6 (as published for sizes near it); {kept}"
    middle = f"wan, 576 tokens: draft at density 0.85 (as published for sizes near it); {kept}"
    mine = [each for each in logged if "tokens" in each[1] and "blocks of" not in each[1]]
    assert mine == [(logging.INFO, large), (logging.WARNING, small), (logging.INFO, middle)]
    assert [note for note in report.notes if note in (large, small, middle)] == [large, small, middle]
    methods = report.rows[1]["methods"]
    assert {label: heads for label, heads in methods.items() if label != "dense"} == {
        "draft 8x16 0.6": 2 * HEADS * 2 * 4,
        "draft 8x16 0.85": HEADS * 2 * 4,
    }, "two calls and one, two branches, steps 1 to 4 of 5"
    assert set(report.rows[0]["methods"]) == {"dense"}
    assert report.rows[1]["notes"] == {"384 tokens: dense attention is faster": 2 * 2 * 5}


def test_what_is_asked_for_holds_at_every_size(small_sizes: None, logged: list[tuple[int, str]]) -> None:
    pipe = tiny_wan()
    with patch(pipe, density=0.34, dense_steps=0.0, dense_layers=0) as done:
        frames(pipe, width=48)
        assert {label for row in done.report().rows for label in row["methods"]} == {"draft 8x16 0.34"}
        frames(pipe, height=32)
        assert done.plan.dense, "a size where nothing can win stays dense all the same"
    assert any("576 tokens: draft as asked for; nothing stays dense" in line for _, line in logged)


def test_a_named_method_is_not_touched_by_the_size(small_sizes: None) -> None:
    pipe = tiny_wan()
    with patch(pipe, "pattern", density=0.5, dense_steps=0.0) as done:
        frames(pipe, height=32)
        assert {label for row in done.report().rows for label in row["methods"]} == {"band 0.5", "band hwf 0.5"}


@pytest.mark.parametrize(
    ("make", "steps", "layers"), [(tiny_wan, 0.25, 1), (tiny_hunyuan, 0.2, LAYERS - 1), (tiny_cogvideox, 0.1, 0)]
)
def test_each_family_keeps_its_own_steps_and_layers(make: Any, steps: float, layers: int) -> None:
    recipe = preset_recipe(find(make()), {})
    assert (recipe.dense_steps, recipe.dense_layers) == (steps, layers)
    assert preset_recipe(find(make()), {"dense_steps": 0.5}).dense_steps == 0.5


def test_every_preset_names_its_source_and_leaves_something() -> None:
    for family in FAMILIES.values():
        assert family.preset.source and family.preset.dense_steps < 0.5 and family.preset.dense_layers <= 2
    with pytest.raises(ValueError, match=r"dense_steps is a share .* found 1"):
        Preset(dense_steps=1)
    with pytest.raises(ValueError, match=r"dense_layers is a number .* found 0\.5"):
        Preset(dense_layers=0.5)  # type: ignore[arg-type]


def test_the_page_says_what_the_code_does() -> None:
    """`python -c "from tests.test_presets import *; print(*tables(), sep='\\n\\n')"` prints the tables anew."""
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    for table in tables():
        assert table in page
    for device in ("cpu", "cuda"):
        assert f"{wins_from(device):,}" in page
    assert f"{by_size.NARROW:,} channels" in page
