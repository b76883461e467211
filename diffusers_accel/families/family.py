"""All that is particular to a model family, mostly data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusers_accel.families.preset import Preset
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

Observation = tuple[int, ...]
AttentionName = Literal["dispatch_attention_fn", "F.scaled_dot_product_attention"]


def attention_of(*lists: str, named: str = "attn1") -> Callable[[nn.Module], list[tuple[str, nn.Module]]]:
    """The self-attention of transformers whose blocks, in these lists of modules, have it under this name."""

    def found(transformer: Any) -> list[tuple[str, nn.Module]]:
        return [
            (f"{blocks}.{index}.{named}", block.get_submodule(named))
            for blocks in lists
            for index, block in enumerate(getattr(transformer, blocks))
        ]

    return found


def shape_of_config(transformer: Any) -> ModelShape:
    """Of transformers whose configuration says it by the usual names."""
    config = transformer.config
    return ModelShape(config.num_layers, config.num_attention_heads, config.attention_head_dim)


def to_out_of(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The linear map behind attention in diffusers' attention modules: the first of `to_out`."""
    linear: Callable[[Tensor], Tensor] = transformer.get_submodule(name).to_out[0]
    return linear


@dataclass(frozen=True)
class Family:
    """How to find the self-attention of a transformer class and how its tokens lie.

    Args:
        name: as plans spell it, such as "wan".
        transformer: module-qualified name of the transformer class (class names repeat across diffusers' modules).
        attention_call: how the code of the stock processor spells its call of attention.
        observe: (args, kwargs) of the transformer's forward -> the sizes that `layout` needs.
        layout: (transformer's config, observation) -> TokenLayout, as if all text existed.
        places: (transformer's config, observation) -> int64 [tokens], where in the model's sequence the tokens of that layout
            stand, or None where in this order: for models whose video does not lie row by row.
        layout_in: (transformer's config, that layout, number of a layer) -> the layout in that layer, where layers differ.
        text: (args, kwargs) of the transformer's forward -> the text embeddings, by which branches are told apart where the
            pipeline does not name them: each branch has its own, the same at every step.
        self_attention: transformer -> its self-attention modules with their names, in layer order.
        shape: transformer -> layers, heads and head dim.
        output_projection: (transformer, name of a self-attention module) -> the linear map that its output goes through,
            [rows, heads * head_dim] -> [rows, channels].
        text_valid: (args, kwargs) of the transformer's forward -> how many text tokens exist in each batch row (one number
            holds for all). The model must let these, the first of its text, be keys and no others, and mask its self-attention
            with [B, 1, 1, tokens] accordingly, if it does. Masks are read with `read_once`. None for models that do not mask
            their text.
        call: what runs instead of the `__call__` of a stock processor, by the name of its class, where that does harmful work:
            called as call(attend, processor, ...) with the arguments of the stock one, and calls attend(q, k, v) once, with q
            [B, queries, heads, head_dim], as `AttentionCall` lays them out.
        beside: given the keyword arguments of a call of attention inside a self-attention module, whether it is another one,
            which runs as it would without us.
        prepares: (args, kwargs) of the transformer's forward -> whether it only prepares others, such as by filling a cache, and
            takes no step: it runs as it would without us, so its processors must not attend by us either (`call`).
        hands_back: whether the forward's output holds, behind what is denoised, what it was given (a cache): a predicted output
            hands that back as it was.
        history: whether a video is made chunk by chunk, each with earlier ones as segments of kind "history".
        no_search: why a search cannot measure it.
        no_parallel: transformer's config -> why diffusers' own forward goes wrong where processes share a sequence (Ulysses), or
            None.
        latents: names of the arguments of the transformer's forward that are denoised, in the order of its outputs, of which
            there may be several (video and audio). Each is a tensor or a list of tensors.
        timestep: name of that argument.
        noisiest: of several timesteps that a forward is given, that of what is denoised: known frames have cleaner ones.
        indicators: name of an indicator (`forwards/indicator.py`) -> the module of the transformer whose output it is.
        channels: dimension of the latents in which the channels lie, those that are denoised first; outputs are of the same
            layout. -1 for the last of each.
        preset: what stays dense in it under `patch(pipe)`.
    """

    name: str
    transformer: str
    attention_call: AttentionName
    observe: Callable[[tuple[Any, ...], Mapping[str, Any]], Observation]
    layout: Callable[[Any, Observation], TokenLayout]
    text: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]
    self_attention: Callable[[nn.Module], list[tuple[str, nn.Module]]] = attention_of("transformer_blocks")
    shape: Callable[[nn.Module], ModelShape] = shape_of_config
    output_projection: Callable[[nn.Module, str], Callable[[Tensor], Tensor]] = to_out_of
    layout_in: Callable[[Any, TokenLayout, int], TokenLayout] | None = None
    places: Callable[[Any, Observation], Tensor | None] | None = None
    text_valid: Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[int, ...]] | None = None
    call: Mapping[str, Callable[..., Any]] = field(default_factory=dict, hash=False)
    beside: Callable[[Mapping[str, Any]], bool] | None = None
    prepares: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None
    hands_back: bool = False
    history: bool = False
    no_search: str | None = None
    no_parallel: Callable[[Any], str | None] | None = None
    latents: tuple[str, ...] = ("hidden_states",)
    timestep: str = "timestep"
    noisiest: Callable[[Tensor], Tensor] = torch.amax
    indicators: Mapping[str, str] = field(default_factory=dict, hash=False)
    channels: int = 1
    preset: Preset = Preset()


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, position: int) -> Any:
    """The argument of a transformer's forward that has this name, given by name or by position."""
    if name not in kwargs and len(args) <= position:
        raise TypeError(f"expected the transformer's forward to be given {name}, as argument {position} or by name")
    return kwargs[name] if name in kwargs else args[position]


def optional(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, position: int) -> Any:
    """The same where it may be left out; None where it is."""
    return kwargs.get(name, args[position] if len(args) > position else None)


def patched(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of latents in patches (frames, height, width)."""
    frames, height, width = (size // one for size, one in zip(sizes, patch, strict=True))
    return frames, height, width


def text_at(position: int) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]:
    """The text embeddings of forwards that take `encoder_hidden_states` at this position."""
    return lambda args, kwargs: argument(args, kwargs, "encoder_hidden_states", position)
