"""Packets under way: taken in order, bounded in bytes, finished in any order, given out in order.

    Check   a packet under way, as its caller sees it: a future of the caller's loop
    Desk    one for each caller's loop: its packets in order, and the results on their way out
    Order   all of them: what waits for a worker, what is in flight, who waits for room

Promises:
    - On each loop results come in the order of the calls. Between loops there is no order, so that one which stands
      still holds up nobody.
    - A wake-up for each burst, in and out: calls made in one turn of a loop wake workers once, at its end, and what is
      finished meanwhile crosses back together.
    - `lock` is never held while somebody else's code runs, nor while a loop is woken.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import OffloadError, QueueFullError
from ..loops.call import interrupted_by_user
from ..loops.port import Port, port_here
from ..packets.codec import Buffer
from .workers import Hasher, Outcome

R = TypeVar("R")

PACKET_BYTES = 512  # what a packet weighs in memory besides its bytes, and counts for in `max_bytes`
BATCH_BYTES = 2 << 20  # of packets that one worker takes at once
BURST = 256  # packets in a row after which `room` gives up the loop: half a millisecond
SETTLE = 500  # results given out in one turn of a loop: a quarter of a millisecond, and their callbacks

WAITING, RUNNING, DONE = range(3)
NOTHING: Any = object()  # is expected


class Verdict(NamedTuple, Generic[R]):
    """What a check found; true if that is what was expected."""

    ok: bool
    found: R
    expected: R

    def __bool__(self) -> bool:
        return self.ok


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
    deaths = 0  # of workers that had it
    asked = False  # to be cancelled, while a worker has it
    message: Any = None
    hasher: Hasher | None = None  # while it is digested by the slice, up to `at`
    at = 0

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
        if self.asked:  # no need to wait for its turn
            self.desk.ready.append(self)


class Room(asyncio.Future[None]):
    """Somebody who waits until no more than so many bytes are in flight."""

    limit = 0

    def settle(self) -> None:
        if not self.done():
            self.set_result(None)


class Desk:
    """One caller's loop: its packets in order, the results on their way out, and what is to be done on that loop."""

    __slots__ = ("__weakref__", "burst", "coming", "local", "loop", "order", "owner", "port", "ready", "scheduled")

    def __init__(self, owner: Order, port: Port) -> None:
        self.owner, self.port, self.loop = owner, port, port.loop
        self.order: deque[Check[Any]] = deque()  # not given out; under the owner's lock
        self.ready: deque[Check[Any] | Room] = deque()  # to be settled
        self.local: deque[Check[Any]] = deque()  # to be done here
        self.coming = False  # somebody has seen to it that `settle` is called
        self.scheduled = False  # and that `turn` is
        self.burst = 0  # packets since the loop's last turn

    def schedule(self) -> None:
        """See that the owner's `turn` comes soon; on this loop."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self.scheduled, self.burst = False, 0
        self.owner.turn(self)

    def next_local(self) -> Check[Any] | None:
        """The next packet that is to be done here; from any thread."""
        try:
            return self.local.popleft()
        except IndexError:  # a look before might lie: another thread may close the verifier
            return None

    def settle(self) -> None:
        """Give out results; on this loop."""
        # Before results are taken: who appends one later sends again, at worst once too often.
        self.coming = False
        ready = self.ready
        for _ in range(min(len(ready), SETTLE)):
            ready.popleft().settle()
        if ready and not self.coming:
            self.coming = True
            self.loop.call_soon(self.settle)

    def abandon(self) -> None:
        """The loop is closed; nobody waits for its results."""
        self.coming = False
        self.ready.clear()


class Order:
    """All packets of a verifier.

    Args:
        max_bytes: in flight, up to which there is room.
        here_below: packets smaller than this are done on their caller's loop.
        turn: called on a caller's loop when a burst of its calls is over.
        refusal: makes the error for packets that come while it is set.
    """

    def __init__(
        self, max_bytes: int, here_below: int, turn: Callable[[Desk], None], refusal: Callable[[], OffloadError]
    ) -> None:
        self.max_bytes = max_bytes
        self.here_below = here_below
        self.turn = turn
        self.refusal: Callable[[], OffloadError] | None = refusal
        self.lock = threading.RLock()  # a finalizer may make a call while the same thread makes one
        self.waiting: deque[Check[Any]] = deque()  # for a worker
        self.bytes = self.done = self.failed = 0
        self.desks: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Desk] = weakref.WeakValueDictionary()
        self._latest: Desk | None = None
        self._rooms: dict[Room, Desk] = {}

    def desk(self) -> Desk:
        """The one of the running loop."""
        desk, loop = self._latest, asyncio.get_running_loop()
        if desk is None or desk.loop is not loop:
            with self.lock:
                desk = self.desks.get(loop)
                if desk is None:
                    desk = self.desks[loop] = Desk(self, port_here())
            self._latest = desk
        return desk

    def put(self, packet: Buffer, expected: Any, *, nowait: bool) -> Check[Any]:
        """Take the next place; on the caller's loop. Raises as `refusal` says, and QueueFullError."""
        if type(packet) is memoryview and packet.itemsize != 1:
            packet = packet.cast("B")
        desk = self._latest
        if desk is None or desk.loop is not asyncio.get_running_loop():
            desk = self.desk()
        # Here, not by an `__init__` of its own: half a microsecond a packet, of four.
        check: Check[Any] = Check(loop=desk.loop)
        check.desk, check.packet, check.expected, check.state = desk, packet, expected, WAITING
        check.size = size = len(packet) + PACKET_BYTES
        with self.lock:
            if self.refusal is not None:
                raise self.refusal()
            if nowait and 0 < self.bytes > self.max_bytes - size:
                raise QueueFullError(
                    f"{self.bytes} bytes are in flight, {size} more would go over the bound of {self.max_bytes}; "
                    "await `room()`, or call later"
                )
            self.bytes += size
            desk.order.append(check)
            (self.waiting if size >= self.here_below + PACKET_BYTES else desk.local).append(check)
        desk.burst += 1
        if not desk.scheduled:
            desk.schedule()
        return check

    def until(self, limit: int) -> Room:
        """A future of the running loop, done when no more than `limit` bytes are in flight."""
        desk = self.desk()
        room = Room(loop=desk.loop)
        room.limit = limit
        with self.lock:
            if self.bytes <= limit:
                room.settle()
            else:
                self._rooms[room] = desk
        return room

    def take(self, most: int) -> list[Check[Any]]:
        """The next packets for a worker; one that lost a worker comes alone. Under the lock."""
        waiting = self.waiting
        batch: list[Check[Any]] = []
        size = 0
        while waiting and len(batch) < most:
            check = waiting[0]
            if batch and (check.deaths or size + check.size > BATCH_BYTES):
                break
            waiting.popleft()
            if check.state is WAITING:
                check.state = RUNNING
                batch.append(check)
                size += check.size
                if check.deaths:
                    break
        return batch

    def give_back(self, batch: Sequence[Check[Any]]) -> list[Check[Any]]:
        """Their worker died: they wait again, before all others, but for those that it happened to twice: those."""
        twice = []
        with self.lock:
            for check in reversed(batch):
                check.deaths += 1
                if check.deaths == 2:
                    twice.append(check)
                else:
                    check.state = WAITING
                    self.waiting.appendleft(check)
        return twice

    def finish(self, batch: Sequence[Check[Any]], outcomes: Iterable[Outcome], here: Desk | None = None) -> None:
        """The outcomes of a batch are there; from any thread. `here`: the desk on whose loop this is."""
        for check, (value, error) in zip(batch, outcomes, strict=True):
            if error is None and check.expected is not NOTHING:
                value, error = judge(value, check.expected)
            check.value, check.error = value, error
        touched = {check.desk for check in batch}
        with self.lock:
            self.done += len(batch)
            for check in batch:
                if check.error is not None:
                    self.failed += 1
                if check.state is not DONE:  # it was cancelled, or all was given up
                    check.finished()
            self._give_out(touched)
        self._send(touched, here)

    def drop(self, check: Check[Any]) -> bool:
        """Take a cancelled packet out of the work; False: a worker has it. On its loop."""
        with self.lock:
            if check.state is RUNNING:
                return False
            touched = {check.desk}
            if check.state is WAITING:
                check.finished()
                self.bytes -= check.size
                check.size = 0
                self._give_out(touched)
        self._send(touched, None)
        return True

    def fail(self, refusal: Callable[[], OffloadError]) -> None:
        """Resolve all that is here with an error, and take no more; from any thread."""
        with self.lock:
            self.refusal = self.refusal or refusal
            self.waiting.clear()
            touched = set(self.desks.values())
            for desk in touched:
                desk.local.clear()
                for check in desk.order:
                    if check.state is not DONE:
                        check.error = refusal()
                        check.finished()
                        self.failed += 1
            self._give_out(touched)
        self._send(touched, None)

    def _give_out(self, touched: set[Desk]) -> None:
        """Results whose turn has come, and room; under the lock."""
        for desk in touched:
            order, ready = desk.order, desk.ready
            while order and order[0].state is DONE:
                check = order.popleft()
                self.bytes -= check.size
                ready.append(check)
        for room in [room for room in self._rooms if room.limit >= self.bytes]:
            desk = self._rooms.pop(room)
            desk.ready.append(room)
            touched.add(desk)

    def _send(self, touched: set[Desk], here: Desk | None) -> None:
        # Not under the lock: a wake gives up the GIL, and the loop that it wakes would stop at the lock at once.
        for desk in touched:
            if desk is here:
                desk.settle()
            elif desk.ready and not desk.coming:
                desk.coming = True
                desk.port.send(desk)


def judge(found: Any, expected: Any) -> Outcome:
    """The Verdict on what was found; digests and text are compared in constant time."""
    try:
        if type(found) is bytes:
            ok = hmac.compare_digest(found, expected)
        elif isinstance(found, str) and isinstance(expected, str):
            ok = hmac.compare_digest(found.encode(), expected.encode())
        else:
            ok = bool(found == expected)
    except Exception as exc:  # what they make of `==`, or of bytes beside something else
        return None, exc
    return Verdict(ok, found, expected), None
