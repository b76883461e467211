"""Imports go one way, also those for types only; and few frames lie between the op and the kernel."""

from __future__ import annotations

import ast
import importlib
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel import patch
from tests.tiny import tiny_wan, tiny_wan_call

ROOT = Path(__file__).resolve().parent.parent
# A room may import from itself and from those before it. As in the table of docs/architecture.md.
ROOMS = (
    ("files",),
    ("extras", "shape", "layout", "call"),
    ("families",),
    ("kernels",),
    ("support",),
    ("attach",),
    ("forwards",),
    ("methods",),
    ("block_external",),
    ("plan",),
    ("starter",),
    ("run",),
    ("report",),
    ("stage_names", "arguments", "subject", "preset", "api"),
    ("search",),
    ("evals",),
    ("tune",),
    ("step_timing", "doctor"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}
FRAMES = 6
# Names that several public classes may have, and why.
SHARED_NAMES = {
    "Config": "how one Triton kernel is launched, as Triton itself calls it; each is only used in the file of its kernel",
}


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("diffusers_accel", "kernels", "search", "evals"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [
                *([] if folder == "diffusers_accel" else ["diffusers_accel"]),
                *path.relative_to(ROOT).with_suffix("").parts,
            ]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in its code; the package itself, which imports lazily, left out."""
    known, found = modules(), defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                raise AssertionError(f"{name}: a relative import, which this does not follow")
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers_accel":
                full = {f"{node.module}.{each.name}" for each in node.names}
                found[name] |= {each if each in known else str(node.module) for each in full}
            elif isinstance(node, ast.Import):
                found[name] |= {each.name for each in node.names if each.name in known}
        found[name] -= {name, "diffusers_accel"}
    del found["diffusers_accel"]
    return dict(found)


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_stands_in_a_room() -> None:
    assert {room(name) for name in modules() if name != "diffusers_accel"} == set(RANK)


def test_rooms_import_from_lower_ones_only() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if RANK[room(other)] > RANK[room(name)]
    ]
    assert not upward, "\n".join(upward)


def test_what_the_wheel_leaves_out_is_asked_for_by_nothing_in_it() -> None:
    left_out = "diffusers_accel.evals.toy.training"
    wrong = {
        name: sorted(other for other in others if other.startswith(left_out))
        for name, others in imports().items()
        if not name.startswith(left_out)
    }
    assert not {name: others for name, others in wrong.items() if others}


def test_no_module_is_in_a_cycle() -> None:
    graph, done, path = imports(), set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_no_two_public_classes_share_a_name() -> None:
    found = defaultdict(list)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    shared = {name: where for name, where in found.items() if len(where) > 1}
    assert shared.keys() == SHARED_NAMES.keys(), shared


def test_there_are_few_frames_from_the_op_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = importlib.import_module("diffusers_accel.kernels.attention.cpu")
    real, stacks = cpu.attention, []

    def spy(*args: Any) -> Any:
        stacks.append([frame for frame in traceback.extract_stack()[:-1] if frame.filename.startswith(str(ROOT))])
        return real(*args)

    monkeypatch.setattr(cpu, "attention", spy)
    pipe = tiny_wan()
    with patch(pipe, "pattern", dense_steps=0.0):
        pipe(**{**tiny_wan_call(num_inference_steps=1), "output_type": "latent"})
    op = max(place for place, frame in enumerate(stacks[0]) if frame.filename.endswith("processor.py"))
    below = stacks[0][op:]
    assert len(below) <= FRAMES, [f"{Path(frame.filename).name}:{frame.name}" for frame in below]
