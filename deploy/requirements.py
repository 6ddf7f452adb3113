"""Prints what a role of Darkroom depends on, so that an image can install it in a layer of its own."""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, *extras: str) -> list[str]:
    """The dependencies of the package and of those extras, such as `worker`, `otel`, `s3`."""
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(name for extra in extras for name in optional[extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml"), *sys.argv[1:])) + "\n")
