"""diffusers' perturbed guidance (`LayerSkipConfig(skip_attention_scores=True)`): attention that is left out of a pass."""

from __future__ import annotations

from torch import nn


def scores_skipped(attention: nn.Module) -> bool:
    """Whether diffusers wants the values of this attention module instead of its output, now.

    Its hook says so to `F.scaled_dot_product_attention` alone, by a function mode, which an operator of ours does not see. A
    guider puts the hook on for one pass and takes it off after it.
    """
    registry = vars(attention).get("_diffusers_hook")  # asked for at every call: a module without one is slow to say so
    hooks = getattr(registry, "hooks", {})
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())
