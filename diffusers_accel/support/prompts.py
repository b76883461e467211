"""Prompts for pipelines of any kind, for those who bring none: one set to search with, another one to judge with."""

from __future__ import annotations

SEARCH = (
    "a red fox runs through fresh snow between birch trees, the camera follows it from the side",
    "a barista pours milk into a cup of coffee, close-up, steam rises in the morning light",
    "waves break on black rocks below a lighthouse at dusk, seen from a slowly rising drone",
    "a crowded street market at night in the rain, neon signs, people with umbrellas pass by",
)
REPORT = (
    "a golden retriever shakes water from its fur on a beach, slow motion",
    "an old steam train crosses a stone bridge over a green valley, the camera pans with it",
    "a potter shapes a bowl of wet clay on a turning wheel, hands in focus",
    "a hot-air balloon drifts over a field of lavender at sunrise, other balloons far away",
)
