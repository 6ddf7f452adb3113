"""The README's examples, run word for word against a whole stack with the demo's real weights."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import ROOT, Up
from tests.presigned import PICTURE, presigned

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not shutil.which("curl") and "CI" not in os.environ, reason="the examples use curl"),
]

EXAMPLES = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
PYTHON_EXAMPLES = [
    example
    for example in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    if "http://127.0.0.1:8000" in example  # the check of a webhook's signature asks nobody
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("demo"), "demo")
    up.wait_until_said("Darkroom is ready")
    yield up
    up.stop()


def test_the_readme_leads_from_a_prompt_to_its_picture_and_cancels_a_job(demo: Up, tmp_path: Path) -> None:
    script = "\n".join(EXAMPLES).replace("http://127.0.0.1:8000", demo.url)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    generation = json.loads((tmp_path / "generation.json").read_text())
    assert generation["status"] == "succeeded", generation
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (512, 512)
        assert background(picture) == "blue"  # what the example's prompt says
        assert "red" in colours(picture)
    assert "red" in colours(picture_in(tmp_path / "stability.jpeg"))
    assert "red" in colours(picture_in(tmp_path / "deepinfra.json"))
    seen, end = json.JSONDecoder().raw_decode(ran.stdout)  # curl ends no lines
    canceled = json.loads(ran.stdout[end:])
    assert seen["id"] == canceled["id"]
    assert canceled["status"] == "canceled" or canceled["cancel_requested"]


def test_the_readmes_picture_is_fetched_where_its_url_redirects(tmp_path: Path) -> None:
    [example] = [example for example in EXAMPLES if "-o picture.png" in example]
    with presigned() as url:
        (tmp_path / "generation.json").write_text(json.dumps({"images": [{"url": f"{url}/v1/images/0"}]}))
        subprocess.run(["bash", "-euo", "pipefail", "-c", example], cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "picture.png").read_bytes() == PICTURE


@pytest.mark.parametrize("example", PYTHON_EXAMPLES)
def test_the_readmes_python_leaves_pictures(demo: Up, tmp_path: Path, example: str) -> None:
    code = example.replace("http://127.0.0.1:8000", demo.url)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    left = list(tmp_path.iterdir())
    assert left
    for path in left:
        assert f'"{path.name}"' in example
        assert "red" in colours(picture_in(path))


def picture_in(path: Path) -> Image.Image:
    """The picture in a file of the kind that its name says, or in DeepInfra's JSON."""
    data = path.read_bytes()
    if path.suffix == ".json":
        data = b64decode(json.loads(data)["images"][0].partition(";base64,")[2])
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert path.suffix in (f".{str(picture.format).lower()}", ".json")
    assert min(picture.size) >= 64
    return picture


def colours(picture: Image.Image) -> set[str]:
    """Which of red, green and blue outweigh the other two somewhere in the picture, by far; an outline is enough."""
    red, green, blue = (0, 0, 0)
    for r, g, b in picture.convert("RGB").resize((128, 128), Image.Resampling.NEAREST).get_flattened_data():
        red, green, blue = red + (r > 2 * max(g, b)), green + (g > 2 * max(r, b)), blue + (b > 2 * max(r, g))
    return {name for name, count in (("red", red), ("green", green), ("blue", blue)) if count > 40}


def background(picture: Image.Image) -> str:
    """The strongest of red, green and blue in all four corners."""
    corners = [(8, 8), (503, 8), (8, 503), (503, 503)]
    (strongest,) = {("red", "green", "blue")[max(range(3), key=picture.getpixel(at).__getitem__)] for at in corners}
    return strongest
