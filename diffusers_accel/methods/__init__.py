"""Methods: short pipelines of stages, and the named recipes made of them."""

from diffusers_accel.methods.context import Context
from diffusers_accel.methods.method import DENSE, Method
from diffusers_accel.methods.named import NAMED, Recipe
from diffusers_accel.methods.orders import AxisOrder
from diffusers_accel.methods.selects import BLOCK, SELECTS, All, Band, Select, Skip, Stripe

__all__ = [
    "BLOCK",
    "DENSE",
    "NAMED",
    "SELECTS",
    "All",
    "AxisOrder",
    "Band",
    "Context",
    "Method",
    "Recipe",
    "Select",
    "Skip",
    "Stripe",
]
