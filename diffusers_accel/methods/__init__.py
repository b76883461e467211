"""Methods: short pipelines of stages, and the named recipes made of them."""

from diffusers_accel.methods.context import Context
from diffusers_accel.methods.draft import Draft
from diffusers_accel.methods.method import AUTO, DENSE, SELECTS, Method, Select
from diffusers_accel.methods.named import NAMED, Recipe
from diffusers_accel.methods.orders import AxisOrder, Order, Patches
from diffusers_accel.methods.reuse import Reuse
from diffusers_accel.methods.selects import BLOCK, All, Band, Skip, Stripe
from diffusers_accel.methods.stored import Stored

__all__ = [
    "AUTO",
    "BLOCK",
    "DENSE",
    "NAMED",
    "SELECTS",
    "All",
    "AxisOrder",
    "Band",
    "Context",
    "Draft",
    "Method",
    "Order",
    "Patches",
    "Recipe",
    "Reuse",
    "Select",
    "Skip",
    "Stored",
    "Stripe",
]
