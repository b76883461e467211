"""Ulysses context parallelism over processes on this machine: the clip of one process, whatever the heads and the forwards do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig
from torch import multiprocessing

from diffusers_accel import Plan, patch
from diffusers_accel.attach.parallel import all_agree_to_compute, deal, has_part, unfit
from diffusers_accel.families import find
from diffusers_accel.families.helios import HELIOS
from diffusers_accel.families.hunyuan_video import HUNYUAN_VIDEO
from diffusers_accel.families.minimax_h3 import MINIMAX_H3 as MINIMAX_H3_FAMILY
from diffusers_accel.families.wan import WAN
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, Band, Draft, Kept, Method, Patches
from diffusers_accel.plan import Span
from diffusers_accel.plan.times import head_times
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from tests import matrix
from tests.families import TINY
from tests.families import helios as helios_family
from tests.families.ltx import LTX
from tests.families.minimax_h3 import tiny_minimax_h3_transformer
from tests.tiny import HEADS, LAYERS, tiny_hunyuan_transformer, tiny_wan, tiny_wan_call


def mixed_plan(pipe: Any) -> Plan:
    """Heads of very unequal density, which are not dealt in the model's order."""
    models = {name: family.shape(module) for name, (module, family) in find(pipe).items()}
    methods = {
        ".": DENSE,
        "a": Method(select=Band(0.2)),
        "b": Method(Patches(), Draft(0.3)),
        "c": Method(Patches(), Draft(0.2), rest=Kept(2)),
    }
    rows = (".abc", "..ab", "cb.a")[:LAYERS]
    return Plan(
        "wan",
        models,
        methods,
        (Span(0.0, 0.4, {"transformer": ("ab.c",) * LAYERS}), Span(0.4, 1.0, {"transformer": rows})),
    )


CASES: dict[str, Callable[[Any], Any]] = {
    "dense": lambda pipe: "dense",
    "pattern": lambda pipe: "pattern",
    "draft": lambda pipe: ("draft", {"density": 0.3}),
    "cached": lambda pipe: ("cached", {"density": 0.3}),
    "pooled": lambda pipe: ("draft", {"density": 0.3, "rest": "pooled"}),
    "mixed plan": mixed_plan,
    "easycache": lambda pipe: ("easycache", {"threshold": 0.3, "warm_up": 1}),
    "step cache and heads": lambda pipe: [("easycache", {"threshold": 0.3, "warm_up": 1}), ("draft", {"density": 0.3})],
}


def clip_of(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**tiny_wan_call(output_type="latent")).frames)


BOTH: list[Any] = [("easycache", {"threshold": 0.3, "warm_up": 1}), ("cached", {"density": 0.3})]
# Others that diffusers has a plan for: text and audio in the sequence, before the video; video alone; a history.
OTHERS = ("minimax_h3", "chronoedit", "helios")


def pipe_of(key: str) -> Any:
    pipe = TINY[key].pipe()
    if key == "helios":  # amplified, stock diffusers gives another clip
        torch.manual_seed(0)
        config = {**pipe.transformer.config, "is_amplify_history": False}
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return pipe


def plan_of(transformer: Any) -> dict[str, Any]:
    """That of diffusers, without the blocks that a tiny model has not: it names 40 of Helios."""
    plan: dict[str, Any] = type(transformer)._cp_plan
    return {part: rule for part, rule in plan.items() if has_part(transformer, part)}


def clip_of_other(key: str, pipe: Any) -> torch.Tensor:
    return torch.as_tensor(TINY[key].run(pipe, TINY[key].call(num_inference_steps=3, output_type="latent")))


def of_other_families(config: ContextParallelConfig) -> dict[str, Any]:
    """The clips of others, and what is said to one that cannot."""
    found: dict[str, Any] = {}
    for key in OTHERS:
        pipe = pipe_of(key)
        pipe.transformer.enable_parallelism(config=config, cp_plan=plan_of(pipe.transformer))
        with patch(pipe, BOTH):
            found[key] = clip_of_other(key, pipe)
    ltx = LTX.pipe()
    patched = patch(ltx, "draft", density=0.3)
    ltx.transformer.enable_parallelism(config=config)
    for said, ask in {"run": lambda: ltx(**LTX.call()), "patched": lambda: patch(ltx, "draft", density=0.3)}.items():
        with pytest.raises(ValueError, match="does not run under Ulysses") as error:
            ask()
        found[said] = str(error.value)
        patched.unpatch()
    with pytest.raises(RuntimeError, match="must match the size"):  # of diffusers: the refusal may go when this does
        ltx(**LTX.call())
    return found


def worker(rank: int, processes: int, port: int, names: Sequence[str], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and there may be none
    torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        found = {}
        mesh = torch.distributed.init_device_mesh("cpu", (1, processes), mesh_dim_names=("ring", "ulysses"))
        for name in names:
            for first in ("parallel", "patch"):
                pipe = tiny_wan()
                done = patch(pipe, CASES[name](pipe)) if first == "patch" else None
                pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes, mesh=mesh))
                done = done or patch(pipe, CASES[name](pipe))
                found[f"{name}, {first} first"] = clip_of(pipe)
                done.unpatch()
            found[f"{name}, unpatched"] = clip_of(pipe)
        sides = [all_agree_to_compute(rank == one, pipe.transformer, torch.device("cpu")) for one in (0, processes)]
        if processes == 2:
            found |= of_other_families(ContextParallelConfig(ulysses_degree=processes, mesh=mesh))
        found["one process wants to compute, none does"] = torch.tensor(sides)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_in(processes: int, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """What each process got, by case."""
    multiprocessing.spawn(worker, (processes, free_port(), names, str(folder)), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize(("processes", "names"), [(2, tuple(CASES)), (4, ("mixed plan",))])
def test_the_clip_is_that_of_one_process(
    processes: int, names: Sequence[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if processes == 2:
        for key in ("wan", *OTHERS):
            record_property(matrix.SHOWS, f"{key}-ulysses")
    found = run_in(processes, names, tmp_path)
    if processes == 2:
        check_other_families(found)
    stock = clip_of(tiny_wan())
    assert [clips["one process wants to compute, none does"].tolist() for clips in found] == [[True, False]] * processes
    for name in names:
        pipe = tiny_wan()
        with patch(pipe, CASES[name](pipe)):
            expected = clip_of(pipe)
        for clips in found:
            for first in ("parallel", "patch"):
                assert (clips[f"{name}, {first} first"] - expected).abs().max() <= 1e-5, (name, first)
            assert (clips[f"{name}, unpatched"] - stock).abs().max() <= 1e-5, name
        assert name == "dense" or (expected - stock).abs().max() > 1e-3


def check_other_families(found: list[dict[str, Any]]) -> None:
    for key in OTHERS:
        pipe = pipe_of(key)
        stock = clip_of_other(key, pipe)
        with patch(pipe, BOTH):
            expected = clip_of_other(key, pipe)
        assert (expected - stock).abs().max() > 1e-3, key
        for clips in found:
            assert (clips[key] - expected).abs().max() <= 1e-5, key
    for clips in found:
        why = (
            "transformer: LTXVideoTransformer3DModel does not run under Ulysses, also without a patch: diffusers masks"
        )
        assert clips["run"].startswith(why) and clips["patched"].startswith(why)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"context_parallel_config": ContextParallelConfig(ring_degree=2)}, "ring attention merges pieces"),
        ({"context_parallel_config": ContextParallelConfig(ring_degree=2, ulysses_degree=2)}, "ring attention merges"),
        ({"tensor_parallel_config": TensorParallelConfig(tp_degree=2)}, "tensor parallelism shards heads"),
    ],
    ids=["ring", "ring and Ulysses", "tensor"],
)
def test_other_parallelism_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    pipe = tiny_wan()
    pipe.transformer._parallel_config = ParallelConfig(**config)
    with pytest.raises(ValueError, match=f"transformer: {reason}"):
        patch(pipe, "dense")


def test_text_that_comes_in_pieces_is_refused() -> None:
    """A plan of the user's own for a model to which diffusers gives none."""
    model, layout = tiny_hunyuan_transformer(), TokenLayout(3, 4, 4, text_tokens=8, text_at="end")
    reason = unfit(HUNYUAN_VIDEO, model, layout)
    assert reason is not None and reason.startswith(
        "diffusers has no context-parallel plan for HunyuanVideoTransformer3DModel, and under one of your own (cp_plan) text"
    )
    assert unfit(HUNYUAN_VIDEO, model, TokenLayout(3, 4, 4)) is None, "without text nothing can be out of order"
    wan = tiny_wan().transformer
    assert unfit(WAN, wan, TokenLayout(3, 4, 4)) is None


def test_a_plan_of_ones_own_is_told_from_that_of_diffusers() -> None:
    """Where anything stands beside the video, the order of the pieces must be that which diffusers gives."""
    layout, config = TokenLayout(3, 4, 4, text_tokens=8, text_at="end"), ContextParallelConfig(ulysses_degree=2)
    stock, own = tiny_minimax_h3_transformer(), tiny_minimax_h3_transformer()
    apply_context_parallel(stock, config, stock._cp_plan)
    assert unfit(MINIMAX_H3_FAMILY, stock, layout) is None
    plan = {part: rule for part, rule in own._cp_plan.items() if part != "norm_out"}
    apply_context_parallel(own, config, plan)
    reason = unfit(MINIMAX_H3_FAMILY, own, layout)
    assert reason is not None and reason.startswith(
        "the sequence is not dealt by the context-parallel plan that diffusers"
    )
    assert unfit(MINIMAX_H3_FAMILY, own, TokenLayout(3, 4, 4)) is None


def test_parts_that_a_smaller_model_has_not_are_no_other_plan() -> None:
    """diffusers names 40 blocks of Helios."""
    helios, config = helios_family.tiny_helios().transformer, ContextParallelConfig(ulysses_degree=2)
    helios.register_to_config(is_amplify_history=False)
    plan = plan_of(helios)
    assert len(plan) < len(type(helios)._cp_plan)
    apply_context_parallel(helios, config, plan)
    assert unfit(HELIOS, helios, helios_family.HELIOS.layout) is None


def test_a_history_that_diffusers_amplifies_is_refused() -> None:
    helios = helios_family.tiny_helios().transformer
    reason = unfit(HELIOS, helios)
    assert reason is not None and "with is_amplify_history diffusers looks for" in reason
    helios.register_to_config(is_amplify_history=False)
    assert unfit(HELIOS, helios) is None


def test_heads_are_dealt_so_that_all_have_as_much_to_do() -> None:
    costs = (1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1)
    order = deal(costs, 2)
    assert sorted(order) == list(range(8))
    assert sum(costs[head] for head in order[:4]) == pytest.approx(2.2) == sum(costs[head] for head in order[4:])
    assert deal((0.3,) * HEADS, 2) == tuple(range(HEADS))
    with pytest.raises(ValueError, match="divides the 6 heads, found 4"):
        deal((1.0,) * 6, 4)


@pytest.mark.parametrize("seed", range(5))
def test_uneven_heads_are_dealt_within_a_head_of_the_mean(seed: int) -> None:
    costs = tuple(torch.rand(40, generator=torch.Generator().manual_seed(seed)).tolist())
    order = deal(costs, 4)
    sums = [sum(costs[head] for head in order[at : at + 10]) for at in range(0, 40, 10)]
    assert max(sums) / (sum(costs) / 4) < 1.03  # in the model's order it is 1.2 in the mean


def test_heads_are_dealt_by_their_times_where_the_plan_tells_them() -> None:
    """A sparse head that takes longer than a dense one counts as such, and a refresh counts as often as it comes."""
    methods = {".": DENSE, "a": Method(select=Band(0.2)), "c": Method(Patches(), Draft(0.2), rest=Kept(2))}
    told = {".": [2.0, 2.0], "a": [3.0, 3.0], "c": [1.0, 2.5]}
    pipe = tiny_wan()
    models = {name: family.shape(module) for name, (module, family) in find(pipe).items()}
    spans = (Span(0.0, 1.0, {"transformer": (".aac",) * LAYERS}),)

    def costs(provenance: dict[str, Any]) -> list[float]:
        seen: list[float] = []
        with patch(pipe, Plan("wan", models, methods, spans, provenance=provenance)) as done:
            site = done.sites[0]
            stock = site.attend

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                seen[:] = site.costs_of_heads(len(q))
                return stock(q, k, v)

            site.attend = attend  # type: ignore[method-assign, assignment]
            clip_of(pipe)
        return seen

    assert costs({"cost": {"ms": {"transformer": told}}}) == [2.0, 3.0, 3.0, 1.75]
    for wrong in ({}, {"cost": 3}, {"cost": {"ms": {"transformer": {**told, "a": ["2.0", 1.0]}}}}):
        found = costs(wrong)
        assert found[0] == 1.0 and found[1] == found[2] < 1, "densities"
    assert deal((2.0, 3.0, 3.0, 1.75), 2) == (0, 1, 2, 3) != deal(tuple(costs({})), 2)


def test_a_searched_plan_deals_heads_within_a_head_of_the_mean(tmp_path: Path) -> None:
    """By the times that its search has measured, not by densities."""
    prompt = {name: each for name, each in tiny_wan_call().items() if "embeds" in name}
    call = {name: each for name, each in tiny_wan_call().items() if name not in (*prompt, "generator")}
    candidates = (DENSE, Method(select=Band(0.3)), Method(Patches(), Draft(0.4)))
    pipe = tiny_wan()
    plan = search_plan(
        pipe,
        [prompt],
        call=call,
        budget=Budget.density(0.6),
        candidates=candidates,
        rows=32,
        spans=(),
        span_weights=(1.0,),
        scores_path=tmp_path / "s.safetensors",
        progress=False,
    )
    told = head_times(plan.provenance, "transformer")
    assert {*told} == {*plan.methods}
    for row in plan.spans[0].heads["transformer"]:
        costs = tuple(told[symbol].usual for symbol in row)
        order = deal(costs, 2)
        halves = [sum(costs[head] for head in order[at : at + HEADS // 2]) for at in (0, HEADS // 2)]
        assert abs(halves[0] - halves[1]) <= max(costs) - min(costs) + 1e-12
