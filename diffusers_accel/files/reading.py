"""The one place where a file's bytes are read, and where what the system says about it becomes ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from diffusers_accel.files.errors import FileError, printable


def read_bytes(path: Path, most: int, kind: str, *, whole: bool = True) -> bytes:
    """The content of a regular, non-empty file of at most `most` bytes; its size is checked before it is read.

    Args:
        kind: what it should be, for messages, such as "a JSON file".
        whole: refuse a longer file; otherwise only its first `most` bytes are read.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: whatever is there is not such a file, or cannot be read.
    """
    shown = printable(path)
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise FileError(f"{shown}: expected {kind}, found a folder; give the path of the file inside it")
        if not stat.S_ISREG(found.st_mode):
            raise FileError(
                f"{shown}: expected {kind}, found a device, pipe or socket; give the path of a regular file"
            )
        if found.st_size == 0:
            raise FileError(f"{shown}: expected {kind}, found an empty file; was writing it interrupted?")
        with open(path, "rb") as file:
            data = file.read(min(most, found.st_size) + whole) if found.st_size <= most or not whole else b""
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{shown}: expected {kind}, found nothing there") from error
    except OSError as error:
        raise FileError(f"{shown}: expected {kind}, found one that cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{shown}: expected the path of {kind}, found one that no system takes: {error}") from error
    if not data or len(data) > most:
        raise FileError(
            f"{shown}: expected at most {most:,} bytes, found {found.st_size:,}; is it another kind of file?"
        )
    return data
