"""Calls spread over CPU threads: each alone on its thread, in the caller's mode, and PyTorch's own settings as before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from diffusers_accel.kernels.cpu_workers import run_all


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_call_runs_once_on_a_thread_of_its_own() -> None:
    seen: list[tuple[int, str, int]] = []
    meet = threading.Barrier(2, timeout=30)  # two calls that wait for each other can only run side by side

    def call(index: int) -> None:
        if index < 2:
            meet.wait()
        seen.append((index, threading.current_thread().name, torch.get_num_threads()))

    run_all([lambda i=index: call(i) for index in range(9)])
    assert sorted(index for index, _, _ in seen) == list(range(9))
    assert all(name.startswith("diffusers_accel") and threads == 1 for _, name, threads in seen)
    assert torch.get_num_threads() == 2, "the caller keeps its threads"
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [2], "and so do threads that start later"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_results_can_be_written_in_place(mode: type) -> None:
    with mode():
        out = torch.zeros(4)
        run_all([lambda i=index: out.__setitem__(i, i + 1.0) for index in range(4)])
        assert out.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.usefixtures("two_threads")
def test_an_error_reaches_the_caller() -> None:
    def fail() -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        run_all([fail, lambda: None])


def test_one_thread_runs_them_in_place() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names: list[str] = []
        run_all([lambda: names.append(threading.current_thread().name)] * 3)
        assert names == [threading.current_thread().name] * 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_calls_are_made_as_they_are_needed(threads: int) -> None:
    """Copies of a head are made when its turn comes: no call is asked for before a thread is free for it."""
    torch.set_num_threads(threads)
    made, done, ahead = 0, 0, 0

    def call() -> None:
        nonlocal done
        done += 1

    def calls() -> Iterator[Callable[[], None]]:
        nonlocal made, ahead
        for _ in range(20):
            made += 1
            ahead = max(ahead, made - done)
            yield call

    run_all(calls())
    assert (made, done) == (20, 20) and ahead <= threads + 1
