"""The polynomials that the authors of TeaCache, and others after them, have fitted to checkpoints: data, and where it is from.

Numbers of https://github.com/ali-vilab/TeaCache at commit 7c10efc, and for HunyuanVideo 1.5 of
https://github.com/ModelTC/LightX2V at commit f8aee98. They were fitted to the original code; the indicators here are diffusers'
own modules of the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """What was fitted to one checkpoint.

    Args:
        made_for: its family and size, as a rule's `made_for`.
        indicator: as of `TeaCache`.
        coefficients: of the polynomial, that of the highest degree first.
        threshold: where the authors report about 1.6 times the speed; None where they name none for it.
        warm_up: number of first steps that they compute.
    """

    made_for: str
    indicator: str
    coefficients: tuple[float, ...]
    threshold: float | None = None
    warm_up: int = 1


def _wan(layers: int, heads: int, threshold: float | None, *coefficients: float) -> Table:
    """By what modulates the blocks, with five first steps computed: the variant that its authors call ret_steps."""
    return Table(f"wan, {layers} layers of {heads} heads", "time_projection", coefficients, threshold, 5)


def _wan_time(layers: int, heads: int, threshold: float | None, *coefficients: float) -> Table:
    """By the embedding of the timestep, with one first step computed."""
    return Table(f"wan, {layers} layers of {heads} heads", "time", coefficients, threshold)


def _cogvideox(layers: int, heads: int, threshold: float | None, *coefficients: float) -> Table:
    return Table(f"cogvideox, {layers} layers of {heads} heads", "time", coefficients, threshold)


def _tokens(made_for: str, threshold: float | None, *coefficients: float) -> Table:
    return Table(made_for, "tokens", coefficients, threshold)


_HUNYUAN15 = "hunyuan_video15, 54 layers of 16 heads"

TABLES: dict[str, Table] = {
    "wan2.1-t2v-1.3b": _wan(30, 12, 0.05, -5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "wan2.1-t2v-14b": _wan(40, 40, 0.1, -3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    "wan2.1-i2v-14b-480p": _wan(40, 40, None, 2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
    "wan2.1-i2v-14b-720p": _wan(40, 40, None, 8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
    "wan2.1-t2v-1.3b-time": _wan_time(
        30, 12, 0.05, 2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1
    ),
    "wan2.1-t2v-14b-time": _wan_time(
        40, 40, 0.14, -5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404
    ),
    "wan2.1-i2v-14b-480p-time": _wan_time(40, 40, None, -302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-14b-720p-time": _wan_time(
        40, 40, None, -114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683
    ),
    "cogvideox-2b": _cogvideox(30, 30, None, -31.0658903, 25.4732368, -5.92380459, 1.75769064, -3.61568434e-3),
    "cogvideox-5b": _cogvideox(42, 48, 0.1, -1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox1.5-5b": _cogvideox(42, 48, None, 250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": _cogvideox(42, 48, None, 122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "hunyuan-video": _tokens(
        "hunyuan_video, 60 layers of 24 heads", 0.1, 733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896
    ),
    "hunyuan-video-1.5-t2v-480p": _tokens(
        _HUNYUAN15, 0.15, -2.97190924e4, 2.22834983e4, -4.3741836e3, 3.39340251e2, -1.01365855e1, 1.29101768e-1
    ),
    "hunyuan-video-1.5-t2v-720p": _tokens(
        _HUNYUAN15, 0.15, -3.08907507e4, 1.67786188e4, -3.19178643e3, 2.60740519e2, -8.19205881, 1.07913775e-1
    ),
    "hunyuan-video-1.5-i2v-480p": _tokens(
        _HUNYUAN15, 0.15, 8.08528429e3, -2.44607178e3, 249.489589, -9.10697865, 0.120261379
    ),
    "hunyuan-video-1.5-i2v-720p": _tokens(
        _HUNYUAN15, 0.15, 3.84300014e3, -1.39247433e3, 169.167679, -7.07679232, 0.102419011
    ),
    "ltx-video": _tokens(
        "ltx, 28 layers of 32 heads", 0.03, 21.4700694, -12.8016453, 2.31279151, 0.792487521, 9.69274326e-3
    ),
    "cosmos-1-7b": _tokens(
        "cosmos, 28 layers of 32 heads", None, 271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633
    ),
    "mochi-1": _tokens(
        "mochi, 48 layers of 24 heads", 0.06, -3512.41319, 811.675948, -60.9400215, 2.42429681, 3.05291719e-3
    ),
}
