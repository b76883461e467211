"""What a measured time depends on besides the inputs: processor, versions, revision, clocks. Needs PyTorch alone."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, threads and GPU of this machine; no host name."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def versions(
    distributions: Iterable[str] = ("torch", "triton", "diffusers", "diffusers-accel", "numpy"),
) -> dict[str, str]:
    """Versions of Python and of those distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_sha() -> str | None:
    """The commit of this checkout; None where the package was installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def instruction_set() -> str:
    """The vector instructions that PyTorch's own CPU kernels use here, such as AVX512: a container may hide some."""
    return torch.backends.cpu.get_cpu_capability()


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks of the SMs and the memory now and at most (MHz), power (W) and temperature (C) at this moment.

    Empty off CUDA. By NVML where `nvidia-ml-py` is installed, which takes a millisecond; else by nvidia-smi, without what
    limits the clocks (`clock_limits`, NVML's bits); empty where there is neither.
    """
    if device.type != "cuda":
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return _nvml_state(uuid) or _smi_state(uuid)


def _nvml_state(uuid: str) -> dict[str, str]:
    try:
        import pynvml as nvml
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        driver = nvml.nvmlSystemGetDriverVersion()
        found = {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,  # bytes in its earlier versions
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "clock_limits": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
            "power_w": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "temp_c": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        }
    except nvml.NVMLError:  # such as one that this GPU does not tell
        return {}
    return {name: str(value) for name, value in found.items()}


def _smi_state(uuid: str) -> dict[str, str]:
    fields = {
        "driver": "driver_version", "sm_clock_mhz": "clocks.sm", "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem", "power_w": "power.draw", "temp_c": "temperature.gpu",
    }  # fmt: skip
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(","))))
