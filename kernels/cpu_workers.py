"""Small independent calls on all CPU threads: each call computes on one thread, so that none waits for another.

PyTorch's own parallelism splits every operator and joins its threads after each, which costs more than it wins on operators
of a millisecond, and leaves one thread idle between them.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_all(calls: Iterable[Callable[[], None]]) -> None:
    """Runs the calls, in any order, on as many threads as PyTorch has; in the caller's grad and inference mode.

    They are taken one by one, each when a thread is free for it, so that an iterator may make them as they are needed.
    """
    count, calls = torch.get_num_threads(), iter(calls)
    ahead = list(itertools.islice(calls, 2))
    calls = itertools.chain(ahead, calls)
    if count == 1 or len(ahead) < 2:
        for call in calls:
            call()
        return
    inference = torch.is_inference_mode_enabled()
    lock = threading.Lock()

    def work() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            while True:
                with lock:
                    call = next(calls, None)
                if call is None:
                    return
                call()

    for done in [_workers(count).submit(work) for _ in range(count)]:
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
