"""One writer at a time, over the hours of a measurement: a lock beside the file that it fills."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from diffusers_accel.files.errors import FileError, WriteError, printable


@contextlib.contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Holds `.<name>.lock` beside `path` for this process and thread alone; the system frees it when the process ends.

    Where `path` is a link the lock is beside the file that it leads to, so that all names of a file share one.

    Args:
        what: who holds it, for the message, such as "another search measures into it".

    Raises:
        FileError: somebody else holds it.
        WriteError: the folder cannot be written.
    """
    real = Path(os.path.realpath(path))
    lock = FileLock(real.with_name(f".{real.name}.lock"), timeout=0, thread_local=False, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileError(f"{printable(path)}: {what}; wait for its end, or name another file") from None
    except (OSError, NotImplementedError) as error:
        raise WriteError(path, OSError(0, f"its lock cannot be had ({error})"), "name another place") from error
    try:
        yield
    finally:
        lock.release()
