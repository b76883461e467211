"""The kernels need PyTorch alone: neither diffusers nor, until it is asked for, Triton."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "diffusers", "transformers"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from diffusers_accel.kernels.attention import attention, choices
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool

q = torch.randn(1, 100, 2, 8)
out, lse = attention(q, q, q, BlockPattern.full(2, 100, 100, 32, 32))
assert torch.equal(merge([(out, lse)], impl="reference")[1], lse)
assert merge([(out, lse)])[0].shape == q.shape
assert pool(q, 32).shape == (1, 4, 2, 8)
reasons = {choice.name: choice.reason for choice in choices("cpu", torch.float32, 8)}
assert reasons["cpu"] is None and "pip install '.[triton]'" in reasons["portable"], reasons
try:
    attention(q, q, q, impl="portable")
except ValueError as error:
    assert "needs Triton" in str(error) and "cpu: usable" in str(error), error
else:
    raise AssertionError("an implementation without its library must be refused")
"""


def test_the_kernels_run_without_triton_and_diffusers() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_attention_on_a_cpu_imports_no_triton() -> None:
    program = (
        "import sys, torch; before = 'triton' in sys.modules; q = torch.randn(1, 32, 1, 8)\n"
        "from diffusers_accel.kernels.attention import attention; attention(q, q, q)\n"
        "assert before or 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
