"""A folder that makes a report again: what was asked, as files and one command line, and what it was made with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_accel.evals.machine import versions
from diffusers_accel.files import Kind, Schema, prepare_whole_folder, save_document, whole_folder, write_whole
from diffusers_accel.plan import Plan

KIND = Kind("diffusers_accel.exported_run", version=1, remedy="export it again")
RUN, SCRIPT, PROMPTS, REQUIREMENTS, PLANS = "run.json", "run.sh", "prompts.txt", "requirements.txt", "plans"
ALSO = (
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "ftfy",
    "peft",
)  # that pipelines load by
PIPELINE = "PIPELINE"  # in the command, where the user's folder is not told
TEMPLATE = """#!/bin/sh
# Makes this report again: sh run.sh [PIPELINE [OUT]]
# requirements.txt names the versions that it was made with, run.json the machine, the call and the weights.
set -e
pipe={pipe}
out=${{2:-report}}
if [ "$pipe" != toy ] && [ -d "$pipe" ]; then pipe=$(cd "$pipe" && pwd); fi
case "$out" in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")"
exec "${{PYTHON:-python}}" -m diffusers_accel report "$pipe" {words} --out "$out"
"""


class ExportedRun(Schema, frozen=True):
    """What is in run.json.

    command: what run.sh runs, but for the pipeline's folder and the folder to write. provenance: that of the report's numbers:
    machine, versions, pipeline with hashes of its weights, call, prompts, seeds, protocol.
    """

    command: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class PlanFile:
    """A plan that was given as a file, by its name."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class AskedReport:
    """A report as the command line asks for it.

    Args:
        pipe: "toy", a hub id or a folder.
        plans: of each `--plan` what stands before "=", or "", and its parts, those that are files as `PlanFile`.
        prompts: texts.
        options: the others, as words.
    """

    pipe: str
    plans: Sequence[tuple[str, Sequence[str | PlanFile]]]
    prompts: Sequence[str]
    options: Sequence[str]


def check_export(folder: Path) -> None:
    """Makes sure, before anything is measured, that `export` can write there.

    Raises:
        WriteError: it cannot, or the folder holds something.
    """
    prepare_whole_folder(folder, ())


def export(folder: Path, asked: AskedReport, provenance: Mapping[str, Any]) -> Path:
    """Writes the folder, whole or not at all; returns its script.

    Args:
        provenance: of the report.

    Raises:
        WriteError: it cannot be written, or holds something; it is as it was.
    """
    with whole_folder(folder, ()) as new:
        words = [*_plan_words(asked.plans, new), *_prompt_words(asked.prompts, new), *asked.options]
        name = provenance["pipeline"]["model"]
        known = asked.pipe if not Path(asked.pipe).is_dir() else ""
        default = f"${{1:-{shlex.quote(known)}}}" if known else _required(name)
        script = TEMPLATE.format(pipe=default, words=shlex.join(words))
        write_whole(new / SCRIPT, script.encode())
        write_whole(new / REQUIREMENTS, _requirements(provenance["versions"]).encode())
        command = ["diffusers-accel", "report", known or PIPELINE, *words]
        save_document(new / RUN, KIND, ExportedRun(command=command, provenance=dict(provenance)))
    return folder / SCRIPT


def _required(name: str) -> str:
    """What a shell says where the folder is not given."""
    told = "".join(letter for letter in name if letter.isalnum() or letter in "-_. ")
    return f"${{1:?give the folder of the pipeline, {told or 'whose name is not known'}}}"


def _plan_words(plans: Sequence[tuple[str, Sequence[str | PlanFile]]], folder: Path) -> list[str]:
    """The options of the plans, whose files are written; each in a folder of its own, under the name that it had."""
    words = []
    for number, (name, parts) in enumerate(plans):
        spelled = [part if isinstance(part, str) else _written(part, folder, number) for part in parts]
        words += ["--plan", (f"{name}=" if name else "") + "+".join(spelled)]
    return words


def _written(file: PlanFile, folder: Path, number: int) -> str:
    place = Path(PLANS, f"{number:02}", file.name)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    file.plan.save(folder / place)
    return place.as_posix()


def _prompt_words(prompts: Sequence[str], folder: Path) -> list[str]:
    """A file with a prompt on each line, where each is one; else an option for each."""
    if any(len(prompt.splitlines()) != 1 or prompt != prompt.strip() for prompt in prompts):
        return [word for prompt in prompts for word in ("--prompt", prompt)]
    write_whole(folder / PROMPTS, "".join(f"{prompt}\n" for prompt in prompts).encode())
    return ["--prompts", PROMPTS]


def _requirements(known: Mapping[str, str]) -> str:
    found = {**known, **versions(ALSO)}
    python, revision, own = found.pop("python"), found.pop("revision", None), found.pop("diffusers-accel", None)
    checkout = f"revision {revision} of its repository" if revision else f"version {own}"
    pins = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))
    return f"# Python {python}; diffusers-accel: {checkout}\n{pins}"
