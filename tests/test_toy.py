"""The toy world, its judge, its training and its shipped weights."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel.evals import toy
from diffusers_accel.evals.toy import render
from diffusers_accel.evals.toy.training import autoencoder, latents, nested, run_state
from diffusers_accel.evals.toy.training.denoiser import (
    CAPTION_CLASSES,
    OBJECT_FEATURES,
    SHORT_TEXT_ROWS,
    Probe,
    attend,
    prepare_for_training,
    rotate,
    set_inputs,
)
from diffusers_accel.evals.toy.training.models import TEXT_DIM, TEXT_ROWS, build_autoencoder, build_transformer
from diffusers_accel.evals.toy.training.pixels import compare, find, judge
from diffusers_accel.evals.toy.training.run_state import Average, RunState, load_run, read_log
from diffusers_accel.evals.toy.training.start import start_training
from diffusers_accel.evals.toy.training.text import train_text
from diffusers_accel.evals.toy.training.transformer import (
    NOISIEST,
    Denoiser,
    Places,
    describe_caption,
    describe_objects,
    load_probe,
    loss_weights,
    sample_places,
    sample_sigmas,
    take,
    train_transformer,
)
from diffusers_accel.evals.toy.weights_folder import RECORD, WEIGHTS, verify_weights, weights_digest
from diffusers_accel.files import FileError, save_tensor_document, write_json


def scenes(n: int, seed: int = 3) -> list[render.Scene]:
    return [render.sample_scene(np.random.default_rng([seed, i])) for i in range(n)]


# The world


def test_rendering_is_deterministic_and_a_window_is_an_exact_crop() -> None:
    for scene in scenes(4):
        again = dataclasses.replace(scene)
        whole = render.render(scene, frames=9, size=64)
        assert whole.dtype == np.float32 and whole.shape == (9, 64, 64, 3)
        assert np.array_equal(whole, render.render(again, frames=9, size=64))
        part = render.render(scene, frames=9, size=64, window=(2, 5, 8, 32, 16, 40))
        assert np.array_equal(part, whole[2:7, 8:40, 16:56])


def test_captions_parse_back() -> None:
    seen = set()
    for scene in scenes(300):
        asked = render.parse_caption(scene.caption)
        assert asked.background == scene.background
        assert asked.objects == tuple((a.color, a.shape, a.motion) for a in scene.actors)
        seen.update(m for _, _, m in asked.objects)
    assert seen == set(render.MOTIONS)


@pytest.mark.parametrize("text", ["", "a red circle", "a red circle moves left on a plaid background"])
def test_a_foreign_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a caption like"):
        render.parse_caption(text)


def test_held_out_captions_are_never_trained_on() -> None:
    prompts = toy.held_out_prompts(64, seed=0)
    assert len(set(prompts)) == 64 and prompts == toy.held_out_prompts(64, seed=0)
    assert prompts != toy.held_out_prompts(64, seed=1)
    assert all(render.is_held_out(p) for p in prompts)
    trained = {latents.clip_scene(seed=0, index=i).caption for i in range(500)}
    assert not any(render.is_held_out(c) for c in trained) and not trained & set(prompts)
    # One eighth, within four standard deviations of 800 draws.
    share = np.mean([render.is_held_out(s.caption) for s in scenes(800)])
    assert abs(share - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / 800)


def test_the_order_of_two_objects_does_not_decide_the_split() -> None:
    for scene in (s for s in scenes(300) if len(s.actors) == 2):
        swapped = dataclasses.replace(scene, actors=scene.actors[::-1])
        assert swapped.caption != scene.caption
        assert render.is_held_out(swapped.caption) == render.is_held_out(scene.caption)


# The judge


def test_the_judge_finds_what_was_rendered_and_nothing_else() -> None:
    for scene in scenes(24, seed=5):
        shown = find(render.render(scene))
        verdict = compare(shown, scene.caption)
        assert verdict.passed and verdict.shape, scene.caption
        actor = scene.actors[0]
        wrong = {
            "background": next(b for b in render.BACKGROUNDS if b != scene.background),
            "color": next(c for c in render.COLORS if c not in {a.color for a in scene.actors}),
            "motion": next(m for m in render.MOTIONS if m not in {a.motion for a in scene.actors}),
        }
        for attribute, value in wrong.items():
            if attribute == "background":
                other = dataclasses.replace(scene, background=value)
            else:
                changed = dataclasses.replace(actor, **{attribute: value})
                other = dataclasses.replace(scene, actors=(changed, *scene.actors[1:]))
            assert not getattr(compare(shown, other.caption), attribute), (scene.caption, other.caption)


def test_the_judge_rejects_noise_still_frames_and_reversed_motion() -> None:
    scene = next(s for s in scenes(50) if len(s.actors) == 1 and s.actors[0].motion in render.DIRECTIONS)
    video = render.render(scene)
    assert not judge(video[::-1], scene.caption).motion
    assert not judge(np.repeat(video[:1], 33, axis=0), scene.caption).motion
    noise = np.random.default_rng(0).random(video.shape, dtype=np.float32)
    assert not judge(noise, scene.caption).color


# Training


def test_training_computes_what_the_stock_model_computes() -> None:
    torch.manual_seed(0)
    stock = build_transformer(layers=2, heads=2, head_dim=64, ffn_dim=64)
    torch.nn.init.normal_(stock.proj_out.weight, std=0.05)
    trained = build_transformer(layers=2, heads=2, head_dim=64, ffn_dim=64)
    trained.load_state_dict(stock.state_dict())
    prepare_for_training(trained)
    video, timestep, rows = torch.randn(2, 8, 3, 8, 8), torch.tensor([300.0, 800.0]), torch.tensor([5, 1])
    text = torch.zeros(2, TEXT_ROWS, TEXT_DIM)
    for i, n in enumerate(rows):
        text[i, :n] = torch.randn(int(n), TEXT_DIM)
    set_inputs(trained, rows, *(torch.arange(n).repeat(2, 1) for n in (3, 4, 4)))
    with torch.no_grad():
        expected = stock(video, timestep, text, return_dict=False)[0]
        found = trained(video, timestep, text[:, :SHORT_TEXT_ROWS], return_dict=False)[0]
    # fp32 throughout; sums of up to 512 terms in another order.
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.std().item(), rtol=2e-5)


def test_a_part_of_a_clip_keeps_its_true_positions() -> None:
    model = build_transformer(layers=1, heads=1, head_dim=64, ffn_dim=64)
    whole = [f[0].unflatten(0, (9, 6, 8)) for f in model.rope(torch.zeros(1, 8, 9, 12, 16))]
    prepare_for_training(model)
    rng = np.random.default_rng(0)
    places = [sample_places(rng, (9, 6, 8), frames=4, stride=2) for _ in range(2)]
    set_inputs(model, torch.tensor([1, 1]), *(torch.from_numpy(np.stack(p)) for p in zip(*places, strict=True)))
    latent = rng.standard_normal((8, 9, 12, 16)).astype(np.float16)
    patches = torch.from_numpy(latent).float().unflatten(3, (8, 2)).unflatten(2, (6, 2))
    found = model.rope(torch.zeros(2, 8, 4, 6, 8))
    for b, (frames, rows, columns) in enumerate(places):
        assert frames[0] == 0 and len(set(frames)) == 4
        grid = np.ix_(frames, rows, columns)
        for some, every in zip(found, whole, strict=True):
            assert torch.equal(some[b], every[grid].flatten(0, 2))
        part = take(latent, Places(frames, rows, columns)).unflatten(3, (4, 2)).unflatten(2, (3, 2))
        assert torch.equal(part, patches[:, frames][:, :, rows][..., columns, :])


def test_aimed_heads_start_near_their_own_token() -> None:
    model = build_transformer(layers=1, heads=4, head_dim=64)
    attn, (frames, height, width) = model.blocks[0].attn1, (5, 6, 7)
    cos, sin = model.rope(torch.zeros(1, 8, frames, 2 * height, 2 * width))
    tokens = torch.randn(1, frames * height * width, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k = attn.norm_q(attn.to_q(tokens)), attn.norm_k(attn.to_k(tokens))
        q, k = (rotate(x.unflatten(2, (4, 64)), cos, sin)[0].transpose(0, 1) for x in (q, k))
        weights = (q @ k.transpose(1, 2) / 8).softmax(-1).unflatten(2, (frames, height, width))
    middle = weights[:, (2 * height + 3) * width + 3]
    near = middle[:, 2, 2:5, 2:5].sum((1, 2)), middle[:, :, 2:5, 2:5].sum((1, 2, 3)), middle[:, 2].sum((1, 2))
    share = 9 / (frames * height * width), 9 / (height * width), 1 / frames
    for head in range(3):
        assert near[head][head] > 1.5 * share[head]
        assert near[head][3] < 1.25 * share[head]  # the last head is not aimed


def test_the_probe_asks_for_places_in_the_grid_and_of_the_object() -> None:
    model = build_transformer(layers=1, heads=1, head_dim=64, ffn_dim=64)
    probe = Probe(model)
    prepare_for_training(model)
    grid = (9, 6, 8)
    places = [sample_places(np.random.default_rng(i), grid, frames=4, stride=2) for i in range(2)]
    set_inputs(model, torch.tensor([1, 1]), *(torch.from_numpy(np.stack(p)) for p in zip(*places, strict=True)))
    with torch.no_grad():
        model(torch.randn(2, 8, 4, 6, 8), torch.tensor([500.0, 500.0]), torch.zeros(2, SHORT_TEXT_ROWS, TEXT_DIM))
        for linear in (probe.own, probe.object):
            linear.weight.zero_()
            linear.bias.zero_()
        # A probe that says 0 everywhere errs by the mean square of what it is asked for.
        asked = [2 * (p / (n - 1)) - 1 for place in places for p, n in zip(place, grid, strict=True)]
        own = np.mean([np.square(axis).mean() for axis in asked])
        objects = torch.full((2, 4, 2, OBJECT_FEATURES), 2.0)
        objects[1], objects[0, :, 1] = 7.0, torch.nan
        found = probe.loss(model.rope, grid, objects, torch.tensor([1.0, 0.0]))
        # Neither the clip without a caption nor the missing second object counts.
        assert float(found) == pytest.approx(own + OBJECT_FEATURES * 4.0 / 3 / 2, rel=1e-5)
        probe.object.bias.fill_(2.0)
        assert float(probe.loss(model.rope, grid, objects, torch.tensor([1.0, 0.0]))) == pytest.approx(own, rel=1e-5)


def test_the_objects_are_described_where_the_latent_frames_show_them() -> None:
    one = next(s for s in scenes(50) if s.actors[0].motion == "moves right" and len(s.actors) == 1)
    told = describe_objects(one, np.array([0, 8, 16]))
    x = one.actors[0].state(np.array([0, 15.5 / 32, 31.5 / 32], np.float32))[0]
    assert told.shape == (3, 2, OBJECT_FEATURES) and np.isnan(told[:, 1]).all()
    assert told[:, 0, 0] == pytest.approx(8 * (x - 0.5))
    assert told[0, 0, 3:6] / 3 + 0.5 == pytest.approx(render.COLORS[one.actors[0].color])
    assert told[0, 0, 6:10].tolist() == [2.0 * (one.actors[0].shape == s) for s in render.SHAPES]
    turning = next(s for s in scenes(200) if s.actors[0].motion == "turns" and s.actors[0].shape == "square")
    angle = 4 * turning.actors[0].travel * 15.5 / 32
    assert describe_objects(turning, np.array([8]))[0, 0, 10:] == pytest.approx(
        [np.cos(angle), np.sin(angle)], abs=1e-5
    )
    two = describe_objects(next(s for s in scenes(50) if len(s.actors) == 2), np.array([0]))
    assert not np.isnan(two).any() and not np.array_equal(two[:, 0], two[:, 1])


def test_every_text_row_is_asked_for_the_objects_and_its_own() -> None:
    two = next(s for s in scenes(50) if len(s.actors) == 2)
    told, words = describe_caption(two), two.caption.split()
    rows = len(words) + 1
    assert told.shape == (SHORT_TEXT_ROWS, len(CAPTION_CLASSES)) and (told[rows:] == -1).all()
    assert (
        (told[:rows] < CAPTION_CLASSES).all()
        and (told[:rows] >= 0).all()
        and len(set(map(tuple, told[:rows, 1:]))) == 1
    )
    assert told[:rows, 0].tolist() == [1] * 5 + [0] + [2] * 5 + [0] * 5 and words[5] == "and"
    for column, palette in ((1, render.BACKGROUNDS), (2, render.COLORS), (3, render.SHAPES), (5, render.COLORS)):
        word = {1: words[-2], 2: words[1], 3: words[2], 5: words[7]}[column]
        assert list(palette)[told[0, column]] == word
    one = next(s for s in scenes(50) if len(s.actors) == 1)
    assert describe_caption(one)[0, 5:].tolist() == [len(render.COLORS), len(render.SHAPES), len(render.MOTIONS)]
    assert not (describe_caption(one)[:, 0] == 2).any()


def test_the_text_probe_asks_real_rows_only() -> None:
    probe = Probe(build_transformer(1, 1, 64, 64))
    answers = torch.from_numpy(np.stack([describe_caption(s) for s in scenes(4)]))
    rows = torch.zeros(4, SHORT_TEXT_ROWS, TEXT_DIM)
    with torch.no_grad():
        probe.text.bias.zero_()
        even = float(np.mean(np.log(CAPTION_CLASSES)))
        assert float(probe.text_loss(rows, answers)) == pytest.approx(even, rel=1e-5)
        rows[answers[..., 0] < 0] = 1e4
        assert float(probe.text_loss(rows, answers)) == pytest.approx(even, rel=1e-5)
        rows[0, 0] = 1e4
        assert float(probe.text_loss(rows, answers)) > 2 * even


def test_a_new_text_encoder_reads_a_word_by_its_place() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        rows, _ = Denoiser(**TINY).encode(["a red circle moves left and a red circle moves left on a navy background"])
    assert float((rows[0, 1] - rows[0, 7]).norm() / rows[0, 1].norm()) > 0.1


def test_the_text_encoder_learns_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the transformer command first"):
        train_text(tmp_path, 1, seed=0)
    torch.manual_seed(0)
    model = Denoiser()
    RunState(tmp_path, "transformer", 0, seed=0).save(
        model=model.state_dict(), average=Average(model, 1).state(), optimizers=[], started_from="{}"
    )
    train_text(tmp_path, 2, seed=0)
    held = load_run(tmp_path, "transformer")
    assert "optimizers" not in held and "text.weight" in held["probe"] and held["started_from"] == "{}"
    for name, value in model.state_dict().items():
        assert torch.equal(held["model"][name], held["average"]["values"][name]), name
        assert torch.equal(held["model"][name], value) != name.startswith("text_encoder."), name


def test_a_probe_that_asks_other_things_is_refused(tmp_path: Path) -> None:
    probe = Probe(build_transformer(1, 1, 64, 64))
    earlier = {k: v for k, v in probe.state_dict().items() if not k.startswith("text.")}
    with pytest.raises(ValueError, match="begin with exported weights in a new folder"):
        load_probe(probe, {"probe": earlier}, tmp_path)
    load_probe(probe, {}, tmp_path)


def test_an_object_of_any_outline_lies_within_its_loss_weights() -> None:
    grid, frames = (17, 16, 16), np.arange(0, 17, 4)
    for scene in scenes(40):
        rows, columns = np.arange(16), np.arange(1, 16, 2)
        weights = loss_weights(scene, Places(frames, rows, columns), grid)
        assert weights.shape == (5, 16, 8) and set(np.unique(weights)) == {1.0, 4.0}
        bare = dataclasses.replace(scene, actors=())
        shown = np.abs(render.render(scene) - render.render(bare)).max(-1) > 0.05
        tokens = shown[2 * frames].reshape(5, 16, 8, 16, 8).any((2, 4))[:, :, columns]
        # The last frame of a latent's two may touch a token that its middle does not.
        assert (tokens & (weights == 1)).sum() <= 0.03 * tokens.sum()
        assert (weights > 1).mean() < 0.5


def test_training_meets_hard_kinds_more_often_than_prompts_do() -> None:
    trained = [render.training_scene(np.random.default_rng([1, i])) for i in range(700)]
    kinds = [scene.kind for scene in trained]
    assert kinds.count("two objects") / 700 == pytest.approx(3 / 14, rel=0.2)
    assert kinds.count("turns") / 700 == pytest.approx(3 / 14, rel=0.2)
    assert kinds.count("moves left") / 700 == pytest.approx(1 / 14, rel=0.4)
    assert not any(render.is_held_out(scene.caption) for scene in trained)


def test_most_noise_levels_show_the_object_and_the_others_are_the_highest() -> None:
    sigmas = sample_sigmas(100, torch.Generator().manual_seed(0))
    assert bool((sigmas > 0).all() and (sigmas <= 1).all())
    assert int((sigmas[:30] >= NOISIEST).sum()) == 30 and float(sigmas[:30].max()) > 0.99
    assert 0.5 < float((sigmas < NOISIEST).float().mean()) < 0.65
    assert bool((sigmas[30:] < 0.3).any())


def test_a_run_can_start_from_the_shipped_weights(tmp_path: Path, pipe) -> None:
    folder = start_training(tmp_path / "run", WEIGHTS, seed=3)
    vae, held = latents.trained_autoencoder(folder), load_run(folder, "transformer")
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], value), name
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(held["model"][f"transformer.{name}"], value), name
    assert held["step"] == 0 and held["seed"] == 3
    assert json.loads(held["started_from"])["weights"] == weights_digest(verify_weights())
    with pytest.raises(FileExistsError, match="new or empty folder"):
        start_training(folder, WEIGHTS, seed=3)


def test_sliced_attention_and_its_gradients_equal_sdpa() -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(3, 300, 64, dtype=torch.float32) for _ in range(4))
    results = []
    for function in (attend, torch.nn.functional.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        out.backward(grad)
        results.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_text_rows_are_those_of_the_stock_call(pipe) -> None:
    model = Denoiser()
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    prompts = ["a red circle moves left on a navy background", ""]
    expected, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_ROWS)
    found, rows = model.encode(prompts)
    assert expected.shape == (2, TEXT_ROWS, TEXT_DIM) and not expected[:, SHORT_TEXT_ROWS:].any()
    assert [int((e != 0).any(-1).sum()) for e in expected] == rows.tolist() == [10, 1]
    torch.testing.assert_close(found, expected[:, :SHORT_TEXT_ROWS], atol=1e-5, rtol=1e-5)


TINY = {"layers": 1, "heads": 1, "head_dim": 64, "ffn_dim": 64}


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A training folder with an untrained autoencoder's record and two clips of noise for latents."""
    state = build_autoencoder().state_dict()
    run = RunState(tmp_path, "autoencoder", minutes=1, seed=0)
    run.save(average={"values": state}, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    noise = np.random.default_rng(0).standard_normal((2, *latents.SHAPE)).astype(np.float16)
    (tmp_path / "latents.bin").write_bytes(noise.tobytes())
    (tmp_path / "latents.json").write_text(json.dumps(latents._record(seed=0)))
    return tmp_path


def test_latents_of_other_scenes_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="Give the seed that it was encoded with"):
        train_transformer(tiny_folder, 1, seed=1, compile=False, **TINY)
    with pytest.raises(ValueError, match="captions and clips would not belong together"):
        latents.encode_latents(tiny_folder, 3, seed=1)
    (tiny_folder / "latents.json").unlink()
    with pytest.raises(ValueError, match="no latents.json"):
        train_transformer(tiny_folder, 1, seed=0, compile=False, **TINY)
    assert (tiny_folder / "latents.bin").stat().st_size == 2 * latents.RECORD_BYTES


def test_training_resumes_after_a_kill(tiny_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diffusers_accel.evals.toy.training import run_state, transformer\n"
        "run_state.SAVE_EVERY_S = 0.0\n"
        f"transformer.train_transformer(Path(sys.argv[1]), 10, 0, stages=((1.01, ((1, 1, 2),)),), compile=False, **{TINY})"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tiny_folder)], stdout=subprocess.DEVNULL)
    checkpoint = tiny_folder / "transformer.safetensors"
    try:
        deadline = time.monotonic() + 600  # importing alone takes a busy machine minutes
        while not checkpoint.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = load_run(tiny_folder, "transformer")
    assert before["step"] > 0 and before["seconds"] > 0
    minutes = before["seconds"] / 60 + 0.02
    train_transformer(tiny_folder, minutes, 0, stages=((1.01, ((1, 1, 2),)),), compile=False, **TINY)
    after = load_run(tiny_folder, "transformer")
    assert after["step"] > before["step"] and after["seconds"] >= 60 * minutes
    assert after["average"]["count"] == after["step"]
    rows = read_log(tiny_folder / "transformer.jsonl")
    assert rows[-1]["step"] == after["step"] and np.isfinite(rows[-1]["loss"])


def test_another_seed_does_not_continue_a_run(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected the seed 0"):
        RunState(tiny_folder, "autoencoder", minutes=1, seed=1).resume()


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer after a step, whose state has numbers as keys, tuples, None and tensors."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.98))
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


def saved_run(folder: Path) -> dict[str, Any]:
    module, optimizer = trained()
    values = {
        "model": module.state_dict(),
        "optimizers": [optimizer.state_dict()],
        "started_from": "{}",
        "mean": [0.5, 1],
    }
    values["tied"] = {"a": module.weight, "b": module.weight.detach()}
    run = RunState(folder, "transformer", minutes=1, seed=4)
    run.step, run.seconds = 7, 60.0
    run.save(**values)
    return values


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and bool(a == b)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    values = saved_run(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["transformer.safetensors"]
    held = load_run(tmp_path, "transformer")
    assert held is not None and (held["step"], held["seed"]) == (7, 4) and 60 <= held["seconds"] < 70
    assert alike({name: held[name] for name in values}, values)
    module, optimizer = trained()
    optimizer.load_state_dict(held["optimizers"][0])
    assert alike(optimizer.state_dict(), values["optimizers"][0])
    run = RunState(tmp_path, "transformer", minutes=2, seed=4)
    resumed = run.resume()
    assert resumed is not None and resumed.keys() == values.keys() and run.step == 7 and run.progress >= 0.5


def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    saved_run(tmp_path)
    path = tmp_path / "transformer.safetensors"
    expected, whole, random = load_run(tmp_path, "transformer"), path.read_bytes(), np.random.default_rng(0)
    for place in random.choice(len(whole), 300, replace=False):
        for data in (
            whole[:place] + bytes([whole[place] ^ 1 << random.integers(8)]) + whole[place + 1 :],
            whole[:place],
        ):
            path.write_bytes(data)
            try:
                assert alike(load_run(tmp_path, "transformer"), expected)
            except FileError as error:
                assert str(error).startswith(f"{path}: ") and len(str(error)) < 500


def test_a_failed_save_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path)
    before = load_run(tmp_path, "transformer")

    def dies(*paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="disk full"):
        saved_run(tmp_path)
    assert alike(load_run(tmp_path, "transformer"), before) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_a_checkpoint_in_another_type_than_fp32_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """It would be converted without a word where a model or an optimizer takes it."""
    run = RunState(tmp_path, "transformer", minutes=1, seed=0)
    with pytest.raises(FileError, match="average/values/a: expected float32, as all of a training run, found"):
        run.save(average={"count": 1, "values": {"a": torch.ones(3, dtype=dtype)}})
    data, tensors = nested.flatten({"average": {"count": 1, "values": {"a": torch.ones(3, dtype=dtype)}}})
    header = run_state._Header(step=1, seconds=1.0, seed=0, values=data)
    save_tensor_document(run.path, run_state.KIND, header, tensors)
    with pytest.raises(
        FileError, match=r"transformer\.safetensors: .*a: expected float32, .*; begin with exported weights"
    ):
        run.resume()


class Trap:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; os.environ['DIFFUSERS_ACCEL_TRAP'] = 'sprung'",)


def test_a_pickle_in_the_place_of_a_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    run = RunState(tmp_path, "transformer", minutes=1, seed=0)
    (tmp_path / "transformer.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileError, match=r"transformer\.pt: .*found a pickle.*never read; begin with exported weights"):
        run.resume()
    run.path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileError, match="expected a safetensors file, found another kind of file; begin"):
        run.resume()
    assert "DIFFUSERS_ACCEL_TRAP" not in os.environ


@pytest.mark.parametrize(
    ("data", "tensors"),
    [
        ({"tensor": "gone"}, {}),
        ({"tensor": ["a"]}, {}),
        ({"items": [["a"]]}, {}),
        ({"items": [[None, 1]]}, {}),
        ({"items": [["a", 1], ["a", 2]]}, {}),
        ({"tuple": 3}, {}),
        ({"list": []}, {}),
        ({}, {}),
    ],
)
def test_states_of_another_form_are_refused(data: Any, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(FileError, match="expected a tensor of the file, a tuple or items of a dictionary"):
        nested.unflatten([data], tensors)
    with pytest.raises(FileError, match="expected tensors, texts, numbers and their collections, found set"):
        nested.flatten({"a": {1}})


def test_a_log_that_was_cut_off_goes_on_and_one_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = RunState(tmp_path, "transformer", minutes=1, seed=0)
    for run.step in (1, 2):
        run.log(loss=0.5)
    whole = run.log_path.read_bytes()
    run.log_path.write_bytes(whole[:-20])
    run.step = 3
    run.log(loss=0.25)
    assert [(row["step"], row["loss"]) for row in read_log(run.log_path)] == [(1, 0.5), (3, 0.25)]
    run.log_path.write_bytes(whole.replace(b"0.5", b"0.7", 1))
    with pytest.raises(FileError, match="line 1: expected a row of a training log, .*sha256 differs"):
        read_log(run.log_path)


def test_interrupted_latents_are_cut_to_whole_clips_and_continued(tiny_folder: Path) -> None:
    path = tiny_folder / "latents.bin"
    path.write_bytes(path.read_bytes()[: latents.RECORD_BYTES + 10])
    assert latents.open_latents(path).shape == (1, *latents.SHAPE)
    latents.encode_latents(tiny_folder, clips=2, seed=0)
    assert path.stat().st_size == 2 * latents.RECORD_BYTES
    vae = latents.trained_autoencoder(tiny_folder)
    scene = render.training_scene(np.random.default_rng([0, 1, 1]))
    assert scene.caption == latents.clip_scene(seed=0, index=1).caption
    with torch.no_grad():
        expected = autoencoder.encode_mean(vae, autoencoder.to_video(render.render(scene))[None])[0]
    found = torch.from_numpy(np.array(latents.open_latents(path)[1])).float()
    # Written in fp16 after an encoder in bf16, whose 8 bits of mantissa are lost some ten layers deep.
    assert (found - expected).norm() < 0.05 * expected.norm()


# The shipped weights


@pytest.fixture(scope="module")
def pipe():
    loaded = toy.load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_shipped_weights_are_the_recorded_ones_and_small() -> None:
    record = toy.verify_weights()
    present = {p.relative_to(toy.WEIGHTS).as_posix() for p in toy.WEIGHTS.rglob("*") if p.is_file()}
    assert present == {RECORD, *record["files"]}
    assert sum((toy.WEIGHTS / p).stat().st_size for p in present) <= 16_000_000
    assert {p for p in present if not p.endswith(".json")} == {p for p in present if p.endswith(".safetensors")}


def test_changed_or_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(toy.WEIGHTS, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="vae.*sha256"):
        toy.load_pipeline(folder=folder)
    os.unlink(file)
    with pytest.raises(FileNotFoundError, match="vae"):
        toy.load_pipeline(folder=folder)
    for record, message in (([], "expected object, found array"), ({"files": {"a": 1}}, "expected str, found int")):
        write_json(folder / RECORD, record)
        with pytest.raises(ValueError, match=f"{RECORD}: .*{message}"):
            toy.load_pipeline(folder=folder)


def test_the_pipeline_is_the_stock_one(pipe) -> None:
    import diffusers
    from transformers import UMT5EncoderModel

    assert type(pipe) is diffusers.WanPipeline
    assert type(pipe.transformer) is diffusers.WanTransformer3DModel
    assert type(pipe.vae) is diffusers.AutoencoderKLWan
    assert type(pipe.text_encoder) is UMT5EncoderModel and not pipe.text_encoder.training
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_shipped_weights_show_the_background_colour_and_motion_asked_for(pipe) -> None:
    """Of one object and of two; how many of 64 do is for the measure command: docs/toy.md."""
    tokens = []
    handle = pipe.transformer.blocks[0].attn1.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    try:
        prompts = toy.held_out_prompts(57, seed=0)
        for seed in (0, 56):
            prompt = prompts[seed]
            frames = pipe(prompt, **toy.CALL, generator=torch.Generator().manual_seed(seed)).frames[0]
            assert frames.shape == (33, 128, 128, 3)
            verdict = judge(frames, prompt)
            assert verdict.passed, f"{prompt}: {verdict}"
    finally:
        handle.remove()
    assert set(tokens) == {4352} and " and " in prompt
