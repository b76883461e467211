"""Which heads of a plan take a method, as its stages are told when they check what they read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import FileError, quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

Tensors = Mapping[str, Tensor]  # of a plan's side file, by name


@dataclass(frozen=True)
class Uses:
    """The heads of one transformer that take one method.

    Args:
        symbol, label: of the method, for messages.
        heads: (layer, head) of each, in order.
        grid: frames, rows and columns of the tokens for which the plan was made; None where it does not tell them.
        layouts: the layout that it was made for, one for each place where text may be; empty where it does not tell it whole.
    """

    transformer: str
    shape: ModelShape
    symbol: str
    label: str
    heads: tuple[tuple[int, int], ...]
    grid: tuple[int, int, int] | None = None
    layouts: tuple[TokenLayout, ...] = ()

    def tensor(self, tensors: Tensors, name: str) -> Tensor:
        """One that the method reads.

        Raises:
            FileError: it is not there.
        """
        if name not in tensors:
            found = quoted(sorted(tensors))[1:-1] or "none"
            raise FileError(
                f"tensors: expected {quoted(name)}, which the method {self.symbol!r} reads, found {found}; "
                f"search the plan again, or leave out {self.label!r}"
            )
        return tensors[name]

    def check_size(self, name: str, tensor: Tensor, dtype: torch.dtype, dims: str, place: int = 0) -> None:
        """Refuses another dtype, number of dimensions, or other layers and heads than the model's, which `dims` names from
        `place` on."""
        shape = tensor.shape
        here = (self.shape.layers, self.shape.heads)
        if (
            tensor.dtype != dtype
            or tensor.dim() != dims.count(",") + 1
            or 0 in shape
            or shape[place : place + 2] != here
        ):
            wanted = dims.replace("layers", f"{here[0]} layers").replace("heads", f"{here[1]} heads")
            word = str(dtype).removeprefix("torch.")
            raise FileError(f"tensors.{name}: expected {word} [{wanted}], found {tensor.dtype} {list(shape)}")


def planned(tensors: Tensors, name: str, reader: str) -> Tensor:
    """A tensor that a stage reads at run time.

    Raises:
        ValueError: no plan has brought it.
    """
    if name not in tensors:
        raise ValueError(f"{reader} needs the tensor {name!r} of a searched plan, found {sorted(tensors)}")
    return tensors[name]
