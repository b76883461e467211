"""Pickles that run code when they are loaded: each writes to a file that nobody else would make."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any


class _Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def crafted(sentinel: Path) -> dict[str, bytes]:
    """Name -> content: ten ways to call in three protocols each, and three that stand inside archives."""
    import os
    import subprocess

    path = str(sentinel)
    code = f"open({path!r}, 'w').close()"
    calls: dict[str, Any] = {
        "open": _Call(open, path, "w"),
        "exec": _Call(exec, code),
        "eval": _Call(eval, code),
        "system": _Call(os.system, f"touch '{path}'"),
        "mkdir": _Call(os.mkdir, path),
        "subprocess": _Call(subprocess.check_call, ["touch", path]),
        "in a list": [1, 2, _Call(exec, code)],
        "as a key": {_Call(exec, code): 1},
        "nested": {"state": {"a": (_Call(open, path, "w"), 2)}},
        "map": _Call(list, _Call(map, exec, [code])),
    }
    found = {
        f"{name}, protocol {protocol}": pickle.dumps(call, protocol)
        for name, call in calls.items()
        for protocol in (0, 2, 5)
    }
    old = f"cposix\nsystem\n(S'touch {path}'\ntR.".encode()
    inst = f"(S'touch {path}'\niposix\nsystem\n.".encode()
    found |= {"by hand": old, "INST": inst, "gzip": gzip.compress(found["exec, protocol 2"])}
    return found


def in_archive(data: bytes) -> bytes:
    """As `torch.save` writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()
