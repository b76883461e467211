"""The methods that users call by name, each a recipe that assigns heads without a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers_accel.files import quoted
from diffusers_accel.methods.method import AUTO, DENSE, Method
from diffusers_accel.methods.orders import AxisOrder, Patches
from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests import RESTS, Kept
from diffusers_accel.methods.selects import All, Band, ChunkOnly, Draft, TopHistory
from diffusers_accel.support.suggest import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Which method each head takes when no search has said so.

    Args:
        heads: head h of every layer takes `heads[h % len(heads)]`.
        dense_steps: share of the schedule, from its start, that stays dense, in [0, 1].
        dense_layers: number of first layers that stay dense.
    """

    heads: tuple[Method, ...]
    dense_steps: float = 0.0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        given: object = self.heads
        if not isinstance(given, tuple) or not all(isinstance(each, Method) for each in given):
            raise TypeError(
                f"heads: expected a tuple of methods, such as (Method(select=Band(0.25)),), found {quoted(given)}"
            )
        if not self.heads:
            raise ValueError("a recipe needs at least one method to assign, found none")
        _check_dense_steps(self.dense_steps)
        if not (isinstance(self.dense_layers, int) and self.dense_layers >= 0):
            raise ValueError(
                f"dense_layers is a number of layers, expected 0 or more, found {quoted(self.dense_layers)}"
            )

    def method(self, layer: int, head: int) -> Method:
        return DENSE if layer < self.dense_layers else self.heads[head % len(self.heads)]


def _check_dense_steps(given: object) -> None:
    """A count cannot be understood: how many steps there are is known when the pipeline runs, and a plan is made before."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        raise ValueError(
            f"dense_steps is a share of the schedule here, found {quoted(given)}, a count of steps: how many there are is not "
            f"known before the pipeline runs. Give dense_steps={given} / num_inference_steps, or 1.0 for all"
        )
    if isinstance(given, bool) or not (isinstance(given, (int, float)) and 0 <= given <= 1):
        raise ValueError(f"dense_steps is a share of the schedule, expected in [0, 1], found {quoted(given)}")


def dense(precision: str = "input") -> Recipe:
    """Every head dense: the very frames of the unpatched pipeline, for timing and for tests.

    Args:
        precision: "input" leaves the attention to the model's own backend; "int8" and "int8_fp8" quantize all of it.
    """
    return Recipe(heads=(Method(select=All(), precision=precision),))


def pattern(
    density: float = 0.5,
    dense_steps: float = 0.2,
    dense_layers: int = 0,
    precision: str = "input",
    rest: str = "drop",
) -> Recipe:
    """Sparse-vDiT's patterns (arXiv 2506.03065) without its search.

    The paper decides each head's mode by profiling; without a plan nothing is known about a head, so even heads take the band
    (nearby frames) and odd heads the band in "hwf" order (nearby positions through all frames), at equal density. A search
    does better: it finds which heads want which, which can be skipped and which must stay dense.

    Args:
        density: share of the video's key blocks read, in (0, 1].
        dense_steps: share of the schedule that stays dense at its start, where the layout of the video is decided.
        dense_layers: number of first layers that stay dense.
        precision: of the products, "input", "int8" or "int8_fp8".
        rest: what happens to the blocks that are not read: "drop" or "pooled" (each takes part as its mean).
    """
    heads = tuple(Method(AxisOrder(axes), Band(density), precision, _rest(rest)) for axes in ("fhw", "hwf"))
    return Recipe(heads=heads, dense_steps=dense_steps, dense_layers=dense_layers)


def draft(
    density: float | None = None,
    top_p: float | None = None,
    per: str = "head",
    patch: tuple[int, int] = (8, 16),
    min_blocks: int = 1,
    diagonal: bool = True,
    first_frame: bool = True,
    reselect_every: int = 1,
    dense_steps: float = 0.25,
    dense_layers: int = 1,
    precision: str = "input",
    rest: str = "drop",
) -> Recipe:
    """DraftAttention (arXiv 2505.14708): a low-resolution attention map, computed anew at each call, guides the full one.

    The paper's own form is `min_blocks=0, diagonal=False, first_frame=False`, with dense_layers=2 for HunyuanVideo. Its code
    keeps 30 % of the steps dense at 50 steps, its text 25 %; 25 % is our default.

    Args:
        density: share of the video's block pairs read, in (0, 1]; 0.25 where neither it nor a top_p is given.
        top_p: read in each row the fewest blocks that reach this share of the map, in (0, 1].
        per: over what the best pairs are counted: "head": its whole map, so that a row that scores high gets more; "row": equally
            many in each row.
        patch: token rows and columns that a pooled pixel covers; exchanged in portrait frames. 128 tokens are one block.
        min_blocks: blocks that each row reads at least.
        diagonal: always read a block's own keys.
        first_frame: always read the first frame.
        reselect_every: steps for which a selection is kept.
        dense_steps: share of the schedule that stays dense at its start.
        dense_layers: number of first layers that stay dense.
        precision: of the products, "input", "int8" or "int8_fp8".
        rest: what happens to the blocks that are not read: "drop" or "pooled" (each takes part as its mean).
    """
    if density is None and top_p is None:
        density = 0.25
    select = Draft(density, top_p, per, min_blocks, diagonal, first_frame, reselect_every)
    method = Method(Patches(*patch), select, precision, _rest(rest))
    return Recipe(heads=(method,), dense_steps=dense_steps, dense_layers=dense_layers)


def cached(
    density: float = 0.25,
    refresh_every: int = 3,
    dense_steps: float = 0.0,
    dense_layers: int = 0,
    precision: str = "input",
) -> Recipe:
    """FlashBlock (arXiv 2602.05305) for models without a history, as residual reuse.

    At every n-th step attention is exact; in between the best blocks (a draft in patches) are computed anew, and the rest is
    merged in as it was. Costs memory: an output and an LSE per layer and branch, see `cache_memory_fraction` of `patch`.

    Args:
        density: share of the video's block pairs that is computed between refreshes, in (0, 1].
        refresh_every: refresh at every n-th step, 2 or more.
        dense_steps: share of the schedule that stays dense at its start.
        dense_layers: number of first layers that stay dense.
        precision: of the products, "input", "int8" or "int8_fp8".
    """
    method = Method(Patches(), Draft(density), precision, Kept(refresh_every))
    return Recipe(heads=(method,), dense_steps=dense_steps, dense_layers=dense_layers)


def history(
    density: float = 0.0,
    refresh_every: int | None = None,
    dense_steps: float = 0.0,
    dense_layers: int = 0,
    precision: str = "input",
) -> Recipe:
    """FlashBlock (arXiv 2602.05305) for models that make a video chunk by chunk, with a history of clean chunks.

    The first step of a chunk is exact. At the others a chunk attends to itself, and attention over its history is merged in as
    it was. Costs memory: an output and an LSE per layer and branch, see `cache_memory_fraction` of `patch`.

    Args:
        density: share of the history's blocks that is read at every step nevertheless, those that score best in a
            low-resolution map, in [0, 1]; 0 reads none.
        refresh_every: attend to all of the history at every n-th step, 2 or more; None: at the first step of a chunk alone.
        dense_steps: share of the schedule that stays dense at its start. The step after it is exact, too.
        dense_layers: number of first layers that stay dense.
        precision: of the products, "input", "int8" or "int8_fp8".
    """
    select = TopHistory(density) if density else ChunkOnly()
    method = Method(select=select, precision=precision, rest=Kept(refresh_every))
    return Recipe(heads=(method,), dense_steps=dense_steps, dense_layers=dense_layers)


def reordered(
    density: float = 0.5,
    axes: str = "hwf",
    dense_steps: float = 0.0,
    dense_layers: int = 0,
    precision: str = AUTO,
    rest: str = "drop",
) -> Recipe:
    """PAROAttention (arXiv 2506.16054) without its calibration: reordered tokens, sparse blocks, quantized products.

    The paper finds the order and the mask of each head offline, as our search does; without a plan all heads take one order
    and select from pooled scores at each call.

    Args:
        density: share of the video's block pairs read, in (0, 1].
        axes: the order of all heads, a permutation of "fhw".
        dense_steps: share of the schedule that stays dense at its start; the paper has none.
        dense_layers: number of first layers that stay dense.
        precision: of the products; "auto" is "int8" on a GPU whose kernel has it, but "input" on Hopper, where int8 has not been
            measured to be faster, and on a CPU, where it would only be simulated.
        rest: what happens to the blocks that are not read: "drop" or "pooled" (each takes part as its mean).
    """
    method = Method(AxisOrder(axes), Draft(density), precision, _rest(rest))
    return Recipe(heads=(method,), dense_steps=dense_steps, dense_layers=dense_layers)


PLAIN_RESTS = {kind: each for kind, each in RESTS.items() if not each.remembers}  # "cached" is the method that keeps


def _rest(kind: str) -> Rest:
    if kind not in PLAIN_RESTS:
        raise ValueError(
            f"rest: expected one of {', '.join(PLAIN_RESTS)}, found {quoted(kind)}{did_you_mean(kind, PLAIN_RESTS)}"
        )
    return PLAIN_RESTS[kind]()


NAMED: dict[str, Callable[..., Recipe]] = {
    "dense": dense,
    "pattern": pattern,
    "draft": draft,
    "cached": cached,
    "history": history,
    "reordered": reordered,
}
FOR_EVERY_MODEL = tuple(name for name in NAMED if not any(head.select.needs_history for head in NAMED[name]().heads))
