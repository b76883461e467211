"""A call of some heads of the model, as one rank of several has them: their numbers are the model's, their places q's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_accel import Plan, patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import (
    BLOCK,
    AxisOrder,
    Band,
    Draft,
    Kept,
    Method,
    Patches,
    Pooled,
    Recipe,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.rests.kept import gate_name
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.methods.selects.stripe import mass_name
from diffusers_accel.run.launch import run
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import Partitions
from diffusers_accel.shape import ModelShape
from tests.stages import CPU, sdpa
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan

LAYOUT = TokenLayout(3, 16, 16)
STEPS = 6
METHODS = (
    Method(),
    Method(select=Band(0.4)),
    Method(AxisOrder("hwf"), Stored(0.5)),
    Method(Patches(), Draft(0.3), rest=Kept(gated=True)),
    Method(select=Stripe(0.4, calibrated=True)),
    Method(AxisOrder("hwf"), Stored(0.5)),
    Method(select=Skip()),
    Method(Patches(), Draft(0.3), rest=Kept(gated=True)),
    Method(AxisOrder("hwf"), Draft(0.3), "int8"),
    Method(AxisOrder("hwf"), Draft(0.3), rest=Pooled()),
    Method(),
    Method(select=Stripe(0.4, calibrated=True)),
)
ALL = tuple(range(len(METHODS)))
RANKS = {
    "a quarter": ALL[3:6],
    "the last third": ALL[8:],
    "in between": ALL[2:10],
    "scattered": (1, 4, 5, 11),
    "one": (7,),
}


def tensors() -> dict[str, Tensor]:
    """Of a plan, different for each head."""
    generator = torch.Generator().manual_seed(3)
    heads, blocks = len(METHODS), LAYOUT.blocks(BLOCK)
    masks = (torch.rand(heads, 1, blocks, blocks, generator=generator) < 0.4) | torch.eye(blocks, dtype=torch.bool)
    bits, index = Stored(0.5).names(AxisOrder("hwf"), "transformer")
    return {
        bits: packed(masks),
        index: torch.arange(heads, dtype=torch.int32)[None],
        mass_name("transformer"): torch.rand(1, heads, 3, 16, generator=generator),
        gate_name("transformer"): (torch.rand(STEPS, 1, heads, generator=generator) < 0.4).byte(),
    }


def generation(heads: tuple[int, ...], key_heads: int, partitions: Partitions) -> list[Tensor]:
    """What these heads give at each step, of a model with `key_heads` heads of keys."""
    cache, out = LayerCache(), []
    of = len(METHODS) // key_heads
    read = sorted({head // of for head in heads})
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        q = torch.randn(1, LAYOUT.tokens, len(METHODS), 32, generator=generator)
        k, v = (torch.randn(1, LAYOUT.tokens, key_heads, 32, generator=generator) for _ in range(2))
        call = AttentionCall(LAYOUT, "transformer", 0, heads, now=(step, STEPS), dense=grouped_sdpa)
        found = partitions.find(partitions.mix(METHODS[head] for head in heads), call, CPU)
        out.append(run(found, call, q[:, :, list(heads)], k[:, :, read], v[:, :, read], cache).out)
    return out


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v)))


@pytest.mark.parametrize("heads", RANKS.values(), ids=RANKS)
def test_some_heads_give_what_they_give_among_all(heads: tuple[int, ...]) -> None:
    partitions = Partitions(tensors())
    whole, some = (generation(which, len(METHODS), partitions) for which in (ALL, heads))
    for step in range(STEPS):
        torch.testing.assert_close(some[step], whole[step][:, :, list(heads)])


@pytest.mark.parametrize("heads", [ALL[3:6], ALL[6:12], ALL[9:12]], ids=str)
def test_of_heads_that_share_keys_a_rank_has_its_own(heads: tuple[int, ...]) -> None:
    partitions = Partitions(tensors())
    whole, some = (generation(which, 4, partitions) for which in (ALL, heads))
    for step in range(STEPS):
        torch.testing.assert_close(some[step], whole[step][:, :, list(heads)])


def test_equal_methods_of_other_heads_are_partitioned_apart() -> None:
    """Under one patch too: what is selected at run time is told the numbers of its heads."""
    partitions = Partitions(tensors())
    method = (Method(Patches(), Draft(0.3)),)
    calls = [AttentionCall(LAYOUT, "transformer", 0, (head,), now=(0, STEPS)) for head in (2, 5)]
    found = [partitions.find(partitions.mix(method), call, CPU).launches[0].groups[0] for call in calls]
    assert [group.heads for group in found] == [(2,), (5,)] and [group.places for group in found] == [(0,), (0,)]


def test_an_engine_takes_the_methods_of_the_heads_that_are_called() -> None:
    pipe = tiny_wan()
    recipe = Recipe((Method(select=Band(0.4)), Method(AxisOrder("hwf"), Draft(0.3))))
    plan = Plan.uniform(recipe, "wan", {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, LAYOUT.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    with patch(pipe, plan) as done:
        engine = done.sites[0].engine

        def attend(heads: tuple[int, ...]) -> Tensor:
            call = AttentionCall(LAYOUT, "transformer", 0, heads, now=(0, 5), dense=sdpa)
            return engine.attend(call, *(x[:, :, list(heads)] for x in (q, k, v)))

        whole = attend(tuple(range(HEADS)))
        for head in range(HEADS):
            torch.testing.assert_close(attend((head,)), whole[:, :, head : head + 1])
