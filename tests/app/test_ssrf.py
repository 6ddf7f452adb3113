"""Webhooks go to the public Internet and to what the operator allows; to nothing else, however it is written."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpcore
import httpx
import pytest

from app.main import create_app
from app.networks import Allowed
from app.settings import GatewaySettings
from app.webhook_target import GuardedNetwork, Resolver, Target, TargetRefused, Targets
from app.webhooks import Courier
from tests.app.conftest import client_of
from worker.contract.errors import InvalidField

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PUBLIC = "93.184.215.14"


class Names:
    """A name service: each name has addresses, or a list of answers, one a question."""

    def __init__(self, **names: Sequence[str]) -> None:
        self._names = {name.replace("_", "."): list(found) for name, found in names.items()}
        self.rebinds: list[list[str]] = []
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if self.rebinds:
            return self.rebinds.pop(0)
        if host not in self._names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self._names[host]


class Wire(httpcore.AsyncNetworkBackend):
    """A network that notes where it is asked to connect, and takes no connection."""

    def __init__(self) -> None:
        self.connected: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
        self.connected.append((host, port))
        raise httpcore.ConnectError("nobody there")


def targets(names: Names | None = None, allow: str = "") -> Targets:
    return Targets(Allowed.parse(allow), names or Names(example_com=[PUBLIC]))


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook",
        "https://EXAMPLE.com.:443/hook?key=1",
        "https://example.com:8443",
        f"https://{PUBLIC}/",
        "https://[2606:4700:4700::1111]/hook",
        "https://[64:ff9b::5db8:d70e]/nat64-of-a-public-address",
    ],
)
async def test_public_https_is_allowed(url: str) -> None:
    await targets().check(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # metadata of most clouds
        "100.100.100.200",  # of Alibaba, in the carriers' NAT
        "168.63.129.16",  # of Azure
        "192.0.0.192",  # of Oracle
        "192.0.2.1",
        "198.18.0.1",
        "192.88.99.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "100::1",
        "3fff::1",
    ],
)
async def test_address_that_is_not_public_is_refused_written_and_resolved(address: str) -> None:
    written = f"[{address}]" if ":" in address else address
    with pytest.raises(InvalidField, match=r"^webhook.url is .*allowed: a host with public addresses only"):
        await targets().check(f"https://{written}/hook")
    with pytest.raises(InvalidField, match="public addresses only"):
        await targets(Names(example_com=[address])).check("https://example.com/hook")
    with pytest.raises(InvalidField, match="public addresses only"):
        await targets(Names(example_com=[PUBLIC, address])).check("https://example.com/hook")


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "127.0.0.01",
        "127.0.0.1.",
        "1.1.1.1.1",
        "[fe80::1%25eth0]",
        "[::1",
        "%31%32%37.0.0.1",
        "exa mple.com",
        "example..com",
        "-example.com",
        "x" * 64 + ".com",
        "user@example.com",
        "user:password@example.com",
        "@example.com",
        "example.com:22",
        "example.com:0",
        "example.com:80",
        "example.com:65536",
        "①②⑦.⓪.⓪.①",
        "",
    ],
)
async def test_host_in_an_odd_form_is_refused_without_asking_for_its_address(host: str) -> None:
    names = Names(example_com=[PUBLIC])
    with pytest.raises(InvalidField, match=r"webhook.url is .*; allowed: "):
        await targets(names).check(f"https://{host}/hook")
    assert set(names.asked) <= {"example.com"}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hook",
        "//example.com/hook",
        "ftp://example.com/hook",
        "file:///etc/passwd",
        "gopher://example.com:443/",
        "javascript:alert(1)",
        "https:example.com",
        "https://example.com\\@127.0.0.1/",
        "https://example.com/a\r\nhost: 127.0.0.1",
        "https://example.com/\tx",
        "https://example.com/" + "x" * 2048,
        "http://example.com/hook",
        "http://example.com:443/hook",
    ],
)
async def test_url_that_is_not_plain_https_is_refused(url: str) -> None:
    with pytest.raises(InvalidField, match=r"webhook.url is .*; allowed: "):
        await targets().check(url)


@pytest.mark.parametrize(
    ("allow", "url"),
    [
        ("10.0.0.0/8", "http://10.1.2.3:9000/hook"),
        ("10.0.0.0/8", "http://inside.test:9000/hook"),
        ("inside.test", "http://inside.test:9000/hook"),
        ("127.0.0.1", "http://[::ffff:127.0.0.1]:9000/hook"),
        ("::1, fd00::/8", "http://[fd00::1]/hook"),
    ],
)
async def test_what_the_operator_allows_is_allowed_by_http_on_any_port(allow: str, url: str) -> None:
    await targets(Names(inside_test=["10.0.0.1"]), allow).check(url)
    with pytest.raises(InvalidField):
        await targets(Names(inside_test=["10.0.0.1"])).check(url)


async def test_allowed_network_opens_no_other_and_no_http_to_the_public() -> None:
    guarded = targets(Names(example_com=[PUBLIC], both_test=["10.0.0.1", PUBLIC]), "10.0.0.0/8")
    for url in ("http://example.com/", "https://192.168.0.1/", "http://both.test/"):
        with pytest.raises(InvalidField):
            await guarded.check(url)


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "http://example.com", "127.1", "a b", "*.example.com"])
def test_wrong_list_of_the_operator_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(ValueError, match="is no network"):
        GatewaySettings(webhook_allow=wrong)


async def test_unknown_name_is_refused_and_a_silent_name_service_is_not_the_clients_fault() -> None:
    with pytest.raises(InvalidField, match="by a name that the name service knows"):
        await targets().check("https://nowhere.test/")

    async def silent(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    await Targets(resolve=silent).check("https://example.com/")
    with pytest.raises(socket.gaierror):
        await Targets(resolve=silent).addresses(Target("example.com", 443, True))


async def test_real_name_service_finds_this_machine_and_it_is_refused() -> None:
    assert set(await Resolver()("localhost", 443)) <= {"127.0.0.1", "::1"}
    with pytest.raises(TargetRefused):
        await Targets().addresses(Target("localhost", 443, True))


async def test_connection_goes_to_the_address_that_was_checked() -> None:
    names, wire = Names(), Wire()
    network = GuardedNetwork(targets(names), secure=True, network=wire)
    names.rebinds = [[PUBLIC], ["127.0.0.1"]]
    with pytest.raises(httpcore.ConnectError, match="nobody there"):
        await network.connect_tcp("example.com", 443)
    assert wire.connected == [(PUBLIC, 443)]
    assert names.asked == ["example.com"]


async def test_name_that_leads_inside_by_the_time_of_sending_gets_no_connection() -> None:
    names, wire = Names(example_com=[PUBLIC]), Wire()
    guarded = targets(names)
    await guarded.check("https://example.com/hook")
    names.rebinds = [["127.0.0.1"]]
    courier = Courier(guarded, 5, network=wire)
    answer = await courier.post("https://example.com/hook", {}, b"{}")
    await courier.close()
    assert wire.connected == []
    assert answer.error is not None
    assert answer.error.startswith("not sent: webhooks go to a host with public addresses only")


async def test_every_address_is_tried_and_none_beside() -> None:
    wire = Wire()
    network = GuardedNetwork(targets(Names(example_com=[PUBLIC, "1.1.1.1"])), secure=True, network=wire)
    with pytest.raises(httpcore.ConnectError):
        await network.connect_tcp("example.com", 443)
    assert wire.connected == [(PUBLIC, 443), ("1.1.1.1", 443)]


async def test_sender_asks_tls_for_the_name_of_the_url(tmp_path: Path) -> None:
    asked: list[str | None] = []
    server_tls = certified(tmp_path, "hooks.test")
    server_tls.sni_callback = lambda _socket, name, _context: asked.append(name)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()

    async with listening(answer, server_tls) as port:
        names = Names(hooks_test=["127.0.0.1"], other_test=["127.0.0.1"])
        client_tls = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        courier = Courier(targets(names, "127.0.0.1"), 5, tls=client_tls)
        assert (await courier.post(f"https://hooks.test:{port}/", {}, b"{}")).status == 204
        refused = await courier.post(f"https://other.test:{port}/", {}, b"{}")
        await courier.close()
    assert "certificate" in (refused.error or "").lower()
    assert asked == ["hooks.test", "other.test"]


async def test_redirect_is_not_followed() -> None:
    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
        writer.write(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /inside\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    requests: list[bytes] = []
    async with listening(redirect) as port:
        courier = Courier(targets(allow="127.0.0.0/8"), 5)
        answer = await courier.post(f"http://127.0.0.1:{port}/hook", {}, b"{}")
        await courier.close()
    assert (answer.status, answer.arrived, requests) == (307, False, [b"/hook"])


async def test_receiver_that_never_answers_is_left_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass

    async with listening(silent) as port:
        courier = Courier(targets(allow="127.0.0.0/8"), 0.2)
        answer = await courier.post(f"http://127.0.0.1:{port}/", {}, b"{}")
        await courier.close()
    assert answer.error == "no answer within 0.2 s"


@asynccontextmanager
async def listening(handle: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The loopback port of a server; in the end all its connections are closed."""
    handling: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        await handle(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*handling)


async def test_native_request_is_refused_with_its_field(settings: GatewaySettings, worker: object) -> None:
    app = create_app(settings, targets=targets())
    async with app.router.lifespan_context(app), client_of(app) as client:
        refused = await ask(client, "http://169.254.169.254/latest/meta-data")
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "webhook.url")
        assert (await ask(client, "https://example.com/hook")).status_code == 202


async def ask(client: httpx.AsyncClient, url: str) -> httpx.Response:
    return await client.post("/v1/generations", json={"model": "tiny", "prompt": "x", "webhook": {"url": url}})


def certified(folder: Path, name: str) -> ssl.SSLContext:
    """The side of a server that has a certificate of its own making for this name."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    made = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    arguments = ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*made.split(), *arguments], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context
