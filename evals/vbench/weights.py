"""The weights of VBench's dimensions: which files they are, where they must lie, and what is missing.

Nothing is fetched here, and nothing may be fetched by VBench: its program would run `wget` for what it misses, unchecked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_accel.evals.vbench.dimensions import weights_of
from diffusers_accel.files import printable

CACHE = "VBENCH_CACHE_DIR"  # VBench's own variable
HUB = "HF_HUB_CACHE"


@dataclass(frozen=True)
class Weights:
    """What one model needs.

    Attributes:
        title: the model.
        place: below the cache, of the file; of the folder where it ends with "/".
        source: who publishes it, in words.
        sha256: of the file, or its first letters where no more is published; "" where nothing is.
        hub: whether it lies in the cache of Hugging Face's hub, not in VBench's.
    """

    title: str
    place: str
    source: str
    sha256: str = ""
    hub: bool = False


WEIGHTS: dict[str, Weights] = {
    "dino": Weights("DINO ViT-B/16", "dino_model/dino_vitbase16_pretrain.pth", "facebookresearch/dino on GitHub"),
    "dino_code": Weights(
        "DINO's code", "dino_model/facebookresearch_dino_main/hubconf.py", "a clone of facebookresearch/dino on GitHub"
    ),
    "clip_b32": Weights(
        "CLIP ViT-B/32",
        "clip_model/ViT-B-32.pt",
        "openai/CLIP on GitHub",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "clip_l14": Weights(
        "CLIP ViT-L/14",
        "clip_model/ViT-L-14.pt",
        "openai/CLIP on GitHub",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "bpe": Weights(
        "CLIP's vocabulary",
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "openai/CLIP on GitHub; the package openai-clip of the full environment holds it as clip/bpe_simple_vocab_16e6.txt.gz",
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    ),
    "laion": Weights(
        "LAION's aesthetic head",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "LAION-AI/aesthetic-predictor on GitHub",
    ),
    "musiq": Weights(
        "MUSIQ on SPAQ",
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "chaofengc/IQA-PyTorch on GitHub, release v0.1-weights",
        "358bb6af",
    ),
    "amt": Weights("AMT-S", "amt_model/amt-s.pth", "lalala125/AMT on Hugging Face"),
    "raft": Weights("RAFT", "raft_model/models/raft-things.pth", "models.zip of princeton-vl/RAFT on GitHub"),
    "umt": Weights(
        "UMT ViT-L/16",
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        "OpenGVLab/VBench_Used_Models on Hugging Face",
    ),
    "viclip": Weights("ViCLIP", "ViCLIP/ViClip-InternVid-10M-FLT.pth", "OpenGVLab/VBench_Used_Models on Hugging Face"),
    "grit": Weights("GRiT", "grit_model/grit_b_densecap_objectdet.pth", "OpenGVLab/VBench_Used_Models on Hugging Face"),
    "tag2text": Weights(
        "Tag2Text", "caption_model/tag2text_swin_14m.pth", "xinyu1205/recognize-anything, a space on Hugging Face"
    ),
    "bert": Weights("BERT", "models--bert-base-uncased/", "bert-base-uncased on Hugging Face (hf download)", hub=True),
}


def cache_folder() -> Path:
    """Where VBench looks for its weights."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "vbench")


def hub_folder() -> Path:
    """Where a program of Hugging Face looks for models."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get(HUB) or Path(home) / "hub")


def place_of(name: str) -> Path:
    each = WEIGHTS[name]
    return (hub_folder() if each.hub else cache_folder()) / each.place


def faults_of(dimensions: Sequence[str], *, standard: bool) -> dict[str, str]:
    """Name of weights -> where they must lie and from where they come, of those that dimensions need and that are not there, or
    are not the published ones. Files of a published sha256 are read whole."""
    names = dict.fromkeys(name for each in dimensions for name in weights_of(each, standard=standard))
    return {name: fault for name in names if (fault := _fault(name))}


def sha256_of(name: str) -> str | None:
    """Of a file that is there; None of a folder, which has none."""
    path = place_of(name)
    return _digest(path) if path.is_file() else None


def required(dimension: str, *, standard: bool) -> dict[str, str]:
    """The files that a dimension is measured by, and what tells them from others: title -> sha256, of folders their place."""
    names = weights_of(dimension, standard=standard)
    return {WEIGHTS[name].title: sha256_of(name) or WEIGHTS[name].place for name in names}


def _fault(name: str) -> str | None:
    """Why these weights cannot be used, and what to do; None where they are as published, as far as that is known."""
    each, path = WEIGHTS[name], place_of(name)
    if not (path.is_dir() if each.place.endswith("/") else path.is_file()):
        known = (
            f"sha256 {each.sha256}{'' if len(each.sha256) == 64 else '...'}" if each.sha256 else "no published sha256"
        )
        known = "" if each.hub or name == "dino_code" else f", {known}"
        return f"{each.title} must lie at {printable(path)} (from {each.source}{known})"
    if each.sha256 and not (found := _digest(path)).startswith(each.sha256):
        return f"{each.title} at {printable(path)}: expected sha256 {each.sha256}, found {found}; get it anew from {each.source}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
