"""Which key blocks each query block reads: what methods say and kernels obey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from diffusers_accel.kernels.kept import kept

T = TypeVar("T")


def block_lengths(tokens: int, block: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """How many tokens of each block exist: int32 `[blocks]`; the last block ends with the sequence, `valid` cuts others."""
    starts = torch.arange(0, tokens, block, dtype=torch.int32, device=device)
    lengths = (tokens - starts).clamp(max=block)
    return lengths if valid is None else torch.minimum(lengths, valid)


# As many as a gate may name: a set of heads for each layer and step of a large model.
@kept(1 << 14)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 `[len(heads)]` on a device. Made once: copying a list to a GPU waits for it."""
    return torch.tensor(heads, dtype=torch.int64, device=device)


@kept(1 << 14)
def head_flags(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """bool `[len(flags)]` on a device, made once as `head_index`."""
    return torch.tensor(flags, dtype=torch.bool, device=device)


def _lists(mask: Tensor, capacity: int) -> Tensor:
    """int32 `[..., capacity]`: the ascending places of the True entries of each row, then zeros."""
    # Unread entries are all scattered into one slot past the end, which is cut off.
    slot = torch.where(mask, mask.cumsum(-1) - 1, capacity)
    ids = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    return ids.new_zeros(*mask.shape[:-1], capacity + 1).scatter_(-1, slot, ids)[..., :capacity].contiguous()


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Per (batch row, head, query block), an ascending list of the key blocks that are computed.

    A query block is `block_q` consecutive tokens, a key block `block_k`; the last of each may be shorter. The lists are
    padded to a rectangle of capacity C. Shapes and dtypes are checked here; values only in `check`, which reads them.

    Args:
        blocks: int32 `[B|1, H, Q, C]`, ascending key-block ids; entries past the count are 0 and never read.
        counts: int32 `[B|1, H, Q]`, 0..C, how many entries each query block reads.
        queries: tokens in the query sequence.
        keys: tokens in the key sequence.
        block_q: tokens per query block.
        block_k: tokens per key block.
        valid: int32 `[K]`, how many tokens at the start of each key block exist; None means all of them.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names expected and found.
    """

    blocks: Tensor
    counts: Tensor
    queries: int
    keys: int
    block_q: int = 128
    block_k: int = 128
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "block_q", "block_k"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"BlockPattern.{name} must be a positive int, found {size!r}")
        if self.blocks.dim() != 4 or self.blocks.shape[2] != self.query_blocks:
            raise ValueError(
                f"BlockPattern.blocks must be [B, H, {self.query_blocks}, C] ({self.queries} queries in blocks of "
                f"{self.block_q}), found {list(self.blocks.shape)}"
            )
        if self.counts.shape != self.blocks.shape[:3]:
            raise ValueError(
                f"BlockPattern.counts must be {list(self.blocks.shape[:3])}, found {list(self.counts.shape)}"
            )
        if self.valid is not None and self.valid.shape != (self.key_blocks,):
            raise ValueError(
                f"BlockPattern.valid must be [{self.key_blocks}] ({self.keys} keys in blocks of {self.block_k}), "
                f"found {list(self.valid.shape)}"
            )
        for name in ("blocks", "counts", "valid"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.int32:
                raise ValueError(f"BlockPattern.{name} must be int32, found {tensor.dtype}")
            if tensor.device != self.blocks.device:
                raise ValueError(f"BlockPattern.{name} is on {tensor.device}, blocks on {self.blocks.device}")

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        queries: int,
        keys: int,
        block_q: int = 128,
        block_k: int = 128,
        valid: Tensor | None = None,
    ) -> BlockPattern:
        """The pattern that computes the True pairs of `mask`: bool `[B|1, H, Q, K]`. Synchronises the device once.

        Key blocks of which no token exists (`valid` 0) are left out, because reading them changes nothing.
        """
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != -(-keys // block_k):
            raise ValueError(
                f"a block mask must be bool [B, H, {-(-queries // block_q)}, {-(-keys // block_k)}], "
                f"found {mask.dtype} {list(mask.shape)}"
            )
        if valid is not None:
            mask = mask & (valid > 0)
        counts = mask.sum(-1, dtype=torch.int32)
        largest, total = torch.stack([counts.max(), counts.sum()]).tolist() if counts.numel() else (0, 0)
        blocks = _lists(mask, max(largest, 1))
        pattern = cls(blocks, counts, queries, keys, block_q, block_k, valid)
        pattern.__dict__["computed_blocks"] = int(total)
        return pattern

    @classmethod
    def full(
        cls,
        heads: int,
        queries: int,
        keys: int,
        block_q: int = 128,
        block_k: int = 128,
        valid: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockPattern:
        """The pattern of `heads` heads that reads every key block."""
        shape = (1, heads, -(-queries // block_q), -(-keys // block_k))
        return cls.from_mask(torch.ones(shape, dtype=torch.bool, device=device), queries, keys, block_q, block_k, valid)

    @staticmethod
    def cat(patterns: Sequence[BlockPattern]) -> BlockPattern:
        """The patterns of several groups of heads as one, joined along the heads in the order given."""
        if not patterns:
            raise ValueError("BlockPattern.cat needs at least one pattern")
        first = patterns[0]
        for other in patterns[1:]:
            for name in ("queries", "keys", "block_q", "block_k"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"patterns to join must agree in {name}, found {getattr(first, name)} and {getattr(other, name)}"
                    )
            if other.valid is not first.valid and (
                other.valid is None or first.valid is None or not torch.equal(other.valid, first.valid)
            ):
                raise ValueError("patterns to join must agree in valid (which tokens of each key block exist)")
        rows = max(p.blocks.shape[0] for p in patterns)
        capacity = max(p.blocks.shape[3] for p in patterns)
        blocks, counts = [], []
        for p in patterns:
            padded = torch.nn.functional.pad(p.blocks, (0, capacity - p.blocks.shape[3]))
            blocks.append(padded.expand(rows, -1, -1, -1))
            counts.append(p.counts.expand(rows, -1, -1))
        return replace(first, blocks=torch.cat(blocks, 1), counts=torch.cat(counts, 1))

    def take(self, heads: Sequence[int]) -> BlockPattern:
        """The pattern of some of the heads, in the order given."""
        index = head_index(tuple(heads), self.device)
        return replace(self, blocks=self.blocks.index_select(1, index), counts=self.counts.index_select(1, index))

    def complement(self) -> BlockPattern:
        """The pattern that computes exactly the pairs which this one does not. Does not synchronise the device."""
        mask = ~self.mask()
        if self.valid is not None:
            mask &= self.valid > 0
        return replace(self, blocks=_lists(mask, self.key_blocks), counts=mask.sum(-1, dtype=torch.int32))

    @property
    def query_blocks(self) -> int:
        """Q, the number of query blocks."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """K, the number of key blocks."""
        return -(-self.keys // self.block_k)

    @property
    def heads(self) -> int:
        """H, the number of heads that the pattern describes."""
        return self.blocks.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the lists lie."""
        return self.blocks.device

    @cached_property
    def computed_blocks(self) -> int:
        """Block pairs that are computed, over all batch rows and heads of the pattern."""
        return int(self.counts.sum())

    @cached_property
    def density(self) -> float:
        """Share of the block pairs that is computed, 0..1."""
        return self.computed_blocks / max(self.counts.numel() * self.key_blocks, 1)

    def key_lengths(self) -> Tensor:
        """How many tokens of each key block exist: int32 `[K]`; the last block ends with the sequence."""
        return block_lengths(self.keys, self.block_k, self.valid, self.device)

    def mask(self) -> Tensor:
        """The block pairs that are computed: bool `[B|1, H, Q, K]`."""
        read = torch.arange(self.blocks.shape[3], device=self.device) < self.counts[..., None]
        slots = torch.where(read, self.blocks, self.key_blocks).long()
        mask = torch.zeros(*self.blocks.shape[:3], self.key_blocks + 1, dtype=torch.bool, device=self.device)
        return mask.scatter_(-1, slots, True)[..., :-1]

    def token_mask(self) -> Tensor:
        """The token pairs that are computed: bool `[B|1, H, S_q, S_k]`. For tests and pictures: it is large."""
        mask = self.mask().repeat_interleave(self.block_q, 2)[:, :, : self.queries]
        mask = mask.repeat_interleave(self.block_k, 3)[..., : self.keys]
        token = torch.arange(self.keys, device=self.device)
        return mask & (token % self.block_k < self.key_lengths()[token // self.block_k])

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device; itself when it is already there."""
        if self.device == torch.device(device):
            return self
        valid = None if self.valid is None else self.valid.to(device)
        moved = replace(self, blocks=self.blocks.to(device), counts=self.counts.to(device), valid=valid)
        for name in ("computed_blocks", "density"):
            if name in self.__dict__:
                moved.__dict__[name] = self.__dict__[name]
        return moved

    def derived(self, build: Callable[[BlockPattern], T]) -> T:
        """`build(self)`, computed once and kept with the pattern: what an implementation reads off the lists."""
        kept = self.__dict__.setdefault("_derived", {})
        if build not in kept:
            kept[build] = build(self)
        return kept[build]

    def check(self) -> None:
        """Reads every value and raises ValueError on the first that no kernel may be given. Synchronises the device."""
        capacity, key_blocks = self.blocks.shape[3], self.key_blocks
        lowest, highest = (int(x) for x in torch.aminmax(self.counts)) if self.counts.numel() else (0, 0)
        if lowest < 0 or highest > capacity:
            raise ValueError(f"BlockPattern.counts must lie in 0..{capacity}, found {lowest}..{highest}")
        read = torch.arange(capacity, device=self.device) < self.counts[..., None]
        ids = self.blocks[read]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= key_blocks):
            raise ValueError(
                f"BlockPattern.blocks must name key blocks 0..{key_blocks - 1}, found {int(ids.min())}..{int(ids.max())}"
            )
        steps = self.blocks[..., 1:] - self.blocks[..., :-1]
        if bool((steps[read[..., 1:]] <= 0).any()):
            raise ValueError("BlockPattern.blocks must ascend without repetition within each query block's count")
        if bool(self.blocks[~read].any()):
            raise ValueError("BlockPattern.blocks must be 0 past each query block's count")
        if self.valid is not None and bool(((self.valid < 0) | (self.valid > self.block_k)).any()):
            raise ValueError(f"BlockPattern.valid must lie in 0..{self.block_k}, found {self.valid.tolist()}")
