"""What the API takes and answers, as OpenAPI and as a page: made from the structs that read it."""

from __future__ import annotations

from html import escape
from typing import Any

import msgspec

from triptych import __version__
from triptych.router.answers import Chunk, Completion, ModelCard, ModelList
from triptych.router.openai import NEUTRAL, NEUTRAL_IN_MESSAGE, ChatRequest, ErrorAnswer

_REF = "#/components/schemas/{name}"
_SHOWN = (ChatRequest, Completion, Chunk, ErrorAnswer, ModelCard, ModelList)
_KEY: list[dict[str, list[str]]] = [{}, {"key": []}]
"""The API key, or nothing where none is set."""
_TOGETHER = (
    "Besides what the schema says: content may be left out in messages of the assistant alone; "
    "top_logprobs needs logprobs, and stream_options needs stream, to be true; max_tokens and "
    "max_completion_tokens must not disagree."
)
_STATUSES = {
    400: "The request is at fault; error.param is the path of the field.",
    401: "The API key is missing or wrong.",
    404: "The model is not the one served here.",
    429: "Too much is going on; try again after Retry-After.",
    503: "A worker was lost, and nobody could take its place.",
    504: "The request's time was over.",
}


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    found, schemas = msgspec.json.schema_components(_SHOWN, ref_template=_REF)
    chat, completion, chunk, error, model, models = found
    schemas["ChatRequest"]["description"] = _TOGETHER
    _only_neutral(schemas["ChatRequest"], NEUTRAL)
    _only_neutral(schemas["ChatMessage"], NEUTRAL_IN_MESSAGE)
    faults = {str(status): _json(text, error) for status, text in _STATUSES.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _chat(chat, completion, chunk, faults)},
            "/v1/models": _get(
                "The model served here.", {"200": _json("One model.", models), "401": faults["401"]}
            ),
            "/v1/models/{name}": _get(
                "That model, if it is the one.",
                {"200": _json("It is.", model), "401": faults["401"], "404": faults["404"]},
                "name",
            ),
            "/v1/requests/{id}/timeline": _get(
                "What every role did for a request.",
                {"200": _json("Its spans.", {"type": "object"}), "401": faults["401"]},
                "id",
            ),
            "/health": _plain("The process is there.", "application/json"),
            "/ready": _plain(
                "200 while the topology asked for is in effect, else 503 and why.",
                "application/json",
            ),
            "/metrics": _plain("For Prometheus.", "text/plain"),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _chat(
    chat: dict[str, Any], completion: dict[str, Any], chunk: dict[str, Any], faults: dict[str, Any]
) -> dict[str, Any]:
    answer = _json("The answer; with stream, its events.", completion)
    answer["content"]["text/event-stream"] = {"schema": chunk}
    timeout = {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds for the whole request, as the field timeout.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {
        "summary": "Answer a conversation with images and videos.",
        "security": _KEY,
        "parameters": [timeout],
        "requestBody": {"required": True, "content": {"application/json": {"schema": chat}}},
        "responses": {"200": answer, **faults},
    }


def _get(summary: str, responses: dict[str, Any], in_path: str | None = None) -> dict[str, Any]:
    parameters = [_in_path(in_path)] if in_path else []
    what = {"summary": summary, "security": _KEY, "responses": responses}
    return {"get": {**what, "parameters": parameters}}


def _only_neutral(schema: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> None:
    """Fields that are known but not supported take what asks for nothing."""
    for name, values in table.items():
        schema["properties"][name] = {
            "enum": [None, *values],
            "default": None,
            "description": "Not supported: taken with what asks for nothing.",
        }


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _plain(text: str, kind: str) -> dict[str, Any]:
    answer = {"description": text, "content": {kind: {}}}
    return {"get": {"summary": text, "responses": {"200": answer}}}


# ------------------------------------------------------------------ the page


def page(document: dict[str, Any]) -> str:
    """HTML of the document, without scripts and without anything from elsewhere."""
    paths = "".join(
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(what['summary'])}</p>"
        + "".join(
            f"<p>{escape(status)}: {escape(answer['description'])}</p>"
            for status, answer in what["responses"].items()
        )
        for path, methods in document["paths"].items()
        for method, what in methods.items()
    )
    schemas = "".join(
        _table(name, schema) for name, schema in document["components"]["schemas"].items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Triptych</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td,th{text-align:left;vertical-align:top;padding:.2em 1em .2em 0}</style>"
        f"<h1>Triptych {escape(document['info']['version'])}</h1>"
        "<p>As OpenAPI: <a href=openapi.json>openapi.json</a></p>"
        f"{paths}<h1>Objects</h1>{schemas}</html>"
    )


def _table(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code><td>{'' if field in required else 'optional'}"
        f"<td>{_type(about)}"
        for field, about in schema.get("properties", {}).items()
    )
    text = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    return f"<h2 id={escape(name)}>{escape(name)}</h2>{text}<table>{rows}</table>"


def _type(about: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in about:
        name = escape(about["$ref"].rpartition("/")[2])
        return f"<a href=#{name}>{name}</a>"
    if "anyOf" in about:
        return " or ".join(_type(each) for each in about["anyOf"])
    if "enum" in about:
        return " or ".join(escape(msgspec.json.encode(each).decode()) for each in about["enum"])
    kind = escape(str(about.get("type", "anything")))
    limits = [
        f"{word} {about[name]:g}"
        for name, word in (
            ("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"),
            ("minItems", "at least"), ("maxItems", "at most"), ("minLength", "of at least"),
        )
        if name in about
    ]  # fmt: skip
    of = f" of {_type(about['items'])}" if about.get("items") else ""
    return f"{kind}{of}{' ' if limits else ''}{', '.join(limits)}"
