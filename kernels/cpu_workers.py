"""Small independent calls on all CPU threads: each call computes on one thread, so that none waits for another.

PyTorch's own parallelism splits every operator and joins its threads after each, which costs more than it wins on operators
of a millisecond, and leaves one thread idle between them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_all(calls: Sequence[Callable[[], None]]) -> None:
    """Runs the calls, in any order, on as many threads as PyTorch has; in the caller's grad and inference mode."""
    count = torch.get_num_threads()
    if count == 1 or len(calls) <= 1:
        for call in calls:
            call()
        return
    inference = torch.is_inference_mode_enabled()
    left = iter(calls)
    lock = threading.Lock()

    def work() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            while True:
                with lock:
                    call = next(left, None)
                if call is None:
                    return
                call()

    for done in [_workers(count).submit(work) for _ in range(min(count, len(calls)))]:
        done.result()


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have one PyTorch thread each."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the process's
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="diffusers_accel")
    for _ in range(count):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(count)  # what a thread sets is also what threads that start later begin with
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked child has the pool but not its threads
