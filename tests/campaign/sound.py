"""Sound files of every kind, made by the project itself, and how each is read, used and seen through."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.files import checksum, encode_tensors, read_tensor_file
from diffusers_accel.files.documents import _checksum_of_tensors
from tests.campaign.mutate import json_of, text_of

Picture = Any  # JSON data, and tensors as (dtype, shape, bytes)


@dataclass(frozen=True)
class Subject:
    """A kind of file.

    Args:
        write: makes sound files in a folder; the first is the one that is loaded.
        load: what a user's call does with it.
        picture: everything that a loaded value holds.
        says: the same, of a file on the disk, read without any check of ours; None: nothing but the sound content counts.
        use: what comes after loading; returns nothing, and may refuse.
        seal: damages the file and makes its checksums fit again; says what it did.
    """

    name: str
    write: Callable[[Path], tuple[Path, ...]]
    load: Callable[[Path], Any]
    picture: Callable[[Any], Picture]
    says: Callable[[Path], Picture] | None = None
    use: Callable[[Any], None] = lambda value: None
    seal: Callable[[Path, Random], str] | None = None


def picture_of_tensors(tensors: dict[str, Any]) -> Picture:
    return {name: _picture_of_tensor(torch.as_tensor(tensor)) for name, tensor in tensors.items()}


def _picture_of_tensor(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    plain = tensor.detach().contiguous()
    return str(plain.dtype), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Picture, b: Picture) -> bool:
    """Equality of JSON data in which 1 is 1.0 but not true, and in which NaN is itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b) or (a != a and b != b)


def raw_json(path: Path) -> Any:
    """JSON data without any check of ours, without its checksum; None where that is of other data."""
    return unsealed(json.loads(path.read_bytes()))


def unsealed(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return rest if data.get("sha256", checksum(rest)) == checksum(rest) else None


def raw_lines(path: Path) -> Any:
    """The rows of a file of lines; the last one counts only if it is whole."""
    *lines, rest = path.read_bytes().split(b"\n")
    rows = [unsealed(json.loads(line)) for line in lines]
    try:
        return rows + ([unsealed(json.loads(rest))] if rest else [])
    except ValueError:
        return rows


def raw_tensors(path: Path) -> tuple[dict[str, str], Picture]:
    """Texts and tensors of a safetensors file, read by its description."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = header.pop("__metadata__", {})
    kinds = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        kind = entry["dtype"].rstrip("0123456789")
        dtype = f"torch.{kinds.get(kind, kind.lower())}{entry['dtype'].removeprefix(kind)}"
        tensors[name] = (dtype, tuple(entry["shape"]), data[8 + length + start : 8 + length + stop])
    return texts, tensors


def says_document(path: Path) -> Picture:
    """Content and tensors of a document; None where its checksum is of others."""
    texts, tensors = raw_tensors(path)
    if texts["sha256"] != _checksum_of_tensors(texts["content"], read_tensor_file(path).tensors):
        return None
    return json.loads(texts["content"]), tensors


def seal_json(path: Path, random: Random) -> str:
    """Damages a JSON document and gives it the checksum of what it then says."""
    done, data, raw = json_of(raw_json(path), random)
    if isinstance(data, dict) and raw is None:
        data["sha256"] = checksum(data)
    path.write_bytes(text_of(data, raw))
    return done


def seal_line(path: Path, random: Random) -> str:
    """The same, of one of the rows of a file of lines."""
    lines = path.read_bytes().splitlines()
    number = random.randrange(len(lines))
    done, data, raw = json_of(unsealed(json.loads(lines[number])), random)
    if isinstance(data, dict) and raw is None:
        data["sha256"] = checksum(data)
    lines[number] = b" ".join(text_of(data, raw).split(b"\n"))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {number} {done}"


def seal_document(path: Path, random: Random) -> str:
    """The same, of a document with tensors."""
    file = read_tensor_file(path)
    tensors, text = dict(file.tensors), file.texts["content"]
    if random.random() < 0.5:
        done, data, raw = json_of(json.loads(text), random)
        text = text_of(data, raw).decode()
    else:
        done = damage_tensors(tensors, random)
    texts = {**file.texts, "content": text, "sha256": _checksum_of_tensors(text, tensors)}
    path.write_bytes(encode_tensors(tensors, texts))
    return done


def damage_tensors(tensors: dict[str, Tensor], random: Random) -> str:
    """Another value, type, shape or name in one of the tensors."""
    name = random.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = random.choice(("value", "value", "all", "type", "shape", "shorter", "drop", "rename", "add", "empty"))
    value = random.choice((0, 1, -1, 255, 127, 2**31 - 1, float("nan"), float("inf"), -float("inf"), 1e300, 0.5))
    if kind in ("value", "all") and tensor.numel():
        flat = tensor.view(-1)
        one = torch.tensor(value, dtype=torch.float64)
        with np.errstate(invalid="ignore"):
            cast = (
                one.nan_to_num().clamp(-(2**31), 2**31).to(tensor.dtype)
                if not tensor.is_floating_point()
                else one.to(tensor.dtype)
            )
        if kind == "all":
            flat[:] = cast
        else:
            flat[random.randrange(len(flat))] = cast
        tensors[name] = tensor
        return f"{name}: {kind} {value}"
    if kind == "type":
        new = random.choice(
            (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool)
        )
        tensors[name] = tensor.nan_to_num().to(new) if tensor.is_floating_point() else tensor.to(new)
        return f"{name}: as {new}"
    if kind == "shape":
        tensors[name] = random.choice((tensor.reshape(-1), tensor[None], tensor.transpose(0, -1).contiguous()))
    elif kind == "shorter" and tensor.dim():
        tensors[name] = tensor[: len(tensor) // 2].clone()
    elif kind == "rename":
        tensors[random.choice((f"{name}x", name.replace("transformer", "transformer_2"), "a\x1b[31m"))] = tensors.pop(
            name
        )
    elif kind == "add":
        tensors["more"] = torch.zeros(3)
    elif kind == "empty":
        tensors[name] = tensor.new_zeros(0)
    else:
        del tensors[name]
    return f"{name}: {kind}"
