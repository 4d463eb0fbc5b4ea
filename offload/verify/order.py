"""Packets under way: taken in order, bounded in bytes, finished in any order, given out in order.

    Desk    one for each caller's loop or thread: its packets in order, and the results on their way out
    Order   all of them: what waits for a worker, what is in flight, who waits for room

`check.py` has the packets themselves.

Promises:
    - On each loop, and in each thread, results come in the order of the calls. Between them there is no order, so that
      one which stands still holds up nobody.
    - A wake-up for each burst, in and out: calls made in one turn of a loop wake workers once, at its end, and what is
      finished meanwhile crosses back together.
    - `lock` is never held while somebody else's code runs, nor while a loop is woken.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future as ThreadFuture
from contextvars import copy_context
from typing import Any, NamedTuple

from ..errors import OffloadError, QueueFullError
from ..loops.call import unlock
from ..loops.port import Port, port_here
from ..packets.codec import Buffer
from .check import DONE, NOTHING, PACKET_BYTES, RUNNING, WAITING, Check, Packet, Room, Submission, ThreadRoom, Verdict
from .workers import Digest, Outcome

# Digests of packets below this are done on their caller's loop. Another thread would have them done no sooner: up to
# 16 KiB of sha256 two threads and a loop do as many as the loop alone, for more CPU time. And they would stall that
# loop: a worker that gives up the GIL for a few microseconds has it again before the loop's thread, which waits for it,
# has woken, until Python interferes after 5 ms.
SMALL_BYTES = 8 << 10
BATCH_BYTES = 2 << 20  # of packets that one worker takes at once
BURST = 128  # small packets in a row after which others get the loop: a third of a millisecond
SETTLE = 500  # results given out in one turn of a loop: a quarter of a millisecond, and their callbacks


class VerifierStats(NamedTuple):
    """How a Verifier fares.

    Attributes:
        waiting: packets that no worker has taken.
        in_flight: packets whose result has not been given out, those that wait included.
        bytes_in_flight: what they count for, see `max_bytes`.
        done, failed: packets since the start; of a failed one the function raised, or its worker died twice.
        lost: how often a worker died, or could not tell, with packets in hand.
    """

    waiting: int
    in_flight: int
    bytes_in_flight: int
    done: int
    failed: int
    lost: int


class Desk(ABC):
    """One caller: its packets in order, and the results on their way out."""

    def __init__(self, owner: Order) -> None:
        self.owner = owner
        self.order: deque[Packet] = deque()  # not given out; under the owner's lock
        self.ready: deque[Packet | Room | ThreadRoom] = deque()  # to be settled
        self.local: deque[Packet] = deque()  # to be done here
        self.at_once = 0  # packets done in the call itself, which the owner has not counted yet

    def next_local(self) -> Packet | None:
        """The next packet that is to be done here; from any thread."""
        try:
            return self.local.popleft()
        except IndexError:  # a look before might lie: another thread may close the verifier
            return None

    @abstractmethod
    def send(self) -> None:
        """See to it that what is ready is settled; from any thread, not under the lock."""

    @abstractmethod
    def settle(self) -> None:
        """Give out results."""


class ThreadDesk(Desk):
    """A plain thread: its results are settled by whoever has them."""

    def __init__(self, owner: Order) -> None:
        super().__init__(owner)
        self.settling = threading.Lock()

    def send(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Give out results; one thread at a time, or they would overtake each other."""
        # Who finds it taken has appended before: whoever settles now looks again when it has let go.
        while self.ready and self.settling.acquire(blocking=False):
            try:
                while self.ready:
                    self.ready.popleft().settle()
            finally:
                self.settling.release()


class LoopDesk(Desk):
    """A loop: what is to be done on it, too."""

    def __init__(self, owner: Order, port: Port) -> None:
        super().__init__(owner)
        self.port, self.loop = port, port.loop
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

    def send(self) -> None:
        if not self.coming:
            self.coming = True
            self.port.send(self)

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
        here_below: packets smaller than this are done on their caller's loop, or thread.
        turn: called on a caller's loop when a burst of its calls is over.
        refusal: makes the error for packets that come while it is set.
        digest: does packets that cost less than to queue them, in the call itself.
        context: whether the function is to see its caller's context variables.
    """

    def __init__(
        self,
        max_bytes: int,
        here_below: int,
        turn: Callable[[LoopDesk], None],
        refusal: Callable[[], OffloadError],
        *,
        digest: Digest | None = None,
        context: bool = False,
    ) -> None:
        self.max_bytes = max_bytes
        self.here_below = here_below
        self.turn = turn
        self.context = context
        self._once = digest and digest.once
        self._at_once_below = 0 if digest is None else SMALL_BYTES
        self.refusal: Callable[[], OffloadError] | None = refusal
        self.lock = threading.RLock()  # a finalizer may make a call while the same thread makes one
        self.waiting: deque[Packet] = deque()  # for a worker
        self.bytes = self.done = self.failed = 0
        # By loop, or number of the thread. A new thread with an old one's number finds that one's desk: no matter.
        self.desks: weakref.WeakValueDictionary[object, Desk] = weakref.WeakValueDictionary()
        self._latest: LoopDesk | None = None
        self._rooms: dict[Room | ThreadRoom, Desk] = {}

    def desk(self) -> LoopDesk:
        """The one of the running loop."""
        desk, loop = self._latest, asyncio.get_running_loop()
        if desk is None or desk.loop is not loop:
            with self.lock:
                found = self.desks.get(loop)
                desk = found if isinstance(found, LoopDesk) else LoopDesk(self, port_here())
                self.desks[loop] = desk
            self._latest = desk
        return desk

    def thread_desk(self) -> ThreadDesk:
        """The one of the running thread, for those without a loop."""
        number = threading.get_ident()
        with self.lock:
            found = self.desks.get(number)
            desk = found if isinstance(found, ThreadDesk) else ThreadDesk(self)
            self.desks[number] = desk
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
        desk.burst += 1
        if not desk.scheduled:
            desk.schedule()
        # Whose turn it is at once, as far as this loop knows: see `_give_out` for the order of these two looks.
        if (
            len(packet) < self._at_once_below
            and desk.burst <= BURST
            and not desk.order
            and not desk.ready
            and self.refusal is None
        ):
            try:
                value: Any = self._once(packet)  # type: ignore[misc]
                if expected is not NOTHING:
                    value = verdict(hmac.compare_digest(value, expected), value, expected)
            except Exception:  # no bytes, or not what a digest is compared with: the long way tells the caller
                pass
            else:
                desk.at_once += 1
                desk.burst += len(packet) >> 9  # half a kilobyte of sha256 takes as long as a small packet, or half
                check.set_result(value)
                return check
        check.desk, check.packet, check.expected, check.state = desk, packet, expected, WAITING
        check.size = len(packet) + PACKET_BYTES
        if self.context:
            check.context = copy_context()
        self._accept(check, nowait=nowait)
        return check

    def submit(
        self, packet: Buffer, expected: Any, here: Callable[[Packet], Outcome], *, nowait: bool
    ) -> tuple[Submission[Any], bool]:
        """Take the next place, from any thread; whether that is for a worker. Errors as for `put`.

        Args:
            here: does a packet that is to be done in the caller's thread.
        """
        if type(packet) is memoryview and packet.itemsize != 1:
            packet = packet.cast("B")
        submission: Submission[Any] = Submission(self.thread_desk(), packet, expected)
        if self.refusal is not None:
            raise self.refusal()
        if self.context:
            submission.context = copy_context()
        if len(packet) >= self.here_below:
            self._accept(submission, nowait=nowait)
            return submission, True
        # Before it has a place, which nobody else of this thread can take: so a close does not find it half done.
        outcome = here(submission)
        submission.state = RUNNING
        self._accept(submission, nowait=nowait)
        self.finish([submission], [outcome])
        return submission, False

    def _accept(self, check: Packet, *, nowait: bool) -> None:
        desk, size = check.desk, check.size
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
            if check.state is WAITING:
                (self.waiting if size >= self.here_below + PACKET_BYTES else desk.local).append(check)

    def until(self, limit: int) -> Room:
        """A future of the running loop, done when no more than `limit` bytes are in flight."""
        desk = self.desk()
        room = Room(loop=desk.loop)
        self._wait(room, desk, limit)
        return room

    def thread_until(self, limit: int) -> ThreadRoom:
        """The same for a plain thread."""
        room = ThreadRoom()
        self._wait(room, self.thread_desk(), limit)
        return room

    def _wait(self, room: Room | ThreadRoom, desk: Desk, limit: int) -> None:
        room.limit = limit
        with self.lock:
            if self.bytes > limit:
                self._rooms[room] = desk
                return
        room.settle()

    def forget(self, room: Room | ThreadRoom) -> None:
        """Nobody waits for it any more."""
        with self.lock:
            self._rooms.pop(room, None)

    def after_fork(self) -> None:
        """In a forked child: any lock may have been held by a thread that is not here."""
        self.lock = threading.RLock()
        for desk in list(self.desks.values()):
            if isinstance(desk, ThreadDesk):
                desk.settling = threading.Lock()
            for each in (*desk.order, *desk.ready, *self._rooms):
                if isinstance(each, ThreadFuture):
                    unlock(each)

    def stats(self, lost: int) -> VerifierStats:
        with self.lock:
            desks = list(self.desks.values())
            waiting = sum(c.state is WAITING for queue in (self.waiting, *(d.local for d in desks)) for c in queue)
            in_flight = sum(len(desk.order) for desk in desks)
            done = self.done + sum(desk.at_once for desk in desks)
            return VerifierStats(waiting, in_flight, self.bytes, done, self.failed, lost)

    def counted(self, desk: Desk) -> None:
        """Count what was done in calls of its caller; in that one's thread."""
        with self.lock:
            self.done += desk.at_once
            desk.at_once = 0

    def take(self, most: int) -> list[Packet]:
        """The next packets for a worker; one that lost a worker comes alone. Under the lock."""
        waiting = self.waiting
        batch: list[Packet] = []
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

    def give_back(self, batch: Sequence[Packet]) -> list[Packet]:
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

    def finish(self, batch: Sequence[Packet], outcomes: Iterable[Outcome], here: LoopDesk | None = None) -> None:
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

    def drop(self, check: Packet) -> bool:
        """Take a cancelled packet out of the work; False: a worker has it. On its loop."""
        with self.lock:
            if check.state is RUNNING:
                return False
            touched = {check.desk}
            if isinstance(check, Submission):
                check.asked = True  # another thread may settle it before this one goes on
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
                # It is in one of the two at any time: a caller that looks at both, this one first, sees it.
                ready.append(order[0])
                self.bytes -= order.popleft().size
        for room in [room for room in self._rooms if room.limit >= self.bytes]:
            desk = self._rooms.pop(room)
            desk.ready.append(room)
            touched.add(desk)

    def _send(self, touched: set[Desk], here: LoopDesk | None) -> None:
        # Not under the lock: a wake gives up the GIL, and the loop that it wakes would stop at the lock at once.
        for desk in touched:
            if desk is here:
                desk.settle()
            elif desk.ready:
                desk.send()


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
    return verdict(ok, found, expected), None


def verdict(ok: bool, found: Any, expected: Any) -> Verdict[Any]:
    # As `Verdict(…)` at half the price, a seventh of what a packet of 100 bytes costs.
    return tuple.__new__(Verdict, (ok, found, expected))
