"""Two pipelines, two threads each, patched with different methods: each gives what it gives alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from diffusers_accel import patch, unpatch
from tests.campaign.tally import Campaign
from tests.tiny import tiny_hunyuan, tiny_hunyuan_call, tiny_wan, tiny_wan_call

KINDS = {"wan": (tiny_wan, tiny_wan_call), "hunyuan_video": (tiny_hunyuan, tiny_hunyuan_call)}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pattern", {"density": 0.4}),
    ("draft", {"density": 0.3}),
    ("cached", {"refresh_every": 2}),
    ("reordered", {"axes": "hwf", "density": 0.5}),
    ("dense", {}),
)
SMALL = {"height": 32, "width": 32, "num_inference_steps": 3}


def one(pipe: Any, kind: str, seed: int) -> np.ndarray:
    call = KINDS[kind][1](seed=seed, **SMALL)
    return np.asarray(pipe(**call).frames)


def alone(kind: str, method: tuple[str, dict[str, Any]], seeds: tuple[int, ...]) -> list[np.ndarray]:
    pipe = KINDS[kind][0]()
    with patch(pipe, method[0], **method[1]):
        return [one(pipe, kind, seed) for seed in seeds]


def test_threads(campaign: Campaign) -> None:
    """Pipelines of two threads; and again with both patched and taken off while the other one runs."""
    wrong = []
    for number in range(campaign.many(2, 100)):
        random = campaign.random("threads", number)
        chosen = [(kind, random.choice(METHODS), random.randrange(3)) for kind in KINDS for _ in range(2)]
        expected = [alone(kind, method, (seed, seed + 1)) for kind, method, seed in chosen]
        pipes = [KINDS[kind][0]() for kind, *_ in chosen]  # their weights come from the seed that all threads share
        found: list[list[np.ndarray]] = [[] for _ in chosen]
        failed: list[BaseException] = []
        start = threading.Barrier(len(chosen))

        def work(place: int, chosen=chosen, pipes=pipes, found=found, failed=failed, start=start) -> None:
            (kind, method, seed), pipe = chosen[place], pipes[place]
            try:
                start.wait()
                for each in (seed, seed + 1):
                    patch(pipe, method[0], **method[1])
                    with torch.no_grad():
                        found[place].append(one(pipe, kind, each))
                    unpatch(pipe)
            except BaseException as error:
                failed.append(error)
                start.abort()

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(chosen))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        for place, (one_by_one, together) in enumerate(zip(expected, found, strict=True)):
            for call, (a, b) in enumerate(zip(one_by_one, together, strict=True)):
                if not np.array_equal(a, b):
                    wrong.append(f"{number}: {chosen[place]}, call {call}: differs by up to {np.abs(a - b).max():.3g}")
        campaign.count("threads", "tried", len(chosen) * 2)
        campaign.count("threads", "as before", len(chosen) * 2)
    assert not wrong, f"seed {campaign.seed}:\n" + "\n".join(wrong)
