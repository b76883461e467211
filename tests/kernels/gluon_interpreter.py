"""Runs the source of a Gluon kernel for Hopper on a CPU, its warp groups interleaved at random and its copies late.

Triton has no interpreter for Gluon. This one executes the Python of the kernel's own functions, with PyTorch in the place
of Gluon's language. Each partition of `warp_specialize` is a thread, of which one runs at a time: at every operation that
others can see, a seeded choice says who goes on, or which copy lands. Products are computed when they are waited for. What
would be wrong on a GPU, if only at times, is a `KernelError`:

- a deadlock, where nobody can go on;
- a product of a tile that has not landed, or a copy or store into one that a product may still read;
- an accumulator that is used, or a register operand that is let go, before the wait for its product;
- an arrival or a store behind a wait for products without a barrier of one's own warps between, as each warp waits for itself;
- a TMA store of what was written without a fence and a barrier, and a product or store that is not over at the end;
- a pointer outside of its tensor, a copy that nobody waits for, more arrivals at a barrier than its phase has.

It knows nothing of layouts, registers, the boxes and swizzles of TMA, and integers of 32 bits.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime.jit import KernelInterface

PACES = (1.0, 0.02)  # some programs have slow copies or a slow partition


class KernelError(AssertionError):
    """What the kernel does would be wrong on a GPU, if only at times."""


class Interpreted:
    """A kernel under `gluon.jit`, launched as it is: `Interpreted(kernel)[grid](*arguments, num_warps=4, **constants)`."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self.kernel, self.seed = kernel, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4
            for program in range(grid[0]):
                block = Block(program, random.Random(f"{self.seed} {program}"))
                as_python(self.kernel, block, {})(*map(_argument, arguments), **constants)
                if block.copies:
                    raise KernelError("a copy that nobody waits for")

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return Rows(x)
    return Pointer(x.view(-1)) if isinstance(x, Tensor) else x


def as_python(jitted: Any, block: Block, made: dict[Any, Any]) -> Callable[..., Any]:
    """The function under `jit`, with PyTorch as its language, and so all that it calls. `made` holds what is there."""

    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, KernelInterface):
            return as_python(value, block, made)
        if isinstance(value, constexpr):
            return value.value
        return block.language.get(name, value)

    if jitted not in made:
        source = jitted.fn
        names: dict[str, Any] = {}
        made[jitted] = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
        used = {name: x for name, x in source.__globals__.items() if name in source.__code__.co_names}
        names |= {name: replaced(name, value) for name, value in used.items()}
    return made[jitted]


class Rows:
    """A TMA descriptor: a tensor of any strides, read and written in boxes. What lies outside reads as 0 and is not written."""

    def __init__(self, x: TensorDescriptor) -> None:
        self.whole = torch.as_strided(x.base, x.shape, x.strides, x.base.storage_offset())
        self.block_shape, self.dtype, self.layout = x.block_shape, x.base.dtype, x.layout
        self.block_type = types.SimpleNamespace(nbytes=torch.Size(x.block_shape).numel() * x.base.element_size())

    def box(self, start: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of a box that exists, and where in the box it lies."""
        part = self.whole[tuple(slice(at, at + size) for at, size in zip(start, self.block_shape, strict=True))]
        return part, tuple(slice(0, size) for size in part.shape)


class Pointer:
    def __init__(self, whole: Tensor, offset: Any = 0) -> None:
        self.whole, self.offset = whole, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.whole, self.offset + other)

    def __sub__(self, other: Any) -> Pointer:
        return self + -other

    def at(self, mask: Any) -> Tensor:
        places = torch.as_tensor(self.offset)[torch.as_tensor(mask)]
        if ((places < 0) | (places >= len(self.whole))).any():
            raise KernelError(f"a pointer to {places.tolist()} of {len(self.whole)} elements")
        return places


class Tile:
    """A piece of shared memory, or a view of it."""

    def __init__(self, data: Tensor, state: types.SimpleNamespace | None = None) -> None:
        self.data = data
        # readers: what has not been waited for. written: by threads, and then seen by a fence and a barrier.
        self.state = state or types.SimpleNamespace(readers=0, landing=False, holds=False, written="")

    def reshape(self, shape: Sequence[int]) -> Tile:
        return Tile(self.data.view(*shape), self.state)

    def permute(self, order: Sequence[int]) -> Tile:
        return Tile(self.data.permute(*order), self.state)

    def change(self) -> None:
        if self.state.readers or self.state.landing:
            raise KernelError(
                f"written into a tile that {'is being read' if self.state.readers else 'a copy lands in'}"
            )

    def store(self, value: Tensor) -> None:
        self.change()
        warps = _running()
        if warps.ahead:
            raise KernelError("a store into shared memory that other warps may still read: no barrier after the wait")
        assert value.dtype == self.data.dtype
        self.data.copy_(value)
        self.state.holds, self.state.written = True, "unfenced"
        warps.written.append(self)


class Memory:
    """Tiles in shared memory, or barriers where it is of int64."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> None:
        self.dtype, self.shape = dtype, list(shape)
        tiles = [
            Tile(torch.full(self.shape[1:], torch.nan, dtype=dtype)) for _ in range(shape[0]) if dtype != torch.int64
        ]
        self.places: list[Any] = tiles or [Barrier() for _ in range(shape[0])]

    def index(self, i: int) -> Any:
        assert i >= 0
        return self.places[i]


class Barrier:
    """An mbarrier. A phase is over when all have arrived and what they announced has landed."""

    def __init__(self) -> None:
        self.count = self.arrived = self.phase = self.bytes = 0

    def change(self, arrivals: int, bytes: int) -> None:
        self.arrived += arrivals
        self.bytes += bytes
        if self.arrived > self.count:
            raise KernelError(f"{self.arrived} arrivals at a barrier of {self.count}")
        if self.arrived == self.count and self.bytes == 0:
            self.arrived, self.phase = 0, self.phase + 1

    def over(self, parity: int) -> bool:
        """Whether the phase of that parity is; the one before the first counts as such."""
        assert parity in (0, 1)
        return self.phase % 2 != parity


class Product:
    """An asynchronous product, which stands for its accumulator until it is waited for."""

    def __init__(self, a: Tensor | Tile, b: Tile, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        for tile in self.tiles():
            if tile.state.landing or not tile.state.holds:
                raise KernelError("a product of a tile that has not landed")
            tile.state.readers += 1

    def tiles(self) -> list[Tile]:
        return [x for x in (self.a, self.b) if isinstance(x, Tile)]

    def computed(self, kept: Sequence[Any]) -> Tensor:
        if isinstance(self.a, Tensor) and not any(x is self.a for x in kept):
            raise KernelError("the registers of a product's operand are let go before the wait for it")
        a, b = (x.data if isinstance(x, Tile) else x for x in (self.a, self.b))
        assert a.dtype == b.dtype
        for tile in self.tiles():
            tile.state.readers -= 1
        product = a.float() @ b.float()
        assert product.shape == self.acc.shape
        return self.acc + product if self.use_acc else product


class Warps(threading.Thread):
    """A partition, in a thread that runs while the scheduler waits for it."""

    def __init__(self, block: Block, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.block, self.function, self.arguments = block, function, arguments
        self.pace = block.chance.choice(PACES)
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waiting = "to begin"
        self.error: BaseException | None = None
        self.over = False
        self.products: list[Product] = []
        self.results: dict[int, Tensor] = {}
        self.written: list[Tile] = []
        self.stores = 0
        self.ahead = False  # it has waited for products, and not yet for its other warps

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.block.abandoned:
                self.function(*self.arguments)
                if self.products or self.stores:
                    raise KernelError("a partition ends before its products and stores")
        except BaseException as error:
            self.error = error
        self.over = True
        self.block.stopped.release()


def _running() -> Warps:
    warps = threading.current_thread()
    assert isinstance(warps, Warps)
    return warps


class Block:
    """One program, its partitions, and the copies that are under way."""

    def __init__(self, program: int, chance: random.Random) -> None:
        self.program, self.chance = program, chance
        self.copies: list[Callable[[], None]] = []
        self.stopped = threading.Semaphore(0)
        self.abandoned = False
        self.language = {
            "gl": Language(self),
            "tl": Language(self),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=_nothing, init=_init, wait=self.wait, expect=self.expect, arrive=self.arrive
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=self.load,
                async_copy_shared_to_global=self.store,
                store_wait=self.store_wait,
            ),
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiplied,
        }

    def specialize(self, parts: Sequence[tuple[Any, Any]], warps: Sequence[int], registers: Sequence[int]) -> None:
        """Runs the partitions, one at a time, until all are over."""
        assert len(warps) == len(registers) == len(parts) - 1
        self.partitions = partitions = [Warps(self, function, arguments) for function, arguments in parts]
        pace = self.chance.choice(PACES)  # of copies
        for partition in partitions:
            partition.start()
        try:
            while alive := [x for x in partitions if not x.over]:
                able: list[Any] = [x for x in alive if x.ready()]
                if not able + self.copies:
                    raise KernelError(
                        "deadlock: " + ", ".join(f"{x.function.__name__} waits {x.waiting}" for x in alive)
                    )
                weights = [x.pace for x in able] + [pace] * len(self.copies)
                (chosen,) = self.chance.choices(able + self.copies, weights)
                if chosen in self.copies:
                    self.copies.remove(chosen)
                    chosen()
                    continue
                chosen.go.release()
                self.stopped.acquire()
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.abandoned = True
            for partition in partitions:
                partition.go.release()
            for partition in partitions:
                partition.join()

    def partition(self) -> int:
        """Which of the partitions runs."""
        return self.partitions.index(_running())

    def pause(self, waiting: str = "", ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on, until chance comes back to this partition when it is ready."""
        warps = _running()
        warps.ready, warps.waiting = ready, waiting
        self.stopped.release()
        warps.go.acquire()
        if self.abandoned:
            raise SystemExit

    def wait(self, barrier: Barrier, parity: int, pred: bool = True) -> None:
        self.pause("for a barrier", lambda: not pred or barrier.over(parity))

    def expect(self, barrier: Barrier, bytes: int) -> None:
        self.pause()
        barrier.change(1, bytes)

    def arrive(self, barrier: Barrier) -> None:
        self.pause()
        if _running().ahead:
            raise KernelError("an arrival before a barrier of one's own warps, which may still read")
        barrier.change(1, 0)

    def load(self, rows: Rows, start: Sequence[int], barrier: Barrier, tile: Tile) -> None:
        self.pause()
        tile.change()
        tile.state.landing = True
        tile.data.fill_(torch.nan)
        assert tile.data.dtype == rows.dtype and tile.data.shape == torch.Size(rows.block_shape)

        def land() -> None:
            part, inside = rows.box(start)
            tile.data.zero_()[inside] = part
            tile.state.landing, tile.state.holds = False, True
            barrier.change(0, -rows.block_type.nbytes)

        self.copies.append(land)

    def store(self, rows: Rows, start: Sequence[int], tile: Tile) -> None:
        self.pause()
        warps = _running()
        if tile.state.written != "visible":
            raise KernelError(f"a TMA store of what is {tile.state.written or 'not written'}")
        assert tile.data.dtype == rows.dtype and tile.data.shape == torch.Size(rows.block_shape)
        tile.state.readers += 1
        warps.stores += 1

        def land() -> None:
            part, inside = rows.box(start)
            part.copy_(tile.data[inside])
            tile.state.readers -= 1
            warps.stores -= 1

        self.copies.append(land)

    def store_wait(self, pending: int) -> None:
        warps = _running()
        self.pause("for stores", lambda: warps.stores <= pending)

    def fence(self) -> None:
        if isinstance(warps := threading.current_thread(), Warps):
            for tile in warps.written:
                tile.state.written = "fenced"

    def thread_barrier(self) -> None:
        self.pause()
        warps = _running()
        warps.ahead = False
        for tile in warps.written:
            tile.state.written = "visible" if tile.state.written == "fenced" else "unfenced"

    def multiply(self, a: Any, b: Tile, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
        self.pause()
        assert is_async
        if isinstance(acc, Product) or isinstance(a, Product):
            raise KernelError("a product of what has not been waited for")
        product = Product(a, b, acc, use_acc)
        _running().products.append(product)
        return product

    def multiplied(self, pending: int, deps: Sequence[Any]) -> Any:
        """Completes all but the last `pending` products, in their order, and gives `deps` as they are then."""
        self.pause()
        warps = _running()
        done = {}
        while len(warps.products) > pending:
            product = warps.products.pop(0)
            done[product] = product.computed(deps)
        warps.ahead = True
        if any(isinstance(x, Product) and x not in done for x in deps):
            raise KernelError("an accumulator whose product is not waited for")
        found = tuple(done[x] if isinstance(x, Product) else x for x in deps)
        return found if len(found) > 1 else found[0]


def _nothing(*arguments: Any, **options: Any) -> None:
    """A layout."""


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = count


def _pair(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: of_tensors(*x) if any(isinstance(y, Tensor) for y in x) else of_numbers(*x)


class Language:
    """What the kernels use of `gluon.language` and `triton.language`, on PyTorch's tensors and Python's numbers."""

    float32, int64, constexpr = torch.float32, torch.int64, constexpr
    math = types.SimpleNamespace(exp2=torch.exp2, log2=torch.log2)
    log2 = staticmethod(torch.log2)
    NVMMADistributedLayout = SliceLayout = DotOperandLayout = staticmethod(_nothing)
    allocate_shared_memory = Memory
    static_range = range
    cdiv = staticmethod(lambda a, b: -(-a // b))
    where = staticmethod(_pair(torch.where, lambda yes, a, b: a if yes else b))
    maximum = staticmethod(_pair(torch.maximum, max))
    minimum = staticmethod(_pair(torch.minimum, min))
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    cast = staticmethod(lambda x, dtype: x)
    full = staticmethod(lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype))
    arange = staticmethod(lambda start, end, layout: torch.arange(start, end))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)

    def __init__(self, block: Block) -> None:
        self.warp_specialize, self.thread_barrier = block.specialize, block.thread_barrier
        self.program_id = lambda axis: block.program

    @staticmethod
    def load(pointer: Pointer, mask: bool = True, other: int | None = None) -> int | None:
        places = pointer.at(mask)
        return int(pointer.whole[places]) if places.numel() else other

    @staticmethod
    def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        assert value.dtype == pointer.whole.dtype
        pointer.whole[pointer.at(mask)] = value[mask]
