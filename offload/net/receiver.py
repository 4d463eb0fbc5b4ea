"""Packets from the network into a packet file, and acknowledgements for `offload send`.

A connection whose first packet is a hello (`wire.py`) sends frames and is told when they are on the disk. Every other
one sends packets as they are: they stand in the file under the name of their peer, and nothing is answered.

Promises:
    - Each connection's packets stand in the file in order.
    - Only what an fsync has covered is acknowledged (with fsync "none": what is written). One fsync serves all
      connections that wait for it.
    - A frame of `offload send` is taken if it goes on exactly where the file has its source; otherwise the connection
      ends, and the client asks anew. So a frame is in the file once, whoever is killed when.
    - One connection for each sender's name: a new one ends the old one, which a dead machine may have left behind. If
      it lives it is told, and gives up: two of one name would end each other for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..errors import OffloadError, PacketError
from ..files.intake import DONE
from ..files.packet_file import PacketFile, Piece
from ..files.packet_stream import PacketWriter
from ..packets.codec import CommitEntry, Frame, GapInfo, SourceInfo
from ..packets.format import GUARD_BYTES, HEAD_BYTES, NONE_U64, FrameType, GapReason
from ..packets.framer import Packet
from . import wire
from .connection import Connection
from .fanout import Fanout

BATCH_BYTES = 8 << 20  # that a client may send before the end of its batch
PATH_BYTES = 64 << 10
LAST_BYTE = 1 << 62  # no file has more; sums behind it would not fit their fields
_GRACE = 1.0  # seconds for a connection that is replaced
_MESSAGES = frozenset((wire.FRAME, wire.SEEN, wire.BATCH, wire.WANT))


@dataclass
class Received:
    """What came: `packets` and `bytes` as they are, `batches` of `offload send`."""

    packets: int = 0
    bytes: int = 0
    batches: int = 0
    senders: set[str] = field(default_factory=set)


class Receiver:
    """Handlers for a PacketServer that write into one packet file.

    Args:
        writer: opened; its owner closes it after the server.
        kind: "lines" for packets that are lines of text, else "packets".
        sends: whether `offload send` may connect: u32 framing.
        fanout: where packets are forwarded too, before they are written; the lines of `offload send` in blocks, as
            they came.
        acknowledge_written: do not wait for the disk.
    """

    def __init__(
        self,
        writer: PacketWriter,
        *,
        kind: Literal["lines", "packets"] = "packets",
        sends: bool = False,
        fanout: Fanout | None = None,
        acknowledge_written: bool = False,
    ) -> None:
        self.received = Received()
        self._writer = writer
        self._kind = kind
        self._sends = sends
        self._fanout = fanout
        self._acknowledge_written = acknowledge_written
        self._senders: dict[str, tuple[Connection, asyncio.Event]] = {}
        self._waiting: list[tuple[Connection, int]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def handle(self, connection: Connection) -> None:
        """Serve one connection; the handler for `PacketServer`."""
        first = await connection.packet()
        if first is not None and self._sends and (name := wire.read_hello(first.payload)) is not None:
            await self._sender(connection, name)
            return
        batch = [first] if first is not None else []
        while batch:
            await self.write(connection.name, batch)
            batch = await connection.batch()

    async def write(self, name: str, batch: list[Packet]) -> None:
        """Write packets under a peer's name; returns when there is room for more."""
        if self._fanout is not None:
            await self._fanout.forward(batch)
        self.received.packets += len(batch)
        self.received.bytes += sum(len(packet.payload) for packet in batch)
        if self._kind == "lines":
            lines = [packet.payload for packet in batch]
            await self._writer.write(b"\n".join(lines) + b"\n", name)
            return
        room: Awaitable[None] = DONE
        for packet in batch:
            room = self._writer.write_packet(packet.payload, name)
        await room

    # --- offload send -------------------------------------------------------------------------------------------------

    async def _sender(self, connection: Connection, name: str) -> None:
        gone = asyncio.Event()
        while name in self._senders:
            other, its_end = self._senders[name]
            with contextlib.suppress(OffloadError):
                other.write_frames(other.framer.parts(wire.REPLACED))
            other.end()
            try:
                async with asyncio.timeout(_GRACE):
                    await its_end.wait()
            except TimeoutError:  # it sends to somebody who does not read
                other.abort(PacketError(f"another connection sends as {name!r}", 0))
                await its_end.wait()
        self._senders[name] = connection, gone
        connection.framer.max_packet = max(connection.framer.max_packet, BATCH_BYTES)
        self.received.senders.add(name)
        try:
            source = _Sources(name)
            for item in await self._writer.use(source.learn):
                await connection.send(wire.known(item))
            await connection.send(wire.READY)
            await self._frames(connection, source)
        except PacketError as exc:
            with contextlib.suppress(OffloadError):
                await connection.send(wire.refused(str(exc)))
            raise
        finally:
            del self._senders[name]
            gone.set()

    async def _frames(self, connection: Connection, source: _Sources) -> None:
        batch: list[Frame | tuple[int, bytes, bytes]] = []
        size = batches = 0
        async for packet in connection:
            payload = packet.payload
            kind = payload[:1]
            size += len(payload)
            if kind not in _MESSAGES or size > BATCH_BYTES:
                raise PacketError(f"message {kind!r} after {size} bytes of a batch, expected frames", packet.offset)
            if kind == wire.FRAME:
                batch.append(wire.read_frame(payload[1:]))
            elif kind == wire.SEEN:
                batch.append(wire.read_seen(payload))
            elif kind == wire.WANT:
                await connection.send(wire.HELD + await self._writer.use(source.holding(wire.read_want(payload))))
                size -= len(payload)
            else:
                apply = source.applying(batch, wire.read_batch(payload))
                await self._writer.use(apply)
                if self._fanout is not None:
                    frames = [item for item in batch if isinstance(item, Frame)]
                    lines = [Packet(f.payload, 0) for f in frames if f.header.type is FrameType.LINES and not f.hole]
                    await self._fanout.forward(lines)
                batch, size, batches = [], 0, batches + 1
                self.received.batches += 1
                self._acknowledge(connection, batches)

    def _acknowledge(self, connection: Connection, batches: int) -> None:
        self._waiting.append((connection, batches))
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync(), name="fsync for acknowledgements")

    async def _sync(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                try:
                    if not self._acknowledge_written:
                        await self._writer.use(lambda file: file.sync())
                except OffloadError as exc:
                    for connection, _ in waiting:
                        connection.abort(exc)
                    continue
                for connection, count in dict(waiting).items():
                    with contextlib.suppress(OffloadError):
                        # Not awaited: who does not read its acknowledgements must not keep the others waiting, and
                        # its own frames are read no faster than it reads (each batch has nine bytes of answer).
                        connection.write_frames(connection.framer.parts(wire.durable(count)))
        finally:
            self._syncing = None

    async def settled(self) -> None:
        """Wait until everything that was taken is acknowledged."""
        while self._syncing is not None:
            await asyncio.wait([self._syncing])


class _Sources:
    """One sender's sources: its numbers for them, and the packet file's. Its methods run on the writer's thread."""

    def __init__(self, name: str) -> None:
        self._prefix = os.fsencode(name) + b":"
        self._ids: list[int] = []  # the sender's number -> the file's

    def learn(self, file: PacketFile) -> list[wire.Known]:
        """What the file has of them."""
        items: list[wire.Known] = []
        for source_id, state in file.ledger.sources.items():
            if state.path.startswith(self._prefix):
                number = len(self._ids)
                self._ids.append(source_id)
                items.append(self._known(state.info, state.entry(), number, state.generation, former=False))
                for info, entry in file.generations(state):
                    generation = 0 if info.before is None else 1
                    items.append(self._known(info, entry, number, generation, former=True))
        return items

    def _known(self, info: SourceInfo, entry: CommitEntry, number: int, generation: int, *, former: bool) -> wire.Known:
        before = None if info.before is None else info.before._replace(source_id=number)
        info = info._replace(path=info.path[len(self._prefix) :], before=before)
        return wire.Known(former, number, generation, info, entry._replace(source_id=number))

    def applying(
        self, batch: list[Frame | tuple[int, bytes, bytes]], stats: dict[int, tuple[int, int]]
    ) -> Callable[[PacketFile], None]:
        def apply(file: PacketFile) -> None:
            file.append(self._pieces(file, batch))
            file.append((), {self._id(number): stat for number, stat in stats.items()})

        return apply

    def holding(self, wanted: tuple[int, int, int, int | None]) -> Callable[[PacketFile], bytes]:
        number, start, end, generation = wanted

        def holding(file: PacketFile) -> bytes:
            try:
                return file.held(self._id(number), start, end, generation)
            except OSError as exc:
                raise PacketError(f"what was read of source {number} cannot be compared: {exc}", 0) from exc

        return holding

    def _id(self, number: int) -> int:
        if number >= len(self._ids):
            raise PacketError(f"source {number} is not begun, known are {len(self._ids)}", 0)
        return self._ids[number]

    def _pieces(self, file: PacketFile, batch: list[Frame | tuple[int, bytes, bytes]]) -> Iterator[Piece]:
        for item in batch:
            if isinstance(item, tuple):
                number, head, guard = item
                state = file.ledger.sources[self._id(number)]
                if len(head) > HEAD_BYTES or len(guard) > GUARD_BYTES or len(guard) > state.resume_off:
                    raise PacketError(f"head of {len(head)} and guard of {len(guard)} bytes", 0)
                state.head, state.tail = head, guard
                continue
            wire.check(item.header)
            if item.header.type is FrameType.SOURCE:
                self._begin(file, item)
                continue
            frame = self._here(file, item)
            if frame.header.type is FrameType.GAP:
                gap = GapInfo.unpack(frame)
                if LAST_BYTE < gap.end != NONE_U64:
                    raise PacketError(f"gap ends at byte {gap.end}, where no file does", 0)
                if gap.reason is GapReason.DAMAGED:
                    raise PacketError("gap of a damaged packet file, which a client does not have", 0)
                file.gap(frame.header.source_id, gap)
            else:
                header = frame.header
                yield Piece(header.source_id, frame.payload, header.source_off, header.count, header.flags)

    def _begin(self, file: PacketFile, frame: Frame) -> None:
        header, info = frame.header, SourceInfo.unpack(frame)
        if not 0 < len(info.path) <= PATH_BYTES or info.start_off > LAST_BYTE:
            raise PacketError(f"source has a path of {len(info.path)} bytes and begins at byte {info.start_off}", 0)
        if header.source_id < len(self._ids):
            state = file.ledger.sources[self._ids[header.source_id]]
            if header.generation != state.generation + 1 or self._prefix + info.path != state.path:
                raise PacketError(
                    f"generation {header.generation} of {info.path!r} does not follow {state.generation}", 0
                )
            if info.before is not None:
                state.size, state.mtime_ns = info.before.size, info.before.mtime_ns
            file.open_source(info._replace(path=state.path), state.source_id)
            return
        path = self._prefix + info.path
        if header.source_id != len(self._ids) or header.generation or file.source_named(path) is not None:
            raise PacketError(f"source {header.source_id} begins as generation {header.generation} of {path!r}", 0)
        self._ids.append(file.open_source(info._replace(path=path)))

    def _here(self, file: PacketFile, frame: Frame) -> Frame:
        """The frame as it stands in the file. Raises PacketError: it does not go on where its source stands."""
        ledger = file.ledger
        source_id = self._id(frame.header.source_id)
        header = dataclasses.replace(
            frame.header, source_id=source_id, prev_len=ledger.prev_len, epoch=ledger.epoch or 0
        )
        here = Frame(0, header, frame.payload)
        for fault in ledger.faults(here):
            raise PacketError(fault, 0)
        return here
