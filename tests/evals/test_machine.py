"""What is asked of a GPU beside a measurement, with stand-ins for its driver."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_accel.evals.machine import gpu_state, instruction_set

CUDA = torch.device("cuda")


class NVMLError(Exception):
    pass


def nvml(**changed: Any) -> SimpleNamespace:
    """nvidia-ml-py's names, of a GPU that is held below its clock."""
    clocks = {"sm": 1755, "mem": 3201}
    usual = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": "sm",
        "NVML_CLOCK_MEM": "mem",
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: b"580.95",
        "nvmlDeviceGetClockInfo": lambda gpu, kind: clocks[kind],
        "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 4,
        "nvmlDeviceGetPowerUsage": lambda gpu: 651_200,
        "nvmlDeviceGetTemperature": lambda gpu, kind: 61,
    }
    return SimpleNamespace(**usual | changed)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))


def test_clocks_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert gpu_state(CUDA) == {
        "driver": "580.95", "sm_clock_mhz": "1755", "sm_clock_max_mhz": "1980", "memory_clock_mhz": "3201",
        "clock_limits": "4", "power_w": "651.2", "temp_c": "61",
    }  # fmt: skip
    assert gpu_state(torch.device("cpu")) == {}


def test_without_nvml_they_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gpu: Any) -> int:
        raise NVMLError("not supported")

    def smi(command: list[str], **options: Any) -> SimpleNamespace:
        assert command[:2] == ["nvidia-smi", "--id=GPU-1-2"] and options["timeout"]
        return SimpleNamespace(stdout="580.95, 1755, 1980, 3201, 651.20, 61\n")

    monkeypatch.setattr(subprocess, "run", smi)
    for module in (nvml(nvmlDeviceGetPowerUsage=fails), None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        found = gpu_state(CUDA)
        assert (found["driver"], found["sm_clock_max_mhz"], found["temp_c"]) == ("580.95", "1980", "61")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(subprocess.TimeoutExpired("x", 10)))
    assert gpu_state(CUDA) == {}


def test_the_instructions_of_a_cpu_are_pytorchs_own_word() -> None:
    assert instruction_set() == torch.backends.cpu.get_cpu_capability() != ""
