"""A plan as text: what is in its file steers no terminal and breaks no line."""

from __future__ import annotations

import dataclasses

from diffusers_accel.methods import Method
from diffusers_accel.plan import Plan
from diffusers_accel.shape import ModelShape

HOSTILE = "\x1b]0;owned\x07 red\x1b[31m\n[/b] \u202e"


def test_texts_of_a_plan_steer_no_terminal() -> None:
    plan = Plan.uniform(Method(), family="wan", models={"transformer": ModelShape(2, 2, 16)})
    texts = {HOSTILE: HOSTILE, "prompts": [HOSTILE], "long": HOSTILE * 1000}
    shown = dataclasses.replace(plan, provenance=texts, budget={"kind": HOSTILE}).show()
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert len(shown.splitlines()) == len(plan.show().splitlines()) + 2 + len(texts) + 2 + 1
    assert r"\x1b[31m\n[/b]" in shown
