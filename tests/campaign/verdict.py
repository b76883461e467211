"""Whether what went wrong was said by this project, and in few words."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_accel.evals.metrics.metric import MetricUnavailable

LONGEST = 500  # characters of a message
ROOT = Path(__file__).resolve().parents[2]
ROOMS = tuple(str(ROOT / room) + os.sep for room in ("diffusers_accel", "search", "evals", "kernels"))


@dataclass(frozen=True)
class Outcome:
    """What a call came to: its value, a refusal in our words, or (raw) an exception in somebody else's."""

    value: Any = None
    refused: str | None = None
    raw: str | None = None


def outcome(call: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(value=call())
    except Exception as error:
        message = str(error)
        if not ours(error):
            return Outcome(raw=f"{type(error).__name__} at {_place(error)}: {message[:200]}")
        if len(message) >= LONGEST:
            return Outcome(
                raw=f"{type(error).__name__} at {_place(error)}: {len(message):,} characters: {message[:300]}"
            )
        return Outcome(refused=message)


def ours(error: BaseException) -> bool:
    """Whether a `raise` of this project made it, of a kind that the command line shows as one line."""
    if not isinstance(error, (ValueError, OSError, RuntimeError, MetricUnavailable)):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = os.path.realpath(frame.filename)
    return path.startswith(ROOMS) and linecache.getline(path, frame.lineno or 0).lstrip().startswith("raise ")


def _place(error: BaseException) -> str:
    """The last line of ours that it went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.realpath(frame.filename)
        if path.startswith(ROOMS):
            return f"{path.removeprefix(str(ROOT) + os.sep)}:{frame.lineno}"
    return "a place outside of this project"
