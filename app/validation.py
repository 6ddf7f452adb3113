"""What pydantic finds wrong with a request, as one readable sentence: the field, the value, what is allowed."""

from __future__ import annotations

import difflib
import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.errors import BrokenJson, Shown, error_response, refusal, shortened
from app.limits import Catalog
from app.schemas import GenerationCreate
from worker.contract.errors import QueueUnavailable

OTHER_NAMES = {
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "count": "num_images",
    "format": "output_format",
    "n": "num_images",
    "num_inference_steps": "steps",
    "num_outputs": "num_images",
    "quality": "output_quality",
    "scheduler": "sampler",
    "size": "width",
    "text": "prompt",
    "timeout": "deadline_s",
}
"""What other servers call our fields."""


async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
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
    names = [part for part in problem["loc"][1:] if isinstance(part, str)]
    return shortened(names[0]) if names else None


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
        return f"there is no field {Shown(field)!r}{_meant(field)}; allowed: {', '.join(GenerationCreate.model_fields)}"
    return f"{field} is {Shown(problem['input'])!r}; allowed: {_allowed(field, problem)}"


def _meant(field: str) -> str:
    key = field.lower().replace("-", "_")
    names = list(GenerationCreate.model_fields)
    near = [OTHER_NAMES[key]] if key in OTHER_NAMES else difflib.get_close_matches(key, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _allowed(field: str, problem: dict[str, Any]) -> str:
    if problem["loc"][0] != "body" or field not in GenerationCreate.model_fields:
        return "a whole number, at least 0" if problem["type"].startswith(("int", "greater")) else problem["msg"]
    schema = GenerationCreate.model_json_schema()["properties"][field]
    return _described(next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema))


def _described(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(json.dumps(value) for value in schema["enum"])
    least, most = schema.get("minimum"), schema.get("maximum")
    match schema["type"]:
        case "integer":
            noun = "a whole number"
        case "number":
            noun = "a finite number"
        case "boolean":
            return "true, false"
        case _:
            return f"text{_range(schema.get('minLength'), schema.get('maxLength'), ' characters')}"
    return noun + _range(least, most)


def _range(least: float | None, most: float | None, unit: str = "") -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}{unit}"
    if least is None:
        return "" if most is None else f", at most {most}{unit}"
    return ", not empty" if unit and least == 1 else f", at least {least}{unit}"
