"""Digests checked by a Verifier between the framer and the handler: off the loop, in order, within the same bounds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from offload.errors import PacketError
from offload.net.checks import CHECK_BYTES
from offload.net.connection import BATCH_PACKETS, Connection
from offload.net.dial import connect
from offload.net.limits import Limits
from offload.net.server import PacketServer
from offload.packets.framer import RECEIVE_BYTES
from offload.packets.framing import OctetFramer, PrefixFramer
from offload.verify import Verifier

PATIENCE = 30.0
SHA = partial(PrefixFramer, "!I", digest="sha256")
encode = SHA(max_packet=4 << 20).encode


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for is the kernel's, or another thread's
            await asyncio.sleep(0.001)


class Digests:
    """A sha256 that remembers where it ran, and stops at a packet that begins with "stop" until it is told to go on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.go = threading.Event()

    def __call__(self, packet: bytes) -> bytes:
        self.seen.append((len(packet), threading.get_ident()))
        if packet.startswith(b"stop"):
            assert self.go.wait(PATIENCE)
        return hashlib.sha256(packet).digest()


class Taker:
    """A handler that remembers what it took, and what ended it."""

    def __init__(self) -> None:
        self.took: list[bytes] = []
        self.error: Exception | None = None
        self.done = asyncio.Event()

    async def __call__(self, connection: Connection) -> None:
        try:
            async for packet in connection:
                self.took.append(packet.payload)
        except Exception as exc:
            self.error = exc
            raise
        finally:
            self.done.set()


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[Connection], Awaitable[object]], function: Any, **options: Any
) -> AsyncIterator[tuple[PacketServer, asyncio.StreamWriter, Verifier[bytes]]]:
    """A server with a verifier, and a plain client's writer."""
    count = options.pop("count", 2)
    async with Verifier(function, count=count) as verifier:
        async with PacketServer(handler, **{"framing": SHA, "verifier": verifier, **options}) as server:
            host, _, port = (await server.listen("127.0.0.1:0")).rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            try:
                yield server, writer, verifier
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        assert server.budget.used == server.budget.takeable == 0
        await until(lambda: verifier.stats().in_flight == 0)


async def test_large_packets_are_digested_on_other_threads() -> None:
    """From CHECK_BYTES up a packet is digested on the verifier's threads, below it is not; all reach the handler."""
    digests, taker = Digests(), Taker()
    sizes = [10, CHECK_BYTES, CHECK_BYTES - 1, 64 << 10, 0, 1 << 20, 100]
    async with serving(taker, digests) as (_, writer, _):
        for size in sizes:
            writer.write(encode(bytes(size)))
        writer.write_eof()
        await taker.done.wait()
    assert [len(payload) for payload in taker.took] == sizes
    assert sorted(size for size, _ in digests.seen) == [CHECK_BYTES, 64 << 10, 1 << 20]
    assert threading.get_ident() not in {thread for _, thread in digests.seen}


async def test_function_digests_packets_of_any_size_on_other_threads() -> None:
    """A digest that is a function may take any time: small packets go to the verifier too."""
    digests, taker = Digests(), Taker()
    plain: Callable[[bytes], bytes] = lambda packet: hashlib.sha256(packet).digest()  # noqa: E731
    framing = partial(PrefixFramer, "!I", digest=plain)
    async with serving(taker, digests, framing=framing) as (_, writer, _):
        writer.write(encode(b"one") + encode(b"two"))
        writer.write_eof()
        await taker.done.wait()
    assert taker.took == [b"one", b"two"]
    assert len(digests.seen) == 2
    assert threading.get_ident() not in {thread for _, thread in digests.seen}


async def test_packets_wait_for_those_before_them() -> None:
    """Packets behind a slow check are not given out before it, small ones that need none included."""
    digests, taker = Digests(), Taker()
    slow, others = b"stop" + bytes(CHECK_BYTES), [b"small", bytes(CHECK_BYTES), b"end"]
    async with serving(taker, digests) as (server, writer, _):
        writer.write(b"".join(map(encode, [b"first", slow, *others])))
        writer.write_eof()
        await until(lambda: len(digests.seen) == 2)
        await until(lambda: server.connections[0].ended)
        assert taker.took == [b"first"]
        digests.go.set()
        await taker.done.wait()
    assert taker.took == [b"first", slow, *others]


@pytest.mark.parametrize("behind", [b"", struct.pack("!I", 1 << 31), encode(b"x")[:-1] + b"?"])
async def test_wrong_digest_ends_the_stream_where_it_stands(behind: bytes) -> None:
    """What was before a wrong digest is taken, nothing behind it; its byte is told, though a later fault came first."""
    digests, taker = Digests(), Taker()
    good, wrong = encode(b"stop" + bytes(CHECK_BYTES)), bytearray(encode(bytes(2 * CHECK_BYTES)))
    wrong[-1] ^= 1
    async with serving(taker, digests) as (server, writer, _):
        writer.write(good + wrong + encode(bytes(CHECK_BYTES)) + encode(b"small") + behind)
        writer.write_eof()
        await until(lambda: bool(server.connections) and server.connections[0].ended)
        digests.go.set()
        await taker.done.wait()
        await until(lambda: server.stats.open == 0)
    assert taker.took == [b"stop" + bytes(CHECK_BYTES)]
    assert isinstance(taker.error, PacketError)
    assert taker.error.offset == len(good)
    found, stated = hashlib.sha256(bytes(2 * CHECK_BYTES)).hexdigest(), wrong[-32:].hex()
    assert str(taker.error).endswith(f"byte {len(good)}: digest is {found}, expected {stated}")
    assert (server.stats.bad, server.stats.skipped) == (1, 0)


async def test_wrong_digests_are_skipped_and_counted() -> None:
    """With on_error="skip" a wrong digest leaves its packet out, large or small; each is reported with its byte."""
    taker = Taker()
    faults: list[int] = []
    large, small = encode(bytes(CHECK_BYTES)), encode(b"small")
    stream = [large, large[:-1] + b"?", small, small[:-1] + b"?", large]
    options: dict[str, Any] = {"on_error": "skip", "on_fault": lambda exc: faults.append(exc.offset)}
    async with serving(taker, "sha256", **options) as (server, writer, _):
        writer.write(b"".join(stream))
        writer.write_eof()
        await taker.done.wait()
        await until(lambda: server.stats.open == 0)
    assert [len(payload) for payload in taker.took] == [CHECK_BYTES, 5, CHECK_BYTES]
    assert sorted(faults) == [len(large), 2 * len(large) + len(small)]
    assert (server.stats.skipped, server.stats.bad) == (2, 0)


@pytest.mark.parametrize("which", ["connection_bytes", "total_bytes"])
async def test_what_is_being_checked_counts_as_memory(which: str) -> None:
    """While checks are behind a sender is not read beyond the bound of its connection, and of all; then it goes on."""
    digests, taker = Digests(), Taker()
    size, bound = 50_000, 400_000
    payloads = [b"stop" + bytes(size), *(b"%8d" % n + bytes(size) for n in range(400))]
    async with serving(taker, digests, count=1, limits=Limits(**{which: bound})) as (server, writer, _):

        async def write() -> None:
            for payload in payloads:
                writer.write(encode(payload))
                await writer.drain()
            writer.write_eof()

        writing = asyncio.ensure_future(write())
        await until(lambda: bool(server.connections) and not server.connections[0].is_read)
        assert bound < server.budget.used <= bound + 2 * RECEIVE_BYTES + size
        assert not writing.done()
        assert taker.took == []
        digests.go.set()
        await writing
        await taker.done.wait()
    assert taker.took == payloads
    assert server.budget.peak <= bound + 5 * RECEIVE_BYTES


async def test_connection_full_of_wrong_packets_goes_on() -> None:
    """Packets that are skipped give their memory back, so that the right one behind them comes."""
    taker = Taker()
    wrong, right = encode(bytes(20_000))[:-1] + b"?", encode(b"right" + bytes(20_000))
    options: dict[str, Any] = {"on_error": "skip", "limits": Limits(connection_bytes=50_000)}
    async with serving(taker, "sha256", **options) as (server, writer, _):
        writer.write(wrong * 200 + right)
        writer.write_eof()
        await asyncio.wait_for(taker.done.wait(), PATIENCE)
        await until(lambda: server.stats.open == 0)
    assert taker.took == [b"right" + bytes(20_000)]
    assert server.stats.skipped == 200


async def test_checks_of_a_connection_that_ends_are_dropped() -> None:
    """What waits for a check when its handler ends is never looked at, and costs nobody memory."""
    digests = Digests()

    async def leave(connection: Connection) -> None:
        await until(lambda: connection.ended)

    async with serving(leave, digests, count=1) as (server, writer, _):
        writer.write(encode(b"stop" + bytes(CHECK_BYTES)))
        await until(lambda: len(digests.seen) == 1)
        writer.write(encode(bytes(CHECK_BYTES + 1)) * 20)
        writer.write_eof()
        await until(lambda: server.stats.accepted == 1 and server.stats.open == 0)
        assert server.budget.used == 0
        digests.go.set()
    assert len(digests.seen) == 1


async def test_drain_checks_what_has_come() -> None:
    """Packets that are under check when the server drains reach the handler."""
    digests, taker = Digests(), Taker()
    async with serving(taker, digests) as (server, writer, _):
        writer.write(encode(b"stop" + bytes(CHECK_BYTES)) + encode(bytes(CHECK_BYTES)))
        await until(lambda: len(digests.seen) == 2)
        draining = asyncio.ensure_future(server.drain(PATIENCE))
        await until(lambda: server.connections[0].ended)
        digests.go.set()
        await draining
    assert [len(payload) for payload in taker.took] == [CHECK_BYTES + 4, CHECK_BYTES]
    assert server.stats.cut == 0


async def test_verifier_that_is_closed_ends_connections(caplog: pytest.LogCaptureFixture) -> None:
    """A server whose verifier was closed under it says so to each connection that needs it."""
    caplog.set_level(logging.INFO, "offload")
    taker = Taker()
    async with serving(taker, "sha256") as (_, writer, verifier):
        await verifier.aclose()
        writer.write(encode(b"small") + encode(bytes(CHECK_BYTES)))
        await taker.done.wait()
    assert taker.took == [b"small"]
    assert "'verifier' is closed" in caplog.text


async def test_function_that_raises_ends_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """A verifier's function that raises is a mistake of the program: logged with its traceback."""

    def broken(packet: bytes) -> bytes:
        raise ZeroDivisionError(len(packet))

    taker = Taker()
    async with serving(taker, broken) as (_, writer, _):
        writer.write(encode(b"small") + encode(bytes(CHECK_BYTES)) * 3)
        writer.write_eof()
        await taker.done.wait()
    assert taker.took == [b"small"]
    assert isinstance(taker.error, ZeroDivisionError)
    assert [record.exc_info is not None for record in caplog.records if record.name == "offload"] == [True]


@pytest.mark.parametrize("header", ["<I", ">I", "<II", ">II"])
@pytest.mark.parametrize("digest", ["crc32", "md5"])
async def test_digest_of_the_same_name_is_the_same(header: str, digest: str) -> None:
    """A Verifier finds what the framing of the same digest states, behind the payload, before it, or in the header."""
    in_header = len(header) == 3
    if in_header and digest == "md5":
        header = header[0] + "I16s"
    taker = Taker()
    place: Any = 1 if in_header else "after"
    framing = partial(PrefixFramer, header, size_field=0, digest=digest, digest_place=place)
    async with serving(taker, digest, framing=framing) as (_, writer, _):
        writer.write(framing().encode(b"x" * CHECK_BYTES))
        writer.write_eof()
        await taker.done.wait()
    assert taker.error is None
    assert taker.took == [b"x" * CHECK_BYTES]


async def test_verifier_without_a_digest_is_a_mistake() -> None:
    """A framing that has no digest has nothing to verify."""
    with pytest.raises(ValueError, match=r"a verifier checks digests, and .*OctetFramer.* has none"):
        PacketServer(Taker(), framing=OctetFramer, verifier=Verifier("sha256"))


async def test_others_get_the_loop_between_batches() -> None:
    """Who takes many small packets without ever waiting takes BATCH_PACKETS at most before others run; none is lost."""
    order: list[int] = []
    go = asyncio.Event()

    async def handle(connection: Connection) -> None:
        await go.wait()
        asyncio.get_running_loop().call_soon(order.append, -1)
        while batch := await connection.batch():
            order.append(len(batch))
        go.clear()

    count = 2 * BATCH_PACKETS + 10
    async with (
        PacketServer(handle) as server,
        connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection,
    ):
        connection.write_frames([struct.pack("!I", 0)] * count)
        connection.send_eof()
        await until(lambda: bool(server.connections) and server.connections[0].ended)
        go.set()
        await until(lambda: not go.is_set())
    assert order == [BATCH_PACKETS, -1, BATCH_PACKETS, 10]
    assert server.budget.used == 0
