"""Nested states, such as those of optimizers, as plain JSON data and named tensors, and back.

Keys that are numbers and tuples come back as they were. Dictionaries, tuples and tensors stand in the data as objects of one
key, which says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.files import FileError, quoted


def flatten(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Plain data and the tensors that it names by their place, such as "optimizer/state/0/exp_avg".

    Raises:
        FileError: something is neither a tensor, a text, a number, a list, a tuple nor a dictionary of texts or numbers.
    """
    tensors: dict[str, Tensor] = {}
    return _flat(value, name, tensors), tensors


def unflatten(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`.

    Raises:
        FileError: the data are not what it gives.
    """
    if isinstance(data, list):
        return [unflatten(each, tensors) for each in data]
    if not isinstance(data, dict):
        return data
    kind, content = next(iter(data.items())) if len(data) == 1 else ("", None)
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(unflatten(each, tensors) for each in content)
    if kind == "items" and isinstance(content, list) and all(_is_item(each) for each in content):
        found = {key: unflatten(each, tensors) for key, each in content}
        if len(found) == len(content):
            return found
    raise FileError(f"expected a tensor of the file, a tuple or items of a dictionary, found {quoted(data)}")


def _flat(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise FileError(f"{name}: expected one tensor in this place, found two")
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[_key(key, name), _flat(each, f"{name}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        found = [_flat(each, f"{name}/{place}", tensors) for place, each in enumerate(value)]
        return {"tuple": found} if isinstance(value, tuple) else found
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FileError(f"{name}: expected tensors, texts, numbers and their collections, found {type(value).__name__}")


def _key(key: Any, name: str) -> str | int:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise FileError(f"{name}: expected texts or whole numbers as keys, found {quoted(key)}")
    return key


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)
