"""The small model of a checkout, as the commands take it for PIPE."""

from __future__ import annotations

TOY = "toy"


def by_present_name(pipe: str | None) -> str | None:
    """PIPE, with the small model by the name that it has now."""
    if pipe != "shapes":
        return pipe
    from diffusers_accel.support.former import warn_former

    warn_former(pipe, TOY, "PIPE")
    return TOY
