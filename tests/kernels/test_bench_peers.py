"""Peers of the kernel benchmark that are not installed here, held to their own signatures, and one that is: FlexAttention."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals.kernel_bench import peers
from diffusers_accel.evals.kernel_bench.inputs import Shape, pattern, qkv
from diffusers_accel.evals.kernel_bench.peers import PEERS, Missing
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.pattern import BlockPattern

SMALL = Shape((3, 10, 10), 2, 64)  # 300 tokens, of which the last block holds 44
CPU = torch.device("cpu")


class BlockSparseTensorsTorch(NamedTuple):
    """The names of flash-attn-4 4.0.0b15, flash_attn/cute/block_sparsity.py."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def flash_attn_func(  # the arguments of 4.0.0b15, flash_attn/cute/interface.py
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Any = None,
    gather_kv_indices: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends as its lists say, and refuses what its checks refuse of their shapes and types."""
    lists, block = block_sparse_tensors, 128
    if lists is None:
        return attention(q, k, v)
    rows = -(-q.shape[1] // block)
    for count, blocks in (lists[:2], lists[2:4]):
        assert count is not None and blocks is not None and count.dtype == blocks.dtype == torch.int32
        assert count.shape == (1, q.shape[2], rows) and blocks.shape[:3] == count.shape and 1 <= blocks.shape[3] <= rows
    assert lists.full_block_cnt is not None and lists.full_block_idx is not None
    assert lists.block_size == (block, block) and not lists.mask_block_cnt.any()
    return attention(q, k, v, BlockPattern(lists.full_block_idx, lists.full_block_cnt, q.shape[1], k.shape[1]))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules by name that a peer finds in place of its own."""
    modules: dict[str, Any] = {}
    monkeypatch.setattr(peers, "_gpu_module", lambda name, q: modules[name])
    return modules


def test_fa4_is_called_with_the_lists_that_it_takes(installed: dict[str, Any]) -> None:
    installed["flash_attn.cute"] = SimpleNamespace(flash_attn_func=flash_attn_func)
    installed["flash_attn.cute.block_sparsity"] = SimpleNamespace(BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    q, k, v = qkv("gaussian", SMALL, torch.float32, CPU, seed=0)
    for kind in ("random", "unequal", "text"):
        blocks = pattern(kind, SMALL, 0.5, seed=0)
        out = PEERS["attention"]["fa4"].make(q, k, v, blocks)()
        assert torch.equal(out, attention(q, k, v, blocks)[0])
    assert torch.equal(PEERS["dense"]["fa4"].make(q, k, v)(), attention(q, k, v)[0])


def test_sage_leaves_the_keys_of_the_others_alone(installed: dict[str, Any]) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
        k -= k.mean(1, keepdim=True)  # as sageattention 1.0.6 does
        return attention(q, k, v)[0]

    installed["sageattention"] = SimpleNamespace(sageattn=sageattn)
    q, k, v = qkv("video", SMALL, torch.float32, CPU, seed=0)
    before = k.clone()
    call = PEERS["dense"]["sage"].make(q, k, v)
    for _ in range(2):
        assert torch.allclose(call(), attention(q, k, v)[0], atol=1e-4)
    assert torch.equal(k, before)


# In a process of its own: what torch.compile has loaded changes how later tests compute on the meta device.
FLEX = """
import torch
from diffusers_accel.evals.kernel_bench.inputs import Shape, pattern, qkv
from diffusers_accel.evals.kernel_bench.peers import PEERS
from diffusers_accel.kernels.attention import attention
shape = Shape((3, 10, 10), 2, 64)
q, k, v = qkv("gaussian", shape, torch.float32, torch.device("cpu"), seed=0)
blocks = pattern("text", shape, 0.4, seed=0)
assert 0 < blocks.density < 1
out = PEERS["attention"]["flex"].make(q, k, v, blocks)()
exact = attention(q, k, v, blocks, impl="reference")[0]
assert out.shape == exact.shape
print(float((out - exact).norm() / exact.norm()))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_flex_attention_is_a_rival_on_a_cpu_too() -> None:
    done = subprocess.run([sys.executable, "-c", FLEX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    q, k, v = qkv("gaussian", SMALL, torch.float32, CPU, seed=0)
    with pytest.raises(
        Missing, match="needs a C\\+\\+ compiler on a CPU, and 'no-such-compiler' is not found; set CXX"
    ):
        PEERS["attention"]["flex"].make(q, k, v, pattern("random", SMALL, 0.5, seed=0))
