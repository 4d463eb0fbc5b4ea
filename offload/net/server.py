"""A server of packets: TCP, TLS and Unix sockets, a handler for each connection, bounds for all of them.

    async def echo(connection):
        async for packet in connection:
            await connection.send(packet.payload)

    async with PacketServer(echo, framing=PrefixFramer) as server:
        address = await server.listen("127.0.0.1:0")

Promises:
    - Each connection has one task that runs the handler; it gets the connection's packets in order. What one handler or
      peer does wrong ends that connection only; what a handler raises is logged, but for what peers do (OffloadError).
    - Memory, time and number of connections stay within `Limits`, whatever peers send or do not read.
    - With a secret or client certificates the handler never sees who has none.
    - `drain` takes no more connections, lets handlers have what has come (as far as whole packets go), waits for them,
      and closes; what is not done in time is cut off and counted.

All on the loop that listens. A handler that blocks belongs on a LoopThread, costly digests on a `verifier`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from ..errors import BrokenResourceError, ClosedResourceError, OffloadError, PacketError
from ..packets.framer import Framer
from ..packets.framing import PrefixFramer
from ..verify import Verifier
from .auth import challenge, check_secret
from .checks import Checks
from .connection import Connection
from .dial import parse_address
from .limits import Budget, Limits

log = logging.getLogger("offload")

Handler = Callable[[Connection], Awaitable[object]]
_QUIET = 0.05  # seconds without a byte after which a drained connection has nothing on its way
_BACKLOG = 4096


@dataclass
class ServerStats:
    """What happened since the start.

    Attributes:
        accepted: connections that reached the handler.
        open: connections now.
        refused: over `Limits.connections`, without the certificate or the secret.
        bad: ended by bytes that are no packet.
        skipped: packets left out by `on_error="skip"` or "resync".
        overdue: ended by a limit of time.
        cut: not done when `drain` ended.
    """

    accepted: int = 0
    open: int = 0
    refused: int = 0
    bad: int = 0
    skipped: int = 0
    overdue: int = 0
    cut: int = 0


class PacketServer:
    """Takes connections and runs a handler for each; see the head of this module.

    Args:
        handler: coroutine function, called with each connection; the connection is closed when it returns.
        framing: makes a framer for each connection, for example `partial(PrefixFramer, ">HI")`.
        limits: what peers may use.
        secret: at least 16 bytes that clients must know; None: no challenge.
        verifier: opened; checks the framing's digests off the loop (`Verifier("sha256")` for `digest="sha256"`), those
            of small packets excepted. Several servers may share it; close it after them. None: checked on the loop.
        options: for the framers: `max_packet`, `on_error`, `on_fault`.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        framing: Callable[..., Framer] = PrefixFramer,
        limits: Limits | None = None,
        secret: bytes | None = None,
        verifier: Verifier[bytes] | None = None,
        **options: Any,
    ) -> None:
        self.limits = limits or Limits()
        self.stats = ServerStats()
        self.budget = Budget(self.limits.total_bytes)
        self._handler = handler
        self._framing = partial(framing, **options)
        framer = self._framing()  # what it cannot be is told here
        if verifier is not None and framer.digest is None:
            raise ValueError(f"a verifier checks digests, and {framing} has none; give a framing with digest=")
        self._verifier = verifier
        self._secret = None if secret is None else check_secret(secret)
        self._listening: list[asyncio.Server] = []
        self._paths: dict[str, int] = {}  # of sockets, with their inodes
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def connections(self) -> list[Connection]:
        """Those that are open now."""
        return list(self._tasks.values())

    async def listen(self, address: str, *, tls: ssl.SSLContext | None = None) -> str:
        """Take connections at an address, HOST:PORT or unix:PATH; any number of them, before and after others.

        Args:
            tls: for example `server_context(…)`.

        Returns:
            The address with the port that the system gave for port 0.

        Raises:
            OSError: the address is taken, not there or not allowed.
            ValueError: no address.
            ClosedResourceError: the server is closed.
        """
        if self._closed:
            raise ClosedResourceError("the server is closed; make a new one")
        loop = asyncio.get_running_loop()
        place = parse_address(address)
        make = partial(self._make, tls)
        if isinstance(place, str):
            if await _somebody_listens(place):  # asyncio would take the socket away from them
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), place)
            server = await loop.create_unix_server(make, place, backlog=_BACKLOG)
            self._paths[place] = os.stat(place).st_ino
        else:
            server = await loop.create_server(make, place[0] or None, place[1], backlog=_BACKLOG)
            host, port = server.sockets[0].getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listening.append(server)
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="server limits")
        return address

    async def drain(self, patience: float | None = 10.0) -> None:
        """Take nothing more, finish what has come, close; at most `patience` seconds."""
        self._closed = True
        for server in self._listening:
            server.close()
        try:
            async with asyncio.timeout(patience):
                await asyncio.gather(*(self._end(c) for c in self.connections))
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            pass
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close at once: handlers are cancelled, connections cut. What has come and is not handled is lost."""
        self._closed = True
        for server in self._listening:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        self.stats.cut += len(self._tasks)
        while self._tasks:
            for task, connection in self._tasks.items():
                connection.abort()
                task.cancel()
            await asyncio.wait(self._tasks)
        for server in self._listening:
            await server.wait_closed()
        self._listening.clear()
        for path, inode in self._paths.items():
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:  # not somebody else's by now
                    os.unlink(path)
        self._paths.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await (self.drain() if kind is None else self.aclose())

    # --- connections --------------------------------------------------------------------------------------------------

    def _make(self, tls: ssl.SSLContext | None) -> Connection:
        framer = self._framing()
        checks = None if self._verifier is None else Checks(self._verifier, framer)
        return Connection(framer, limits=self.limits, budget=self.budget, checks=checks, made=partial(self._admit, tls))

    def _admit(self, tls: ssl.SSLContext | None, connection: Connection) -> None:
        if self._closed or len(self._tasks) >= self.limits.connections:
            self.stats.refused += 1
            connection.abort()
            return
        self.stats.open += 1
        if tls is not None:
            connection.hold("tls")
        task = asyncio.get_running_loop().create_task(self._serve(connection, tls), name=f"peer {connection.peer}")
        self._tasks[task] = connection
        task.add_done_callback(self._tasks.pop)

    async def _serve(self, connection: Connection, tls: ssl.SSLContext | None) -> None:
        try:
            try:
                # Here, not by `listen(ssl=)`: a client that only begins a handshake counts as a connection too.
                if tls is not None:
                    await connection.encrypt(tls)
                if self._secret is not None:
                    await challenge(connection, self._secret)
            except OffloadError:
                self.stats.refused += 1
                connection.abort()
                raise
            self.stats.accepted += 1
            await self._handler(connection)
        except PacketError as exc:
            self.stats.bad += 1
            log.info("%s is closed: %s", connection.peer, exc)
        except OffloadError as exc:
            log.info("%s is closed: %s", connection.peer, exc)
        except Exception as exc:
            if isinstance(exc, ExceptionGroup) and exc.split(OffloadError)[1] is None:  # of a handler's TaskGroup
                log.info("%s is closed: %s", connection.peer, exc.exceptions[0])
                return
            log.exception("the handler of %s raised; the connection is closed", connection.peer)
        finally:
            self.stats.open -= 1
            self.stats.skipped += connection.framer.faults - (connection.framer.error is not None)
            connection.hold("done")
            connection.give_back()
            await connection.aclose()

    async def _end(self, connection: Connection) -> None:
        """End its stream once nothing comes any more: what a peer has sent before is in the socket already."""
        await connection.quiet(_QUIET)
        connection.end()

    async def _sweep(self) -> None:
        """Look for connections that have passed a limit of time, often enough for the shortest."""
        shortest = min(t for t in (self.limits.idle, self.limits.packet, 4.0) if t is not None)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(shortest / 4)
            now = loop.time()
            for connection in self.connections:
                reason = connection.overdue(now)
                if reason is not None:
                    self.stats.overdue += 1
                    connection.abort(BrokenResourceError(f"{connection.peer}: {reason}"))


async def _somebody_listens(path: str) -> bool:
    """Whether this socket is in use, and not left over from a process that was killed."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        return True
    return False
