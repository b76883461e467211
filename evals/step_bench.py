"""What a denoising step of a real model costs, dense and patched: `python -m diffusers_accel.evals.step_bench`.

The transformers have their real widths, heads and token counts and random weights, so nothing has to be downloaded and no
picture comes out. A few layers of each kind are run and timed one by one; a whole model is extrapolated from them, its
layers times their number plus what lies around them. Every method without a plan is measured between two runs of the stock
transformer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffusers_accel.api import Patch, patch
from diffusers_accel.evals.machine import git_sha, machine, versions
from diffusers_accel.files import append_line, only_writer, prepare_file
from diffusers_accel.methods import NAMED
from diffusers_accel.report import PatchReport

STOCK = "stock"  # diffusers' own attention, unpatched
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DRIFT = 0.03  # stock runs that differ more make the row doubtful, which it says
Row = dict[str, Any]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class BenchModel:
    """A transformer of real shape.

    Args:
        build: from the number of layers of each kind, with random weights.
        inputs: of one forward call at (frames, height, width) of latents, on a device.
        stacks: attribute with the layers -> how many the real model has, in the order in which they run.
        size: (frames, height, width) of the usual call's latents.
        passes: forward calls of a step: 2 where guidance is a second call.
        patch: latent frames, rows and columns of a token.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[Size, torch.device, torch.dtype], dict[str, Any]]
    stacks: Mapping[str, int]
    size: Size
    passes: int
    patch: Size = (1, 2, 2)

    def check(self, size: Size) -> None:
        """Raises ValueError where latents of this size are not whole tokens."""
        if any(n < 1 or n % patch for n, patch in zip(size, self.patch, strict=True)):
            raise ValueError(f"latents must be multiples of {_shown(self.patch)}, found {_shown(size)}")


def _shown(size: Size) -> str:
    return "x".join(map(str, size))


def _noise(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _wan(heads: int, ffn: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers)


def _wan_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, dtype, 1, 16, *size),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 1, 512, 4096),
    }


def _hunyuan(layers: int) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=layers, num_single_layers=layers)


def _hunyuan_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, dtype, 1, 16, *size),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 1, 256, 4096),
        "encoder_attention_mask": (torch.arange(256, device=device) < 60)[None].to(dtype),
        "pooled_projections": _noise(device, dtype, 1, 768),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


def _cogvideox(layers: int) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=48,
        num_layers=layers,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
        ofs_embed_dim=None,
        sample_height=96,
        sample_width=170,
        sample_frames=81,
    )


def _cogvideox_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = size
    rotary = get_3d_rotary_pos_embed(
        64,
        crops_coords=None,
        grid_size=(height // 2, width // 2),
        temporal_size=frames // 2,
        grid_type="slice",
        max_size=(height // 2, width // 2),
        device=device,
    )
    return {
        "hidden_states": _noise(device, dtype, 2, frames, 16, height, width),
        "timestep": torch.tensor([500, 500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 2, 226, 4096),
        "image_rotary_emb": rotary,
    }


MODELS = {
    "wan2.1-1.3b 480p": BenchModel(partial(_wan, 12, 8960), _wan_inputs, {"blocks": 30}, (21, 60, 104), 2),
    "wan2.1-14b 720p": BenchModel(partial(_wan, 40, 13824), _wan_inputs, {"blocks": 40}, (21, 90, 160), 2),
    "hunyuanvideo 720p": BenchModel(
        _hunyuan, _hunyuan_inputs, {"transformer_blocks": 20, "single_transformer_blocks": 40}, (33, 90, 160), 1
    ),
    "cogvideox1.5-5b 768p": BenchModel(
        _cogvideox, _cogvideox_inputs, {"transformer_blocks": 42}, (22, 96, 170), 1, (2, 2, 2)
    ),
}


@dataclass
class Marks:
    """When each forward call and each layer of it begins and ends, read without waiting for the device."""

    device: torch.device
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    layers: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """The length of each (begin, end); waits for the device."""
        if self.device.type != "cuda":
            return [1e3 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]

    @contextmanager
    def watching(self, transformer: nn.Module, stacks: Mapping[str, int]) -> Iterator[None]:
        """Inside, the layers of these stacks are timed."""
        begun: list[Any] = []
        handles = []
        for name in stacks:
            pairs = self.layers.setdefault(name, [])
            for block in getattr(transformer, name):
                handles.append(block.register_forward_pre_hook(lambda *_: begun.append(self.now())))
                handles.append(
                    block.register_forward_hook(lambda *_, pairs=pairs: pairs.append((begun.pop(), self.now())))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def measure(
    name: str,
    model: BenchModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: Size | None = None,
    layers: int = 2,
    steps: int = 20,
    methods: Sequence[str] = tuple(NAMED),
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Time the forward calls of a schedule, as they are and with each method, and extrapolate them to the whole model.

    Args:
        size: (frames, height, width) of the latents; None is the model's own.
        layers: of each kind that are built.
        steps: of the schedule. Steps that a method leaves dense, or at which it refreshes, are part of what it costs.
        on_row: called with each row as it is done.

    Returns:
        One row for the first run of the stock transformer and one for each method; means over layers and steps, in ms.

    Raises:
        ValueError: an unknown method, or latents that are not whole tokens.
    """
    size = size or model.size
    model.check(size)
    if unknown := [method for method in methods if method not in NAMED]:
        raise ValueError(f"methods must be among {', '.join(NAMED)}, found {', '.join(unknown)}")
    transformer = _built(model, layers, device, dtype)
    inputs = model.inputs(size, device, dtype)
    place: Row = {"model": name, "latents": list(size), "dtype": str(dtype).removeprefix("torch.")}
    place |= {"layers_measured": layers, "layers": dict(model.stacks), "steps": steps, "passes": model.passes}
    run = partial(_schedule, transformer, inputs, model, device, steps)
    before = run(None)
    rows = [place | {"method": STOCK} | _whole(model, before, before, 0)]
    on_row(rows[-1])
    for method in methods:
        # Of the few layers none is kept dense; what a recipe keeps is added in the extrapolation.
        with patch(transformer, method, dense_layers=0) if method != "dense" else patch(transformer, method) as patched:
            times = run(patched)
            done = patched.report()
        after = run(None)
        rows.append(place | {"method": method} | _compared(model, method, times, before, after, done))
        on_row(rows[-1])
        before = after
    return rows


def _compared(model: BenchModel, method: str, times: Row, before: Row, after: Row, done: PatchReport) -> Row:
    """The whole model under a method, beside the stock runs before and after it."""
    kept, total = NAMED[method]().dense_layers, sum(model.stacks.values())
    stock = {key: (before[key] + after[key]) / 2 for key in before}
    row, stock_row = _whole(model, times, stock, kept), _whole(model, stock, stock, 0)
    return row | {
        "stock_ms_step": stock_row["ms_step"],
        "stock_drift": sum(after.values()) / sum(before.values()) - 1,
        "speedup": stock_row["ms_step"] / row["ms_step"],
        "density": (kept + (total - kept) * (done.density or 0.0)) / total,
        "cache_bytes": done.cache_bytes * (total - kept) // len(done.rows) * model.passes,
        "kernels": sorted({kernel for each in done.rows for kernel in each["kernels"]}),
        "notes": sorted({note for each in done.rows for note in each["notes"]} | set(done.notes)),
    }


@torch.no_grad()
def _built(model: BenchModel, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer in `dtype`, but for what diffusers keeps in fp32 when it loads a checkpoint."""
    with torch.device(device):
        transformer = model.build(layers).eval()
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return transformer


def _whole(model: BenchModel, times: Row, stock: Row, kept: int) -> Row:
    """What a pass and a step of the whole model take, its first `kept` layers as in stock."""
    ms_pass = times["around"]
    for name, number in model.stacks.items():
        as_stock = min(kept, number)
        ms_pass += as_stock * stock[name] + (number - as_stock) * times[name]
        kept -= as_stock
    layers = {name: times[name] for name in model.stacks}
    return {"ms_layer": layers, "ms_around": times["around"], "ms_pass": ms_pass, "ms_step": model.passes * ms_pass}


@torch.no_grad()
def _schedule(
    transformer: nn.Module,
    inputs: dict[str, Any],
    model: BenchModel,
    device: torch.device,
    steps: int,
    patched: Patch | None,
) -> Row:
    """Means over a whole schedule in ms: a layer of each stack, and what is `around` the layers of a call.

    Means, as dense steps and refreshes count. Of the second schedule that runs: the first compiles, allocates and warms up.
    """
    for _ in range(2):
        marks = Marks(device)
        if patched is not None:
            patched.clear()
        with marks.watching(transformer, model.stacks):
            for step in range(steps):
                if patched is not None:
                    patched.step(step, steps)
                begin = marks.now()
                transformer(**inputs, return_dict=False)
                marks.calls.append((begin, marks.now()))
    layers = {name: marks.milliseconds(pairs) for name, pairs in marks.layers.items()}
    around = sum(marks.milliseconds(marks.calls)) - sum(sum(times) for times in layers.values())
    return {"around": around / steps} | {name: statistics.fmean(times) for name, times in layers.items()}


def table(rows: Sequence[Row]) -> Table:
    """One line per row; a step is extrapolated."""
    found = Table("model", "latents", "method", "density", "ms per layer", "ms per step", "speed-up", "drift", "cache")
    for row in rows:
        layer = " / ".join(f"{ms:,.2f}" for ms in row["ms_layer"].values())
        density, more = "", ["", "", ""]
        if row["method"] != STOCK:
            doubtful = "!" if abs(row["stock_drift"]) > DRIFT else ""
            cache = f"{row['cache_bytes'] / 2**30:,.1f} GiB" if row["cache_bytes"] else ""
            density = f"{row['density']:.2f}"
            more = [f"{row['speedup']:.2f}x", f"{row['stock_drift']:+.1%}{doubtful}", cache]
        latents = "x".join(map(str, row["latents"]))
        found.add_row(row["model"], latents, row["method"], density, layer, f"{row['ms_step']:,.1f}", *more)
    return found


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(MODELS)}.")] = ",".join(MODELS),
    methods: Annotated[str, typer.Option(help="Comma-separated names of methods.")] = ",".join(NAMED),
    size: Annotated[str, typer.Option(help="Latents as FxHxW, the same for all; each model's own by default.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Layers of each kind to build and time.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the schedule.")] = 20,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    device: Annotated[str, typer.Option(help="Where to run; a GPU by default where there is one.")] = "",
    out: Annotated[Path, typer.Option(help="File of JSON lines to which rows are appended.")] = Path("steps.jsonl"),
) -> None:
    """Time a denoising step of real models with random weights, stock and patched."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted, asked = ([name.strip() for name in text.split(",") if name.strip()] for text in (models, methods))
    if unknown := [name for name in wanted if name not in MODELS]:
        raise typer.BadParameter(f"models must be among {', '.join(MODELS)}, found {', '.join(unknown)}")
    if unknown := [name for name in asked if name not in NAMED]:
        raise typer.BadParameter(f"methods must be among {', '.join(NAMED)}, found {', '.join(unknown)}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    latents = _size(size) if size else None
    for name in wanted:
        MODELS[name].check(latents or MODELS[name].size)
    prepare_file(out)
    made = {"machine": machine(), "versions": versions(), "git_sha": git_sha()}
    console, rows = Console(), []

    def keep(row: Row) -> None:
        rows.append(row)
        with only_writer(out, "another benchmark writes into it"):
            append_line(out, row | made)
        console.print(f"{row['model']}, {row['method']}: {row['ms_step']:,.1f} ms a step", highlight=False)

    for name in wanted:
        measure(
            name,
            MODELS[name],
            where,
            DTYPES[dtype],
            size=latents,
            layers=layers,
            steps=steps,
            methods=asked,
            on_row=keep,
        )
        if where.type == "cuda":
            torch.cuda.empty_cache()
    console.print(table(rows))
    console.print(
        "A step and its cache are extrapolated from the layers that were measured. Weights are random, so densities of methods "
        "that look at the content are not those of a trained model. Where a whole cache does not fit, layers stay dense.",
        highlight=False,
    )


def _size(text: str) -> Size:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"size must be FxHxW, such as 21x60x104, found {text!r}")
    frames, height, width = map(int, parts)
    return frames, height, width


if __name__ == "__main__":
    typer.run(main)
