"""`diffusers-accel plan schema`."""

from __future__ import annotations


def plan_schema() -> None:
    """Print the JSON schema of plan files, by which an editor completes and checks them."""
    from diffusers_accel.plan.schema import schema_text

    print(schema_text(), end="")
