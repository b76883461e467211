"""Counts the calls by which a process changes files in one folder, and ends it at the n-th as `kill -9` does."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Audit events of CPython that change a folder, and which of their arguments is the path.
CHANGES = {
    "open": 0,
    "os.rename": 0,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.truncate": 0,
    "os.chmod": 0,
    "os.link": 1,
    "os.symlink": 1,
    "shutil.rmtree": 0,
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_at(number: int | None, folder: Path, note: Callable[[str], None]) -> None:
    """From now on every change in the folder is noted, and the `number`-th (from 1; None: none) is the last thing that happens.

    What dies at an fsync leaves half of the file, as a writer that is killed between its bytes does.
    """
    count = 0
    root = os.path.realpath(folder)

    def step(event: str, path: str, descriptor: int | None = None) -> None:
        nonlocal count
        if path != root and not path.startswith(root + os.sep):
            return
        count += 1
        note(f"{event} {path.removeprefix(root) or os.sep}")
        if count == number:
            if descriptor is not None and os.path.isfile(path):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not _writes(*arguments[1:]):
            return
        path = arguments[CHANGES[event]]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if isinstance(path, (str, bytes, os.PathLike)):
            step(event, os.path.abspath(os.fsdecode(path)))

    def watched(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def around(file: Any, *arguments: Any) -> Any:
            descriptor = file if isinstance(file, int) else file.fileno()
            step(name, os.readlink(f"/proc/self/fd/{descriptor}"), descriptor)
            return call(file, *arguments)

        return around

    os.fsync = watched(os.fsync, "fsync")
    fcntl.flock = watched(fcntl.flock, "flock")
    sys.addaudithook(audit)


def _writes(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & WRITING)
