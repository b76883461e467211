"""Which films fit into a page: it holds them all, and one that takes minutes to open is looked at by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusers_accel.evals.report.findings import Clip, Media
from diffusers_accel.evals.report.worst import clip_name

MOST_BYTES = 48 * 2**20  # of all films of a page, which takes 4/3 of it
MOST_NAMED = 5  # clips of which films are left out
DENSE = "dense"


def fitting(clips: Sequence[Clip], most: int = MOST_BYTES) -> tuple[list[Clip], str]:
    """The clips with those of their films that fit, and a sentence about the others, or "".

    Of each clip the dense film comes first, then film and difference of one subject after the other; a clip of which no subject
    fits is left out.
    """
    kept, left_out = [], []
    for clip in clips:
        assert clip.media
        some, lost = _some(clip.media, most)
        most -= _size(some)
        if some.videos:
            kept.append(replace(clip, media=some))
        if lost:
            names = "all films" if not some.videos else ", ".join(lost)
            left_out.append(f"{names} of {clip_name(clip)}")
    if not left_out:
        return kept, ""
    named = "; ".join(left_out[:MOST_NAMED])
    more = f"; and of {len(left_out) - MOST_NAMED} more clips" if len(left_out) > MOST_NAMED else ""
    return kept, f"Left out, so that this page does not grow too large to open: {named}{more}."


def _some(media: Media, most: int) -> tuple[Media, list[str]]:
    """What of the films of a clip fits into `most` bytes, and the subjects whose films do not."""
    subjects = [name for name in media.videos if name != DENSE]
    chosen, left = [], most - len(media.videos[DENSE])
    for name in subjects:
        size = len(media.videos[name]) + len(media.differences.get(name, b""))
        if size <= left:
            chosen.append(name)
            left -= size
    lost = [name for name in subjects if name not in chosen]
    if not chosen:
        return replace(media, videos={}, differences={}), lost
    names = (DENSE, *chosen)
    videos = {name: media.videos[name] for name in names}
    return replace(media, videos=videos, differences={n: f for n, f in media.differences.items() if n in names}), lost


def _size(media: Media) -> int:
    return sum(map(len, (*media.videos.values(), *media.differences.values())))
