"""How to get what an extra of this project brings."""

from __future__ import annotations


def install(extra: str, newer: bool = False) -> str:
    """The command for an extra, such as "eval". Nothing is published under the project's name, so it needs a checkout."""
    return f"pip install {'-U ' * newer}'.[{extra}]' in a checkout of diffusers_accel"
