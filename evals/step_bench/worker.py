"""Measures one model of the step benchmark; a process of its own under `watch`."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from diffusers_accel.evals.machine import git_sha, gpu_state, instruction_set, machine, versions
from diffusers_accel.evals.step_bench.models import DTYPES, MODELS
from diffusers_accel.evals.step_bench.timing import Row, measure
from diffusers_accel.evals.worker_process import end_with_parent


def environment(device: torch.device) -> Row:
    """What times depend on besides the model."""
    place = {"device": device.type, "driver": gpu_state(device).get("driver"), "cpu_capability": instruction_set()}
    return {"machine": machine() | place, "versions": versions(), "git_sha": git_sha()}


def main() -> None:
    """Reads a job, a JSON file named on the command line; answers in lines of JSON on stdout.

    {"hello": environment}, then {"begin": the row's fields} before each run, {"row": a row} and, at last, {"end": true}.
    """
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print; their words go with the errors
    threading.Thread(target=end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    device = torch.device(job["device"])
    if device.index is not None:
        torch.cuda.set_device(device)
    say(hello=environment(device))
    measure(
        job["model"],
        MODELS[job["model"]],
        device,
        DTYPES[job["dtype"]],
        size=tuple(job["size"]),
        layers=job["layers"],
        steps=job["steps"],
        methods=job["methods"],
        on_begin=lambda row: say(begin=row),
        on_row=lambda row: say(row=row),
    )
    say(end=True)
    answers.close()
    os._exit(0)  # the thread waits for a parent that waits for us


if __name__ == "__main__":
    main()
