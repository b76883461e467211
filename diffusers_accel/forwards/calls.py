"""What a forward of a diffusers transformer is given, and what it gives."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffusers_accel.families import Family


@dataclass(frozen=True)
class Given:
    """The arguments of one forward that matter here.

    Args:
        latents: what is denoised, with the channels of a condition where the model has any; several where the model denoises
            several (video and audio).
        timestep: 0-d tensor on the model's device.
        return_dict: whether the caller wants an output object, or a tuple.
    """

    latents: tuple[Tensor, ...]
    timestep: Tensor
    return_dict: bool


@dataclass(frozen=True)
class OutputForm:
    """How the tensors of an output stand in it: in a tuple, in one of diffusers' output objects, in lists of these."""

    spec: Any
    leaves: tuple[
        Any, ...
    ]  # with _TENSOR where a tensor is to stand; other tensors, such as a cache, by weak references

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """An output of this form that holds these tensors."""
        rest = iter(tensors)
        leaves = (leaf() if isinstance(leaf, weakref.ref) else leaf for leaf in self.leaves)
        return pytree.tree_unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in leaves], self.spec)


_TENSOR = object()


def opened(output: Any, most: int | None = None) -> tuple[tuple[Tensor, ...], OutputForm]:
    """The tensors of a transformer's output (the first `most` of them), and how they stand in it."""
    leaves, spec = pytree.tree_flatten(output)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][:most]
    kept = (
        weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    )  # it is the pipeline's, and large
    form = OutputForm(spec, tuple(_TENSOR if place in places else leaf for place, leaf in enumerate(kept)))
    return tuple(leaves[place] for place in places), form


class ForwardReader:
    """Reads the calls of one transformer, by the names of its family.

    Raises:
        TypeError: its forward has no arguments of these names.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self._module = module
        self._family = family
        self._signature = inspect.signature(type(module).forward)
        for name in (*family.latents, family.timestep):
            if name not in self._signature.parameters:
                raise TypeError(f"expected a forward of {type(module).__name__} with an argument {name!r}, found none")

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        given = self._signature.bind(self._module, *args, **kwargs).arguments
        leaves = pytree.tree_leaves([given.get(name) for name in self._family.latents])
        timestep = given[self._family.timestep].detach()
        return Given(
            latents=tuple(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)),
            timestep=self._family.noisiest(timestep) if timestep.dim() else timestep,
            return_dict=bool(given.get("return_dict", True)),
        )

    def denoised(self, latents: Tensor, like: Tensor) -> Tensor:
        """The latents without the channels of a condition, which come after those that are denoised, as many as `like` has: a
        view. For twice as many, of which the second half is a learned variance, zeros behind them."""
        at = self._family.channels
        if like.shape[at] == 2 * latents.shape[at]:
            return torch.cat([latents, torch.zeros_like(latents)], dim=at)
        return latents.narrow(at, 0, min(like.shape[at], latents.shape[at]))

    def inputs_of(self, latents: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The part of the latents that each output is of: of their shapes.

        Raises:
            RuntimeError: there is none.
        """
        if len(latents) != len(outputs):
            raise RuntimeError(
                f"expected as many outputs as there are latents ({len(latents)}), found {len(outputs)}: forwards of "
                f"{type(self._module).__name__} cannot be predicted for this call"
            )
        found = [self.denoised(x, v) for x, v in zip(latents, outputs, strict=True)]
        for given, x, v in zip(latents, found, outputs, strict=True):
            if x.shape != v.shape:
                raise RuntimeError(
                    f"expected an output of the shape of the first channels of the input {list(given.shape)}, found "
                    f"{list(v.shape)}: forwards of {type(self._module).__name__} cannot be predicted for this call"
                )
        return found
