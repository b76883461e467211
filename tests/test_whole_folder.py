"""Folders that are replaced whole: complete before or after, whatever fails in between."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.files import FlushError, WriteError, prepare_whole_folder, whole_folder, write_whole

NAMES = ("a.txt", "b.txt")


def fill(path: Path, text: str) -> None:
    with whole_folder(path, NAMES) as new:
        for name in NAMES:
            write_whole(new / name, text.encode())


def content(path: Path) -> dict[str, str]:
    return {each.name: each.read_text() for each in path.iterdir()}


def both(text: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, text)


def test_a_new_folder_and_one_that_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report"
    fill(path, "one")
    assert content(path) == both("one")
    path.chmod(0o750)
    (path / "b.txt").unlink()
    fill(path, "two")
    assert content(path) == both("two") and path.stat().st_mode & 0o777 == 0o750
    assert [each.name for each in path.parent.iterdir()] == ["report"]


def test_an_exception_inside_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report"
    fill(path, "one")
    with pytest.raises(RuntimeError, match="luck"), whole_folder(path, NAMES) as new:
        write_whole(new / "a.txt", b"two")
        raise RuntimeError("out of luck")
    assert content(path) == both("one") and [each.name for each in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("function", ["replace", "rename", "fsync"])
def test_a_full_disk_names_the_folder_and_leaves_the_old_one(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    fill(path, "one")
    stock, calls = getattr(os, function), 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first fsync is the probe's; the second rename is that of the new folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(*arguments)

    monkeypatch.setattr(os, function, full)
    with pytest.raises(WriteError, match=r"report: cannot be written: No space left on device; .*as it was"):
        fill(path, "two")
    assert content(path) == both("one") and [each.name for each in tmp_path.iterdir()] == ["report"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not flushed on Windows")
def test_a_parent_that_cannot_be_flushed_holds_the_new_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    fill(path, "one")
    stock = os.fsync

    def flush(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        stock(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", flush)
        with pytest.raises(
            FlushError, match=f"^{re.escape(str(path))}: was written, but .*the new one is in its place"
        ):
            fill(path, "two")
    assert content(path) == both("two")
    fill(path, "three")
    assert content(path) == both("three") and [each.name for each in tmp_path.iterdir()] == ["report"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("at", [1, 2])
def test_after_a_kill_between_the_renames_the_old_one_is_back(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    fill(path, "one")
    if (child := os.fork()) == 0:  # a process of its own, whose end runs no `finally`
        stock, calls = os.rename, 0

        def rename(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                os._exit(9)
            stock(*arguments)

        os.rename = rename  # type: ignore[assignment]
        try:
            fill(path, "two")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "of this child, and of no other test's"
    assert path.exists() == (at == 1)
    assert len(list(tmp_path.iterdir())) == 2
    assert prepare_whole_folder(path, NAMES) == path
    assert content(path) == both("one")
    (left,) = (each for each in tmp_path.iterdir() if each != path)
    os.utime(left, (time.time() - 1000,) * 2)  # younger ones may belong to a writer that is about to lock them
    fill(path, "three")
    assert content(path) == both("three") and [each.name for each in tmp_path.iterdir()] == ["report"]


def test_a_folder_that_is_being_filled_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "report"
    with whole_folder(path, NAMES) as new:
        write_whole(new / "a.txt", b"slow")
        os.utime(new, (time.time() - 1000,) * 2)
        fill(path, "quick")
        assert (new / "a.txt").exists()
        write_whole(new / "b.txt", b"slow")
    assert content(path) == both("slow")


def test_what_would_be_lost_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report"
    path.mkdir()
    (path / "mine.txt").touch()
    with pytest.raises(WriteError, match=r"report: .* holds other files \(mine.txt\); name a folder of its own"):
        prepare_whole_folder(path, NAMES)
    assert (path / "mine.txt").exists()
    with pytest.raises(WriteError, match="there is a file of that name"):
        prepare_whole_folder(path / "mine.txt", NAMES)
    with pytest.raises(WriteError, match="is a file, not a folder|there is a file"):
        prepare_whole_folder(path / "mine.txt" / "report", NAMES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(WriteError, match="it is where you are.*name a folder of its own, such as new"):
        prepare_whole_folder(Path("."), NAMES)
    with pytest.raises(WriteError, match="null"):
        prepare_whole_folder(Path("a\0b"), NAMES)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here", "report"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    fill(real, "one")
    (tmp_path / "link").symlink_to(real)
    fill(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and content(real) == both("two")
