"""Data that a type describes: msgspec checks it, and what is wrong is told with its path, what was expected and what was found.

Parts of one family, of which each is a frozen dataclass with a `kind`, are told apart by that: `tagged` gives the type of a
family as it stands in a file, `built` the part itself.
"""

from __future__ import annotations

import dataclasses
import inspect as python
from collections.abc import Mapping
from types import GenericAlias
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from diffusers_accel.files.errors import FileError, printable, quoted

T = TypeVar("T")

MOST = 2**31 - 1  # of whole numbers in the parts of a file: what kernels count with
_WHOLE = Annotated[int, msgspec.Meta(ge=-MOST, le=MOST)]


def shaped(data: object, schema: type[T], what: str, path: str = "") -> T:
    """`data` as a type says.

    Args:
        what: how messages call the whole where `path` is empty.
        path: of the data in its file.

    Raises:
        FileError: begins with the path of the first value that is not.
    """
    try:
        return msgspec.convert(data, schema, strict=True)
    except msgspec.ValidationError as error:
        raise FileError(_fault(inspect.type_info(schema), data, path, what) or f"{path or what}: {error}") from error


def tagged(kinds: Mapping[str, type]) -> Any:
    """The type of {"kind": ..., its fields} for any of these dataclasses."""
    return Union[tuple(_written(kind, cls) for kind, cls in kinds.items())]  # noqa: UP007, of types that are made here


def built(part: Any, kinds: Mapping[str, type[T]], path: str) -> T:
    """The dataclass of a part that was read as `tagged` says.

    Raises:
        FileError: its fields do not go together.
    """
    cls = kinds[type(part).__struct_config__.tag]
    try:
        return cls(**{name: getattr(part, name) for name in part.__struct_fields__})
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


def _written(kind: str, cls: type) -> type:
    """A dataclass as it stands in a file."""
    types = get_type_hints(cls)
    fields: list[Any] = []
    for field in dataclasses.fields(cls):
        usual = () if field.default is dataclasses.MISSING else (field.default,)
        fields.append((field.name, _bounded(types[field.name]), *usual))
    says = " ".join((python.getdoc(cls) or "").split("\n\n")[0].split())
    options: dict[str, Any] = {"tag": kind, "tag_field": "kind", "forbid_unknown_fields": True, "kw_only": True}
    return msgspec.defstruct(cls.__name__, fields, namespace={"__doc__": says}, **options)


def _bounded(annotation: Any) -> Any:
    """A type of a field, whole numbers limited."""
    if annotation is int:
        return _WHOLE
    if get_origin(annotation) is tuple:
        return GenericAlias(tuple, (_bounded(get_args(annotation)[0]), ...))
    if get_origin(annotation) is dict:
        return GenericAlias(dict, (str, _bounded(get_args(annotation)[1])))
    if get_args(annotation):
        return Union[tuple(map(_bounded, get_args(annotation)))]  # noqa: UP007
    return annotation


def _fault(info: inspect.Type, data: object, path: str, what: str = "") -> str | None:
    """What is wrong with `data`; None for nothing."""
    where = path or what
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    structs = [each for each in options if isinstance(each, inspect.StructType)]
    if structs and structs[0].tag_field and not (data is None and len(options) > len(structs)):
        return _tagged_fault(structs, data, path)
    fitting = next((each for each in options if _of_kind(each, data)), None)
    if fitting is None:
        container = isinstance(
            options[0], (inspect.StructType, inspect.DictType, inspect.ListType, inspect.VarTupleType)
        )
        return (
            f"{where}: expected {' | '.join(map(_word, options))}, found {_kind(data) if container else quoted(data)}"
        )
    if isinstance(fitting, inspect.StructType):
        return _struct_fault(fitting, data, path, where)
    if isinstance(fitting, inspect.DictType):
        assert isinstance(data, Mapping)
        return _first(
            _fault(fitting.value_type, value, _below(path, printable(key)[:60])) for key, value in data.items()
        )
    if isinstance(fitting, (inspect.ListType, inspect.VarTupleType)):
        assert isinstance(data, (list, tuple))
        return _first(_fault(fitting.item_type, item, f"{path}[{index}]") for index, item in enumerate(data))
    if isinstance(fitting, (inspect.IntType, inspect.FloatType)) and isinstance(data, (int, float)):
        low, high = fitting.ge, fitting.le
        if (low is not None and data < low) or (high is not None and data > high):
            most = f"a whole number of at most {high:,}" if low == -(high or 0) else _word(fitting)
            return f"{where}: expected {most}, found {quoted(data)}"
    return None


def _tagged_fault(structs: list[inspect.StructType], data: object, path: str) -> str | None:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    found = next((each for each in structs if isinstance(kind, str) and each.tag == kind), None)
    if found is None:
        tags = sorted(str(each.tag) for each in structs)
        return f"{_below(path, 'kind')}: expected one of {tags}, found {quoted(kind)}"
    assert isinstance(data, Mapping)
    return _struct_fault(found, {key: value for key, value in data.items() if key != "kind"}, path, f"{path} {kind!r}")


def _struct_fault(info: inspect.StructType, data: Any, path: str, where: str) -> str | None:
    known = [field.encode_name for field in info.fields]
    if unknown := sorted(set(data) - set(known), key=str):
        return f"{where}: unknown key {quoted(unknown[0])}, expected only {', '.join(known)}"
    if missing := [field.encode_name for field in info.fields if field.required and field.encode_name not in data]:
        return f"{where}: {missing[0]!r} is missing, expected {', '.join(known)}"
    given = ((field, data[field.encode_name]) for field in info.fields if field.encode_name in data)
    return _first(_fault(field.type, value, _below(path, field.encode_name)) for field, value in given)


def _of_kind(info: inspect.Type, data: object) -> bool:
    match info:
        case inspect.AnyType():
            return True
        case inspect.NoneType():
            return data is None
        case inspect.BoolType():
            return isinstance(data, bool)
        case inspect.IntType():
            return isinstance(data, int) and not isinstance(data, bool)
        case inspect.FloatType():
            return isinstance(data, (int, float)) and not isinstance(data, bool)
        case inspect.StrType():
            return isinstance(data, str)
        case inspect.LiteralType():
            return isinstance(data, str) and data in info.values
        case inspect.ListType() | inspect.VarTupleType():
            return isinstance(data, (list, tuple))
    return isinstance(data, Mapping)


def _word(info: inspect.Type) -> str:
    match info:
        case inspect.NoneType():
            return "None"
        case inspect.IntType(ge=int(low), le=int(high)) if low != -high:
            return f"a whole number of {low:,} to {high:,}"
        case inspect.FloatType(ge=float(low), le=float(high)):
            return f"a number of {low:g} to {high:g}"
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, info.values))}"
        case inspect.ListType() | inspect.VarTupleType():
            return "a list"
        case inspect.StructType() | inspect.DictType():
            return "an object"
    return type(info).__name__.removesuffix("Type").lower()


def _kind(data: object) -> str:
    if isinstance(data, str):
        return f"the text {quoted(data)}"
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(data), quoted(data))


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _first(faults: Any) -> str | None:
    return next((fault for fault in faults if fault is not None), None)
