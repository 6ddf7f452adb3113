"""The shape of each vendor's refusals, as its clients read them."""

from __future__ import annotations

import re

import httpx

HEXADECIMAL = re.compile(r"[0-9a-f]{32}", re.ASCII)


def assert_stability(answer: httpx.Response) -> None:
    said = answer.json()
    assert said.keys() == {"id", "name", "errors"}
    assert HEXADECIMAL.fullmatch(said["id"]) or said["id"] == said["name"] == "rate_limit_exceeded"
    assert said["name"]
    assert all(isinstance(error, str) and error for error in said["errors"])


def assert_openai(answer: httpx.Response) -> None:
    said = answer.json()
    assert said.keys() == {"error"}
    assert said["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(said["error"]["message"], str)
    assert answer.headers["x-should-retry"] in {"true", "false"}


def assert_deepinfra(answer: httpx.Response) -> None:
    said = answer.json()
    assert said.keys() == {"detail"}
    assert said["detail"].keys() == {"error"}
    assert isinstance(said["detail"]["error"], str)


def assert_huggingface(answer: httpx.Response) -> None:
    said = answer.json()
    assert said.keys() == {"error", "error_type"}
    assert isinstance(said["error"], str)


def assert_replicate(answer: httpx.Response) -> None:
    said = answer.json()
    assert said.keys() >= {"type", "title", "status", "detail"}
    assert isinstance(said["detail"], str)
