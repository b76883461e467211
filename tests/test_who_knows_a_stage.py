"""Stages know themselves: nobody else asks for their type. Held against the syntax tree of every file of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_accel.methods import CORRECTS, RESTS, SELECTS
from diffusers_accel.methods.orders import ORDERS

ROOT = Path(__file__).parents[1]
FOLDERS = ("diffusers_accel", "search", "evals", "kernels")
STAGES: dict[str, str] = {
    each.__name__: each.__module__ for each in (*ORDERS, *SELECTS.values(), *RESTS.values(), *CORRECTS.values())
}
REGISTRIES = ("SELECTS", "RESTS", "CORRECTS", "ORDERS")
INTERFACES = ("Order", "Select", "StaticSelect", "Rest")  # to ask for these is to ask what kind of stage it is
NAMES = {*SELECTS, *RESTS, *CORRECTS, *STAGES}
# Files that may ask for a stage's type beside its own one: what records it for a plan.
COMPANIONS = {"Stored": {"search/recorders/stored_masks.py"}}
ROLES = ("select", "rest", "order", "correct")  # what holds a stage
TELLING = ("kind", "name", "label", "__name__", "__qualname__")  # what tells one stage from another
READERS = (
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "split",
    "partition",
    "rpartition",
    "find",
    "index",
)


def own_files(stage: str) -> set[str]:
    if stage not in STAGES:
        return set()
    return {f"{STAGES[stage].replace('.', '/')}.py", *COMPANIONS.get(stage, ())}


def findings(root: Path) -> list[str]:
    """Where a file asks for the type of a stage that is not its own, as "path:line: why"."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            found += [f"{name}:{line}: {why}" for line, why in asked(path.read_text(), name)]
    return found


def asked(text: str, name: str) -> Iterator[tuple[int, str]]:
    """(line, why) of each place of a file `name` at which it asks what a stage is."""
    tree = ast.parse(text)
    stages = _stages_of(tree, name)
    holders = {*ROLES, *_aliases(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "reuse":
            yield node.lineno, "reads .reuse"
        for stage in _types_asked(node, stages):
            if name not in own_files(stage):
                yield node.lineno, f"asks for the type {stage}"
        if _asks_registry(node):
            yield node.lineno, "asks whether something is of any kind of stage"
        if _compares_name(node, holders):
            yield node.lineno, "compares the name of a stage"
        if _looks_for_attribute(node, holders):
            yield node.lineno, "looks for an attribute that some stages have"


def _stages_of(tree: ast.Module, name: str) -> dict[str, str]:
    """Local name -> stage, of what a file imports from the methods or defines itself."""
    known = {*STAGES, *INTERFACES}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or "methods" in (node.module or "").split(".")):
            found |= {each.asname or each.name: each.name for each in node.names if each.name in known}
        elif isinstance(node, ast.ClassDef) and node.name in known and "methods/" in name:
            found[node.name] = node.name
    return found


def _types_asked(node: ast.AST, stages: dict[str, str]) -> Iterator[str]:
    """The stages that an expression, a pattern or a decorator compares something's type with."""
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("isinstance", "issubclass", "cast", "register", "assert_type"):
            yield from (stage for each in node.args for stage in _classes(each, stages))
    elif isinstance(node, ast.Compare):
        yield from (stage for each in (node.left, *node.comparators) for stage in _classes(each, stages))
    elif isinstance(node, ast.MatchClass):
        yield from _classes(node.cls, stages)
    elif isinstance(node, ast.Dict):  # a table by type
        yield from (stage for each in node.keys if each is not None for stage in _classes(each, stages))
    elif isinstance(node, ast.FunctionDef):
        dispatched = any(isinstance(each, ast.Attribute) and each.attr == "register" for each in node.decorator_list)
        if dispatched and node.args.args and node.args.args[0].annotation is not None:
            yield from _classes(node.args.args[0].annotation, stages)


def _classes(node: ast.AST, stages: dict[str, str]) -> Iterator[str]:
    """The stages named in a class or in a tuple or union of them; something made of one, such as Drop(), names none."""
    if isinstance(node, ast.Name) and node.id in stages:
        yield stages[node.id]
    elif isinstance(node, ast.Attribute) and node.attr in STAGES:  # through a module
        yield node.attr
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        yield from (stage for each in node.elts for stage in _classes(each, stages))
    elif isinstance(node, ast.BinOp):
        yield from (stage for each in (node.left, node.right) for stage in _classes(each, stages))


def _aliases(tree: ast.Module) -> set[str]:
    """Local names that are given what holds a stage, as in `s = method.select`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if isinstance(value, ast.Attribute) and value.attr in ROLES:
            found |= {each.id for each in targets if isinstance(each, ast.Name)}
    return found


def _asks_registry(node: ast.AST) -> bool:
    """`isinstance(x, tuple(SELECTS.values()))`, `type(x) in SELECTS.values()`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
        return any(_registry(each) for each in node.args[1:])
    return isinstance(node, ast.Compare) and _types(node) and any(_registry(each) for each in _sides(node))


def _registry(node: ast.AST) -> bool:
    return any(
        getattr(each, "id", "") in REGISTRIES or getattr(each, "attr", "") in REGISTRIES for each in ast.walk(node)
    )


def _types(node: ast.Compare) -> bool:
    """Whether a side is the type of something."""
    called = [each.func for each in _sides(node) if isinstance(each, ast.Call)]
    return any(getattr(each, "id", "") == "type" for each in called) or any(
        getattr(each, "attr", "") == "__class__" for each in _sides(node)
    )


def _sides(node: ast.Compare) -> list[ast.expr]:
    return [node.left, *node.comparators]


def _compares_name(node: ast.AST, holders: set[str]) -> bool:
    """`s.kind == "draft"`, `type(s).__name__ == "Draft"`, `rest.label.startswith(...)`, `match select.kind: ...`."""
    if isinstance(node, ast.Match):
        return _name_of(node.subject, holders)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in READERS and _name_of(node.func.value, holders)
    if not isinstance(node, ast.Compare):
        return False
    texts = {each.value for side in _sides(node) for each in ast.walk(side) if isinstance(each, ast.Constant)}
    telling = any(isinstance(each, ast.Attribute) and each.attr in TELLING for each in _sides(node))
    return any(_name_of(each, holders) for each in _sides(node)) or (telling and bool(texts & NAMES))


def _name_of(node: ast.AST, holders: set[str]) -> bool:
    """Whether an expression is the name of what holds a stage, or of its type."""
    if not isinstance(node, ast.Attribute) or node.attr not in TELLING:
        return False
    value = node.value
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "type" and value.args:
        value = value.args[0]
    elif isinstance(value, ast.Attribute) and value.attr == "__class__":
        value = value.value
    return _holds(value, holders)


def _looks_for_attribute(node: ast.AST, holders: set[str]) -> bool:
    """`hasattr(method.select, "density")`, and `getattr` likewise."""
    called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Call) and called in ("hasattr", "getattr") and _holds(node.args[0], holders)


def _holds(node: ast.AST, holders: set[str]) -> bool:
    return (node.attr in ROLES) if isinstance(node, ast.Attribute) else getattr(node, "id", "") in holders


def test_nobody_asks_for_the_type_of_a_stage() -> None:
    assert all((ROOT / own).is_file() for stage in STAGES for own in own_files(stage))
    assert not (found := findings(ROOT)), "a stage says itself what others want to know of it:\n" + "\n".join(found)


IMPORT = "from diffusers_accel.methods import Band, Draft, Drop, Kept, Method, Select\n"


@pytest.mark.parametrize(
    "line",
    [
        "x = isinstance(method.select, Draft)",
        "x = isinstance(method.select, (int, Band))",
        "x = isinstance(method.select, Band | Draft)",
        "x = isinstance(method.select, Select)",
        "x = issubclass(kind, Kept)",
        "x = type(method.select) is Draft",
        "x = type(method.select) in (Band, Draft)",
        "x = method.select.__class__ == Draft",
        "x = cast(Kept, method.rest).refresh_every",
        "x = {Band: 1, Draft: 2}[type(method.select)]",
        "match method.select:\n    case Draft(): pass",
        "import diffusers_accel.methods as m\nx = isinstance(y, m.Kept)",
        "from diffusers_accel.methods.selects.draft import Draft as D\nx = isinstance(y, D)",
        "@f.register(Draft)\ndef g(x): ...",
        "@f.register\ndef g(x: Draft): ...",
        "x = method.reuse",
        "x = method.select.kind == 'draft'",
        "x = rest.kind != other",
        "x = some.kind in ('kept', 'pooled')",
        "match method.rest.kind:\n    case other: pass",
        "x = isinstance(y, tuple(SELECTS.values()))",
        "x = issubclass(y, (*methods.ORDERS, int))",
        "x = type(y) in RESTS.values()",
        "x = y.__class__ in ORDERS",
        "x = type(s).__name__ == 'Draft'",
        "x = type(method.rest).__name__ == other",
        "x = method.order.__class__.__qualname__ in other",
        "x = hasattr(method.select, 'density')",
        "x = getattr(method.select, 'density', None) or 1.0",
        "s = method.select\nx = getattr(s, 'density')",
        "x = (s := method.rest) and hasattr(s, 'refresh_every')",
        "x = s.kind == 'draft'",
        "x = rest.label.startswith('cached')",
        "x = method.order.label == '8x16'",
        "x = method.select.name in ('band', 'stripe')",
    ],
)
def test_what_is_asking(line: str) -> None:
    for name in ("search/other.py", "diffusers_accel/methods/other.py", "kernels/other.py"):
        assert list(asked(IMPORT + line, name))


@pytest.mark.parametrize(
    "line",
    [
        "x = isinstance(method, Method)",
        "x = method.rest == Drop()",
        "x = Method(select=Draft(0.3), rest=Kept())",
        "x = {'band': Band}[name]",
        "x = budget.kind == 'density'",
        "x = f'{method.rest.kind}'",
        "x = method.select.records != 'column mass'",
        "x = SELECTS[name](0.3)",
        "x = name in SELECTS",
        "x = type(pipe).__name__ == 'WanPipeline'",
        "x = getattr(method, 'precision')",
        "x = metric.name == 'psnr'",
        "x = labels.index(method.order.label)",
    ],
)
def test_what_is_not(line: str) -> None:
    assert not list(asked(IMPORT + line, "search/other.py"))


def test_a_stage_may_know_itself() -> None:
    line = "x = isinstance(y, Stored)"
    text = f"from diffusers_accel.methods.selects.stored import Stored\n{line}"
    for own in own_files("Stored"):
        assert (ROOT / own).is_file() and not list(asked(text, own))
    assert list(asked(text, "diffusers_accel/methods/selects/band.py"))
    assert not list(asked("class Draft:\n    def f(self, x): return isinstance(x, Draft)", own_files("Draft").pop()))
