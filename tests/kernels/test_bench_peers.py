"""Peers of the kernel benchmark that are not installed here, held to their own signatures, and one that is: FlexAttention."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals.kernel_bench import peers
from diffusers_accel.evals.kernel_bench.inputs import Shape, pattern, qkv
from diffusers_accel.evals.kernel_bench.peers import PEERS, Missing
from diffusers_accel.kernels.attention import attention

SMALL = Shape((3, 10, 10), 2, 64)  # 300 tokens, of which the last block holds 44
CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules by name that a peer finds in place of its own."""
    modules: dict[str, Any] = {}
    monkeypatch.setattr(peers, "_gpu_module", lambda name, q: modules[name])
    return modules


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
    # Headers compiled ahead pay off from the second kernel on, and this process compiles one.
    environment = {**os.environ, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    done = subprocess.run([sys.executable, "-c", FLEX], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    q, k, v = qkv("gaussian", SMALL, torch.float32, CPU, seed=0)
    with pytest.raises(
        Missing, match="needs a C\\+\\+ compiler on a CPU, and 'no-such-compiler' is not found; set CXX"
    ):
        PEERS["attention"]["flex"].make(q, k, v, pattern("random", SMALL, 0.5, seed=0))
