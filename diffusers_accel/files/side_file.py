"""The tensors of a JSON file: beside it, in a safetensors file that is named by its hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusers_accel.files.errors import FileError, printable, quoted
from diffusers_accel.files.safe_tensors import encode_tensors, read_tensor_file

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^/\\:\0]+\.safetensors")


def side_file(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str] | None, bytes]:
    """What the "tensors" entry of the JSON file `path` holds for tensors, None for none, and the bytes of the file that it names.

    The side file is named by its content, `<stem>.<start of its sha256>.safetensors`, so that it never replaces the one
    that the JSON file on disk refers to until that is replaced too. Side files of earlier versions are left where they are.
    """
    if not tensors:
        return None, b""
    data = encode_tensors(tensors)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": f"{path.stem}.{digest[:12]}.safetensors", "sha256": digest}, data


def read_tensors(path: Path, reference: object) -> dict[str, Tensor]:
    """Loads the side file that the "tensors" entry of the JSON file `path` refers to; messages begin with "tensors".

    Raises:
        FileError: the reference leaves the folder, or the side file is missing, cut off or not the one that was saved.
    """
    if reference is None:
        return {}
    name, expected = _checked(reference)
    side = path.with_name(name)
    try:
        file = read_tensor_file(side)
    except FileNotFoundError:
        raise FileError(
            f"tensors.file: expected {printable(side)} beside the JSON file, found none; copy both files together"
        ) from None
    except FileError as error:
        raise FileError(f"tensors: {error}; copy it again together with {printable(path.name)}") from error
    if file.sha256 != expected:
        raise FileError(
            f"tensors: {printable(side)}: expected sha256 {expected}, found {file.sha256}; "
            f"it is damaged or of another version: copy it again together with {printable(path.name)}"
        )
    return file.tensors


def _checked(reference: object) -> tuple[str, str]:
    if not isinstance(reference, Mapping) or set(reference) != {"file", "sha256"}:
        raise FileError(
            f'tensors: expected null or an object with the keys "file" and "sha256", found {quoted(reference)}'
        )
    name, digest = reference["file"], reference["sha256"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("..") or len(name) > 255:
        raise FileError(
            f"tensors.file: expected the name of a .safetensors file in the same folder, found {quoted(name)}"
        )
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise FileError(f"tensors.sha256: expected 64 lower-case hexadecimal digits, found {quoted(digest)}")
    return name, digest
