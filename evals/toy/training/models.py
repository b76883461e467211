"""The parts of the toy pipeline, built from the host's own classes with a configuration of a few million parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffusers_accel.evals.toy.render import BACKGROUNDS, COLORS, MOTIONS, SHAPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

LATENT_CHANNELS = 8
TEXT_DIM = 128
TEXT_ROWS = 512  # rows of text embeddings that the stock pipeline feeds, real ones first, then zeros
FLOW_SHIFT = 5.0  # a clip of 17 x 16 x 16 tokens is one moving object: its place is decided at high noise


def build_autoencoder(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Untrained autoencoder: 4 x 4 pixels and 2 frames to one latent of 8 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


def build_transformer(layers: int = 6, heads: int = 4, head_dim: int = 64, ffn_dim: int = 768) -> WanTransformer3DModel:
    """Untrained denoiser; its output projection starts at zero, as is usual for diffusion transformers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=ffn_dim,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    aim_heads(model)
    return model


# Axes (t, h, w) along which a head first looks at near tokens, and the peak of its logits; every other head looks at
# all tokens alike.
_AIMS: tuple[tuple[tuple[int, ...], float], ...] = (((0, 1, 2), 7.0), ((1, 2), 6.0), ((0,), 5.0))
_NEAR_PAIRS = 4  # the fastest rotary pairs of an axis, whose cosines fall off within a few tokens


@torch.no_grad()
def aim_heads(model: WanTransformer3DModel) -> None:
    """Start self-attention heads near their own token, at their own place in all frames, or in their own frame.

    Equal biases of queries and keys leave, after the rotary embedding, a sum of cosines of the distance. Without them all
    heads start as averages over the whole clip, and a short training is over before they become anything else.
    """
    head_dim = model.config.attention_head_dim
    spans = (0, model.rope.t_dim, model.rope.t_dim + model.rope.h_dim)
    for block in model.blocks:
        attn = block.attn1
        aims = _AIMS[: attn.heads - 1]  # one head at least stays free
        # RMS normalisation goes over all heads: solve for the squared biases relative to the squared norm.
        squares = [peak * head_dim**0.5 / (_NEAR_PAIRS * len(axes)) for axes, peak in aims]
        taken = sum(s * _NEAR_PAIRS * len(axes) for s, (axes, _) in zip(squares, aims, strict=True))
        norm = 1 / (1 - taken / (attn.heads * head_dim))
        for linear in (attn.to_q, attn.to_k):
            content = float(linear.weight.std()) * linear.in_features**0.5
            linear.bias.zero_()
            for head, (square, (axes, _)) in enumerate(zip(squares, aims, strict=True)):
                for axis in axes:
                    start = head * head_dim + spans[axis]
                    linear.bias[start : start + 2 * _NEAR_PAIRS : 2] = content * (square * norm) ** 0.5


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the captions' language, and the end-of-text token that makes even an empty prompt one row."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = " ".join([*COLORS, *BACKGROUNDS, *SHAPES, *MOTIONS, "a and on background"]).split()
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_ROWS
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Untrained text encoder of two layers, in eval mode: dropout is never used on it."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = UMT5EncoderModel(config).eval()
    aim_text_heads(model)
    return model


@torch.no_grad()
def aim_text_heads(model: UMT5EncoderModel) -> None:
    """Start the text encoder's attention by position: a head for the words before, one for those after, one for the nearest.

    At the host's own start the position biases are too small to be noticed, and what little order they tell is lost as soon
    as attention to content grows.
    """
    for block in model.encoder.block:
        attention = block.layer[0].SelfAttention
        attention.q.weight.normal_(0, 0.005)
        bias, half = attention.relative_attention_bias.weight, attention.relative_attention_num_buckets // 2
        bias.zero_()  # buckets of distance 0, 1, 2 ... before a word, then of those after it
        bias[1:half, 0] = bias[half:, 1] = 4
        bias[1:5, 2] = bias[half + 1 : half + 5, 2] = 3


def build_scheduler() -> UniPCMultistepScheduler:
    """The flow-matching scheduler that the host's Wan pipelines use, with this model's shift."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
