"""Rows in a file that grows: a line of JSON each, with a checksum, on the disk when it was added.

A process may be killed, or the disk be full, in the middle of a line. So a last line without an end does not count, and the
next row takes its place; all others must be as they were written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from diffusers_accel.files.documents import checksum
from diffusers_accel.files.errors import FileError, WriteError, printable, quoted
from diffusers_accel.files.reading import read_bytes
from diffusers_accel.files.strict_json import check_json, parse_json
from diffusers_accel.files.whole import sync_folder

MAX_LINES_BYTES = 2**30
SUM = "sha256"  # of the rest of the row


def encode_line(row: Mapping[str, Any]) -> bytes:
    """A row as it stands in a file, with its checksum and the end of the line."""
    check_json(row, "the row")
    return json.dumps({**row, SUM: checksum(row)}, allow_nan=False).encode() + b"\n"


def check_appends(path: Path) -> None:
    """Makes sure, before the work, that rows can be added to a file that is there; it is not changed.

    Raises:
        WriteError: they cannot.
    """
    try:
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise WriteError(path, error, "its rows are kept. Name another place") from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, and has it on the disk on return; makes the file. One writer at a time: see `only_writer`.

    Raises:
        FileError: the row is no JSON data.
        WriteError: it cannot be written (no folder, no permission, full disk); the rows before it are as they were.
    """
    line = encode_line(row)
    try:
        with path.open("a+b", buffering=0) as file:  # what a full disk does not take is not tried again at the end
            end = _mended(file)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
                if end == 0:
                    sync_folder(path.parent)
            except OSError:
                with contextlib.suppress(OSError):  # half a line that cannot be removed is passed over by `read_lines`
                    file.truncate(end)
                raise
    except OSError as error:
        raise WriteError(path, error, "the rows before are kept. Free space, or name another place") from error


def read_lines(path: Path, kind: str, remedy: str) -> list[dict[str, Any]]:
    """The rows of a file, without their checksums; none where there is no file or an empty one.

    Args:
        kind: what a row should be, for messages, such as "a row of a training log".
        remedy: what to do about a file that holds something else.

    Raises:
        FileError: a line is not as it was written, or the file is something else.
    """
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return []
    *lines, rest = read_bytes(path, MAX_LINES_BYTES, "a file of JSON lines").split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except FileError as error:
            raise FileError(
                f"{printable(path)}, line {number}: expected {kind}, found {quoted(line[:60])} ({error}); {remedy}"
            ) from error
    with contextlib.suppress(FileError):  # a last line that was cut off; whole rows lack an end only by a hand
        rows += [_row(rest)] if rest else []
    return rows


def _row(line: bytes) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise FileError("it is no object")
    if SUM not in row:
        raise FileError(f"it has no {SUM}: it was written by an earlier version, or by something else")
    if row.pop(SUM) != checksum(row):
        raise FileError("its sha256 differs: it was changed after it was written")
    return row


def _mended(file: FileIO) -> int:
    """Ends a last line that has no end, or removes it where it is half a row; where the next row begins."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return size
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    try:
        _row(data[start:])
    except FileError:
        file.truncate(start)
        return start
    file.write(b"\n")
    return size + 1
