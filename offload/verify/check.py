"""A packet under way, as its caller sees it, and who waits for room.

    Check       a future of the caller's loop
    Submission  a concurrent future, for a plain thread
    Packet      what both are to the Order
    Verdict     what comes out of a check

Promises:
    - Each is settled once, on its loop, or by one thread at a time.
    - One that is cancelled while it waits is never looked at; one that a worker has is waited for first.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future as ThreadFuture
from contextvars import Context
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from ..loops.call import interrupted_by_user
from ..packets.codec import Buffer

if TYPE_CHECKING:
    from .order import Desk, ThreadDesk
    from .workers import Hasher

R = TypeVar("R")

PACKET_BYTES = 512  # what a packet weighs in memory besides its bytes, and counts for in `max_bytes`

WAITING, RUNNING, DONE = range(3)
NOTHING: Any = object()  # is expected


class Verdict(NamedTuple, Generic[R]):
    """What a check found; true if that is what was expected."""

    ok: bool
    found: R
    expected: R

    def __bool__(self) -> bool:
        return self.ok


class Packet(Protocol):
    """What the Order knows of a packet under way; a Check or a Submission."""

    desk: Desk
    packet: Buffer
    expected: Any
    size: int  # what it counts for in `max_bytes`
    state: int
    value: Any
    error: BaseException | None
    context: Context | None  # of its caller, if the function is to see that
    deaths: int  # of workers that had it
    asked: bool  # to be cancelled
    hasher: Hasher | None  # while it is digested by the slice, up to `at`
    at: int

    def settle(self) -> None:
        """Become done."""

    def finished(self) -> None:
        """Its outcome is there, and waits for its turn; under the lock."""


class Check(asyncio.Future[R]):
    """A packet under way: a future of the caller's loop; `await`, `gather`, `wait_for` and callbacks take it."""

    __slots__ = ("desk", "error", "expected", "packet", "size", "state", "value")
    desk: Desk
    packet: Buffer
    expected: Any
    size: int
    state: int
    value: Any
    error: BaseException | None
    # What few packets need is set when it is needed, in the dictionary that every future has.
    deaths = 0
    asked = False  # while a worker has it
    message: Any = None
    context: Context | None = None
    hasher: Hasher | None = None
    at: int = 0

    def cancel(self, msg: Any | None = None) -> bool:
        """Drop the packet if it waits; if a worker has it, be cancelled when that is through. On the caller's loop."""
        if self.done():
            return False
        if self.desk.owner.drop(self) or interrupted_by_user():
            return super().cancel(msg)
        self.asked, self.message = True, msg
        return True

    def settle(self) -> None:
        """Become done; on the caller's loop."""
        if self.done():
            return
        error = self.error
        if self.asked:
            super().cancel(self.message)
        elif error is None:
            self.set_result(self.value)
        elif isinstance(error, asyncio.CancelledError):
            super().cancel(*error.args[:1])
        else:
            self.set_exception(error)
        self.error = None  # it refers to its traceback, and that may refer to us

    def finished(self) -> None:
        """Its outcome is there, and waits for its turn; under the lock."""
        self.state, self.packet = DONE, b""
        if self.context is not None:
            self.context = None
        if self.asked:  # no need to wait for its turn
            self.desk.ready.append(self)


class Submission(ThreadFuture[R]):
    """A packet under way: a concurrent future for a plain thread, which `concurrent.futures.wait` takes too."""

    hasher: Hasher | None = None
    at: int = 0

    def __init__(self, desk: ThreadDesk, packet: Buffer, expected: Any) -> None:
        super().__init__()
        self.desk: Desk = desk
        self.packet, self.expected, self.size = packet, expected, len(packet) + PACKET_BYTES
        self.state = WAITING
        self.value: Any = None
        self.error: BaseException | None = None
        self.context: Context | None = None
        self.deaths = 0
        self.asked = self._told = False

    def cancel(self) -> bool:
        """Drop the packet if it waits; False: a worker has it, or it is done. From any thread."""
        if self.done() or not self.desk.owner.drop(self):
            return self.cancelled()
        return super().cancel()

    def settle(self) -> None:
        """Become done; from any thread, one at a time."""
        if self._told:
            return
        self._told = True
        error, self.error = self.error, None
        if self.asked or isinstance(error, asyncio.CancelledError):
            super().cancel()
        if not self.set_running_or_notify_cancel():
            return
        if error is None:
            self.set_result(self.value)
        else:
            self.set_exception(error)

    def finished(self) -> None:
        """Its outcome is there, and waits for its turn; under the lock."""
        self.state, self.packet, self.context = DONE, b"", None


class Room(asyncio.Future[None]):
    """Somebody who waits until no more than so many bytes are in flight."""

    limit = 0

    def settle(self) -> None:
        if not self.done():
            self.set_result(None)


class ThreadRoom(ThreadFuture[None]):
    """A plain thread that does."""

    limit = 0

    def settle(self) -> None:
        self.set_result(None)
