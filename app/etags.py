"""Entity tags: whether a client holds a file already."""

from __future__ import annotations


def holds(if_none_match: str | None, tag: str) -> bool:
    """Whether the client has it: If-None-Match compares weakly (RFC 9110, 13.1.2)."""
    held = [candidate.strip().removeprefix("W/") for candidate in (if_none_match or "").split(",")]
    return tag in held or held == ["*"]
