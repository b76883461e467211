"""Damaged files of every kind: the very same result, or a refusal in our words; never another result without a word."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.cli.arguments import read_prompts
from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.kept import KIND as COMPARISON
from diffusers_accel.evals.kept import RUN, Identity
from diffusers_accel.evals.measurement import read_rows, write_rows
from diffusers_accel.evals.metrics import lpips_weights, published
from diffusers_accel.evals.report.render import html, markdown
from diffusers_accel.evals.toy.training.nested import flatten
from diffusers_accel.evals.toy.training.run_state import RunState
from diffusers_accel.evals.vbench import results as vbench
from diffusers_accel.evals.vbench.show import table
from diffusers_accel.files import encode_tensors, load_document, save_document, side_file
from diffusers_accel.forwards import PREDICTORS, RULES, Forwards, Last, Magnitudes, Schedule, schedule
from diffusers_accel.forwards.predictors.taylor import Taylor
from diffusers_accel.forwards.rules.magcache import MagCache
from diffusers_accel.plan import Plan, Span
from diffusers_accel.plan.file import plain, signed
from diffusers_accel.search import plan_search
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.step_options import StepOptions
from diffusers_accel.search.steps import StepChoice
from tests.campaign.mutate import bytes_of, json_of, text_of
from tests.campaign.pickles import crafted, in_archive
from tests.campaign.sound import (
    Subject,
    damage_tensors,
    picture_of_tensors,
    raw_json,
    raw_lines,
    raw_tensors,
    same,
    says_document,
    seal_document,
    seal_json,
    seal_line,
)
from tests.campaign.tally import Campaign
from tests.campaign.tiny_runs import CALL, CANDIDATES, SIZE, every_kind, reading_wan
from tests.campaign.verdict import outcome
from tests.evals import synthetic
from tests.kernels.test_bench import row as bench_row

KINDS = (
    "plan", "plan of windows", "plan of tables", "scores", "cost", "report", "clips", "comparison", "bench rows", "run state",
    "LPIPS cache", "prompts", "VBench", "steps", "magnitudes",
)  # fmt: skip
SLOW = 20.0  # seconds; a damaged file that takes longer is one that hangs

# Sound files, made once


@pytest.fixture(scope="module")
def pipe() -> Any:
    return reading_wan()


@pytest.fixture(scope="module")
def searched(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a real search keeps."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_search, "COST_SECONDS", 0.02)
        plan_search.search_plan(
            pipe,
            ["a red circle", "a blue square"],
            call=CALL,
            budget=Budget.density(0.6),
            candidates=CANDIDATES,
            rows=16,
            scores_path=folder / "s.safetensors",
            progress=False,
        )
    return folder


@pytest.fixture(scope="module")
def compared(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a real comparison of one clip keeps."""
    folder = tmp_path_factory.mktemp("compared")
    compare_again(pipe, folder)
    return folder


# Plans


def write_plan(folder: Path) -> tuple[Path, ...]:
    every_kind().save(folder / "plan.json")
    return folder / "plan.json", *folder.glob("*.safetensors")


def write_windows(folder: Path) -> tuple[Path, ...]:
    """Windows of sigma, symbols of several characters and a step cache."""
    usual = every_kind()
    spans = tuple(
        Span(1 - span.start, 1 - span.stop, {"transformer": tuple(map(longer, span.heads["transformer"]))}, "sigma")
        for span in usual.spans
    )
    methods = {f"m-{symbol}": method for symbol, method in usual.methods.items()}
    replace(usual, methods=methods, spans=spans, forwards=schedule(shares=[0, 0.5])).save(folder / "plan.json")
    return folder / "plan.json", *folder.glob("*.safetensors")


def write_tables(folder: Path) -> tuple[Path, ...]:
    """A step cache by tables, with a predictor and passes by their names."""
    ratios = {"cond": (1.0, 0.98, 0.96), "uncond": (1.0, 0.97, 0.95)}
    forwards = Forwards(MagCache(ratios, 0.24, 3), Taylor(2), branches=("cond", "uncond"))
    replace(every_kind(), forwards=forwards).save(folder / "plan.json")
    return folder / "plan.json", *folder.glob("*.safetensors")


def write_magnitudes(folder: Path) -> tuple[Path, ...]:
    ratios = {"cond": (1.0, 0.98, 0.96), "uncond": (1.0, 0.97, 0.95)}
    spread = {"cond": (0.0, 0.01, 0.01), "uncond": (0.0, 0.02, 0.01)}
    table = Magnitudes(ratios, spread, "wan, 2 layers of 4 heads", (1.0, 0.7, 0.3), {"seed": 3, "prompts": ["a cat"]})
    table.save(folder / "magnitudes.json")
    return (folder / "magnitudes.json",)


def with_defaults(part: Any, kinds: Mapping[str, type]) -> Any:
    """What a rule or predictor says where a field is left out."""
    kind = part.get("kind") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        return part
    usual = {field.name: field.default for field in dataclasses.fields(kinds[kind])}
    return {**{k: v for k, v in usual.items() if v not in (None, dataclasses.MISSING)}, **part}


def longer(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"m-{symbol}" for symbol in row)


def picture_of_plan(plan: Plan) -> Any:
    data = plain(plan)
    return json.loads(json.dumps(data)), picture_of_tensors(plan.tensors)


def plan_says(path: Path) -> Any:
    data = raw_json(path)
    if data is None:
        return None
    reference = data.pop("tensors", None)
    tensors = raw_tensors(path.with_name(reference["file"]))[1] if reference else {}
    for name in ("schedule", "forwards", "correct"):  # null says as much as left out
        data.setdefault(name, None)
    if isinstance(forwards := data["forwards"], dict):
        forwards.setdefault("predictor", {"kind": "last"})
        for name, kinds in (("rule", RULES), ("predictor", PREDICTORS)):
            forwards[name] = with_defaults(forwards.get(name), kinds)
        if forwards.get("branches", 0) is None:
            del forwards["branches"]
    for method in data["heads"]["methods"].values():
        for name, usual in (("order", "fhw"), ("precision", "input")):
            if method.get(name) == usual:
                del method[name]
    return data, tensors


def seal_plan(path: Path, random: Random) -> str:
    """The JSON, or the side file with the reference to it."""
    data = raw_json(path)
    if random.random() < 0.6:
        reference = data.pop("tensors")
        done, data, raw = json_of(data, random)
        data = {**data, "tensors": reference} if isinstance(data, dict) else data
        path.write_bytes(text_of(signed(data) if isinstance(data, dict) and raw is None else data, raw))
        return done
    tensors = Plan.load(path).tensors
    done = damage_tensors(tensors, random)
    reference, side = side_file(path, tensors)
    if reference:
        path.with_name(reference["file"]).write_bytes(side)
    path.write_bytes(text_of(signed({**data, "tensors": reference}), None))
    return done


def use_plan(pipe: Any, plan: Plan) -> None:
    plan.show()
    with patch(pipe, plan) as patched:
        call = {**SIZE, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
        frames = pipe("a red circle", **call, generator=torch.Generator().manual_seed(0)).frames
        assert torch.isfinite(frames).all(), "a plan that was taken gives numbers"
        patched.report().density  # noqa: B018


# What a search keeps


def copied(searched: Path, name: str, folder: Path) -> tuple[Path, ...]:
    return (Path(shutil.copy(searched / name, folder)),)


def picture_by_saving(folder: Path, name: str, says: Callable[[Path], Any], value: Any) -> Any:
    value.save(folder / name)
    return says(folder / name)


def use_scores(cost: Cost, scores: Scores) -> None:
    for budget in (Budget.density(0.6), Budget.sparse_vdit(0.5, 0.5), Budget.speedup(1.01)):
        make_plan(scores, cost, assign(scores, cost, budget), budget).show()


def use_cost(scores: Scores, cost: Cost) -> None:
    use_scores(cost, scores)


def write_steps(folder: Path) -> tuple[Path, ...]:
    choices = tuple(
        StepChoice(Forwards(Schedule(steps=computed), Last(of)), computed, error, measured)
        for computed, of, error, measured in (((0, 4), "velocity", 0.25, True), ((0, 2, 4), "residual", 1e-3, False))
    )
    StepOptions(choices, ("transformer",) * 3 + ("transformer_2",) * 2, 0.875, {"seed": 3}).save(
        folder / "s.steps.json"
    )
    return (folder / "s.steps.json",)


def use_steps(options: StepOptions) -> None:
    for each in options.choices:
        assert options.speedup(0.5, 0.5, each) > 0 and options.computes_first(each, 0.0)


# What reports, benchmarks and training keep


def picture_of_rows(rows: Any) -> Any:
    return [without_none(asdict(row)) for row in rows]


def rows_say(path: Path) -> Any:
    data = raw_json(path)
    if data is None:
        return None
    return [
        without_none(
            {
                **row,
                "provenance": data["provenance"][row["provenance"]],
                "clip": None if row.get("clip") is None else data["clips"][row["clip"]],
            }
        )
        for row in data["measurements"]
    ]


def without_none(data: Any) -> Any:
    return (
        {key: without_none(value) for key, value in data.items() if value is not None}
        if isinstance(data, dict)
        else data
    )


def write_report_rows(folder: Path) -> tuple[Path, ...]:
    write_rows(folder / "report.json", synthetic.report({"plan": [1.2, 1.3, 1.4]}).rows, headline="1.3x")
    return (folder / "report.json",)


def write_bench_rows(folder: Path) -> tuple[Path, ...]:
    with bench.rows.appending(folder / "rows.jsonl") as append:
        for impl in ("portable", "hopper", "flex"):
            append(bench_row(impl=impl))
    return (folder / "rows.jsonl",)


def use_bench_rows(rows: Any) -> None:
    bench.report.markdown(bench.rows.latest(rows))


def write_run_state(folder: Path) -> tuple[Path, ...]:
    run = RunState(folder, "transformer", 1.0, 0)
    run.step = 7
    state = {"count": 7, "values": {"a": torch.arange(6.0)}}
    run.save(
        average=state, optimizer={"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 3)}}, "lr": 0.1}
    )
    return (run.path,)


def load_run_state(path: Path) -> Any:
    run = RunState(path.parent, "transformer", 1.0, 0)
    return run.resume(), run.step, run.seconds


def picture_of_state(value: Any) -> Any:
    held, step, seconds = value
    if held is None:
        return None
    data, tensors = flatten(held)
    return {"step": step, "seconds": seconds, "seed": 0, "values": with_tensors(data, picture_of_tensors(tensors))}


def state_says(path: Path) -> Any:
    said = says_document(path)
    return None if said is None else {**said[0], "values": with_tensors(said[0]["values"], said[1])}


def with_tensors(data: Any, tensors: Any) -> Any:
    """A nested state with each tensor in the place of its name."""
    if isinstance(data, dict):
        return tensors[data["tensor"]] if "tensor" in data else {k: with_tensors(v, tensors) for k, v in data.items()}
    return [with_tensors(each, tensors) for each in data] if isinstance(data, list) else data


def picture_of_clip(record: ClipRecord) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        record.save(Path(folder, "clip.safetensors"))
        return says_document(Path(folder, "clip.safetensors"))


def compare_again(pipe: Any, keep: Path) -> Any:
    """The comparison whose clips `compared` keeps."""
    subjects = {"pattern": "pattern", "draft": ("draft", {"density": 0.5})}
    return compare(pipe, subjects, ["a red circle"], call=CALL, metrics=("psnr",), show=1, progress=False, keep=keep)


def use_clip(pipe: Any, compared: Path, again: Path, record: ClipRecord) -> None:
    """The report that the comparison goes on to make of it."""
    shutil.copy(compared / RUN, again)
    record.save(again / "clip-0000.safetensors")
    found = compare_again(pipe, again)
    html(found), markdown(found), str(found)


SMALL_WEIGHTS = {"conv0.weight": torch.arange(12.0).reshape(3, 4), "conv0.bias": torch.ones(3)}


def write_lpips(folder: Path) -> tuple[Path, ...]:
    cache = published.cache_file("lpips_alex")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(encode_tensors(SMALL_WEIGHTS))
    return (cache,)


def write_prompts(folder: Path) -> tuple[Path, ...]:
    (folder / "prompts.txt").write_text("a red circle\n\na blue square moves\nGrüße, 世界\n", encoding="utf-8")
    return (folder / "prompts.txt",)


def write_vbench(folder: Path) -> tuple[Path, ...]:
    of_each = {name: vbench_dimension(name) for name in ("temporal_flickering", "dynamic_degree")}
    clips = {"a cat-0.mp4": "a cat", "Grüße-0.mp4": "Grüße, 世界"}
    result = vbench.Result(
        standard=False, samples=0, clips=clips, dimensions=of_each, left_out={"scene": "Tag2Text, BERT"}
    )
    save_document(folder / vbench.RESULT, vbench.KIND, result)
    return (folder / vbench.RESULT,)


def vbench_dimension(name: str) -> vbench.DimensionResult:
    return vbench.DimensionResult(
        dimension=name,
        score=0.75,
        clips={"a cat-0.mp4": 0.5, "Grüße-0.mp4": 1.0},
        weights={"RAFT": "0" * 64},
        versions={"vbench": "0.1.5"},
        device="cpu",
        seconds=9.25,
        clips_digest="1" * 64,
        requirements="2" * 64,
    )


def prompts_say(path: Path) -> list[str]:
    return [line.strip() for line in path.read_bytes().decode("utf-8").splitlines() if line.strip()]


@pytest.fixture
def subject(
    request: pytest.FixtureRequest, searched: Path, compared: Path, pipe: Any, folder: Path, monkeypatch: Any
) -> Iterator[Subject]:
    name: str = request.param
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "mutants" / "cache"))
    small = replace(lpips_weights.NETWORKS["alexnet"], tensors_sha256=published.fingerprint(SMALL_WEIGHTS))
    monkeypatch.setitem(lpips_weights.NETWORKS, "alexnet", small)
    scores, cost = Scores.load(searched / "s.safetensors"), Cost.load(searched / "s.cost.json")
    again = folder / "again"
    again.mkdir()
    subjects = {
        "plan": Subject("plan", write_plan, Plan.load, picture_of_plan, plan_says, partial(use_plan, pipe), seal_plan),
        "plan of tables": Subject(
            "plan of tables",
            write_tables,
            Plan.load,
            picture_of_plan,
            plan_says,
            partial(use_plan, pipe),
            seal_plan,
        ),
        "plan of windows": Subject(
            "plan of windows",
            write_windows,
            Plan.load,
            picture_of_plan,
            plan_says,
            partial(use_plan, pipe),
            seal_plan,
        ),
        "scores": Subject(
            "scores",
            partial(copied, searched, "s.safetensors"),
            Scores.load,
            partial(picture_by_saving, again, "s.safetensors", says_document),
            says_document,
            partial(use_scores, cost),
            seal_document,
        ),
        "cost": Subject(
            "cost",
            partial(copied, searched, "s.cost.json"),
            Cost.load,
            partial(picture_by_saving, again, "s.cost.json", raw_json),
            raw_json,
            partial(use_cost, scores),
            seal_json,
        ),
        "magnitudes": Subject(
            "magnitudes",
            write_magnitudes,
            Magnitudes.load,
            partial(picture_by_saving, again, "magnitudes.json", raw_json),
            raw_json,
            lambda table: table.rule().check(table.steps),
            seal_json,
        ),
        "report": Subject("report", write_report_rows, read_rows, picture_of_rows, rows_say, seal=seal_json),
        "clips": Subject(
            "clips",
            partial(copied, compared, "clip-0000.safetensors"),
            ClipRecord.load,
            picture_of_clip,
            says_document,
            partial(use_clip, pipe, compared, again),
            seal_document,
        ),
        "comparison": Subject(
            "comparison",
            partial(copied, compared, RUN),
            lambda path: load_document(path, COMPARISON, Identity),
            lambda value: {"format": COMPARISON.format, "version": COMPARISON.version, **msgspec.to_builtins(value)},
            raw_json,
            seal=seal_json,
        ),
        "bench rows": Subject(
            "bench rows", write_bench_rows, bench.rows.read, lambda rows: rows, raw_lines, use_bench_rows, seal_line
        ),
        "run state": Subject(
            "run state", write_run_state, load_run_state, picture_of_state, state_says, seal=seal_document
        ),
        "LPIPS cache": Subject(
            "LPIPS cache", write_lpips, lambda path: lpips_weights.load("alexnet", "lpips"), picture_of_tensors
        ),
        "prompts": Subject(
            "prompts",
            write_prompts,
            read_prompts,
            lambda texts: texts,
            prompts_say,
        ),
        "VBench": Subject(
            "VBench",
            write_vbench,
            vbench.load_result,
            lambda value: {"format": vbench.KIND.format, "version": vbench.KIND.version, **msgspec.to_builtins(value)},
            raw_json,
            lambda value: None if "VBench on" in table(value) else pytest.fail("no table"),
            seal_json,
        ),
        "steps": Subject(
            "steps",
            write_steps,
            StepOptions.load,
            partial(picture_by_saving, again, "s.steps.json", raw_json),
            raw_json,
            use_steps,
            seal_json,
        ),
    }
    yield subjects[name]


# The test


@pytest.mark.parametrize("subject", KINDS, indirect=True)
def test_mutants(subject: Subject, folder: Path, campaign: Campaign) -> None:
    place = folder / "mutants"
    place.mkdir()
    files = subject.write(place)
    kept = {path: path.read_bytes() for path in files}
    before = subject.picture(subject.load(files[0]))
    subject.use(subject.load(files[0]))
    wrong = []
    for number in range(campaign.many(20 if subject.name == "clips" else 60, 600)):
        random = campaign.random(subject.name, number)
        restore(place, kept)
        done = damage(subject, files, random)
        found = judged(subject, files[0], before)
        part = f"damaged: {subject.name}"
        campaign.count(part, "tried")
        campaign.count(part, found[0])
        if found[0] not in ("as before", "refused"):
            wrong.append(f"{number}: {done}\n    {found[0]}: {found[1]}")
    assert not wrong, f"seed {campaign.seed}, {len(wrong)} of {subject.name}:\n" + "\n".join(wrong[:40])


@pytest.mark.parametrize("subject", KINDS, indirect=True)
def test_pickles(subject: Subject, folder: Path, campaign: Campaign) -> None:
    """None of them is run, in the place of any file."""
    place, sentinel = folder / "mutants", folder / "sentinel"
    place.mkdir()
    files = subject.write(place)
    kept = {path: path.read_bytes() for path in files}
    before = subject.picture(subject.load(files[0]))
    wrong = []
    for name, data in crafted(sentinel).items():
        for content in (data, in_archive(data)):
            for path in files:
                restore(place, kept)
                path.write_bytes(content)
                found = judged(subject, files[0], before)
                if sentinel.exists():
                    wrong.append(f"{name} in {path.name} was run")
                    sentinel.rmdir() if sentinel.is_dir() else sentinel.unlink()
                if found[0] not in ("as before", "refused"):
                    wrong.append(f"{name} in {path.name}: {found}")
                campaign.count("pickles", "tried")
                campaign.count("pickles", found[0])
    assert not wrong, "\n".join(wrong[:20])


def test_pickles_are_pickles(folder: Path) -> None:
    """Each would be run by `pickle`: otherwise the test above shows nothing."""
    sentinel = folder / "sentinel"
    pickles = crafted(sentinel)
    assert len(pickles) == 33
    for name, data in pickles.items():
        with contextlib.suppress(Exception):
            pickle.loads(gzip.decompress(data) if name == "gzip" else data)
        assert sentinel.exists(), name
        sentinel.rmdir() if sentinel.is_dir() else sentinel.unlink()


def test_the_weights_of_lpips_are_arrays(folder: Path, campaign: Campaign) -> None:
    """The one pickle that is read, of published weights: by an unpickler that builds arrays and nothing else."""
    sentinel = folder / "sentinel"
    for name, data in crafted(sentinel).items():
        found = outcome(lambda data=data: lpips_weights.convert(lpips_weights.read_checkpoint(data)))
        assert found.refused and not sentinel.exists(), (name, found)
        campaign.count("pickles", "tried")
        campaign.count("pickles", "refused")


def restore(place: Path, kept: dict[Path, bytes]) -> None:
    for path in place.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


def damage(subject: Subject, files: tuple[Path, ...], random: Random) -> str:
    """Bytes of one of the files, JSON values whose checksum stays, or values under a new checksum."""
    path = random.choice(files)
    how = random.random()
    if subject.seal and how < 0.5:
        return f"sealed again: {subject.seal(files[0], random)}"
    if path.suffix == ".json" and how < 0.7:
        done, data, raw = json_of(json.loads(path.read_bytes()), random)
        path.write_bytes(text_of(data, raw))
        return f"{path.name} {done}"
    done, data = bytes_of(path.read_bytes(), random)
    path.write_bytes(data)
    return f"{path.name}: {done}"


def judged(subject: Subject, path: Path, before: Any) -> tuple[str, str]:
    """A column of the table, and what there is to say."""
    begin = time.monotonic()
    found = outcome(lambda: subject.load(path))
    if found.raw or found.refused:
        return ("raw exceptions", found.raw) if found.raw else ("refused", str(found.refused))
    used = outcome(lambda: subject.use(found.value))
    if used.raw:
        return "raw exceptions", f"in use: {used.raw}"
    if time.monotonic() - begin > SLOW:
        return "raw exceptions", f"took {time.monotonic() - begin:.0f} s"
    picture = subject.picture(found.value)
    if same(picture, before):
        return "as before", ""
    if used.refused:
        return "refused", used.refused
    if subject.says is not None and same(picture, subject.says(path)):
        return "as before", ""
    return "differences", f"loaded {str(picture)[:300]}"
