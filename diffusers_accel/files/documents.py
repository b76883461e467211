"""Documents: typed data in a file of a named format and version, with a checksum that tells any later change.

A document is JSON, or JSON in the header of a safetensors file that holds tensors too. Its schema is a msgspec `Struct`:
unknown and missing keys, other types and values out of range are refused with the path of the value. What may stand in no
document, such as duplicate keys, `strict_json` refuses before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from diffusers_accel.files.errors import FileError, NewerFileError, printable, quoted
from diffusers_accel.files.safe_tensors import encode_tensors, read_tensor_file
from diffusers_accel.files.strict_json import check_json, parse_json, read_json, write_json
from diffusers_accel.files.whole import write_whole

T = TypeVar("T")
LARGEST_EXACT = 2**53  # up to it, a float holds every whole number


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a document holds beside its format, version and checksum: a subclass names the fields and their types."""


@dataclass(frozen=True)
class Kind:
    """A format of documents.

    Args:
        format: its name, such as "diffusers_accel.cost".
        version: raised whenever the schema changes.
        remedy: what to do where a file cannot be used, such as "delete it and measure again".
    """

    format: str
    version: int
    remedy: str


def save_document(path: Path, kind: Kind, content: Schema) -> None:
    """Writes a document as JSON, whole or not at all."""
    data = {"format": kind.format, "version": kind.version, **_plain(content)}
    check_json(data, path.name)
    write_json(path, {**data, "sha256": checksum(data)})


def load_document(path: Path, kind: Kind, schema: type[T]) -> T:
    """What `save_document` wrote.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: it is another kind of file, of another version, damaged, or not as the schema says.
    """
    try:
        return parse_document(read_json(path), kind, schema)
    except NewerFileError as error:
        raise NewerFileError(f"{printable(path)}: {error}") from error
    except FileError as error:
        message = str(error).removeprefix(f"{printable(path)}: ")
        raise FileError(f"{printable(path)}: {message}; {kind.remedy}") from error


def parse_document(data: object, kind: Kind, schema: type[T]) -> T:
    """The content of a document that was parsed from JSON; messages begin with the path inside it."""
    if not isinstance(data, dict):
        raise FileError(f"expected {kind.format}, found no JSON object")
    _check_kind(data.get("format"), data.get("version"), kind)
    given = data.pop("sha256", None)
    _check_sum(given, checksum(data))
    return convert({key: value for key, value in data.items() if key not in ("format", "version")}, schema)


def save_tensor_document(path: Path, kind: Kind, content: Schema, tensors: Mapping[str, Tensor]) -> None:
    """Writes a document and its tensors as one safetensors file, whole or not at all."""
    header = _plain(content)
    check_json(header, path.name)
    text = json.dumps(header, allow_nan=False)
    texts = {"format": kind.format, "version": str(kind.version), "content": text}
    write_whole(path, encode_tensors(tensors, {**texts, "sha256": _checksum_of_tensors(text, tensors)}))


def load_tensor_document(path: Path, kind: Kind, schema: type[T]) -> tuple[T, dict[str, Tensor]]:
    """What `save_tensor_document` wrote. Raises as `load_document`."""
    shown = printable(path)
    try:
        file = read_tensor_file(path)
        texts = file.texts
        _check_kind(texts.get("format"), texts.get("version"), kind, str)
        if set(texts) != {"format", "version", "content", "sha256"}:
            raise FileError(
                f"expected format, version, content and sha256 in its header, found {quoted(sorted(texts))}"
            )
        _check_sum(texts["sha256"], _checksum_of_tensors(texts["content"], file.tensors))
        return convert(parse_json(texts["content"].encode(errors="surrogatepass")), schema), file.tensors
    except NewerFileError as error:
        raise NewerFileError(f"{shown}: {error}") from error
    except FileError as error:
        raise FileError(f"{shown}: {str(error).removeprefix(f'{shown}: ')}; {kind.remedy}") from error


def convert(data: object, schema: type[T]) -> T:
    """`data` as a schema says; a FileError begins with the path of the first value that is not.

    A whole number may stand in the place of a float, but only one that a float holds exactly.
    """
    try:
        found = msgspec.convert(data, schema, strict=True)
    except msgspec.ValidationError as error:
        raise FileError(_in_our_words(str(error))) from error
    if rounded := list(_rounded(data)):
        _check_floats(rounded, msgspec.to_builtins(found))
    return found


def _rounded(data: object, *place: Any) -> Iterator[tuple[tuple[Any, ...], int]]:
    """The whole numbers that a float would round, and their places."""
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _rounded(value, *place, key)
    elif isinstance(data, int) and abs(data) > LARGEST_EXACT and data != float(data):
        yield place, data


def _check_floats(rounded: Iterable[tuple[tuple[Any, ...], int]], found: Any) -> None:
    for place, number in rounded:
        if isinstance(_at(found, place), float):
            path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
            raise FileError(f"{printable(path)[:200]}: expected a number that a float holds exactly, found {number}")


def _at(value: Any, place: Iterable[Any]) -> Any:
    """What stands in a place; None where the schema has left out the key."""
    for key in place:
        if isinstance(value, dict) and key not in value:
            return None
        value = value[key]
    return value


def checksum(data: object) -> str:
    """sha256 of JSON data, the same however the file is indented and its keys are ordered."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(content: Schema) -> Any:
    """The fields as JSON data. Not by msgspec's own JSON, which writes a NaN as null."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(item) for key, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value

    return listed(msgspec.to_builtins(content, enc_hook=_builtin))


def _builtin(value: object) -> str | int | float:
    """A kind of text or number, such as PyTorch's version or a float of numpy, as the plain one."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise FileError(f"expected plain JSON data, found {type(value).__name__}")


def _checksum_of_tensors(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_kind(name: object, version: object, kind: Kind, of: type[int] | type[str] = int) -> None:
    if name != kind.format:
        raise FileError(f"expected the format {kind.format}, found {quoted(name)}")
    if type(version) is not of or version != of(kind.version):
        found = f"expected version {kind.version} of {kind.format}, found {quoted(version)}"
        if re.fullmatch(r"[1-9][0-9]{0,5}", str(version)) and int(str(version)) > kind.version:
            raise NewerFileError(
                f"{found}: a later release has written it; upgrade diffusers-accel, or use another file"
            )
        raise FileError(found)


def _check_sum(given: object, found: str) -> None:
    if given != found:
        raise FileError(
            "expected the content that was saved, found another one (its sha256 differs): the file is damaged"
        )


def _in_our_words(message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a[0].b`" in the words and the order of this project's messages."""
    what, _, where = message.partition(" - at `")
    what = re.sub(r"^Expected", "expected", what.replace(", got ", ", found ")).replace("`", "")
    what = re.sub(r"^Object (missing required|contains unknown) field (\S+)$", r"\1 key \2", what)
    what = what.replace("missing required key", "expected the key").replace(
        "contains unknown key", "found the unknown key"
    )
    place = where.rstrip("`").removeprefix("$").removeprefix(".")
    text = printable(f"{place}: {what}" if place else what)
    return text if len(text) <= 300 else f"{text[:300]} ..."
