"""What a forward of a diffusers transformer is given, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffusers_accel.families import Family


@dataclass(frozen=True)
class Given:
    """The arguments of one forward that matter here.

    Args:
        latents: what is denoised, with the channels of a condition where the model has any.
        timestep: 0-d tensor on the model's device.
        return_dict: whether the caller wants an output object, or a tuple.
    """

    latents: Tensor
    timestep: Tensor
    return_dict: bool


class ForwardReader:
    """Reads the calls of one transformer, by the names of its family.

    Raises:
        TypeError: its forward has no arguments of these names.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self._module = module
        self._family = family
        self._signature = inspect.signature(type(module).forward)
        for name in (family.latents, family.timestep):
            if name not in self._signature.parameters:
                raise TypeError(f"expected a forward of {type(module).__name__} with an argument {name!r}, found none")

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        given = self._signature.bind(self._module, *args, **kwargs).arguments
        timestep = given[self._family.timestep].detach()
        return Given(
            latents=given[self._family.latents].detach(),
            timestep=timestep.amax() if timestep.dim() else timestep,  # image-to-video may give a known frame a 0
            return_dict=bool(given.get("return_dict", True)),
        )

    def denoised(self, latents: Tensor, like: Tensor) -> Tensor:
        """The latents without the channels of a condition, which come after those that are denoised, as many as `like` has:
        a view."""
        at = self._family.channels
        return latents.narrow(at, 0, min(like.shape[at], latents.shape[at]))

    def input_of(self, latents: Tensor, sample: Tensor) -> Tensor:
        """The part of the latents that the output `sample` is of: a view of its shape.

        Raises:
            RuntimeError: there is none.
        """
        x = self.denoised(latents, sample)
        if x.shape != sample.shape:
            raise RuntimeError(
                f"expected an output of the shape of the first channels of the input {list(latents.shape)}, found "
                f"{list(sample.shape)}: forwards of {type(self._module).__name__} cannot be predicted for this call"
            )
        return x


def sample_of(output: Any) -> Tensor:
    """The one tensor of a transformer's output, given as a tuple or as diffusers' output object.

    Raises:
        RuntimeError: there are more; they could not be predicted.
    """
    parts = output if isinstance(output, tuple) else output.to_tuple()
    if len(parts) != 1:
        raise RuntimeError(
            f"expected a transformer with one output, found {len(parts)}: its forwards cannot be predicted"
        )
    sample: Tensor = parts[0]
    return sample


def as_output(sample: Tensor, return_dict: bool) -> Any:
    """`sample` in the form that the caller of the transformer asks for."""
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
