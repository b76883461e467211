"""Which blocks each candidate reads at a call: fixed by the layout, by what the search has found, or by q and k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Context, Draft, Method, Order, Select, Stored
from diffusers_accel.methods.reuse import part_of
from diffusers_accel.search.measure import SampledHeads
from diffusers_accel.search.schedule import stored_axes, stored_densities
from diffusers_accel.search.scores import Array
from diffusers_accel.search.stored_masks import best_orders, mask_of, of_every_part


@dataclass(frozen=True)
class StoredChoice:
    """What the first pass has chosen, for the passes after it.

    Args:
        axes: the orders that heads may take, as `stored_axes` has them.
        densities: ascending.
        orders: int [layers, heads] per transformer, an index of `axes`, -1 for none.
        levels: uint8 [parts, layers, heads, blocks, blocks] per transformer, see `stored_masks.kept_levels`.
    """

    axes: tuple[str, ...]
    densities: tuple[float, ...]
    orders: dict[str, Array]
    levels: dict[str, Array]

    @classmethod
    def of(
        cls, candidates: tuple[Method, ...], sums: Mapping[str, Array], models: Mapping[str, object]
    ) -> StoredChoice:
        """From the sums of passes; all orders are -1 before the first pass."""
        axes = stored_axes(candidates)
        orders, levels = {}, {}
        for name in models if axes else ():
            orders[name] = best_orders(sums[f"order_sparse/{name}"], sums[f"order_quant/{name}"])
            levels[name] = sums[f"levels/{name}"]
        return cls(axes, stored_densities(candidates), orders, levels)

    def owners(self, method: Method, transformer: str) -> Array:
        """bool [layers, heads]: which heads may take a stored method: those whose own order it has."""
        found: Array = self.orders[transformer] == self.axes.index(method.order.label)
        return found

    def mask(self, ctx: Context, select: Stored) -> Tensor:
        """bool [heads, query blocks, key blocks] of `ctx.heads` at `ctx.now`."""
        levels = self.levels[ctx.transformer][:, ctx.layer][:, list(ctx.heads)]
        assert ctx.now is not None
        part = of_every_part(levels)[part_of(ctx.now, len(levels))]
        return mask_of(part, select.density, self.densities, ctx.layout)


class Masks:
    """The block masks of candidates.

    Args:
        tensors: what calibrated methods read, as in a plan; looked at anew at each call.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stored: StoredChoice) -> None:
        self._tensors = tensors
        self._stored = stored
        self._fixed: dict[tuple[Select, Order, TokenLayout, torch.device], Tensor] = {}

    def of(self, method: Method, ctx: Context, heads: SampledHeads) -> Tensor:
        """bool [1 or heads, query blocks, key blocks], in the method's order; `heads` are those of `ctx`."""
        select, device = method.select, heads.q.device
        if isinstance(select, Draft):
            return select.pattern(*heads.sorted(method.order), ctx.layout, method.order).mask()[0]
        columns = slice(ctx.layout.key_blocks(BLOCK))
        if isinstance(select, Stored):
            return self._stored.mask(ctx, select)[..., columns].to(device)
        if method.calibrated:
            here = Context(ctx.layout, ctx.transformer, ctx.layer, ctx.heads, self._tensors, ctx.now)
            return method.mask(here)[..., columns].to(device)
        key = select, method.order, ctx.layout, device
        if key not in self._fixed:
            self._fixed[key] = method.mask(ctx)[..., columns].to(device)
        return self._fixed[key]


def owned(method: Method, stored: StoredChoice, ctx: Context) -> np.ndarray:
    """bool [heads]: which heads of `ctx` may take a method."""
    if not isinstance(method.select, Stored):
        return np.ones(len(ctx.heads), bool)
    return stored.owners(method, ctx.transformer)[ctx.layer, list(ctx.heads)]
