"""Prints what a role of Darkroom depends on, so that an image can install it in a layer of its own."""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, role: str) -> list[str]:
    """The dependencies of the package and of the extra named like the role."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][role]]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml"), sys.argv[1])) + "\n")
