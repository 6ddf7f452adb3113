"""What hadolint says of our Dockerfiles: nothing. `make test-deploy`; needs no container engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.engine import STAND_INS
from tests.deploy.tools import ROOT, hadolint, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]


@pytest.mark.parametrize("file", [ROOT / "Dockerfile", *sorted(STAND_INS.glob("*.Dockerfile"))], ids=lambda f: f.name)
def test_dockerfile_has_nothing_to_complain_of(file: Path) -> None:
    run(hadolint(), file)
