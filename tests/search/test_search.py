"""The whole search on a tiny real pipeline: what it finds patches, it resumes exactly, and it never leaves a trace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_accel.api import patch
from diffusers_accel.attach.processor import site_of
from diffusers_accel.families import find
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Pooled, Skip, Stored, Stripe
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search, probe
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import candidates, candidates_for
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.recorders import ColumnMass
from diffusers_accel.search.schedule import ProbeSettings, chosen_steps
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape
from tests.tiny import HEADS, LAYERS, TEXT_DIM, tiny_wan, tiny_wan_call, tiny_wan_transformer, tiny_wan_vae

METHODS = (
    DENSE,
    Method(select=Skip()),
    Method(select=Band(0.4)),
    Method(AxisOrder("hwf"), Band(0.4)),
    Method(select=Stripe(0.4, calibrated=True)),
)


KINDS = (
    *METHODS,
    Method(Patches(), Draft(0.4)),
    Method(AxisOrder("hwf"), Draft(0.4), rest=Kept(3)),
    Method(AxisOrder("hwf"), Draft(0.4), rest=Pooled()),
    Method(Patches(), Draft(0.4, reselect_every=2)),
)


def a_prompt(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 8, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
    }


def a_call(**overrides) -> dict:
    call = tiny_wan_call(**overrides)
    for name in ("generator", "prompt_embeds", "negative_prompt_embeds"):
        call.pop(name)
    return call


def search(pipe, path=None, prompts=2, budget=None, **overrides) -> Plan:
    options = {
        "call": a_call(),
        "candidates": METHODS,
        "rows": 64,
        "progress": False,
        "budget": budget or Budget.density(0.6),
    }
    return search_plan(pipe, [a_prompt(i) for i in range(prompts)], scores_path=path, **{**options, **overrides})


def processors(pipe) -> list:
    return [
        module.processor for name, (model, family) in find(pipe).items() for _, module in family.self_attention(model)
    ]


def test_a_searched_plan_patches_and_keeps_its_word(tmp_path):
    pipe = tiny_wan()
    before = processors(pipe)
    quiet = dict(pipe._progress_bar_config)
    plan = search(pipe)
    assert all(a is b for a, b in zip(processors(pipe), before)) and pipe._progress_bar_config == quiet
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    call = {**a_call(), **a_prompt(5)}
    with patch(pipe, plan) as patched:
        frames = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        realised = patched.report().density
    assert np.isfinite(frames).all()
    assert realised == pytest.approx(plan.provenance["predicted"]["density"], abs=1e-6)
    assert realised <= 0.6
    assert plan.budget == {"kind": "density", "value": 0.6}
    assert plan.provenance["search"]["call"]["num_inference_steps"] == 5
    assert len(plan.provenance["prompts"]) == 2


def test_the_probe_returns_the_dense_result():
    """Frames of a calibration run are those of the unpatched pipeline, bit for bit: later layers see no approximation."""
    pipe = tiny_wan()
    seen = []
    stock = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: (seen.append(latents.clone()), stock(latents, **options))[1]
    search(pipe, prompts=1)
    pipe(**a_call(), **a_prompt(0), generator=torch.Generator().manual_seed(0))
    assert len(seen) == 2 and torch.equal(*seen)


def test_scores_of_a_search(tmp_path):
    search(tiny_wan(), tmp_path / "s.safetensors", dense_steps=0.2)
    scores = Scores.load(tmp_path / "s.safetensors")
    assert scores.spans == ((0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.6), (0.6, 1.0))
    error = scores.error("transformer")
    assert error.shape == (5, LAYERS, HEADS, len(METHODS))
    # Step middles are at .1, .3, .5, .7, .9, so two spans hold no step; a step has two branches, and there are two prompts.
    assert scores.calls("transformer").tolist() == [0, 2, 0, 4, 4]
    assert scores.samples("transformer")[:, 0, 0].T.tolist() == [[0, 4, 0, 4, 4]] * len(METHODS)
    measured = error[[1, 3, 4]]
    assert (measured[..., 0] == 0).all() and (measured[..., 1:] > 0).all() and np.isnan(error[0]).all()
    stripe = next(method for method in METHODS if method.select.records == "column mass")
    heads = np.ones((LAYERS, HEADS), bool)
    (mass,) = ColumnMass.tensors(METHODS, scores.sums, "transformer", stripe, heads).values()
    assert mass.shape == (LAYERS, HEADS, 3, 16)
    assert (mass.sum((2, 3)) * 16).numpy() == pytest.approx(
        1.0, abs=1e-5
    )  # 16 columns; probabilities over all keys add up to 1
    assert 0 < scores.attention_share < 1
    density = scores.density("transformer")[1, 0, 0]
    assert density[:2].tolist() == [1.0, 0.0] and ((density[2:] > 0.3) & (density[2:] < 0.7)).all()
    cost = Cost.load(tmp_path / "s.cost.json")
    assert len(cost.ms["transformer"]) == len(METHODS) and cost.tokens == 768 and cost.rounds >= 3


def test_a_killed_search_goes_on_with_identical_scores(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    search(tiny_wan(), whole, prompts=3)
    calls = 0
    stock = RunProbe.measure

    def dies(self, *args):
        nonlocal calls
        calls += 1
        if (
            calls > 2 + 18 + 10
        ):  # two of the trial, 3 steps x 2 branches x 3 layers of the first run, some of the second
            raise KeyboardInterrupt
        return stock(self, *args)

    pipe = tiny_wan()
    before = processors(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(RunProbe, "measure", dies)
        with pytest.raises(KeyboardInterrupt):
            search(pipe, parts, prompts=3)
    assert all(a is b for a, b in zip(processors(pipe), before))
    assert len(Scores.load(parts).runs) == 1
    search(pipe, parts, prompts=3)
    one, other = Scores.load(whole), Scores.load(parts)
    assert [done.prompt for done in one.runs] == [done.prompt for done in other.runs]
    for name, array in one.sums.items():
        assert np.array_equal(array, other.sums[name]), name
    assert one.impacts == other.impacts and len(one.impacts) == 4


def test_another_budget_and_more_prompts_reuse_the_runs(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    pipe = tiny_wan()
    search(pipe, path)
    ran = []
    monkeypatch.setattr(
        RunProbe, "finished", lambda self, *args, stock=RunProbe.finished: ran.append(1) or stock(self, *args)
    )
    tighter = search(pipe, path, budget=Budget.density(0.3))
    assert not ran and tighter.budget["value"] == 0.3
    search(pipe, path, prompts=3)
    assert len(ran) == 1 and len(Scores.load(path).runs) == 3
    scores, cost = Scores.load(path), Cost.load(tmp_path / "s.cost.json")
    budget = Budget.density(0.5)
    assert make_plan(scores, cost, assign(scores, cost, budget), budget) == make_plan(
        scores, cost, assign(scores, cost, budget), budget
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "with seed = 0, this search has 1"),
        ({"call": a_call(guidance_scale=4.0)}, "with call.guidance_scale = 3.0, this search has 4.0"),
        ({"rows": 32}, "with rows = 64"),
        (
            {"candidates": METHODS[:3]},
            r"with candidates = \['dense', 'skip', .* this search has \['dense', 'skip', 'band 0.4'\]",
        ),
        ({"spans": (0.5,)}, "with spans ="),
        ({"prompts": 1}, "holds 2 prompts, this search has 1"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path_factory, change, message, finished_search):
    with pytest.raises(ValueError, match=message):
        search(finished_search[0], finished_search[1], **change)


def test_other_weights_are_refused(finished_search):
    for part, other, message in (
        ("transformer", tiny_wan_transformer(seed=3), "with weights ="),
        ("vae", tiny_wan_vae(seed=3), "with components ="),
    ):
        pipe = tiny_wan()
        setattr(pipe, part, other)
        with pytest.raises(ValueError, match=message):
            search(pipe, finished_search[1])


@pytest.fixture(scope="module")
def finished_search(tmp_path_factory):
    pipe, path = tiny_wan(), tmp_path_factory.mktemp("scores") / "s.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_search, "COST_SECONDS", 0.05)
        search(pipe, path)
    return pipe, path


@pytest.mark.parametrize(
    ("of", "where"), [(RunProbe, "_measure_row"), (RunProbe, "finished"), (ColumnMass, "add_rows")]
)
def test_an_exception_leaves_the_pipeline_as_it_was(of, where, monkeypatch):
    pipe = tiny_wan()
    before, call = processors(pipe), {**a_call(), **a_prompt(0)}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    def fails(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(of, where, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            search(pipe)
    assert all(a is b for a, b in zip(processors(pipe), before))
    assert all(site_of(processor) is None for processor in processors(pipe))
    assert np.array_equal(pipe(**call, generator=torch.Generator().manual_seed(0)).frames, expected)


def test_two_experts_are_searched_under_one_clock(tmp_path):
    pipe = tiny_wan(experts=2)
    plan = search(pipe, tmp_path / "s.safetensors", prompts=1)
    scores = Scores.load(tmp_path / "s.safetensors")
    calls = {name: scores.calls(name) for name in scores.models}
    assert set(calls) == {"transformer", "transformer_2"} and sum(map(sum, calls.values())) == 10
    for name in calls:  # each expert is measured in the spans where it runs, and stays dense elsewhere
        assert ((scores.samples(name)[:, 0, 0, 0] > 0) <= (calls[name] > 0)).all() and scores.samples(name).any()
    with patch(pipe, plan) as patched:
        pipe(**a_call(), **a_prompt(0))
        assert patched.report().density == pytest.approx(plan.provenance["predicted"]["density"], abs=1e-6)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_pipelines_give_nearly_the_same_scores(how, tmp_path):
    search(tiny_wan(), tmp_path / "fp32.safetensors", prompts=1, candidates=KINDS)
    if how == "bfloat16":
        search(tiny_wan().to(torch.bfloat16), tmp_path / "low.safetensors", prompts=1, candidates=KINDS)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            search(tiny_wan(), tmp_path / "low.safetensors", prompts=1, candidates=KINDS)
    full, low = (
        Scores.load(tmp_path / name).error("transformer")[1:] for name in ("fp32.safetensors", "low.safetensors")
    )
    assert (low[..., 0] == 0).all()
    # q, k and v carry 8 bits: a few parts in a hundred of an error that is itself a difference of rounded numbers.
    assert (np.isnan(low) == np.isnan(full)).all()
    assert np.nanmax(np.abs(low - full)) < 0.1 * np.nanmax(full)


def test_memory_is_bounded_and_chunks_do_not_change_the_scores(tmp_path, monkeypatch):
    kinds = (*KINDS, Method(AxisOrder("hwf"), Stored(0.4)), Method(Patches(), Draft(0.4), "int8"))
    search(tiny_wan(), tmp_path / "together.safetensors", candidates=kinds)
    monkeypatch.setattr(probe, "LEAST_BYTES", 1)
    search(tiny_wan(), tmp_path / "one.safetensors", candidates=kinds)
    together, one = (Scores.load(tmp_path / name) for name in ("together.safetensors", "one.safetensors"))
    for name, array in together.sums.items():
        assert one.sums[name] == pytest.approx(array, rel=1e-3, abs=1e-9), name
    # Wan 14B at 720p: one head of 40 at a time.
    assert probe.head_bytes(75600, 128, 256, len(candidates())) < 0.72 * 2**30
    settings = ProbeSettings(candidates(), ((0.0, 1.0),), 256, 1, 0)
    monkeypatch.undo()
    assert probe.measuring_bytes(75600, ModelShape(40, 40, 128), settings, torch.device("cpu")) < 1.4 * 2**30


@pytest.mark.parametrize(("gib", "expected"), [(141, 8.8), (80, 5.0), (12, 1.0)])
def test_a_large_gpu_measures_more_heads_at_a_time(gib, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    assert probe.together_bytes(torch.device("cuda")) / 2**30 == pytest.approx(expected, abs=0.02)


def test_steps_are_chosen_inside_their_spans():
    spans = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0))
    assert sorted(chosen_steps(spans, 10, 1)) == [0, 2, 4, 8]
    assert sorted(chosen_steps(spans, 50, 2)) == [1, 3, 7, 12, 18, 26, 35, 45]
    assert sorted(chosen_steps(spans, 4, 3)) == [0, 1, 2, 3]


def test_default_candidates():
    methods = candidates((0.2, 0.4), methods=["pattern", "draft", "cached"])
    assert [method.label for method in methods] == [
        "dense", "skip", "band 0.2", "band 0.4", "band hwf 0.2", "band hwf 0.4", "stripe calibrated 0.2", "stripe calibrated 0.4",
        "draft 8x16 0.2", "draft 8x16 0.4", "draft hwf 0.4", "draft 8x16 0.4, cached 3",
    ]  # fmt: skip
    stored = candidates((0.2, 0.4), methods=["reordered"])[1:]
    assert [(m.order.label, m.select) for m in stored] == [
        (axes, Stored(0.4)) for axes in ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
    ]
    assert candidates()[0] == DENSE and len(candidates()) == 50
    assert not any(isinstance(method.select, Stripe) for method in candidates(stripes=False))
    with pytest.raises(ValueError, match="expected some of pattern, draft, cached, reordered, history, found 'magic'"):
        candidates(methods=["magic"])


def test_quantized_candidates_are_for_devices_that_have_kernels_for_them():
    assert all(method.precision == "input" for method in candidates_for(tiny_wan()))
    quantized = [method for method in candidates(quantized=True) if method.precision == "int8"]
    assert Method(precision="int8") in quantized
    assert {method.select.kind for method in quantized} == {"all", "draft", "stored"}
    assert {method.rest.kind for method in quantized} == {"drop", "kept"}
    assert not any(isinstance(m.select, Stored) and m.precision == "input" for m in candidates(quantized=True))


@pytest.mark.parametrize(("capability", "found"), [(89, {"input", "int8"}), (90, {"input"})])
def test_on_hopper_eight_bits_are_no_candidates_until_measured(capability, found, monkeypatch):
    pytest.importorskip("triton", reason="without Triton no kernel of a GPU says anything")
    pipe = tiny_wan()
    pipe.transformer.to(torch.bfloat16)
    monkeypatch.setattr("diffusers_accel.kernels.hardware.capability", lambda device: capability)
    monkeypatch.setattr("diffusers_accel.kernels.ranking.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda", 63))
    assert {method.precision for method in candidates_for(pipe)} == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": {**a_call(), "generator": None}}, '"generator" is set by the search'),
        ({"prompts": 0}, "at least one calibration prompt"),
        ({"candidates": METHODS[1:]}, "must be dense"),
        ({"candidates": (*METHODS, METHODS[2])}, "given twice"),
        (
            {"candidates": (*METHODS, Method(Patches(), Draft(0.3), rest=Kept(gated=True)))},
            "'draft 8x16 0.3, cached gated' cannot be searched: a gate is not searched",
        ),
        ({"spans": (0.5, 0.2)}, "ascending"),
        ({"dense_steps": 1.5}, r"in \[0, 1\]"),
        ({"probe_steps": 0}, "probe_steps: expected a whole number in 1 to"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(options, message):
    pipe = tiny_wan()
    pipe.transformer.forward = None  # nothing may be generated
    with pytest.raises(ValueError, match=message):
        search(pipe, **options)


def test_estimate_and_progress_are_shown(capsys):
    search(tiny_wan(), progress=True, prompts=1)
    shown = capsys.readouterr()
    assert "768 tokens, 5 candidates; 0 of 1 prompts" in shown.err and "to go" in shown.err and "MiB" in shown.err
    assert "plan: expected" in shown.err and shown.out == ""
    search(tiny_wan(), prompts=1)
    assert capsys.readouterr().err == ""
