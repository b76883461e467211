"""Methods: short pipelines of stages, and the named recipes made of them."""

from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.method import AUTO, DENSE, Method
from diffusers_accel.methods.named import NAMED, Recipe
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders import AxisOrder, Patches
from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests import RESTS, Drop, Kept, Pooled
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.selects import SELECTS, All, Band, Draft, Radial, Skip, Stored, Stripe, SubBlock

__all__ = [
    "AUTO",
    "BLOCK",
    "DENSE",
    "NAMED",
    "RESTS",
    "SELECTS",
    "All",
    "AxisOrder",
    "Band",
    "Draft",
    "Drop",
    "Kept",
    "Method",
    "Order",
    "Patches",
    "Pooled",
    "Radial",
    "Recipe",
    "Rest",
    "Select",
    "Skip",
    "Stored",
    "Stripe",
    "SubBlock",
]
