"""Runs one dimension of VBench, in VBench's environment: the only file of this package that is run there, and it imports none.

Started as `python -I child.py job.json`; answers in lines of JSON on stdout, {"versions": ...} and then {"result": ...}. It needs
nothing from a network and asks for nothing there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
DISTRIBUTIONS = ("vbench", "torch", "torchvision", "numpy", "opencv-python-headless", "decord")
# Operators of torchvision that are written in C++: a build for CUDA cannot load them beside a CPU build of torch, and then its
# import fails for want of their names. No dimension calls them; without an implementation a call would raise.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def end_with_parent() -> None:
    """Ends this process when the one that holds the other end of its stdin is gone. For a thread of its own."""
    sys.stdin.buffer.read()
    os._exit(1)


def declare_operators() -> Any:
    """Makes torchvision importable beside a CPU build of torch; what is returned has to be kept."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(operator)
    return library


def link_dino(cache: Path, scratch: Path) -> None:
    """DINO's own code looks for its weights among those of torch.hub, whatever VBench says; there a link leads to them."""
    weights = cache / "dino_model" / "dino_vitbase16_pretrain.pth"
    checkpoints = scratch / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / weights.name).symlink_to(weights)
    os.environ["TORCH_HOME"] = str(scratch / "torch")


def still_clips(videos: str, scratch: Path, cache: Path, device: str) -> tuple[str, dict[str, str]]:
    """The folder of at most five still clips for each prompt of the dimension, by VBench's own filter, which numbers them anew;
    and, by its names, what they were called before."""
    module: Any = importlib.import_module("vbench.cli.static_filter")
    module.DEVICE = device  # its own is CUDA
    found = scratch / "still"
    module.static_filter(
        argparse.Namespace(
            model=str(cache / "raft_model" / "models" / "raft-things.pth"),
            videos_path=videos,
            result_path=str(found),
            store_name="still.json",
            filter_scope="temporal_flickering",
            small=False,
            mixed_precision=False,
            alternate_corr=False,
        )
    )
    kept = found / "filtered_videos"
    if not any(kept.iterdir()):
        raise RuntimeError("VBench's filter takes none of the clips for a still one, and only such are measured")
    found_of = json.loads((found / "still.json").read_text(encoding="utf-8"))
    names = {
        f"{prompt}-{number}.mp4": Path(path).name
        for prompt, each in found_of.items()
        for number, path in enumerate(each["static_path"])
    }
    return str(kept), names


def measure(job: dict[str, Any], scratch: Path) -> tuple[float, dict[str, float]]:
    """What VBench says of a dimension: its score, and by the names of the films that of each."""
    kept = declare_operators()
    import torch

    import vbench

    cache, videos = Path(os.environ["VBENCH_CACHE_DIR"]), job["videos"]
    names: dict[str, str] = {}
    if job["dimension"] == "subject_consistency":
        link_dino(cache, scratch)
    if job["filter"]:
        videos, names = still_clips(videos, scratch, cache, job["device"])
    full_info = Path(vbench.__file__).with_name("VBench_full_info.json")
    program = vbench.VBench(torch.device(job["device"]), str(full_info), str(scratch))
    program.evaluate(
        videos_path=videos,
        name="clips",
        prompt_list=job["prompts"],
        dimension_list=[job["dimension"]],
        local=True,
        mode=job["mode"],
    )
    del kept
    score, clips = json.loads((scratch / "clips_eval_results.json").read_text(encoding="utf-8"))[job["dimension"]]
    renamed = [Path(clip["video_path"]).name for clip in clips]
    return score, {names.get(name, name): clip["video_results"] for name, clip in zip(renamed, clips, strict=True)}


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # VBench prints; its words go with the errors
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.update(dict.fromkeys(OFFLINE, "1"), VBENCH_CACHE_DIR=job["cache"])

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
    say(versions={"python": platform.python_version(), **versions})
    say(result=measure(job, Path(job["scratch"])))
    answers.close()
    os._exit(0)  # the thread waits for a parent that waits for us


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would abort: the thread holds stdin
