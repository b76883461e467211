"""Selection and block statistics compile for every architecture without a GPU: they fit, and nothing spills."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled in the same process", allow_module_level=True)

from diffusers_accel.kernels.block_stats import portable as block_stats
from diffusers_accel.kernels.select import portable as select
from tests.kernels.test_compile import BF16, F32, MATRIX, NAMES, assert_wide, compiled, every_arch, in_turn

LISTS = {"map_ptr": "*fp32", "forced_ptr": "*u8", "histograms_ptr": "*i32", "blocks_ptr": "*i32", "counts_ptr": "*i32"}


@in_turn
@every_arch
@pytest.mark.parametrize(("dim", "group"), [(20, 1), (64, 1), (128, 1), (128, 4)])
def test_the_map_stays_fp32(arch: int, dim: int, group: int) -> None:
    types = {"q_ptr": "*fp32", "k_ptr": "*fp32", "map_ptr": "*fp32", "scale": "fp32"}
    code = compiled(
        select.map_kernel, arch, types, {"DIM": dim, "HEAD_GROUP": group, **select.MAP_TILE}, **select.MAP_OPTIONS
    )
    assert not re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)
    assert re.search(r"\bFFMA2?\b", code) and re.search(r"\bBAR\b", code)


@in_turn
@every_arch
@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("forced", [False, True])
def test_histogram(arch: int, level: int, forced: bool) -> None:
    constants: dict[str, Any] = {"LEVEL": level, "LEVELS": 4, "BLOCK": 4096} | ({} if forced else {"forced_ptr": None})
    code = compiled(select.histogram_kernel, arch, LISTS, constants, num_warps=8)
    assert re.search(r"\b(?:RED|ATOMG|REDG)\b", code)


@in_turn
@every_arch
@pytest.mark.parametrize("key_blocks", [50, 930, select.LARGEST_ROW])
@pytest.mark.parametrize("rule", ["head", "row", "top_p"])
def test_lists(arch: int, key_blocks: int, rule: str) -> None:
    padded = 1 << (key_blocks - 1).bit_length()
    constants: dict[str, Any] = {"RULE": rule, "LEVELS": 4, "PADDED": padded}
    if rule != "head":
        constants["histograms_ptr"] = None
    types = LISTS | ({"amount": "fp32"} if rule == "top_p" else {})
    compiled(select.lists_kernel, arch, types, constants, num_warps=select.row_warps(padded))


@in_turn
@every_arch
@pytest.mark.parametrize("blocks", [(16, 16), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize(
    ("dim", "dtype", "group"),
    [
        (64, BF16, 1),
        (72, BF16, 1),
        (96, BF16, 1),
        (128, BF16, 1),
        (256, BF16, 1),
        (72, F32, 1),
        (128, F32, 1),
        (128, BF16, 4),
    ],
)
def test_block_stats(arch: int, blocks: tuple[int, int], dim: int, dtype: torch.dtype, group: int) -> None:
    tensor = "*" + NAMES[dtype]
    types = {"q_ptr": tensor, "k_ptr": tensor, "lse_ptr": "*fp32", "total_ptr": "*fp32", "largest_ptr": "*fp32"}
    types |= {"small_ptr": "*i32", "qk_scale": "fp32", "epsilon": "fp32"}
    constants = {"DIM": dim, "BLOCK_D": block_stats.tile_of_dim(dim, dtype), "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    constants |= {"HEAD_GROUP": group, "EIGHTS": True}
    warps = block_stats.warps(*blocks, dtype)
    code = compiled(block_stats.block_stats_kernel, arch, types, constants, num_warps=warps, num_stages=2)
    if (dtype, blocks) != (F32, (16, 16)):  # whose tiles have one number for each thread
        assert_wide(code)
    if dtype == F32:
        assert not re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)
    elif blocks[0] >= 64:  # Hopper's and later products want 64 rows, smaller tiles take the older instruction
        assert re.search(rf"\b{MATRIX[arch]}\b", code)
    else:
        assert re.search(r"\bHMMA\b", code)
