"""What a clip shows, found from its pixels alone: the background, and each object's colour, shape and motion.

Nothing here knows what was asked for; a caption is compared with the finding afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffusers_accel.evals.toy.render import BACKGROUNDS, COLORS, TEXTURE, parse_caption

# RGB distances (0..1 per channel): object pixel to background, object pixel to palette colour, background to palette.
_FOREGROUND, _NEAR_COLOR, _NEAR_BACKGROUND = 0.30, 0.33, 0.20
_MIN_AREA = 0.002  # share of the frame that counts as an object
_SEEN, _FLICKER = 0.85, 0.25  # share of the frames in which an object is seen; in between it is one that comes and goes
_TRAVELS, _STAYS = 0.20, 0.12  # shares of the side
_GROWS = 2.0  # ratio of areas, last to first
_TURNS = 1.0  # radians


@dataclass(frozen=True)
class Found:
    """One object: its colour, shape and motion ("unclear" where nothing fits), and its mean area as a share."""

    color: str
    shape: str
    motion: str
    area: float


@dataclass(frozen=True)
class Verdict:
    """Which attributes of its caption a clip shows, of all its objects; a missing or additional object fails `color`."""

    background: bool
    color: bool
    motion: bool
    shape: bool

    @property
    def passed(self) -> bool:
        """Background, colour and motion, the three that the model is held to."""
        return self.background and self.color and self.motion


def find(video: NDArray[np.float32]) -> tuple[str, tuple[Found, ...]]:
    """Background name ("unclear" if none is near) and objects, biggest first, of a clip `[F, H, W, 3]` in 0..1."""
    median = np.median(video.reshape(-1, 3), axis=0)
    name, distance = _nearest(median[None] - TEXTURE / 2, BACKGROUNDS)
    background = list(BACKGROUNDS)[name[0]] if distance[0] < _NEAR_BACKGROUND else "unclear"
    label, distance = _nearest(video.reshape(-1, 3), COLORS)
    object_like = (distance < _NEAR_COLOR) & (np.linalg.norm(video.reshape(-1, 3) - median, axis=1) > _FOREGROUND)
    label = np.where(object_like, label, -1).reshape(video.shape[:3])
    found = []
    for index, color in enumerate(COLORS):
        masks = np.stack([_largest_part(frame == index) for frame in label])
        area = masks.mean(axis=(1, 2))
        # Thin lines are the blend of an object of another colour with its background.
        solid = ndimage.binary_opening(masks, structure=np.ones((1, 3, 3)))
        seen = solid.mean(axis=(1, 2)) > _MIN_AREA
        if seen.mean() >= _SEEN:
            found.append(Found(color, *_describe(masks[seen], np.flatnonzero(seen)), float(area[seen].mean())))
        elif seen.mean() >= _FLICKER:
            found.append(Found(color, "unclear", "unclear", float(area[seen].mean())))
    return background, tuple(sorted(found, key=lambda f: -f.area))


def compare(shown: tuple[str, tuple[Found, ...]], caption: str) -> Verdict:
    """Compare a finding with what a caption asks for."""
    asked = parse_caption(caption)
    background, found = shown
    wanted, got = sorted(asked.objects), sorted((f.color, f.shape, f.motion) for f in found)
    color = [w[0] for w in wanted] == [g[0] for g in got]
    return Verdict(
        background=background == asked.background,
        color=color,
        motion=_same(wanted, got, 2, color),
        shape=_same(wanted, got, 1, color),
    )


def judge(video: NDArray[np.float32], caption: str) -> Verdict:
    """Compare what a clip `[F, H, W, 3]` in 0..1 shows with what its caption asks for."""
    return compare(find(video), caption)


def _same(wanted: list[tuple[str, str, str]], got: list[tuple[str, str, str]], which: int, paired: bool) -> bool:
    """Whether an attribute agrees object by object, or, where the colours do not tell which is which, as a whole."""
    a, b = [w[which] for w in wanted], [g[which] for g in got]
    return a == b if paired else sorted(a) == sorted(b)


def _nearest(pixels: NDArray, palette: dict[str, tuple[float, float, float]]) -> tuple[NDArray, NDArray]:
    distance = np.stack([np.linalg.norm(pixels - np.array(c, np.float32), axis=1) for c in palette.values()])
    return distance.argmin(0), distance.min(0)


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, count = ndimage.label(mask)
    if count <= 1:
        return mask
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax()


def _describe(masks: NDArray[np.bool_], frames: NDArray[np.int64]) -> tuple[str, str]:
    """Shape and motion of one object from its masks `[N, H, W]` in the given frames."""
    n, height, width = masks.shape
    x, y, area = np.empty(n), np.empty(n), masks.mean(axis=(1, 2))
    harmonics = np.empty((n, 3), complex)
    for i, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        x[i], y[i] = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
        dx, dy = (columns + 0.5) / width - x[i], (rows + 0.5) / height - y[i]
        rho = np.hypot(dx, dy) / np.sqrt(area[i])
        angle = np.arctan2(dx, -dy)
        # The k-th harmonic of the mass is what a k-fold outline has and a disc has not.
        harmonics[i] = [(rho**k * np.exp(1j * k * angle)).mean() for k in (3, 4, 5)]
    shape, order = _shape(np.median(np.abs(harmonics), axis=0))
    turned = np.ptp(np.unwrap(np.angle(harmonics[:, order - 3]))) / order if order else 0.0
    return shape, _motion(x, y, area, turned, frames / max(frames[-1], 1))


def _shape(strength: NDArray[np.float64]) -> tuple[str, int]:
    """Shape and its order of symmetry from the harmonics of orders 3, 4, 5, relative to those of the ideal shapes."""
    relative = strength / np.array([0.067, 0.017, 0.032])
    best = int(relative.argmax())
    return (("triangle", 3), ("square", 4), ("star", 5))[best] if relative[best] > 0.4 else ("circle", 0)


def _motion(x: NDArray, y: NDArray, area: NDArray, turned: float, time: NDArray) -> str:
    ends = lambda v: (float(v[:3].mean()), float(v[-3:].mean()))  # noqa: E731
    (x0, x1), (y0, y1), (a0, a1) = ends(x), ends(y), ends(area)
    dx, dy, ratio = x1 - x0, y1 - y0, a1 / a0
    range_x, range_y = np.ptp(x), np.ptp(y)
    if max(abs(dx), abs(dy)) > _TRAVELS and min(range_x, range_y) < _STAYS and 1 / _GROWS < ratio < _GROWS:
        along = np.diff(x if abs(dx) > abs(dy) else y) * np.sign(dx if abs(dx) > abs(dy) else dy)
        if along[along < 0].sum() < -0.25 * along.sum():  # goes back and forth
            return "unclear"
        return (
            ("moves right" if dx > 0 else "moves left")
            if abs(dx) > abs(dy)
            else ("moves down" if dy > 0 else "moves up")
        )
    if range_y > _TRAVELS and range_x < _STAYS and abs(dy) < _TRAVELS:
        arcs = np.corrcoef(-y, np.abs(np.sin(2 * np.pi * time)))[0, 1]
        return "bounces" if arcs > 0.7 else "unclear"
    if max(range_x, range_y) < _STAYS:
        if ratio > _GROWS or ratio < 1 / _GROWS:
            return "grows" if ratio > 1 else "shrinks"
        if turned > _TURNS:
            return "turns"
    return "unclear"
