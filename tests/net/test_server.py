"""The server on real sockets: order, bounds of memory, time and number, faults that harm nobody else, draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import select
import socket
import struct
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BrokenResourceError, ClosedResourceError, PacketError
from offload.net.connection import Connection
from offload.net.dial import connect, parse_address
from offload.net.limits import Limits
from offload.net.server import _QUIET, PacketServer
from offload.packets.framer import RECEIVE_BYTES, Framer
from offload.packets.framing import LineFramer, OctetFramer, PrefixFramer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PATIENCE = 30.0  # seconds until something that must happen counts as hung


async def echo(connection: Connection) -> None:
    async for packet in connection:
        await connection.send(packet.payload)


@contextlib.asynccontextmanager
async def stream(address: str) -> AsyncIterator[Streams]:
    """A plain client."""
    place = parse_address(address)
    reader, writer = await (
        asyncio.open_unix_connection(place) if isinstance(place, str) else asyncio.open_connection(*place)
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def u32(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


async def u32_from(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    return await reader.readexactly(size)


async def gone(reader: asyncio.StreamReader) -> bool:
    """Wait until the server has ended the connection; whatever it sent before is passed over."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass
    return True


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until it holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for is the kernel's, and has no event
            await asyncio.sleep(0.001)


class Gate:
    """A handler that takes nothing until the gate is opened, and remembers what it took."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.took: list[bytes] = []

    async def handle(self, connection: Connection) -> None:
        await self.open.wait()
        async for packet in connection:
            self.took.append(packet.payload)


# --- packets in and out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing", [PrefixFramer, OctetFramer, LineFramer, partial(PrefixFramer, "<4sHI", size_field=2)]
)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_packets_come_back(framing: Callable[..., Framer], kind: str, tmp_path: Path) -> None:
    """An echo server gives back each packet, in order, over TCP and Unix sockets, whatever the framing."""
    fields = (b"echo", 7) if isinstance(framing, partial) else ()

    async def handle(connection: Connection) -> None:
        async for packet in connection:
            await connection.send(packet.payload, *fields)

    payloads = [b"one", b"two" * 1000, b"three"]
    async with PacketServer(handle, framing=framing) as server:
        address = await server.listen(f"unix:{tmp_path}/socket" if kind == "unix" else "127.0.0.1:0")
        async with connect(address, framing) as connection:
            for payload in payloads:
                await connection.send(payload, *fields)
            for payload in payloads:
                packet = await connection.packet()
                assert packet is not None
                assert packet.payload == payload
    assert not (tmp_path / "socket").exists()


async def test_random_cuts_on_many_connections_keep_each_ones_order() -> None:
    """Fifty connections at once, each stream cut anywhere: each gets its own packets back, all and in order."""

    async def client(address: str, seed: int) -> None:
        chance = random.Random(seed)
        payloads = [b"%d %d " % (seed, n) + chance.randbytes(chance.choice([0, 10, 3000, 50_000])) for n in range(30)]
        data = b"".join(map(u32, payloads))
        async with stream(address) as (reader, writer):

            async def write() -> None:
                at = 0
                while at < len(data):
                    end = at + chance.choice([1, 2, 3, 5, 100, 5000, 70_000])
                    writer.write(data[at:end])
                    await writer.drain()
                    at = end

            writing = asyncio.ensure_future(write())
            assert [await u32_from(reader) for _ in payloads] == payloads
            await writing

    async with PacketServer(echo) as server:
        address = await server.listen("127.0.0.1:0")
        await asyncio.gather(*(client(address, seed) for seed in range(50)))
    assert server.stats.accepted == 50
    assert server.budget.used == 0


async def test_half_open_sender_gets_its_answers() -> None:
    """A client that has ended its side still gets the answers to what it sent, then the end."""
    async with PacketServer(echo) as server, stream(await server.listen("127.0.0.1:0")) as (reader, writer):
        writer.write(u32(b"one") + u32(b"two"))
        writer.write_eof()
        assert await reader.read() == u32(b"one") + u32(b"two")


async def test_peer_names_itself() -> None:
    """A connection says where it comes from."""
    peers: list[tuple[str, str]] = []

    async def handle(connection: Connection) -> None:
        peers.append((connection.peer, connection.name))

    async with PacketServer(handle) as server, stream(await server.listen("127.0.0.1:0")) as (reader, writer):
        assert await gone(reader)
        host, port = writer.get_extra_info("sockname")
    assert peers == [(f"{host}:{port}", host)]


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_full_connection_is_not_read_and_others_are() -> None:
    """Over its bound a connection is not read until its handler takes; meanwhile others go on; nothing is lost."""
    gate = Gate()
    limits = Limits(connection_bytes=100_000)

    async def handle(connection: Connection) -> None:
        await (gate.handle(connection) if not server.stats.open > 1 else echo(connection))

    payloads = [b"%7d" % n + bytes(10_000) for n in range(2000)]
    async with PacketServer(handle, limits=limits) as server:
        address = await server.listen("127.0.0.1:0")
        async with stream(address) as (_, writer):

            async def write() -> None:
                for payload in payloads:
                    writer.write(u32(payload))
                    await writer.drain()
                writer.write_eof()

            writing = asyncio.ensure_future(write())
            await until(lambda: bool(server.connections) and not server.connections[0].is_read)
            assert server.connections[0].memory_bytes <= 100_000 + 5 * RECEIVE_BYTES
            async with stream(address) as (reader, other):
                other.write(u32(b"still here"))
                assert await u32_from(reader) == b"still here"
            assert not writing.done()
            gate.open.set()
            await writing
            await until(lambda: len(gate.took) == len(payloads))
    assert gate.took == payloads
    assert server.budget.peak <= 100_000 + 5 * RECEIVE_BYTES + 2 * 10_300
    assert server.budget.used == 0


async def test_total_bound_holds_over_all_connections() -> None:
    """Forty senders of as much as they can: together they hold what the total allows, then all of it arrives."""
    gate, total, each = Gate(), 2 << 20, 300_000
    limits = Limits(connection_bytes=1 << 20, total_bytes=total)
    async with PacketServer(gate.handle, limits=limits) as server:
        address = await server.listen("127.0.0.1:0")

        async def client(number: int) -> None:
            async with stream(address) as (reader, writer):
                for n in range(5):
                    writer.write(u32(b"%d %d " % (number, n) + bytes(each)))
                    await writer.drain()
                writer.write_eof()
                assert await reader.read() == b""

        tracemalloc.start()
        try:
            clients = [asyncio.ensure_future(client(number)) for number in range(40)]
            await until(lambda: server.stats.open == 40 and all(not c.is_read for c in server.connections))
            held = [t for t in tracemalloc.take_snapshot().traces if "offload/packets" in t.traceback[0].filename]
            assert server.budget.used <= total + 2 * RECEIVE_BYTES + 2 * each
            assert sum(trace.size for trace in held) <= 1.2 * server.budget.used + (1 << 20)
        finally:
            tracemalloc.stop()
        gate.open.set()
        await asyncio.gather(*clients)
    by_client: dict[bytes, list[bytes]] = {}
    for payload in gate.took:
        client_number, n, _ = payload.split(b" ", 2)
        by_client.setdefault(client_number, []).append(n)
    assert len(by_client) == 40
    assert all(numbers == [b"0", b"1", b"2", b"3", b"4"] for numbers in by_client.values())
    assert server.budget.used == 0


async def test_a_crowd_of_half_packets_does_not_stop_itself() -> None:
    """When packets under way alone fill the total, one at a time goes on: all are whole in the end."""
    total, size, count = 400_000, 100_000, 30
    limits = Limits(total_bytes=total)
    async with PacketServer(echo, limits=limits) as server:
        address = await server.listen("127.0.0.1:0")
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream(address)) for _ in range(count)]
            for number, (_, writer) in enumerate(streams):
                writer.write(u32(b"%3d" % number + bytes(size - 3))[: size // 2])
                await writer.drain()
            await until(lambda: any(not c.is_read for c in server.connections))
            peak = server.budget.used
            for _, writer in streams:
                writer.write(bytes(size + 4 - size // 2))
            for number, (reader, _) in enumerate(streams):
                assert (await u32_from(reader))[:3] == b"%3d" % number
        assert peak <= total + 2 * RECEIVE_BYTES
    assert server.budget.peak <= total + 2 * RECEIVE_BYTES + 2 * size
    assert server.budget.used == 0


async def test_one_connection_too_many_is_closed_at_once() -> None:
    """Over the limit of connections a new one is closed and counted; when one leaves, the next is taken."""
    async with PacketServer(echo, limits=Limits(connections=2)) as server:
        address = await server.listen("127.0.0.1:0")
        async with stream(address) as (reader, writer):
            async with stream(address), stream(address) as (third, _):
                assert await gone(third)
            await until(lambda: server.stats.open == 1)
            async with stream(address) as (fourth, fourth_writer):
                fourth_writer.write(u32(b"in"))
                assert await u32_from(fourth) == b"in"
            writer.write(u32(b"still"))
            assert await u32_from(reader) == b"still"
    assert (server.stats.accepted, server.stats.refused) == (3, 1)


@pytest.mark.parametrize("begin", [b"", struct.pack("!I", 1000) + b"never whole"])
async def test_silent_connection_is_closed(begin: bytes) -> None:
    """A connection from which nothing comes is closed after the idle limit, also inside a packet; others stay."""
    async with PacketServer(echo, limits=Limits(idle=0.2)) as server:
        address = await server.listen("127.0.0.1:0")
        async with stream(address) as (reader, writer):
            writer.write(begin)
            await until(lambda: server.stats.accepted == 1)
            server.limits = Limits(idle=PATIENCE)  # of the next one: however slow we are, it is not overdue
            async with stream(address) as (busy, busy_writer):
                assert await gone(reader)
                begun = asyncio.get_running_loop().time()
                busy_writer.write(u32(b"here"))
                assert await u32_from(busy) == b"here"
                assert server.connections[-1].overdue(begun + PATIENCE) is None
    assert server.stats.overdue == 1


async def test_packet_that_never_ends_is_closed() -> None:
    """A sender that drips one byte after the other into the same packet is closed by the packet's limit of time."""
    server = PacketServer(echo, limits=Limits(packet=0.2))
    async with server, stream(await server.listen("127.0.0.1:0")) as (reader, writer):
        writer.write(struct.pack("!I", 1 << 20))
        leaving = asyncio.ensure_future(gone(reader))
        while not leaving.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b"x")
                await writer.drain()
            await asyncio.wait([leaving], timeout=0.01)
    assert server.stats.overdue == 1


async def test_idle_connection_without_a_limit_stays() -> None:
    """Between packets a connection may be silent for as long as it likes, if no idle limit is set."""
    server = PacketServer(echo, limits=Limits(packet=0.05))
    async with server, stream(await server.listen("127.0.0.1:0")) as (reader, writer):
        writer.write(u32(b"one"))
        assert await u32_from(reader) == b"one"
        (connection,) = server.connections
        assert connection.overdue(asyncio.get_running_loop().time() + 1000) is None
        writer.write(u32(b"two"))
        assert await u32_from(reader) == b"two"


async def test_time_while_we_do_not_read_is_not_the_peers() -> None:
    """A connection that is not read, because its handler is slow, is not overdue."""
    gate, short = Gate(), Limits(idle=0.05, packet=0.05, connection_bytes=1000)
    async with PacketServer(gate.handle, limits=short) as server:
        address = await server.listen("127.0.0.1:0")
        await asyncio.sleep(0)  # the server begins to look for who is overdue, as often as these limits ask
        server.limits = Limits(connection_bytes=1000)  # until it is full
        async with stream(address) as (_, writer):
            writer.write(u32(b"x" * 900) + u32(b"y" * 900) + b"\0")
            await until(lambda: bool(server.connections) and not server.connections[0].is_read)
            (connection,) = server.connections
            connection.limits = short
            assert connection.overdue(asyncio.get_running_loop().time() + 1000) is None
            gate.open.set()
            await until(lambda: connection.closed.done())  # now it is read, and silent
    assert gate.took == [b"x" * 900, b"y" * 900]


async def test_peer_that_never_reads_is_cut_off() -> None:
    """Who does not read what is sent to it is cut off after the send limit, and the handler is told."""
    told: list[str] = []
    done = asyncio.Event()

    async def flood(connection: Connection) -> None:
        try:
            while True:
                await connection.send(bytes(100_000))
        except BrokenResourceError as exc:
            told.append(str(exc))
            raise
        finally:
            done.set()

    async with PacketServer(flood, limits=Limits(send=0.2)) as server, stream(await server.listen("127.0.0.1:0")):
        await done.wait()
    assert len(told) == 1
    assert told[0].endswith("has read nothing for 0.2 s")


async def test_time_while_the_loop_stands_is_not_the_peers() -> None:
    """Who reads what is sent to it is not cut off, though we have not looked for longer than the send limit."""
    limit = 0.1
    async with PacketServer(echo, limits=Limits(send=limit)) as server:
        place = parse_address(await server.listen("127.0.0.1:0"))
        with socket.create_connection(place, 2 * limit) as peer:  # type: ignore[arg-type]

            def read_all() -> None:
                with contextlib.suppress(TimeoutError):  # the loop stands until nothing comes for twice the limit
                    while peer.recv(1 << 20):
                        pass

            await until(lambda: bool(server.connections))
            (connection,) = server.connections
            while connection._room is None:
                connection.write_frames([bytes(100_000)])
            sending = asyncio.ensure_future(connection.send(b"more"))
            asyncio.get_running_loop().call_soon(read_all)  # in the turn in which its time begins
            await sending
            assert not connection.closed.done()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bytes_sent", "reason"),
    [
        (struct.pack("!I", 1 << 31), "byte 0: packet is 2147483648 bytes, limit is 1048576"),
        (u32(b"good") + zeros if (zeros := b"\0\0\0\x01x" + bytes(16)) else b"", "byte 0: digest is"),
        (b"\0\0\0\x05abc", "byte 0: the stream ends inside a packet: 3 bytes of 21"),
    ],
    ids=["oversized", "wrong digest", "ended inside"],
)
async def test_bad_bytes_end_their_own_connection_only(
    bytes_sent: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that is none is closed with its reason in the log; a connection beside it notices nothing."""
    caplog.set_level(logging.INFO, "offload")
    framing = partial(PrefixFramer, "!I", digest="md5")
    async with PacketServer(echo, framing=framing) as server:
        address = await server.listen("127.0.0.1:0")
        async with connect(address, framing) as good, stream(address) as (reader, writer):
            writer.write(bytes_sent)
            writer.write_eof()
            assert await gone(reader)
            await good.send(b"fine")
            packet = await good.packet()
            assert packet is not None
            assert packet.payload == b"fine"
    assert server.stats.bad == 1
    assert reason in caplog.text


async def test_packets_before_the_fault_are_handled() -> None:
    """What was whole before the fault reaches the handler, then the fault itself with its offset."""
    took: list[bytes] = []
    faults: list[PacketError] = []

    async def handle(connection: Connection) -> None:
        try:
            async for packet in connection:
                took.append(packet.payload)
        except PacketError as exc:
            faults.append(exc)
            raise

    async with (
        PacketServer(handle, max_packet=10) as server,
        stream(await server.listen("127.0.0.1:0")) as (reader, writer),
    ):
        writer.write(u32(b"one") + u32(b"two") + u32(b"eleven byte") + u32(b"four"))
        assert await gone(reader)
    assert took == [b"one", b"two"]
    assert [fault.offset for fault in faults] == [14]


async def test_handler_that_raises_ends_its_own_connection(caplog: pytest.LogCaptureFixture) -> None:
    """What a handler raises is logged with its traceback, and the server goes on."""

    async def handle(connection: Connection) -> None:
        async for packet in connection:
            await connection.send(b"%d" % (1 // len(packet.payload)))

    async with PacketServer(handle) as server:
        address = await server.listen("127.0.0.1:0")
        async with stream(address) as (reader, writer):
            writer.write(u32(b""))
            assert await gone(reader)
        async with stream(address) as (reader, writer):
            writer.write(u32(b"x"))
            assert await u32_from(reader) == b"1"
    assert "ZeroDivisionError" in caplog.text


async def test_connection_reset_is_told_to_the_handler() -> None:
    """A peer that resets the connection ends the iteration with BrokenResourceError, behind what it sent."""
    gate = Gate()
    ended = asyncio.get_running_loop().create_future()

    async def handle(connection: Connection) -> None:
        try:
            await gate.handle(connection)
        except BrokenResourceError as exc:
            ended.set_result(exc)

    async with PacketServer(handle) as server:
        address = parse_address(await server.listen("127.0.0.1:0"))
        with socket.create_connection(address) as peer:  # type: ignore[arg-type]
            peer.sendall(u32(b"last words"))
            await until(lambda: any(c.memory_bytes for c in server.connections))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gate.open.set()
        assert "broke" in str(await ended)
    assert gate.took == [b"last words"]


async def test_end_is_sent_to_a_peer_that_is_gone() -> None:
    """A peer that has ended its side and is gone since: our end, which it cannot hear, is no error."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with connect(f"127.0.0.1:{listening.getsockname()[1]}", PrefixFramer) as connection:
            listening.accept()[0].close()
            assert await connection.packet() is None
            await connection.send(b"to nobody")
            assert connection._transport is not None
            poll = select.poll()
            poll.register(connection._transport.get_extra_info("socket"), 0)
            await until(lambda: bool(poll.poll(0)))  # its reset is there
            connection.send_eof()


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_drain_handles_what_was_sent_before() -> None:
    """Draining, the server lets handlers have every packet that peers had sent, then ends them; no new ones come in."""
    gate = Gate()
    server = PacketServer(gate.handle)
    address = await server.listen("127.0.0.1:0")
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(stream(address)) for _ in range(5)]
        await until(lambda: server.stats.open == 5)
        for number, (_, writer) in enumerate(streams):
            writer.write(b"".join(u32(b"%d %d" % (number, n)) for n in range(1000)) + b"\0\0\0\x05hal")
            await writer.drain()
        draining = asyncio.ensure_future(server.drain())
        gate.open.set()
        await draining
        assert all([await gone(reader) for reader, _ in streams])
        with pytest.raises(OSError, match="Connect call failed"):
            await stream(address).__aenter__()
    assert sorted(gate.took) == sorted(b"%d %d" % (number, n) for number in range(5) for n in range(1000))
    assert server.stats.cut == 0
    with pytest.raises(ClosedResourceError, match="make a new one"):
        await server.listen("127.0.0.1:0")


async def test_drain_reads_what_is_in_the_sockets() -> None:
    """What peers had sent and the server had not read yet when it was told to end is read and handled."""
    gate = Gate()
    gate.open.set()
    server = PacketServer(gate.handle)
    place = parse_address(await server.listen("127.0.0.1:0"))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(place)) for _ in range(5)]  # type: ignore[arg-type]
        await until(lambda: server.stats.open == 5)
        for peer in peers:  # the loop has no turn from here on
            peer.sendall(b"".join(u32(b"%d" % n) for n in range(1000)))
        await server.drain()
    assert len(gate.took) == 5000


@pytest.mark.parametrize("which", ["connection_bytes", "total_bytes"])
async def test_drain_reads_on_where_memory_was_short(which: str) -> None:
    """What a peer had sent to a connection that was not read, as memory was short, is read and handled too."""
    gate, sent = Gate(), [b"%3d" % n + bytes(1000) for n in range(400)]
    server = PacketServer(gate.handle, limits=Limits(**{which: 50_000}))
    place = parse_address(await server.listen("127.0.0.1:0"))
    with socket.create_connection(place, PATIENCE) as peer:  # type: ignore[arg-type]
        peer.sendall(b"".join(map(u32, sent)))
        await until(lambda: bool(server.connections) and not server.connections[0].is_read)
        asyncio.get_running_loop().call_later(3 * _QUIET, gate.open.set)  # amid the drain
        await server.drain(PATIENCE)
    assert gate.took == sent
    assert server.stats.cut == 0


async def test_what_is_not_read_is_not_quiet() -> None:
    """Time without bytes counts from where a connection is read again."""
    loop = asyncio.get_running_loop()
    async with PacketServer(echo) as server, connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
        connection.hold("total")
        waiting = asyncio.ensure_future(connection.quiet(0.05))
        await asyncio.wait([waiting], timeout=0.07)  # amid its second look
        assert not waiting.done()
        connection.let_go("total")
        begun = loop.time()
        await waiting
        assert loop.time() - begun > 0.049


async def test_drain_cuts_off_a_handler_that_does_not_end() -> None:
    """A handler that is still at work when the time is up is cancelled, and counted."""
    server = PacketServer(Gate().handle)
    async with stream(await server.listen("127.0.0.1:0")) as (reader, _):
        await until(lambda: server.stats.open == 1)
        await server.drain(0.05)
        assert await gone(reader)
    assert (server.stats.cut, server.stats.open) == (1, 0)


async def test_block_that_raises_closes_at_once() -> None:
    """An error in the server's block does not wait for handlers."""
    server = PacketServer(Gate().handle)

    async def block() -> None:
        async with server, stream(await server.listen("127.0.0.1:0")):
            await until(lambda: server.stats.open == 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await block()
    assert server.stats.open == 0


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [("host:1", ("host", 1)), ("[::1]:65535", ("::1", 65535)), (":0", ("", 0)), ("unix:/a b", "/a b")],
)
def test_addresses(text: str, place: object) -> None:
    """HOST:PORT, [IPV6]:PORT, :PORT and unix:PATH are addresses."""
    assert parse_address(text) == place


@pytest.mark.parametrize("text", ["", "host", "host:", "host:http", "host:65536", "host:-1", "unix:", "host:१"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """Anything else is no address."""
    with pytest.raises(ValueError, match="expected"):
        parse_address(text)


async def test_taken_address_is_an_os_error() -> None:
    """Listening where somebody else listens says so."""
    async with PacketServer(echo) as one, PacketServer(echo) as two:
        address = await one.listen("127.0.0.1:0")
        with pytest.raises(OSError, match="address already in use"):
            await two.listen(address)


async def test_unix_socket_in_use_is_not_taken_away(tmp_path: Path) -> None:
    """A Unix socket somebody listens on is in use; one left over from a killed server is not; each unlinks its own."""
    path = tmp_path / "socket"
    async with PacketServer(echo) as one, PacketServer(echo) as two:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
        await one.listen(f"unix:{path}")
        with pytest.raises(OSError, match="already in use"):
            await two.listen(f"unix:{path}")
        path.unlink()
        await two.listen(f"unix:{path}")
        await one.aclose()
        async with connect(f"unix:{path}", PrefixFramer) as connection:
            await connection.send(b"to the second")
            assert await connection.packet() is not None
    assert not path.exists()


async def test_dead_machines_are_asked_for() -> None:
    """The system asks a silent peer whether it lives: one that was unplugged does not stay for ever."""
    async with PacketServer(echo) as server, connect(await server.listen("127.0.0.1:0"), PrefixFramer) as connection:
        await until(lambda: bool(server.connections))
        for one in (connection, *server.connections):
            assert one._transport is not None
            sock = one._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"total_bytes": -1}, {"idle": 0.0}, {"handshake": float("nan")}])
def test_limits_that_let_nobody_in_are_refused(wrong: dict[str, Any]) -> None:
    """A limit of nothing is a mistake."""
    with pytest.raises(ValueError, match="expected more than 0"):
        Limits(**wrong)


async def test_skipped_packets_are_counted() -> None:
    """With on_error="skip" a wrong digest leaves its packet out, and the connection goes on."""
    framing = partial(PrefixFramer, "!I", digest="crc32")
    frame = framing().encode(b"good")
    async with PacketServer(echo, framing=framing, on_error="skip") as server:
        async with stream(await server.listen("127.0.0.1:0")) as (reader, writer):
            writer.write(frame + frame[:-1] + b"?" + frame)
            writer.write_eof()
            assert await reader.read() == frame * 2
        await until(lambda: server.stats.open == 0)
    assert (server.stats.skipped, server.stats.bad) == (1, 0)


# --- many -------------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


@pytest.mark.slow
async def test_ten_thousand_connections_in_turn() -> None:
    """Ten thousand connections one after the other leave nothing behind."""
    asyncio.get_running_loop().set_debug(False)  # a minute of its own, and about us it says nothing
    before = descriptors()
    async with PacketServer(echo) as server:
        place = parse_address(await server.listen("127.0.0.1:0"))
        loop = asyncio.get_running_loop()
        for number in range(10_000):
            with socket.socket() as peer:
                peer.setblocking(False)
                await loop.sock_connect(peer, place)
                await loop.sock_sendall(peer, u32(b"%d" % number))
                assert await loop.sock_recv(peer, 100) == u32(b"%d" % number)
                if number % 3 == 0:  # some leave in a hurry
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: server.stats.open == 0)
    assert server.stats.accepted == 10_000
    assert (server.budget.used, server.connections) == (0, [])
    assert descriptors() <= before + 1


@pytest.mark.slow
async def test_a_thousand_connections_at_once() -> None:
    """A thousand connections at once, good ones and bad ones: each good one gets its packets back, in order."""
    asyncio.get_running_loop().set_debug(False)
    limits = Limits(total_bytes=8 << 20, packet=None)
    ready, go = asyncio.Barrier(1001), asyncio.Event()

    async def good(address: str, seed: int) -> None:
        chance = random.Random(seed)
        payloads = [b"%d %d" % (seed, n) + bytes(chance.choice([0, 100, 5000])) for n in range(10)]
        data = b"".join(map(u32, payloads))
        async with stream(address) as (reader, writer):
            await ready.wait()
            at = 0
            while at < len(data):
                end = at + chance.choice([1, 3, 1000, 10_000])
                writer.write(data[at:end])
                await writer.drain()
                at = end
            assert [await u32_from(reader) for _ in payloads] == payloads

    async def bad(address: str, data: bytes) -> None:
        async with stream(address) as (reader, writer):
            await ready.wait()
            writer.write(data)
            if data[:1] != b"\0":
                assert await gone(reader)
            else:
                await go.wait()

    async with PacketServer(echo, limits=limits) as server:
        address = await server.listen("127.0.0.1:0")
        clients = [asyncio.ensure_future(good(address, seed)) for seed in range(700)]
        oversized = [asyncio.ensure_future(bad(address, b"\xff" * 1000)) for _ in range(150)]
        never = [asyncio.ensure_future(bad(address, b"\0\x0f\0\0" + bytes(1000))) for _ in range(150)]
        await ready.wait()
        await asyncio.gather(*clients, *oversized)
        go.set()
        await asyncio.gather(*never)
        await until(lambda: server.stats.open == 0)
    assert server.stats.accepted == 1000
    assert server.stats.bad == 300
    assert server.budget.peak <= limits.total_bytes + (1 << 20)
    assert server.budget.used == 0
