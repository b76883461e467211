"""Damages files: a bit, a byte, a piece, or a value in their JSON, as disks, editors and attackers do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

MARK = "@@raw@@"  # stands in JSON text for what no Python value gives
RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 40 + "]" * 40,
    "[" * 100_000,
    '{"a": 1, "a": 2}',
    '"\\ud800"',
    '"\\u0000"',
    "01",
    "+1",
    "'x'",
    "",
    "\u0663",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 127, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, -0.5, 1.5, 1e308, 5e-324,
    "", " ", "x", "\u0663", "8x\u0661\u0666", "\u0668x\u0661\u0666", "fhw", "\x1b[31m", "</script>", "a" * 10_000, "../../x",
    "\x1b" * 300, list(range(50_000, 0, -1)), [], {}, [[]], {"": 0}, [None], ["x"], [1, 2], {"kind": "all"}, {"x": {"y": []}},
)  # fmt: skip


def bytes_of(data: bytes, random: Random) -> tuple[str, bytes]:
    """What was done, and the damaged content."""
    name = random.choice(sorted(BYTES))
    return name, BYTES[name](data, random)


def json_of(data: Any, random: Random) -> tuple[str, Any, str | None]:
    """What was done to the JSON data, the damaged copy, and what `MARK` in its text stands for, if it holds one."""
    data = copy.deepcopy(data)
    holder, key = _place(data, random)
    where = f"at {str(key)[:30]!r}"
    value = holder[key]
    kind = random.choice(("value", "value", "like", "like", "like", "raw", "delete", "add", "rename", "repeat", "swap"))
    if kind == "value":
        holder[key] = copy.deepcopy(random.choice(VALUES))
        return f"{where}: {str(holder[key])[:40]!r} for {str(value)[:40]!r}", data, None
    if kind == "like":
        holder[key] = _like(value, random)
        return f"{where}: {str(holder[key])[:40]!r} like {str(value)[:40]!r}", data, None
    if kind == "raw":
        holder[key] = MARK
        raw = random.choice(RAW)
        return f"{where}: {raw[:30]} as it stands", data, raw
    if kind == "delete":
        del holder[key]
    elif kind == "add":
        added = copy.deepcopy(random.choice((value, *VALUES)))
        if isinstance(holder, dict):
            holder[random.choice(("more", "", "kind", "sha256", "\u00e9"))] = added
        else:
            holder.insert(key, added)
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice((f"{key}_", key.upper(), "", key[:-1], key + " "))] = holder.pop(key)
    elif kind == "repeat" and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder) * random.choice((1, 50)))
    else:
        other, at = _place(data, random)
        holder[key], other[at] = other[at], copy.deepcopy(value)
    return f"{where}: {kind}", data, None


def text_of(data: Any, raw: str | None) -> bytes:
    """JSON text as `json` writes it, NaN and half characters included."""
    text = json.dumps(data, indent=1)
    return (text if raw is None else text.replace(f'"{MARK}"', raw)).encode()


def _place(data: Any, random: Random) -> tuple[Any, Any]:
    """A container in the data and a key of it; data is a container that is not empty."""
    places = [(data, key) for key in (data if isinstance(data, dict) else range(len(data)))]
    while True:
        holder, key = random.choice(places)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or random.random() < 0.3:
            return holder, key
        places = [(inner, each) for each in (inner if isinstance(inner, dict) else range(len(inner)))]


def _like(value: Any, random: Random) -> Any:
    """Another value of much the same kind: what a schema alone does not refuse."""
    if isinstance(value, bool):
        return random.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value), value + 2**62, 0))
    if isinstance(value, float):
        return random.choice((-value, value / 2, value * 2, int(value), str(value), value + 1e-9, 1.0 - value, 0.0))
    if isinstance(value, str):
        arabic = value.translate({ord("0") + digit: chr(0x0660 + digit) for digit in range(10)})
        place = random.randrange(len(value) + 1)
        changes = (value[:place] + "x" + value[place:], value[:place] + value[place + 1 :], value.upper(), value + " ")
        return random.choice((*changes, arabic, value[::-1], value * 2, value + "\n", value + "\u202e", [value]))
    if isinstance(value, list):
        return random.choice((value[:-1], value[1:], value[::-1], {str(i): each for i, each in enumerate(value)}))
    if isinstance(value, dict):
        return random.choice((list(value), list(value.items()), dict(list(value.items())[:-1])))
    return random.choice(VALUES)


def _span(data: bytes, random: Random, most: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randrange(1, most))


def _flip(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def _flip_early(data: bytes, random: Random) -> bytes:
    """In what is likely a header."""
    return _flip(data[:400], random) + data[400:]


def _delete(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random)
    return data[:start] + data[stop:]


def _insert(data: bytes, random: Random) -> bytes:
    start, _ = _span(data, random)
    return data[:start] + random.randbytes(random.randrange(1, 9)) + data[start:]


def _duplicate(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random)
    return data[:stop] + data[start:]


def _zero(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random, 5000)
    return data[:start] + bytes(stop - start) + data[stop:]


def _swap(data: bytes, random: Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, random), _span(data, random)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "bit flipped": _flip,
    "bit flipped early": _flip_early,
    "bytes deleted": _delete,
    "bytes inserted": _insert,
    "bytes twice": _duplicate,
    "bytes zeroed": _zero,
    "bytes swapped": _swap,
    "cut off": lambda data, random: data[: random.randrange(len(data))],
    "more behind it": lambda data, random: data + random.randbytes(random.randrange(1, 100)),
    "itself behind it": lambda data, random: data + data,
    "byte order mark": lambda data, random: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, random: data.decode("latin-1").encode("utf-16"),
    "line ends of Windows": lambda data, random: data.replace(b"\n", b"\r\n"),
    "noise": lambda data, random: random.randbytes(random.randrange(1, 2000)),
}
