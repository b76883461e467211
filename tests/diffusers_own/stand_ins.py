"""Tiny local models in the place of the hub's test models, in a folder that is laid out as the hub's own cache.

So tests that load them by name, in whatever spelling, find them offline. Weights and tokenizers are made here: tests that compare
with numbers of the hub's own weights fail, with or without a patch.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

LETTERS = string.ascii_letters + string.digits + string.punctuation
WIDTH = 32
Maker = Callable[[Path], None]


def _bytes() -> dict[str, int]:
    """The 256 bytes as byte-level tokenizers write them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}


def _numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def t5_tokenizer(folder: Path) -> None:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0).save_pretrained(folder)


def clip_tokenizer(folder: Path) -> None:
    ends = [f"{letter}</w>" for letter in _bytes()]
    vocabulary = _numbered("<|startoftext|>", "<|endoftext|>", *_bytes(), *ends)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)


def llama_tokenizer(folder: Path) -> None:
    vocabulary = _numbered("<unk>", "<s>", "</s>", "\u2581", *LETTERS)
    transformers.LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="</s>").save_pretrained(folder)


def gemma_tokenizer(folder: Path) -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = _numbered(*special, "\u2581", "\n", *LETTERS)
    transformers.GemmaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def qwen_tokenizer(folder: Path) -> None:
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    vocabulary = _numbered(*_bytes(), *special)
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=special[1:], processor_class="Qwen2Tokenizer"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def _save(model: Any, folder: Path) -> None:
    model.eval().save_pretrained(folder)


def t5(folder: Path) -> None:
    config = transformers.T5Config(
        vocab_size=1103, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=5, num_heads=4, relative_attention_num_buckets=8
    )
    _save(transformers.T5EncoderModel(config), folder)
    t5_tokenizer(folder)


def qwen_vl(folder: Path) -> None:
    """With a tokenizer as its processor, as one of videos asks for torchvision."""
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    _save(transformers.Qwen2VLForConditionalGeneration(config), folder)
    qwen_tokenizer(folder)


def gemma3(folder: Path) -> None:
    text = {
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=255
    )
    _save(transformers.Gemma3ForConditionalGeneration(config), folder)
    gemma_tokenizer(folder)


def siglip(folder: Path) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )
    _save(transformers.SiglipVisionModel(config), folder)
    SiglipImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(folder)


def hunyuan_video(folder: Path) -> None:
    """The parts of a pipeline that its tests of LoRA load one by one."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 1000}
    _save(transformers.LlamaModel(transformers.LlamaConfig(hidden_size=16, **layers)), folder / "text_encoder")
    clip = transformers.CLIPTextConfig(hidden_size=8, projection_dim=WIDTH, **layers)
    _save(transformers.CLIPTextModel(clip), folder / "text_encoder_2")
    llama_tokenizer(folder / "tokenizer")
    clip_tokenizer(folder / "tokenizer_2")


def cosmos3(folder: Path) -> None:
    """The tokenizer of a pipeline, with the configuration by which `AutoTokenizer` finds its class."""
    qwen_tokenizer(folder / "text_tokenizer")
    transformers.Qwen2Config().save_pretrained(folder / "text_tokenizer")


MODELS: dict[str, Maker] = {
    "hf-internal-testing/tiny-random-t5": t5,
    "hf-internal-testing/tiny-random-clip": clip_tokenizer,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": qwen_vl,
    "hf-internal-testing/tiny-random-SiglipVisionModel": siglip,
    "hf-internal-testing/tiny-gemma3": gemma3,
    "hf-internal-testing/tiny-random-hunyuanvideo": hunyuan_video,
    "finetrainers/dummy-hunyaunvideo": lambda folder: llama_tokenizer(folder / "tokenizer"),
    "hf-internal-testing/tiny-cosmos3-modular-pipe": cosmos3,
}


def make_cache(cache: Path) -> None:
    """Fills `cache`, which a process takes for the hub's with `HF_HUB_CACHE` and `HF_HUB_OFFLINE=1`."""
    revision = "0" * 40
    for name, make in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        torch.manual_seed(0)
        make(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision, encoding="utf-8")
