"""Damaged files of every kind: the very same result, or a refusal in our words; never another result without a word."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from diffusers_accel import cli, patch
from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.measurement import read_rows, write_rows
from diffusers_accel.evals.metrics import lpips_weights
from diffusers_accel.evals.shapes.run_state import RunState
from diffusers_accel.files import encode_tensors
from diffusers_accel.plan import Plan
from diffusers_accel.plan_file import plain
from diffusers_accel.search import plan_search
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import Scores
from tests.campaign.mutate import bytes_of, json_of, text_of
from tests.campaign.sound import (
    Subject,
    damage_tensors,
    picture_of_tensors,
    raw_json,
    raw_tensors,
    same,
    says_document,
    seal_document,
    seal_json,
)
from tests.campaign.tally import Campaign
from tests.campaign.tiny_runs import CALL, CANDIDATES, SIZE, every_kind, reading_wan
from tests.campaign.verdict import outcome
from tests.evals import synthetic
from tests.kernels.test_bench import row as bench_row

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


# Plans


def write_plan(folder: Path) -> tuple[Path, ...]:
    every_kind().save(folder / "plan.json")
    return folder / "plan.json", *folder.glob("*.safetensors")


def picture_of_plan(plan: Plan) -> Any:
    data = plain(plan)
    return json.loads(json.dumps(data)), picture_of_tensors(plan.tensors)


def plan_says(path: Path) -> Any:
    data = raw_json(path)
    reference = data.pop("tensors")
    tensors = raw_tensors(path.with_name(reference["file"]))[1] if reference else {}
    for method in data["methods"].values():
        for name, usual in (("order", "fhw"), ("precision", "input")):
            if method.get(name) == usual:
                del method[name]
    return data, tensors


def seal_plan(path: Path, random: Random) -> str:
    """The JSON, or the side file with the reference to it."""
    data = json.loads(path.read_bytes())
    if random.random() < 0.6:
        reference = data.pop("tensors")
        done, data, raw = json_of(data, random)
        path.write_bytes(text_of({**data, "tensors": reference} if isinstance(data, dict) else data, raw))
        return done
    tensors = Plan.load(path).tensors
    done = damage_tensors(tensors, random)
    from diffusers_accel.files import write_tensors

    path.write_bytes(text_of({**data, "tensors": write_tensors(path, tensors)}, None))
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
    for budget in (Budget.density(0.6), Budget.paper(0.5, 0.5)):
        make_plan(scores, cost, assign(scores, cost, budget), budget).show()


def use_cost(scores: Scores, cost: Cost) -> None:
    use_scores(cost, scores)


# What reports, benchmarks and training keep


def write_report_rows(folder: Path) -> tuple[Path, ...]:
    write_rows(folder / "report.json", synthetic.report({"plan": [1.2, 1.3, 1.4]}).rows, headline="1.3x")
    return (folder / "report.json",)


def write_bench_rows(folder: Path) -> tuple[Path, ...]:
    with bench.rows.appending(folder / "rows.jsonl") as append:
        for impl in ("portable", "hopper", "flex"):
            append(bench_row(impl=impl))
    return (folder / "rows.jsonl",)


def load_bench_rows(path: Path) -> Any:
    rows = bench.rows.read(path)
    bench.report.markdown(bench.rows.latest(rows))
    return rows


def write_run_state(folder: Path) -> tuple[Path, ...]:
    run = RunState(folder, "transformer", 1.0, 0)
    run.step = 7
    run.save(average={"count": 7, "values": {"a": torch.arange(6.0)}}, model={"a": torch.ones(2, 3)})
    return tuple(sorted(path for path in folder.iterdir() if path.stem == "transformer" and path.suffix != ".jsonl"))


def load_run_state(path: Path) -> Any:
    run = RunState(path.parent, "transformer", 1.0, 0)
    return run.resume(), run.step, run.seconds


def picture_of_state(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return picture_of_tensors({"": value})
    if isinstance(value, dict):
        return {str(key): picture_of_state(item) for key, item in value.items()}
    return [picture_of_state(item) for item in value] if isinstance(value, (list, tuple)) else value


SMALL_WEIGHTS = {"conv0.weight": torch.arange(12.0).reshape(3, 4), "conv0.bias": torch.ones(3)}


def write_lpips(folder: Path) -> tuple[Path, ...]:
    cache = lpips_weights.cache_file()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(encode_tensors(SMALL_WEIGHTS))
    return (cache,)


def write_prompts(folder: Path) -> tuple[Path, ...]:
    (folder / "prompts.txt").write_text("a red circle\n\na blue square moves\nGrüße, 世界\n", encoding="utf-8")
    return (folder / "prompts.txt",)


def prompts_say(path: Path) -> list[str]:
    return [line.strip() for line in path.read_bytes().decode("utf-8").splitlines() if line.strip()]


@pytest.fixture
def subject(
    request: pytest.FixtureRequest, searched: Path, pipe: Any, folder: Path, monkeypatch: Any
) -> Iterator[Subject]:
    name: str = request.param
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "mutants" / "cache"))
    monkeypatch.setenv(lpips_weights.OFFLINE, "1")
    monkeypatch.setattr(lpips_weights, "TENSORS_SHA256", lpips_weights.fingerprint(SMALL_WEIGHTS))
    scores, cost = Scores.load(searched / "s.safetensors"), Cost.load(searched / "s.cost.json")
    again = folder / "again"
    again.mkdir()
    subjects = {
        "plan": Subject("plan", write_plan, Plan.load, picture_of_plan, plan_says, partial(use_plan, pipe), seal_plan),
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
        "report": Subject("report", write_report_rows, read_rows, lambda rows: repr(rows), seal=seal_json),
        "bench rows": Subject("bench rows", write_bench_rows, load_bench_rows, lambda rows: rows),
        "run state": Subject("run state", write_run_state, load_run_state, picture_of_state),
        "LPIPS cache": Subject("LPIPS cache", write_lpips, lambda path: lpips_weights.load(), picture_of_tensors),
        "prompts": Subject(
            "prompts",
            write_prompts,
            lambda path: cli._texts("tiny", None, path, for_search=True),
            lambda texts: texts,
            prompts_say,
        ),
    }
    yield subjects[name]


# The test


@pytest.mark.parametrize(
    "subject", ["plan", "scores", "cost", "report", "bench rows", "run state", "LPIPS cache", "prompts"], indirect=True
)
def test_mutants(subject: Subject, folder: Path, campaign: Campaign) -> None:
    place = folder / "mutants"
    place.mkdir()
    files = subject.write(place)
    kept = {path: path.read_bytes() for path in files}
    before = subject.picture(subject.load(files[0]))
    subject.use(subject.load(files[0]))
    wrong = []
    for number in range(campaign.many(60, 600)):
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
