"""The manifests of the example values, rendered once."""

from __future__ import annotations

import pytest

from tests.deploy.chart.manifests import EXAMPLES, VALUES, Manifest, render


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render("-f", VALUES / f"{name}.yaml") for name in EXAMPLES}


@pytest.fixture(params=EXAMPLES)
def manifests(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered[request.param]


@pytest.fixture(scope="session")
def demo(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered["demo"]


@pytest.fixture(scope="session")
def fleet(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered["fleet"]


@pytest.fixture(scope="session")
def folder(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered["folder"]
