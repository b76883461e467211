"""How a command ends: what it says of errors and of Ctrl-C, its exit code, and text that steers no terminal."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

REFUSED, WITHHELD, INTERRUPTED = 2, 3, 130  # exit codes


class Withheld(Exception):
    """A result that was not written, for the reason that the message gives; --force writes it."""


def run_command(program: str, arguments: Sequence[str], work: Callable[[list[str]], int]) -> NoReturn:
    """Does `work` with the arguments but --debug, and exits: 0 done; 2 refused, with one message; 3 a result withheld; 130
    interrupted. With --debug errors keep their traceback."""
    debug = "--debug" in arguments
    try:
        code = work([argument for argument in arguments if argument != "--debug"])  # which may use the list up
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, Withheld, ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        code = _explain(error, shlex.join([*shlex.split(program), *arguments]))
    sys.exit(code)


def say(text: str) -> None:
    print(safe(text), file=sys.stderr)


def safe(text: str) -> str:
    """`text`, of several lines, without what would steer a terminal."""
    from diffusers_accel.files import printable

    return "\n".join(printable(line) for line in text.split("\n"))


def _explain(error: BaseException, again: str) -> int:
    """Says what has happened and what to do; returns the exit code."""
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"  # of a launcher's processes
    if rank != "0" and getattr(error, "said_elsewhere", False):  # of OtherProcessFailed
        return REFUSED
    if isinstance(error, KeyboardInterrupt):
        if rank != "0":  # the first one says it for all
            return INTERRUPTED
        kept = getattr(error, "kept", None)  # of Interrupted
        say(f"\ninterrupted: {kept}\ngo on with:  {again}" if kept else "\ninterrupted")
        return INTERRUPTED
    say(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}")
    if isinstance(error, Withheld):
        say(f"write it all the same:  {again} --force")
        return WITHHELD
    return REFUSED
