"""Compositions drawn at random on tiny pipelines: every head of every step against attention worked out head by head."""

from __future__ import annotations

import torch

from diffusers_accel import patch
from tests.campaign.compositions import Head, Oracle, Watching, composition, difference
from tests.campaign.tally import Campaign


def test_compositions(campaign: Campaign) -> None:
    wrong = []
    for number in range(campaign.many(6, 1500)):
        drawn = composition(campaign.random("compositions", number))
        heads = 0

        def tell(head: Head, number: int = number) -> None:
            nonlocal heads
            heads += 1
            if not difference(head) <= 1:
                wrong.append(f"{number}: {head.what}: {difference(head):.3g} times what is allowed")

        with patch(drawn.pipe, drawn.plan, cache_memory_fraction=1.0) as patched:
            oracle = Oracle(patched.plan)
            for site in patched.sites:
                site.engine = Watching(site.engine, oracle, tell)
            for seed in (0, 1):  # the second finds what the first may have left
                drawn.pipe(**{**drawn.call, "generator": torch.Generator().manual_seed(seed)})
                if not campaign.long:
                    break
        assert heads
        campaign.count("compositions", "tried")
        campaign.count("compositions: heads of a step", "tried", heads)
        bad = sum(line.startswith(f"{number}: ") for line in wrong)
        campaign.count("compositions: heads of a step", "differences", bad)
        campaign.count("compositions: heads of a step", "as before", heads - bad)
        campaign.count("compositions", "differences" if bad else "as before")
    assert not wrong, f"seed {campaign.seed}, {len(wrong)} heads:\n" + "\n".join(wrong[:40])
