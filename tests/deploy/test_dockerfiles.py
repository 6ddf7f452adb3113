"""What hadolint says of our Dockerfiles: nothing; and what else they must not hold. Needs no container engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.engine import STAND_INS
from tests.deploy.tools import ROOT, hadolint, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]


@pytest.mark.parametrize("file", [ROOT / "Dockerfile", *sorted(STAND_INS.glob("*.Dockerfile"))], ids=lambda f: f.name)
def test_dockerfile_has_nothing_to_complain_of(file: Path) -> None:
    run(hadolint(), file)


def test_no_folder_of_the_images_is_of_one_version_of_python() -> None:
    assert re.findall(r"\S*python3\.\d+\S*", (ROOT / "Dockerfile").read_text()) == []
