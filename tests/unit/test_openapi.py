"""The published schema takes and refuses what the router does."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from tests.unit.test_openai import BAD, IMAGE, TEXT, VIDEO, body, parts
from triptych.errors import BadRequest, Overloaded
from triptych.request import TokenEvent
from triptych.router.answers import Answer, Delta, ModelCard, ModelList, Usage
from triptych.router.openai import ChatRequest, error_body, parse
from triptych.router.openapi import document, page

DOCUMENT = document()
TYPES: dict[str, Any] = {
    "string": str, "array": list, "object": dict, "boolean": bool, "null": type(None),
}  # fmt: skip
KNOWN = {
    "$ref", "anyOf", "enum", "type", "properties", "required", "additionalProperties", "items",
    "minItems", "maxItems", "minLength", "minimum", "maximum", "exclusiveMinimum", "default",
    "title", "description", "discriminator",
}  # fmt: skip
TOGETHER = {"stream_options", "top_logprobs", "messages[0].content", "max_tokens"}
"""What a rule about several fields is about: the document says those in words."""


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """As JSON Schema has it, for the keywords that the document uses."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return fits(value, DOCUMENT["components"]["schemas"][schema["$ref"].split("/")[-1]])
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and isinstance(value, bool) == isinstance(each, bool)
                   for each in schema["enum"])  # fmt: skip
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return is_number(value, kind) and in_range(value, schema)
    if kind is not None and type(value) is not TYPES[kind]:
        return False
    if kind == "string":
        return len(value) >= schema.get("minLength", 0)
    if kind == "array":
        at_most = schema.get("maxItems", len(value))
        return schema.get("minItems", 0) <= len(value) <= at_most and all(
            fits(each, schema.get("items", {})) for each in value
        )
    return fits_object(value, schema) if kind == "object" else True


def is_number(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return kind == "number" or float(value).is_integer()


def in_range(value: float, schema: dict[str, Any]) -> bool:
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
    )


def fits_object(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, each in value.items():
        if name in known:
            if not fits(each, known[name]):
                return False
        elif others is False or (isinstance(others, dict) and not fits(each, others)):
            return False
    return all(name in value for name in schema.get("required", ()))


def schema_of(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


@pytest.mark.parametrize(("more", "param", "reason"), BAD)
def test_what_the_router_refuses_the_schema_refuses(
    more: dict[str, Any], param: str, reason: str
) -> None:
    asked = body(**more)
    with pytest.raises(BadRequest):
        parse(json.dumps(asked).encode())
    assert not fits(asked, schema_of("ChatRequest")) or param in TOGETHER


GOOD: list[dict[str, Any]] = [
    {},
    {"messages": parts(TEXT, IMAGE, VIDEO, IMAGE)},
    {"messages": [{"role": "assistant"}, {"role": "developer", "content": "x", "name": "y"}]},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"temperature": 0, "top_p": 1, "top_k": -1, "seed": -1, "n": 3, "stop": ["a"], "timeout": 0.5},
    {"stop": "a", "logprobs": True, "top_logprobs": 20, "max_completion_tokens": 1},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "logit_bias": {}},
    {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "audio": None},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "metadata": {"a": "b"}, "user": None},
]


@pytest.mark.parametrize("more", GOOD)
def test_what_the_router_takes_the_schema_takes(more: dict[str, Any]) -> None:
    asked = body(**more)
    parse(json.dumps(asked).encode())
    assert fits(asked, schema_of("ChatRequest"))


@pytest.mark.parametrize("name", sorted(ChatRequest.__struct_fields__))
@pytest.mark.parametrize(
    "value", [None, True, False, 0, 1, -1, 2, 0.5, "", "auto", "x", [], ["x"], [1], {}, {"a": 1}]
)  # fmt: skip
def test_every_field_with_values_of_every_type(name: str, value: Any) -> None:
    asked = body(**{"stream": True, "logprobs": True, **{name: value}})
    try:
        parse(json.dumps(asked).encode())
        taken = True
    except BadRequest as error:
        taken = "needs" in error.message  # a rule about several fields
    assert fits(asked, schema_of("ChatRequest")) == taken


def test_answers_are_as_published() -> None:
    built = Answer("id", "m", piece=str, logprobs=1, usage_in_stream=True)
    delta = Delta("a", (TokenEvent("id", 0, 7, logprob=-1.0),), "stop")
    stream = built.opening() + built.events(delta) + built.closing(Usage(1, 2, 3))
    events = [json.loads(e[6:]) for e in stream.decode().split("\n\n") if e.startswith("data: {")]
    assert len(events) == 4
    assert all(fits(event, schema_of("Chunk")) for event in events)
    built.add(delta)
    assert fits(json.loads(built.whole(Usage(1, 2, 3))), schema_of("Completion"))
    assert fits(error_body(Overloaded("no")), schema_of("ErrorAnswer"))
    models = msgspec.json.encode(ModelList((ModelCard("m"),)))
    assert fits(json.loads(models), schema_of("ModelList"))


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in DOCUMENT["components"]["schemas"]
    for path, methods in DOCUMENT["paths"].items():
        declared = {p["name"] for m in methods.values() for p in m.get("parameters", ())
                    if p["in"] == "path"}  # fmt: skip
        assert declared == set(re.findall(r"{(\w+)}", path))


def test_the_page_shows_all_and_runs_nothing() -> None:
    html = page(DOCUMENT)
    for name in (*DOCUMENT["paths"], *DOCUMENT["components"]["schemas"], "top_logprobs"):
        assert name in html
    assert "<script" not in html and "http://" not in html and "https://" not in html
    for anchor in re.findall(r"href=#(\w+)", html):
        assert f"id={anchor}>" in html
