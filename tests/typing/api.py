"""What checks under mypy --strict and pyright, and what must not; never run, see test_typing.py.

A line marked `# error: <mypy's codes> / <pyright's rules>` must be an error for both, any other line for none. Modules
of the package are used as a user would: by public names only.
"""

import logging
import queue
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import assert_type

import offload


def add(a: int, b: int = 0) -> str:
    return str(a + b)


async def fetch(url: str) -> bytes:
    return url.encode()


def select(db: sqlite3.Connection, number: int) -> float:
    return float(db.execute("select ?", (number,)).fetchone()[0])


async def later(db: sqlite3.Connection, number: int) -> float:
    return select(db, number)


async def calls(thread: offload.LoopThread) -> None:
    assert_type(thread.call(add, 1), offload.Call[str])
    assert_type(await thread.call(add, 1, b=2), str)
    assert_type(await thread.run(fetch, "url"), bytes)
    assert_type(thread.submit(add, 1), Future[str])
    assert_type(thread.submit(add, 1).result(1.0), str)
    assert_type(thread.options(timeout=1.0, on_cancel="abandon", nowait=True), offload.Calls)
    assert_type(await thread.options(timeout=1.0).call(add, 1), str)
    assert_type(thread.stats().queued, int)
    executor: Executor = thread
    print(executor)
    await thread.call(add, "1")  # error: arg-type / reportArgumentType
    await thread.call(add)  # error: call-arg / reportCallIssue
    await thread.call(add, 1, c=2)  # error: call-arg / reportCallIssue
    await thread.run(add, 1)  # error: arg-type / reportArgumentType
    await thread.run(fetch, 1)  # error: arg-type / reportArgumentType
    thread.submit(add, None)  # error: arg-type / reportArgumentType
    thread.options(on_cancel="kill")  # error: arg-type / reportArgumentType
    thread.options(1.0)  # error: misc,call-arg / reportCallIssue
    thread.misspelt()  # error: attr-defined / reportAttributeAccessIssue
    async with thread.exclusive() as span:
        assert_type(await span.call(add, 1), str)
        await span.call(add, "1")  # error: arg-type / reportArgumentType


async def callbacks(thread: offload.LoopThread, vendor: Callable[[Callable[[int], None]], None]) -> None:
    def seen(value: int) -> str:
        return str(value)

    assert_type(thread.callback(seen)(1), None)
    vendor(thread.callback(seen))
    vendor(thread.callback(fetch))  # error: arg-type / reportArgumentType
    thread.callback(seen)("1")  # error: arg-type / reportArgumentType


async def resources(path: str) -> None:
    resource = offload.Resource(lambda: sqlite3.connect(path), interrupt=sqlite3.Connection.interrupt)
    assert_type(resource, offload.Resource[sqlite3.Connection])
    async with resource as db:
        assert_type(db, offload.Handle[sqlite3.Connection])
        assert_type(await db.call(sqlite3.Connection.execute, "select 1"), sqlite3.Cursor)
        assert_type(await db.call(select, 1), float)
        assert_type(await db.run(later, number=1), float)
        assert_type(db.submit(select, 1).result(), float)
        assert_type(await db.call(lambda c: c.total_changes), int)
        assert_type([item async for item in db.iter(lambda c: [c.total_changes], chunk=10)], list[int])
        assert_type(db.options(timeout=1.0), offload.Handle[sqlite3.Connection])
        await db.call(select, "1")  # error: arg-type / reportArgumentType
        await db.call(select)  # error: call-arg / reportCallIssue
        await db.call(sqlite3.Connection.execute, 5)  # error: arg-type / reportArgumentType
        await db.call(queue.Queue.get)  # error: arg-type / reportArgumentType
        await db.call(lambda c: c.misspelt)  # error: attr-defined,misc / reportAttributeAccessIssue
        await db.run(select, 1)  # error: arg-type / reportArgumentType
        db.execute("select 1")  # error: attr-defined / reportAttributeAccessIssue
        async with db.exclusive() as tx:
            assert_type(tx, offload.Handle[sqlite3.Connection])
    offload.Resource(lambda: 1, interrupt=sqlite3.Connection.interrupt)  # error: misc / reportArgumentType
    offload.Resource(lambda: 1, restart="often")  # error: arg-type / reportArgumentType
    with resource as plain:
        assert_type(plain.submit(select, 1).result(), float)


class Port(offload.Service):
    """A port.

    It reads.
    """

    @offload.method
    def read(self, size: int, *, exactly: bool = False) -> bytes:
        return b"" * size if exactly else b""

    @offload.method
    async def line(self, number: int) -> str:
        assert_type(await self.read(number), bytes)
        return ""


async def services() -> None:
    async with Port() as port:
        assert_type(port, Port)
        assert_type(port.read(5), offload.Call[bytes])
        assert_type(await port.read(5, exactly=True), bytes)
        assert_type(await port.line(5), str)
        assert_type(await port.read.options(timeout=1.0)(5), bytes)
        await port.read("5")  # error: arg-type / reportArgumentType
        await port.read()  # error: call-arg / reportCallIssue
        await port.line("5")  # error: arg-type / reportArgumentType
        await port.read(5, exact=True)  # error: call-arg / reportCallIssue
        port.read(5).upper()  # error: attr-defined / reportAttributeAccessIssue


async def files(path: str) -> None:
    async with offload.FileSink(path, overflow="drop", fsync="interval", rotate=offload.Rotation(max_bytes=10)) as sink:
        assert_type(sink, offload.FileSink)
        assert_type(await sink.write("text"), None)
        assert_type(await sink.write(bytearray(b"bytes")), None)
        assert_type(sink.commit(), offload.Call[None])
        assert_type(sink.submit_flush(fsync=True), Future[None])
        assert_type(sink.stats().dropped, int)
        await sink.write(5)  # error: arg-type / reportArgumentType
        sink.commit().upper()  # error: attr-defined / reportAttributeAccessIssue
        await sink.flush(True)  # error: misc,call-arg / reportCallIssue
    with offload.FileSink(path) as plain:
        assert_type(plain, offload.FileSink)
    offload.FileSink(path, overflow="block")  # error: arg-type / reportArgumentType
    offload.FileSink(path, fsync="often")  # error: arg-type / reportArgumentType
    offload.FileSink(path, "w")  # error: misc,call-arg / reportCallIssue
    async with offload.PacketWriter(path) as writer:
        assert_type(await writer.write("line", "source"), None)
        await writer.write(1, "source")  # error: arg-type / reportArgumentType
    async with offload.PacketReader(path) as reader:
        assert_type([frame.packets() async for frame in reader], list[list[bytes]])
        for packet in reader:  # error: attr-defined / reportGeneralTypeIssues,reportAttributeAccessIssue
            print(packet)
    async with offload.open(path) as text:
        assert_type(await text.read(), str)
        assert_type([line async for line in text], list[str])
        await text.write(b"bytes")  # error: arg-type / reportArgumentType
    async with offload.open(path, "rb") as binary:
        assert_type(await binary.read(), bytes)
    opened = await offload.open(path, "w")
    assert_type(await opened.write("text"), int)
    await offload.open(path, 5)  # error: call-overload / reportCallIssue,reportArgumentType
    logging.getLogger().addHandler(offload.LogHandler(path, level="INFO"))


async def streams(path: str, secret: bytes) -> None:
    async def echo(connection: offload.Connection) -> None:
        async for packet in connection:
            assert_type(packet, offload.Packet)
            await connection.send(packet.payload)

    limits = offload.Limits(connections=10, idle=None)
    framing = partial(offload.PrefixFramer, ">HI", digest="sha256")
    async with offload.PacketServer(echo, framing=framing, limits=limits, secret=secret, max_packet=10) as server:
        address = await server.listen("127.0.0.1:0", tls=offload.server_context(path, path))
        assert_type(address, str)
        assert_type(server.stats, offload.ServerStats)
        async with offload.connect(address, offload.LineFramer, tls=offload.client_context(path)) as connection:
            assert_type(await connection.batch(), list[offload.Packet])
            assert_type(await connection.packet(), offload.Packet | None)
            await connection.send("text")  # error: arg-type / reportArgumentType
        await server.listen(7000)  # error: arg-type / reportArgumentType
    fanout = offload.Fanout(offload.OctetFramer())
    with fanout.subscribe("drop-oldest") as subscription:
        print(await subscription.batch())
    fanout.subscribe("drop")  # error: arg-type / reportArgumentType
    offload.PacketServer(print)  # error: arg-type / reportArgumentType
    offload.PrefixFramer(on_error="ignore")  # error: arg-type / reportArgumentType
    offload.Limits(10)  # error: misc,call-arg / reportCallIssue
    assert_type(offload.OctetFramer().feed(b"3 abc"), list[offload.Packet])
    async with offload.Send([path], "host:7000", name="me") as send:
        assert_type((await send.run()).lines, int)
    offload.Send([path], "host:7000")  # error: call-arg / reportCallIssue


async def merges(paths: list[str], out: str) -> None:
    async with offload.merge(paths, out, follow=True, fsync="always") as merge:
        assert_type(merge, offload.EmbeddedMerge)
        assert_type(await merge.caught_up(), None)
        assert_type(await merge.run(), offload.Progress)
        assert_type(merge.progress.lag_bytes, int)
        merge.reconfigure(sources=offload.Sources(paths), linger=5)
        merge.reconfigure(lingre=5)  # error: call-arg / reportCallIssue
    offload.merge(paths)  # error: call-arg / reportCallIssue
    offload.merge(paths, out, fsync="often")  # error: arg-type / reportArgumentType
    positions: dict[str, str] = {}
    async for batch in offload.tail(paths, follow=True, resume=positions):
        assert_type(batch, offload.Batch)
        assert_type(batch.lines, list[bytes])
        positions[batch.source] = batch.position
        batch.lines.append("text")  # error: arg-type / reportArgumentType
    await offload.tail(paths).aclose()
    offload.tail(paths, resume=positions.values())
    offload.tail(paths, resume=5)  # error: arg-type / reportArgumentType
    for _ in offload.tail(paths):  # error: attr-defined / reportGeneralTypeIssues,reportAttributeAccessIssue
        pass


async def checks(packet: bytes, handler: Callable[[offload.Connection], Awaitable[object]]) -> None:
    async with offload.Verifier("sha256", workers="threads") as digests:
        assert_type(digests, offload.Verifier[bytes])
        assert_type(digests.check(packet, packet), offload.Check[offload.Verdict[bytes]])
        assert_type(await digests.digest(packet), bytes)
        assert_type((await digests.check(packet, packet)).found, bytes)
        assert_type(digests.submit(packet), Future[bytes])
        assert_type(digests.stats(), offload.VerifierStats)
        await digests.room()
        digests.check("text", packet)  # error: arg-type / reportArgumentType
        digests.check(packet)  # error: call-arg / reportCallIssue
        offload.PacketServer(handler, framing=partial(offload.PrefixFramer, digest="sha256"), verifier=digests)
    with offload.Verifier(len) as sizes:
        assert_type(sizes, offload.Verifier[int])
        assert_type(sizes.submit(packet, 5).result(), offload.Verdict[int])
        offload.PacketServer(handler, verifier=sizes)  # error: arg-type / reportArgumentType
    assert_type(offload.Digest("sha256", key=packet)(packet), bytes)
    offload.Verifier("sha256", workers="thread")  # error: call-overload / reportCallIssue,reportArgumentType


def errors(call: offload.Call[int]) -> None:
    assert_type(call.state, offload.CallState)
    try:
        raise offload.ClosedResourceError("a closed file is a ValueError, as in io")
    except ValueError as error:
        closed: Exception = error
    problems: list[offload.OffloadError] = [
        offload.BrokenResourceError(""),
        offload.BusyResourceError(""),
        offload.ClosedResourceError(""),
        offload.DeadlockError(""),
        offload.ForkedError(""),
        offload.QueueFullError(""),
    ]
    print(closed, problems)
    call.result(1.0)  # error: call-arg / reportCallIssue


print(offload.Misspelt)  # error: attr-defined / reportAttributeAccessIssue
