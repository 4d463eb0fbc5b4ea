"""One stream of packets to any number of subscribers, each with a bounded queue of its own.

Promises:
    - Every subscriber gets every packet published since it subscribed, once and in order; but for "drop-oldest", which
      leaves out the oldest that wait and counts them.
    - A subscriber that does not take costs at most its `max_bytes` and one packet. What happens then is its policy:
      "wait" makes `publish` wait, and so the senders; "drop-oldest" and "disconnect" keep nobody waiting.
    - A packet is one object, however many wait for it. To a connection it goes in pieces of SEND_BYTES (`give`), so a
      hundred peers that never read cost one queue together, and each what its socket's buffer takes.
    - One turn of the loop sends about TURN_BYTES, to those who wait longest, however many subscribers there are.

For one loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from ..errors import ClosedResourceError, QueueFullError
from ..packets.codec import Buffer
from ..packets.framer import Framer, Packet
from .connection import Connection

Policy = Literal["wait", "drop-oldest", "disconnect"]
POLICIES: tuple[Policy, ...] = ("wait", "drop-oldest", "disconnect")

MAX_BYTES = 4 << 20
SEND_BYTES = 64 << 10  # past this a system call's share no longer shows
TURN_BYTES = 16 * SEND_BYTES  # a millisecond or two of joining and system calls
ITEM_COST = 64  # bytes that an item costs beside its own


class Subscription:
    """One subscriber's queue; made by `Fanout.subscribe`, left behind its `with` block.

    Attributes:
        dropped: packets that "drop-oldest" left out.
        waiting_bytes: of the packets that wait.
    """

    def __init__(self, fanout: Fanout, policy: Policy, max_bytes: int) -> None:
        self.policy = policy
        self.max_bytes = max_bytes
        self.dropped = 0
        self.waiting_bytes = 0
        self._fanout = fanout
        self._queue: deque[Buffer] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: QueueFullError | None = None
        self._ended = False

    async def batch(self, max_bytes: int | None = None) -> list[Buffer]:
        """All packets that wait, at least one, or about `max_bytes` of them; none: the fan-out is closed, all taken.

        Raises:
            QueueFullError: it was too slow, and its policy is "disconnect".
        """
        return self._take(max_bytes) if await self._filled() else []

    async def _filled(self) -> bool:
        """Wait until something waits to be taken; False: nothing more comes. Raises as `batch`."""
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._ended:
                return False
            assert self._waiter is None, "one consumer"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def _take(self, max_bytes: int | None) -> list[Buffer]:
        if max_bytes is None or self.waiting_bytes <= max_bytes:
            batch = list(self._queue)
            self._queue.clear()
            self.waiting_bytes = 0
        else:
            batch, end = [], self.waiting_bytes - max_bytes
            while self.waiting_bytes > end:
                batch.append(self._queue.popleft())
                self.waiting_bytes -= len(batch[-1]) + ITEM_COST
        self._fanout._taken()
        return batch

    @property
    def full(self) -> bool:
        return self.waiting_bytes >= self.max_bytes

    def put(self, packets: Sequence[Buffer], size: int) -> None:
        if self._error is not None or self._ended:
            return
        if self.policy == "disconnect" and self._queue and self.waiting_bytes + size > self.max_bytes:
            self._error = QueueFullError(
                f"{self.waiting_bytes} bytes wait for a subscriber, {size} more would go over its bound of "
                f"{self.max_bytes}; it is disconnected"
            )
            self._queue.clear()
            self.waiting_bytes = 0
        else:
            self._queue.extend(packets)
            self.waiting_bytes += size
            if self.policy == "drop-oldest":
                while self.waiting_bytes > self.max_bytes and len(self._queue) > 1:
                    self.waiting_bytes -= len(self._queue.popleft()) + ITEM_COST
                    self.dropped += 1
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def _send_to(self, connection: Connection) -> None:
        while await self._filled():
            await self._fanout._turns.wait(min(self.waiting_bytes, SEND_BYTES))
            await connection.send_frames(self._take(SEND_BYTES))  # none, if it was disconnected meanwhile

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._ended = True
        self._queue.clear()
        self.waiting_bytes = 0
        self._fanout._leave(self)


class _Turns:
    """Who may send in this turn of the loop: TURN_BYTES of them, and the others in the next ones, as they came."""

    def __init__(self) -> None:
        self._left = TURN_BYTES
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._renewing = False

    async def wait(self, size: int) -> None:
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)
        if self._left > 0 and not self._waiting:
            self._left -= size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size))
        await turn

    def _renew(self) -> None:
        """A turn of the loop is over."""
        self._left = TURN_BYTES
        self._renewing = bool(self._waiting)
        while self._waiting and self._left > 0:
            turn, size = self._waiting.popleft()
            if not turn.done():  # its peer has gone
                turn.set_result(None)
                self._left -= size
        if self._renewing:
            asyncio.get_running_loop().call_soon(self._renew)


class Fanout:
    """Where packets are published, and subscribed to.

        with fanout.subscribe("drop-oldest") as subscription:
            while packets := await subscription.batch(): ...

    Args:
        framer: makes the frames of `forward`.
    """

    def __init__(self, framer: Framer | None = None) -> None:
        self._framer = framer
        self._subscriptions: dict[Subscription, None] = {}
        self._room: asyncio.Future[None] | None = None
        self._turns = _Turns()
        self._closed = False

    def __len__(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, policy: Policy = "wait", *, max_bytes: int = MAX_BYTES) -> Subscription:
        """A queue for everything that is published from now on.

        Raises:
            ClosedResourceError: the fan-out is closed.
        """
        if policy not in POLICIES or max_bytes < 1:
            raise ValueError(f"policy is {policy!r} with {max_bytes} bytes, expected one of {POLICIES} and at least 1")
        if self._closed:
            raise ClosedResourceError("the fan-out is closed")
        subscription = Subscription(self, policy, max_bytes)
        self._subscriptions[subscription] = None
        return subscription

    async def publish(self, packets: Sequence[Buffer]) -> None:
        """Give packets to every subscriber, in this order; waits for those with the policy "wait" while they are full.

        Call from one task, or take the order as it comes. Cancelled while it waits, nothing was published.
        """
        if not packets:
            return
        while any(s.full for s in self._subscriptions if s.policy == "wait"):
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)
        size = sum(map(len, packets)) + ITEM_COST * len(packets)
        for subscription in list(self._subscriptions):
            subscription.put(packets, size)

    async def forward(self, packets: Sequence[Packet]) -> None:
        """Publish packets of connections as frames, each encoded once for all subscribers. Waits as `publish`.

        Raises:
            PacketError: the framing cannot carry one; nothing was published.
        """
        assert self._framer is not None, "a fan-out that forwards has a framer"
        if self._subscriptions:
            await self.publish([self._framer.forward(packet) for packet in packets])

    async def give(self, connection: Connection, policy: Policy = "wait", *, max_bytes: int = MAX_BYTES) -> None:
        """Send a connection what is published from now on, until the fan-out is closed or the peer has gone.

        For the handler of a PacketServer; what is published must be frames (`Framer.encode`). What the peer sends is
        read and left. A peer that reads nothing for `Limits.send` is cut off, whatever its policy.

        Raises:
            QueueFullError: it was too slow, and its policy is "disconnect".
            BrokenResourceError, PacketError: as from the connection.
        """
        with self.subscribe(policy, max_bytes=max_bytes) as subscription:
            tasks = [asyncio.ensure_future(subscription._send_to(connection)), asyncio.ensure_future(_read(connection))]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except QueueFullError as exc:
                connection.abort(exc)
                raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    def close(self) -> None:
        """Nothing more comes: subscribers take what waits, then their end."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.end()

    def _taken(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)

    def _leave(self, subscription: Subscription) -> None:
        self._subscriptions.pop(subscription, None)
        self._taken()


async def _read(connection: Connection) -> None:
    """Until the peer has gone; what it says is nobody's business."""
    while await connection.batch():
        pass
