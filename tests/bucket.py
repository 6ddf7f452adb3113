"""Real S3 servers with one bucket: rclone, which keeps a folder and checks signatures, and moto, which imitates AWS."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import S3Store as Client

from tests.processes import Server

KEY_ID, SECRET, BUCKET = "darkroom", "not-a-real-secret", "pictures"

SCRIPTS = Path(sysconfig.get_path("scripts"))


class S3Server(Server):
    """On a free loopback port; its address stays the same over a stop and start."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        (folder / BUCKET).mkdir()

    def settings(self, **more: Any) -> dict[str, Any]:
        """What tells a process of ours to keep its pictures there."""
        keys = {"s3_access_key_id": KEY_ID, "s3_secret_access_key": SECRET}
        return {"s3_bucket": BUCKET, "s3_endpoint": self.url, **keys, **more}

    def start(self) -> None:
        die_with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*die_with_parent, *self._command()]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(self.url, timeout=5)
                return
            except httpx.TransportError:
                assert self._process.poll() is None, f"{command} ended at once"
                assert time.monotonic() < deadline, f"{command} does not answer"
                time.sleep(0.02)

    def _command(self) -> list[str]:
        address = f"127.0.0.1:{self.port}"
        options = ["--config", "", "--addr", address, "--auth-key", f"{KEY_ID},{SECRET}"]
        return [str(SCRIPTS / "rclone"), "serve", "s3", *options, str(self._folder)]

    def client(self) -> Client:
        """The bucket as it is, without us."""
        keys: Any = {"access_key_id": KEY_ID, "secret_access_key": SECRET}
        return Client(BUCKET, endpoint=self.url, region="us-east-1", client_options={"allow_http": True}, **keys)

    def keys(self, prefix: str | None = None) -> set[str]:
        return {found["path"] for page in obstore.list(self.client(), prefix) for found in page}

    def fill(self, folder: str, names: Iterable[str]) -> None:
        """Objects put there before the server starts, which is quick; later it would not see them."""
        place = self._folder / BUCKET / folder
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_bytes(b"x")

    def empty(self, prefix: str) -> None:
        """As a lifecycle rule does."""
        obstore.delete(self.client(), list(self.keys(prefix)))

    def put_old(self, key: str, age_s: float) -> None:
        """An object that looks as if it had been written so long ago."""
        attributes: Any = {"mtime": str(time.time() - age_s)}  # of which rclone takes the time
        obstore.put(self.client(), key, b"old", attributes=attributes, use_multipart=False)


class Moto(S3Server):
    """The same by moto: closer to AWS in what it answers, but it takes any signature."""

    def start(self) -> None:
        if not (SCRIPTS / "moto_server").exists():
            pytest.fail("moto_server is not installed: pip install 'moto[server]'")
        super().start()
        httpx.put(f"{self.url}/{BUCKET}").raise_for_status()

    def _command(self) -> list[str]:
        return [str(SCRIPTS / "moto_server"), "--host", "127.0.0.1", "--port", str(self.port)]
