"""JSON that is read strictly and written whole. Nothing in it is ever executed; a pickle is refused by its first bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_accel.files.errors import FileError, printable, quoted
from diffusers_accel.files.reading import read_bytes
from diffusers_accel.files.whole import write_whole

MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 32
LONGEST_PATH = 200
WORD = 2**63  # whole numbers are below it, as in a tensor


def read_json(path: Path) -> Any:
    """Parses a JSON file of at most 16 MiB into data that `check_json` takes; duplicate keys are refused.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: whatever is there is not such a file.
    """
    data = read_bytes(path, MAX_JSON_BYTES, "a JSON file")
    try:
        return parse_json(data)
    except FileError as error:
        raise FileError(f"{printable(path)}: {error}") from error


def parse_json(data: bytes) -> Any:
    """As `read_json`, of bytes; messages begin with what was expected, or with the place in the data."""
    text = _text(data)
    try:
        found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except FileError:
        raise
    except json.JSONDecodeError as error:
        raise FileError(f"expected JSON, found {error}; is the file cut off?") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise FileError(f"expected JSON, found what cannot be read: {error}") from error
    check_json(found, "the file")
    return found


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as readable JSON, whole or not at all (`write_whole`).

    Raises:
        FileError: `data` holds something that JSON cannot, such as a NaN, or more than `read_json` would read again.
    """
    write_whole(path, encode_json(path, data))


def encode_json(path: Path, data: Any) -> bytes:
    """What `write_json` writes; raises as it does, for a file at `path`."""
    check_json(data, path.name)
    encoded = (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if len(encoded) > MAX_JSON_BYTES:
        raise FileError(f"{printable(path)}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, found {len(encoded):,}")
    return encoded


def check_json(value: object, path: str, depth: int = 0) -> None:
    """Refuses what would not come back from JSON as it went in: NaN, infinities, whole numbers of more than 64 bits, tuples,
    keys that are not strings, text that is not Unicode, nesting beyond 32 levels."""
    if depth > MAX_DEPTH:
        raise FileError(f"{path[:100]}: expected at most {MAX_DEPTH} levels of nesting, found more")
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, int):
        if not -WORD <= value < WORD:
            raise FileError(f"{path}: expected a whole number of at most 64 bits, found one of {value.bit_length()}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FileError(f"{path}: expected a finite number, found {value}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FileError(f"{path}: expected text as keys, found {quoted(key)}")
            _check_text(key, path)
            check_json(item, _below(path, f".{printable(key)[:60]}"), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, _below(path, f"[{index}]"), depth + 1)
    else:
        raise FileError(f"{path}: expected plain JSON data, found {type(value).__name__}")


def _below(path: str, step: str) -> str:
    """A place in the data, as far as a message has room for it: its end."""
    longer = path + step
    return longer if len(longer) <= LONGEST_PATH else f"...{longer[-LONGEST_PATH:]}"


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"{path}: expected Unicode text, found half a character ({quoted(text[error.start])})"
        ) from error


def _text(data: bytes) -> str:
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise FileError(
            "expected JSON, found a pickle or a torch.save archive; these could run code and are never read"
        )
    if data[:3] == b"\xef\xbb\xbf" or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FileError("expected JSON in UTF-8, found a byte order mark before it; save the file as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"expected JSON in UTF-8, found binary data ({error.reason} at byte {error.start})") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FileError(f"expected each key once in an object, found {quoted(key)} twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise FileError(f"expected a finite number, found {name}")
