"""Where the video lies in the latents that a transformer is given, whatever their layout."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from diffusers_accel.layout import Grid, TokenLayout

IN_LATENTS = ("video", "reference", "condition")  # kinds of tokens that packed latents hold; text and audio come apart


@dataclass(frozen=True)
class VideoView:
    """How latents are read as video.

    Args:
        channels: their dimension of channels.
        grid: (frames, height, width) of packed latents [B, tokens, C]; None where they have these dimensions, in this order.
        start: the first token of the video in packed latents.
    """

    channels: int
    grid: Grid | None = None
    start: int = 0

    def of(self, x: Tensor) -> Tensor:
        """[B, C, frames, height, width]: a view of latents, so that what is written into it is written into them."""
        if self.grid is None:
            return x.movedim(self.channels, 1)
        tokens = x.narrow(1, self.start, prod(self.grid))
        return tokens.unflatten(1, self.grid).movedim(-1, 1)


def video_view(x: Tensor, channels: int, layout: TokenLayout) -> VideoView:
    """Where the video lies in latents of this shape.

    Args:
        x: the latents.
        channels: their dimension of channels, as `Family.channels`.
        layout: of the call.

    Raises:
        RuntimeError: their tokens are not those of the layout.
    """
    if x.dim() == 5:
        return VideoView(channels % 5)
    held = [segment for segment in layout.segments if segment.kind in IN_LATENTS and segment.queries]
    places = [place for place, segment in enumerate(held) if not segment.exact]
    if x.dim() != 3 or len(places) != 1 or sum(segment.tokens for segment in held) != x.shape[1]:
        raise RuntimeError(
            f"expected latents with frames, height and width, or the tokens of {layout} in one row each, found "
            f"{list(x.shape)}: what looks at the video, such as seacache, cannot be used for this call"
        )
    place = places[0]
    return VideoView(2, held[place].grid, sum(segment.tokens for segment in held[:place]))
