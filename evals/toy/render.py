"""The world that the toy model is trained on: coloured shapes that move over slowly drifting backgrounds.

A `Scene` holds every number that a clip needs, so rendering is a pure function of it; its caption names colour, shape,
motion and background and parses back into them. All lengths are shares of the frame's side, so that one scene (and its
caption) is valid at every frame size.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.15, 0.78, 0.22),
    "blue": (0.20, 0.42, 1.00),
    "yellow": (0.98, 0.88, 0.15),
    "white": (0.96, 0.96, 0.96),
    "pink": (0.95, 0.30, 0.80),
    "cyan": (0.15, 0.85, 0.95),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.04),
    "navy": (0.04, 0.07, 0.32),
    "gray": (0.38, 0.38, 0.38),
    "maroon": (0.36, 0.04, 0.08),
    "teal": (0.02, 0.32, 0.32),
    "purple": (0.27, 0.07, 0.42),
}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
MOTIONS = (*DIRECTIONS, "bounces", "grows", "shrinks", "turns")
# Corners and the distance of the notch between two of them, as a share of the corner's (a notch on the edge: a polygon).
SHAPES: dict[str, tuple[int, float]] = {
    "circle": (0, 1.0),
    "square": (4, 0.7071),
    "triangle": (3, 0.5),
    "star": (5, 0.45),
}
# Corner distance per unit of radius, so that all shapes cover about the same area.
_REACH = {"circle": 1.0, "square": 1.2, "triangle": 1.4, "star": 1.45}

TEXTURE = 0.10  # brightness that the background's texture adds at most
TWO_OBJECTS = 0.08  # share of the scenes with two objects
_TWO = "two objects"  # a kind of scene beside the motions of one object
_MOTION_WEIGHTS = dict.fromkeys(DIRECTIONS, 0.16) | {"bounces": 0.10, "grows": 0.10, "shrinks": 0.10, "turns": 0.06}
# How often training meets a kind of scene: what is hard to learn more often than `sample_scene` draws it.
_TRAINED = dict.fromkeys(MOTIONS, 1) | {"bounces": 2, "turns": 3, _TWO: 3}
_SPREAD = 0.06  # of an object's place around where its caption puts it
_LANES = (0.26, 0.74)  # of two objects: the first named is the upper or the left one
_EDGE = 1.6 / 128  # width of the antialiased edge


@dataclass(frozen=True)
class Actor:
    """One object: what the caption says of it, and where it starts (x, y, radius and travel in shares of the side)."""

    color: str
    shape: str
    motion: str
    x: float
    y: float
    radius: float
    travel: float

    @property
    def phrase(self) -> str:
        return f"a {self.color} {self.shape} {self.motion}"

    def state(self, time: NDArray[np.float32]) -> NDArray[np.float32]:
        """x, y, radius and clockwise angle (radians) at `time` (0..1 over the clip): `[4, len(time)]`."""
        still = np.zeros_like(time)
        x, y, radius, angle = self.x + still, self.y + still, self.radius + still, still
        if self.motion in DIRECTIONS:
            dx, dy = DIRECTIONS[self.motion]
            x, y = x + dx * self.travel * time, y + dy * self.travel * time
        elif self.motion == "bounces":
            y = y - self.travel * np.abs(np.sin(2 * np.pi * time))
        elif self.motion == "grows":
            radius = self.radius * (0.6 + self.travel * time)
        elif self.motion == "shrinks":
            radius = self.radius * (0.6 + self.travel * (1 - time))
        elif self.motion == "turns":
            angle = self.travel * time
        return np.stack([x, y, radius, angle]).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """One clip: background, objects, and the drifting waves of the texture (rows of fx, fy, speed, phase)."""

    background: str
    actors: tuple[Actor, ...]
    waves: tuple[tuple[float, float, float, float], ...]

    @property
    def caption(self) -> str:
        return f"{' and '.join(a.phrase for a in self.actors)} on a {self.background} background"

    @property
    def kind(self) -> str:
        """The motion of its object, or "two objects"."""
        return self.actors[0].motion if len(self.actors) == 1 else _TWO


class Asked(NamedTuple):
    """What a caption asks for: background and (colour, shape, motion) of each object."""

    background: str
    objects: tuple[tuple[str, str, str], ...]


_OBJECT = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})")
_CAPTION = re.compile(rf"({_OBJECT.pattern})( and {_OBJECT.pattern})? on a ({'|'.join(BACKGROUNDS)}) background")


def parse_caption(caption: str) -> Asked:
    """The attributes named in a caption of this world; ValueError for any other text."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"expected a caption like 'a red circle moves left on a navy background', found {caption!r}; "
            f"colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; motions: {', '.join(MOTIONS)}; "
            f"backgrounds: {', '.join(BACKGROUNDS)}"
        )
    objects = tuple((m[1], m[2], m[3]) for m in _OBJECT.finditer(caption))
    return Asked(match.groups()[-1], objects)


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the held-out eighth, decided by a hash in which the order of two objects is lost."""
    asked = parse_caption(caption)
    key = "|".join([asked.background, *(" ".join(o) for o in sorted(asked.objects))])
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def _actor(
    rng: np.random.Generator, motions: tuple[str, ...], taken: Set[str] = frozenset(), lane: float = 0.5
) -> Actor:
    """Draw an object around the middle, or around the line at `lane` along which it travels.

    Where an object starts follows from its caption up to a token or two: what an hour of training can learn. A place drawn
    at random would have to be decided, the same for all frames, from almost pure noise.
    """
    color = str(rng.choice([c for c in COLORS if c not in taken]))
    weights = np.array([_MOTION_WEIGHTS[m] for m in motions])
    motion = str(rng.choice(motions, p=weights / weights.sum()))
    # A circle that turns cannot be seen to turn.
    shape = str(rng.choice([s for s in SHAPES if s != "circle" or motion != "turns"]))
    radius = float(rng.uniform(0.15, 0.18) if lane == 0.5 else rng.uniform(0.11, 0.13))
    spread = _SPREAD if lane == 0.5 else _SPREAD / 2
    x, y = (float(v) for v in rng.uniform(-spread, spread, size=2))
    travel = 0.0
    if motion in DIRECTIONS:
        travel = float(rng.uniform(0.42, 0.52))
        dx, dy = DIRECTIONS[motion]
        x, y = (x + (lane if d == 0 else 0.5 - d * travel / 2) for x, d in ((x, dx), (y, dy)))
    elif motion == "bounces":
        x, y, travel = 0.5 + x, float(rng.uniform(0.72, 0.78)), float(rng.uniform(0.36, 0.46))
    else:
        x, y = 0.5 + x, 0.5 + y
        if motion == "turns":
            travel, radius = float(rng.uniform(1.9, 2.6)), radius * 1.15
        else:
            radius, travel = float(rng.uniform(0.12, 0.15)), float(rng.uniform(1.0, 1.3))
    return Actor(color, shape, motion, x, y, radius, travel)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: mostly one object; two have different colours and travel along parallel lanes, so they never touch."""
    background = str(rng.choice(list(BACKGROUNDS)))
    waves = tuple(
        (float(f * np.cos(d)), float(f * np.sin(d)), float(rng.uniform(0.15, 0.35)), float(rng.uniform(0, 1)))
        for f, d in zip(rng.uniform(0.8, 2.0, size=2), rng.uniform(0, 2 * np.pi, size=2), strict=True)
    )
    if rng.random() >= TWO_OBJECTS:
        return Scene(background, (_actor(rng, MOTIONS),), waves)
    across = int(rng.integers(2))
    motions = tuple(m for m, d in DIRECTIONS.items() if d[across] == 0)
    first = _actor(rng, motions, lane=_LANES[0])
    return Scene(background, (first, _actor(rng, motions, {first.color}, _LANES[1])), waves)


def training_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene whose caption is not held out, its kind by how hard it is to learn."""
    weights = np.array(list(_TRAINED.values()), float)
    kind = str(rng.choice(list(_TRAINED), p=weights / weights.sum()))
    while True:
        scene = sample_scene(rng)
        if scene.kind == kind and not is_held_out(scene.caption):
            return scene


def held_out_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene whose caption is held out."""
    while True:
        scene = sample_scene(rng)
        if is_held_out(scene.caption):
            return scene


def held_out_prompts(n: int, seed: int = 0) -> list[str]:
    """`n` different held-out captions, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts.setdefault(held_out_scene(rng).caption)
    return list(prompts)


def _distance(shape: str, dx: NDArray, dy: NDArray, radius: NDArray, angle: NDArray) -> NDArray:
    """Signed distance to the outline (exact at the edges, which is where it is used)."""
    corners, notch = SHAPES[shape]
    reach = radius * _REACH[shape]
    rho = np.hypot(dx, dy)
    if corners == 0:
        return rho - reach
    # Fold the plane into one half sector; the first corner points up, a square stands on its side.
    upright = np.pi / 4 if shape == "square" else 0.0
    sector = 2 * np.pi / corners
    theta = np.arctan2(dx, -dy) - angle - upright
    theta = np.abs(theta - sector * np.round(theta / sector))
    px, py = rho * np.cos(theta), rho * np.sin(theta)
    nx, ny = notch * np.cos(sector / 2), notch * np.sin(sector / 2)
    ex, ey = ny, 1 - nx  # normal of the line from the corner (1, 0) to the notch
    norm = float(np.hypot(ex, ey))
    return ((px - reach) * ex + py * ey) / norm


def render(
    scene: Scene, frames: int = 33, size: int = 128, window: tuple[int, int, int, int, int, int] | None = None
) -> NDArray[np.float32]:
    """Render a clip: float32 `[frames, size, size, 3]` in 0..1.

    window: (first frame, frames, top, height, left, width) of the part to render, as an exact crop of the whole clip.
    """
    t0, nt, y0, ny, x0, nx = window or (0, frames, 0, size, 0, size)
    time = (np.arange(t0, t0 + nt, dtype=np.float32) / max(frames - 1, 1)).astype(np.float32)
    y = ((np.arange(y0, y0 + ny, dtype=np.float32) + 0.5) / size)[None, :, None]
    x = ((np.arange(x0, x0 + nx, dtype=np.float32) + 0.5) / size)[None, None, :]
    t = time[:, None, None]
    texture: NDArray[np.float32] = np.zeros((nt, ny, nx), np.float32)
    for fx, fy, speed, phase in scene.waves:
        turns = np.float32(2 * np.pi) * (
            np.float32(fx) * x + np.float32(fy) * y + np.float32(speed) * t + np.float32(phase)
        )
        texture += np.sin(turns)
    brightness = np.float32(TEXTURE) * (np.float32(0.5) + texture / np.float32(2 * len(scene.waves)))
    video: NDArray[np.float32] = np.array(BACKGROUNDS[scene.background], np.float32) + brightness[..., None]
    for actor in scene.actors:
        ax, ay, radius, angle = (v[:, None, None] for v in actor.state(time))
        distance = _distance(actor.shape, x - ax, y - ay, radius, angle)
        cover = np.clip(0.5 - distance / _EDGE, 0, 1).astype(np.float32)[..., None]
        video = video * (1 - cover) + np.array(COLORS[actor.color], np.float32) * cover
    return np.clip(video, 0, 1)
