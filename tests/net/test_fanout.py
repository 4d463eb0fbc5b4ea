"""Fan-out: every subscriber gets all of it in order, and one that does not take costs what its policy says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from offload.errors import BrokenResourceError, ClosedResourceError, QueueFullError
from offload.net.connection import Connection
from offload.net.dial import connect
from offload.net.fanout import ITEM_COST, POLICIES, SEND_BYTES, TURN_BYTES, Fanout, Policy, Subscription, _Turns
from offload.net.limits import Limits
from offload.net.server import PacketServer
from offload.packets.codec import Buffer
from offload.packets.framer import Packet
from offload.packets.framing import LineFramer, PrefixFramer, framer_factory


async def all_of(subscription: Subscription) -> list[Buffer]:
    got: list[Buffer] = []
    while batch := await subscription.batch():
        got += batch
    return got


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_hundred_subscribers_get_everything_in_order(policy: Policy) -> None:
    """Each of a hundred subscribers that take gets every packet, once and in order, then the end."""
    fanout = Fanout()
    subscriptions = [fanout.subscribe(policy) for _ in range(100)]
    tasks = [asyncio.ensure_future(all_of(s)) for s in subscriptions]
    packets = [b"%d" % n for n in range(1000)]
    for at in range(0, len(packets), 10):
        await fanout.publish(packets[at : at + 10])
    fanout.close()
    assert await asyncio.gather(*tasks) == [packets] * 100
    for subscription in subscriptions:
        with subscription:
            pass
    assert len(fanout) == 0


async def test_subscriber_gets_what_comes_after_it() -> None:
    """Who subscribes later gets what is published later, and who leaves gets nothing more."""
    fanout = Fanout()
    with fanout.subscribe() as early:
        await fanout.publish([b"one"])
        with fanout.subscribe() as late:
            await fanout.publish([b"two"])
            assert await late.batch() == [b"two"]
        await fanout.publish([b"three"])
        assert await early.batch() == [b"one", b"two", b"three"]
    assert len(fanout) == 0
    await fanout.publish([b"to nobody"])


async def test_waiting_policy_makes_the_publisher_wait() -> None:
    """A full subscriber that wants everything makes `publish` wait, until it takes or leaves."""
    fanout = Fanout()
    slow = fanout.subscribe("wait", max_bytes=100)
    await fanout.publish([bytes(100)])
    for leave in (False, True):
        publishing = asyncio.ensure_future(fanout.publish([bytes(100)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not publishing.done()
        if leave:
            with slow:
                pass
        else:
            assert await slow.batch() == [bytes(100)]
        await publishing
    assert slow.waiting_bytes == 0


async def test_publish_that_is_cancelled_while_it_waits_published_nothing() -> None:
    """A publisher that gives up leaves no half of it, and the next one goes on."""
    fanout = Fanout()
    slow = fanout.subscribe("wait", max_bytes=1)
    other = fanout.subscribe("drop-oldest")
    await fanout.publish([b"one"])
    publishing = asyncio.ensure_future(fanout.publish([b"given up"]))
    await asyncio.sleep(0)
    publishing.cancel()
    await asyncio.wait([publishing])
    assert await slow.batch() == [b"one"]
    await fanout.publish([b"two"])
    assert await slow.batch() == [b"two"]
    assert await other.batch() == [b"one", b"two"]


async def test_drop_oldest_leaves_out_the_oldest_and_counts() -> None:
    """Over its bound the oldest packets go, the newest always stays."""
    fanout = Fanout()
    slow = fanout.subscribe("drop-oldest", max_bytes=3 * (10 + ITEM_COST))
    for number in range(10):
        await fanout.publish([b"%010d" % number])
    assert slow.dropped == 7
    assert await slow.batch() == [b"%010d" % n for n in (7, 8, 9)]
    await fanout.publish([bytes(1000)])
    assert await slow.batch() == [bytes(1000)]


async def test_disconnect_ends_the_slow_one_only() -> None:
    """Over its bound a subscriber is told and ended; another one with the same packets is not."""
    fanout = Fanout()
    slow = fanout.subscribe("disconnect", max_bytes=200)
    quick = fanout.subscribe("disconnect", max_bytes=200)
    for number in range(10):
        await fanout.publish([b"%010d" % number])
        assert await quick.batch() == [b"%010d" % number]
    with pytest.raises(QueueFullError, match="148 bytes wait for a subscriber, 74 more would go over its bound of 200"):
        await slow.batch()
    assert slow.waiting_bytes == 0


async def test_closed_fanout_takes_no_subscribers() -> None:
    """Nobody can subscribe to what has ended, and a policy must be one."""
    fanout = Fanout()
    with pytest.raises(ValueError, match="policy is 'hope'"):
        fanout.subscribe("hope")  # type: ignore[arg-type]
    fanout.close()
    with pytest.raises(ClosedResourceError, match="the fan-out is closed"):
        fanout.subscribe()


class FanoutMachine(RuleBasedStateMachine):
    """Subscribers of every policy that take when they like, against lists that hold what each should get."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(debug=True)
        self.fanout = Fanout()
        self.count = 0
        self.subscribers: list[tuple[Subscription, deque[bytes]]] = []

    @rule(policy=st.sampled_from(POLICIES), size=st.sampled_from([1, 200, 500]))
    def subscribe(self, policy: Policy, size: int) -> None:
        self.subscribers.append((self.fanout.subscribe(policy, max_bytes=size), deque()))

    @rule(count=st.integers(1, 5))
    def publish(self, count: int) -> None:
        if any(s.policy == "wait" and s.full for s, _ in self.subscribers):
            return
        packets = [b"%06d" % (self.count + n) for n in range(count)]
        self.count += count
        self.runner.run(self.fanout.publish(packets))
        for _, expected in self.subscribers:
            expected.extend(packets)

    @rule(index=st.integers(0, 5), leave=st.booleans())
    def take(self, index: int, leave: bool) -> None:
        if index >= len(self.subscribers):
            return
        subscription, expected = self.subscribers[index]
        if leave:
            with self.subscribers.pop(index)[0]:
                return
        if not expected:
            return
        try:
            got = self.runner.run(subscription.batch())
        except QueueFullError:
            assert subscription.policy == "disconnect"
            self.subscribers.pop(index)[0].__exit__(None, None, None)
            return
        dropped = len(expected) - len(got)
        assert dropped == (subscription.dropped if subscription.policy == "drop-oldest" else 0)
        assert got == list(expected)[dropped:]
        subscription.dropped = 0
        expected.clear()

    @rule()
    def bounds(self) -> None:
        for subscription, _ in self.subscribers:
            largest = 5 * (6 + ITEM_COST)  # one publish
            assert subscription.waiting_bytes <= subscription.max_bytes + largest

    def teardown(self) -> None:
        self.runner.close()


def test_machine_of_subscribers() -> None:
    """Whatever subscribers do in whatever order, each gets what it should and holds what it may."""
    run_state_machine_as_test(FanoutMachine, settings=settings(max_examples=50, deadline=None))


async def test_subscriber_that_never_reads_harms_nobody() -> None:
    """Over real sockets: one of ten subscribers never reads; it is cut off, the nine get all of it in order."""
    fanout, count = Fanout(), 300
    gone: list[str] = []

    async def give(connection: Connection) -> None:
        with fanout.subscribe("disconnect", max_bytes=1 << 20) as subscription:
            try:
                while packets := await subscription.batch():
                    frames = [part for packet in packets for part in connection.framer.parts(packet)]
                    await connection.send_frames(frames)
            except (QueueFullError, BrokenResourceError) as exc:
                gone.append(type(exc).__name__)
                connection.abort()

    async def read(connection: Connection) -> list[bytes]:
        return [packet.payload async for packet in connection]

    payloads = [b"%06d" % n + bytes(50_000) for n in range(count)]
    server = PacketServer(give, limits=Limits(send=0.5))
    async with server:
        address = await server.listen("127.0.0.1:0")
        async with asyncio.TaskGroup() as group:

            async def reader() -> list[bytes]:
                async with connect(address, PrefixFramer) as connection:
                    return await read(connection)

            readers = [group.create_task(reader()) for _ in range(9)]
            async with connect(address, PrefixFramer) as never:
                never.hold("the test")
                while len(fanout) < 10:  # noqa: ASYNC110 - subscribed when the server's tasks have run
                    await asyncio.sleep(0)
                for payload in payloads:
                    await fanout.publish([payload])
                    await asyncio.sleep(0.002)  # the pace of a sender that nine readers can follow
                fanout.close()
                results = [await task for task in readers]
    assert gone == ["BrokenResourceError"] or gone == ["QueueFullError"]
    assert [[p[:6] for p in result] for result in results] == [[p[:6] for p in payloads]] * 9


async def test_encoded_frames_are_made_once_for_all() -> None:
    """What is published may be frames already; subscribers then share their bytes."""
    fanout, framer = Fanout(), LineFramer()
    with fanout.subscribe() as one, fanout.subscribe() as two:
        await fanout.publish([framer.encode(b"line")])
        assert (await one.batch())[0] is (await two.batch())[0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
async def test_a_hundred_that_never_read_cost_one_queue(policy: Policy) -> None:
    """Memory for a hundred subscribers that read nothing stays within one queue and each one's socket buffer."""
    asyncio.get_running_loop().set_debug(False)
    bound, each, count = 2 << 20, 50_000, 800
    fanout = Fanout(PrefixFramer())

    async def handler(connection: Connection) -> None:
        small_buffer(connection, socket.SO_SNDBUF)
        await fanout.give(connection, policy, max_bytes=bound)

    server = PacketServer(handler, limits=Limits(send=None))
    async with contextlib.AsyncExitStack() as stack:
        address = await server.listen("127.0.0.1:0")
        for _ in range(100):
            silent = await stack.enter_async_context(connect(address, PrefixFramer))
            silent.hold("the test")
            small_buffer(silent, socket.SO_RCVBUF)
        while len(fanout) < 100:  # noqa: ASYNC110 - subscribed when the server's tasks have run
            await asyncio.sleep(0.001)
        tracemalloc.start()
        try:
            publishing = asyncio.ensure_future(publish(fanout, each, count))
            if policy == "wait":
                while not all(s.full for s in fanout._subscriptions):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.001)
                assert not publishing.done()
            else:
                await publishing
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        if policy == "wait":
            publishing.cancel()
            await asyncio.wait([publishing])
        await server.aclose()
    # The queues share their packets; what a transport has not given to its socket is a slice, and up to one under way.
    assert held <= 1.2 * (bound + 20 * each) + 100 * (2 * SEND_BYTES + each)


async def test_one_turn_of_the_loop_sends_to_some_subscribers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many subscribers wait for a burst, others get the loop after TURN_BYTES of it, and nobody is left out."""
    turn, sent = 0, [0]
    write = Connection.write_frames

    def watched(self: Connection, frames: list[Buffer]) -> None:
        sent.extend([0] * (turn + 1 - len(sent)))
        sent[turn] += sum(map(len, frames))
        write(self, frames)

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    fanout = Fanout(PrefixFramer())
    async with PacketServer(fanout.give) as server, contextlib.AsyncExitStack() as stack:
        address = await server.listen("127.0.0.1:0")
        peers = [await stack.enter_async_context(connect(address, PrefixFramer)) for _ in range(50)]
        while len(fanout) < 50:  # noqa: ASYNC110 - subscribed when the server's tasks have run
            await asyncio.sleep(0.001)
        monkeypatch.setattr(Connection, "write_frames", watched)
        counting = asyncio.ensure_future(count())
        packets = [Packet(b"%04d" % n + bytes(4000), 0) for n in range(64)]
        await fanout.forward(packets)
        for peer in peers:
            for expected in packets:
                assert (found := await peer.packet()) is not None
                assert found.payload == expected.payload
        counting.cancel()
    assert sum(sent) == 50 * 64 * 4008
    # The first ones are not told apart from the turn that renewed it.
    assert max(sent) <= 2 * (TURN_BYTES + SEND_BYTES)


async def test_who_leaves_while_it_waits_for_its_turn_is_passed_over() -> None:
    """Turns go on, in the order in which they were asked for, when some who wait have gone."""
    turns, order = _Turns(), list[int]()

    async def send(number: int) -> None:
        await turns.wait(TURN_BYTES)
        order.append(number)

    tasks = [asyncio.ensure_future(send(number)) for number in range(8)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    async with asyncio.timeout(30):
        await asyncio.wait(tasks)
    assert order == [0, 4, 5, 6, 7]


def small_buffer(connection: Connection, which: int) -> None:
    """Let the system hold little, so that what is held is ours."""
    assert connection._transport is not None
    connection._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, which, 4096)


async def publish(fanout: Fanout, each: int, count: int) -> None:
    burst = 20
    for number in range(0, count, burst):
        await fanout.forward([Packet(b"%06d" % n + bytes(each), 0) for n in range(number, number + burst)])
        await asyncio.sleep(0)


@pytest.mark.parametrize("text", ["u32", "octet", "lines", ">HB,size=0,counts=header", "<4sIH,size=1,magic=OFF1,crc32"])
async def test_packets_are_forwarded_as_they_came(text: str) -> None:
    """A subscriber gets the very bytes that a sender sent, header fields, magic and digest among them."""
    make = framer_factory(text)
    fields = {">": (7,), "<": (513,)}.get(text[0], ())
    stream = b"".join(make().encode(b"packet %d" % number, *fields) for number in range(3))
    fanout = Fanout(make())
    with fanout.subscribe() as subscription:
        await fanout.forward(make().feed(stream))
        assert b"".join(await subscription.batch()) == stream


async def test_batches_have_the_size_that_was_asked_for() -> None:
    """What waits can be taken piece by piece: in order, and all of it."""
    fanout = Fanout()
    with fanout.subscribe() as subscription:
        packets = [b"%03d" % n + bytes(1000) for n in range(100)]
        await fanout.publish(packets)
        fanout.close()
        got: list[list[Buffer]] = []
        while batch := await subscription.batch(10_000):
            got.append(batch)
    assert [packet for batch in got for packet in batch] == packets
    assert {len(batch) for batch in got[:-1]} == {10}
    assert subscription.waiting_bytes == 0
