"""What is listed by its folder (stages, recorders, rules, predictors, families, metrics): one file each, none forgotten."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from diffusers_accel import families as families_folder
from diffusers_accel import forwards as forwards_room
from diffusers_accel import methods as methods_room
from diffusers_accel.evals import metrics as metrics_folder
from diffusers_accel.evals.metrics import METRICS, ClipMetric, FrameMetric, LatentMetric, SetMetric
from diffusers_accel.evals.metrics.vbench import VBENCH
from diffusers_accel.families import FAMILIES, Family
from diffusers_accel.forwards import PREDICTORS, RULES, Predictor, Rule
from diffusers_accel.forwards import predictors as predictors_folder
from diffusers_accel.forwards import rules as rules_folder
from diffusers_accel.methods import CORRECTS, RESTS, SELECTS, Band, Correct, Draft, Method, Order, Rest, Select
from diffusers_accel.methods import corrects as corrects_folder
from diffusers_accel.methods import orders as orders_folder
from diffusers_accel.methods import rests as rests_folder
from diffusers_accel.methods import selects as selects_folder
from diffusers_accel.methods.historical import HistorySelect
from diffusers_accel.methods.orders import ORDERS, parse_order
from diffusers_accel.methods.ranked import RankedSelect
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.search import recorders as recorders_folder
from diffusers_accel.search.recorders import RECORDERS, Recorder, recorders

REGISTRIES: dict[str, tuple[Any, type, tuple[type, ...]]] = {  # folder, interface, members
    "orders": (orders_folder, Order, ORDERS),
    "selects": (selects_folder, Select, tuple(SELECTS.values())),
    "rests": (rests_folder, Rest, tuple(RESTS.values())),
    "corrects": (corrects_folder, Correct, tuple(CORRECTS.values())),
    "recorders": (recorders_folder, Recorder, tuple(RECORDERS.values())),
}
PARTS: tuple[type, ...] = (*RULES.values(), *PREDICTORS.values())
BESIDE = {"stored_check.py", "recorder.py", "__init__.py"}  # of these folders what is no member


class Listed(NamedTuple):
    """A folder whose members follow a protocol, or are objects: what its list has, and which files hold no member."""

    folder: ModuleType
    kinds: tuple[type, ...]
    members: Collection[Any]
    beside: frozenset[str] = frozenset()


LISTED = {
    "rules": Listed(rules_folder, (Rule,), RULES.values()),
    "predictors": Listed(predictors_folder, (Predictor,), PREDICTORS.values(), frozenset({"quantity"})),
    "families": Listed(
        families_folder,
        (Family,),
        FAMILIES.values(),
        frozenset({"family", "kandinsky", "preset", "projections", "reading", "refused"}),
    ),
    "metrics": Listed(
        metrics_folder,
        (FrameMetric, ClipMetric, LatentMetric, SetMetric),
        [each for each in METRICS.values() if each not in VBENCH],  # made of a table, in one file
        frozenset(
            {
                "clip_metric",
                "clip_set",
                "dists_weights",
                "ffmpeg",
                "flow",
                "frame_metric",
                "latent_metric",
                "lpips_weights",
                "metric",
                "published",
                "readiness",
                "set_metric",
                "ssim_maps",
                "vbench",
                "vgg16",
            }
        ),
    ),
}


def made(kind: type, **fields: Any) -> Any:
    """One of a kind, with 0.4 for every amount that has no default."""
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    return kind(**{**dict.fromkeys(required, 0.4), **fields})


def methods() -> list[Method]:
    """Every selection in every order, and every rest after a selection, as far as they go together."""
    selects, some = [made(kind) for kind in SELECTS.values()], [made(kind) for kind in ORDERS]
    pairs = [(select, order) for select in selects for order in some if select.refuses(order) is None]
    found = [Method(order, select) for select, order in pairs]
    return found + [
        Method(order, select, rest=rest)
        for select, order in pairs
        for rest in (made(kind) for kind in RESTS.values())
        if rest.refuses(select) is None
    ]


def every_subclass(interface: type) -> set[type]:
    below = set(interface.__subclasses__())
    return below | {each for one in below for each in every_subclass(one)}


@pytest.mark.parametrize("name", REGISTRIES)
def test_members_have_a_file_each_and_none_is_forgotten(name: str) -> None:
    folder, interface, members = REGISTRIES[name]
    place = Path(inspect.getfile(folder)).parent
    files = [Path(inspect.getfile(member)) for member in members]
    assert Counter(files).most_common(1)[0][1] == 1, "two members share a file"
    assert {file.parent for file in files} == {place}
    assert {file.name for file in files} == {file.name for file in place.glob("*.py")} - BESIDE
    ours = {each for each in every_subclass(interface) if each.__module__.startswith("diffusers_accel.")}
    assert ours - {StaticSelect, RankedSelect, HistorySelect} == set(members)
    assert all(inspect.getdoc(member) and not inspect.isabstract(member) for member in members)


def public(protocol: type) -> set[str]:
    return {name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")}


def is_member(value: Any, kinds: tuple[type, ...], module: str) -> bool:
    """A class of `module` that has what a protocol asks for, or an object of one of the kinds."""
    if kinds[0] not in (Rule, Predictor):
        return isinstance(value, kinds)
    return isinstance(value, type) and value.__module__ == module and public(kinds[0]) <= set(dir(value))


def imported(path: Path) -> set[str]:
    """The names that a file imports from elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        each.asname or each.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names
    }


@pytest.mark.parametrize("name", LISTED)
def test_every_file_of_a_folder_holds_one_member_of_its_list(name: str) -> None:
    folder, kinds, members, beside = LISTED[name]
    files = {path.stem for path in Path(inspect.getfile(folder)).parent.glob("*.py")} - {"__init__"}
    assert beside < files, "a helper that is no more"
    found = []
    for file in sorted(files - beside):
        module = importlib.import_module(f"{folder.__name__}.{file}")
        theirs = imported(Path(inspect.getfile(module)))  # such as a family of which another is made
        named = {name: value for name, value in vars(module).items() if name not in theirs}
        own = [value for value in named.values() if is_member(value, kinds, module.__name__)]
        assert len(own) == 1, f"{module.__name__}: expected one member and nothing else, found {own}"
        assert own[0] in members, f"{module.__name__}: {own[0]} is not listed in {folder.__name__}"
        found += own
    assert len(found) == len(set(map(id, found))) == len(members), "a member of the list has no file here"


def test_members_are_exported_beside_their_interfaces() -> None:
    """By the lists of their folders, so that no further line is needed."""
    for room, members in (
        (methods_room, (*ORDERS, *SELECTS.values(), *RESTS.values(), *CORRECTS.values())),
        (forwards_room, PARTS),
    ):
        for member in members:
            assert member.__name__ in room.__all__ and getattr(room, member.__name__) is member


@pytest.mark.parametrize("registry", [SELECTS, RESTS, CORRECTS], ids=["selects", "rests", "corrects"])
def test_kinds_are_the_keys(registry: dict[str, Any]) -> None:
    for key, member in registry.items():
        assert member.kind == key and "kind" in vars(member), "a kind of its own, not an inherited one"
        assert dataclasses.is_dataclass(member) and member.__dataclass_params__.frozen
        assert hash(made(member)) == hash(made(member)) and made(member) == made(member)


def test_orders_are_read_from_their_labels() -> None:
    found = [made(kind) for kind in ORDERS]
    assert len({order.label for order in found}) == len(found) and sum(order.identity for order in found) == 1
    for order in found:
        assert parse_order(order.label) == order
        assert [kind for kind in ORDERS if kind.parse(order.label) is not None] == [type(order)], (
            "read by one kind only"
        )
        assert order.representative.representative == order.representative


def test_methods_of_every_stage_survive_json() -> None:
    found = methods()
    assert {type(each.order) for each in found} == set(ORDERS)
    assert {each.select.kind for each in found} == set(SELECTS) and {each.rest.kind for each in found} == set(RESTS)
    for method in found:
        assert Method.from_json(json.loads(json.dumps(method.to_json()))) == method


def test_labels_tell_methods_apart() -> None:
    found = list(dict.fromkeys(methods()))
    labels = Counter(method.label for method in found)
    assert all(labels) and labels.most_common(1)[0][1] == 1, labels.most_common(3)
    assert all(method.select.name for method in found)
    silent = [kind for kind, rest in RESTS.items() if not made(rest).label]
    assert silent == ["drop"], "what goes without saying is one rest"


def test_recorders_are_those_that_selections_ask_for() -> None:
    asked = {made(kind).records for kind in SELECTS.values()} | {
        made(kind, calibrated=True).records
        for kind in SELECTS.values()
        if "calibrated" in {field.name for field in dataclasses.fields(kind)}
    }
    assert asked - {None} == set(RECORDERS)
    for name, recorder in RECORDERS.items():
        users = [method for method in calibrated() if method.select.records == name]
        assert users and recorders([Method(), *users]) == (recorder,)
    assert recorders([Method(), Method(select=Band(0.4)), Method(select=Draft())]) == ()


def calibrated() -> list[Method]:
    found = methods()
    return found + [
        dataclasses.replace(method, select=dataclasses.replace(method.select, calibrated=True))
        for method in found
        if hasattr(method.select, "calibrated")
    ]


def test_stages_that_look_at_nothing_are_masks() -> None:
    """Whoever asks a selection that wants nothing gets its blocks without q and k."""
    for kind in SELECTS.values():
        assert issubclass(kind, StaticSelect) == (not kind.wants)
        assert not (kind.reads_all and kind.reads_nothing)
