"""A pipeline by name, as the commands take it: "toy", a local folder or a hub id, on a device, offloaded or not."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from diffusers_accel.cli.toy import TOY
from diffusers_accel.evals import toy
from diffusers_accel.families import COMPONENTS, family_of, supported
from diffusers_accel.families.refused import refusal
from diffusers_accel.files import FileError, printable, quoted, read_json
from diffusers_accel.support.device import find_device
from diffusers_accel.support.suggest import did_you_mean, did_you_mean_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "model", "group")
INDEX = "model_index.json"  # what makes a folder that of a pipeline
ANEW = "save the pipeline anew with save_pretrained"
_FORMS = f"expected {TOY}, the folder of a diffusers pipeline, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_LIKE_A_PATH = re.compile(r"[.~/]|[A-Za-z]:[/\\]|[^/]*/[^/]*/|[^\\]*\\")


@dataclass(frozen=True)
class Source:
    """What `load_pipeline` was asked for, checked. Made by `check_source`."""

    name: str
    dtype: torch.dtype
    device: torch.device
    offload: str


def load_pipeline(name: str, *, dtype: str | None = None, device: str | None = None, offload: str = "none") -> Any:
    """Loads a diffusers pipeline in the host's own way.

    Args:
        name: "toy" for the small model of the checkout, else what `DiffusionPipeline.from_pretrained` takes. What is
            written as a path, or lies in a folder that exists, is one: no hub is asked for it.
        dtype: a name of `DTYPES`; None means bfloat16, on a CPU float32.
        device: as torch names it; None means CUDA (or ROCm) where there is one, else the CPU.
        offload: "none"; "model": one component at a time is on the device; "group": one layer at a time is.

    Raises:
        ValueError: there is no such dtype or device, nothing to offload from, or the name is none.
        TypeError: it is no pipeline of a supported family.
        OSError: there is no such pipeline, or it cannot be read.
    """
    source = check_source(name, dtype=dtype, device=device, offload=offload)
    pipe = toy.load_pipeline(source.dtype) if name == TOY else _from_pretrained(source)
    if offload == "none":
        return pipe.to(source.device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=source.device)
    else:
        pipe.enable_group_offload(onload_device=source.device, offload_type="leaf_level", use_stream=True)
    return pipe


def check_source(name: str, *, dtype: str | None = None, device: str | None = None, offload: str = "none") -> Source:
    """Refuses, as `load_pipeline` does and before anything is loaded, what can be known without asking a hub."""
    _check_word("dtype", dtype, DTYPES)
    _check_word("offload", offload, OFFLOADS)
    target = find_device(device)
    if offload != "none" and target.type == "cpu":
        raise ValueError(f"offload {offload!r} moves weights between a GPU and the CPU, found device cpu: leave it out")
    usual = "float32" if target.type == "cpu" else "bfloat16"
    return Source(_check_name(name), DTYPES[dtype or usual], target, offload)


def _check_word(what: str, word: str | None, known: Collection[str]) -> None:
    if word is not None and word not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, found {quoted(word)}{did_you_mean(word, known)}")


def _check_name(name: str) -> str:
    """The name as `from_pretrained` takes it: the folder's path, or the hub id."""
    if name == TOY:
        return name
    if re.match(r"\w+://", name):
        raise ValueError(
            f"{quoted(name)}: {_FORMS}, found a web address; the hub id is its part of the form owner/name"
        )
    folder = Path(name).expanduser()
    if name and os.path.exists(folder) or _LIKE_A_PATH.match(name) or os.path.isdir(os.path.dirname(name)):
        _check_folder(folder, printable(name))
        return str(folder)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{quoted(name)}: {_FORMS}, found none of them") from None
    if "/" not in name and (meant := did_you_mean(name, [TOY, *_pipelines_here()])):
        raise ValueError(f"{quoted(name)}: {_FORMS}, found none of them{meant}")
    return name


def _pipelines_here() -> list[str]:
    """Folders of pipelines in the one where we are."""
    try:
        return [entry.name for entry in os.scandir() if os.path.isfile(os.path.join(entry.path, INDEX))]
    except OSError:
        return []


def _check_folder(folder: Path, shown: str) -> None:
    what = f"{shown}: expected the folder of a diffusers pipeline, found"
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{what} nothing there{did_you_mean_file(folder)}")
    if not folder.is_dir():
        raise OSError(f"{what} a file; give the path of a folder with {INDEX} in it")
    if not os.path.isfile(folder / INDEX):
        inside = os.path.isfile(folder.parent / INDEX)
        advice = f"that of the whole pipeline is {printable(folder.parent)}" if inside else "save_pretrained makes one"
        raise OSError(f"{what} no {INDEX} in it; {advice}")
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise FileError(f"{what} an {INDEX} without _class_name; {ANEW}")
    _check_classes(folder, index)


def _check_classes(folder: Path, index: dict[str, Any]) -> None:
    """Refuses, before gigabytes are read, a pipeline that diffusers does not know or that has no transformer of a family.

    Classes of the user's own, which an index names by the file that defines them, are seen once they are loaded.
    """
    name = index["_class_name"]
    known = [each for each in dir(diffusers) if each.endswith("Pipeline")]  # without importing them
    if isinstance(name, str) and name not in known:
        raise FileError(
            f"{printable(folder / INDEX)}: expected a pipeline of diffusers {diffusers.__version__}, "
            f"found {quoted(name)}{did_you_mean(name, known)}"
        )
    parts = {part: index[part] for part in (*COMPONENTS, "unet") if _is_named(index.get(part))}
    if isinstance(name, str) and not parts:
        raise TypeError(f"{printable(folder)}: {quoted(name)} has no {' or '.join(COMPONENTS)}; {supported()}")
    for part, (library, kind, *_) in parts.items():
        cls = getattr(diffusers, str(kind), None) if library == "diffusers" else None
        if isinstance(cls, type) and family_of(cls) is None:
            reason = refusal(cls)
            why = f", which is not supported: {reason}" if reason else f"; {supported()}"
            raise TypeError(f"{printable(folder)}: its {part} is a {kind}{why}")


def _is_named(part: Any) -> bool:
    """Whether an entry of an index is [library, class], and not the [None, None] of a part that was left out."""
    return isinstance(part, list) and len(part) >= 2 and all(part)


def _from_pretrained(source: Source) -> Any:
    try:
        return DiffusionPipeline.from_pretrained(source.name, dtype=source.dtype)
    except (OSError, ValueError) as error:
        raise OSError(f"{printable(source.name)}: cannot be loaded: {_why(error, source.name)}") from error


def _why(error: Exception, name: str) -> str:
    """What went wrong, and what to do, where diffusers leaves that to the stack trace."""
    cause = error.__cause__
    fetched = f"hf download {name} --local-dir FOLDER fetches it where there is a network, and that folder is loaded from here"
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"it is not in the cache ({HF_HUB_CACHE}) and HF_HUB_OFFLINE forbids to fetch it; unset that, or: {fetched}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return "the hub has no such repository, or it is not open to you; check its name, or log in: hf auth login"
    if isinstance(cause, HfHubHTTPError):
        return f"the hub refused: {cause}"
    if cause is not None and "metadata from the Hub" in str(error):
        return f"it is not in the cache ({HF_HUB_CACHE}) and the hub cannot be reached ({cause}); {fetched}"
    return str(error)
