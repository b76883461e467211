"""A search whose prompts are dealt over processes finds what one process finds, to the bit; one that fails ends it in all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from diffusers_accel.methods import Draft, Kept, Method, Patches
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.scores import Scores
from tests.search.test_search import METHODS, search
from tests.tiny import tiny_wan

PROCESSES, PROMPTS = 2, 3
CANDIDATES = (*METHODS, Method(Patches(), Draft(0.4), rest=Kept(3)))
MASSES = ("mass", "first_mass", "first_mass_samples")


def said(*arguments: Any, **options: Any) -> str:
    """How a search that must fail ends."""
    try:
        search(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    plan_search.COST_SECONDS = 0.02
    pipe, stock = tiny_wan(), RunProbe.finished
    options = {"prompts": PROMPTS, "candidates": CANDIDATES}
    if rank == 0:
        search(pipe, folder / "one.safetensors", **options).save(folder / "one.json")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    try:
        words = [said(pipe, folder / f"seed-{rank}.safetensors", seed=rank)]

        def fails(probe: RunProbe, *arguments: Any) -> Any:
            if probe._number == 2:  # of the second process, in the round after the first prompt
                raise ValueError("the third prompt is wrong")
            return stock(probe, *arguments)

        RunProbe.finished = fails  # type: ignore[method-assign]
        words.append(said(pipe, folder / "several.safetensors", **options))
        RunProbe.finished = stock  # type: ignore[method-assign]
        if rank == 0:
            words.append(f"{len(Scores.load(folder / 'several.safetensors').runs)} prompts")
        # Only the first process looks at where it is to be kept.
        search(pipe, folder / "several.safetensors" if rank == 0 else None, **options).save(
            folder / f"plan-{rank}.json"
        )
        (folder / f"{rank}.txt").write_text("\n".join(words))
    finally:
        torch.distributed.destroy_process_group()


def test_processes_find_what_one_finds_and_fail_together(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (tmp_path,), nprocs=PROCESSES)
    words = [(tmp_path / f"{rank}.txt").read_text().split("\n") for rank in range(PROCESSES)]
    differs = "ValueError: expected the same search in all 2 processes, found {'seed': 0} in process 0 and"
    assert all(found[0].startswith(differs) for found in words), words
    assert words[1][1] == "ValueError: the third prompt is wrong"
    assert words[0][1] == "OtherProcessFailed: process 1 of 2 failed: ValueError: the third prompt is wrong"
    assert words[0][2] == "1 prompts", "of which the others need what it recorded"

    one, several = (Scores.load(tmp_path / f"{name}.safetensors") for name in ("one", "several"))
    assert one.sums.keys() == several.sums.keys()
    for name, array in one.sums.items():
        assert np.array_equal(array, several.sums[name]), name
    assert all(one.sums[f"{name}/transformer"].any() for name in MASSES)
    assert one.impacts == several.impacts and len(one.impacts) == len(one.spans)
    assert [done.prompt for done in one.runs] == [done.prompt for done in several.runs]
    expected, *plans = (Plan.load(tmp_path / f"{name}.json") for name in ("one", "plan-0", "plan-1"))
    for plan in plans:
        assert plan.spans == expected.spans and plan.methods == expected.methods
        assert all(torch.equal(plan.tensors[name], tensor) for name, tensor in expected.tensors.items())


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
