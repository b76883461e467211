"""Clips for looking at: small H.264 films. Nothing is ever measured on them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

GAIN = 4  # of the difference films
SMALLEST_SIDE = 256  # tiny clips are enlarged, pixel by pixel, to about this size


def encode(frames: np.ndarray, fps: int) -> bytes:
    """`[F, H, W, 3]` in 0..1 as an MP4 file that browsers play; NaN is shown black."""
    import imageio_ffmpeg

    pixels = (np.nan_to_num(frames, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    factor = max(1, round(SMALLEST_SIDE / min(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    pixels = pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]  # 4:2:0 needs even sides
    size = (pixels.shape[2], pixels.shape[1])
    # A key frame every few frames, so that stepping and scrubbing land at once.
    options = ["-crf", "18", "-preset", "medium", "-g", "8", "-movflags", "+faststart"]
    with tempfile.TemporaryDirectory(prefix="diffusers_accel_") as folder:
        path = Path(folder, "clip.mp4")
        writer = imageio_ffmpeg.write_frames(
            str(path), size, fps=fps, codec="libx264", quality=None, macro_block_size=2, output_params=options
        )
        writer.send(None)
        for frame in pixels:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()


def encode_difference(reference: np.ndarray, frames: np.ndarray, fps: int) -> bytes:
    """`|frames - reference| x GAIN`, clipped to 0..1, as an MP4 file."""
    return encode(np.abs(frames - reference) * GAIN, fps)
