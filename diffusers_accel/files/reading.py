"""The one place where files are read, and where what the system says about them becomes ours."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffusers_accel.files.errors import FileError, printable

WAITS_FOR_NOBODY = getattr(os, "O_NONBLOCK", 0)  # as a pipe would that takes a file's place at the last moment


def read_bytes(path: Path, most: int, kind: str) -> bytes:
    """The content of a regular, non-empty file of at most `most` bytes; its size is checked before it is read.

    Args:
        kind: what it should be, for messages, such as "a JSON file".

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: whatever is there is not such a file, or cannot be read.
    """
    with opened(path, most, kind) as file:
        return file.whole()


@dataclass(frozen=True)
class OpenFile:
    """A file that is being read. Others may put another one in its place meanwhile; it stays the same."""

    size: int
    _file: BinaryIO
    _shown: str
    _kind: str

    def read(self, count: int) -> bytes:
        """The next bytes, fewer only where the file ends."""
        with _in_our_words(self._shown, self._kind):
            return self._file.read(count)

    def whole(self) -> bytes:
        """All of it, whatever was read before."""
        with _in_our_words(self._shown, self._kind):
            self._file.seek(0)
            return self._file.read(self.size)


@contextlib.contextmanager
def opened(path: Path, most: int, kind: str) -> Iterator[OpenFile]:
    """The file that `read_bytes` reads; arguments and errors are the same."""
    shown = printable(path)
    with _in_our_words(shown, kind):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{shown}: expected {kind}, found a folder; give the path of the file inside it")
        if not stat.S_ISREG(mode):
            raise FileError(
                f"{shown}: expected {kind}, found a device, pipe or socket; give the path of a regular file"
            )
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | WAITS_FOR_NOBODY))  # noqa: SIM115
    with file:
        size = os.fstat(file.fileno()).st_size  # of this very file, not of what has its name by now
        if size == 0:
            raise FileError(f"{shown}: expected {kind}, found an empty file; was writing it interrupted?")
        if size > most:
            raise FileError(f"{shown}: expected at most {most:,} bytes, found {size:,}; is it another kind of file?")
        yield OpenFile(size, file, shown, kind)


@contextlib.contextmanager
def _in_our_words(shown: str, kind: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{shown}: expected {kind}, found nothing there") from error
    except OSError as error:
        raise FileError(f"{shown}: expected {kind}, found one that cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{shown}: expected the path of {kind}, found one that no system takes: {error}") from error
