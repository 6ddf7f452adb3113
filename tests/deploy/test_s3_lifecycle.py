"""deploy/s3-lifecycle.json, put on a bucket: it takes our pictures, in time but not too early. `make test-deploy`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bucket import BUCKET, KEY_ID, SECRET, Moto
from tests.deploy.engine import ROOT
from worker.contract.settings import DAY_S, ContractSettings
from worker.contract.store import open_store, picture_key

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(120)]

FILE = ROOT / "deploy" / "s3-lifecycle.json"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Moto]:
    server = Moto(tmp_path)
    server.start()
    yield server
    server.stop()


def rule_of(bucket: Moto) -> dict[str, Any]:
    """The one rule, as the server tells it once it has taken the file."""
    import boto3  # comes with moto, and is not there where these tests do not run

    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=bucket.url, **keys)
    client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=json.loads(FILE.read_text()))
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert rule["Status"] == "Enabled"
    return dict(rule)


def test_rule_takes_every_key_that_we_write(bucket: Moto) -> None:
    store = open_store(ContractSettings(**bucket.settings()))
    store.put(picture_key("gen_" + "0" * 31, "a", 0, "png"), b"x")
    (key,) = bucket.keys()
    assert key.startswith(rule_of(bucket)["Filter"]["Prefix"])


def test_rule_leaves_pictures_their_lifetime(bucket: Moto) -> None:
    rule = rule_of(bucket)
    lifetime_s = ContractSettings().picture_lifetime_s
    assert rule["Expiration"] == {"Days": rule["Expiration"]["Days"]}
    assert lifetime_s <= rule["Expiration"]["Days"] * DAY_S <= lifetime_s + DAY_S
