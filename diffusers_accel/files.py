"""Files that are read strictly and written whole: JSON, and tensors beside it in a safetensors file named by its hash.

Nothing in a file is ever executed: JSON and safetensors hold plain data only, and a pickle is refused by its first bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

MAX_JSON_BYTES = 16 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileError(ValueError):
    """A file, or data meant for one, is not what it should be: the message says what was expected and what was found."""


def read_json(path: Path) -> Any:
    """Parses a JSON file of at most 16 MiB; duplicate keys, NaN and infinities are refused.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: whatever is there is not such a file.
    """
    if path.is_dir():
        raise FileError(f"{path}: expected a JSON file, found a directory; give the path of the file inside it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a JSON file, found nothing there")
    if not path.is_file():
        raise FileError(f"{path}: expected a regular JSON file, found a device, pipe or socket")
    size = path.stat().st_size
    if size == 0:
        raise FileError(f"{path}: expected JSON, found an empty file; was writing it interrupted?")
    if size > MAX_JSON_BYTES:
        raise FileError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {size}; is it another kind of file?"
        )
    data = path.read_bytes()
    try:
        return json.loads(_text(data), object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise FileError(f"{path}: expected JSON, found {error}; is the file cut off?") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as readable JSON under a temporary name, then renames it to `path`.

    Raises:
        FileError: `data` holds something that JSON cannot, such as a NaN.
    """
    check_json(data, path.name)
    write_whole(path, (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes under a temporary name in the same folder, then renames: `path` holds either all of `data` or what it held."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent}: expected a folder to write {path.name} into, found none; make it first"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_json(value: object, path: str, depth: int = 0) -> None:
    """Refuses what would not come back from JSON as it went in: NaN, infinities, tuples, keys that are not strings."""
    if depth > 32:
        raise FileError(f"{path}: expected at most 32 levels of nesting, found more")
    if isinstance(value, float) and not math.isfinite(value):
        raise FileError(f"{path}: expected a finite number, found {value}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FileError(f"{path}: expected text as keys, found {key!r}")
            check_json(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise FileError(f"{path}: expected plain JSON data, found {type(value).__name__}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Writes tensors beside the JSON file `path` and returns the reference that its "tensors" entry holds.

    The side file is named by its content, `<stem>.<start of its sha256>.safetensors`, so that it never replaces the one
    that the JSON file on disk refers to until that is replaced too. Side files of earlier versions are left where they are.
    """
    if not tensors:
        return None
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    side = path.with_name(f"{path.stem}.{digest[:12]}.safetensors")
    write_whole(side, data)
    return {"file": side.name, "sha256": digest}


def read_tensors(path: Path, reference: object) -> dict[str, Tensor]:
    """Loads the side file that the "tensors" entry of the JSON file `path` refers to; messages begin with "tensors".

    Raises:
        FileError: the reference leaves the folder, or the side file is missing, cut off or not the one that was saved.
    """
    if reference is None:
        return {}
    where = "tensors"
    if not isinstance(reference, Mapping) or set(reference) != {"file", "sha256"}:
        raise FileError(f'{where}: expected null or an object with the keys "file" and "sha256", found {reference!r}')
    name, expected = reference["file"], reference["sha256"]
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", name) or name.startswith(".."):
        raise FileError(f"{where}.file: expected the name of a .safetensors file in the same folder, found {name!r}")
    if not isinstance(expected, str) or not _SHA256.fullmatch(expected):
        raise FileError(f"{where}.sha256: expected 64 lower-case hexadecimal digits, found {expected!r}")
    side = path.with_name(name)
    if not side.is_file():
        raise FileError(f"{where}.file: expected {side} beside the JSON file, found none; copy both files together")
    data = side.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise FileError(
            f"{where}: {side}: expected sha256 {expected}, found {found} ({len(data)} bytes); "
            f"it is cut off or of another version: copy it again together with {path.name}"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise FileError(f"{where}: {side}: expected a safetensors file, found {error}") from error


def _text(data: bytes) -> str:
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise FileError(
            "expected JSON, found a pickle or a torch.save archive; these could run code and are never read"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"expected JSON in UTF-8, found binary data ({error.reason} at byte {error.start})") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FileError(f"expected each key once in an object, found {key!r} twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise FileError(f"expected a finite number, found {name}")
