"""Files that hold either all of what was written or what they held before, whoever else writes and whenever it is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from diffusers_accel.files.errors import FlushError, WriteError

UNTOUCHED = "what was there before is as it was. Free space, or name another place"
LONGEST_NAME = 200  # bytes: what goes beside it, such as a plan's tensors, has a longer one, and systems end at 255
FLUSHES_NO_FOLDER = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # what file systems without it say of a folder
STALE_SECONDS = 60.0  # a temporary file that is younger may be one that its writer has not locked yet


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to a new file in the same folder, then renames it to `path`; file and folder are on the disk on return.

    A link of that name is replaced, and what it leads to stays as it is: caches of shared models link names to files that are
    others' too. Who goes on with a file that a link leads to follows it before (`search.keeping`, `whole_folder`).

    Raises:
        FileNotFoundError: there is no such folder.
        WriteError: it cannot be written (no permission, full disk, a folder of that name); `path` is as it was.
        FlushError: it was written and renamed, and then the folder could not be flushed; `path` holds `data`.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Writes files of one folder that belong together, the one that refers to the others last.

    They get their names, one after another, when all of them are on the disk: a full disk leaves none of them. Each name is on
    the disk before the next one is given, so that no power cut leaves a file that refers to one that is not there.

    Raises:
        FileNotFoundError, WriteError: as `write_whole`; the last file is as it was, and so are others that it referred to,
            unless new ones have the same names.
        FlushError: as `write_whole`; all are the new ones.
    """
    with contextlib.ExitStack() as opened:
        written = {}
        for path, data in files.items():
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    f"{path.parent}: expected a folder to write {path.name} into, found none; make it first"
                )
            with _as_write_error(path):
                _sweep(path)
                file = opened.enter_context(_temporary(path))
                file.write(data)
                _finish(file)
                written[path] = file.name
        last = list(written)[-1]
        for path, name in written.items():
            with _as_write_error(path):
                os.replace(name, path)
                if path != last:
                    sync_folder(path.parent)
    try:
        sync_folder(last.parent)
    except OSError as error:
        raise FlushError(last, error) from error


@contextlib.contextmanager
def _as_write_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(path, error, UNTOUCHED) from error


def prepare_file(path: Path) -> None:
    """Makes sure, before the work whose result it is to hold, that `path` can be written; makes its folder.

    Raises:
        WriteError: it cannot; the message says why. Nothing of what is there was changed.
    """
    if os.path.isdir(path):
        raise WriteError(path, "it is a folder", "name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise WriteError(path, "it is a device, pipe or socket", "name a regular file")
    _prepare(path.parent, path)


def prepare_folder(path: Path) -> None:
    """Makes sure, before the work whose result it is to hold, that files can be written into the folder; makes it.

    Raises:
        WriteError: they cannot; the message says why.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise WriteError(path, "there is a file of that name", "name a folder, or move the file away")
    _prepare(path, path)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk, where the system can: Windows opens no folder, some file systems flush none."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in FLUSHES_NO_FOLDER:
                raise
        finally:
            os.close(descriptor)


def _prepare(folder: Path, path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder / "probe")
        with _temporary(folder / "probe") as file:
            file.write(bytes(4096))
            _finish(file)
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except FileExistsError as error:
        raise WriteError(path, f"{error.filename} is a file, not a folder", "name another place") from error
    except OSError as error:
        raise WriteError(path, error, "nothing was begun. Free space, or name another place") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A new, locked file beside `path`, open for writing; gone at the end, where it was not renamed.

    Its name is nobody else's, and is refused where something stands in its place: neither threads nor containers that share
    a folder meet, and a planted link is not followed.
    """
    name = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    with name.open("xb") as file:
        try_lock(file.fileno())
        try:
            with contextlib.suppress(OSError):  # nothing to replace, or a file system without permissions
                name.chmod(path.stat().st_mode & 0o777)
            yield file
        finally:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more, and is of no use now
                file.close()  # Windows removes no open file
            name.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    """What the names of a file's temporary files begin with; names are limited in bytes."""
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def _finish(file: BinaryIO) -> None:
    """Has all of a file on the disk and closes it, which Windows asks for before it is renamed."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sweep(path: Path) -> None:
    """Removes the temporary files that killed writers of `path` have left: those whose lock nobody holds."""
    if sys.platform == "win32":
        return
    left = re.compile(f"{re.escape(_prefix(path))}[0-9a-f]{{16}}\\.tmp")
    for entry in os.scandir(path.parent):
        with contextlib.suppress(OSError):  # somebody else swept it
            if not left.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < STALE_SECONDS:
                continue
            descriptor = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if try_lock(descriptor):
                    os.unlink(entry.path)
            finally:
                os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Whether this process has the file's lock now; it goes with the descriptor, also when the process is killed."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it, or the file system has none
        return False
    return True
