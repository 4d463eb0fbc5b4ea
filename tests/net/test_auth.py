"""Who gets in: TLS with client certificates, and the HMAC challenge. Nobody else gets a byte in or out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import struct
from pathlib import Path

import pytest

from offload.errors import BrokenResourceError, ClosedResourceError, OffloadError
from offload.net.auth import client_context, respond, server_context
from offload.net.client import RefusedError, Send
from offload.net.connection import Connection
from offload.net.dial import connect
from offload.net.limits import Limits
from offload.net.server import PacketServer
from offload.packets.framing import LineFramer, OctetFramer, PrefixFramer

SECRET = b"sixteen bytes or more"


class Handler:
    """An echo that remembers what it got, and from whom."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []

    async def __call__(self, connection: Connection) -> None:
        async for packet in connection:
            self.got.append((connection.name, packet.payload))
            await connection.send(b"secret answer to " + packet.payload)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def received(connection: Connection) -> list[bytes]:
    """Everything that comes until the connection ends, however it does."""
    got: list[bytes] = []
    with contextlib.suppress(OffloadError):
        got += [packet.payload async for packet in connection]
    return got


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_client_with_a_certificate_is_known_by_its_name(certificates: Path, tmp_path: Path) -> None:
    """Over TLS with certificates on both sides packets pass, large ones too, and the client has its name."""
    handler = Handler()
    tls = server_context(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    mine = client_context(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
    payloads = [b"x" * size for size in (1, 1000, 300_000, 1_000_000)]
    async with PacketServer(handler, max_packet=2 << 20) as server:
        for address in ("127.0.0.1:0", f"unix:{tmp_path}/socket"):
            address = await server.listen(address, tls=tls)
            async with connect(address, PrefixFramer, tls=mine, max_packet=2 << 20) as connection:
                for payload in payloads:
                    await connection.send(payload)
                    packet = await connection.packet()
                    assert packet is not None
                    assert packet.payload == b"secret answer to " + payload
                assert connection.certificate is not None
    assert handler.got == [("client", payload) for payload in payloads] * 2


@pytest.mark.parametrize("who", ["nobody", "stranger"])
async def test_client_without_the_right_certificate_gets_nothing(who: str, certificates: Path) -> None:
    """Without a certificate of the right CA no byte of a packet gets in or out."""
    handler = Handler()
    tls = server_context(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    mine = client_context(
        certificates / "ca.pem",
        None if who == "nobody" else certificates / f"{who}.pem",
        None if who == "nobody" else certificates / f"{who}.key",
    )
    got: list[bytes] = []
    async with PacketServer(handler) as server:
        address = await server.listen("127.0.0.1:0", tls=tls)
        # With TLS 1.3 a client hears of it after the handshake, as soon as it reads.
        with contextlib.suppress(OSError, OffloadError):
            async with connect(address, PrefixFramer, tls=mine) as connection:
                await connection.send(b"let me in")
                got = await received(connection)
    assert (got, handler.got, server.stats.accepted) == ([], [], 0)


async def test_plain_bytes_at_a_tls_port_get_nothing(certificates: Path) -> None:
    """A client that does not speak TLS is closed, and the handler never sees it."""
    handler = Handler()
    tls = server_context(certificates / "server.pem", certificates / "server.key")
    async with PacketServer(handler) as server:
        port = port_of(await server.listen("127.0.0.1:0", tls=tls))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(struct.pack("!I", 5) + b"hello")
        answer = await reader.read()
        assert b"secret" not in answer
        writer.close()
        await writer.wait_closed()
    assert (handler.got, server.stats.accepted) == ([], 0)


@pytest.mark.parametrize(("ca", "hostname"), [("other", None), ("ca", "example.org")])
async def test_client_checks_the_server(ca: str, hostname: str | None, certificates: Path) -> None:
    """A server with a certificate of another CA, or for another name, gets nothing from the client."""
    handler = Handler()
    tls = server_context(certificates / "server.pem", certificates / "server.key")
    async with PacketServer(handler) as server:
        address = await server.listen("127.0.0.1:0", tls=tls)
        mine = client_context(certificates / f"{ca}.pem")
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connect(address, PrefixFramer, tls=mine, server_hostname=hostname):
                pass
    assert handler.got == []


async def test_silent_client_does_not_keep_a_handshake_open(certificates: Path) -> None:
    """A client that never begins the handshake is closed after its limit."""
    tls = server_context(certificates / "server.pem", certificates / "server.key")
    async with PacketServer(Handler(), limits=Limits(handshake=0.1)) as server:
        port = port_of(await server.listen("127.0.0.1:0", tls=tls))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_unfinished_handshakes_count_as_connections(certificates: Path) -> None:
    """Clients that only begin a TLS handshake cannot be more than the limit of connections; then others get in."""
    tls = server_context(certificates / "server.pem", certificates / "server.key")
    mine = client_context(certificates / "ca.pem")
    async with PacketServer(Handler(), limits=Limits(connections=2)) as server:
        address = await server.listen("127.0.0.1:0", tls=tls)
        async with contextlib.AsyncExitStack() as stack:
            silent = [await asyncio.open_connection("127.0.0.1", port_of(address)) for _ in range(3)]
            for _, writer in silent:
                stack.callback(writer.close)
            closed = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
            done, _ = await asyncio.wait(closed, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1
            assert (server.stats.refused, server.stats.open) == (1, 2)
        await asyncio.wait(closed)
        for task in closed:
            task.exception()
        while server.stats.open:  # noqa: ASYNC110 - has no event
            await asyncio.sleep(0.001)
        async with connect(address, PrefixFramer, tls=mine) as connection:
            await connection.send(b"in")
            assert await connection.packet() is not None
    assert (server.stats.refused, server.stats.accepted) == (3, 1)


async def test_client_that_leaves_within_the_handshake_is_forgotten(
    certificates: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that goes in the middle of the TLS handshake leaves nothing behind, and the log says why it failed."""
    caplog.set_level(logging.INFO, "offload")
    tls = server_context(certificates / "server.pem", certificates / "server.key")
    async with PacketServer(Handler()) as server:
        port = port_of(await server.listen("127.0.0.1:0", tls=tls))
        for begin in (b"", b"\x16\x03\x01\x02\x00\x01"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begin)
            await asyncio.sleep(0)
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(30):
            while server.stats.refused < 2 or server.connections:  # noqa: ASYNC110 - has no event
                await asyncio.sleep(0.001)
    assert server.stats.open == 0
    assert caplog.text.count("TLS handshake failed") == 2


# --- the challenge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", [PrefixFramer, OctetFramer, LineFramer])
async def test_who_knows_the_secret_gets_in(framing: type[PrefixFramer]) -> None:
    """With the secret, packets pass, up to the usual size, in every framing."""
    handler = Handler()
    server = PacketServer(handler, framing=framing, secret=SECRET)
    async with server, connect(await server.listen("127.0.0.1:0"), framing, secret=SECRET) as connection:
        await connection.send(b"x" * 100_000)
        packet = await connection.packet()
        assert packet is not None
        assert packet.payload == b"secret answer to " + b"x" * 100_000
    assert len(handler.got) == 1
    assert server.stats.refused == 0


INTRUDERS = {
    "another secret": None,
    "no answer, packets at once": [b"let me in"],
    "no words": [b"offload-response"],
    "wrong word": [b"offload-welcome a b"],
    "wrong digest": [b"offload-response 00 " + b"0" * 64],
    "digest that is no ASCII": [b"offload-response 00 \xff\xfe"],
    "huge": [b"offload-response 00 " + b"0" * 100_000],
}


@pytest.mark.parametrize("name", INTRUDERS)
async def test_who_does_not_know_the_secret_gets_nothing(name: str) -> None:
    """Without the secret no packet reaches the handler, and nothing comes back but the question, and perhaps a no."""
    handler = Handler()
    async with PacketServer(handler, secret=SECRET) as server:
        async with connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
            packets = INTRUDERS[name]
            if packets is None:
                with pytest.raises(BrokenResourceError, match=r"does not know the secret|broke"):
                    await respond(connection, b"another secret, as long")
                got = []
            else:
                for packet in packets:
                    await connection.send(packet)
                await connection.send(b"packet behind")
                got = await received(connection)
        words = [word.split(b" ")[0] for word in got]
        assert words in ([], [b"offload-challenge"], [b"offload-challenge", b"offload-refused"])
    assert handler.got == []
    assert (server.stats.refused, server.stats.open) == (1, 0)


async def test_stranger_gets_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Before the answer a packet may have 256 bytes: who has not said who it is cannot fill the memory."""
    caplog.set_level(logging.INFO, "offload")
    async with PacketServer(Handler(), secret=SECRET) as server:
        async with connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
            await connection.send(bytes(257))
            await received(connection)
        assert server.budget.peak < 1000
    assert "packet is 257 bytes, limit is 256" in caplog.text


async def test_answer_of_one_connection_is_none_for_another() -> None:
    """An answer that was overheard does not open another connection: each has a question of its own."""
    handler = Handler()
    overheard: list[bytes] = []
    async with PacketServer(handler, secret=SECRET) as server:
        address = await server.listen("127.0.0.1:0")
        async with connect(address, PrefixFramer) as connection:
            send = connection.send

            async def listened(payload: bytes) -> None:
                overheard.append(payload)
                await send(payload)

            connection.send = listened  # type: ignore[method-assign,assignment]
            await respond(connection, SECRET)
        async with connect(address, PrefixFramer) as connection:
            await connection.send(overheard[0])
            assert [word.split(b" ")[0] for word in await received(connection)] == [
                b"offload-challenge",
                b"offload-refused",
            ]
    assert server.stats.refused == 1


async def test_server_that_does_not_know_the_secret_is_found_out() -> None:
    """A server that asks and does not know is refused, and so is one that does not ask, or mirrors our own answer."""

    async def impostor(connection: Connection) -> None:
        await connection.send(b"offload-challenge " + b"0" * 64)
        packet = await connection.packet()
        assert packet is not None
        await connection.send(b"offload-welcome " + packet.payload.split(b" ")[2])
        await connection.batch()

    async def open_to_all(connection: Connection) -> None:
        await connection.send(b"welcome everybody")
        await connection.batch()

    for handler, message in ((impostor, "does not know the secret"), (open_to_all, "asks for no secret")):
        server = PacketServer(handler)
        async with server, connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
            with pytest.raises(BrokenResourceError, match=message):
                await respond(connection, SECRET)


async def test_silence_is_no_answer() -> None:
    """A client that does not answer the challenge is closed after the handshake's limit."""
    server = PacketServer(Handler(), secret=SECRET, limits=Limits(handshake=0.05))
    async with server, connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
        assert len(await received(connection)) == 1
    assert server.stats.refused == 1


async def test_send_with_a_wrong_secret_is_refused_for_good(tmp_path: Path) -> None:
    """`Send` tells a wrong secret from a broken connection: trying again would not help."""
    async with PacketServer(Handler(), secret=SECRET) as server:
        address = await server.listen("127.0.0.1:0")
        with pytest.raises(RefusedError, match="does not know the secret"):
            await Send([str(tmp_path)], address, name="me", secret=b"another secret, as long").start()


@pytest.mark.parametrize("asked", [False, True])
async def test_send_to_a_server_that_ends_amid_the_handshake_tries_again(tmp_path: Path, asked: bool) -> None:
    """A server that is killed then has not refused: `Send` tells of a connection that broke."""

    async def dies(connection: Connection) -> None:
        if asked:
            await connection.send(b"offload-challenge " + b"0" * 64)
            await connection.packet()
        connection.abort()

    async with PacketServer(dies) as server:
        address = await server.listen("127.0.0.1:0")
        with pytest.raises(BrokenResourceError) as told:
            await Send([str(tmp_path)], address, name="me", secret=SECRET).start()
    assert not isinstance(told.value, RefusedError)


def test_short_secret_is_refused() -> None:
    """A secret under 16 bytes could be guessed."""
    with pytest.raises(ValueError, match="secret is 5 bytes, expected at least 16"):
        PacketServer(Handler(), secret=b"short")


async def test_closed_connection_says_so() -> None:
    """Sending on a connection that was closed here is an error of ours, not a broken pipe."""
    server = PacketServer(Handler())
    async with server, connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
        await connection.aclose()
        with pytest.raises(ClosedResourceError, match="is closed"):
            await connection.send(b"late")
