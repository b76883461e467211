"""`diffusers-accel bench`, whose options and --help are the kernel benchmark's own."""

from __future__ import annotations

from typing import Any

import typer

SETTINGS: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


def bench(context: typer.Context) -> None:
    """Time the attention kernels on this device, against dense attention (bench --help says with which options)."""
    from diffusers_accel.evals import kernel_bench

    kernel_bench.main(context.args)
