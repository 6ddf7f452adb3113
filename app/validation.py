"""What pydantic finds wrong with a request, as one readable sentence: the field, the value, what is allowed."""

from __future__ import annotations

import difflib
import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.errors import BrokenJson, Shown, shortened
from app.limits import Catalog
from app.refusals import error_response, refusal
from app.schemas import MAX_PAGE, GenerationCreate, WebhookCreate
from worker.contract.errors import QueueUnavailable

OTHER_NAMES = {
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "count": "num_images",
    "aspect": "aspect_ratio",
    "expires_in": "expires_in_s",
    "format": "output_format",
    "n": "num_images",
    "num_inference_steps": "steps",
    "num_outputs": "num_images",
    "quality": "output_quality",
    "scheduler": "sampler",
    "size": "width",
    "text": "prompt",
    "timeout": "deadline_s",
    "webhook_url": "webhook",
}
"""What other servers call our fields."""


PARAMETERS = {
    "expires": "a whole number",
    "limit": f"a whole number from 1 to {MAX_PAGE}",
    "n": "a whole number, at least 0",
    "previews": "true, false",
}
"""What is allowed in paths and queries."""


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Renders what the framework's validation refuses."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"].removesuffix(" at")
        return refusal(BrokenJson(f"{reason} at character {first['loc'][-1]}"), request.scope)
    field = _field(first)
    message = _sentence(first)
    if first["type"] == "missing" and field == "model":
        message += await _known_models(request.app.state.gateway.catalog)
    others = sorted({name for name in map(_field, problems[1:]) if name and name != field})
    if others:
        message += f" (also wrong: {shortened(', '.join(others))})"
    return error_response(request.scope, 422, "invalid_field", message, field)


async def _known_models(catalog: Catalog) -> str:
    try:
        cards = await catalog.cards()
    except QueueUnavailable:
        return ""
    return f"; known models: {', '.join(sorted(cards)) or 'none yet'}"


def _field(problem: dict[str, Any]) -> str | None:
    """The name of the field, with that of the object in which it is: `webhook.url`."""
    names = [part for part in problem["loc"][1:] if isinstance(part, str)]
    return shortened(".".join(names)) if names else None


def _sentence(problem: dict[str, Any]) -> str:
    kind, field = problem["type"], _field(problem)
    if kind == "string_unicode":
        return f"{field or 'a field name'} is {Shown(problem['input'])!r}; allowed: text without lone surrogates"
    if field is None:
        found = "missing" if kind == "missing" else repr(Shown(problem["input"]))
        return f"the body is {found}; allowed: a JSON object"
    if kind == "missing":
        return f"{field} is required"
    if kind == "extra_forbidden":
        names = list(_beside(problem).model_fields) if problem["loc"][0] == "body" else problem["ctx"]["allowed"]
        what = "field" if problem["loc"][0] == "body" else "parameter"
        return f"there is no {what} {Shown(field)!r}{_meant(field, names)}; allowed: {', '.join(names) or 'none'}"
    return f"{field} is {Shown(problem['input'])!r}; allowed: {_allowed(problem)}"


def _beside(problem: dict[str, Any]) -> type[BaseModel]:
    """The object in which the problem is."""
    return WebhookCreate if "webhook" in problem["loc"][1:-1] else GenerationCreate


def _meant(field: str, names: list[str]) -> str:
    key = field.rpartition(".")[2].lower().replace("-", "_")
    other = OTHER_NAMES.get(key)
    near = [other] if other in names else difflib.get_close_matches(key, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _allowed(problem: dict[str, Any]) -> str:
    where, *path = problem["loc"]
    name = [part for part in path if isinstance(part, str)][-1]
    if where != "body":
        return PARAMETERS.get(name, str(problem["msg"]))
    schema = _beside(problem).model_json_schema()["properties"].get(name)
    return str(problem["msg"]) if schema is None else _described(schema)


def _described(schema: dict[str, Any]) -> str:
    schema = schema | next((choice for choice in schema.get("anyOf", []) if choice.get("type") != "null"), {})
    if "enum" in schema:
        return ", ".join(json.dumps(value) for value in schema["enum"])
    match schema.get("type"):
        case "integer":
            return "a whole number" + _range(schema.get("minimum"), schema.get("maximum"))
        case "number":
            if "exclusiveMinimum" in schema:
                return f"a finite number over {schema['exclusiveMinimum']:g}"
            return "a finite number" + _range(schema.get("minimum"), schema.get("maximum"))
        case "boolean":
            return "true, false"
        case "array":
            return f"a list of some of {_described(schema['items'])}"
        case "string":
            text = f"text{_range(schema.get('minLength'), schema.get('maxLength'), ' characters')}"
            return f"{text} such as {', '.join(schema['examples'])}" if "examples" in schema else text
        case _:
            return f"an object with {' and '.join(WebhookCreate.model_fields)}"


def _range(least: float | None, most: float | None, unit: str = "") -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}{unit}"
    if least is None:
        return "" if most is None else f", at most {most}{unit}"
    return ", not empty" if unit and least == 1 else f", at least {least}{unit}"
