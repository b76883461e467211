"""Loading a pipeline by name: a folder is a folder, a hub id is asked for once, and what goes wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import RepositoryNotFoundError

from diffusers_accel.cli import loading
from diffusers_accel.cli.loading import load_pipeline
from tests.tiny import save_small_wan, tiny_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_wan(tmp_path_factory.mktemp("pipelines") / "my-wan")


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline(str(folder))
    assert type(pipe).__name__ == "WanPipeline"
    if not torch.cuda.is_available():
        assert pipe.transformer.dtype == torch.float32 and pipe.transformer.device.type == "cpu"
    assert load_pipeline(str(folder), dtype="bfloat16", device="cpu").transformer.dtype == torch.bfloat16
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert load_pipeline("~/my-wan", device="cpu").transformer.config.num_layers == pipe.transformer.config.num_layers


def test_what_is_wrong_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, found 'int8'"):
        load_pipeline(str(folder), dtype="int8")
    with pytest.raises(ValueError, match="device: expected a name such as cpu, cuda or cuda:1, found 'gpu'"):
        load_pipeline(str(folder), device="gpu")
    with pytest.raises(ValueError, match=r"offload 'model' moves weights .* found device cpu"):
        load_pipeline(str(folder), device="cpu", offload="model")
    with pytest.raises(OSError, match=r"expected the folder of a diffusers pipeline, found no model_index\.json"):
        load_pipeline(str(tmp_path))
    (folder / "transformer" / "config.json").rename(tmp_path / "config.json")
    try:
        with pytest.raises(OSError, match="my-wan: cannot be loaded: .*config.json"):
            load_pipeline(str(folder), device="cpu")
    finally:
        (tmp_path / "config.json").rename(folder / "transformer" / "config.json")


@pytest.mark.parametrize(
    ("pipeline", "part", "kind", "reason"),
    [
        ("SanaVideoPipeline", "transformer", "SanaVideoTransformer3DModel", "its self-attention is linear"),
        ("AnimateDiffPipeline", "unet", "UNetMotionModel", "a U-Net attends at several small sizes"),
        ("FluxPipeline", "transformer", "FluxTransformer2DModel", "supported: wan"),
    ],
)
def test_models_that_gain_nothing_are_refused_with_the_reason_before_they_are_read(
    pipeline: str, part: str, kind: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, part: ["diffusers", kind]}))
    with pytest.raises(TypeError, match=f"its {part} is a {kind}.*{reason}"):
        load_pipeline(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device: torch .* sees no GPU, found 'cuda'"):
        load_pipeline(str(folder), device="cuda")


@pytest.mark.parametrize("name", ["./my-wna", "my-wna", "pipelines/my-wan", "/abs/nothing", "a/b/c", "~/my-wna"])
def test_what_is_a_path_is_never_sent_to_a_hub(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "pipelines").mkdir(exist_ok=True)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("asked a hub"))
    with pytest.raises((OSError, ValueError), match="expected .*the folder of a diffusers pipeline"):
        load_pipeline(name)


@pytest.mark.parametrize("name", ["owner/name", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "gpt2"])
def test_a_hub_id_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(name: str, dtype: torch.dtype) -> Any:
        asked.append((name, dtype))
        return tiny_wan()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    load_pipeline(name, device="cpu")
    assert asked == [(name, torch.float32)]


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers says ends in "see the stack trace above"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="surely/not-there: cannot be loaded: it is not in the cache .*HF_HUB_OFFLINE"
    ) as e:
        load_pipeline("surely/not-there", device="cpu")
    assert "hf download surely/not-there --local-dir FOLDER" in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (
            ConnectionError("Name or service not known"),
            "the hub cannot be reached .Name or service not known.*hf download",
        ),
        (
            RepositoryNotFoundError.__new__(RepositoryNotFoundError),
            "has no such repository, or it is not open to you.*hf auth",
        ),
        (None, "stacktrace above"),
    ],
)
def test_what_a_hub_says(cause: Exception | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: Any, **__: Any) -> Any:
        raise OSError(
            "Cannot load model owner/name: an error occurred while trying to fetch metadata from the Hub. Please check "
            "out the root cause in the stacktrace above."
        ) from cause

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match=f"owner/name: cannot be loaded: .*{says}"):
        load_pipeline("owner/name", device="cpu")


def test_what_is_checked_is_what_is_loaded(folder: Path) -> None:
    source = loading.check_source(str(folder), dtype="float16", device="cpu")
    assert source == loading.Source(str(folder), torch.float16, torch.device("cpu"), "none")
    assert loading.check_source("toy", device="cpu").dtype == torch.float32
