"""Folders whose files belong together: a reader finds all files of one writing or all of another, never some of each."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from diffusers_accel.files.errors import FlushError, WriteError, printable
from diffusers_accel.files.whole import STALE_SECONDS, UNTOUCHED, prepare_folder, sync_folder, try_lock

OWN = "name a folder of its own, such as"


def prepare_whole_folder(path: Path, names: Collection[str]) -> Path:
    """Makes sure, before the work whose results it is to hold, that `whole_folder` can make or replace the folder.

    What a killed writer has left beside it is put right first: see `whole_folder`.

    Args:
        names: of the files that it may hold.

    Returns:
        The folder's own path, where `path` is a link to it.

    Raises:
        WriteError: it cannot be made or replaced, or holds something else that would be lost; the message says what.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name that no system takes
        raise WriteError(path, str(error), "name another place") from error
    prepare_folder(real.parent)
    try:
        with _exclusive(real.parent):
            _put_right(real, names)
        if real.exists():
            _check_replaceable(real, path, names)
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(path, error, "name another place") from error
    return real


@contextlib.contextmanager
def whole_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A new folder to fill inside the `with`; at its end it takes the place of `path`, at an exception nothing has changed.

    The new folder stands beside the old one until both are complete on the disk; then the old one is moved aside, the new one
    gets its name, and the old one is removed. A kill between the two renames leaves both, under hidden names beside `path`;
    the next `prepare_whole_folder` or `whole_folder` then gives the old one its name back.

    Raises:
        WriteError: as `prepare_whole_folder`, or the disk is full; what was at `path` is as it was.
        FlushError: the new folder is in its place, whole, and then its parent could not be flushed.
    """
    real = prepare_whole_folder(path, names)
    new = _beside(real, "new")
    try:
        new.mkdir()
        with _held(new):
            if real.is_dir():
                new.chmod(real.stat().st_mode & 0o777)
            yield new
            sync_folder(new)
            with _exclusive(real.parent):
                unflushed = _exchange(new, real, names)
    except OSError as error:
        # Of the place that the user named, not of the hidden one that was being filled.
        reason = OSError(error.errno, os.strerror(error.errno)) if error.errno else str(error)
        raise WriteError(path, reason, UNTOUCHED) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if unflushed:
        raise FlushError(path, unflushed) from unflushed


def _check_replaceable(real: Path, path: Path, names: Collection[str]) -> None:
    if not real.is_dir():
        raise WriteError(path, "there is a file of that name", "name a folder, or move the file away")
    if os.path.ismount(real) or real == Path.cwd():
        raise WriteError(
            path,
            "it is where you are, or a disk, and cannot be replaced as a whole",
            f"{OWN} {printable(path / 'new')}",
        )
    others = sorted(entry.name for entry in real.iterdir() if entry.name not in names)
    if others:
        found = ", ".join(printable(name)[:60] for name in others[:3]) + (", ..." if len(others) > 3 else "")
        reason = f"it is replaced as a whole and holds other files ({found})"
        raise WriteError(path, reason, f"{OWN} {printable(path / 'new')}, or move them away")


def _exchange(new: Path, real: Path, names: Collection[str]) -> OSError | None:
    """Gives the new folder its name and removes the old one; returns why the names are not on the disk, if they are not."""
    old = _beside(real, "old") if real.exists() else None
    if old:
        os.rename(real, old)
    try:
        os.rename(new, real)
    except BaseException:
        if old:
            os.rename(old, real)
        raise
    try:
        sync_folder(real.parent)
    except OSError as error:
        return error  # the old one stays aside: after a power cut it may be the only one
    if old:
        _remove(old, names)
    return None


def _put_right(real: Path, names: Collection[str]) -> None:
    """After a kill: the old folder gets its name back where no new one has it, and what is left over goes."""
    leftover = re.compile(rf"\.{re.escape(real.name[:100])}\.[0-9a-f]{{16}}\.(new|old)")
    for entry in sorted(real.parent.iterdir()):
        if not (match := leftover.fullmatch(entry.name)) or entry.is_symlink() or not entry.is_dir():
            continue
        if match[1] == "old" and not real.exists():
            os.rename(entry, real)
        elif match[1] == "old":
            _remove(entry, names)
        elif _abandoned(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _abandoned(new: Path) -> bool:
    """Whether nobody fills it any more."""
    if sys.platform == "win32" or time.time() - new.stat().st_mtime < STALE_SECONDS:
        return False
    descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return try_lock(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path, names: Collection[str]) -> None:
    """Removes the files of these names and the folder; one that holds anything else stays."""
    with contextlib.suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.{what}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Marks a folder as one that is being filled, as long as this process lives."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _exclusive(parent: Path) -> Iterator[None]:
    """No other process renames folders of `parent` meanwhile; the lock is on the folder itself and leaves no file."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
