"""Clips as H.264 films: small ones for looking at, on which nothing is measured, and lossless ones for metrics of sets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

GAIN = 4  # of the difference films
SMALLEST_SIDE = 256  # tiny clips are enlarged, pixel by pixel, to about this size


def encode(film: np.ndarray, fps: int) -> bytes:
    """`pixels`, `[F, H, W, 3]` uint8, as an MP4 file that browsers play."""
    factor = max(1, round(SMALLEST_SIDE / min(film.shape[1:3])))
    film = film.repeat(factor, axis=1).repeat(factor, axis=2)
    film = film[:, : film.shape[1] // 2 * 2, : film.shape[2] // 2 * 2]  # 4:2:0 needs even sides
    # A key frame every few frames, so that stepping and scrubbing land at once.
    return _film(film, fps, "libx264", ["-crf", "18", "-preset", "medium", "-g", "8", "-movflags", "+faststart"])


def encode_lossless(frames: np.ndarray, fps: int) -> bytes:
    """`[F, H, W, 3]` in 0..1, rounded to 8 bits, as an MP4 file that gives these bits again at the same size."""
    return _film(pixels(frames), fps, "libx264rgb", ["-crf", "0", "-preset", "veryfast"])


def difference_pixels(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """`|frames - reference| x GAIN`, clipped to 0..1, as `pixels`."""
    return pixels(np.abs(frames - reference) * GAIN)


def pixels(frames: np.ndarray) -> np.ndarray:
    """`[F, H, W, 3]` in 0..1 as uint8; NaN is 0."""
    return (np.nan_to_num(frames, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8)


def _film(film: np.ndarray, fps: int, codec: str, options: list[str]) -> bytes:
    """`film`: [F, H, W, 3] uint8."""
    import imageio_ffmpeg

    form = "rgb24" if codec == "libx264rgb" else "yuv420p"
    with tempfile.TemporaryDirectory(prefix="diffusers_accel_") as folder:
        path = Path(folder, "clip.mp4")
        size, more = (
            (film.shape[2], film.shape[1]),
            {"quality": None, "macro_block_size": 1, "output_params": options},
        )
        writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, codec=codec, pix_fmt_out=form, **more)
        writer.send(None)
        for frame in film:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()
