"""What our own code costs beside the kernels: microseconds of one patched call, the share of `pooled`, a CPU's sparse attention.

    python -m tests.overhead call      # at 64 tokens; run it on two commits in turn to compare them
    python -m tests.overhead pooled    # rest="pooled" against "drop", as a share of dense attention, in one process
    python -m tests.overhead cpu       # block-sparse attention and FlexAttention against dense on the same blocks, 4 minutes

Times of one thread; ratios of runs in turn are what to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.evals.kernel_bench import inputs
from diffusers_accel.evals.kernel_bench.peers import PEERS, Missing
from diffusers_accel.kernels.attention import attention
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Draft, Drop, Method, Patches, Pooled
from diffusers_accel.run.launch import run
from diffusers_accel.run.partition import partition
from tests.stages import CPU, call_of, sdpa
from tests.tiny import tiny_wan, tiny_wan_call

NAMED: dict[str, dict[str, Any]] = {
    "dense": {},
    "pattern": {"dense_steps": 0.0},
    "draft": {"dense_steps": 0.0, "dense_layers": 0},
    "cached": {},
}
CALLS, STEPS = 200, 50
CPU_PATTERNS = (("random", 0.25), ("random", 0.09), ("window", 0.09), ("unequal", 0.09))


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    call()
    return clock() - begin


def one_call(name: str, parameters: dict[str, Any]) -> float:
    """Microseconds of a call of attention under a named method, median of runs."""
    pipe = tiny_wan()
    with patch(pipe, name, **parameters) as done, torch.no_grad():
        pipe(**{**tiny_wan_call(height=32, width=32, num_frames=1), "output_type": "latent"})
        site, layout = done.sites[1], done.layout
        assert layout is not None
        q = torch.randn(1, layout.tokens, site.model.shape.heads, site.model.shape.head_dim)

        def calls() -> None:
            for step in range(CALLS):
                done.step(step % STEPS, STEPS)
                site.attend(q, q, q)

        return statistics.median([seconds(calls) for _ in range(9)][1:]) / CALLS * 1e6


def pooled_share(density: float) -> float:
    """The time that pooling adds, as a share of dense attention's; median of runs in turn."""
    layout = TokenLayout(8, 32, 48)
    generator = torch.Generator().manual_seed(0)
    qkv: list[Tensor] = [torch.randn(1, layout.tokens, 2, 64, generator=generator) for _ in range(3)]
    call = call_of(layout, 2, now=(0, 1), dense=sdpa)
    methods = [Method(Patches(), Draft(density), rest=rest) for rest in (Drop(), Pooled())]
    parts = [partition((method,) * 2, call, {}, CPU) for method in methods]
    shares = []
    for _ in range(7):
        drop, pooled = (seconds(lambda part=part: run(part, call, *qkv)) for part in parts)  # type: ignore[misc]
        shares.append((pooled - drop) / seconds(lambda: sdpa(*qkv)))
    return statistics.median(shares[1:])


def sparse_on_a_cpu() -> None:
    """Prints how much of its density's share of dense attention's time each takes, and dense attention's time.

    Processor time of the thread, so that other processes disturb little; each call in turn with the dense one.
    """
    print(f"instructions: {torch.backends.cpu.get_cpu_capability()}; efficiency = dense time x density / time")
    for dtype, shape, (kind, density) in product((torch.float32, torch.bfloat16), ("toy", "S8"), CPU_PATTERNS):
        q, k, v = inputs.qkv("gaussian", inputs.SHAPES[shape], dtype, CPU, 0)
        pattern = inputs.pattern(kind, inputs.SHAPES[shape], density, 0)
        calls: dict[str, Callable[[], object]] = {
            "dense": partial(sdpa, q, k, v),
            "ours": partial(attention, q, k, v, pattern, impl="cpu"),
        }
        with contextlib.suppress(Missing):
            calls["flex"] = PEERS["attention"]["flex"].make(q, k, v, pattern)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _, (name, call) in product(range(6), calls.items()):
            times[name].append(seconds(call, time.thread_time))
        dense, *others = (statistics.median(of_one[1:]) for of_one in times.values())
        found = ", ".join(f"{name} {dense * pattern.density / x:.2f}" for name, x in zip(list(calls)[1:], others))
        print(f"{dtype} {shape} {kind} {pattern.density:.3f}: {found}; dense {1e3 * dense:.0f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("call", "pooled", "cpu"))
    torch.set_num_threads(1)
    what = parser.parse_args().what
    if what == "cpu":
        sparse_on_a_cpu()
    elif what == "call":
        for name, parameters in NAMED.items():
            print(f"{name}: {one_call(name, parameters):.1f} us a call")
    else:
        for density in (0.1, 0.2):
            print(f"density {density}: pooling adds {pooled_share(density):.1%} of dense attention's time")


if __name__ == "__main__":
    main()
