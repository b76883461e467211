"""The JSON schema of plan files, for editors: of the very types by which they are read, docs/plan.schema.json."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec

from diffusers_accel.files import Schema
from diffusers_accel.forwards.forwards import ForwardsData
from diffusers_accel.methods.method import MethodData
from diffusers_accel.plan.file import FORMAT, VERSION, CorrectData, File, Heads, ShareSpan, SigmaSpan, Transformer
from diffusers_accel.plan.span import SYMBOL

Symbol = Annotated[str, msgspec.Meta(pattern=f"^{SYMBOL.pattern}$")]


class SideFile(Schema, frozen=True):
    """The tensors of a plan: a safetensors file beside it, and its checksum."""

    file: Annotated[str, msgspec.Meta(pattern=r"^[^/\\:]+\.safetensors$", max_length=255)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def json_schema() -> dict[str, Any]:
    """Of version 2. What depends on other values, such as spans without gaps, only the loader knows."""
    (_, _), parts = msgspec.json.schema_components((_described(), SigmaSpan), ref_template="#/$defs/{name}")
    by_share = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/ShareSpan"}}
    by_sigma = {**by_share, "items": {"$ref": "#/$defs/SigmaSpan"}}
    parts["Heads"]["properties"]["spans"] = {"anyOf": [by_share, by_sigma]}
    plan = parts.pop("Plan")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **plan, "$defs": dict(sorted(parts.items()))}
    for part in (schema, *schema["$defs"].values()):
        if "description" in part:
            part["description"] = " ".join(part["description"].split())
    return schema


def schema_text() -> str:
    """As it stands in docs/plan.schema.json."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _described() -> Any:
    """`File` with the types of its parts, which the loader reads one by one."""
    methods, spans = dict[Symbol, MethodData], list[ShareSpan]
    heads = msgspec.defstruct(
        "Heads",
        [("methods", methods), ("spans", spans)],
        bases=(Heads,),
        kw_only=True,
        namespace={"__doc__": Heads.__doc__},
    )
    fields: list[Any] = [
        ("format", Literal[FORMAT]),
        ("version", Literal[VERSION]),
        ("family", Annotated[str, msgspec.Meta(min_length=1)]),
        ("models", Annotated[dict[str, Transformer], msgspec.Meta(min_length=1)]),
        ("heads", heads),
        ("forwards", ForwardsData | None, None),
        ("correct", CorrectData | None, None),
        ("tensors", SideFile | None, None),
        ("sha256", str | msgspec.UnsetType, msgspec.UNSET),
    ]
    return msgspec.defstruct("Plan", fields, bases=(File,), kw_only=True, namespace={"__doc__": File.__doc__})
