"""`darkroom keys` and the keys in Redis, on a real Valkey."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner, Result

from app import doctor
from app.cli import cli
from app.embedded import EmbeddedValkey
from app.settings import GatewaySettings
from app.stack import StackSettings
from tests.app.dialects.conftest import Live
from tests.app.fake_worker import FakeWorker
from tests.conftest import Valkey
from worker.contract.errors import InvalidField, QueueUnavailable
from worker.contract.keys import FRESH_S, KEY_TEXT, KEYS, USED_EVERY_S, Keyring, Keys, new_key, opens, parse_key
from worker.contract.settings import ContractSettings


@pytest.fixture
def settings(redis_url: str) -> ContractSettings:
    return ContractSettings(redis_url=redis_url)  # type: ignore[arg-type]


def keys(settings: ContractSettings, *arguments: object) -> Result:
    """Runs `darkroom keys ...`."""
    env = {"DARKROOM_REDIS_URL": str(settings.redis_url)}
    return CliRunner(env=env).invoke(cli, ["keys", *map(str, arguments)])


def made(settings: ContractSettings, *arguments: object) -> str:
    done = keys(settings, "add", *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def listed(settings: ContractSettings) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(keys(settings, "list", "--json").stdout)
    return found


def everything_in(url: str) -> bytes:
    """All that Redis holds, as it would be in a stolen dump."""
    with redis.Redis.from_url(url) as client:
        return b"\n".join(client.dump(name) or b"" for name in client.scan_iter())


def test_add_prints_the_key_alone_and_redis_has_only_its_hash(settings: ContractSettings) -> None:
    text = made(settings, "ci")
    match = KEY_TEXT.fullmatch(text)
    assert match is not None
    with Keyring.connect(settings) as keyring:
        (key,) = keyring.known()
    assert (key.id, key.name, key.scopes) == (match[1], "ci", ("generate", "read"))
    assert key.digest == hashlib.sha256(match[2].encode()).hexdigest()
    assert match[2].encode() not in everything_in(str(settings.redis_url))


def test_add_keeps_scopes_and_limits(settings: ContractSettings) -> None:
    made(settings, "x", "--scope", "admin", "--scope", "generate", "--rate", "120/minute", "--max-active", 3)
    (key,) = listed(settings)
    assert (key["scopes"], key["rate"], key["max_active"]) == (["generate", "admin"], "120/minute", 3)
    assert "digest" not in key


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("two words",), "name is 'two words'; allowed: 1 to 64 letters"),
        (("0123456789ab",), "unlike a key's id"),
        (("x", "--scope", "root"), "scope is 'root'; allowed: generate, read, high-priority, admin"),
        (("x", "--rate", "0/minute"), "rate is '0/minute'; allowed: a number of requests a second"),
        (("x", "--rate", "5 per fortnight"), "such as 120/minute"),
        (("x", "--max-active", "0"), "max-active is '0'; allowed: 1 to 999999; none; default"),
        (("x", "--max-active", "ten"), "max-active is 'ten'; allowed: 1 to 999999"),
    ],
)
def test_wrong_words_are_refused_by_name(
    settings: ContractSettings, arguments: tuple[str, ...], complaint: str
) -> None:
    done = keys(settings, "add", *arguments)
    assert done.exit_code == 1
    assert complaint in done.stderr
    assert listed(settings) == []


def test_a_name_is_one_keys_own_until_that_is_revoked(settings: ContractSettings) -> None:
    made(settings, "ci")
    again = keys(settings, "add", "ci")
    assert again.exit_code == 1
    assert "a name that no other key has" in again.stderr
    assert keys(settings, "revoke", "ci").exit_code == 0
    made(settings, "ci")
    assert [key["revoked_at"] is None for key in listed(settings)] == [False, True]


def test_a_key_is_revoked_by_its_id_once(settings: ContractSettings) -> None:
    key_id = made(settings, "ci")[3:15]
    assert f"revoked: {key_id} of ci" in keys(settings, "revoke", key_id).stdout
    again = keys(settings, "revoke", key_id)
    assert (again.exit_code, "no key that is in use" in again.stderr) == (1, True)


def limits_of(settings: ContractSettings) -> tuple[object, object]:
    (key,) = listed(settings)
    return key["rate"], key["max_active"]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (("--rate", "5/second"), ("5/second", 3)),
        (("--rate", "none"), ("none", 3)),
        (("--rate", "default"), (None, 3)),
        (("--max-active", "7"), ("120/minute", 7)),
        (("--max-active", "none"), ("120/minute", 0)),
        (("--max-active", "default"), ("120/minute", None)),
        (("--rate", "1/day", "--max-active", "1"), ("1/day", 1)),
    ],
)
def test_limit_changes_what_is_said_and_nothing_else(
    settings: ContractSettings, options: tuple[str, ...], limits: tuple[object, object]
) -> None:
    made(settings, "ci", "--rate", "120/minute", "--max-active", 3)
    (before,) = listed(settings)
    assert keys(settings, "limit", "ci", *options).exit_code == 0
    (after,) = listed(settings)
    assert (after["rate"], after["max_active"]) == limits
    assert after == before | {"rate": limits[0], "max_active": limits[1]}


def test_limit_says_what_holds_now(settings: ContractSettings) -> None:
    key_id = made(settings, "ci", "--max-active", 3)[3:15]
    said = keys(settings, "limit", key_id, "--rate", "5/second", "--max-active", "none").stdout
    assert said == f"{key_id} of ci: rate 5/second, jobs at once none; every gateway knows within a second\n"


def test_limit_tells_programs_the_key_without_its_digest(settings: ContractSettings) -> None:
    made(settings, "ci")
    told = json.loads(keys(settings, "limit", "ci", "--max-active", 2, "--json").stdout)
    assert (told["name"], told["max_active"], "digest" in told) == ("ci", 2, False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ci",), "nothing to change; say --rate, --max-active or both"),
        (("ci", "--rate", "0/minute"), "rate is '0/minute'; allowed: a number of requests a second"),
        (("ci", "--max-active", "0"), "max-active is '0'; allowed: 1 to 999999; none; default"),
        (("other", "--max-active", "2"), "no key that is in use has the id or name 'other'"),
    ],
)
def test_wrong_limits_change_nothing(settings: ContractSettings, arguments: tuple[str, ...], complaint: str) -> None:
    made(settings, "ci", "--rate", "120/minute", "--max-active", 3)
    done = keys(settings, "limit", *arguments)
    assert (done.exit_code, complaint in done.stderr) == (1, True)
    assert limits_of(settings) == ("120/minute", 3)


def test_a_revoked_key_gets_no_other_limits(settings: ContractSettings) -> None:
    made(settings, "ci")
    keys(settings, "revoke", "ci")
    done = keys(settings, "limit", "ci", "--max-active", 2)
    assert (done.exit_code, "no key that is in use" in done.stderr) == (1, True)
    assert limits_of(settings) == (None, None)


def test_if_none_makes_the_first_key_and_no_other(settings: ContractSettings, tmp_path: Path) -> None:
    file = tmp_path / "key"
    text = made(settings, "first", "--if-none", "--write", file)
    assert file.read_text() == f"{text}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = keys(settings, "add", "first", "--if-none", "--write", file)
    assert (again.exit_code, again.stdout) == (0, "")
    assert "there is a key already" in again.stderr
    assert file.read_text() == f"{text}\n"
    assert len(listed(settings)) == 1


def test_a_key_waits_for_a_redis_that_is_yet_to_come(tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    command = [sys.executable, "-m", "app.cli", "keys", "add", "first", "--wait", "60"]
    env = os.environ | {"DARKROOM_REDIS_URL": server.url}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as adding:
        with pytest.raises(subprocess.TimeoutExpired):
            adding.wait(3)
        server.start()
        assert adding.communicate(timeout=60)[0].startswith("dr_")
    assert adding.returncode == 0
    server.stop()


def test_a_key_that_is_in_use_is_never_written_over(settings: ContractSettings, tmp_path: Path) -> None:
    file = tmp_path / "key"
    text = made(settings, "one", "--write", file)
    refused = keys(settings, "add", "two", "--write", file)
    assert (refused.exit_code, "holds a key that is in use" in refused.stderr) == (1, True)
    keys(settings, "revoke", "one")
    assert made(settings, "two", "--write", file) != text


def test_what_is_no_key_is_never_written_over(settings: ContractSettings, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("dear diary")
    refused = keys(settings, "add", "ci", "--write", file)
    assert (refused.exit_code, "something other than a key" in refused.stderr) == (1, True)
    assert file.read_text() == "dear diary"
    assert listed(settings) == []


def test_a_key_that_was_not_let_in_leaves_no_file(settings: ContractSettings, tmp_path: Path) -> None:
    made(settings, "ci")
    assert keys(settings, "add", "ci", "--write", tmp_path / "key").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_is_told_before_a_key_is_made(settings: ContractSettings, tmp_path: Path) -> None:
    refused = keys(settings, "add", "ci", "--write", tmp_path / "none" / "key")
    assert (refused.exit_code, "cannot be written: No such file" in refused.stderr) == (1, True)
    assert listed(settings) == []


def test_list_for_people_shows_who_may_what(settings: ContractSettings) -> None:
    assert "darkroom keys add NAME" in keys(settings, "list").stdout
    text = made(settings, "ci", "--rate", "5/second")
    keys(settings, "revoke", "ci")
    shown = keys(settings, "list").stdout
    assert all(word in shown for word in (text[3:15], "ci", "generate, read", "5/second", "never", "revoked 2"))
    assert text[16:] not in shown


def test_keys_say_so_when_redis_is_away() -> None:
    nowhere = ContractSettings(redis_url="redis://:secret@127.0.0.1:9/0")  # type: ignore[arg-type]
    for command in (("add", "x"), ("list",), ("limit", "x", "--rate", "none"), ("revoke", "x"), ("usage",)):
        done = keys(nowhere, *command)
        assert done.exit_code == 1
        assert f"keys {command[0]} did not succeed: Redis at 127.0.0.1:9 gave no answer" in done.stderr
        assert "secret" not in done.output


def test_what_two_operators_do_at_once_is_kept(settings: ContractSettings) -> None:
    """The second one's key comes between the first one's look and write: it looks again, and finds the name taken."""
    first, second = new_key("ci")[0], new_key("ci")[0]
    with Keyring.connect(settings) as keyring, redis.Redis.from_url(str(settings.redis_url)) as client:

        class Hasty(redis.Redis):
            def transaction(self, func, *watches, **options):  # type: ignore[no-untyped-def]
                def interrupted(pipe):  # type: ignore[no-untyped-def]
                    func(pipe)
                    client.hsetnx(KEYS, second.id, second.to_json())

                return super().transaction(interrupted, *watches, **options)

        with pytest.raises(InvalidField, match="a name that no other key has"):
            Keyring(Hasty.from_url(str(settings.redis_url))).add(first)
        assert [key.id for key in keyring.known()] == [second.id]


class Clock:
    """Time that goes on when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_revoked_key_is_known_as_revoked_within_a_second(settings: ContractSettings) -> None:
    key, _ = new_key("ci")
    clock = Clock()
    found = Keys(redis.asyncio.Redis.from_url(str(settings.redis_url)), clock)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
        assert await found.find(key.id) == key
        keyring.revoke("ci")
        assert await found.find(key.id) == key
        clock.now += FRESH_S
        after = await found.find(key.id)
        assert after is not None
        assert after.revoked_at is not None
    await found.close()


async def test_other_limits_count_within_a_second(settings: ContractSettings) -> None:
    key, _ = new_key("ci")
    clock = Clock()
    found = Keys(redis.asyncio.Redis.from_url(str(settings.redis_url)), clock)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
        assert await found.find(key.id) == key
        keyring.limit("ci", rate="5/second", max_active=2)
        clock.now += FRESH_S
        assert await found.find(key.id) == replace(key, rate="5/second", max_active=2)
    await found.close()


async def test_keys_are_never_believed_without_redis_for_longer_than_they_are_fresh(own_valkey: Valkey) -> None:
    settings = ContractSettings(redis_url=own_valkey.url)  # type: ignore[arg-type]
    key, _ = new_key("ci")
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
    clock = Clock()
    found = Keys(redis.asyncio.Redis.from_url(own_valkey.url), clock)
    assert await found.find(key.id) == key
    own_valkey.stop()
    clock.now += FRESH_S
    with pytest.raises(QueueUnavailable):
        await found.find(key.id)
    await found.close()


async def test_made_up_ids_are_remembered_like_real_ones_but_never_fill_the_memory(settings: ContractSettings) -> None:
    found = Keys(redis.asyncio.Redis.from_url(str(settings.redis_url)), Clock(), most_remembered=10)
    ids = [f"{n:012x}" for n in range(25)]
    assert [await found.find(key_id) for key_id in ids] == [None] * 25
    key, _ = new_key("ci")
    with Keyring.connect(settings) as keyring:
        for key_id in (ids[0], ids[-1]):
            keyring.add(replace(key, id=key_id, name=key_id))
    assert await found.find(ids[-1]) is None  # believed for a second
    assert await found.find(ids[0]) is not None  # pushed out by the ones after it
    await found.close()


async def test_last_use_is_noted_now_and_then(settings: ContractSettings) -> None:
    key, _ = new_key("ci")
    clock = Clock()
    found = Keys(redis.asyncio.Redis.from_url(str(settings.redis_url)), clock)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
        await found.note_use(key.id)
        first = keyring.used()[key.id]
        with redis.Redis.from_url(str(settings.redis_url)) as client:
            client.delete("darkroom:keys:used")
        clock.now += USED_EVERY_S - 1
        await found.note_use(key.id)
        assert keyring.used() == {}
        clock.now += 1
        await found.note_use(key.id)
        assert keyring.used()[key.id] >= first
    await found.close()


def test_a_secret_is_compared_also_where_there_is_no_key() -> None:
    compared: list[tuple[str, str]] = []

    def same(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    key, text = new_key("ci")
    parsed = parse_key(text)
    assert parsed is not None
    _, secret = parsed
    assert opens(key, secret, same)
    assert not opens(key, "x" * 43, same)
    assert not opens(None, secret, same)
    assert [len(one) == len(other) == 64 for one, other in compared] == [True, True, True]


@pytest.mark.parametrize("text", ["", "dr_", "sk-123", "dr_0123456789AB_" + "x" * 43, "dr_0123456789ab_" + "x" * 42])
def test_what_is_no_key_is_not_parsed(text: str) -> None:
    assert parse_key(text) is None
    assert parse_key("dr_0123456789ab_" + "x" * 43 + "\n") is None


def test_no_two_keys_are_alike() -> None:
    texts = {new_key("ci")[1] for _ in range(100)}
    assert len(texts) == len({text[:15] for text in texts}) == 100


def test_keys_are_found_where_darkroom_up_runs(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "valkey", tmp_path / "log")
    valkey.start()
    try:
        done = CliRunner(env={"DARKROOM_DATA_DIR": str(tmp_path)}).invoke(cli, ["keys", "add", "ci"])
        assert done.exit_code == 0, done.output
        with redis.Redis.from_url(valkey.url) as client:
            assert client.hlen(KEYS) == 1
    finally:
        valkey.stop()


@pytest.fixture
def gateway(settings: ContractSettings, tmp_path: Path) -> GatewaySettings:
    """Of a gateway that asks for keys."""
    return GatewaySettings(redis_url=settings.redis_url, store_dir=tmp_path / "pictures", auth="on")


def generate(live: Live, output: Path, *options: str, **env: str) -> Result:
    arguments = ["generate", "a red circle", "--model", "tiny", "--url", live.url, "--output", str(output)]
    return CliRunner(env=env).invoke(cli, [*arguments, *options])


def test_generate_sends_the_key_that_it_is_given(
    settings: ContractSettings, gateway: GatewaySettings, tmp_path: Path
) -> None:
    text = made(settings, "ci")
    with FakeWorker(gateway), Live(gateway) as live:
        without = generate(live, tmp_path / "a.png")
        option = generate(live, tmp_path / "b.png", "--key", text)
        variable = generate(live, tmp_path / "c.png", DARKROOM_API_KEY=text)
    assert (without.exit_code, "this server asks for an API key" in without.stderr) == (1, True)
    assert (option.exit_code, variable.exit_code) == (0, 0), option.output
    assert (tmp_path / "c.png").exists()


def test_what_is_no_key_is_refused_before_it_is_sent_and_not_repeated(tmp_path: Path) -> None:
    for command in (["generate", "a red circle"], ["doctor"]):
        done = CliRunner(env={"DARKROOM_API_KEY": "sk-somebody-elses"}).invoke(cli, command)
        assert (done.exit_code, "keys look like dr_" in done.stderr) == (1, True)
        assert "somebody" not in done.output


def test_usage_tells_what_each_key_made(settings: ContractSettings, gateway: GatewaySettings, tmp_path: Path) -> None:
    assert "nothing was made in the last 30 days" in keys(settings, "usage").stdout
    text = made(settings, "ci")
    with FakeWorker(gateway), Live(gateway) as live:
        assert generate(live, tmp_path / "a.png", "--key", text, "--num-images", "2").exit_code == 0
    (row,) = json.loads(keys(settings, "usage", "--days", 1, "--json").stdout)
    assert (row["owner"], row["name"], row["model"]) == (text[3:15], "ci", "tiny")
    assert (row["jobs"], row["pictures"]) == (1, 2)
    assert row["megapixel_steps"] > 0
    shown = keys(settings, "usage").stdout.splitlines()
    assert shown[0].split() == ["day", "key", "model", "jobs", "pictures", "megapixel", "steps", "gpu", "seconds"]
    assert shown[1].split()[1:5] == ["ci", "tiny", "1", "2"]


def test_doctor_tells_whether_keys_are_on_and_there_are_any(settings: ContractSettings, tmp_path: Path) -> None:
    def found(**given: object) -> doctor.Finding:
        return doctor.check_keys(StackSettings(redis_url=settings.redis_url, data_dir=tmp_path, **given))  # type: ignore[arg-type]

    assert found().state == "ok"
    assert found(host="0.0.0.0", auth="off", auth_off_on_public=True).state == "warning"
    none = found(host="0.0.0.0")
    assert (none.state, none.found, none.mend) == (
        "warning",
        "on, and there is none",
        "darkroom keys add NAME makes one",
    )
    made(settings, "ci")
    assert (found(auth="on").state, found(auth="on").found) == ("ok", "on, 1 in use")
    nowhere = StackSettings(redis_url="redis://127.0.0.1:9", auth="on")  # type: ignore[arg-type]
    assert "does not answer" in doctor.check_keys(nowhere).found


def test_doctor_tries_a_key(settings: ContractSettings, gateway: GatewaySettings) -> None:
    right, wrong = made(settings, "ci"), new_key("other")[1]
    with Live(gateway) as live:
        here = StackSettings(redis_url=settings.redis_url, auth="on", port=int(live.url.rpartition(":")[2]))
        assert doctor.check_port(here).found.endswith("a Darkroom runs there")
        assert (doctor.check_key(here, right).state, doctor.check_key(here, right).found) == ("ok", "taken")
        refused = doctor.check_key(here, wrong)
        assert (refused.state, "not known here" in refused.found) == ("wrong", True)
    assert doctor.check_key(here, right).state == "warning"
