"""Prompts for pipelines of any kind, for those who bring none: one set to search with, one to decide by, one to judge with."""

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
VALIDATION = (
    "a child in a yellow raincoat jumps into a puddle, the water splashes in slow motion",
    "a chef slices vegetables on a wooden board in a busy kitchen, the camera moves closer",
    "a sailing boat leans in the wind on a choppy sea, clouds race over the sky",
    "a cat walks along the top of a brick wall in the evening sun, its tail swings",
    "traffic flows over a wide bridge at night, headlights leave long streaks of light",
    "a dancer spins on an empty stage under a single spotlight, dust floats in the air",
    "autumn leaves fall onto a quiet pond, rings spread over the water",
    "a robot arm assembles a watch on a white table, macro shot of its moving gears",
)
