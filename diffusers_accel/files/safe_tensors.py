"""Tensors and texts in a safetensors file, read only where the file is whole: what its header tells, no more and no less."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusers_accel.files.errors import FileError, printable, quoted
from diffusers_accel.files.reading import OpenFile, opened
from diffusers_accel.files.strict_json import MAX_JSON_BYTES, check_json, parse_json

MAX_BYTES = 64 * 2**30
# Those with which PyTorch compares and counts on every device; float8 and sub-byte types it can only cast.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds, and the sha256 of its bytes."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]
    sha256: str


def encode_tensors(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of tensors and, in its header, texts; a tensor that has several names is written for each of them.

    Raises:
        FileError: as `check_tensors`.
    """
    check_tensors(tensors)
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in seen else own  # safetensors refuses memory that two tensors share
        seen.add(place)
    return safetensors.torch.save(plain, dict(texts) if texts else None)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses what `read_tensor_file` would not read again: another type than those of `DTYPES`, a name that is no text."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise FileError(f'expected names of tensors, other than "__metadata__", found {quoted(name)}')
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            types = ", ".join(str(each).removeprefix("torch.") for each in DTYPES.values())
            found = quoted(tensor.dtype if isinstance(tensor, Tensor) else tensor)
            raise FileError(f"{printable(name)[:100]}: expected a tensor of one of the types {types}, found {found}")
        check_json(name, "the name of a tensor")


def read_tensor_file(path: Path) -> TensorFile:
    """Reads a safetensors file; the size that its header tells is compared with the file's before the tensors are read.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: it is no such file, is cut off, or holds tensors of another type than those of `DTYPES`.
    """
    shown, kind = printable(path), "a safetensors file"
    with opened(path, MAX_BYTES, kind) as file:
        try:
            texts, expected = _header(_start(file))
            if file.size != expected:
                raise FileError(f"expected {expected:,} bytes, as its header says, found {file.size:,}; is it cut off?")
        except FileError as error:
            raise FileError(f"{shown}: {str(error).removeprefix(f'{shown}: ')}") from error
        data = file.whole()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise FileError(f"{shown}: expected {kind}, found {printable(error)[:200]}") from error
    return TensorFile(tensors, texts, hashlib.sha256(data).hexdigest())


def _start(file: OpenFile) -> bytes:
    """The header's length and its JSON."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= MAX_JSON_BYTES:
        raise FileError("expected a safetensors file, found another kind of file")
    return start + file.read(length)


def _header(start: bytes) -> tuple[dict[str, str], int]:
    """The texts, and how long the file is that belongs to this header."""
    header = parse_json(start[8:])
    if not isinstance(header, dict):
        raise FileError("expected a safetensors file, found another kind of file")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FileError("expected texts as the metadata of a safetensors file, found something else")
    return texts, len(start) + max((_stop(name, entry) for name, entry in header.items()), default=0)


def _stop(name: str, entry: Any) -> int:
    """Where a tensor ends behind the header."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(
            f"{quoted(name)}: expected a tensor of one of the types {', '.join(DTYPES)}, found {quoted(dtype)}"
        )
    offsets = entry.get("data_offsets")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(each) is int and each >= 0 for each in offsets)
    ):
        raise FileError(f"{quoted(name)}: expected where the tensor begins and ends, found {quoted(offsets)}")
    return int(offsets[1])
