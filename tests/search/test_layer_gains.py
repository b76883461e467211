"""What an error at each layer does to the model's output: held against patched runs of the bare transformer."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.attach.site import Site
from diffusers_accel.methods import DENSE, Draft, Kept, Method, Patches
from diffusers_accel.plan import Plan, Span
from diffusers_accel.search import joining
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.layer_gains import CACHED, UNSEEN, LayerGains
from diffusers_accel.search.plan_making import chosen_spans, joined_spans
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.running import run_pipeline
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.sensitivity import Dense, plan_engine, span_choice
from tests.search.test_search import METHODS, a_call, a_prompt, search
from tests.tiny import HEADS, LAYERS, tiny_cogvideox, tiny_cogvideox_call, tiny_wan

SPAN, STEP = 2, 2  # of four spans and five steps
BAND = 2  # among METHODS


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Scores:
    path = tmp_path_factory.mktemp("scores") / "s.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers_accel.search.plan_search.COST_SECONDS", 0.05)
        search(tiny_wan(), path, prompts=1, span_weights=(1, 1, 1, 1))
    return Scores.load(path)


def all_heads(candidate: int) -> dict[str, np.ndarray]:
    return {"transformer": np.full((4, LAYERS, HEADS), candidate)}


def gains_of(pipe, scores, choice, normal=lambda site: Dense(), say=pytest.fail, **call) -> LayerGains:
    gains = LayerGains(scores, SPAN, choice, normal, 1, say)
    with gains.watching(pipe):
        run_pipeline(pipe, gains.engine, a_prompt(0), a_call(output_type="latent", **call), 0)
    return gains


def by_hand(pipe, method: Method, layer: int, guidance: float) -> float:
    """The gain of a layer by patched calls of the bare transformer."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe(**a_call(output_type="latent", guidance_scale=guidance), **a_prompt(0), generator=torch.manual_seed(0))
    hook.remove()
    branches = 2 if guidance > 1 else 1
    calls = calls[STEP * branches : (STEP + 1) * branches]
    felt = []
    linear = pipe.transformer.blocks[layer].attn1.to_out[0]
    hook = linear.register_forward_hook(lambda module, args, output: felt.append(output.double() - module.bias))

    def joined() -> torch.Tensor:
        with torch.no_grad():
            cond, *uncond = (pipe.transformer(**each)[0].double() for each in calls)
        return uncond[0] + guidance * (cond - uncond[0]) if uncond else cond

    dense = joined()
    rows = tuple(("s" if each == layer else ".",) * HEADS for each in range(LAYERS))
    span = Span(0.0, 1.0, {"transformer": rows})
    shapes = {"transformer": pipe_shape(pipe)}
    with patch(pipe.transformer, Plan("wan", shapes, {".": DENSE, "s": method}, (span,))):
        sparse = joined()
    hook.remove()
    reference, off = torch.stack(felt[:branches]), torch.stack(felt[branches:])
    error = (off - reference).square().sum() / reference.square().sum()
    return float((sparse - dense).square().sum() / dense.square().sum() / error)


def pipe_shape(pipe):
    from diffusers_accel.families import find

    ((module, family),) = find(pipe).values()
    return family.shape(module)


def hooks_of(module):
    return dict(module._forward_pre_hooks), dict(module._forward_hooks)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_gains_are_those_of_patched_runs(scores, guidance):
    pipe = tiny_wan()
    found = gains_of(pipe, scores, all_heads(BAND), guidance_scale=guidance).found()["transformer"]
    expected = [by_hand(pipe, METHODS[BAND], layer, guidance) for layer in range(LAYERS)]
    assert found == pytest.approx(np.array(expected), rel=1e-3)
    assert max(expected) > 1.1 * min(expected)


def test_the_generation_is_not_changed_and_nothing_is_left(scores):
    pipe = tiny_wan()
    choice = span_choice(scores, SPAN)
    hooks, scheduler = hooks_of(pipe.transformer), vars(pipe.scheduler).keys()
    last = LastLatents()
    gains = LayerGains(scores, SPAN, all_heads(BAND), plan_engine(scores, choice), 1, pytest.fail)
    with gains.watching(pipe):
        run_pipeline(pipe, gains.engine, a_prompt(0), a_call(), 0, last)
    assert hooks_of(pipe.transformer) == hooks and "step" not in vars(pipe.scheduler)
    assert vars(pipe.scheduler).keys() == scheduler
    methods, spans = chosen_spans(scores, choice)
    with patch(pipe, Plan(scores.family, scores.models, methods, joined_spans(spans))):
        latents = pipe(**a_call(output_type="latent"), **a_prompt(0), generator=torch.Generator().manual_seed(0)).frames
    assert torch.equal(last.ending.latents, latents.double().flatten())


def test_it_runs_one_forward_a_layer_and_branch_and_the_dense_one(scores):
    pipe, ran = tiny_wan(), []
    pipe.transformer.register_forward_hook(lambda *given: ran.append(1))
    pipe(**a_call(output_type="latent"), **a_prompt(0), generator=torch.manual_seed(0))
    alone = len(ran)
    ran.clear()
    gains_of(pipe, scores, all_heads(BAND))
    assert len(ran) == alone + 2 * (LAYERS + 1)


def test_batched_guidance_counts_both_branches(tmp_path, caplog):
    call, pipe = tiny_cogvideox_call(), tiny_cogvideox()
    prompt = {name: call.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call.pop("generator")
    with caplog.at_level(logging.WARNING, "diffusers_accel"):
        search_plan(
            pipe, [prompt], call=call, budget=Budget.density(0.6), candidates=METHODS, rows=64, progress=False,
            scores_path=tmp_path / "s.safetensors",
        )  # fmt: skip
    scores = Scores.load(tmp_path / "s.safetensors")
    assert UNSEEN not in caplog.text and (scores.measured_impacts("transformer")[1:] > 0).all()


def test_branches_that_are_joined_unseen_count_alike_and_that_is_said(scores):
    """As where a pipeline steps with a scheduler of its own."""
    pipe, said = tiny_wan(), []
    gains = LayerGains(scores, SPAN, all_heads(BAND), lambda site: Dense(), 1, said.append)
    run_pipeline(pipe, gains.engine, a_prompt(0), a_call(output_type="latent"), 0)  # nobody is told of steps
    found = gains.found()["transformer"]
    assert said == [UNSEEN] and (found > 0).all()
    seen = gains_of(pipe, scores, all_heads(BAND)).found()["transformer"]
    assert not np.allclose(found, seen, rtol=0.05)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_how_branches_are_joined_is_seen_however_sparse_the_run_is(scores, guidance, monkeypatch):
    monkeypatch.setattr(joining, "MOST_LEFT", 1e-9)  # so that attention of random weights makes a difference

    class Nothing:
        """Attention that gives nothing, as the sparsest plan does."""

        def attend(self, call, q, k, v):
            return torch.zeros_like(q)

    found = gains_of(tiny_wan(), scores, all_heads(BAND), lambda site: Nothing(), guidance_scale=guidance).found()
    assert (found["transformer"] > 0).all()


def test_a_layer_without_an_error_has_the_mean_of_the_others(scores):
    choice = all_heads(BAND)
    choice["transformer"][:, 1] = 0
    found = gains_of(tiny_wan(), scores, choice).found()["transformer"]
    assert found[1] == pytest.approx(found[[0, 2]].mean()) and found[0] != found[2]


def test_under_a_cache_of_diffusers_nothing_is_measured(scores):
    from diffusers import FirstBlockCacheConfig

    pipe, said = tiny_wan(), []
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    gains = gains_of(pipe, scores, all_heads(BAND), say=said.append)
    assert (gains.found()["transformer"] == 0).all() and set(said) == {CACHED}


def test_methods_that_keep_something_are_measured_without_it(tmp_path):
    """A first call of theirs refreshes, which has no error."""
    kept = Method(Patches(), Draft(0.4), rest=Kept(3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers_accel.search.plan_search.COST_SECONDS", 0.05)
        search(tiny_wan(), tmp_path / "s.safetensors", prompts=1, candidates=(DENSE, kept), budget=Budget.density(0.9))
    scores = Scores.load(tmp_path / "s.safetensors")
    found = gains_of(tiny_wan(), scores, all_heads(1)).found()["transformer"]
    plain = by_hand(tiny_wan(), Method(Patches(), Draft(0.4)), 0, 3.0)
    assert found[0] == pytest.approx(plain, rel=1e-3)


def test_sites_attend_as_usual_beside_it(scores):
    """The engines that it is given are asked for the generation itself, and for nothing else."""
    asked = []

    class Counting(Dense):
        def attend(self, call, q, k, v):
            asked.append(call.now[0])
            return super().attend(call, q, k, v)

    def normal(site: Site) -> Counting:
        return Counting()

    gains_of(tiny_wan(), scores, all_heads(BAND), normal)
    assert sorted(asked) == [step for step in range(5) for _ in range(2 * LAYERS)]
