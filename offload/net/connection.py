"""One connection that carries packets: received into its framer, queued in order, bounded in bytes.

    socket ─► framer ─► queue ─► `async for packet in connection`      (with a Verifier: `checks.py` before the queue)
                 └─ over the high-water mark reading pauses; at half of it, it goes on

Promises:
    - Packets come in the order of the stream. Behind the last whole one the iteration ends, or raises what ended it.
    - What is queued or being checked, what the consumer has taken and not asked beyond, and the packet under way count
      as this connection's memory. Over `Limits.connection_bytes` it is not read; over the server's `Limits.total_bytes`
      none is, but one at a time when nobody has a packet that could be taken: so a crowd of half-sent packets cannot
      stop each other for ever, and the bound is passed by one receive and one packet at most.
    - Others get the loop after BATCH_PACKETS, however many wait.
    - `send` waits while the peer does not take what was sent before.
    - All of it runs on the connection's loop; nothing here blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

from ..errors import BrokenResourceError, ClosedResourceError, OffloadError, PacketError
from ..packets.codec import Buffer
from ..packets.framer import Framer, Packet
from .checks import Checks
from .limits import ALONE, PACKET_COST, Budget, Limits, cost

KEEP_ALIVE = 60  # seconds of silence until the system asks, and of no answer until it gives up
BATCH_PACKETS = 2048  # more than one receive of 100 bytes each; some milliseconds of a handler that takes 2 µs each


class Connection(asyncio.BufferedProtocol):
    """A peer, and the packets from and to it; made by `PacketServer` and `connect`.

    Args:
        framer: its own; it must not be used for anything else.
        limits, budget: as above.
        checks: of this framer, where digests are checked off the loop.
        made: called when the peer is there.

    Attributes:
        peer: where it comes from: "127.0.0.1:5000", "unix:PATH".
        name: who it is: the common name of its certificate, else its host.
        received_bytes: of the stream.
        closed: done when the connection is.
    """

    def __init__(
        self,
        framer: Framer,
        *,
        limits: Limits | None = None,
        budget: Budget | None = None,
        checks: Checks | None = None,
        made: Callable[[Connection], object] = lambda connection: None,
    ) -> None:
        self.framer = framer
        self.limits = limits or Limits()
        self.peer = self.name = "nobody"
        self.received_bytes = 0
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._budget = budget or Budget(self.limits.total_bytes)
        self._made = made
        self._checks = checks
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Packet] = deque()  # what the consumer may take
        self._queued = self._lent = self._held = 0  # bytes: in the queue, with the consumer, of the packet under way
        self._waiter: asyncio.Future[None] | None = None  # of the consumer
        self._room: asyncio.Future[None] | None = None  # of who sends
        self._holds: set[str] = set()  # why it is not read
        self._error: Exception | None = None
        self._ended = False
        self._more = False  # packets wait that were not in the last batch
        self._since = self._begun = self._loop.time()  # of the last byte, or let go; of the packet under way

    def __repr__(self) -> str:
        return f"<Connection {self.peer}>"

    # --- for the consumer ---------------------------------------------------------------------------------------------

    async def batch(self) -> list[Packet]:
        """All packets that wait, at least one, at most BATCH_PACKETS; none: the peer has ended between two packets.

        Raises:
            PacketError: bytes that are no packet; where, counts from the start of the stream.
            BrokenResourceError: the connection broke, was closed by a limit, or ended inside a packet's frame.
        """
        self._return()
        if self._more:
            self._more = False
            await asyncio.sleep(0)
        if not await self._filled():
            return []
        if len(self._queue) <= BATCH_PACKETS:
            batch = list(self._queue)
            self._queue.clear()
            self._queued, self._lent = 0, self._queued
        else:
            batch = [self._queue.popleft() for _ in range(BATCH_PACKETS)]
            self._lent = _costs(batch)
            self._queued -= self._lent
            self._more = True
        return batch

    async def __aiter__(self) -> AsyncIterator[Packet]:
        """The packets, one by one; ends and raises as `batch`."""
        while packets := await self.batch():
            for packet in packets:
                yield packet

    async def packet(self) -> Packet | None:
        """The next packet; None: as the end of `batch`."""
        self._return()
        if not await self._filled():
            return None
        packet = self._queue.popleft()
        self._lent = cost(packet)
        self._queued -= self._lent
        return packet

    async def send(self, payload: Buffer, *fields: Any) -> None:
        """Send one packet; returns when there is room for another.

        Raises:
            BrokenResourceError: the connection is gone, or the peer has not read for `Limits.send` seconds.
            PacketError: the framing cannot carry it; nothing was sent.
        """
        await self.send_frames(self.framer.parts(payload, *fields))

    async def send_frames(self, frames: Iterable[Buffer]) -> None:
        """As `send`, for frames that are encoded already."""
        self.write_frames(frames)
        room = self._room
        if room is None:
            return
        try:
            async with asyncio.timeout(self.limits.send):
                # Several may wait: each for the same future, which none of them may cancel.
                await asyncio.shield(room)
        except TimeoutError:
            if not room.done():  # else it has read, and we have not looked for so long
                self.abort(BrokenResourceError(f"{self.peer} has read nothing for {self.limits.send} s"))
        if self.closed.done() or self._transport is None:
            raise self._gone()

    def write_frames(self, frames: Iterable[Buffer]) -> None:
        """Put frames into what is to be sent, however much waits there already; raises as `send`."""
        if self._transport is None or self._transport.is_closing():
            raise self._gone()
        # Not `writelines`: from 3.12.0 to 3.12.8 and in 3.13.0 and 3.13.1 it never pauses who writes (CVE-2024-12254),
        # and an empty buffer at its end is tried again for ever. Before 3.12 it joins too.
        self._transport.write(b"".join(frames))

    def send_eof(self) -> None:
        """Say that nothing more is sent; what the peer sends still comes. TLS has no such half: there, as `close`."""
        if self._transport is not None and not self._transport.is_closing():
            if self._transport.can_write_eof():
                with contextlib.suppress(OSError):  # the peer is gone, and behind its own end nobody noticed
                    self._transport.write_eof()
            else:
                self._transport.close()

    def close(self) -> None:
        """End the connection when what was sent is out; nothing more is read."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """End the connection at once; `error` is what the consumer gets."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()

    async def aclose(self) -> None:
        """As `close`, and wait for the end; a peer that does not read what is left gets `Limits.send` seconds."""
        self.close()
        try:
            async with asyncio.timeout(self.limits.send):
                await asyncio.shield(self.closed)
        except BaseException as exc:
            self.abort()
            if not isinstance(exc, TimeoutError):
                raise
            await asyncio.shield(self.closed)

    # --- for the server -----------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """What counts against the limits."""
        return self._takeable + self._held

    @property
    def _takeable(self) -> int:
        return self._queued + self._lent + (self._checks.bytes if self._checks is not None else 0)

    @property
    def is_read(self) -> bool:
        return not self._holds and not self._ended

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self._ended

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The peer's certificate, as `ssl.SSLSocket.getpeercert`; None without one."""
        found = self._transport.get_extra_info("peercert") if self._transport is not None else None
        return cast("dict[str, Any] | None", found or None)

    async def encrypt(self, context: ssl.SSLContext) -> None:
        """Have the TLS handshake with a client; the connection is held for "tls" until it is done.

        Raises:
            BrokenResourceError: it failed, or took longer than `Limits.handshake`.
        """
        assert self._transport is not None
        try:
            transport = await self._loop.start_tls(
                self._transport, self, context, server_side=True, ssl_handshake_timeout=self.limits.handshake
            )
            if transport is None:
                raise ConnectionResetError("the connection is closed")
        except OSError as exc:
            error = BrokenResourceError(f"TLS handshake failed: {getattr(exc, 'reason', None) or exc or 'no answer'}")
            self.abort(error)
            self.connection_lost(exc)  # asyncio does not tell, if it ends within the handshake
            raise error from exc
        self._transport = transport
        self.peer, self.name = _who(self._transport)
        if self._holds - {"tls"}:
            self._transport.pause_reading()
            self._holds.remove("tls")
        else:
            self._holds.clear()
        self._since = self._begun = self._loop.time()

    def hold(self, why: str) -> None:
        """Read nothing more until all who hold it let go."""
        if not self._holds and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._holds.add(why)

    def let_go(self, why: str) -> None:
        if why in self._holds:
            self._holds.remove(why)
            if not self._holds and self._transport is not None and not self._transport.is_closing():
                self._since = self._begun = self._loop.time()  # it could not send
                self._transport.resume_reading()

    async def quiet(self, seconds: float) -> None:
        """Wait until it was read for so long and nothing came, or is not read any more."""
        while self._holds <= {"full", "total"} and not self._ended:
            before = self._since
            await asyncio.wait([self.closed], timeout=seconds)
            if self.is_read and self._since == before:  # while memory is short, what was sent waits in the socket
                return

    def end(self) -> None:
        """Take nothing more: the consumer gets what is whole, then the end."""
        self.hold("end")
        self._finish(None)

    def overdue(self, now: float) -> str | None:
        """Which limit of time it has passed."""
        if not self.is_read:
            return None
        if self._budget.alone is self and now - self._begun > ALONE:
            return f"memory is short, and its packet is not whole after {ALONE} s"
        idle, packet = self.limits.idle, self.limits.packet
        if idle is not None and now - self._since > idle:
            return f"nothing has come for {idle} s"
        if packet is not None and self.framer.pending and now - self._begun > packet:
            return f"a packet is not whole after {packet} s: {self.framer.pending} bytes of it have come"
        return None

    # --- asyncio ------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._since = self._begun = self._loop.time()
        self.peer, self.name = _who(self._transport)
        _keep_alive(self._transport)
        self._budget.join(self)
        self._made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.framer.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._ended or self.framer.error is not None:
            return
        self._since = self._loop.time()
        self.received_bytes += nbytes
        try:
            packets = self.framer.buffer_updated(nbytes)
        except PacketError:
            packets = []
        if packets or not self._held:
            self._begun = self._since
        self._accept(packets)
        if self.framer.error is not None:
            self._finish(self.framer.error)
            self.hold("fault")
        elif self.memory_bytes > self.limits.connection_bytes and self._takeable:
            self.hold("full")
        self._budget.settle()

    def eof_received(self) -> bool:
        if not self._ended and self.framer.error is None:
            error: Exception | None = None
            try:
                self._accept(self.framer.close())
            except PacketError as exc:
                error = exc
            self._finish(error)
        # With TLS there is no half that could stay open.
        return self._transport is not None and self._transport.get_extra_info("ssl_object") is None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed.done():
            return
        self._transport = None
        if exc is not None:
            error = BrokenResourceError(f"the connection with {self.peer} broke: {exc}")
            error.__cause__ = exc
            self._finish(error)
        else:
            self._finish(None if self._ended else ClosedResourceError(f"the connection with {self.peer} is closed"))
        self._hold_bytes(0)
        self._budget.leave(self)
        self.resume_writing()
        self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _accept(self, packets: list[Packet]) -> None:
        self._hold_bytes(self.framer.held_bytes)
        if not packets:
            return
        if self._checks is None:
            size = _costs(packets)
            self._queue.extend(packets)
            self._queued += size
            self._count(size)
        else:
            before = self._checks.bytes
            try:
                self._checks.put(packets)
            except OffloadError as exc:  # the verifier is closed, or broken
                self._finish(exc)
                self.hold("fault")
            self._count(self._checks.bytes - before)
        self._wake()

    def _count(self, size: int) -> None:
        self._budget.used += size
        self._budget.takeable += size

    async def _filled(self) -> bool:
        """Wait until there is something to take; False: the stream has ended. Raises as `batch`."""
        while not self._queue:
            if self._checks:
                await self._checks.wait()
                self._take_checked(self._checks)
                continue
            if self._error is not None:
                raise self._error
            if self._ended:
                return False
            assert self._waiter is None, "one consumer"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def _take_checked(self, checks: Checks) -> None:
        """What is found right may be taken; what is wrong, and what stands behind an end, is no memory of ours."""
        before = checks.bytes
        good, error = checks.take()
        size = _costs(good)
        self._queue.extend(good)
        self._queued += size
        self._count(checks.bytes + size - before)
        if error is not None:
            self.hold("fault")
            self._error = error  # it stands before whatever ended the stream meanwhile
            self._finish(error)
        if self._takeable <= self.limits.connection_bytes // 2:
            self.let_go("full")
        self._budget.settle()

    def _hold_bytes(self, held: int) -> None:
        self._budget.used += held - self._held
        self._held = held

    def _return(self) -> None:
        """The consumer has done with what it took."""
        lent, self._lent = self._lent, 0
        self._count(-lent)
        if self._takeable <= self.limits.connection_bytes // 2:
            self.let_go("full")
        self._budget.settle()

    def give_back(self) -> None:
        """The consumer has gone: what is queued is nobody's."""
        self._lent = self._takeable
        self._queued = 0
        if self._checks is not None:
            self._checks.drop()
        self._queue.clear()
        self._return()

    def _finish(self, error: Exception | None) -> None:
        self._error = self._error or error
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _gone(self) -> OffloadError:
        if isinstance(self._error, OffloadError):
            return self._error
        return BrokenResourceError(f"the connection with {self.peer} is gone")


def _costs(packets: list[Packet]) -> int:
    return sum([len(packet[0]) for packet in packets]) + PACKET_COST * len(packets)  # [0]: the payload


def _keep_alive(transport: asyncio.Transport) -> None:
    """Let the system ask a silent peer whether it is still there: a machine that died says no word."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", KEEP_ALIVE), ("TCP_KEEPINTVL", KEEP_ALIVE // 6), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _who(transport: asyncio.Transport) -> tuple[str, str]:
    """Where a peer comes from, and who it is."""
    name = ""
    for attribute in (transport.get_extra_info("peercert") or {}).get("subject", ()):
        for key, value in attribute:
            if key == "commonName":
                name = value
    own, peer = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
    if isinstance(peer, tuple) and len(peer) >= 2:
        host = f"[{peer[0]}]" if ":" in str(peer[0]) else str(peer[0])
        return f"{host}:{peer[1]}", name or str(peer[0])
    path = next((p for p in (own, peer) if isinstance(p, str) and p), "")
    return f"unix:{path}", name or f"unix:{path}"
