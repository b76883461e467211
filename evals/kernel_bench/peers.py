"""Attention by others, timed in the same run. A peer is a function in this file, under `@peer`, and nothing else.

It takes q, k, v [1, S, H, D] and, for sparse attention, the pattern; it does what is done once per pattern and returns the
call that is timed, which gives out [1, S, H, D], or a pair of that and the log-sum-exp [1, H, S]. Where it cannot run it
raises `Missing` with the reason. It imports its package itself, so that a package that is not there, or whose import
fails, costs no more than its own rows. PyTorch's cuDNN and flash attention, and xformers, are not here: they are
implementations of `kernels.dense`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.pattern import BlockPattern

Call = Callable[[], Any]

GIB = 2**30
TRIAL = 128  # tokens on which a backend is asked whether it runs at all
TUNING = 150.0  # seconds in which a peer tries its own tiles
CPU_SCORES = GIB  # that an attention which holds all scores may take on a CPU


class Missing(RuntimeError):
    """Why a peer, or an implementation of ours, cannot run here."""


@dataclass(frozen=True)
class Peer:
    """Who computes attention.

    Args:
        make: the function under `@peer`.
        distribution: whose version its rows name, and in which rows that are to be compared must agree.
        precision: in which it computes the products.
        seconds: that a point of it may take where it compiles its kernel first, if that is more than others may.
        traced: whether torch.compile makes it, which would make another one for the setting under which calls are checked.
        apart: the package that may spoil the process that imports it, so that its points have one of their own.
    """

    make: Callable[..., Call]
    distribution: str
    precision: str = "input"
    seconds: float = 0.0
    traced: bool = False
    apart: str | None = None

    @property
    def version(self) -> str | None:
        """Of its distribution; None where that is not installed under this name."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


PEERS: dict[str, dict[str, Peer]] = {"dense": {}, "attention": {}}


def peer(
    operator: Literal["dense", "attention"], name: str, distribution: str, **more: Any
) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Makes a function a peer of dense or of sparse attention; `more` as of `Peer`."""

    def add(make: Callable[..., Call]) -> Callable[..., Call]:
        PEERS[operator][name] = Peer(make, distribution, **more)
        return make

    return add


def process_of(operator: str, impl: str) -> str:
    """The peer in whose process a point has to be measured; "" is everybody's, also where its package is not installed."""
    found = PEERS.get(operator, {}).get(impl)
    return impl if found and found.apart and importlib.util.find_spec(found.apart) else ""


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _sdpa_call(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Call:
    try:
        _sdpa(backend, q[:, :TRIAL], k[:, :TRIAL], v[:, :TRIAL])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # how PyTorch says that this backend does not take such inputs here
        where = f"{q.dtype} and head dim {q.shape[3]} on {q.device.type}"
        raise Missing(f"PyTorch has it not for {where}: {error}") from None
    return partial(_sdpa, backend, q, k, v)


@peer("dense", "sdpa-efficient", "torch")
def _sdpa_efficient(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return _sdpa_call(SDPBackend.EFFICIENT_ATTENTION, q, k, v)


@peer("dense", "sdpa-math", "torch")
def _sdpa_math(q: Tensor, k: Tensor, v: Tensor) -> Call:
    scores = 3 * 4 * q.shape[1] ** 2 * q.shape[2]  # in fp32, with their softmax and a copy
    room = torch.cuda.mem_get_info(q.device)[0] // 2 if q.device.type == "cuda" else CPU_SCORES
    if scores > room:
        raise torch.OutOfMemoryError(f"holds all scores, {scores / GIB:.1f} GiB of them, more than {room / GIB:.1f}")
    return _sdpa_call(SDPBackend.MATH, q, k, v)


@peer("dense", "fa3", "flash-attn-3")
def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608)."""
    flash = _gpu_module("flash_attn_interface", q)
    return lambda: _first(flash.flash_attn_func(q, k, v))


@peer("dense", "fa4", "flash-attn-4", seconds=60)
def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention's kernels in CuTe."""
    flash = _gpu_module("flash_attn.cute", q)
    return lambda: _first(flash.flash_attn_func(q, k, v))


@peer("dense", "sage", "sageattention", precision="int8")
def _sage(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """SageAttention (Zhang et al., arXiv 2410.02367); its time includes its quantization."""
    return _sage_call("int8", q, k, v)


@peer("dense", "sage-fp8", "sageattention", precision="int8_fp8")
def _sage_fp8(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """SageAttention2 (Zhang et al., arXiv 2411.10958) where it weights the values in FP8."""
    return _sage_call("int8_fp8", q, k, v)


def _sage_call(precision: str, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """What its users call, which chooses by the GPU: FP8 from Ada on, if this version has such kernels."""
    sage = _gpu_module("sageattention", q)
    has_fp8 = hasattr(sage, "sageattn_qk_int8_pv_fp8_cuda") and hardware.capability(q.device) >= 89
    if (precision == "int8_fp8") != has_fp8:
        raise Missing(f"sageattn computes in {'int8_fp8' if has_fp8 else 'int8'} here")
    k = k.clone()  # it subtracts the mean in place (1.0.6), and the other kernels of this run need the keys as they are
    return lambda: sage.sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


@peer("attention", "flex", "torch", seconds=60, traced=True)
def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Call:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496), compiled, with the same blocks, all of them without a mask."""
    if q.device.type == "cpu":
        _needs_a_compiler()
    return _flex_call(q, k, v, pattern)


@peer("attention", "flex-tuned", "torch", seconds=TUNING, traced=True)
def _flex_tuned(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Call:
    """The same with the tiles that torch.compile finds fastest for these inputs, among those that it knows."""
    if q.device.type != "cuda":
        raise Missing(f"torch.compile tunes it on CUDA only, found {q.device.type}: see flex")
    return _flex_call(q, k, v, pattern, mode="max-autotune-no-cudagraphs")


def _flex_call(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, **options: Any) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    # A full graph fails where too many shapes have been compiled; without it, all scores would be computed eagerly.
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True, **options)
    mask = flex_mask(pattern)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    @torch.no_grad()
    def call() -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out.transpose(1, 2)

    return call


def _needs_a_compiler() -> None:
    """Raises Missing where torch.compile would find no C++ compiler for a CPU's kernels."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise Missing(f"torch.compile needs a C++ compiler on a CPU, and {compiler!r} is not found; set CXX to one")


def flex_mask(pattern: BlockPattern) -> Any:
    """The pattern as FlexAttention's BlockMask: every block that is read is read whole."""
    from torch.nn.attention.flex_attention import BlockMask

    # It wants room for every block in a row's list.
    blocks = torch.nn.functional.pad(pattern.blocks, (0, pattern.key_blocks - pattern.blocks.shape[3]))
    return BlockMask.from_kv_blocks(
        torch.zeros_like(pattern.counts),
        torch.zeros_like(blocks),
        pattern.counts,
        blocks,
        BLOCK_SIZE=(pattern.block_q, pattern.block_k),
        seq_lengths=(pattern.queries, pattern.keys),
    )


@peer("attention", "vsa", "fastvideo-kernel", apart="fastvideo_kernel")
def _vsa(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Call:
    """VSA's kernel (Zhang et al. 2025, arXiv 2505.13389) on the same pairs, cut into its blocks of 64 x 64.

    Its wheel loads a driver library of its own (libcuda 580.173 in 0.3.2), beside that of the machine.
    """
    operators = _gpu_module("fastvideo_kernel._C.fastvideo_kernel_ops", q)
    tokens, block = q.shape[1], 64
    padding = -tokens % block
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)).transpose(1, 2).contiguous() for x in (q, k, v))
    blocks = (tokens + padding) // block
    mask = pattern.mask().repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :blocks, :blocks]
    fine = BlockPattern.from_mask(mask, tokens + padding, tokens + padding, block, block)
    sizes = torch.full((blocks,), block, dtype=torch.int32, device=q.device)
    sizes[-1] -= padding
    lists = torch.nn.functional.pad(fine.blocks, (0, blocks - fine.blocks.shape[3]))

    def call() -> Tensor:
        out: Tensor = operators.block_sparse_fwd(q, k, v, lists, fine.counts, sizes)[0]
        return out.transpose(1, 2)[:, :tokens]

    return call


def _first(found: Any) -> Any:
    """The output, of functions that in some versions return a log-sum-exp of some layout beside it."""
    return found[0] if isinstance(found, tuple) else found


def _gpu_module(name: str, q: Tensor) -> Any:
    if q.device.type != "cuda":
        raise Missing(f"runs on CUDA, found {q.device.type}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another version fails in many ways, all of which are the reason
        raise Missing(f"import {name}: {type(error).__name__}: {error}") from error
