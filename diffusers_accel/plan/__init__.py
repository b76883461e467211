"""The plan: which forwards run, and which method each head takes in each span of the schedule."""

from diffusers_accel.plan.plan import Plan, PlanError
from diffusers_accel.plan.span import Span

__all__ = ["Plan", "PlanError", "Span"]
