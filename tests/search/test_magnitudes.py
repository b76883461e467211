"""Tables of magnitudes: what is recorded of known outputs, replayed, kept in files, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_accel import patch
from diffusers_accel.files import FileError
from diffusers_accel.forwards import Forwards, Magnitudes
from diffusers_accel.search import magnitudes
from diffusers_accel.search.magnitudes import _Record, calibrate_magnitudes, mean_ratio, summary
from diffusers_accel.support.interrupted import Interrupted
from tests.families import TINY
from tests.forwards.test_magcache import computed
from tests.forwards.toys import latents, toy
from tests.search.test_search import a_call, a_prompt, processors
from tests.tiny import tiny_cogvideox, tiny_cogvideox_call, tiny_wan

STEPS = 8
CALL = {**a_call(num_inference_steps=STEPS), "output_type": "latent"}


def calibrated(pipe: Any, prompts: int = 2, call: Any = None, **options: Any) -> Magnitudes:
    given = [a_prompt(number) for number in range(prompts)]
    return calibrate_magnitudes(pipe, given, call=call or CALL, progress=False, **options)


def run(pipe: Any, seed: int = 0, **overrides: Any) -> np.ndarray:
    call = {**CALL, **a_prompt(seed), **overrides}
    frames: np.ndarray = pipe(**call, generator=torch.Generator().manual_seed(seed)).frames.numpy()
    return frames


# What is recorded


def test_the_mean_over_positions_of_the_ratio() -> None:
    earlier, later = torch.tensor([[1.0, 2.0], [4.0, 5.0]]), torch.tensor([[2.0, 1.0], [4.0, 10.0]])
    assert mean_ratio(earlier, later) == pytest.approx((2 + 0.5 + 1 + 2) / 4)
    assert np.isfinite(mean_ratio(torch.zeros(2), torch.ones(2)))


def test_ratios_of_steps_in_turn_over_runs() -> None:
    """Means and spread over runs; a step behind a gap, and the first of a run, tell nothing."""
    record = _Record()
    for scale in (1.0, 3.0):
        record.begin()
        for step, size in ((0, 1.0), (1, scale), (3, 5.0), (4, 10.0)):
            record.add("cond", (step, 5), 1 - step / 5, torch.full((2,), size))
    record.labels.add("wan, 2 layers of 2 heads")
    found = record.table({})
    assert found.ratios == {"cond": (1.0, 2.0, 1.0, 1.0, 2.0)} and found.spread == {"cond": (0.0, 1.0, 0.0, 0.0, 0.0)}
    assert found.noise is None and found.steps == 5, "the noise of step 2 was never seen"
    assert "5 steps: ratios of cond 1.000 to 2.000, spread over prompts up to 1.0000" in summary(found)
    with pytest.raises(RuntimeError, match="expected 5 steps as in the first call of the pipeline, found 6"):
        record.add("cond", (0, 6), 1.0, torch.ones(2))
    with pytest.raises(ValueError, match="no two steps in turn"):
        _Record().table({})


def test_a_residual_whose_magnitude_is_known_gives_its_ratio() -> None:
    """f(x) = x + c a^t, per branch: the ratio is a at every step, whatever the latents do."""
    pipe = tiny_wan()
    c = latents(9, size=32)
    bases = {"cond": 0.9, "uncond": 1.05}
    model = toy(lambda x, t: x)

    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        step = int((pipe.scheduler.timesteps == t[0]).nonzero()[0, 0])
        name = "cond" if len([each for each in model.ran if each == float(t[0])]) % 2 else "uncond"
        return x + c.mean(dim=2, keepdim=True) * bases[name] ** step

    model.f = f
    pipe.register_modules(transformer=model)
    found = calibrated(pipe)
    for name, base in bases.items():
        assert found.ratios[name] == (1.0, *(pytest.approx(base, abs=1e-4) for _ in range(STEPS - 1)))
        assert max(found.spread[name]) < 1e-4
    assert found.made_for == "wan, 1 layers of 1 heads"


def by_hooks(pipe: Any) -> list[list[float]]:
    """Ratios of one call of an unpatched Wan pipeline for each branch, worked out beside it."""
    last: dict[int, torch.Tensor] = {}
    found: list[list[float]] = [[1.0], [1.0]]
    calls: list[int] = []

    def note(module: Any, args: Any, given: Any, output: Any) -> None:
        branch = len(calls) % 2
        calls.append(1)
        norms = (output[0] - given["hidden_states"]).square().sum(dim=1).sqrt()
        if branch in last:
            found[branch].append(float((norms / last[branch]).mean()))
        last[branch] = norms

    hooks = [
        model.register_forward_hook(note, with_kwargs=True)
        for model in (pipe.transformer, pipe.transformer_2)
        if model is not None
    ]
    run(pipe, 0)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("experts", [1, 2])
def test_a_real_pipeline_is_recorded_and_left_as_it_was(experts: int) -> None:
    pipe = tiny_wan(experts)
    stock, before = run(pipe, 0), processors(pipe)
    expected = by_hooks(pipe)
    found = calibrated(pipe, 1)
    for branch, ratios in zip(("cond", "uncond"), expected, strict=True):
        assert found.ratios[branch] == pytest.approx(ratios, rel=1e-4)
    assert found.noise is not None and found.noise == pytest.approx(pipe.scheduler.sigmas[:STEPS].tolist(), abs=1e-5)
    assert found.provenance["call"]["num_inference_steps"] == STEPS and found.provenance["seed"] == 0
    assert all(a is b for a, b in zip(processors(pipe), before, strict=True))
    assert "forward" not in vars(pipe.transformer) and np.array_equal(run(pipe, 0), stock)


@pytest.mark.parametrize("key", ["cosmos, 1", "ltx", "hunyuan_video15"])
def test_other_layouts_and_branches_without_names(key: str) -> None:
    tiny = TINY[key]
    pipe = tiny.pipe()
    given = tiny.call(num_inference_steps=4)
    prompt = {name: given.pop(name) for name in list(given) if "embeds" in name or "mask" in name}
    given.pop("generator", None)
    found = calibrate_magnitudes(pipe, [prompt], call=given, progress=False)
    assert found.steps == 4 and all(value != 1 for table in found.ratios.values() for value in table[1:])
    with patch(pipe, Forwards(found.rule(1e9, 9, 0.0))) as done:
        pipe(**tiny.call(num_inference_steps=4))
        assert done.report().forwards.predicted > 0


# Replayed


def test_calibrated_and_replayed(tmp_path: Path) -> None:
    """A threshold of 0 computes all, bit for bit; another one as many steps as the bookkeeping says, for other prompts too."""
    pipe, path = tiny_wan(), tmp_path / "wan.json"
    table = calibrated(pipe)
    table.save(path)
    stock = run(pipe, 5)
    with patch(pipe, "magcache", table=str(path), threshold=0, retention=0.0) as done:
        assert np.array_equal(run(pipe, 5), stock)
        assert done.report().forwards.predicted == 0
    for threshold in (0.05, 0.3, 2.0):
        with patch(pipe, "magcache", table=str(path), threshold=threshold, max_skips=3, retention=0.2) as done:
            run(pipe, 5)
            expected = computed(list(table.ratios.values()), STEPS, threshold, 3, 0.2)
            assert done.report().forwards.rows[0]["steps"] == expected


def test_batched_guidance_has_one_table() -> None:
    pipe = tiny_cogvideox()
    call = tiny_cogvideox_call(num_inference_steps=5, output_type="latent")
    prompt = {name: call.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call.pop("generator")
    found = calibrate_magnitudes(pipe, [prompt], call=call, progress=False)
    assert set(found.ratios) == {"cond_uncond"} and found.noise is not None
    assert list(found.noise) == sorted(found.noise, reverse=True)
    with patch(pipe, Forwards(found.rule(1e9, 9, 0.0))) as done:
        pipe(**tiny_cogvideox_call(num_inference_steps=5, output_type="latent"))
        assert done.report().forwards.rows[0]["steps"] == [0, 4]


# Refused where it does not fit


def test_another_model_steps_or_schedule_are_refused() -> None:
    pipe = tiny_wan()
    table = calibrated(pipe, 1)
    other = replace(table, made_for="wan, 30 layers of 12 heads")
    with pytest.raises(ValueError, match=r"made for \(wan, 30 layers of 12 heads\), found wan, 3 layers"):
        patch(pipe, Forwards(other.rule()))
    with patch(pipe, Forwards(table.rule(retention=0.0))) as done:
        run(pipe, 1)
        with pytest.raises(ValueError, match=f"made for a call of {STEPS} steps, found one of 7: calibrate"):
            run(pipe, 1, num_inference_steps=7)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
        with pytest.raises(ValueError, match="another shift, scheduler or strength"):
            run(pipe, 1)
        done.unpatch()
    with patch(pipe, Forwards(replace(table.rule(retention=0.0), noise=None))):
        run(pipe, 1, num_inference_steps=7)  # stretched


def test_an_interrupted_calibration_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan()
    stock = run(pipe, 0)

    def stop(earlier: Any, later: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(magnitudes, "mean_ratio", stop)
    with pytest.raises(Interrupted, match="begins anew"):
        calibrated(pipe)
    assert "forward" not in vars(pipe.transformer) and np.array_equal(run(pipe, 0), stock)


# Files


def a_table(**overrides: Any) -> Magnitudes:
    given: dict[str, Any] = {
        "ratios": {"cond": (1.0, 0.98), "uncond": (1.0, 0.97)},
        "spread": {"cond": (0.0, 0.01), "uncond": (0.0, 0.02)},
        "made_for": "wan, 3 layers of 2 heads",
        "noise": (1.0, 0.7),
        "provenance": {"seed": 3},
    }
    return Magnitudes(**{**given, **overrides})


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    for number, table in enumerate((a_table(), a_table(made_for=None, noise=None))):
        path = tmp_path / f"{number}.json"
        table.save(path)
        assert Magnitudes.load(path) == table
    rule = a_table().rule(0.2, 4, 0.1)
    assert (rule.threshold, rule.max_skips, rule.retention, rule.noise) == (0.2, 4, 0.1, (1.0, 0.7))
    assert a_table(ratios={"": (1.0, 0.9)}, spread={"": (0.0, 0.0)}).rule().ratios == (1.0, 0.9)


@pytest.mark.parametrize(
    "overrides",
    [
        {"ratios": {}, "spread": {}},
        {"spread": {"cond": (0.0, 0.01)}},
        {"ratios": {"cond": (1.0,), "uncond": (1.0, 0.9)}},
        {"noise": (1.0,)},
        {"noise": (1.0, 1.5)},
        {"ratios": {"cond": (1.0, -0.9), "uncond": (1.0, 0.97)}},
        {"spread": {"cond": (0.0, -0.01), "uncond": (0.0, 0.02)}},
    ],
)
def test_tables_that_say_nothing_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        a_table(**overrides)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    a_table().save(path)
    data = json.loads(path.read_text())
    data["ratios"]["cond"][1] = 0.5
    path.write_text(json.dumps(data))
    with pytest.raises(FileError, match="the file is damaged; calibrate again"):
        Magnitudes.load(path)
    with pytest.raises(FileNotFoundError):
        Magnitudes.load(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="magcache takes a table of your model"):
        patch(tiny_wan(), "magcache")
