"""Tells Kubernetes what it would cost to delete our pod: the jobs that it runs. Torch-free.

A Deployment that scales down deletes pods of the lowest `controller.kubernetes.io/pod-deletion-cost` first, so idle
workers go before busy ones. Nothing else depends on it: a worker that is told to stop finishes its jobs or hands them
back.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import structlog

log = structlog.get_logger()

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
INTERVAL_S = 10.0
"""Seconds between two changes: each one goes through the API server to all who watch pods."""

TIMEOUT_S = 5.0
MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Api:
    """The cluster's API server as a pod reaches it."""

    url: str
    account: Path = ACCOUNT  # folder of `token` and `ca.crt`

    @classmethod
    def of_cluster(cls, env: Mapping[str, str], account: Path = ACCOUNT) -> Self | None:
        """The API server that this process's environment names; None outside a cluster."""
        host, port = env.get("KUBERNETES_SERVICE_HOST"), env.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
        if not host:
            return None
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", account)

    def annotate(self, pod: str, namespace: str, name: str, value: str) -> None:
        """Set an annotation of a pod. OSError, httpx.HTTPError.

        The token is read each time: the kubelet replaces it about every hour.
        """
        token = (self.account / "token").read_text().strip()
        trusted: ssl.SSLContext | bool = True
        if self.url.startswith("https:"):
            trusted = ssl.create_default_context(cafile=self.account / "ca.crt")
        answer = httpx.patch(
            f"{self.url}/api/v1/namespaces/{namespace}/pods/{pod}",
            json={"metadata": {"annotations": {name: value}}},
            headers={"authorization": f"Bearer {token}", "content-type": MERGE},
            verify=trusted,
            timeout=TIMEOUT_S,
            trust_env=False,  # a proxy is for the world outside, and the token is not for it
        )
        answer.raise_for_status()


class DeletionCost:
    """Keeps one pod's deletion cost at the number of its jobs, from a thread of its own; close it at the end."""

    def __init__(self, api: Api, pod: str, namespace: str, *, interval_s: float = INTERVAL_S) -> None:
        self._api, self._pod, self._namespace, self._interval_s = api, pod, namespace, interval_s
        self._jobs = 0
        self._changed, self._closed = threading.Event(), threading.Event()
        self._changed.set()  # what a container left there that was in this pod before us no longer holds
        self._thread = threading.Thread(target=self._follow, name="deletion-cost", daemon=True)
        self._thread.start()

    @classmethod
    def of_pod(cls, pod: str, namespace: str, env: Mapping[str, str]) -> Self | None:
        """The keeper of the pod of that name; None where none is named, or outside a cluster."""
        if not (pod and namespace):
            return None
        api = Api.of_cluster(env)
        if api is None:
            log.warning("a pod is named, but this is no cluster: its deletion cost is not kept", pod=pod)
            return None
        return cls(api, pod, namespace)

    def publish(self, jobs: int) -> None:
        """Say how many jobs this pod runs now. Never blocks, never raises."""
        if jobs != self._jobs:
            self._jobs = jobs
            self._changed.set()

    def close(self) -> None:
        """End the thread; it may still be within a call that lasts some seconds, and is not waited for."""
        self._closed.set()
        self._changed.set()

    def _follow(self) -> None:
        told: int | None = None
        while True:
            self._changed.wait()
            if self._closed.is_set():
                return
            self._changed.clear()
            jobs = self._jobs
            if jobs == told:
                continue
            if self._tell(jobs):
                told = jobs
            else:
                self._changed.set()  # then as it is by then
            if self._closed.wait(self._interval_s):
                return

    def _tell(self, jobs: int) -> bool:
        try:
            self._api.annotate(self._pod, self._namespace, ANNOTATION, str(jobs))
        except (OSError, httpx.HTTPError) as error:  # ssl's errors are OSErrors
            log.warning("the pod's deletion cost was not told", pod=self._pod, jobs=jobs, error=str(error))
            return False
        return True
