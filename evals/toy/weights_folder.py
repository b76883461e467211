"""The folder of shipped weights: checked against the hashes of its own training record, then loaded by the host."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from diffusers_accel.files import FileError, convert, read_json

if TYPE_CHECKING:
    from diffusers import WanPipeline

WEIGHTS = Path(__file__).resolve().parent / "weights"
RECORD = "training.json"


class _Record(msgspec.Struct):
    """What of a training record is read; it holds more."""

    files: dict[str, str]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Digest of every file in a folder but the record itself, by its path with forward slashes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def weights_digest(record: dict) -> str:
    """One digest of all the files that a training record names: what a measurement was made of."""
    return hashlib.sha256(json.dumps(record["files"], sort_keys=True).encode()).hexdigest()


def verify_weights(folder: Path = WEIGHTS) -> dict:
    """The folder's training record, after every file that it names was found with its sha256.

    Raises FileNotFoundError or ValueError that names the file, what was expected and what was found.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the toy model's record {path}, found none: its weights come with a checkout of the project, not with "
            "the installed package. Clone it and install from there with pip install -e, where the model can also be trained: "
            "python -m diffusers_accel.evals.toy.training.train --help"
        )
    record = read_json(path)
    try:
        files = convert(record, _Record).files
    except FileError as error:
        raise FileError(
            f"{path}: {error}; take the file from the project again, or export the weights again"
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"expected {file}, named in {path}, found no such file; take it from the project again"
            )
        if (found := sha256(file)) != expected:
            raise ValueError(
                f"expected {file} with sha256 {expected}, found {found}: the file was changed or only partly written; "
                "take it from the project again, or export the weights again"
            )
    return record


def load_pipeline(dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> WanPipeline:
    """The stock `WanPipeline` with the shipped weights in `dtype`, from local files only, after their hashes were checked."""
    from diffusers import WanPipeline

    verify_weights(folder)
    return WanPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
