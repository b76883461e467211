"""VMAF (Li et al. 2016, Netflix), by the libvmaf filter of the ffmpeg program that `imageio-ffmpeg` brings or finds.

The model is libvmaf's own default, vmaf_v0.6.1, which was fitted to how people rate compressed films of 1080 lines, seen from a
distance of three heights: for other sizes, and other damage than compression, its values are to be read side by side only. It
looks at luminance alone: frames become BT.709 luma of 10 bits, limited range. A frame's score depends on its neighbours
(motion).

Unit: none. Range: 0 to 100; a still clip beside itself gets 97.4, one that moves more.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore
from diffusers_accel.evals.metrics.metric import MetricUnavailable

LOG, ERRORS = "vmaf.json", "errors.txt"
LISTED_S = 60  # for the list of filters
LUMA = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv444p10le"
# One stream of both clips, the dense one above the other: ffmpeg has but one standard input.
APART = "split[a][b];[a]crop=iw:ih/2:0:0[dense];[b]crop=iw:ih/2:0:ih/2[other]"
FILTERS = f"[0:v]{LUMA},{APART};[other][dense]libvmaf=log_fmt=json:log_path={LOG}"


def _load() -> FrameScore:
    program = _program()
    return lambda reference, frames: _vmaf(program, reference, frames)


def _program() -> str:
    """The path of an ffmpeg that has the filter; raises MetricUnavailable."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = str(get_ffmpeg_exe())
        command = [program, "-hide_banner", "-filters"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=LISTED_S, check=True).stdout
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise MetricUnavailable(f"there is no ffmpeg that runs: {error}; pip install imageio-ffmpeg") from error
    if not any(line.split()[1:2] == ["libvmaf"] for line in listed.splitlines()):
        raise MetricUnavailable(
            f"expected an ffmpeg with the filter libvmaf, found none in {program}; set IMAGEIO_FFMPEG_EXE to one that has it"
        )
    return program


def _vmaf(program: str, reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{width}x{2 * height}", "-r", "25", "-i", "-"]
    command = [program, "-hide_banner", "-loglevel", "error", *source, "-lavfi", FILTERS, "-f", "null", "-"]
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, ERRORS).open("wb") as errors:
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=nothing, stderr=errors) as process:
                assert process.stdin is not None
                _feed(process.stdin, reference, frames)
        if process.returncode:
            said = Path(folder, ERRORS).read_text(errors="replace").strip().splitlines() or ["no message"]
            raise MetricUnavailable(f"ffmpeg ended with code {process.returncode}: {said[-1]}")
        found = json.loads(Path(folder, LOG).read_text())["frames"]
    return np.array([frame["metrics"]["vmaf"] for frame in found], np.float64)


def _feed(stream: IO[bytes], reference: np.ndarray, frames: np.ndarray) -> None:
    """Frame by frame, each pair as one picture; a program that has ended says why by its code."""
    try:
        for pair in zip(reference, frames, strict=True):
            stream.write((np.concatenate(pair).clip(0, 1) * 65535).round().astype("<u2").tobytes())
        stream.close()
    except BrokenPipeError:
        pass


VMAF = FrameMetric(
    name="vmaf",
    title="VMAF",
    unit="",
    range="0 to 100",
    better="higher",
    protocol="libvmaf in ffmpeg, its default model vmaf_v0.6.1 (fitted to compressed films of 1080 lines), per frame, on BT.709 "
    "luma of 10 bits at the clip's own size; a still clip beside itself gets 97.4.",
    smallest=64,
    comparable="none of generated clips: only of the same model and size, and then as a difference between two methods",
    load=_load,
    packages=("imageio-ffmpeg",),
    needs="an ffmpeg with libvmaf, such as that of imageio-ffmpeg",
    digits=2,
)
