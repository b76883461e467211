"""What a search has measured is never lost: not to another search, not to Ctrl-C, not to a path that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffusers_accel.files import FileError, WriteError
from diffusers_accel.plan import Plan
from diffusers_accel.search import keeping, plan_search
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.gates import calibrate_gates
from diffusers_accel.search.keeping import Keeper, cached_scores, check_places
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.scores import Scores
from diffusers_accel.support.interrupted import Interrupted
from tests.search.test_assign import random_scores
from tests.search.test_gates import tiny_plan
from tests.search.test_search import a_call, a_prompt, processors, search
from tests.tiny import tiny_wan

WEIGHTS = (1, 1, 1, 1)  # so that no span is measured

SEARCHES = """
import sys, time
from pathlib import Path
from diffusers_accel.search import plan_search
from diffusers_accel.search.probe import RunProbe
from tests.search.test_search import search
from tests.tiny import tiny_wan

plan_search.COST_SECONDS = 0.05
folder, stock = Path(sys.argv[1]), RunProbe.finished

def finished(self, *arguments):
    (folder / "measured").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    return stock(self, *arguments)

RunProbe.finished = finished
search(tiny_wan(), folder / "s.safetensors", prompts=2, span_weights=(1, 1, 1, 1))
"""


def ran(*prompts: str, impacts: int = 0) -> Scores:
    scores = random_scores()
    done = tuple(msgspec.structs.replace(scores.runs[0], prompt=prompt) for prompt in prompts)
    span = {name: (1.0,) * model.layers for name, model in scores.models.items()}
    return replace(scores, runs=done, impacts=(span,) * impacts)


def of_this_search(scores: Scores) -> None:
    if scores.runs[0].prompt != "a":
        raise ValueError("another search's")


def stopped_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the run of that number, from 0."""
    stock = RunProbe.finished
    count = iter(range(number + 1))

    def finished(self: RunProbe, *arguments: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return stock(self, *arguments)

    monkeypatch.setattr(RunProbe, "finished", finished)


def test_a_second_process_is_refused_before_it_measures_anything(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SEARCHES, str(tmp_path)], env=environment)
    try:
        while not (tmp_path / "measured").exists() and process.poll() is None:
            time.sleep(0.05)
        pipe = tiny_wan()
        pipe.transformer.forward = None  # nothing may be generated
        with pytest.raises(FileError, match=r"s\.safetensors: another search measures into it; wait for its end"):
            search(pipe, tmp_path / "s.safetensors", prompts=2, span_weights=WEIGHTS)
        (tmp_path / "link.safetensors").symlink_to("s.safetensors")
        with pytest.raises(FileError, match="another search measures into it"):
            search(pipe, tmp_path / "link.safetensors", prompts=2, span_weights=WEIGHTS)
        (tmp_path / "go").touch()
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert len(Scores.load(tmp_path / "s.safetensors").runs) == 2


def test_saving_never_leaves_fewer_runs(tmp_path: Path) -> None:
    """Somebody copies a file there, or a file system without locks lets two searches in."""
    path = tmp_path / "s.safetensors"
    keeper = Keeper(path, of_this_search, 3, 2)
    assert keeper.load() is None
    assert len(keeper.save(ran("a")).runs) == 1
    ran("a", "b").save(path)
    adopted = keeper.save(ran("a", "b"))
    assert len(adopted.runs) == 2 and "2 of 3 prompts are kept" in keeper.kept()
    ran("a", "b", "c", impacts=1).save(path)
    adopted = keeper.save(ran("a", "b", "c"))
    assert len(adopted.impacts) == 1 and len(Scores.load(path).impacts) == 1
    assert f"3 of 3 prompts and 1 of 2 spans are kept in {path}" == keeper.kept()
    ran("a").save(path)
    assert len(keeper.save(ran("a", "b")).runs) == 2, "fewer than here are replaced"
    path.unlink()
    keeper.save(ran("a", "b"))
    assert len(Scores.load(path).runs) == 2


@pytest.mark.parametrize("theirs", ["another search", "no scores"])
def test_a_file_of_something_else_is_left_and_the_runs_put_beside_it(theirs: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    keeper = Keeper(path, of_this_search, 3, 2)
    keeper.save(ran("a"))
    if theirs == "another search":
        ran("x").save(path)
    else:
        path.write_text("notes")
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"somebody put another file there .* go on with that as scores_path"):
        keeper.save(ran("a", "b"))
    (aside,) = (each for each in tmp_path.glob("*.safetensors") if each != path)
    assert path.read_bytes() == before and len(Scores.load(aside).runs) == 2


def test_a_search_takes_over_what_another_has_measured_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "s.safetensors"
    search(tiny_wan(), whole, prompts=2, span_weights=WEIGHTS)
    ran = []
    stock = RunProbe.finished

    def finished(self: RunProbe, *arguments: Any) -> Any:
        ran.append(1)
        path.write_bytes(whole.read_bytes())
        return stock(self, *arguments)

    monkeypatch.setattr(RunProbe, "finished", finished)
    plan = search(tiny_wan(), path, prompts=2, span_weights=WEIGHTS)
    assert len(ran) == 1 and path.read_bytes() == whole.read_bytes() and len(plan.provenance["prompts"]) == 2


def test_a_plan_file_is_written_with_its_scores_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = search(tiny_wan(), None, prompts=1, span_weights=WEIGHTS, out="new/plan.json", progress=True)
    assert Plan.load(tmp_path / "new" / "plan.json") == plan
    assert len(Scores.load(tmp_path / "new" / "plan.scores.safetensors").runs) == 1
    assert Cost.load(tmp_path / "new" / "plan.scores.cost.json").tokens == 768
    assert f"kept in {tmp_path / 'new' / 'plan.scores.safetensors'}" in capsys.readouterr().err


def test_a_search_that_names_no_file_is_kept_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stopped_after(1, patched)
        with pytest.raises(Interrupted, match="1 of 2 prompts"):
            search(tiny_wan(), prompts=2, span_weights=WEIGHTS)
    (path,) = (cache / "diffusers_accel" / "searches").glob("*.scores.safetensors")
    assert len(Scores.load(path).runs) == 1
    search(tiny_wan(), prompts=2, span_weights=WEIGHTS)
    assert len(Scores.load(path).runs) == 2
    assert not [each for each in path.parent.glob("*.safetensors") if each != path]


def test_the_cache_tells_searches_apart_and_needs_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached_scores({"seed": 0}) == cached_scores({"seed": 0}) != cached_scores({"seed": 1})
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_scores({}).parent == tmp_path / ".cache" / "diffusers_accel" / "searches"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"name the plan file \(out=\.\.\.\)"):
        cached_scores({})


def test_ctrl_c_says_what_is_kept_and_leaves_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pipe = tmp_path / "s.safetensors", tiny_wan()
    before = processors(pipe)
    with monkeypatch.context() as patched:
        stopped_after(0, patched)
        with pytest.raises(Interrupted, match="nothing is kept, as no prompt was finished"):
            search(pipe, path, prompts=2)
    assert not path.exists()
    with monkeypatch.context() as patched:
        patched.setattr(plan_search, "impacts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as stopped:
            search(pipe, path, prompts=1)
    assert isinstance(stopped.value, Interrupted)
    # No step falls into the first span, which takes nothing to measure.
    assert stopped.value.kept == f"1 of 1 prompts and 1 of 4 spans are kept in {path}"
    assert str(stopped.value).endswith("Call search_plan again with the same arguments and it goes on from there")
    assert processors(pipe) == before
    monkeypatch.setattr("diffusers_accel.search.gates.Watch.gate", lambda *_: None)
    monkeypatch.setattr(
        "diffusers_accel.search.gates.Watch.attend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(Interrupted, match="nothing is kept, .* Call calibrate_gates again"):
        calibrate_gates(pipe, tiny_plan(), [a_prompt(0)], call=a_call(), progress=False)
    assert processors(pipe) == before


def test_an_interrupted_pipeline_frees_what_it_offloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, freed = tiny_wan(), []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(self))
    stopped_after(0, monkeypatch)
    monkeypatch.setattr(RunProbe, "attend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        search(pipe, tmp_path / "s.safetensors", prompts=1)
    assert len(freed) == 2, "after the trial, and after the interrupted run"


def same_by_name(folder: Path) -> tuple[Any, Any]:
    return folder / "plan.json", folder / "plan.json"


def same_by_spelling(folder: Path) -> tuple[Any, Any]:
    return folder / "plan.json", f"{folder}/sub/../plan.json"


def same_by_symlink(folder: Path) -> tuple[Any, Any]:
    (folder / "s.safetensors").symlink_to("plan.json")
    return folder / "plan.json", folder / "s.safetensors"


def same_by_hard_link(folder: Path) -> tuple[Any, Any]:
    (folder / "plan.json").touch()
    os.link(folder / "plan.json", folder / "s.safetensors")
    return folder / "plan.json", folder / "s.safetensors"


def same_as_the_times(folder: Path) -> tuple[Any, Any]:
    return folder / "s.cost.json", folder / "s.safetensors"


@pytest.mark.parametrize(
    "make", [same_by_name, same_by_spelling, same_by_symlink, same_by_hard_link, same_as_the_times]
)
def test_equal_paths_of_plan_and_scores_are_refused(make: Any, tmp_path: Path) -> None:
    pipe = tiny_wan()
    pipe.transformer.forward = None  # nothing may be generated
    out, scores = make(tmp_path)
    with pytest.raises(ValueError, match="scores_path: the (scores|kernel times .*) and the plan would be one file"):
        search(pipe, scores, out=out)


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ({"scores_path": ""}, ValueError, "scores_path: expected the path of a file, found ''"),
        ({"scores_path": "a\0.safetensors"}, ValueError, "scores_path: expected the path of a file"),
        ({"scores_path": "folder.safetensors"}, WriteError, "it is a folder"),
        ({"scores_path": "pipe.safetensors"}, WriteError, "it is a device, pipe or socket"),
        ({"scores_path": "file/s.safetensors"}, WriteError, "file is a file, not a folder"),
        ({"scores_path": "s.json"}, ValueError, r'scores_path: expected a file name that ends in "\.safetensors"'),
        ({"scores_path": 3}, TypeError, "scores_path: expected the path of a file, found 3"),
        ({"scores_path": b"s.safetensors"}, TypeError, "scores_path: expected the path of a file, found b's"),
        ({"scores_path": "t.safetensors"}, WriteError, r"t\.cost\.json: cannot be written: it is a folder"),
        ({"out": "plan.txt"}, ValueError, r'out: expected a file name that ends in "\.json"'),
        ({"out": "plan.json"}, WriteError, "it is a folder"),
        ({"out": "file/plan.json"}, WriteError, "file is a file, not a folder"),
        ({"out": f"{'p' * 300}.json"}, WriteError, "cannot be written: File name too long"),
        ({"out": True}, TypeError, "out: expected the path of a file, found True"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_anything_runs(
    places: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.safetensors", "plan.json", "t.cost.json"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "file").touch()
    pipe = tiny_wan()
    pipe.transformer.forward = None  # nothing may be generated
    with pytest.raises(error, match=message):
        search(pipe, places.get("scores_path"), out=places.get("out"))


def test_places_do_not_depend_on_where_the_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real.safetensors").touch()
    (tmp_path / "s.safetensors").symlink_to("real.safetensors")
    assert check_places("plan.json", None) == (tmp_path / "plan.json", tmp_path / "plan.scores.safetensors")
    assert check_places(None, "s.safetensors") == (None, tmp_path / "real.safetensors")
    assert check_places(None, None) == (None, None)
    assert keeping.cost_file(tmp_path / "s.safetensors") == tmp_path / "s.cost.json"
