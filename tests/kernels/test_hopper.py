"""The Hopper kernel: what it takes, and under the interpreter the same meaning as every other implementation."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention import attention, choices, quantized_attention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import KEY_GROUP, quantize
from tests.kernels.oracle import assert_attention, qkv, random_pattern

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
from diffusers_accel.kernels.attention import hopper

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
everywhere = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture(autouse=True)
def only_on_hopper(request: pytest.FixtureRequest) -> None:
    on_gpu = request.node.get_closest_marker("gpu") and torch.cuda.is_available()
    if on_gpu and (found := hardware.capability(torch.device("cuda"))) != 90:
        pytest.skip(f"needs compute capability 9.0, found {found / 10}")


@everywhere
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks", "density"),
    [
        (300, 300, 128, (128, 128), 0.5),
        (256, 256, 64, (128, 128), 0.7),
        (130, 500, 96, (128, 64), 0.5),
        (257, 192, 72, (256, 128), 1.0),
    ],
)
def test_random_patterns_are_masked_attention(
    device: str, dtype: torch.dtype, queries: int, keys: int, dim: int, blocks: tuple[int, int], density: float
) -> None:
    q, k, v = qkv(1, queries, keys, 2, dim, dtype, device, seed=queries)
    pattern = random_pattern(1, 2, queries, keys, blocks, density, device, seed=dim)
    assert_attention(attention(q, k, v, pattern, impl="hopper"), q, k, v, pattern.token_mask())


@everywhere
def test_batch_rows_read_everything_or_their_own_lists(device: str) -> None:
    q, k, v = qkv(2, 200, 270, 2, 64, BF16, device)
    assert_attention(attention(q, k, v, scale=0.3, impl="hopper"), q, k, v, scale=0.3)
    pattern = random_pattern(2, 2, 200, 270, (128, 64), 0.5, device, seed=4)
    assert_attention(attention(q, k, v, pattern, impl="hopper"), q, k, v, pattern.token_mask())


@everywhere
def test_queries_that_read_nothing_give_zero_and_minus_infinity(device: str) -> None:
    q, k, v = qkv(1, 256, 256, 1, 64, F16, device)
    mask = torch.tensor([[[[False, False], [True, False]]]], device=device)
    out, lse = attention(q, k, v, BlockPattern.from_mask(mask, 256, 256), impl="hopper")
    assert (out[0, :128] == 0).all() and (lse[0, 0, :128] == -torch.inf).all() and lse[0, 0, 128:].isfinite().all()


@everywhere
@pytest.mark.parametrize("precision", ["input", "int8", "int8_fp8"])
def test_padding_holes_and_unread_blocks_are_never_weighed(device: str, precision: str) -> None:
    queries, keys, heads = 130, 300, 2
    store = torch.full((2, 1, keys + 90, heads, 64), torch.nan, device=device, dtype=BF16)
    q, *kv = qkv(1, queries, keys, heads, 64, BF16, device)
    valid = torch.tensor([64, 20, 64, 0, 17], dtype=torch.int32)
    exists = torch.cat([torch.arange(64) < n for n in valid])[:keys].to(device)
    unread = torch.arange(keys, device=device) // 64 == 2
    hidden = ~exists | unread if precision == "input" else ~exists  # quantizing reads what exists
    for i in range(2):
        store[i, :, :keys] = kv[i].masked_fill(hidden[:, None, None], torch.nan)
    mask = torch.ones(1, heads, 2, 5, dtype=torch.bool)
    mask[..., 2] = False
    pattern = BlockPattern.from_mask(mask.to(device), queries, keys, 128, 64, valid.to(device))
    found = attention(q, *store[:, :, :keys], pattern, precision=precision, impl="hopper")
    expected = attention(q, *store[:, :, :keys], pattern, precision=precision, impl="reference")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


@everywhere
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(130, 330, 128), (128, 256, 64), (200, 170, 96)])
def test_quantized_attention_is_the_references(device: str, precision: str, queries: int, keys: int, dim: int) -> None:
    x = quantize(*qkv(1, queries, keys, 2, dim, BF16, device, seed=dim), precision)
    pattern = random_pattern(1, 2, queries, keys, (128, 128), 0.6, device, seed=dim)
    (out, lse), (exact, exact_lse) = (quantized_attention(x, pattern, impl=impl) for impl in ("hopper", "reference"))
    read = pattern.token_mask().any(-1)
    assert torch.equal(lse == -torch.inf, ~read)
    assert torch.allclose(lse[read], exact_lse[read], atol=2e-3)
    limit = 6e-2 if precision == "int8_fp8" else 1e-2  # weights are rounded beside another maximum than the reference's
    assert (out - exact).float().norm() <= limit * exact.float().norm()


@everywhere
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in Triton's interpreter
def test_no_scale_makes_a_number_of_keys_that_do_not_exist(device: str, precision: str) -> None:
    """Neither the least ones, of zeros, nor that of a query which is not a number and reads nothing."""
    _, _, v = qkv(1, 1, 300, 1, 64, BF16, device)
    q, k = (torch.zeros(1, tokens, 1, 64, dtype=BF16, device=device) for tokens in (130, 300))
    q[0, 7] = q[0, 129] = torch.nan
    valid = torch.tensor([20, 0, 44], dtype=torch.int32, device=device)
    blocks = torch.tensor([[[[0, 1, 2], [1, 0, 0]]]], dtype=torch.int32, device=device)
    counts = torch.tensor([[[3, 1]]], dtype=torch.int32, device=device)
    pattern = BlockPattern(blocks, counts, 130, 300, valid=valid)
    out, lse = attention(q, k, v, pattern, precision=precision, impl="hopper")
    assert lse[0, 0, 7].isnan() and (lse[0, 0, 128:] == -torch.inf).all() and (out[0, 128:] == 0).all()
    mean = torch.cat([v[0, :20, 0], v[0, 256:, 0]]).float().mean(0)
    for row in (0, 127):
        torch.testing.assert_close(out[0, row, 0].float(), mean, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse[0, 0, row].exp(), lse.new_tensor(64.0), rtol=1e-4, atol=0)


@everywhere
def test_strides_that_tma_cannot_read_are_copied(device: str) -> None:
    q, k, v = qkv(1, 130, 130, 2, 64, F16, device)
    odd = torch.stack([q, k, v], 4)[..., :3].unbind(4)
    fused = torch.stack([q, k, v], 2).unbind(2)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    expected = attention(q, k, v, impl="hopper")
    for inputs in (odd, fused, shifted):
        for ours, theirs in zip(attention(*inputs, impl="hopper"), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert hopper.loadable(fused[0]) is fused[0] and hopper.loadable(odd[0]) is not odd[0]
    assert hopper.loadable(shifted[0]).data_ptr() % 16 == 0
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    assert hopper.loadable(shared).is_contiguous()  # a descriptor has no step of 0


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, blocks = torch.device("cuda"), (128, 128)
    assert "runs on CUDA" in str(hopper.refuses(torch.device("meta"), BF16, 128, blocks, "input"))
    monkeypatch.setattr(hardware, "capability", lambda device: 100)
    assert "9.0 (Hopper), found 10.0" in str(hopper.refuses(device, BF16, 128, blocks, "input"))
    monkeypatch.setattr(hardware, "capability", lambda device: 90)
    for dim in (40, 64, 96, 128):
        assert hopper.refuses(device, BF16, dim, blocks, "input") is None
    assert "float16 and bfloat16" in str(hopper.refuses(device, F32, 128, blocks, "input"))
    assert "from 40 to 128 in multiples of 8, found 160" in str(hopper.refuses(device, BF16, 160, blocks, "input"))
    assert "from 48 to 128 in multiples of 16, found 72" in str(hopper.refuses(device, BF16, 72, blocks, "int8"))
    assert "128 queries x 64 keys, found 64 queries" in str(hopper.refuses(device, BF16, 128, (64, 64), "input"))
    assert "x 96 keys" in str(hopper.refuses(device, BF16, 128, (128, 96), "input"))


def test_nothing_takes_it_unasked() -> None:
    names = [choice.name for choice in choices("cpu", BF16, 128)]
    assert names.index("portable") < names.index("hopper")


def test_every_quantized_tile_has_one_scale_of_its_keys() -> None:
    for dim, precision in hopper.CONFIGS:
        for block_k in (64, 128, 192):
            tile = hopper.config(dim, block_k, precision)
            assert block_k % tile.block_n == 0
            assert precision == "input" or KEY_GROUP % tile.block_n == 0
