"""First block caching: its decisions against what the first block adds, and that looking ahead leaves no trace below."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffusers_accel import patch
from diffusers_accel.families import find
from diffusers_accel.forwards import FirstBlock, Forwards, schedule
from diffusers_accel.forwards.indicator import indicator
from tests.families import TINY
from tests.tiny import (
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

STEPS = 8
PIPELINES: dict[str, tuple[Any, Any, int]] = {  # with the branches of a step
    "wan": (tiny_wan, tiny_wan_call, 2),
    "wan 2.2": (lambda: tiny_wan(2), tiny_wan_call, 2),
    "hunyuan_video with true cfg": (tiny_hunyuan, lambda **given: tiny_hunyuan_call(true_cfg=True, **given), 2),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, 1),
}
TEXT = torch.randn(1, 8, TEXT_DIM, generator=torch.Generator().manual_seed(99))


def run(pipe: Any, call: Any = tiny_wan_call, **overrides: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **overrides}
    frames: np.ndarray = pipe(**call(**given)).frames.numpy()
    return frames


def given(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that drift, some steps more than others."""
    generator = torch.Generator()
    noise = [torch.randn(1, 4, 3, 16, 16, generator=generator.manual_seed(seed)) for seed in range(step + 1)]
    x = sum((0.1 + 0.3 * (seed % 4 == 3)) * each for seed, each in enumerate(noise) if seed) + noise[0]
    return torch.as_tensor(x), torch.tensor([900 - 40 * step]), TEXT


def residuals(model: Any, steps: int) -> list[Tensor]:
    """What the first block adds at each step, seen from beside."""
    found: list[Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda _, args, output: found.append(output - args[0]))
    with torch.no_grad():
        for step in range(steps):
            model(*given(step))
    hook.remove()
    return found


@pytest.mark.parametrize(("threshold", "skips"), [(0.0, 4), (0.1, 4), (0.14, 4), (0.12, 2), (1e9, 3)])
def test_steps_compute_where_the_first_block_has_changed(threshold: float, skips: int) -> None:
    model, steps = tiny_wan_transformer(), 16
    r, expected = residuals(model, steps), [0]
    for step in range(1, steps):
        last = expected[-1]
        change = float((r[step] - r[last]).abs().mean() / r[last].abs().mean())
        if step == steps - 1 or step - last > skips or change >= threshold:
            expected.append(step)
    with patch(model, Forwards(FirstBlock(threshold, skips))) as done, torch.no_grad():
        for step in range(steps):
            done.step(step, steps)
            model(*given(step))
        assert done.report().forwards.rows[0]["steps"] == expected
    assert (len(expected) < steps) == (threshold > 0)


def test_thresholds_of_all_kinds_are_tried() -> None:
    r = residuals(tiny_wan_transformer(), 16)
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(r, r[1:], strict=False)]
    assert min(changes) < 0.1 < 0.12 < 0.14 < max(changes)


@pytest.mark.parametrize("key", ["wan", "hunyuan_video", "cogvideox", "ltx", "mochi", "kandinsky5", "kandinsky6"])
def test_what_the_first_block_adds(key: str) -> None:
    tiny = TINY[key]
    pipe = tiny.pipe()
    module, family = find(pipe)["transformer"]
    path, _ = family.self_attention(module)[0]
    block = module.get_submodule(".".join(path.split(".")[:2]))
    seen: dict[str, Any] = {}

    def at_model(_: Any, args: Any, kwargs: Any) -> None:
        seen["given"] = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # pipelines write over theirs

    def at_block(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens = kwargs.get("hidden_states", args[0] if args else None)
        seen["added"] = (output[0] if isinstance(output, tuple) else output) - tokens

    hooks = [
        module.register_forward_pre_hook(at_model, with_kwargs=True),
        block.register_forward_hook(at_block, with_kwargs=True),
    ]
    pipe(**tiny.call(num_inference_steps=2))
    for hook in hooks:
        hook.remove()
    args, kwargs = seen["given"]
    with torch.no_grad():
        found = indicator("first_block", module, family, module.forward, args, kwargs)
    assert torch.equal(found, seen["added"]) and bool(found.abs().max() > 0)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


# What lives below


@pytest.mark.parametrize("name", ["draft", "cached", "pattern"])
def test_looking_ahead_leaves_no_trace_in_the_heads(name: str) -> None:
    """Frames, calls and density are those of a schedule of the same steps."""
    pipe = tiny_wan()
    options = {"density": 0.4, "dense_steps": 0.0, "dense_layers": 0}
    with patch(pipe, [Forwards(FirstBlock(1e9, 1)), (name, options)]) as done:
        frames, report = run(pipe), done.report()
    steps = report.forwards.rows[0]["steps"]
    assert steps == [0, 2, 4, 6, 7]
    with patch(pipe, [schedule(steps), (name, options)]) as done:
        assert np.array_equal(run(pipe), frames)
        other = done.report()
    assert [row["calls"] for row in report.rows] == [row["calls"] for row in other.rows] == [2 * len(steps)] * 3
    assert report.density == pytest.approx(other.density)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_threshold_of_0_is_the_unpatched_pipeline_and_calls_do_not_mix(name: str) -> None:
    make, call, branches = PIPELINES[name]
    pipe = make()
    stock = run(pipe, call)
    with patch(pipe, "firstblock", threshold=0) as done:
        assert np.array_equal(run(pipe, call), stock)
        assert done.report().forwards.computed == STEPS * branches
    with patch(pipe, "firstblock", threshold=0.5) as done:
        frames = [run(pipe, call, seed=seed) for seed in (0, 1, 0)]
        assert done.report().forwards.predicted > 0
    assert np.array_equal(frames[0], frames[2])
    for seed in (0, 1):
        fresh = make()
        with patch(fresh, "firstblock", threshold=0.5):
            assert np.array_equal(run(fresh, call, seed=seed), frames[seed])
    assert np.array_equal(run(pipe, call), stock)


def test_an_expert_begins_anew() -> None:
    pipe = tiny_wan(2)
    with patch(pipe, "firstblock", threshold=1e9, max_skips=2) as done:
        run(pipe)
        first, second = (row["steps"] for row in done.report().forwards.rows)
    begins = second[0]
    assert 0 < begins < STEPS - 1
    assert first == list(range(0, begins, 3)) and second == [*range(begins, STEPS - 1, 3), STEPS - 1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": -0.1}, "expected 0 or more and finite, found -0.1"),
        ({"threshold": float("nan")}, "expected 0 or more and finite, found nan"),
        ({"max_skips": 0}, "expected an integer of 1 or more, found 0"),
    ],
)
def test_wrong_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FirstBlock(**parameters)
