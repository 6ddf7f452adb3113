"""The body of a vendor's request: read leniently, checked, and refused in the words of who sent it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from app.errors import BrokenForm, BrokenJson, Shown, UnsupportedMediaType, Words
from app.schemas import MAX_PUBLIC_SEED
from worker.contract.errors import InvalidField

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
CHARSETS = ("utf-8", "us-ascii", "iso-8859-1")
"""Of a form. Starlette decodes its parts by any codec that the client names, and punycode is quadratic."""

MAX_PARTS = 64
MAX_DEPTH = 64
"""How deep a body is nested at most: what can be read may be too deep to be written again."""

ALLOWED = "; allowed: "
"""What stands between an InvalidField's value and what is allowed."""

NO_PICTURES = "none: pictures from pictures are not served yet, only from text"
"""What is allowed where a vendor takes a picture."""

AskedT = TypeVar("AskedT", bound=BaseModel)


class Asked(BaseModel):
    """What a vendor's client asks for. Each field's description says what is allowed, for who sent something else.

    Numbers may be words, as some clients send them; what is null or empty is absent; what is unknown is passed over.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and value != ""}


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of the body, whatever type it is said to have. BrokenJson, InvalidField."""
    try:
        data = json.loads(await request.body())
    except RecursionError as error:
        raise BrokenJson("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise BrokenJson(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BrokenJson(f"{error.msg.removesuffix(' at')} at character {error.pos}") from error
    except ValueError as error:
        raise BrokenJson("a number in it is too long") from error
    if not isinstance(data, dict):
        raise InvalidField("body", Shown(data), "a JSON object")
    if _is_deep(data):
        raise BrokenJson("nested too deeply")
    _check_writable(data)
    return data


def _is_deep(data: Any) -> bool:
    layer = [data]
    for _ in range(MAX_DEPTH):
        holders = (value.values() if isinstance(value, dict) else value for value in layer)
        layer = [inner for holder in holders for inner in holder if isinstance(inner, dict | list)]
    return bool(layer)


def _check_writable(data: dict[str, Any]) -> None:
    """Refuses what was read but cannot be written again, as jobs and answers must: it would fail there. BrokenJson."""
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BrokenJson("a text in it has a lone surrogate") from error
    except ValueError as error:
        raise BrokenJson("a number in it is not finite") from error


@dataclass(frozen=True)
class Form:
    """The parts of a form by name; the last one of a name counts."""

    text: dict[str, str]
    files: frozenset[str]  # those that are not empty


async def read_form(request: Request) -> Form:
    """The form of the body. UnsupportedMediaType, BrokenForm."""
    declared = request.headers.get("content-type")
    if (declared or "").partition(";")[0].strip().lower() not in FORMS:
        raise UnsupportedMediaType(declared, FORMS[0])
    _check_charset(declared)
    try:
        async with request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS) as form:
            parts = form.multi_items()
            return Form(
                text={name: part for name, part in parts if isinstance(part, str)},
                files=frozenset(name for name, part in parts if isinstance(part, UploadFile) and part.size),
            )
    except HTTPException as error:
        raise BrokenForm(str(error.detail)) from error
    except (ValueError, LookupError) as error:  # a part that is not text in the charset it names
        raise BrokenForm("a part of it is not text") from error


def _check_charset(content_type: str | None) -> None:
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise BrokenForm(f"charset is {Shown(charset)!r}; allowed: {', '.join(CHARSETS)}")


def checked(kind: type[AskedT], data: Mapping[str, Any]) -> AskedT:
    """The data as what it ought to be. InvalidField: the first field that is wrong, and what it may be."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "body"
    value = Words("missing") if first["type"] == "missing" else Shown(first["input"])
    field = kind.model_fields.get(name)
    raise InvalidField(name, value, (field and field.description) or first["msg"])


def folded(seed: int | None) -> int | None:
    """A vendor's seed as one of ours: those that are too large, or negative, become others."""
    return None if seed is None else seed % (MAX_PUBLIC_SEED + 1)


def in_their_words(error: InvalidField, names: Mapping[str, str], asked: BaseModel) -> InvalidField:
    """The same refusal with the field as its sender calls it, by our name, and the value as it was sent."""
    ours = error.field or ""
    theirs = names.get(ours, ours)
    if theirs not in type(asked).model_fields or getattr(asked, theirs) is None:
        return error
    return InvalidField(theirs, Shown(getattr(asked, theirs)), str(error).partition(ALLOWED)[2])
