"""The portable attention kernel's own affairs, interpreted: its launch order, its strides, what it loads ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

portable = pytest.importorskip(
    "diffusers_accel.kernels.attention.portable", reason="needs Triton", exc_type=ImportError
)

from diffusers_accel.kernels.pattern import BlockPattern  # noqa: E402
from tests.kernels.oracle import assert_attention, qkv, random_pattern  # noqa: E402

pytestmark = pytest.mark.interpreter
F32 = torch.float32


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None) -> tuple[Tensor, Tensor]:
    return portable.attention(q, k, v, pattern, q.shape[3] ** -0.5)


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-batch"])
@pytest.mark.parametrize("block_q", [64, 128, 256])
@pytest.mark.parametrize("queries", [300, 512])
def test_every_tile_of_every_query_block_is_computed(rows: int, block_q: int, queries: int) -> None:
    q, k, v = qkv(2, queries, 700, 4, 64, F32, "cpu")
    k, v = k[:, :, :2], v[:, :, :2]  # two heads of q read one of k
    mask = random_pattern(rows, 4, queries, 700, (block_q, 64), 0.2, "cpu").mask()
    mask[:, 1, -1] = True
    pattern = BlockPattern.from_mask(mask, queries, 700, block_q, 64)
    assert_attention(
        attend(q, k, v, pattern), q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), pattern.token_mask()
    )


def test_programs_take_what_the_order_names(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 300, 300, 2, 64, F32, "cpu")
    pattern = BlockPattern.full(2, 300, 300)
    monkeypatch.setattr(portable, "launch_order", lambda _: torch.full((6,), 4, dtype=torch.int32))
    out, lse = attend(q, k, v, pattern)
    taken = torch.zeros(2, 300, dtype=torch.bool)
    taken[1, 128:256] = True
    assert torch.equal(lse[0].isfinite(), taken)
    assert torch.equal(out[0].isfinite().all(-1).T, taken)


def test_channels_and_strides_that_8_does_not_divide_are_copied() -> None:
    wide = qkv(2, 130, 130, 3, 73, F32, "cpu")
    q, k, v = (x[..., :72] for x in wide)
    assert_attention(attend(q, k, v, None), q, k, v)
    rows = [torch.empty(2, 130 * 3 * 72 + 4)[:, : 130 * 3 * 72].view(2, 130, 3, 72).copy_(x) for x in (q, k, v)]
    assert_attention(attend(*rows, None), q, k, v)
    fused = torch.cat([q, k, v], 2)  # strides are multiples of 72: nothing is copied
    parts = fused[:, :, :3], fused[:, :, 3:6], fused[:, :, 6:]
    assert_attention(attend(*parts, None), q, k, v)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_lists_that_are_empty_or_full(capacity: int, holes: bool) -> None:
    q, k, v = qkv(1, 300, 300, 2, 64, F32, "cpu")
    valid = torch.tensor([128, 64, 44], dtype=torch.int32) if holes else None
    lists = torch.arange(capacity, dtype=torch.int32).expand(1, 2, 3, capacity).contiguous()
    counts = torch.full((1, 2, 3), capacity, dtype=torch.int32)
    counts[0, 0, 1] = 0
    lists[0, 0, 1] = 0
    pattern = BlockPattern(lists, counts, 300, 300, valid=valid)
    assert_attention(attend(q, k, v, pattern), q, k, v, pattern.token_mask())
