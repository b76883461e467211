"""Version 2 of the plan file: symbols of several characters, a section for step caches, and what version 1 becomes."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from diffusers_accel import Plan, cli, patch
from diffusers_accel.arguments import NAMES
from diffusers_accel.cli.options import Setup
from diffusers_accel.cli.plans import read_subjects
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.report.render import html
from diffusers_accel.families import find
from diffusers_accel.forwards import (
    EasyCache,
    Forwards,
    MagCache,
    Magnitudes,
    Schedule,
    Taylor,
    easycache,
    firstblock,
    guidance,
    schedule,
    seacache,
    teacache,
)
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Recipe, Skip, Stored, Stripe
from diffusers_accel.plan import PlanError, Span
from diffusers_accel.plan.span import SYMBOL, new_symbols
from diffusers_accel.search.assign import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import CalibrationRun, Scores
from diffusers_accel.shape import ModelShape
from tests.evals import synthetic
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan, tiny_wan_call

DATA = Path(__file__).parent / "data"
TINY = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
BANDS = [
    Method(AxisOrder(axes), Band((number + 1) / 20)) for axes in ("fhw", "hwf", "whf", "wfh") for number in range(20)
]


def bands(spans: tuple[Span, ...] | None = None, **changes: Any) -> Plan:
    """Three methods, of which one has a long symbol."""
    methods = {".": DENSE, "band-0.5": BANDS[9], "s": Method(select=Skip())}
    rows = ((".", "band-0.5", "s", "."),) * LAYERS
    return replace(Plan("wan", TINY, methods, spans or (Span(0, 1, {"transformer": rows}),)), **changes)


# Symbols


@pytest.mark.parametrize("symbol", ["a", ".", "9", "band-0.5", "x_1", "a" * 16, ".."])
def test_symbols(symbol: str, tmp_path: Path) -> None:
    rows = (((symbol,) * HEADS),) * LAYERS
    plan = Plan("wan", TINY, {symbol: DENSE}, (Span(0, 1, {"transformer": rows}),))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("symbol", ["", " ", "a b", "-a", "_", "a" * 17, "é", "a\n", "a/b"])
def test_other_texts_are_no_symbols(symbol: str) -> None:
    rows = (((symbol,) * HEADS),) * LAYERS
    with pytest.raises(PlanError, match="methods: expected symbols of 1 to 16 characters"):
        Plan("wan", TINY, {symbol: DENSE}, (Span(0, 1, {"transformer": rows}),))


def test_a_row_given_as_a_text_is_one_of_single_characters() -> None:
    methods = {".": DENSE, "s": Method(select=Skip())}
    text, listed = (
        Plan("wan", TINY, methods, (Span(0, 1, {"transformer": rows}),))
        for rows in (("..s.",) * LAYERS, [[".", ".", "s", "."]] * LAYERS)
    )
    assert text == listed and text.spans[0].heads["transformer"][0] == (".", ".", "s", ".")
    assert text.method(0, "transformer", 1, 2).skips


def test_rows_are_written_as_the_longest_symbol_asks(tmp_path: Path) -> None:
    plan = bands()
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert text.count('". band-0.5 s ."') == LAYERS
    assert Plan.load(tmp_path / "plan.json") == plan
    short = Plan.uniform(Recipe((DENSE, BANDS[0])), "wan", TINY)
    short.save(tmp_path / "short.json")
    assert (tmp_path / "short.json").read_text().count('".a.a"') == LAYERS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (". band-0.5 s", r"transformer\[1\]: expected 4 symbols, one per head, found 3 in '\. band-0\.5 s'"),
        (".  band-0.5 s .", r"transformer\[1\]: expected 4 symbols, one per head, found 5"),
        (". band-0.4 s .", r"transformer\[1\]: expected symbols of methods .* found 'band-0\.4'"),
        (".s..", r"transformer\[1\]: expected 4 symbols, one per head, found 1 in '\.s\.\.'"),
        (None, r"transformer\[1\]: expected str, found None"),
    ],
)
def test_a_wrong_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    bands().save(path)
    data = json.loads(path.read_text())
    del data["sha256"]
    data["heads"]["spans"][0]["heads"]["transformer"][1] = row
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"heads\.spans\[0\]\.heads\.{message}"):
        Plan.load(path)


@pytest.mark.parametrize("rows", [None, 3, ("....", 3, "...."), ("....", (".", ".", ".", 1), "....")])
def test_what_is_no_row_is_refused_in_memory(rows: Any) -> None:
    with pytest.raises(PlanError, match=r"spans\[0\]\.heads\.transformer(\[1\])?: expected"):
        Plan("wan", TINY, {".": DENSE}, (Span(0, 1, {"transformer": rows}),))


def test_new_symbols_do_not_end() -> None:
    made = [symbol for symbol, _ in zip(new_symbols(), range(4000))]
    assert len(set(made)) == 4000 and {".", "0"}.isdisjoint(made) and all(map(SYMBOL.fullmatch, made))
    assert made[:2] == ["a", "b"] and made[60:62] == ["9", "aa"]


def test_show_keeps_long_symbols_apart() -> None:
    assert "  layer  0  .        band-0.5 s        ." in bands().show()
    short = Plan.uniform(Recipe((DENSE, BANDS[0])), "wan", TINY)
    assert "  layer  2  .a.a" in short.show()


def scores_of_80() -> Scores:
    """What a search of 80 candidates has measured: nothing is wrong with any of them."""
    models = {"transformer": ModelShape(10, 12, HEAD_DIM)}
    candidates = (DENSE, Method(select=Skip()), *BANDS[:78])
    layout = TokenLayout(1, 1, 1)
    sums = Scores.zeros(models, 2, candidates, layout, 0)
    for name in ("samples", "density", "energy"):
        sums[f"{name}/transformer"][:] = 2
    done = CalibrationRun("a red circle", 10.0, 5.0, {"transformer": (2, 6)}, {"transformer": (2, 6)})
    return Scores("wan", models, layout, candidates, ((0.0, 0.25), (0.25, 1.0)), 0, {}, {}, (done,), sums)


def test_a_search_may_use_more_methods_than_there_are_letters(tmp_path: Path) -> None:
    """80 candidates, each taken by some head."""
    scores = scores_of_80()
    choice = {"transformer": np.arange(240).reshape(2, 10, 12) % 80}
    times = {"transformer": (1.0,) * 80}
    found = Assignment(choice, error=0.1, density=0.5, attention_ratio=0.5, speedup=1.3)
    plan = make_plan(scores, Cost(times, times, "test", 100, 1, 3), found, Budget.density(0.5))
    assert len(plan.methods) == 80 and list(plan.methods)[:4] == [".", "0", "a", "b"] and "aq" in plan.methods
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.spans == plan.spans
    assert [loaded.method(0, "transformer", 1, head) for head in range(4)] == list(scores.candidates[12:16])
    assert sum(loaded.shares().values()) == pytest.approx(1)


def test_uniform_takes_any_number_of_methods() -> None:
    models = {"transformer": ModelShape(1, 80, 16)}
    plan = Plan.uniform(Recipe(tuple(BANDS)), "wan", models)
    assert [plan.method(0, "transformer", 0, head) for head in range(80)] == BANDS


def test_a_plan_of_long_symbols_runs() -> None:
    pipe = tiny_wan()
    short = Plan(
        "wan",
        TINY,
        {".": DENSE, "b": BANDS[9], "s": Method(select=Skip())},
        (Span(0, 1, {"transformer": (".bs.",) * LAYERS}),),
    )
    frames = []
    for plan in (bands(), short):
        with patch(pipe, plan) as patched:
            frames.append(pipe(**tiny_wan_call(output_type="latent")).frames)
            assert patched.report().rows[0]["methods"]["skip"] == 10
    assert frames[0].equal(frames[1])


def test_the_report_shows_long_symbols_in_its_legend() -> None:
    report = synthetic.report({"plan": [1.2, 1.3]})
    plan = bands()
    page = html(replace(report, subjects=(replace(report.subjects[0], plan=plan),)))
    assert "one line of method symbols per layer: . band-0.5 s ., . band-0.5 s ., . band-0.5 s ." in page
    assert ">band-0.5</span>" in page and '<text class="symbol"' not in page


# The section for step caches


def cached(**parameters: Any) -> Plan:
    """A plan that holds only a step cache."""
    return replace(Plan.uniform(DENSE, "wan", TINY), forwards=easycache(**parameters))


EVERY_FORWARDS = [
    easycache(),
    easycache(threshold=0, warm_up=3, predictor="velocity", branches=["uncond"]),
    schedule(steps=[0, 3, 7]),
    schedule(shares=[0, 0.25, 0.5], predictor="taylor", branches=("cond", "uncond")),
    Forwards(Schedule(steps=()), Taylor(3, "residual", "step")),
    seacache(threshold=0.3),
    teacache("wan2.1-t2v-1.3b"),
    teacache(coefficients=(1.0, 0.0), indicator="time", warm_up=2),
    guidance(low=1.1, high=1.2),
    firstblock(threshold=0.1, max_skips=2),
    Forwards(MagCache((1.0, 0.9), made_for="wan, 2 layers of 4 heads", noise=(1.0, 0.5))),
]


@pytest.mark.parametrize("forwards", EVERY_FORWARDS, ids=lambda each: each.label)
def test_forwards_come_back_from_a_file(forwards: Forwards, tmp_path: Path) -> None:
    plan = bands(forwards=forwards)
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert found == plan and found.forwards == forwards
    assert plan != bands() and plan != bands(forwards=easycache(threshold=0.9))
    assert f"\nforwards: {forwards.label}\n" in plan.show()
    assert "forwards" not in bands().show()


@pytest.mark.parametrize("forwards", ["easycache", EasyCache(), {"rule": {"kind": "easycache"}}])
def test_what_is_no_forwards_is_refused(forwards: Any) -> None:
    with pytest.raises(PlanError, match=r"^forwards: expected Forwards\(rule, predictor\) or None, found"):
        bands(forwards=forwards)
    with pytest.raises(ValueError, match="threshold is a relative change, expected 0 or more and finite"):
        bands(forwards=easycache(threshold=float("inf")))


def edited(folder: Path, edit: Any, plan: Plan | None = None) -> Path:
    """A plan file that was changed by hand, its checksum removed."""
    path = folder / "plan.json"
    (plan or bands(forwards=easycache())).save(path)
    data = json.loads(path.read_text())
    edit(data)
    del data["sha256"]
    path.write_text(json.dumps(data))
    return path


WRONG: dict[str, tuple[Any, str]] = {
    "schedule": (
        lambda data: data.update(schedule={"grid": [1]}),
        r"schedule: expected null, found {'grid': \[1\]}: this version knows no schedule; upgrade",
    ),
    "correct": (
        lambda data: data.update(correct=[]),
        r"correct.kind: expected one of \['mean_error'\], found None",
    ),
    "forwards of a list": (lambda data: data.update(forwards=[]), "forwards: expected an object, found"),
    "no rule": (lambda data: data["forwards"].pop("rule"), "forwards: 'rule' is missing"),
    "unknown rule": (
        lambda data: data["forwards"]["rule"].update(kind="magic"),
        r"forwards\.rule\.kind: expected one of .* found 'magic'",
    ),
    "rule without a kind": (
        lambda data: data["forwards"]["rule"].pop("kind"),
        r"forwards\.rule\.kind: expected one of",
    ),
    "threshold of text": (lambda data: data["forwards"]["rule"].update(threshold="1"), r"forwards\.rule.*threshold"),
    "threshold below 0": (
        lambda data: data["forwards"]["rule"].update(threshold=-1),
        r"forwards\.rule.*threshold .*found -1",
    ),
    "unknown key of a rule": (
        lambda data: data["forwards"]["rule"].update(colour=1),
        r"forwards\.rule.*unknown key 'colour'",
    ),
    "branches of a text": (lambda data: data["forwards"].update(branches="cond"), r"forwards\.branches: expected"),
    "no branches": (
        lambda data: data["forwards"].update(branches=[]),
        r"forwards\.branches: expected one name at least",
    ),
    "heads left out": (lambda data: data.pop("heads"), "the plan: 'heads' is missing, expected format, version"),
    "methods at the top": (lambda data: data.update(methods={}), "the plan: .*unknown key 'methods'"),
    "version 3": (lambda data: data.update(version=3), "version: expected 2, found 3; upgrade diffusers-accel"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_section_is_refused_by_its_path(case: str, tmp_path: Path) -> None:
    edit, message = WRONG[case]
    path = edited(tmp_path, edit)
    with pytest.raises(PlanError, match=f"^{path}: {message}"):
        Plan.load(path)


def test_sections_that_are_null_may_be_left_out(tmp_path: Path) -> None:
    plan = bands()

    def leave_out(data: dict[str, Any]) -> None:
        for key in [key for key, value in data.items() if value is None]:
            del data[key]

    path = edited(tmp_path, leave_out, plan)
    assert set(json.loads(path.read_text())) == {
        "format",
        "version",
        "family",
        "models",
        "heads",
        "budget",
        "provenance",
    }
    assert Plan.load(path) == plan


def test_a_plan_of_a_step_cache_alone_leaves_attention_as_it_is(tmp_path: Path) -> None:
    pipe = tiny_wan()
    call = {"output_type": "latent", "num_inference_steps": 6}
    stock = [attention.processor for _, attention in _attention(pipe)]
    cached(warm_up=2, threshold=0.5).save(tmp_path / "plan.json")
    with patch(pipe, "easycache", warm_up=2, threshold=0.5):
        expected = pipe(**tiny_wan_call(**call)).frames
    for plan in (cached(warm_up=2, threshold=0.5), tmp_path / "plan.json"):
        with patch(pipe, plan) as patched:
            assert patched.sites == [] and [each.processor for _, each in _attention(pipe)] == stock
            assert patched.forwards == patched.plan.forwards == easycache(warm_up=2, threshold=0.5)
            assert pipe(**tiny_wan_call(**call)).frames.equal(expected)
            report = patched.report()
            assert report.forwards is not None and report.forwards.predicted > 0 and report.rows == []


def test_a_plan_of_both_scopes_runs_as_their_composition(tmp_path: Path) -> None:
    pipe = tiny_wan()
    call = {"output_type": "latent", "num_inference_steps": 6}
    cache = schedule(steps=[1, 3])
    frames = []
    for subject in ([bands(), cache], bands(forwards=cache)):
        with patch(pipe, subject) as patched:
            frames.append(pipe(**tiny_wan_call(**call)).frames)
            assert patched.plan == bands(forwards=cache) and len(patched.sites) == LAYERS
            assert patched.report().forwards.rows[0]["steps"] == [0, 1, 3, 5]
    assert frames[0].equal(frames[1])
    with patch(pipe, ["easycache", "draft"]) as patched:
        patched.plan.save(tmp_path / "composed.json")
    assert Plan.load(tmp_path / "composed.json").forwards == easycache()


@pytest.mark.parametrize("name", ["plan", "file"])
@pytest.mark.parametrize("other", ["easycache", easycache(), "plan"])
def test_two_of_one_scope_are_refused(name: str, other: Any, tmp_path: Path) -> None:
    pipe = tiny_wan()
    before = dict(vars(pipe.transformer))
    bands(forwards=easycache()).save(tmp_path / "plan.json")
    plan: Any = bands(forwards=easycache()) if name == "plan" else tmp_path / "plan.json"
    if other == "plan":
        with pytest.raises(ValueError, match="a head attends by one method, found 2"):
            patch(pipe, [cached(), plan])
    else:
        with pytest.raises(ValueError, match=r"one step cache decides .*found 2.*replace\(plan, forwards=None\)"):
            patch(pipe, [other, plan])
    with pytest.raises(ValueError, match="a head attends by one method, found 2"):
        patch(pipe, ["draft", plan])
    assert vars(pipe.transformer) == before


def _attention(pipe: Any) -> Any:
    return list(find(pipe)["transformer"][1].self_attention(pipe.transformer))


# What version 1 becomes


def every_kind() -> Plan:
    """What `every-kind-v1.json` was saved of, by the release that wrote version 1."""
    methods = {
        ".": DENSE,
        "0": Method(select=Skip()),
        "a": Method(AxisOrder("hwf"), Band(0.4, text_counts=True)),
        "b": Method(select=Stripe(0.4, calibrated=True, text_counts=True)),
        "c": Method(AxisOrder("wfh"), Stored(0.5)),
        "d": Method(Patches(text_last=False), Draft(0.4), rest=Kept(gated=True)),
        "e": Method(Patches(4, 4, text_last=False), Draft(None, 0.6), precision="int8"),
        "f": Method(select=Band(0.5, False, True), rest=Kept(2)),
    }
    spans = (
        Span(0.0, 0.25, {"transformer": ("....", "....", ".0.0")}),
        Span(0.25, 1.0, {"transformer": ("abdc", "0cef", "a.bd")}),
    )
    provenance = {"prompts": ["a red circle", "Grüße, 世界"], "predicted": {"speedup": 1.25, "density": 0.5}, "seed": 0}
    (side,) = DATA.glob("every-kind-v1.*.safetensors")
    return Plan("wan", TINY, methods, spans, {"kind": "density", "value": 0.5}, provenance, load_file(side))


def two_experts() -> Plan:
    models = {"transformer": ModelShape(2, 3, 64), "transformer_2": ModelShape(1, 3, 64)}
    methods = {
        ".": DENSE,
        "a": Method(Patches(8, 16, text_last=False), Draft(0.3, reselect_every=4), "int8"),
        "Z": Method(AxisOrder("hwf"), Band(0.25, first_frame=False, text_counts=True), "int8_fp8"),
        "1": Method(Patches(8, 16, text_last=False), Draft(0.25, per="row", min_blocks=2), rest=Kept(3)),
        "q": Method(precision="int8"),
    }
    spans = (
        Span(0.0, 0.3, {"transformer": ("...", "..."), "transformer_2": ("...",)}),
        Span(0.3, 1.0, {"transformer": ("aZ1", "q.a"), "transformer_2": ("1qZ",)}),
    )
    return Plan("wan", models, methods, spans, {"kind": "speedup", "value": 1.4}, {"prompts": ["a red circle"]})


@pytest.mark.parametrize(("name", "made"), [("every-kind-v1", every_kind), ("two-experts-v1", two_experts)])
def test_a_file_of_version_1_is_read_and_saved_as_version_2(name: str, made: Any, tmp_path: Path) -> None:
    assert json.loads((DATA / f"{name}.json").read_text())["version"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a release that wrote it could not know today's names
        found = Plan.load(DATA / f"{name}.json")
    assert found == made() and found.forwards is None
    found.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 2 and "methods" not in data and set(data["heads"]) == {"methods", "spans"}
    assert Plan.load(tmp_path / "plan.json") == found


WRONG_1: dict[str, tuple[Any, str]] = {
    "a section of version 2": (lambda data: data.update(forwards=None), "the plan: .*unknown key 'forwards'"),
    "nothing to read of": (lambda data: data.pop("tensors"), "the plan: 'tensors' is missing"),
    "a long symbol": (
        lambda data: data["methods"].update(ab=data["methods"]["."]),
        "methods: expected symbols of one character in version 1, found 'ab'",
    ),
    "a rest": (lambda data: data["methods"]["1"].update(rest={"kind": "drop"}), r"methods\.1: .*unknown key 'rest'"),
    "an interval of 1": (
        lambda data: data["methods"]["1"]["reuse"].update(every=1),
        r"methods\.1: .*refresh_every .*found 1",
    ),
    "a gap": (lambda data: data["spans"][1].update(start=0.5), r"spans\[1\]\.start: expected 0\.3, .* found 0\.5"),
    "a head too few": (
        lambda data: data["spans"][1]["heads"].update(transformer=["aZ1", "q."]),
        r"spans\[1\]\.heads\.transformer\[1\]: expected 3 symbols, one per head, found 2 in 'q\.'",
    ),
    "changed": (lambda data: None, "sha256: expected .* was changed after it was saved"),
}


@pytest.mark.parametrize("case", WRONG_1)
def test_what_is_wrong_in_version_1_is_named_in_its_words(case: str, tmp_path: Path) -> None:
    edit, message = WRONG_1[case]
    data = json.loads((DATA / "two-experts-v1.json").read_text())
    edit(data)
    data["budget"]["value"] = 1.5
    if case != "changed":
        del data["sha256"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=f"^{path}: {message}"):
        Plan.load(path)


# Reports


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that stops before a model is loaded."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_subjects_of_a_report_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bands().save(tmp_path / "small.json")
    bands().save(tmp_path / "a+b.json")
    plan = bands()
    given = ["easycache+draft", "x=easycache+small.json", "easycache+small.json", "a+b.json", "y=a+b.json"]
    assert read_subjects(given) == {
        "easycache+draft": ["easycache", "draft"],
        "x": ["easycache", plan],
        "easycache+small": ["easycache", plan],
        "a+b": plan,
        "y": plan,
    }


def test_subjects_of_a_report_take_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bands().save(tmp_path / "draft:density=0.5.json")  # a file stays a file
    given = [
        "draft:density=0.3:per=row",
        "schedule:steps=0/4/8",
        "schedule:shares=0/.25:predictor=linear",
        "z=easycache:warm_up=4:branches=cond/uncond+draft:patch=8/16:diagonal=false:dense_layers=0",
        "draft:density=0.5.json",
    ]
    assert read_subjects(given) == {
        "draft:density=0.3:per=row": ("draft", {"density": 0.3, "per": "row"}),
        "schedule:steps=0/4/8": ("schedule", {"steps": [0, 4, 8]}),
        "schedule:shares=0/.25:predictor=linear": ("schedule", {"shares": [0.0, 0.25], "predictor": "linear"}),
        "z": [
            ("easycache", {"warm_up": 4, "branches": ["cond", "uncond"]}),
            ("draft", {"patch": (8, 16), "diagonal": False, "dense_layers": 0}),
        ],
        "draft:density=0.5.json": bands(),
    }
    with pytest.warns(FutureWarning, match="'mass' is now called 'top_p'"):
        assert read_subjects(["x=draft:mass=0.9"]) == {"x": ("draft", {"top_p": 0.9})}


def test_every_parameter_can_be_told_by_its_usual_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text: whichever types a named method has."""
    monkeypatch.chdir(tmp_path)
    Magnitudes({"": (1.0, 0.9)}, {"": (0.0, 0.0)}).save("table.json")
    needed = {"schedule": ":steps=0/1", "teacache": ":coefficients=1/0", "magcache": ":table=table.json"}
    for name, make in NAMES.items():
        more = needed.get(name, "")
        for parameter, usual in inspect.signature(make).parameters.items():
            if (value := usual.default) is not None:
                words = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
                ((_, given),) = read_subjects([f"x={name}:{parameter}={words}{more}"]).values()
                assert given.get(parameter) == value and type(given[parameter]) is type(value)


def test_a_composition_is_checked_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "load", lambda *_: pytest.fail("loaded a pipeline"))
    bands(forwards=easycache()).save(tmp_path / "both.json")
    wrong = {
        "draft+pattern": "a head attends by one method, found 2",
        "easycache+easycache": "one step cache decides",
        f"easycache+{tmp_path / 'both.json'}": "one step cache decides",
        "easycache+draght": "found 'draght'; did you mean \"draft\"",
        "easycache+": "found ''",
        "schedule+draft": "steps",
        "schedule": "steps",
    }
    for plan, message in wrong.items():
        assert message in refused(capsys, "report", "toy", "--plan", plan), plan
    assert "two plans are called 'easycache+draft'" in refused(
        capsys, "report", "toy", "--plan", "easycache+draft", "--plan", "easycache+draft"
    )


def test_a_comparison_of_step_caches_shows_them(tmp_path: Path) -> None:
    """A plan of a step cache alone too: its attention is measured, at nothing but the model's own."""
    call = {
        key: value
        for key, value in tiny_wan_call(num_inference_steps=4).items()
        if key not in ("generator", "output_type")
    }
    embeds = {key: call.pop(key) for key in ("prompt_embeds", "negative_prompt_embeds")}
    subjects = {"cache": cached(warm_up=1, threshold=9.0), "both": [schedule(steps=[0]), bands()]}
    found = compare(tiny_wan(), subjects, [embeds], call=call, metrics=("psnr",), floor=False, progress=False)
    cache, both = found.subjects
    assert cache.plan == subjects["cache"] and both.plan == bands(forwards=schedule(steps=[0]))
    page = html(found)
    assert "Forwards: easycache 9, last residual." in page and "Forwards: schedule of 1 steps, last residual." in page
    assert found.provenance["forwards"]["both"] == schedule(steps=[0]).to_json()
    share = found.row("density", "cache")
    assert share is not None and share.value == 0.75  # 3 of 4 steps compute, all heads dense
