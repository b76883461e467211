"""The orders that there are: one file each, imported and named here."""

from diffusers_accel.files import quoted
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders.axes import AxisOrder
from diffusers_accel.methods.orders.patches import Patches

__all__ = ["AxisOrder", "Patches"]

ORDERS: tuple[type[Order], ...] = tuple(map(globals().__getitem__, __all__))


def parse_order(text: str) -> Order:
    """The order of a label such as "hwf" or "8x16"."""
    for each in ORDERS:
        if (order := each.parse(text)) is not None:
            return order
    raise ValueError(
        f'an order is a permutation of "fhw" such as "hwf" or a patch such as "8x16" or "8x16 text first", found {quoted(text)}'
    )
