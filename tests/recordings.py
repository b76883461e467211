"""Records what tiny pipelines of every family give under every kind of method, so that a refactoring can be held against it.

On one machine (frames are not portable between CPUs):

    python -m tests.recordings save before.npz     # on the old commit
    python -m tests.recordings compare before.npz  # on the new one: lists every case that is not equal bit for bit
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_accel import patch
from diffusers_accel.methods import (
    All,
    AxisOrder,
    Band,
    Draft,
    Kept,
    Method,
    Patches,
    Recipe,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import Plan, Span
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

PIPELINES: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Any]]]] = {
    "wan": (tiny_wan, tiny_wan_call),
    "wan 2.2": (partial(tiny_wan, experts=2), tiny_wan_call),
    "wan ragged": (tiny_wan, partial(tiny_wan_call, height=48, width=80)),
    "hunyuan": (tiny_hunyuan, tiny_hunyuan_call),
    "hunyuan true CFG": (tiny_hunyuan, partial(tiny_hunyuan_call, true_cfg=True)),
    "hunyuan two prompts": (tiny_hunyuan, partial(tiny_hunyuan_call, lengths=(7, 13))),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call),
    "cogvideox 1.5": (partial(tiny_cogvideox, "1.5"), tiny_cogvideox_call),
}
NAMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense", {}),
    ("dense", {"precision": "int8"}),
    ("pattern", {}),
    ("pattern", {"density": 0.3, "dense_steps": 0.0, "dense_layers": 1}),
    ("pattern", {"precision": "int8_fp8"}),
    ("draft", {}),
    ("draft", {"density": 0.4, "dense_steps": 0.0, "dense_layers": 0}),
    ("draft", {"top_p": 0.7, "dense_steps": 0.0}),
    ("draft", {"per": "row", "min_blocks": 2, "dense_steps": 0.0}),
    ("draft", {"min_blocks": 0, "diagonal": False, "first_frame": False, "dense_layers": 0}),
    ("draft", {"reselect_every": 2, "dense_steps": 0.0, "precision": "int8"}),
    ("draft", {"patch": (4, 8), "dense_steps": 0.0}),
    ("cached", {}),
    ("cached", {"refresh_every": 2, "density": 0.4}),
    ("cached", {"precision": "int8"}),
    ("reordered", {}),
    ("reordered", {"axes": "whf", "density": 0.3, "precision": "int8"}),
)
MIXED = Recipe(
    heads=(
        Method(),
        Method(AxisOrder("hwf"), Band(0.4)),
        Method(Patches(), Draft(0.3), rest=Kept(2)),
        Method(select=Skip()),
    )
)
METHODS: dict[str, Recipe | Method] = {
    "mixed": MIXED,
    "stripe": Method(select=Stripe(0.4)),
    "stripe no first": Method(select=Stripe(0.4, first_frame=False), precision="int8"),
    "band held": Recipe(heads=(Method(select=Band(0.3), rest=Kept(2)), Method(select=All(), precision="int8"))),
    "orders": Recipe(heads=tuple(Method(AxisOrder(axes), Draft(0.4)) for axes in ("fwh", "hfw", "wfh", "whf"))),
    "held beside cached": Recipe(
        heads=(Method(Patches(), Draft(0.3, reselect_every=2)), Method(AxisOrder("hwf"), Draft(0.4), rest=Kept(3)))
    ),
    "skip": Recipe(heads=(Method(select=Skip()), Method(select=Band(0.5)))),
}


def cases() -> Iterator[tuple[str, Callable[[], dict[str, np.ndarray]]]]:
    """(name, what makes its arrays)."""
    for name, (make, call) in PIPELINES.items():
        yield f"{name} / stock", partial(_stock, make, call)
        for method, parameters in NAMED:
            given = ", ".join(f"{key}={value}" for key, value in parameters.items())
            yield f"{name} / {method}({given})", partial(_patched, make, call, method, parameters)
        for title, plan in METHODS.items():
            yield f"{name} / {title}", partial(_patched, make, call, plan, {})
    yield "wan / plan file", partial(_plan_file, "wan")
    yield "hunyuan / plan file", partial(_plan_file, "hunyuan")
    for name in ("wan", "hunyuan", "cogvideox"):
        yield f"{name} / scores", partial(_scores, name)


def _stock(make: Callable[[], Any], call: Callable[..., dict[str, Any]]) -> dict[str, np.ndarray]:
    return {"latents": make()(**{**call(), "output_type": "latent"}).frames.numpy()}


def _patched(
    make: Callable[[], Any], call: Callable[..., dict[str, Any]], plan: Any, parameters: dict[str, Any]
) -> dict[str, np.ndarray]:
    pipe = make()
    with patch(pipe, plan, **parameters) as patched:
        found = {"latents": pipe(**{**call(), "output_type": "latent"}).frames.numpy()}
        found["density"] = np.array([row["density"] for row in patched.report().rows], dtype=np.float64)
    return found


def _plan_file(name: str) -> dict[str, np.ndarray]:
    """A plan with every kind of tensor, through its file."""
    make, call = PIPELINES[name]
    pipe = make()
    generator = torch.Generator().manual_seed(5)
    shape = ModelShape(LAYERS, HEADS, HEAD_DIM)
    blocks = 6 if name == "wan" else 7
    masks = torch.rand(2, 3, blocks, blocks, generator=generator) < 0.6
    masks |= torch.eye(blocks, dtype=torch.bool)
    key = "hwf/0.6/transformer"
    plan = Plan(
        family=name if name == "wan" else "hunyuan_video",
        models={"transformer": shape},
        methods={
            ".": Method(),
            "s": Method(AxisOrder("hwf"), Stored(0.6)),
            "v": Method(select=Stripe(0.5, calibrated=True)),
            "g": Method(Patches(), Draft(0.3), rest=Kept(gated=True)),
        },
        spans=(
            Span(0.0, 0.4, {"transformer": ("svg.", "gsv.", "....")}),
            Span(0.4, 1.0, {"transformer": ("ssvg", "gg.s", "vsgs")}),
        ),
        tensors={
            f"stored_bits/{key}": packed(masks),
            f"stored_heads/{key}": torch.arange(LAYERS * HEADS, dtype=torch.int32).reshape(LAYERS, HEADS) % 2,
            "stripe_mass/transformer": torch.rand(LAYERS, HEADS, 3, 16, generator=generator),
            "refresh/transformer": (torch.rand(5, LAYERS, HEADS, generator=generator) < 0.5).to(torch.uint8),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan.save(path)
        return _patched(lambda: pipe, call, path, {})


def _scores(name: str) -> dict[str, np.ndarray]:
    """The sums of a small search: what its probe measures does not depend on time."""
    make, call = PIPELINES[name]
    arguments = {key: value for key, value in call().items() if key not in ("generator", "output_type")}
    texts = {key: arguments.pop(key) for key in list(arguments) if "prompt" in key}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scores.safetensors")
        search_plan(
            make(),
            [texts, {**texts, "prompt_embeds": texts["prompt_embeds"] * 0.5}],
            call=arguments,
            budget=Budget.density(0.6),
            rows=64,
            scores_path=path,
            progress=False,
        )
        return dict(Scores.load(path).sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("save", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)  # how sums are split between threads changes their last bits
    known = dict(np.load(options.file)) if options.what == "compare" else {}
    found: dict[str, np.ndarray] = {}
    different = 0
    for name, make in cases():
        if options.only not in name:
            continue
        for key, array in make().items():
            found[f"{name} / {key}"] = array
            if options.what == "compare":
                different += _differs(f"{name} / {key}", known.get(f"{name} / {key}"), array)
    missing = sorted(name for name in known.keys() - found.keys() if options.only in name)
    for name in missing:
        print(f"{name}: is not made any more")
    different += len(missing)
    if options.what == "save":
        np.savez_compressed(options.file, **found)
    print(f"{len(found)} arrays {'saved' if options.what == 'save' else f'compared, {different} differ'}")
    sys.exit(different > 0)


def _differs(name: str, before: np.ndarray | None, after: np.ndarray) -> bool:
    if before is not None and before.shape == after.shape and np.array_equal(before, after, equal_nan=True):
        return False
    largest = "no recording" if before is None or before.shape != after.shape else f"{np.abs(before - after).max():.3g}"
    print(f"{name}: {largest}", flush=True)
    return True


if __name__ == "__main__":
    main()
