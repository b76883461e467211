"""Methods: short pipelines of stages, and the named recipes made of them."""

from diffusers_accel.methods import corrects, orders, rests, selects
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.correct import Correct
from diffusers_accel.methods.corrects import *  # noqa: F403  # the members, which their folder lists
from diffusers_accel.methods.corrects import CORRECTS
from diffusers_accel.methods.method import AUTO, DENSE, Method
from diffusers_accel.methods.named import NAMED, Recipe
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders import *  # noqa: F403
from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests import *  # noqa: F403
from diffusers_accel.methods.rests import RESTS
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.selects import *  # noqa: F403
from diffusers_accel.methods.selects import SELECTS

__all__ = [
    "AUTO",
    "BLOCK",
    "CORRECTS",
    "DENSE",
    "NAMED",
    "RESTS",
    "SELECTS",
    "Correct",
    "Method",
    "Order",
    "Recipe",
    "Rest",
    "Select",
    *corrects.__all__,
    *orders.__all__,
    *rests.__all__,
    *selects.__all__,
]
