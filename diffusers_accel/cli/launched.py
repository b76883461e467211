"""Commands under `accelerate launch` or `torchrun`: several processes of one command, each on a device of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """This process of a command: whether it is the one that writes files and talks, and its device, as torch names it."""

    is_first: bool = True
    device: str | None = None


def several() -> bool:
    """Whether a launcher has started more than this process of the command."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_one_process(command: str) -> None:
    """Refuses a launcher of several processes for a command that would do the same in each."""
    if several():
        raise ValueError(
            f"{command} runs in one process, found {os.environ['WORLD_SIZE']}: start it without accelerate launch or torchrun "
            "(search and report share their work between processes)"
        )


@contextmanager
def launched(device: str | None) -> Iterator[Launched]:
    """Joins the processes of a launcher, where there are several, for one command.

    Args:
        device: that the user asks for, or None.

    Raises:
        ValueError: one device for all of them, or fewer than processes.
        ImportError: there is no accelerate.
    """
    if not several():
        yield Launched(device=device)
        return
    from diffusers_accel.support.device import find_device
    from diffusers_accel.support.processes import LONGEST_WAIT

    found = find_device(device)
    if ":" in (device or ""):
        raise ValueError(
            f"--device: found {device}, one device for {os.environ['WORLD_SIZE']} processes: leave its number out, and each "
            "process takes one of its own"
        )
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("several processes need accelerate, found none: pip install accelerate") from error
    on_cpu = found.type == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu:
        _check_devices()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    try:
        yield Launched(state.is_main_process, "cpu" if on_cpu else str(state.device))
    finally:
        state.destroy_process_group()


def _check_devices() -> None:
    """Refuses more processes than GPUs, which accelerate would let share one."""
    import torch

    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > there:
        raise ValueError(
            f"expected at most a process for each of the {there} GPUs of this machine, found {here}: start {there}, as each "
            "holds the whole pipeline"
        )
