"""How the flat token sequence of a video transformer folds back into a video."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TextAt = Literal["none", "start", "end"]


@dataclass(frozen=True)
class TokenLayout:
    """Geometry of one self-attention call: `frames x height x width` video tokens and, beside them, text tokens.

    Args:
        frames: latent frames, after temporal patching.
        height: token rows of a frame.
        width: token columns of a frame.
        text_tokens: text tokens in the same sequence; 0 for models whose text comes by cross-attention (Wan).
        text_at: where these stand: `"start"`, `"end"`, or `"none"` when there are none.
        text_valid: how many text tokens, from the first, exist as keys; those behind them are padding that no query may
            read. None when all exist. Only with text at the end, where the padding is the end of the sequence.

    Video tokens lie frame by frame, row by row, column by column, as every diffusers model flattens them.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_at: TextAt = "none"
    text_valid: int | None = None

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a layout needs at least one frame, row and column, found {self}")
        if self.text_tokens < 0 or (self.text_at == "none") != (self.text_tokens == 0):
            raise ValueError(f'text_at is "none" exactly where there are no text tokens, found {self}')
        if self.text_valid is not None and (self.text_at != "end" or not 0 <= self.text_valid <= self.text_tokens):
            raise ValueError(
                f'text_valid counts the text tokens that exist, in 0..text_tokens and with text_at "end" only, found {self}'
            )

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Length of the sequence, text and its padding included: the number of queries."""
        return self.video_tokens + self.text_tokens

    @property
    def keys(self) -> int:
        """Tokens that exist as keys: the first `keys` of the sequence."""
        return self.tokens if self.text_valid is None else self.video_tokens + self.text_valid

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.text_tokens if self.text_at == "start" else 0

    @property
    def text_start(self) -> int:
        """Position of the first text token (equal to `tokens` where there are none)."""
        return 0 if self.text_at == "start" else self.video_tokens

    def blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens that cover the sequence; the last may be ragged."""
        return math.ceil(self.tokens / block)

    def key_blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens that cover the tokens that exist as keys; the last may be ragged."""
        return math.ceil(self.keys / block)
