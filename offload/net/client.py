"""`offload send`: the merge with the packet file at the other end of a connection.

    Tail ─► arena ─► steps ─► frames ─► u32 packets ─► server ─► packet file
                                 ◄───── "so many batches are on the disk" ─────┘

`Merge` reads, and writes to its Output: here `_Link`, which has a thread and a loop of its own, as every packet file's
writer has. Its Target, the packet file at the server as far as a merge uses one, is `_Remote`.

Promises:
    - The client keeps nothing: where each source stands is what the server's packet file says when a connection begins.
      So after a kill of either end, or a cable pulled, the next connection goes on there, and each line is in the
      file once and in order, as long as its source still has it.
    - At most WINDOW_BYTES are under way unacknowledged; then reading waits.
    - `run()` returns when everything that was read is on the server's disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from zlib import crc32

from ..errors import BrokenResourceError, ClosedResourceError, OffloadError, PacketError
from ..files.packet_file import Piece
from ..loops import Call, LoopThread
from ..merge.engine import Merge, Progress, Target
from ..merge.sources import Sources
from ..packets.codec import Buffer, CommitEntry, GapInfo, Header, SourceInfo, pack_header
from ..packets.format import Flag, FrameType
from ..packets.framing import PrefixFramer
from ..packets.ledger import Ledger, SourceState
from . import wire
from .auth import SecretError, respond
from .connection import Connection
from .dial import connect, parse_address
from .limits import Limits

R = TypeVar("R")

WINDOW_BYTES = 8 << 20
MAX_MESSAGE = 16 << 20


class RefusedError(BrokenResourceError):
    """The server refused, and would again: another version, a wrong secret, a name in use."""


class _Remote:
    """The packet file at the server, as far as a merge uses one: the state of our sources, and frames to send.

    Attributes:
        out: messages that are to be sent.
    """

    identity = (-1, -1)  # of no file that could be a source

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.out: list[Buffer] = []
        self._unseen: set[int] = set()  # sources of which we have hashes only
        self._former: dict[int, list[tuple[SourceInfo, CommitEntry]]] = {}

    def learn(self, item: wire.Known) -> None:
        if item.former:
            self._former.setdefault(item.source_id, []).append((item.info, item.entry))
            return
        entry = item.entry
        state = SourceState(
            item.source_id, item.info, item.generation, 0, entry.resume_off, entry.next_seq, entry.flags
        )
        state.size, state.mtime_ns = entry.size, entry.mtime_ns
        state.head_len, state.head_hash = entry.head_len, entry.head
        state.guard_len, state.guard_hash = entry.guard_len, entry.guard
        self.ledger.sources[item.source_id] = state
        self._unseen.add(item.source_id)

    def generations(self, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
        return iter(self._former.get(state.source_id, ()))

    def open_source(self, info: SourceInfo, source_id: int | None = None) -> int:
        if source_id is None:
            source_id, generation, seq = len(self.ledger.sources), 0, 0
            info = info._replace(before=None)
        else:
            state = self.ledger.sources[source_id]
            generation, seq = state.generation + 1, state.next_seq
            info = info._replace(before=state.entry())
        fields = {"source_id": source_id, "seq": seq, "source_off": info.start_off, "generation": generation}
        self._frame(FrameType.SOURCE, info.pack(), **fields)
        return source_id

    def gap(self, source_id: int, info: GapInfo) -> None:
        state = self.ledger.sources[source_id]
        fields = {"seq": state.next_seq, "source_off": state.resume_off, "generation": state.generation}
        self._frame(FrameType.GAP, info.pack(), source_id=source_id, **fields)

    def append(self, pieces: Iterable[Piece], stats: Mapping[int, tuple[int, int]] | None = None) -> None:
        for piece in pieces:
            state = self.ledger.sources[piece.source_id]
            assert piece.source_off == state.resume_off, "a piece that does not follow the one before"
            self._frame(
                piece.type,
                bytes(piece.payload),  # its arena is read into again before the socket has taken it
                source_id=piece.source_id,
                seq=state.next_seq,
                source_off=piece.source_off,
                generation=state.generation,
                flags=piece.flags,
                count=piece.count,
            )
        for source_id, (size, mtime_ns) in (stats or {}).items():
            state = self.ledger.sources[source_id]
            if source_id in self._unseen and state.tail:
                # The server knows hashes of what it has of this source; a longer head and guard need the bytes.
                self._unseen.discard(source_id)
                self.out.append(wire.seen(source_id, state.head, state.tail))
            state.size, state.mtime_ns = size, mtime_ns
        self.out.append(wire.batch(stats or {}))

    def _frame(self, type: FrameType, payload: bytes, **fields: int) -> None:
        crc = crc32(payload)
        raw = pack_header(type, len(payload), crc, **fields)
        flags = Flag(fields.pop("flags", 0))
        every = {"seq": 0, "source_off": 0, "time_ns": 0, "count": 0, "generation": 0, "prev_len": 0, "epoch": 0}
        header = Header(type=type, flags=flags, payload_len=len(payload), payload_crc=crc, **(every | fields))
        self.ledger.apply(header, payload, raw, self.ledger.end)
        self.out.append(wire.FRAME + raw + payload)


class _Link:
    """A connection to the server on a thread of its own; used by a Merge as its PacketWriter is.

    Args:
        name: who sends.
        lost: called on the thread when the connection has gone without being asked to.
        options: for `connect`.
    """

    def __init__(
        self, address: str, name: str, secret: bytes | None, lost: Callable[[], object], options: dict[str, Any]
    ) -> None:
        self._address, self._name, self._secret, self._lost, self._options = address, name, secret, lost, options
        self._thread = LoopThread(f"link {address}")
        self._remote = _Remote()
        self._stack = contextlib.AsyncExitStack()
        self._connection: Connection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._error: OffloadError | None = None
        self._unacknowledged: deque[int] = deque()  # bytes of each batch under way
        self._window = 0  # their sum
        self._sent = self._durable = 0  # batches
        self._order: asyncio.Lock | None = None
        self._change: asyncio.Condition | None = None
        self._asked: deque[asyncio.Future[bytes]] = deque()

    async def start(self) -> _Link:
        """Connect, and learn where the sources stand.

        Raises:
            OSError: there is no way to the server.
            BrokenResourceError: the connection broke; RefusedError: the server refuses.
        """
        await self._thread.start()
        try:
            await self._thread.run(self._open)
        except BaseException:
            await self.aclose()
            raise
        return self

    def use(self, function: Callable[[Target], R], /) -> Call[R]:
        """Run a function with the remote packet file, in order; its frames are sent when there is room."""
        return self._thread.run(self._use, function)

    def held(self, source_id: int, start: int, end: int, generation: int | None = None) -> Call[bytes | OSError]:
        """What the packet file at the server holds of a source, as `PacketFile.held`."""
        return self._thread.run(self._held, source_id, start, end, generation)

    async def flush(self) -> None:
        """Return when everything is on the server's disk. Raises BrokenResourceError: the connection broke before."""
        await self._thread.run(self._flushed)

    async def aclose(self) -> None:
        with contextlib.suppress(ClosedResourceError):
            await self._thread.run(self._close)
        await self._thread.aclose()

    # --- on the link's thread -----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._order, self._change = asyncio.Lock(), asyncio.Condition()
        patience = (self._options["limits"] or Limits()).handshake
        try:
            connecting = connect(self._address, PrefixFramer, **self._options)
            connection = self._connection = await self._stack.enter_async_context(connecting)
            if self._secret is not None:
                try:
                    await respond(connection, self._secret)
                except SecretError as exc:
                    raise RefusedError(str(exc)) from exc
            await connection.send(wire.hello(self._name))
            while (payload := await self._receive(patience))[:1] != wire.READY:
                if payload[:1] not in (wire.STATE, wire.FORMER):
                    raise RefusedError(f"no packet file server for `send`: it said {payload[:40]!r}")
                self._remote.learn(wire.read_known(payload))
        except PacketError as exc:
            await self._stack.aclose()
            raise RefusedError(f"no packet file server for `send`: {exc}") from exc
        except BaseException:
            await self._stack.aclose()
            raise
        self._reader = asyncio.create_task(self._acknowledged(), name="acknowledgements")

    async def _receive(self, patience: float | None = None) -> bytes:
        assert self._connection is not None
        try:
            async with asyncio.timeout(patience):
                packet = await self._connection.packet()
        except TimeoutError:
            raise BrokenResourceError(f"no answer for {patience} s; is it `offload serve -o` with u32?") from None
        if packet is None:
            raise BrokenResourceError("the server has ended the connection")
        if packet.payload[:1] == wire.REPLACED:
            raise RefusedError(f"another sender is called {self._name!r} now; give each a name of its own")
        if packet.payload[:1] == wire.REFUSED:
            raise BrokenResourceError(f"the server refuses: {packet.payload[1:].decode(errors='replace')}")
        return packet.payload

    async def _acknowledged(self) -> None:
        """Take acknowledgements until the connection ends."""
        assert self._change is not None
        try:
            while True:
                payload = await self._receive()
                if payload[:1] == wire.HELD and self._asked:
                    self._asked.popleft().set_result(payload[1:])
                    continue
                count = wire.read_durable(payload)
                if not self._durable < count <= self._sent:
                    raise PacketError(f"batch {count} is acknowledged, expected {self._durable + 1} to {self._sent}", 0)
                while self._durable < count:
                    self._durable += 1
                    self._window -= self._unacknowledged.popleft()
                async with self._change:
                    self._change.notify_all()
        except OffloadError as exc:
            self._error = exc if isinstance(exc, BrokenResourceError) else BrokenResourceError(str(exc))
            while self._asked:
                self._asked.popleft().set_exception(self._error)
            async with self._change:
                self._change.notify_all()
            self._lost()

    async def _use(self, function: Callable[[Target], R]) -> R:
        assert self._order is not None
        assert self._change is not None
        assert self._connection is not None
        async with self._order:
            self._check()
            result = function(self._remote)
            out, self._remote.out = self._remote.out, []
            if out:
                size = sum(map(len, out))
                async with self._change:
                    await self._change.wait_for(
                        lambda: self._error or not self._window or self._window + size <= WINDOW_BYTES
                    )
                self._check()
                self._sent += 1
                self._window += size
                self._unacknowledged.append(size)
                framer = self._connection.framer
                await self._connection.send_frames([part for message in out for part in framer.parts(message)])
            return result

    async def _held(self, source_id: int, start: int, end: int, generation: int | None) -> bytes | OSError:
        assert self._order is not None
        assert self._connection is not None
        async with self._order:
            self._check()
            answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._asked.append(answer)
            await self._connection.send(wire.want(source_id, start, end, generation))
        return await asyncio.shield(answer)  # it comes, whoever waits: the next one must not get it

    async def _flushed(self) -> None:
        assert self._change is not None
        async with self._change:
            await self._change.wait_for(lambda: self._error or self._durable == self._sent)
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        await self._stack.aclose()


class Send(Merge):
    """Send the lines of many files into a server's packet file.

        async with Send(["logs/"], "collector:7000", name="web-1") as send:
            await send.run()

    Args:
        sources, follow, poll: as for Merge.
        address: HOST:PORT or unix:PATH of `offload serve --framing u32 -o FILE`.
        name: who sends; one connection at a time has it. Sources stand in the file as `name:path`.
        tls, server_hostname: as for `connect`.
        secret: what the server asks for.

    `start` and `run` raise BrokenResourceError when the connection breaks: make another Send to go on.

    Raises:
        ValueError: no address, no name, no sources.
    """

    def __init__(
        self,
        sources: Sources | Sequence[str],
        address: str,
        *,
        name: str,
        follow: bool = False,
        poll: bool = False,
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        secret: bytes | None = None,
        limits: Limits | None = None,
    ) -> None:
        options = {"tls": tls, "server_hostname": server_hostname, "limits": limits, "max_packet": MAX_MESSAGE}
        parse_address(address)
        wire.hello(name)  # what is no address or name is told here
        self._link = _Link(address, name, secret, self.stop, options)
        super().__init__(sources, self._link, follow=follow, poll=poll)

    async def run(self) -> Progress:
        """Read and send, as Merge.run; returns when all of it is on the server's disk.

        Raises:
            BrokenResourceError: the connection broke, or the server could not write.
        """
        progress = await super().run()
        await self._link.flush()
        return progress
