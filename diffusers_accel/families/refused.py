"""Models of which it is known that they gain nothing here, each with the reason and with what helps instead."""

from __future__ import annotations

from typing import Any

from torch import nn

_FEWER_STEPS = "What helps: fewer steps (a distilled checkpoint or LoRA), and torch.compile"
_ONE_IMAGE = (
    "it edits images, and an image has too few tokens to leave many out. What helps: fewer steps, a faster attention backend "
    "(set_attention_backend), and torch.compile of pipe.transformer"
)
_UNET = (
    "a U-Net attends at several small sizes, within a frame or along time at one place: there is no long sequence to leave "
    f"blocks out of. {_FEWER_STEPS} of pipe.unet"
)

_TRANSFORMERS = "diffusers.models.transformers"
REFUSED = {
    f"{_TRANSFORMERS}.transformer_sana_video.SanaVideoTransformer3DModel": (
        "its self-attention is linear: sums over all keys, once, and no product of tokens x tokens to leave blocks out of. "
        f"{_FEWER_STEPS} of pipe.transformer"
    ),
    f"{_TRANSFORMERS}.transformer_sana_wm.SanaWMTransformer3DModel": (
        "most of its blocks are a recurrence over frames, which has no product of tokens x tokens, and its few of attention have "
        f"no processor to replace. {_FEWER_STEPS} of pipe.transformer"
    ),
    f"{_TRANSFORMERS}.transformer_sana_wm_refiner.SanaWMLTX2RefinerTransformer3DModel": (
        "it refines chunk by chunk over keys that it keeps of earlier ones, in steps that its own loop counts. "
        f"{_FEWER_STEPS} of the transformer"
    ),
    f"{_TRANSFORMERS}.transformer_wan_animate_2.WanAnimate2Transformer3DModel": (
        "each of its frames sees the reference of that frame only, by a mask that no layout of tokens can say. "
        f"{_FEWER_STEPS} of pipe.transformer. Wan Animate (1) is supported"
    ),
    f"{_TRANSFORMERS}.transformer_joyimage.JoyImageEditTransformer3DModel": _ONE_IMAGE,
    f"{_TRANSFORMERS}.transformer_joyimage_edit_plus.JoyImageEditPlusTransformer3DModel": _ONE_IMAGE,
    "diffusers.models.unets.unet_motion_model.UNetMotionModel": _UNET,
    "diffusers.models.unets.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel": _UNET,
    "diffusers.models.unets.unet_3d_condition.UNet3DConditionModel": _UNET,
    "diffusers.models.unets.unet_i2vgen_xl.I2VGenXLUNet": _UNET,
}


def refusal(model: nn.Module | type) -> str | None:
    """Why a transformer or U-Net, or its class, is refused, and what helps instead; None for those of which nothing is known."""
    kind = model if isinstance(model, type) else type(model)
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__)
    return next((REFUSED[name] for name in names if name in REFUSED), None)


def unet_of(pipe: Any) -> nn.Module | None:
    """The U-Net of pipelines that have one instead of a transformer, such as AnimateDiff and Stable Video Diffusion."""
    unet = getattr(pipe, "unet", None)
    return unet if isinstance(unet, nn.Module) else None
