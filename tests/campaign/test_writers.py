"""Several writers of one file: readers see whole files, and what one has measured is not replaced by another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals import kernel_bench as bench
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.files import FileError
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.scores import Scores
from tests.campaign.forks import Forks
from tests.campaign.tally import Campaign
from tests.campaign.tiny_runs import CALL, CANDIDATES, numbered_plans, reading_wan
from tests.campaign.verdict import outcome
from tests.evals import synthetic
from tests.kernels.test_bench import row as bench_row


def together(*works: Callable[[], None]) -> list[BaseException]:
    """Runs works in threads; what they raise."""
    raised: list[BaseException] = []

    def kept(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=kept, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_plans_of_many_threads(tmp_path: Path, campaign: Campaign) -> None:
    path, made = tmp_path / "plan.json", numbered_plans()
    made[0].save(path)
    rounds = campaign.many(8, 300)
    done = threading.Event()
    read: list[Plan] = []

    def write(plan: Plan) -> None:
        for _ in range(rounds):
            plan.save(path)

    def look() -> None:
        while not read or not done.is_set():
            read.append(Plan.load(path))

    reader = threading.Thread(target=lambda: failures.extend(together(look)))
    failures: list[BaseException] = []
    reader.start()
    failures += together(*(lambda plan=plan: write(plan) for plan in made))  # type: ignore[misc]
    done.set()
    reader.join()
    assert not failures
    assert read and all(
        any(plan == each for each in made) for plan in (*read[:: max(1, len(read) // 20)], Plan.load(path))
    )
    assert not list(tmp_path.glob(".*.tmp"))
    campaign.count("writers: plan, threads", "tried", rounds * len(made))
    campaign.count("writers: plan, threads", "as before", rounds * len(made))


def test_plans_of_two_processes(tmp_path: Path, warm: Forks, campaign: Campaign) -> None:
    path, made, rounds = tmp_path / "plan.json", numbered_plans(), campaign.many(8, 500)
    made[0].save(path)
    done = threading.Event()
    seen: list[Plan] = []

    def look() -> None:
        while not seen or not done.is_set():
            seen.append(Plan.load(path))
            time.sleep(0.002)

    failures: list[BaseException] = []
    reader = threading.Thread(target=lambda: failures.extend(together(look)))
    reader.start()
    orders = [
        {"work": "save_plans", "folder": str(tmp_path), "arguments": {"number": n, "times": rounds}} for n in (1, 2)
    ]
    endings = warm.together(*orders)
    done.set()
    reader.join()
    assert not failures and all(each.code == each.signal == 0 for each in endings), (failures, endings)
    assert seen and all(plan == made[plan.provenance["number"]] for plan in seen)
    assert not list(tmp_path.glob(".*.tmp"))
    campaign.count("writers: plan, processes", "tried", rounds * 2)
    campaign.count("writers: plan, processes", "as before", rounds * 2)


def test_two_searches_on_one_file_of_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: Campaign
) -> None:
    """Each run that somebody measured is in the file in the end; who comes second is told so, before its work."""
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.02)
    path = tmp_path / "s.safetensors"
    texts = ["a red circle", "a blue square", "a green one"]
    kept: list[int] = []
    stock = Scores.save

    def save(self: Scores, path: Any) -> None:
        stock(self, path)
        kept.append(len(self.runs))

    monkeypatch.setattr(Scores, "save", save)
    pipes = [reading_wan(), reading_wan()]

    def search(pipe: Any) -> None:
        plan_search.search_plan(
            pipe,
            texts,
            call=CALL,
            budget=Budget.density(0.6),
            candidates=CANDIDATES[:4],
            rows=16,
            scores_path=path,
            progress=False,
        )

    raised = together(*(lambda pipe=pipe: search(pipe) for pipe in pipes))  # type: ignore[misc]
    assert len(raised) == 1 and isinstance(raised[0], FileError) and len(str(raised[0])) < 500, raised
    runs = [number for number in kept if number]
    assert runs == sorted(runs), "nobody puts fewer runs in the place of more"
    assert [done.prompt for done in Scores.load(path).runs] == texts
    campaign.count("writers: scores", "tried", 2)
    campaign.count("writers: scores", "as before")
    campaign.count("writers: scores", "refused")


def test_reports_of_two_threads_are_never_mixed(tmp_path: Path, campaign: Campaign) -> None:
    """The three files of a report are of one run, at every moment at which all three are there."""
    folder = tmp_path / "report"
    reports = [synthetic.report({"plan": [1.0 + number]}) for number in (1, 2)]
    marks = ["2.00x", "3.00x"]
    rounds = campaign.many(2, 60)
    reports[0].save(folder)
    mixed: list[list[int]] = []

    def write(number: int) -> None:
        for _ in range(rounds):
            reports[number].save(folder)
            look()

    def look() -> None:
        whole = folder.resolve()
        try:
            texts = [(whole / name).read_text() for name in ("report.json", "report.md", "report.html")]
        except FileNotFoundError:
            return  # it was replaced meanwhile
        of = [[number for number, mark in enumerate(marks) if mark in text] for text in texts]
        if len({tuple(each) for each in of}) > 1:
            mixed.append(sum(of, []))

    raised = together(lambda: write(0), lambda: write(1))
    for error in raised:  # one at a time may be refused, in our words
        assert isinstance(error, (FileError, OSError)) and str(folder) in str(error), error
    assert len(raised) < 2
    texts = [(folder / name).read_text() for name in ("report.json", "report.md", "report.html")]
    assert any(all(mark in text for text in texts) for mark in marks)
    assert read_rows(folder / "report.json")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    campaign.count("writers: report", "tried", rounds * 2)
    campaign.count("writers: report", "as before", rounds * 2)


def test_rows_of_two_benchmarks(tmp_path: Path, campaign: Campaign) -> None:
    path = tmp_path / "rows.jsonl"
    with bench.rows.appending(path) as append:
        append(bench_row(impl="portable"))

        def second() -> None:
            with bench.rows.appending(path) as other:
                other(bench_row(impl="flex"))

        refused = outcome(second)
        assert refused.refused and str(path) in refused.refused, refused
        append(bench_row(impl="hopper"))
    assert [row["impl"] for row in bench.rows.read(path)] == ["portable", "hopper"]
    campaign.count("writers: bench rows", "tried", 2)
    campaign.count("writers: bench rows", "as before")
    campaign.count("writers: bench rows", "refused")
