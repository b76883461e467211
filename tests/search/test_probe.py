"""The probe's errors and densities: those of the engine that runs beside it on the very same calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel.api import patch
from diffusers_accel.attach.site import Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Pooled, Skip, Stored, Stripe
from diffusers_accel.methods.cycle import mean_age, refresh_share
from diffusers_accel.methods.rest import CacheEntry
from diffusers_accel.methods.steps import decide, selects
from diffusers_accel.plan import Plan
from diffusers_accel.run.launch import run
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import partition
from diffusers_accel.search import plan_search
from diffusers_accel.search.assign import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import AXES
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.measure import projection
from diffusers_accel.search.plan_making import make_plan, plan_tensors
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.recorders.stored_masks import StoredMasks, stored_densities
from diffusers_accel.search.running import run_pipeline
from diffusers_accel.search.schedule import (
    ProbeSchedule,
    ProbeSettings,
    kept_age,
    mask_steps,
    span_index,
)
from diffusers_accel.search.scores import Scores
from tests.search.test_search import a_call, a_prompt
from tests.tiny import (
    HEADS,
    LAYERS,
    POOLED_DIM,
    TEXT_DIM,
    TEXT_TOKENS,
    text_mask,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
)

METHODS = (
    DENSE,
    Method(select=Skip()),
    Method(select=Band(0.4)),
    Method(Patches(), Draft(0.3)),
    Method(AxisOrder("hwf"), Draft(0.3)),
    Method(Patches(), Draft(0.3), "int8"),
    Method(precision="int8"),
    Method(Patches(), Draft(0.3), rest=Kept(3)),
    Method(AxisOrder("hwf"), Band(0.4), rest=Kept(2)),
    Method(Patches(), Draft(0.3, reselect_every=2)),
    Method(Patches(), Draft(0.3), rest=Pooled()),
    Method(AxisOrder("hwf"), Band(0.4), "int8", Pooled()),
    *(Method(AxisOrder(axes), Stored(density)) for axes in AXES for density in (0.3, 0.6)),
)
ROWS = 10_000  # all tokens


def search_with(
    pipe: Any, path: Path, prompts: list[dict[str, Any]], call: dict[str, Any], methods=METHODS, **options
) -> Plan:
    return search_plan(
        pipe, prompts, call=call, budget=options.pop("budget", Budget.density(0.7)), candidates=methods, rows=ROWS,
        scores_path=path, progress=False, span_weights=(1, 1, 1, 1), **options,
    )  # fmt: skip


class Shadow:
    """Runs every candidate for real in all heads that may take it, beside the dense result that goes on."""

    def __init__(self, site: Site, scores: Scores, tensors: dict[str, torch.Tensor], seen: dict[Any, Any]) -> None:
        self.site, self.scores, self.tensors, self.seen = site, scores, tensors, seen
        self.stored = stored_tensors(scores)
        self.memories: dict[Any, LayerCache] = {}

    def attend(self, call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        site, scores = self.site, self.scores
        assert call.now is not None and call.dense is not None
        now = call.now
        span = span_index(scores.spans, *now)
        out = call.dense(q, k, v)
        linear = site.model.family.output_projection(site.model.module, site.name)
        weight = projection(linear, q.shape[2] * q.shape[3], q)
        settings = ProbeSettings(scores.candidates, scores.spans, ROWS, 1, 0)
        for index, method in enumerate(scores.candidates):
            heads = [method] * HEADS
            own = method.select.owners(call, method.order, self.stored)
            if own is not None:
                heads = [method if mine else DENSE for mine in own]
            memory = self.memories.setdefault((index, span, call.branch), LayerCache())
            ran = run(partition(tuple(heads), call, self.tensors, q.device), call, q, k, v, memory)
            if now[0] in ProbeSchedule.of(settings, now[1]).measured:
                keys = call.layout.keys
                whole = (out[0, :keys].flatten(1) @ weight).double().square().sum()
                change = (ran.out - out)[0, :keys]  # [keys, H, D]
                felt = (
                    torch.einsum("shd,hdc->hsc", change, weight.unflatten(0, (HEADS, -1))).double().square().sum((1, 2))
                )
                self.seen.setdefault((span, call.layer, index), []).append((felt / whole).numpy())
                self.seen.setdefault(("density", span, call.layer, index), []).append(float(ran.density))
        return out


def stored_tensors(scores: Scores) -> dict[str, torch.Tensor]:
    """What stored masks read, of all heads, as the runs after the first one see them."""
    return StoredMasks(scores.candidates, {}, scores.sums, scores.models).found()


def all_stored(scores: Scores) -> dict[str, np.ndarray]:
    """A choice in which each head takes its own order's mask, at each density in another span."""
    choice = {}
    tensors, densities = stored_tensors(scores), stored_densities(scores.candidates)
    for name, model in scores.models.items():
        table = np.zeros((len(scores.spans), model.layers, model.heads), int)
        for index, method in enumerate(scores.candidates):
            if isinstance(method.select, Stored):
                owned = tensors[method.select.names(method.order, name)[1]] >= 0
                table[densities.index(method.select.density)][owned.numpy()] = index
        choice[name] = table
    return choice


def difference(after: Scores, before: Scores, kind: str) -> np.ndarray:
    """What the runs between two scores have added to the sums of a kind."""
    return after.sums[f"{kind}/transformer"] - before.sums[f"{kind}/transformer"]


HUNYUAN_CALL = ("height", "width", "num_frames", "num_inference_steps", "output_type", "true_cfg_scale")
PIPES = {
    "wan": (tiny_wan, a_call, a_prompt),
    "hunyuan, padded, two branches": (
        tiny_hunyuan,
        lambda: {name: tiny_hunyuan_call(true_cfg=True)[name] for name in HUNYUAN_CALL},
        lambda seed: hunyuan_prompt(seed),
    ),
}


def hunyuan_prompt(seed: int) -> dict[str, torch.Tensor]:
    """A prompt whose length depends on the seed, and a negative one of another length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
        "prompt_attention_mask": text_mask(7 + 3 * seed),
        "negative_prompt_embeds": torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": torch.zeros(1, POOLED_DIM),
        "negative_prompt_attention_mask": text_mask(4),
    }


@pytest.fixture(scope="module", params=PIPES)
def searched(request, tmp_path_factory):
    """(pipe, call, prompts, scores after one prompt, after two, plan)."""
    make, call, prompt = PIPES[request.param]
    pipe, path = make(), tmp_path_factory.mktemp("scores") / "s.safetensors"
    prompts = [prompt(0), prompt(1)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_search, "COST_SECONDS", 0.05)
        search_with(pipe, path, prompts[:1], call())
        first = Scores.load(path)
        plan = search_with(pipe, path, prompts, call())
    return pipe, call(), prompts, first, Scores.load(path), plan, Cost.load(path.with_suffix(".cost.json"))


def test_errors_and_densities_are_those_of_the_engine(searched):
    """Of the second prompt, for which stored masks were chosen on the first; all rows are sampled."""
    pipe, call, prompts, before, scores, _, _ = searched
    seen: dict[Any, Any] = {}
    tensors = plan_tensors(scores, all_stored(scores))
    run_pipeline(pipe, lambda site: Shadow(site, scores, tensors, seen), prompts[1], call, 1)
    samples, error, density = (difference(scores, before, kind) for kind in ("samples", "error", "density"))
    compared = set()
    for (span, layer, index), found in ((key, value) for key, value in seen.items() if key[0] != "density"):
        method, count = scores.candidates[index], samples[span, layer, :, index]
        ages = (
            kept_age(scores.spans, *_measured_step(scores, span), method.rest.refresh_every)
            if method.rest.remembers
            else 1
        )
        for head in np.flatnonzero(count):
            expected = np.mean([each[head] for each in found])
            mean = error[span, layer, head, index] / count[head] * ages
            assert mean == pytest.approx(expected, rel=2e-3, abs=1e-8), (method.label, span, layer, head)
            compared.add((index, int(head)))
        if count.all():
            expected = np.mean(seen["density", span, layer, index])
            assert (density[span, layer, :, index] / count).mean() == pytest.approx(expected, abs=1e-6), method.label
    stored = {index for index, method in enumerate(METHODS) if isinstance(method.select, Stored)}
    assert {index for index, _ in compared} >= set(range(len(METHODS))) - stored
    for density_ in (0.3, 0.6):  # every head is measured in one order
        own = {head for index, head in compared if METHODS[index].select == Stored(density_)}
        assert own == set(range(HEADS))


def _measured_step(scores: Scores, span: int) -> tuple[int, int]:
    steps = 5
    inside = ProbeSchedule.of(ProbeSettings(METHODS, scores.spans, 2, 1, 0), steps).measured
    return next(step for step in inside if span_index(scores.spans, step, steps) == span), steps


def test_stored_masks_are_not_judged_by_the_prompt_that_chose_them(searched):
    _, _, _, before, scores, _, _ = searched
    stored = [index for index, method in enumerate(METHODS) if isinstance(method.select, Stored)]
    assert not before.samples("transformer")[..., stored].any() and before.sums["levels/transformer"].any()
    assert np.array_equal(before.sums["levels/transformer"], scores.sums["levels/transformer"])
    assert scores.samples("transformer")[2][..., stored].any(-1).all()
    # Each head in its own order only: two densities of one order.
    assert ((scores.samples("transformer")[2][..., stored] > 0).sum(-1) == 2).all()


def test_a_plan_of_all_kinds_round_trips_and_runs(searched, tmp_path):
    """A head for each candidate, as far as there are heads, in both spans that run."""
    pipe, call, prompts, _, scores, _, cost = searched
    choice = all_stored(scores)["transformer"] * 0
    measured = scores.samples("transformer") > 0
    for number, at in enumerate(np.ndindex(choice.shape)):
        options = np.flatnonzero(measured[at])
        if len(options):
            choice[at] = options[number % len(options)]
    kinds = {(METHODS[i].select.kind, METHODS[i].precision, METHODS[i].rest.kind) for i in np.unique(choice)}
    assert {
        ("draft", "input", "drop"),
        ("draft", "input", "kept"),
        ("stored", "input", "drop"),
        ("band", "input", "drop"),
    } <= kinds
    assert ("draft", "int8", "drop") in kinds and ("all", "int8", "drop") in kinds
    assignment = Assignment({"transformer": choice}, 0.1, 0.5, 0.5, 1.2)
    plan = make_plan(scores, cost, assignment, Budget.density(0.5))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert set(plan.provenance["orders"]["axes"]) == set(AXES)
    with patch(pipe, Plan.load(tmp_path / "plan.json")) as patched:
        frames = pipe(**call, **prompts[1], generator=torch.Generator().manual_seed(1)).frames
        realised = patched.report().density
    assert np.isfinite(frames).all()
    dense = scores.density("transformer")
    calls = scores.calls("transformer")
    taken = np.nan_to_num(np.take_along_axis(dense, choice[..., None], -1)[..., 0])
    predicted = (taken.mean((1, 2)) * calls).sum() / calls.sum()
    assert realised == pytest.approx(predicted, abs=0.03)  # drafts of another prompt keep a pair more or less


def test_a_search_takes_stored_reused_and_drafted_heads(searched):
    plan = searched[5]
    assert len(plan.methods) > 3 and plan.provenance["predicted"]["density"] <= 0.7
    for name in plan.tensors:
        assert name.startswith(("stored_bits/", "stored_heads/"))


def test_a_killed_search_of_all_kinds_goes_on_with_an_equal_plan(tmp_path, monkeypatch):
    """Run by run, with all that the first one has chosen; times are the machine's, so the plan is by density."""
    prompts = [a_prompt(seed) for seed in range(3)]
    pipe = tiny_wan()
    at_once = search_with(pipe, tmp_path / "once.safetensors", prompts, a_call())
    for count in (1, 2, 3):
        parts = search_with(pipe, tmp_path / "parts.safetensors", prompts[:count], a_call())
    one, other = (Scores.load(tmp_path / f"{name}.safetensors") for name in ("once", "parts"))
    for name, array in one.sums.items():
        assert np.array_equal(array, other.sums[name]), name
    assert parts.spans == at_once.spans and parts.methods == at_once.methods
    assert parts.tensors.keys() == at_once.tensors.keys()
    assert all(torch.equal(tensor, at_once.tensors[name]) for name, tensor in parts.tensors.items())


def test_what_is_observed_when():
    spans = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0))
    cached = Method(Patches(), Draft(0.3), rest=Kept(3))
    settings = ProbeSettings((DENSE, cached, Method(AxisOrder("hwf"), Stored(0.3))), spans, 2, 1, 0)
    schedule = ProbeSchedule.of(settings, 10)
    assert sorted(schedule.measured) == [0, 2, 4, 8]
    assert schedule.kept == {1: ((2, 1),), 3: ((4, 1),), 7: ((8, 1),)}  # step 0 is its span's only one: it refreshes
    assert schedule.segments == {2: 0, 5: 1, 8: 2}
    assert schedule.observed == 7
    assert ProbeSchedule.of(ProbeSettings((DENSE, cached), spans, 2, 1, 0), 10).segments == {}
    assert mask_steps(2, 3) == {0: 0, 1: 1}
    assert [kept_age(spans, step, 50, 6) for step in (5, 6, 7, 8, 9)] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "reselected"])
def test_ages_and_refreshes_of_a_cycle_are_those_that_a_method_runs_through(kept):
    """The figures of a search, and of expected densities, against the decisions at run time."""
    for every in range(2, 7):
        method = (
            Method(select=Draft(0.3), rest=Kept(every)) if kept else Method(select=Draft(0.3, reselect_every=every))
        )
        ages, held = [], None
        for step in range(20):
            decision = decide(method, 2, held, (step, 20), None, None)
            if selects(method, decision):
                held = CacheEntry(None, step, [step] * 2 if kept else [])
            ages.append(step - held.selected)
        for steps in range(1, 20):
            assert mean_age(every, steps) == pytest.approx(np.mean(ages[:steps]))
            assert refresh_share(every, steps) == pytest.approx(np.mean([age == 0 for age in ages[:steps]]))
        assert refresh_share(every) == 1 / every
        if kept:
            assert method.rest.refresh_share(None) == refresh_share(every)
            assert method.expected_density() == pytest.approx(0.3 + 0.7 * refresh_share(every))
    assert mean_age(3, 0) == refresh_share(3, 0) == 0


def test_padded_prompts_of_two_lengths_in_one_call_are_counted_once(tmp_path):
    """Rows of a batch whose texts differ in length are attended for apart, but it is one call."""
    call = tiny_hunyuan_call(lengths=(7, 13))
    prompt = {name: call.pop(name) for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")}
    call.pop("generator")
    methods = (
        DENSE,
        Method(select=Band(0.4)),
        Method(Patches(), Draft(0.3), rest=Kept(3)),
        Method(select=Stripe(0.4, calibrated=True)),
    )
    search_with(tiny_hunyuan(), tmp_path / "s.safetensors", [prompt], call, methods)
    scores = Scores.load(tmp_path / "s.safetensors")
    assert scores.calls("transformer").sum() == 5 and scores.steps("transformer").sum() == 5
    assert scores.samples("transformer")[2].tolist() == [[[2] * len(methods)] * HEADS] * LAYERS


def test_stored_masks_need_a_second_prompt_and_the_search_says_so(tmp_path, capsys):
    methods = (DENSE, Method(select=Band(0.4)), *(Method(AxisOrder(axes), Stored(0.3)) for axes in ("fhw", "hwf")))
    plan = search_plan(
        tiny_wan(), [a_prompt(0)], call=a_call(), budget=Budget.density(0.7), candidates=methods, rows=32,
        scores_path=tmp_path / "s.safetensors", span_weights=(1, 1, 1, 1),
    )  # fmt: skip
    assert "it takes a second one to judge them" in capsys.readouterr().err
    assert {method.select.kind for method in plan.methods.values()} == {"all", "band"} and not plan.tensors
    ms = Cost.load(tmp_path / "s.cost.json").ms["transformer"]
    assert ms[2] == ms[3] == ms[0]  # of what was never measured nothing is timed
