"""The weights of DISTS: how its authors weigh channels, out of their package `dists-pytorch`; and VGG16, by `lpips_weights`."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_accel.evals.metrics import lpips_weights, published
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.files import printable

REQUIREMENT = "dists-pytorch==0.1"
ARCHIVE = "DISTS_pytorch-0.1-py3-none-any.whl"
ARCHIVE_SHA256 = "73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61"
MEMBER = "DISTS_pytorch/weights.pt"
TENSORS_SHA256 = "feaef4d795777e888d25a977de808413a324a07f9a4a4942e68a97568b5d44ef"
KEPT = "dists"


def load() -> dict[str, Tensor]:
    """alpha [1475] and beta [1475]; raises MetricUnavailable as `published.kept` does."""
    return published.kept(KEPT, TENSORS_SHA256, "dists")


def fetch(say: Callable[[str], None]) -> None:
    """Fetches and keeps them and VGG16; raises MetricUnavailable."""
    say(f"fetching the published weights of DISTS ({REQUIREMENT}, 20 KB)")
    weights = read(_fetch())
    say(f"dists: {printable(published.keep(KEPT, TENSORS_SHA256, weights))}")
    lpips_weights.fetch(say)


def _fetch() -> bytes:
    """The file of tensors out of the wheel, whose hash is checked."""
    with zipfile.ZipFile(io.BytesIO(published.download(REQUIREMENT, ARCHIVE, ARCHIVE_SHA256))) as wheel:
        return wheel.read(MEMBER)


def read(data: bytes) -> dict[str, Tensor]:
    """A file of torch's with alpha and beta [1, C, 1, 1] as [C]; raises MetricUnavailable for anything else."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
        return {name: found[name].detach().flatten().float() for name in ("alpha", "beta")}
    except Exception as error:  # a hostile or broken file may raise anything
        raise MetricUnavailable(f"the weights of DISTS cannot be read: {error}") from error
