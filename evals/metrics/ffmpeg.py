"""Two clips beside each other in a filter of the ffmpeg program that `imageio-ffmpeg` brings or finds."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from diffusers_accel.evals.metrics.metric import MetricUnavailable

LOG, ERRORS = "log", "errors.txt"  # the filter writes the first
LISTED_S = 60  # for the list of filters
# What the filters look at: BT.709 luma, limited range, beside chroma at full size.
YUV = "scale=out_color_matrix=bt709:out_range=tv:sws_dither=none:flags=bicubic+accurate_rnd+full_chroma_int,format="
FORMATS = {8: "yuv444p", 10: "yuv444p10le"}
# One stream of both clips, the dense one above the other: ffmpeg has but one standard input.
APART = "split[a][b];[a]crop=iw:ih/2:0:0[dense];[b]crop=iw:ih/2:0:ih/2[other]"


def find(name: str) -> str:
    """The path of an ffmpeg that has this filter; raises MetricUnavailable."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = str(get_ffmpeg_exe())
        command = [program, "-hide_banner", "-filters"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=LISTED_S, check=True).stdout
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise MetricUnavailable(f"there is no ffmpeg that runs: {error}; pip install imageio-ffmpeg") from error
    if not any(line.split()[1:2] == [name] for line in listed.splitlines()):
        raise MetricUnavailable(
            f"expected an ffmpeg with the filter {name}, found none in {program}; set IMAGEIO_FFMPEG_EXE to one that has it"
        )
    return program


def compare(program: str, filters: str, reference: np.ndarray, frames: np.ndarray, bits: int = 10) -> str:
    """What `filters` wrote into `LOG`, given the streams [dense] and [other] of these clips [F, H, W, 3] in 0..1, as YUV of
    8 or 10 bits at 25 frames a second; raises MetricUnavailable with what ffmpeg said."""
    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{width}x{2 * height}", "-r", "25", "-i", "-"]
    graph = f"[0:v]{YUV}{FORMATS[bits]},{APART};{filters}"
    command = [program, "-hide_banner", "-loglevel", "error", *source, "-lavfi", graph, "-f", "null", "-"]
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, ERRORS).open("wb") as errors:
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=nothing, stderr=errors) as process:
                assert process.stdin is not None
                _feed(process.stdin, reference, frames)
        if process.returncode:
            said = Path(folder, ERRORS).read_text(errors="replace").strip().splitlines() or ["no message"]
            raise MetricUnavailable(f"ffmpeg ended with code {process.returncode}: {said[-1]}")
        return Path(folder, LOG).read_text()


def _feed(stream: IO[bytes], reference: np.ndarray, frames: np.ndarray) -> None:
    """Frame by frame, each pair as one picture; a program that has ended says why by its code."""
    try:
        for pair in zip(reference, frames, strict=True):
            stream.write((np.concatenate(pair).clip(0, 1) * 65535).round().astype("<u2").tobytes())
        stream.close()
    except BrokenPipeError:
        pass
