"""Which order each head takes and which blocks get most of its attention, for stored masks.

Masks are chosen in the first calibration run and measured in the others, so that no mask is judged by the sample that chose
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.dense import dense as attend_densely
from diffusers_accel.kernels.grouped import of_heads
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method
from diffusers_accel.methods.orders import parse_order
from diffusers_accel.methods.selects.stored import Stored, packed
from diffusers_accel.methods.selects.stored_check import refuses_layout
from diffusers_accel.search.recorders.recorder import Kinds, Recorder
from diffusers_accel.search.scores_file import Array
from diffusers_accel.search.stored_masks import QUERY_STEP, best_orders, block_shares, kept_levels, order_scores
from diffusers_accel.shape import ModelShape

KIND = "stored masks"


class StoredMasks(Recorder):
    """PAROAttention's calibration (arXiv 2506.16054), by the last batch row of the first branch of a step: where guidance comes
    in one batch that is the prompt's own row, and where it comes in two branches the prompt's is the first. Both share the
    masks, as in the paper's code."""

    in_segments: ClassVar[bool] = True
    first_run_first: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._orders, self._densities = stored_orders(self.candidates), stored_densities(self.candidates)
        self._done: set[tuple[str, int, int]] = set()  # (transformer, layer, segment)

    @classmethod
    def arrays(cls, candidates: Sequence[Method], shape: ModelShape, layout: TokenLayout, segments: int) -> Kinds:
        orders, blocks = len(stored_orders(candidates)), layout.blocks(BLOCK)
        if not orders:
            return {}
        scores = (shape.layers, shape.heads, orders), "f8"
        levels = (segments, shape.layers, shape.heads, blocks, blocks), "u1"
        return {"order_sparse": scores, "order_quant": scores, "levels": levels}

    @classmethod
    def tensors(
        cls, candidates: Sequence[Method], sums: Mapping[str, Array], transformer: str, method: Method, heads: Array
    ) -> dict[str, Tensor]:
        select = cast(Stored, method.select)  # this recorder is that selection's
        densities = stored_densities(candidates)
        levels = sums[f"levels/{transformer}"]
        index = np.full(heads.shape, -1, "i4")
        index[heads] = np.arange(heads.sum())
        found = [of_every_segment(levels[:, layer])[:, head] for layer, head in np.argwhere(heads)]
        chosen = np.stack(found) if found else np.zeros((0, len(levels), *levels.shape[3:]), "u1")
        bits = packed(torch.from_numpy(chosen >= len(densities) - densities.index(select.density)))
        names = select.names(method.order, transformer)
        return {names[0]: bits, names[1]: torch.from_numpy(index)}

    @classmethod
    def provenance(
        cls, candidates: Sequence[Method], sums: Mapping[str, Array], models: Sequence[str]
    ) -> dict[str, Any]:
        """Both parts of the scores by which the orders were chosen."""
        figures = {
            kind: {name: sums[f"order_{kind}/{name}"].round(4).tolist() for name in models}
            for kind in ("sparse", "quant")
        }
        return {"orders": {"axes": list(stored_orders(candidates)), **figures}}

    def found(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in self.models:
            orders = best_orders(self.before[f"order_sparse/{name}"], self.before[f"order_quant/{name}"], self.masks)
            for method in _stored(self.candidates):
                own = orders == self._orders.index(method.order.label)
                tensors |= self.tensors(self.candidates, self.before, name, method, own)
        return tensors

    def add_call(
        self, call: AttentionCall, segment: int, q: Tensor, k: Tensor, v: Tensor, chunks: Iterator[slice]
    ) -> None:
        """Chooses the orders of a layer's heads, at its first call, and the blocks of one segment of the schedule."""
        (name, layer), layout = call.place, call.layout
        if reason := refuses_layout(layout):
            raise RuntimeError(f"{reason}: search without the method set of stored masks")
        if (name, layer, segment) in self._done:
            return
        self._done.add((name, layer, segment))
        sparse, quant, levels = (self.sums[f"{kind}/{name}"] for kind in ("order_sparse", "order_quant", "levels"))
        decided = quant[layer].any()
        for some in chunks:
            q_some = q[-1:, :, some]
            k_some, v_some = (of_heads(x[-1:], call.heads[some], q.shape[2]) for x in (k, v))
            if not decided:
                lse = attend_densely(q_some, k_some, v_some)[1]
                sparse[layer, some], quant[layer, some] = order_scores(
                    q_some, k_some, lse, layout, self._orders, self.masks
                )
            orders = best_orders(sparse[layer, some], quant[layer, some], self.masks)
            for order in np.unique(orders):
                sequence = parse_order(self._orders[order]).index(layout).to(q.device)
                own = torch.from_numpy(np.flatnonzero(orders == order)).to(q.device)
                keys = k_some[:, sequence[: k.shape[1]]][:, :, own]
                queries = q_some[:, sequence[::QUERY_STEP]][:, :, own]
                lse = attend_densely(queries, keys, keys)[1]  # which does not depend on the values
                chosen = kept_levels(block_shares(queries, keys, lse), layout, self._densities)
                levels[segment, layer, some.start + own.cpu().numpy()] = chosen.cpu().numpy()


def stored_orders(candidates: Iterable[Method]) -> tuple[str, ...]:
    """The orders in which masks may be stored, in the order of the candidates."""
    return tuple(dict.fromkeys(method.order.label for method in _stored(candidates)))


def stored_densities(candidates: Iterable[Method]) -> tuple[float, ...]:
    """The densities of stored masks, ascending."""
    return tuple(sorted({cast(Stored, method.select).density for method in _stored(candidates)}))


def of_every_segment(levels: Array) -> Array:
    """Levels [segments, ...] in which a segment without any (the model did not run at its step) has those of the nearest."""
    found = [segment for segment in range(len(levels)) if levels[segment].any()]
    if len(found) in (0, len(levels)):
        return levels
    return levels[[min(found, key=lambda other: abs(other - segment)) for segment in range(len(levels))]]


def _stored(candidates: Iterable[Method]) -> list[Method]:
    return [method for method in candidates if method.select.records == KIND]
