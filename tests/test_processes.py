"""Prompts of a search and clips of a comparison dealt over processes: what one process finds, to the bit; and one that fails
ends the work in all of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from diffusers_accel.cli.launched import check_one_process, launched
from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.measurement import read_rows, write_rows
from diffusers_accel.evals.report import Report
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Draft, Kept, Method, Patches
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.recorders import ColumnMass
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.processes import OtherProcessFailed
from diffusers_accel.support.terminal import run_command
from tests.search.test_search import METHODS, a_call, a_prompt, search
from tests.test_context_parallel import free_port
from tests.tiny import tiny_wan

PROCESSES, PROMPTS = 2, 3
CANDIDATES = (*METHODS, Method(Patches(), Draft(0.4), rest=Kept(3)))
MASSES = ("mass", "first_mass", "first_mass_samples")
QUALITY = ("psnr", "ssim", "density", "psnr_change", "repeat_difference", "dense_patch_difference")


def how_it_ends(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def report_of(pipe: Any, keep: Path | None = None) -> Report:
    """Of three clips."""
    call = a_call(num_inference_steps=2)
    del call["output_type"]
    subjects: dict[str, Any] = {"draft": ("draft", {"density": 0.4, "dense_steps": 0})}
    subjects["first block"] = ("first_block_cache", {"threshold": 0.3})
    asked: dict[str, Any] = {
        "seeds": (0, 1, 2),
        "metrics": ("psnr", "ssim"),
        "show": 2,
        "floor": False,
        "progress": False,
    }
    return compare(pipe, subjects, [a_prompt(0)], call=call, keep=keep, **asked)


def options_of_search() -> dict[str, Any]:
    return {"prompts": PROMPTS, "candidates": CANDIDATES, "call": a_call(num_inference_steps=3)}


def searches(pipe: Any, rank: int, folder: Path) -> list[str]:
    """Two that fail, and one that goes on where the second has stopped."""
    stock = RunProbe.finished
    path = folder / "several.safetensors" if rank == 0 else None  # only the first looks at where it is to be kept
    options = options_of_search()
    words = [how_it_ends(lambda: search(pipe, path, seed=rank))]

    def fails(probe: RunProbe, *arguments: Any) -> Any:
        if probe._number == 2:  # of the second process, in the round after the first prompt
            raise ValueError("the third prompt is wrong")
        return stock(probe, *arguments)

    RunProbe.finished = fails  # type: ignore[method-assign]
    words.append(how_it_ends(lambda: search(pipe, path, **options)))
    RunProbe.finished = stock  # type: ignore[method-assign]
    words.append(f"{len(Scores.load(path).runs)} prompts" if path else "")
    search(pipe, path, **options).save(folder / f"plan-{rank}.json")
    return words


def comparisons(pipe: Any, rank: int, folder: Path) -> list[str]:
    """One that fails, and the same again."""
    stock = comparing._Session._dense_attention

    def fails(*arguments: Any) -> Any:
        raise ValueError("the first clip is wrong")

    comparing._Session._dense_attention = fails  # type: ignore[method-assign]
    words = [how_it_ends(lambda: report_of(pipe, folder / "kept"))]
    comparing._Session._dense_attention = stock  # type: ignore[method-assign]
    report = report_of(pipe, folder / "kept")
    words.append(", ".join(sorted(path.name for path in (folder / "kept").iterdir() if path.name[0] != ".")))
    words.append(f"{sum(clip.media is not None for clip in report.clips)} shown")
    write_rows(folder / f"report-{rank}.json", report.rows)
    if rank == 0:
        report.save(folder / "report")
    return words


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    plan_search.COST_SECONDS = 0.02
    pipe = tiny_wan()
    if rank == 0:
        search(pipe, folder / "one.safetensors", **options_of_search()).save(folder / "one.json")
        write_rows(folder / "report-of-one.json", report_of(pipe).rows)
    of_launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    of_launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in of_launcher.items()}
    with launched("cpu") as here:
        assert (here.is_first, here.device) == (rank == 0, "cpu"), here
        words = [*searches(pipe, rank, folder), *comparisons(pipe, rank, folder)]
    (folder / f"{rank}.txt").write_text("\n".join(words))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that was found, by one process and by several."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, (free_port(), folder), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def words(done: Path) -> list[list[str]]:
    return [(done / f"{rank}.txt").read_text().split("\n") for rank in range(PROCESSES)]


def test_all_processes_must_search_the_same(words: list[list[str]]) -> None:
    differs = (
        "ValueError: expected the same search in all 2 processes, found {'seed': 0} in process 0 and {'seed': 1} in"
    )
    assert all(found[0].startswith(differs) for found in words)


def test_one_that_fails_ends_the_search_in_all(words: list[list[str]]) -> None:
    assert words[1][1] == "ValueError: the third prompt is wrong"
    assert words[0][1] == "OtherProcessFailed: process 1 of 2 failed: ValueError: the third prompt is wrong"
    assert words[0][2] == "1 prompts", "whose columns the others need, so that it ran alone"


def test_several_processes_find_the_scores_of_one(done: Path) -> None:
    one, several = (Scores.load(done / f"{name}.safetensors") for name in ("one", "several"))
    assert one.sums.keys() == several.sums.keys()
    for name, array in one.sums.items():
        assert np.array_equal(array, several.sums[name]), name
    assert all(one.sums[f"{name}/transformer"].any() for name in MASSES)
    assert one.impacts == several.impacts and len(one.impacts) == len(one.spans)
    assert [run.prompt for run in one.runs] == [run.prompt for run in several.runs]


def test_all_processes_have_the_plan_of_one(done: Path) -> None:
    expected, *plans = (Plan.load(done / f"{name}.json") for name in ("one", "plan-0", "plan-1"))
    for plan in plans:
        assert plan.spans == expected.spans and plan.methods == expected.methods
        assert all(torch.equal(plan.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_one_that_fails_ends_the_comparison_in_all(words: list[list[str]]) -> None:
    assert words[0][3] == "ValueError: the first clip is wrong"
    assert words[1][3] == "OtherProcessFailed: process 0 of 2 failed: ValueError: the first clip is wrong"


def test_the_first_process_keeps_the_clips_of_all(words: list[list[str]], done: Path) -> None:
    clips = ", ".join(f"clip-{number:04}.safetensors" for number in range(3))
    assert words[0][4] == f"{clips}, comparison.json"
    assert [found[5] for found in words] == ["2 shown"] * PROCESSES
    assert not (done / "kept").exists(), "its report was saved"


def test_several_processes_find_the_quality_of_one(done: Path) -> None:
    one, *several = (
        {(row.metric, row.subject, str(row.clip)): row for row in read_rows(done / f"{name}.json")}
        for name in ("report-of-one", "report-0", "report-1")
    )
    for rows in several:
        assert rows.keys() == one.keys()
        quality = [key for key in one if key[0] in QUALITY]
        assert len(quality) >= 2 * 4 + 3
        assert all((rows[key].value, rows[key].note) == (one[key].value, one[key].note) for key in quality)
        told = next(iter(rows.values())).provenance
        assert told["processes"] == 2 and "2 processes ran side by side" in told["protocol"][-1]
    assert "processes" not in next(iter(one.values())).provenance


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_launcher_is_refused_where_it_makes_no_sense(second_of_two: None) -> None:
    with pytest.raises(ValueError, match="calibrate runs in one process, found 2: start it without accelerate launch"):
        check_one_process("calibrate")
    with pytest.raises(ValueError, match="--device: found cpu:0, one device for 2 processes"), launched("cpu:0"):
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OtherProcessFailed("process 0 of 2 failed"), ""),
        (KeyboardInterrupt(), ""),
        (OSError("no space"), "error in process 1: no space\n"),
    ],
)
def test_the_first_process_speaks_for_all_but_of_their_own_errors(
    error: BaseException, said: str, second_of_two: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(arguments: list[str]) -> int:
        raise error

    with pytest.raises(SystemExit):
        run_command("diffusers-accel", ["search"], work)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("first", "rounds"), [(True, [range(1), range(1, 4), range(4, 5)]), (False, [range(3), range(3, 5)])]
)
def test_prompts_run_together_unless_others_need_the_first(first: bool, rounds: list[range]) -> None:
    made: Any = plan_search._Search.__new__(plan_search._Search)
    made.prompts, made.here = ("",) * 5, SimpleNamespace(count=3)
    made.settings = SimpleNamespace(first_run_first=first)
    assert made._rounds(0) == rounds
    assert made._rounds(2) == [range(2, 5)]
    assert made._rounds(5) == []


def test_columns_of_a_run_know_the_first_run_and_no_other() -> None:
    """Whatever others have been added to the scores meanwhile."""
    layout, shape = TokenLayout(2, 2, 2), ModelShape(1, 1, 4)
    sampled: Any = SimpleNamespace(logits=torch.linspace(0, 2, 16).view(1, 2, 8))
    call: Any = SimpleNamespace(place=("transformer", 0), layout=layout)
    kinds = ColumnMass.arrays((), shape, layout, 0)

    def empty() -> dict[str, Any]:
        return {f"{name}/transformer": np.zeros(size, kind) for name, (size, kind) in kinds.items()}

    def seen(before: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        recorder = ColumnMass((), empty(), before, {"transformer": shape})
        recorder.add_rows(call, slice(0, 1), sampled)
        return next(iter(recorder.found().values())), recorder.sums

    alone, first = seen(empty())
    first["first_mass/transformer"][..., 0] += 1
    later, sums = seen(first)
    others = {name: array + (not name.startswith("first")) for name, array in first.items()}
    assert torch.equal(seen(others)[0], later)
    assert not torch.equal(later, alone), "it does know the first"
    assert first["first_mass_samples/transformer"].tolist() == [1]
    assert not sums["first_mass/transformer"].any() and sums["mass/transformer"].any()
