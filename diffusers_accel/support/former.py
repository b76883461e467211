"""Says that a name that a user has written is a former one, which is still understood."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_USERS = (
    "diffusers_accel.",
    "typer.",
    "click.",
)  # modules between the user's line and what understands the name


def warn_former(former: str, name: str, where: str) -> None:
    """Says that `former` is called `name` now."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back  # up to the line of the user
    message = f"{where}: {former!r} is now called {name!r}; write that instead"
    warnings.warn(message, FutureWarning, stacklevel=level)
