from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.doctor import DoctorSettings
from app.settings import GatewaySettings
from app.stack import StackSettings
from app.webhooks import WebhookSettings
from worker.contract.settings import ContractSettings, complaints, overridden
from worker.settings import WorkerSettings

KEYS = {"s3_access_key_id": "id", "s3_secret_access_key": "hush"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("redis_url", "http://127.0.0.1"),
        ("picture_lifetime_s", 1),
        ("picture_lifetime_s", 999_999_999_999),
        ("record_lifetime_s", 0),
        ("record_lifetime_s", 999_999_999_999),
        ("queue_bound", 0),
        ("queue_bound", 10**9),
    ],
)
def test_wrong_setting_is_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        ContractSettings(**{field: value})


@pytest.mark.parametrize(
    ("given", "shown"), [({"picture_lifetime_s": 604_801}, 604_800), ({"record_lifetime_s": 60}, 60)]
)
def test_record_that_its_pictures_would_outlive_is_refused_by_both_names(env, given, shown):
    [told] = refused(**given)
    assert told.startswith(f"DARKROOM_RECORD_LIFETIME_S is {shown}: ")
    assert f"DARKROOM_PICTURE_LIFETIME_S ({given.get('picture_lifetime_s', 86_400)}) or more" in told


def test_settings_cannot_change_after_the_start():
    with pytest.raises(ValidationError, match="frozen"):
        ContractSettings().queue_bound = 5


def test_complaints_name_the_variable_and_show_no_password():
    with pytest.raises(ValidationError) as refused:
        ContractSettings(redis_url="http://:secret@host", queue_bound=0)
    first, second = complaints(refused.value).splitlines()
    assert first.startswith("DARKROOM_REDIS_URL: ")
    assert second.startswith("DARKROOM_QUEUE_BOUND is 0: ")
    assert "secret" not in first


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch):
    """Sets variables; beside them nothing of ours is set."""
    for name in list(os.environ):
        if name.upper().startswith("DARKROOM_"):
            monkeypatch.delenv(name)

    def set_all(**variables: str | Path) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"DARKROOM_{name}", str(value))

    return set_all


@pytest.fixture
def held(tmp_path):
    """A file that holds a text."""

    def hold(text: str) -> Path:
        path = tmp_path / f"secret-{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        return path

    return hold


def refused(kind: type[ContractSettings] = ContractSettings, **given: object) -> list[str]:
    with pytest.raises(ValidationError) as error:
        kind(**given)
    assert "hush" not in str(error.value)
    return complaints(error.value).splitlines()


@pytest.mark.parametrize("kind", [ContractSettings, StackSettings, WebhookSettings, WorkerSettings])
def test_any_variable_may_come_from_a_file(kind, env, held):
    env(REDIS_URL_FILE=held("redis://:hush@redis:6379/1\n"), QUEUE_BOUND_FILE=held("  7 "))
    settings = kind()
    assert (str(settings.redis_url), settings.queue_bound) == ("redis://:hush@redis:6379/1", 7)
    assert settings.model_fields_set == {"redis_url", "queue_bound"}


def test_lists_come_from_files_as_from_variables(env, held):
    env(MODELS_FILE=held("demo, mine=/w/mine\n"))
    assert [source.name for source in WorkerSettings().models] == ["demo", "mine"]


def test_arguments_go_before_files(env, held):
    env(QUEUE_BOUND_FILE=held("7"))
    assert ContractSettings(queue_bound=8).queue_bound == 8


def test_variable_and_its_file_together_are_refused_by_name(env, held):
    env(STORE_DIR="/a", STORE_DIR_FILE=held("/b"))
    [told] = refused()
    assert told.startswith("DARKROOM_STORE_DIR_FILE is ")
    assert told.endswith(": DARKROOM_STORE_DIR is set too; allowed: one of the two")


def test_file_is_read_where_its_variable_is_empty(env, held):
    env(S3_BUCKET="", S3_BUCKET_FILE=held("pictures"))
    assert ContractSettings().s3_bucket == "pictures"


@pytest.mark.parametrize(
    ("path", "why"), [("/nowhere", "no such file or directory"), ("/", "is a directory"), ("", "")]
)
def test_file_that_cannot_be_read_is_refused_by_the_name_of_its_variable(env, path, why):
    env(S3_SECRET_ACCESS_KEY_FILE=path, S3_ACCESS_KEY_ID="id")
    [told] = refused()
    assert told.startswith(f"DARKROOM_S3_SECRET_ACCESS_KEY_FILE is {path!r}: the file cannot be read: {why}")


def test_file_of_no_text_is_refused(env, tmp_path):
    (tmp_path / "key").write_bytes(b"\xff\xfe\x00")
    env(S3_PREFIX_FILE=tmp_path / "key")
    assert refused()[0].endswith("the file cannot be read: it is no text")


def test_wrong_value_of_a_file_is_refused_and_not_shown(env, held):
    env(QUEUE_BOUND_FILE=held("hush"))
    [told] = refused()
    assert told.startswith("DARKROOM_QUEUE_BOUND (in its file): ")
    assert "hush" not in told


def test_no_secret_is_shown_by_settings_nor_by_what_is_wrong_with_them():
    settings = ContractSettings(redis_url="redis://:hush@host", **KEYS)
    assert settings.s3_secret_access_key == SecretStr("hush")
    assert "hush" not in f"{settings!r} {settings}"
    for wrong in ({"s3_endpoint": "http://me:hush@host"}, {"redis_url": "http://:hush@host"}):
        [told] = refused(**wrong)
        assert "hush" not in told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"s3_access_key_id": "id"}, "DARKROOM_S3_SECRET_ACCESS_KEY: .*go together"),
        ({"s3_secret_access_key": "hush"}, "DARKROOM_S3_SECRET_ACCESS_KEY: .*go together"),
        ({"s3_bucket": "a/b"}, "DARKROOM_S3_BUCKET is 'a/b': .*3 to 63"),
        ({"s3_bucket": "x"}, "DARKROOM_S3_BUCKET is 'x'"),
        ({"s3_prefix": "a/../b"}, "DARKROOM_S3_PREFIX is 'a/../b': .*joined by '/'"),
        ({"s3_prefix": "a//b"}, "DARKROOM_S3_PREFIX"),
        ({"s3_endpoint": "minio:9000"}, "DARKROOM_S3_ENDPOINT: "),
        ({"s3_endpoint": "http://minio/path"}, "DARKROOM_S3_ENDPOINT: .*scheme, host and port"),
        ({"s3_region": "eu west"}, "DARKROOM_S3_REGION"),
        ({"s3_presign": "perhaps"}, "DARKROOM_S3_PRESIGN"),
    ],
)
def test_wrong_setting_of_a_bucket_is_refused_by_name(env, given, says):
    [told] = refused(**given)
    assert re.match(says, told)


def test_settings_of_a_bucket_that_are_empty_are_unset(env):
    names = ("BUCKET", "ENDPOINT", "REGION", "PATH_STYLE", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "PUBLIC_ENDPOINT")
    env(**{f"S3_{name}": "" for name in names})
    settings = ContractSettings()
    assert [getattr(settings, f"s3_{name.lower()}") for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ContractSettings, "store_dir"),
        (GatewaySettings, "public_url"),
        (GatewaySettings, "key_max_active"),
        (WorkerSettings, "models"),
        (WorkerSettings, "tokenizers"),
        (WorkerSettings, "t5_length"),
        (WorkerSettings, "token_budget"),
        (DoctorSettings, "models"),
    ],
)
def test_what_is_empty_is_unset(kind, name, env):
    unset = getattr(kind(), name)
    env(**{name.upper(): ""})
    assert getattr(kind(), name) == unset


def test_pictures_are_beside_the_rest_where_their_folder_is_empty(env):
    env(STORE_DIR="", DATA_DIR="/data")
    assert StackSettings().pictures == Path("/data/pictures")


def test_public_url_may_have_a_path(env):
    assert str(GatewaySettings(public_url="https://x/darkroom").public_url) == "https://x/darkroom"


@pytest.mark.parametrize("url", ["https://x/?a=b", "https://x/#c", "https://me@x/", "https://me:hush@x/"])
def test_public_url_that_urls_cannot_begin_with_is_refused(env, url):
    [told] = refused(GatewaySettings, public_url=url)
    assert told.startswith("DARKROOM_PUBLIC_URL: ")
    assert "allowed: scheme, host, port and path" in told


def test_prefix_is_kept_without_outer_slashes():
    assert ContractSettings(s3_prefix="/a/b/").s3_prefix == "a/b"


def test_child_reads_what_it_is_given_wherever_ours_came_from(env, held):
    given = {
        "DARKROOM_PORT_FILE": "/x",
        "DARKROOM_HOST": "a",
        "darkroom_auth": "on",
        "DARKROOM_S3_BUCKET": "b",
        "X": "y",
    }
    assert overridden(given, port=1, host="c", auth="off", s3_bucket=None) == {
        "X": "y", "DARKROOM_PORT": "1", "DARKROOM_HOST": "c", "DARKROOM_AUTH": "off",
    }  # fmt: skip
