"""Stages know themselves: nobody else asks for their type. Held against the syntax tree of every file of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_accel.methods import RESTS, SELECTS
from diffusers_accel.methods.orders import ORDERS

ROOT = Path(__file__).parents[1]
FOLDERS = ("diffusers_accel", "search", "evals", "kernels")
STAGES: dict[str, str] = {each.__name__: each.__module__ for each in (*ORDERS, *SELECTS.values(), *RESTS.values())}
INTERFACES = ("Order", "Select", "StaticSelect", "Rest")  # to ask for these is to ask what kind of stage it is
KINDS = {*SELECTS, *RESTS}
# Files that belong to a stage beside its own one: they check or record what it reads of a plan, and nothing else.
COMPANIONS = {
    "Stored": {"diffusers_accel/methods/selects/stored_check.py", "search/recorders/stored_masks.py"},
    "Stripe": {"search/recorders/column_mass.py"},
}
ROLES = ("select", "rest", "order")  # what holds a stage


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
    inside = name.startswith(("diffusers_accel/methods/", "kernels/"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "reuse":
            yield node.lineno, "reads .reuse"
        for stage in _types_asked(node, stages):
            if name not in own_files(stage):
                yield node.lineno, f"asks for the type {stage}"
        if not inside and _compares_kind(node):
            yield node.lineno, "compares the kind of a stage"


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


def _compares_kind(node: ast.AST) -> bool:
    if isinstance(node, ast.Match):
        subject = node.subject
        return isinstance(subject, ast.Attribute) and subject.attr == "kind" and _role(subject.value)
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    kinds = [each for each in sides if isinstance(each, ast.Attribute) and each.attr == "kind"]
    texts = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
    return bool(kinds) and (any(_role(each.value) for each in kinds) or bool(texts & KINDS))


def _role(node: ast.AST) -> bool:
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")) in ROLES


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
    ],
)
def test_what_is_asking(line: str) -> None:
    assert list(asked(IMPORT + line, "search/other.py"))


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
