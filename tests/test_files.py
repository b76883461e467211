"""Files: whole or not at all, one writer at a time, and no change of a document goes unnoticed."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from diffusers_accel.files import (
    FileError,
    FlushError,
    Kind,
    Schema,
    WriteError,
    append_line,
    check_appends,
    convert,
    encode_line,
    encode_tensors,
    load_document,
    load_tensor_document,
    only_writer,
    parse_json,
    prepare_file,
    prepare_folder,
    printable,
    quoted,
    read_json,
    read_lines,
    read_tensor_file,
    read_tensors,
    save_document,
    save_tensor_document,
    side_file,
    write_json,
    write_together,
    write_whole,
)

KIND = Kind("test.notes", 1, "write them again")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str] | None:
    reference, data = side_file(path, tensors)
    if reference:
        path.with_name(reference["file"]).write_bytes(data)
    return reference


class Note(Schema):
    name: str
    counts: dict[str, tuple[int, ...]]
    share: float = 0.5


class Required(msgspec.Struct):
    """Takes no notice of other keys."""

    ms: float


NOTE = Note(name="a", counts={"x": (1, 2)}, share=0.25)


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path, failures = tmp_path / "plan.json", []
    texts = [str(number).encode() * 5000 for number in range(8)]

    def write(data: bytes) -> None:
        for _ in range(25):
            try:
                write_whole(path, data)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in texts
    assert not failures
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_a_planted_link_is_not_followed_and_permissions_stay(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "plan.json"
    victim.write_bytes(b"mine")
    (tmp_path / f".plan.json.{os.getpid()}.tmp").symlink_to(victim)
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_whole(path, b"new")
    assert victim.read_bytes() == b"mine"
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    shared, path = tmp_path / "blob", tmp_path / "plan.json"
    shared.write_bytes(b"shared")
    path.symlink_to(shared)
    write_whole(path, b"new")
    assert not path.is_symlink() and path.read_bytes() == b"new" and shared.read_bytes() == b"shared"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_rows_are_added_where_a_link_leads_and_its_names_share_a_lock(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, path = tmp_path / "disk" / "rows.jsonl", tmp_path / "rows.jsonl"
    path.symlink_to(real)
    with only_writer(path, "a run"):
        append_line(path, {"a": 1})
        with pytest.raises(FileError, match="a run; wait for its end"), only_writer(real, "a run"):
            pass
    assert path.is_symlink() and read_lines(real, "a row", "delete it") == [{"a": 1}]


@pytest.mark.skipif(sys.platform == "win32", reason="file locks of POSIX")
def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from diffusers_accel.files import whole\n"
        "with whole._temporary(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print(file.name, flush=True); time.sleep(60)"
    )
    path = tmp_path / "plan.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    names = [Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout]
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    for name in names:
        os.utime(name, (time.time() - 3600,) * 2)
    try:
        write_whole(path, b"new")
        assert not names[0].exists() and names[1].exists()
    finally:
        writers[1].kill()
        writers[1].wait()


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(WriteError, match="cannot be written: it is a folder; name a file"):
        prepare_file(tmp_path)
    with pytest.raises(WriteError, match="there is a file of that name"):
        prepare_folder(file)
    for prepare in (prepare_file, prepare_folder):
        with pytest.raises(WriteError, match="cannot be written"):
            prepare(file / "below" / "it")
    prepare_file(tmp_path / "new" / "plan.json")
    prepare_folder(tmp_path / "report")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "new", "report"]


def test_files_that_belong_together_are_all_written_or_none(tmp_path: Path) -> None:
    old = {tmp_path / "side": b"old side", tmp_path / "plan.json": b"old plan"}
    write_together(old)
    with pytest.raises(FileNotFoundError, match="expected a folder to write plan.json into"):
        write_together({tmp_path / "side": b"new", tmp_path / "other": b"new", tmp_path / "none" / "plan.json": b"new"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old
    write_together({tmp_path / "side": b"new", tmp_path / "plan.json": b"new"})
    assert (tmp_path / "side").read_bytes() == (tmp_path / "plan.json").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not flushed on Windows")
def test_a_name_is_on_the_disk_before_the_file_that_refers_to_it_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), done.append(Path(b).name)))
    monkeypatch.setattr(os, "fsync", flush)
    write_together({tmp_path / "side": b"new", tmp_path / "plan.json": b"new"})
    assert done == ["file", "file", "side", "folder", "plan.json", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not flushed on Windows")
@pytest.mark.parametrize(("error", "kept"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders_is_none_that_fails(
    error: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with nullcontext() if kept else pytest.raises(FlushError, match="Input/output error; the new one is in its place"):
        write_whole(tmp_path / "plan.json", b"new")
    assert (tmp_path / "plan.json").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_whole_numbers_that_floats_hold_exactly_stand_for_them(tmp_path: Path) -> None:
    assert convert({"name": "a", "counts": {"x": [2**53 + 1]}, "share": 2**60}, Note).share == 2.0**60
    assert convert([{"a": 2**53 + 1}], list[dict[str, int | float]]) == [{"a": 2**53 + 1}]
    assert convert({"ms": 1, "more": 2**53 + 1}, Required) == Required(ms=1.0)
    with pytest.raises(
        FileError, match=r"^x\[1\]: expected a number that a float holds exactly, found -9007199254740993"
    ):
        convert({"x": [1, -(2**53) - 1]}, dict[str, tuple[float, ...]])


@pytest.mark.skipif(sys.platform == "win32", reason="an open file is not replaced on Windows")
@pytest.mark.parametrize("load", [read_json, read_tensor_file, lambda path: read_lines(path, "a row", "delete it")])
def test_a_file_that_another_writer_replaces_meanwhile_is_read_whole(
    load: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever look at its name finds the other one: the new one is longer, so that its start is none of them."""
    path, new = tmp_path / "file", tmp_path / "new"

    def write(to: Path, size: int) -> None:
        if load is read_tensor_file:
            to.write_bytes(encode_tensors({"a": torch.zeros(size)}))
        else:
            to.write_bytes(encode_line({"a": "x" * size}))

    looks = 0

    def replacing(stock: Callable[..., Any], at: int) -> Callable[..., Any]:
        def look(name: Any, *arguments: Any, **more: Any) -> Any:
            nonlocal looks
            found = stock(name, *arguments, **more)
            if not isinstance(name, int) and Path(name) == path:
                looks += 1
                if looks == at:
                    os.replace(new, path)
            return found

        return look

    for at in range(1, 5):
        write(path, 10)
        write(new, 1000)
        looks = 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", replacing(os.stat, at))
            patched.setattr(os, "open", replacing(os.open, at))
            patched.setattr(io, "open", replacing(io.open, at))
            patched.setattr("builtins.open", replacing(open, at))
            found = load(path)
        assert found, at


@pytest.mark.skipif(sys.platform == "win32", reason="file locks of POSIX")
def test_what_was_left_of_a_probe_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".probe.0123456789abcdef.tmp"
    left.write_bytes(b"")
    os.utime(left, (time.time() - 3600,) * 2)
    prepare_file(tmp_path / "plan.json")
    prepare_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from diffusers_accel.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_whole(Path(sys.argv[1]), bytes(5000))"
    )
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"{path}: cannot be written: File too large; what was there before is as it was" in done.stderr
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_one_writer_at_a_time_and_the_next_one_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    code = (
        "import sys, time; from pathlib import Path; from diffusers_accel.files import only_writer\n"
        "with only_writer(Path(sys.argv[1]), 'a test holds it'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(FileError, match="another search measures into it; wait"),
        only_writer(path, "another search measures into it"),
    ):
        pass
    holder.kill()
    holder.wait()
    with only_writer(path, "another"), pytest.raises(FileError, match="another"), only_writer(path, "another"):
        pass
    with only_writer(path, "another"):
        pass


def test_a_document_comes_back_and_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    save_document(path, KIND, NOTE)
    assert load_document(path, KIND, Note) == NOTE
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 4):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert load_document(path, KIND, Note) == NOTE
            except FileError as error:
                assert str(error).startswith(f"{path}: ") and len(str(error)) < 500
    save_document(path, KIND, Note(name=torch.__version__, counts={}, share=np.float64(0.5)))
    assert load_document(path, KIND, Note) == Note(name=str(torch.__version__), counts={})
    reordered = dict(reversed(json.loads(whole).items()))
    path.write_text(json.dumps(reordered))
    assert load_document(path, KIND, Note) == NOTE, "indentation and order are not content"


def test_a_tensor_document_comes_back_and_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    path, tensors = tmp_path / "note.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 2)}
    save_tensor_document(path, KIND, NOTE, tensors)

    def same() -> bool:
        note, found = load_tensor_document(path, KIND, Note)
        return note == NOTE and found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)

    assert same()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert same()
        except FileError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 500
    path.write_bytes(whole[:-1])
    with pytest.raises(FileError, match="is it cut off"):
        same()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected the format test.notes, found 'other'"),
        ({"version": 0}, "expected version 1 of test.notes, found 0"),
        ({"version": True}, "expected version 1 of test.notes, found True"),
        ({"name": 3}, "name: expected str, found int"),
        ({"counts": {"x": [1, "2"]}}, "counts"),
        ({"more": 1}, "found the unknown key more"),
        ({"share": None}, "share: expected float, found null"),
        ({"share": 2**53 + 1}, "share: expected a number that a float holds exactly, found 9007199254740993"),
    ],
)
def test_a_document_of_another_shape_says_where(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from diffusers_accel.files import checksum

    path = tmp_path / "note.json"
    save_document(path, KIND, NOTE)
    data = {**json.loads(path.read_bytes()), **change}
    data.pop("sha256")
    write_json(path, {**data, "sha256": checksum(data)})
    with pytest.raises(FileError, match=message) as caught:
        load_document(path, KIND, Note)
    assert str(caught.value).endswith("; write them again")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\udfff": 1}', "half a character"),
        (b'{"a": 1e999}', "finite"),
        (b'{"a": 9223372036854775808}', "64 bits"),
        (b'{"a": %s}' % (b"9" * 5000), "cannot be read"),
        (b"[" * 40 + b"]" * 40, "32 levels"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"%s": 1, "%s": 2}' % (b"k" * 5_000_000, b"k" * 5_000_000), "characters more"),
        (b"\x80\x04K\x01.", "pickle"),
        (b"{", "cut off"),
    ],
)
def test_what_json_must_not_hold(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message) as caught:
        parse_json(data)
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes of POSIX")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, message in (
        (pipe, "device, pipe or socket"),
        (tmp_path, "found a folder"),
        (tmp_path / ("n" * 300), "cannot be read"),
        (tmp_path / "no\0thing", "no system takes"),
    ):
        with pytest.raises(FileError, match=message):
            read_json(path)
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        read_json(tmp_path / "absent.json")


def test_a_side_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    reference = write_tensors(path, {"a": torch.ones(3)})
    assert reference and torch.equal(read_tensors(path, reference)["a"], torch.ones(3))
    os.truncate(tmp_path / reference["file"], 3 * 2**30)
    begin = time.monotonic()
    with pytest.raises(FileError, match="as its header says, found 3,221,225,472"):
        read_tensors(path, reference)
    assert time.monotonic() - begin < 1


def test_tensors_of_types_that_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"a": torch.ones(3).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(FileError, match="expected a tensor of one of the types .*F8_E4M3"):
        read_tensor_file(path)
    header = b'{"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match=r"'a': expected a tensor of one of the types .* found \[\]"):
        read_tensor_file(path)
    with pytest.raises(FileError, match="a: expected a tensor of one of the types .* found torch.float8_e4m3fn"):
        write_tensors(path, tensors)
    with pytest.raises(FileError, match="half a character"):
        write_tensors(path, {"\ud800": torch.ones(3)})


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "c": whole[2:4]}
    found = read_tensors(tmp_path / "plan.json", write_tensors(tmp_path / "plan.json", tensors))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_values_in_messages_are_short_and_steer_no_terminal() -> None:
    assert len(quoted("x" * 5_000_000)) < 300 and len(quoted(["x"] * 100_000)) < 300
    assert printable("a\x1b[31mb\nc\u202ed\ud800") == "a\\x1b[31mb\\nc\\u202ed\\ud800"
    for whole in ("Grüße, 世界 🎈", "👩\u200d🚀", "می\u200cخواهم", "10\u00a0km"):
        assert printable(whole) == whole


def test_long_names_are_refused_before_the_work_or_written(tmp_path: Path) -> None:
    """In bytes, as systems count them, and with room for what stands beside a file."""
    with pytest.raises(WriteError, match="cannot be written: File name too long"):
        prepare_file(tmp_path / ("字" * 80 + ".json"))
    long = tmp_path / ("字" * 60 + ".json")
    prepare_file(long)
    write_whole(long, b"x")
    assert long.read_bytes() == b"x"


def test_only_temporary_files_of_ours_are_swept(tmp_path: Path) -> None:
    mine = tmp_path / ".plan.json.mine.tmp"
    mine.write_bytes(b"a user's own")
    os.utime(mine, (time.time() - 3600,) * 2)
    write_whole(tmp_path / "plan.json", b"new")
    assert mine.exists()


def test_a_place_deep_in_a_file_keeps_its_message_short() -> None:
    data = b'{"%s":' % (b"k" * 60) * 31 + b"1e999" + b"}" * 31
    with pytest.raises(FileError, match="expected a finite number") as caught:
        parse_json(data)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["\x1b" * 300, "\x1b" * 200, "\n" * 199, "\ud800" * 250, "x" * 5_000_000])
def test_what_escapes_lengthen_is_cut_too(text: str) -> None:
    assert len(quoted(text)) < 260 and quoted(text).isprintable()


def test_a_file_of_a_later_release_is_not_to_be_deleted(tmp_path: Path) -> None:
    kind = Kind("diffusers_accel.test", 3, "delete the file")
    for version, advice in (
        (4, "found 4: a later release has written it; upgrade diffusers-accel"),
        (2, "delete the file"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"format": kind.format, "version": version, "sha256": "0"}))
        with pytest.raises(FileError, match=advice) as caught:
            load_document(tmp_path / "x.json", kind, Schema)
        assert ("delete" in str(caught.value)) == (version < kind.version)


def test_rows_that_cannot_be_added_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    check_appends(path)  # a file that is not there is made later
    path.write_text("{}\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WriteError, match="cannot be written: Permission denied; its rows are kept"):
        check_appends(path)
