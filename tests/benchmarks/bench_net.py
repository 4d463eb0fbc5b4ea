"""Packet streams: framing alone, a server beside asyncio's own streams, and one sender to a hundred subscribers.

framing   bytes in memory, cut into 64 KiB as a socket gives them; against a reader that takes from a bytearray and
          deletes what it took, and against one that copies the rest of its buffer for each packet
server    a client on a thread of its own sends over loopback; the server counts; against asyncio.start_server with
          `readexactly` for the size and the packet
fan-out   one publisher, 100 connections that read; MB/s of all of them together
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

from measure import Figures, Options, Table, number, shuffled, tell

from offload import Connection, Fanout, LineFramer, OctetFramer, Packet, PacketServer, PrefixFramer

SIZES = (100, 4 << 10, 64 << 10, 1 << 20)
PIECE = 64 << 10
U32 = struct.Struct("!I")


def run(options: Options) -> list[Table]:
    return [framing(options), server(options), fan_out(options)]


def size_name(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


# --- framing ----------------------------------------------------------------------------------------------------------


def delete_what_was_taken(pieces: list[bytes]) -> int:
    buffer, packets = bytearray(), 0
    for piece in pieces:
        buffer += piece
        while len(buffer) >= 4 and len(buffer) >= (end := 4 + U32.unpack_from(buffer)[0]):
            bytes(buffer[4:end])
            del buffer[:end]
            packets += 1
    return packets


def copy_the_buffer(pieces: list[bytes]) -> int:
    buffer, packets = b"", 0
    for piece in pieces:
        buffer += piece
        while len(buffer) >= 4 and len(buffer) >= (end := 4 + U32.unpack_from(buffer)[0]):
            buffer = buffer[end:]
            packets += 1
    return packets


def framing(options: Options) -> Table:
    figures = Figures()
    framers = {"PrefixFramer, u32": PrefixFramer, "OctetFramer": OctetFramer, "LineFramer": LineFramer}
    others = {"bytearray, `del buffer[:n]`": delete_what_was_taken, "bytes, `buffer = buffer[n:]`": copy_the_buffer}
    names = [*framers, *others]
    for round_number in range(options.round_count(5)):
        for size in SIZES:
            count = max(4, options.count(32 << 20, 2 << 20) // (size + 200))
            for name in shuffled(names, round_number):
                encode = framers.get(name, PrefixFramer)(max_packet=2 << 20).encode
                stream = encode(b"x" * size) * count
                pieces = [stream[at : at + PIECE] for at in range(0, len(stream), PIECE)]
                framer = framers.get(name, PrefixFramer)(max_packet=2 << 20)
                start = time.perf_counter()
                got = sum(len(framer.feed(p)) for p in pieces) if name in framers else others[name](pieces)
                seconds = time.perf_counter() - start
                assert got == count
                figures.add(name, size_name(size), count / seconds)
    rows: list[Sequence[str]] = [[name, *(figures.show(name, size_name(size)) for size in SIZES)] for name in names]
    return Table(
        "framing: packets/s", ["", *map(size_name, SIZES)], rows, [f"bytes fed in pieces of {PIECE >> 10} KiB"]
    )


# --- a server ---------------------------------------------------------------------------------------------------------


def send_all(port: int, frame: bytes, count: int) -> None:
    """A plain client: a thread, blocking sends of up to a megabyte."""
    at_once = max(1, (1 << 20) // len(frame))
    with socket.create_connection(("127.0.0.1", port)) as peer:
        for at in range(0, count, at_once):
            peer.sendall(frame * min(at_once, count - at))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)  # until the server has closed


async def timed(port: int, size: int, count: int) -> float:
    frame = U32.pack(size) + bytes(size)
    start = time.perf_counter()
    thread = threading.Thread(target=send_all, args=(port, frame, count))
    thread.start()
    while thread.is_alive():  # noqa: ASYNC110 - nothing of the loop's ends with it
        await asyncio.sleep(0.002)
    return time.perf_counter() - start


async def with_packet_server(size: int, count: int) -> float:
    got = 0

    async def take(connection: Connection) -> None:
        nonlocal got
        while batch := await connection.batch():
            got += len(batch)

    async with PacketServer(take, framing=PrefixFramer, max_packet=2 << 20) as packets:
        address = await packets.listen("127.0.0.1:0")
        seconds = await timed(int(address.rpartition(":")[2]), size, count)
    assert got == count
    return seconds


async def with_streams(size: int, count: int) -> float:
    got = 0

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                (announced,) = U32.unpack(await reader.readexactly(4))
                await reader.readexactly(announced)
                got += 1
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0, limit=2 << 20) as streams:
        seconds = await timed(streams.sockets[0].getsockname()[1], size, count)
    assert got == count
    return seconds


def server(options: Options) -> Table:
    figures = Figures()
    contestants: dict[str, Callable[[int, int], Awaitable[float]]] = {
        "PacketServer": with_packet_server,
        "asyncio.start_server, readexactly": with_streams,
    }
    for round_number in range(options.round_count(5)):
        for size in SIZES:
            count = max(8, options.count(64 << 20, 4 << 20) // (size + 500))
            for name in shuffled(list(contestants), round_number):
                seconds = asyncio.run(_run(contestants[name], size, count))
                figures.add(name, size_name(size), count * size / seconds / 1e6)
        tell(f"server: round {round_number + 1}")
    rows: list[Sequence[str]] = [
        [name, *(figures.show(name, size_name(size)) for size in SIZES)] for name in contestants
    ]
    mine, theirs = contestants
    rows.append(["ratio", *(figures.ratio(mine, theirs, size_name(size)) for size in SIZES)])
    notes = ["one connection over loopback; the client is a thread of the same process, so they share one GIL"]
    return Table("server: MB/s of payload taken", ["", *map(size_name, SIZES)], rows, notes)


async def _run(contestant: Callable[[int, int], Awaitable[float]], size: int, count: int) -> float:
    return await contestant(size, count)


# --- fan-out ----------------------------------------------------------------------------------------------------------


async def to_subscribers(count: int, size: int, subscribers: int) -> tuple[float, float]:
    """Seconds until everybody has everything, and the longest the loop stood still meanwhile."""
    fanout = Fanout(PrefixFramer(max_packet=2 << 20))
    expected = count * (size + 4)
    ends: list[socket.socket] = []
    done = threading.Event()

    def read() -> None:
        """All readers on one thread, so that the publisher's loop has its own."""
        import selectors

        left = dict.fromkeys(ends, expected)
        with selectors.DefaultSelector() as selector:
            for end in ends:
                selector.register(end, selectors.EVENT_READ)
            space = bytearray(1 << 18)
            while left:
                for key, _ in selector.select():
                    end = next(e for e in (key.fileobj,) if isinstance(e, socket.socket))
                    left[end] -= end.recv_into(space)
                    if left[end] == 0:
                        del left[end]
                        selector.unregister(end)
        done.set()

    async with PacketServer(fanout.give) as packets, contextlib.AsyncExitStack() as stack:
        address = await packets.listen("127.0.0.1:0")
        host, _, port = address.rpartition(":")
        for _ in range(subscribers):
            ends.append(stack.enter_context(socket.create_connection((host, int(port)))))
        while len(fanout) < subscribers:  # noqa: ASYNC110 - subscribed when the server's tasks have run
            await asyncio.sleep(0.001)
        thread = threading.Thread(target=read)
        batch = max(1, (64 << 10) // size)
        start = time.perf_counter()
        thread.start()
        longest = 0.0
        for at in range(0, count, batch):
            await fanout.forward([Packet(bytes(size), 0)] * min(batch, count - at))
            turn = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - turn)
        while not done.is_set():  # noqa: ASYNC110 - a thread's event
            await asyncio.sleep(0.001)
        seconds = time.perf_counter() - start
        thread.join()
    return seconds, longest


def fan_out(options: Options) -> Table:
    figures = Figures()
    sizes = (100, 4 << 10, 64 << 10)
    for _ in range(options.round_count(3)):
        for subscribers in (1, 10, 100):
            for size in sizes:
                count = max(4, options.count(128 << 20, 8 << 20) // subscribers // (size + 200))
                seconds, longest = asyncio.run(to_subscribers(count, size, subscribers))
                figures.add(str(subscribers), size_name(size), count * size * subscribers / seconds / 1e6)
                figures.add(str(subscribers), f"{size_name(size)} packets", count * subscribers / seconds)
                figures.add(str(subscribers), "turn", longest * 1000)
    rows: list[Sequence[str]] = [
        [
            f"{subscribers} subscribers",
            *(
                f"{figures.show(str(subscribers), size_name(s))} / "
                f"{number(figures.median(str(subscribers), f'{size_name(s)} packets') / 1e3)}k"
                for s in sizes
            ),
            figures.show(str(subscribers), "turn"),
        ]
        for subscribers in (1, 10, 100)
    ]
    head = ["", *map(size_name, sizes), "longest turn of the loop, ms"]
    notes = ["all readers on one thread of the same process; to all of them together; policy wait"]
    return Table("fan-out: MB/s delivered / packets/s delivered", head, rows, notes)
