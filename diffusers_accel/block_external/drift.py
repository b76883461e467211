"""Calibration of a gate: how far a cached part of attention drifts from step to step, head by head.

FlashBlock (arXiv 2602.05305, 2026) gates each head of each layer and step: while a dense run is watched, a part of
attention is compared with the last one that was cached, by the cosine of the outputs and the change of the log-sum-exp.
A head that fails at a step is cached anew there and then, so that the next step is compared with what it would find.

The flags of the gate come from the means over all samples, as the paper's code takes them. A head may so pass in the mean
at a step where some of the samples had cached it anew: what came after in those was compared with a fresher part than the
gate will leave. What is ours: every step is a candidate, a step that was never seen recomputes, and NaN counts as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_accel.block_external.gate import Gate


def drift(out: Tensor, lse: Tensor, cached_out: Tensor, cached_lse: Tensor) -> tuple[Tensor, Tensor]:
    """How far a part of attention is from what is cached of it, as means over batch and tokens.

    Args:
        out, cached_out: `[B, S, H, D]`.
        lse, cached_lse: fp32 `[B, H, S]`, natural log. Queries that read nothing, then and now, have not drifted.

    Returns:
        Per head, fp32 `[H]`: the cosine of out and cached_out, in -1..1, and the absolute change of lse, 0 or more.
    """
    unread = (lse == -torch.inf) & (cached_lse == -torch.inf)
    change = (lse - cached_lse).abs().masked_fill(unread, 0).mean((0, 2))
    # Head by head, since fp32 copies of everything may be large.
    cosines = [
        torch.cosine_similarity(out[:, :, h].float(), cached_out[:, :, h].float(), dim=-1).masked_fill(unread[:, h], 1)
        for h in range(out.shape[2])
    ]
    return torch.stack([cosine.mean() for cosine in cosines]), change


class Calibration:
    """Watches parts of attention over whole runs, and says which heads have to recompute theirs at which step.

    Args:
        steps, layers, heads: the size of the gate.
        gamma: smallest mean cosine at which a head reuses, in -1..1, or one for each step. The paper's 0.85; 0.9 keeps more
            of the quality.
        max_lse_change: largest mean change of the log-sum-exp at which a head reuses. The paper's 0.05.
    """

    def __init__(
        self,
        steps: int,
        layers: int,
        heads: int,
        *,
        gamma: float | Sequence[float] = 0.85,
        max_lse_change: float = 0.05,
    ) -> None:
        gammas = torch.as_tensor(gamma, dtype=torch.float64)
        if min(steps, layers, heads) < 1:
            raise ValueError(f"a gate has steps, layers and heads, found {steps}, {layers} and {heads}")
        if gammas.shape not in ((), (steps,)) or not bool((gammas.abs() <= 1).all()):
            raise ValueError(f"gamma must be one number in -1..1 or one for each of {steps} steps, found {gamma}")
        if not max_lse_change >= 0:
            raise ValueError(f"max_lse_change must be 0 or more, found {max_lse_change}")
        self._gamma = gammas.expand(steps)
        self._max_lse_change = max_lse_change
        self._sums = torch.zeros(2, steps, layers, heads, dtype=torch.float64)  # of cosines and of changes
        self._samples = torch.zeros(steps, layers, 1)
        self._cached: dict[tuple[int, str], tuple[int, Tensor, Tensor]] = {}  # step, out, lse

    @torch.no_grad()
    def observe(self, layer: int, step: int, out: Tensor, lse: Tensor, *, branch: str = "") -> Tensor:
        """Takes in the part of attention that a layer computed at a step. Waits for the device.

        A step that does not follow the last one of that layer and branch begins a new sample: another block or prompt. So does
        the first one after `forget`.

        Args:
            layer, step: from 0.
            out: `[B, S, H, D]`.
            lse: fp32 `[B, H, S]`, natural log.
            branch: name of the guidance branch; each has its own cache, and all count as samples.

        Returns:
            bool `[H]` on the cpu: the heads that were cached anew; all of them at the first step of a sample.

        Raises:
            ValueError: step, layer or shapes do not fit, also those of two steps of one sample.
        """
        self._check(layer, step, out, lse)
        last, cached_out, cached_lse = self._cached.get((layer, branch), (step, out, lse))
        if step != last + 1:
            self._cached[layer, branch] = step, out.detach().clone(), lse.detach().clone()
            return torch.ones(out.shape[2], dtype=torch.bool)
        if (out.shape, out.dtype, out.device) != (cached_out.shape, cached_out.dtype, cached_out.device):
            raise ValueError(
                f"layer {layer} had out {list(cached_out.shape)} in {cached_out.dtype} on {cached_out.device} at step {last}, "
                f"found {list(out.shape)} in {out.dtype} on {out.device} at step {step} of the same sample"
            )
        cosine, change = (x.double().cpu() for x in drift(out, lse, cached_out, cached_lse))
        self._sums[:, step, layer] += torch.stack([cosine, change])
        self._samples[step, layer] += 1
        failed = self._fails(cosine, change, self._gamma[step])
        cached_out[:, :, failed] = out[:, :, failed].detach()
        cached_lse[:, failed] = lse[:, failed].detach()
        self._cached[layer, branch] = step, cached_out, cached_lse
        return failed

    def renew(self, layer: int, heads: Sequence[int], out: Tensor, lse: Tensor, *, branch: str = "") -> None:
        """Puts another part in the place of what some heads have just cached: one whose keys are chosen anew as it is cached.

        Args:
            layer, branch: as of the call of `observe` before.
            heads: which ones, as many as out and lse have.
            out: `[B, S, len(heads), D]`.
            lse: fp32 `[B, len(heads), S]`, natural log.
        """
        _, cached_out, cached_lse = self._cached[layer, branch]
        cached_out[:, :, list(heads)] = out.detach()
        cached_lse[:, list(heads)] = lse.detach()

    def forget(self) -> None:
        """Drops what is cached, but no mean: the next step of each layer and branch begins a new sample."""
        self._cached.clear()

    @property
    def seen(self) -> Tensor:
        """bool `[steps, layers]`: where something was compared."""
        return self._samples[..., 0] > 0

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean cosine and mean change of the log-sum-exp, fp64 `[steps, layers, heads]`; NaN where nothing was compared."""
        cosine, change = self._sums / self._samples
        return cosine, change

    def flags(self) -> Tensor:
        """bool `[steps, layers, heads]`, True where the head has to recompute: it drifted too far, or was never compared."""
        return self._fails(*self.means(), self._gamma[:, None, None])

    def gate(self) -> Gate:
        """The gate that recomputes at these flags."""
        return Gate.table(self.flags())

    def _fails(self, cosine: Tensor, change: Tensor, gamma: Tensor) -> Tensor:
        return ~((cosine >= gamma) & (change <= self._max_lse_change))  # so that NaN fails

    def _check(self, layer: int, step: int, out: Tensor, lse: Tensor) -> None:
        steps, layers, heads = self._sums.shape[1:]
        if not (0 <= step < steps and 0 <= layer < layers):
            raise ValueError(f"calibrating {steps} steps and {layers} layers, found step {step} and layer {layer}")
        if out.dim() != 4 or out.shape[2] != heads:
            raise ValueError(f"out must be [B, S, {heads}, D], found {list(out.shape)}")
        if lse.shape != (out.shape[0], heads, out.shape[1]) or lse.dtype != torch.float32:
            raise ValueError(
                f"lse must be fp32 {[out.shape[0], heads, out.shape[1]]} to fit out {list(out.shape)}, "
                f"found {lse.dtype} {list(lse.shape)}"
            )
