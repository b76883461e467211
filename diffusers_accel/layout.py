"""How the flat token sequence of a video transformer folds back into a video, and what stands in it beside the video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

Kind = Literal["video", "text", "history", "audio", "reference", "condition", "image"]
Grid = tuple[int, int, int]  # frames, height, width
TextAt = Literal["none", "start", "end"]

KINDS = ("video", "text", "history", "audio", "reference", "condition", "image")


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring tokens of one kind.

    Args:
        kind: what the tokens are, one of `KINDS`.
        tokens: how many there are, padding included.
        grid: (frames, height, width) into which they fold, frame by frame and row by row. Of the sparse video the grid of
            the whole video, of which a segment may be a piece.
        valid: how many tokens, from the first, exist as keys; those behind them are padding that no query may read. None
            when all exist.
        exact: their keys are read by every query, and their queries read everything. False for the video that methods make
            sparse.
        queries: whether they have queries. False where only their keys and values are there, such as those of a cache.
    """

    kind: Kind
    tokens: int
    grid: Grid | None = None
    valid: int | None = None
    exact: bool = True
    queries: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.tokens < 1:
            raise ValueError(f"a segment needs at least one token, found {self}")
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ValueError(f"grid is (frames, height, width), each 1 or more, found {self}")
        if self.valid is not None and not 0 <= self.valid <= self.tokens:
            raise ValueError(f"valid counts the tokens that exist, expected in 0..{self.tokens}, found {self}")
        if not self.exact and (self.kind != "video" or self.grid is None or self.valid is not None or not self.queries):
            raise ValueError(
                "only video with a grid, with queries and without padding can be sparse: leave exact at True for all else, "
                f"found {self}"
            )

    @classmethod
    def video(cls, grid: Grid, tokens: int | None = None) -> Segment:
        """The sparse video, or a piece of so many tokens of it."""
        return cls("video", math.prod(grid) if tokens is None else tokens, grid, exact=False)


class Run(NamedTuple):
    """A segment where it stands: tokens `start <= token < stop` of the sequence."""

    start: int
    stop: int
    segment: Segment


@dataclass(frozen=True, init=False, repr=False)
class TokenLayout:
    """Geometry of one self-attention call: which segments the sequence has, in the model's order.

    Args:
        segments: one of them is the sparse video, or several are its pieces, in the order of its grid. All others are exact.
            Those with queries stand together; only the last segment of all may have padding. Made by `TokenLayout.of`.

    Most models have the video and, at one end, text. These have a short way, `TokenLayout(frames, height, width, ...)`:

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

    segments: tuple[Segment, ...]

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        text_tokens: int = 0,
        text_at: TextAt = "none",
        text_valid: int | None = None,
    ) -> None:
        sizes = (frames, height, width, text_tokens, text_at, text_valid)
        found = "TokenLayout({}, {}, {}, text_tokens={}, text_at={!r}, text_valid={})".format(*sizes)
        if min(frames, height, width) < 1:
            raise ValueError(f"a layout needs at least one frame, row and column, found {found}")
        if text_tokens < 0 or (text_at == "none") != (text_tokens == 0):
            raise ValueError(f'text_at is "none" exactly where there are no text tokens, found {found}')
        if text_valid is not None and (text_at != "end" or not 0 <= text_valid <= text_tokens):
            raise ValueError(
                f'text_valid counts the text tokens that exist, in 0..text_tokens and with text_at "end" only, found {found}'
            )
        video = Segment.video((frames, height, width))
        text = (Segment("text", text_tokens, valid=text_valid),) if text_tokens else ()
        object.__setattr__(self, "segments", (*text, video) if text_at == "start" else (video, *text))

    @classmethod
    def of(cls, *segments: Segment) -> TokenLayout:
        """The layout of these segments, in the model's order.

        Raises:
            ValueError: they have no sparse video, pieces of several, queries in several places, or padding before the end.
        """
        layout: TokenLayout = object.__new__(cls)
        object.__setattr__(layout, "segments", tuple(segments))
        layout._check()
        return layout

    @property
    def _spelled(self) -> str:
        return f"TokenLayout.of({', '.join(map(repr, self.segments))})"

    def _check(self) -> None:
        pieces = [each for each in self.segments if not each.exact]
        grids = {each.grid for each in pieces}
        if len(grids) != 1:
            raise ValueError(f"a layout has one sparse video, found {len(grids)} grids in {self._spelled}")
        if sum(each.tokens for each in pieces) != self.video_tokens:
            raise ValueError(
                f"expected the {self.video_tokens:,} tokens of a video of {self.frames} x {self.height} x {self.width}, in one "
                f"segment or in pieces, found {sum(each.tokens for each in pieces):,} in {self._spelled}"
            )
        if any(each.valid is not None for each in self.segments[:-1]):
            raise ValueError(
                f"only the last segment may have padding, which is the end of the sequence, found {self._spelled}: leave valid "
                "out and attend with tokens that exist"
            )
        asking = [run for run in self.runs if run.segment.queries]
        if any(after.start != before.stop for before, after in zip(asking, asking[1:], strict=False)):
            raise ValueError(f"segments with queries stand together, found keys alone between them in {self._spelled}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # looked up at every call
        return hash(self.segments)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenLayout.of, self.segments  # without the hash, which holds in this process only

    def __repr__(self) -> str:
        if self.short is None:
            return self._spelled
        return "TokenLayout(frames={}, height={}, width={}, text_tokens={}, text_at={!r}, text_valid={})".format(
            *self.short
        )

    @cached_property
    def short(self) -> tuple[int, int, int, int, TextAt, int | None] | None:
        """The arguments that make it the short way; None where that cannot."""
        text = self.segments[-1] if self.segments[0].kind == "video" else self.segments[0]
        sizes: tuple[int, int, int, int, TextAt, int | None] = (*self.grid, 0, "none", None)
        if text.kind == "text":
            sizes = (*self.grid, text.tokens, "end" if text is self.segments[-1] else "start", text.valid)
        try:
            return sizes if TokenLayout(*sizes).segments == self.segments else None
        except ValueError:  # such as padding of leading text
            return None

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The segments with their places."""
        return tuple(self._runs())

    def _runs(self) -> Iterator[Run]:
        start = 0
        for segment in self.segments:
            yield Run(start, start + segment.tokens, segment)
            start += segment.tokens

    @cached_property
    def video_runs(self) -> tuple[Run, ...]:
        """Where the sparse video stands: once, or its pieces."""
        return tuple(run for run in self.runs if not run.segment.exact)

    @property
    def interleaved(self) -> bool:
        """Whether the video comes in pieces, between which other tokens stand."""
        return self.video_runs[-1].stop - self.video_start != self.video_tokens

    @cached_property
    def grid(self) -> Grid:
        """Of the sparse video: frames, height, width."""
        (grid,) = {each.grid for each in self.segments if not each.exact}
        assert grid is not None
        return grid

    @property
    def frames(self) -> int:
        return self.grid[0]

    @property
    def height(self) -> int:
        return self.grid[1]

    @property
    def width(self) -> int:
        return self.grid[2]

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def text_tokens(self) -> int:
        """Text tokens, their padding included."""
        return sum(each.tokens for each in self.segments if each.kind == "text")

    @property
    def text_at(self) -> TextAt:
        """At which side of the video the text stands, or its first segment where there are several."""
        if not self.text_tokens:
            return "none"
        return "start" if self.text_start < self.video_start else "end"

    @property
    def text_valid(self) -> int | None:
        """How many tokens of the last segment exist, where it is text and has padding."""
        last = self.segments[-1]
        return last.valid if last.kind == "text" else None

    def with_text(self, valid: int | None) -> TokenLayout:
        """The same with so many of the last segment's text tokens; None: with all."""
        last = self.segments[-1]
        if last.kind != "text":
            raise ValueError(f"text with padding stands at the end of the sequence, found none there in {self}")
        return TokenLayout.of(*self.segments[:-1], replace(last, valid=valid))

    @property
    def whole(self) -> TokenLayout:
        """The same as if all tokens existed."""
        last = self.segments[-1]
        if last.valid is None:
            return self
        return TokenLayout.of(*self.segments[:-1], replace(last, valid=None))

    @cached_property
    def tokens(self) -> int:
        """Length of the sequence, text and all padding included."""
        return sum(each.tokens for each in self.segments)

    @cached_property
    def keys(self) -> int:
        """Tokens that exist as keys: the first `keys` of the sequence."""
        last = self.segments[-1]
        return self.tokens if last.valid is None else self.tokens - last.tokens + last.valid

    @cached_property
    def queries(self) -> int:
        """Tokens with queries: `queries` neighbours from `query_start` on, padding included. All of them in most models."""
        return sum(each.tokens for each in self.segments if each.queries)

    @cached_property
    def query_start(self) -> int:
        """Position in the sequence of the first query's token."""
        return next(run.start for run in self.runs if run.segment.queries)

    @cached_property
    def has_history(self) -> bool:
        """Whether it is a chunk of a video, with tokens of earlier ones."""
        return any(each.kind == "history" for each in self.segments)

    @property
    def existing_queries(self) -> int:
        """How many queries, from the first, are of tokens that exist."""
        return min(self.query_start + self.queries, self.keys) - self.query_start

    @cached_property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.video_runs[0].start

    @cached_property
    def video_queries(self) -> tuple[slice, ...]:
        """Where the video stands among the queries: once, or its pieces."""
        return tuple(slice(run.start - self.query_start, run.stop - self.query_start) for run in self.video_runs)

    @cached_property
    def text_start(self) -> int:
        """Position of the first text token (equal to `tokens` where there are none)."""
        return next((run.start for run in self.runs if run.segment.kind == "text"), self.tokens)

    def blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens that cover the sequence; the last may be ragged."""
        return math.ceil(self.tokens / block)

    def query_blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens that cover the queries; the last may be ragged."""
        return math.ceil(self.queries / block)

    def key_blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens that cover the tokens that exist as keys; the last may be ragged."""
        return math.ceil(self.keys / block)
