"""Spans of the queue that belong to one caller: nobody gets in, and nothing can keep one for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future as ThreadFuture

import pytest

from offload import Call, Calls, ClosedResourceError, DeadlockError, LoopThread, QueueFullError


@pytest.fixture(name="thread")
async def open_thread() -> AsyncIterator[LoopThread]:
    async with LoopThread("resource") as thread:
        yield thread


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def joined(other: threading.Thread) -> None:
    async with LoopThread("joins") as thread:
        await thread.call(other.join)


class Waiter:
    """A coroutine function that says when it has begun, and returns when it may."""

    def __init__(self) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self) -> None:
        self.event, self.loop = asyncio.Event(), asyncio.get_running_loop()
        self.entered.set_result(None)
        await self.event.wait()

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)

    def open(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.event.set)


async def test_no_intruder_from_loops_threads_and_coroutines(thread: LoopThread) -> None:
    """Between the calls of a span nobody else's call runs, whoever makes it, however."""
    log: list[str] = []

    async def crowd(name: str) -> None:
        for n in range(30):
            if random.random() < 0.3:
                async with thread.exclusive() as span:
                    for _ in range(4):
                        await span.call(log.append, f"{name} span {n}")
                        await asyncio.sleep(0)
            elif random.random() < 0.5:
                await thread.run(as_coroutine, name)
            else:
                thread.call(log.append, f"{name} {n}")

    async def as_coroutine(name: str) -> None:
        log.append(f"{name} coroutine")
        await asyncio.sleep(0)

    def plain() -> None:
        for _ in range(100):
            thread.submit(log.append, "plain").result()

    threads = [threading.Thread(target=asyncio.run, args=(crowd(f"loop {n}"),)) for n in range(2)]
    threads.append(threading.Thread(target=plain))
    for other in threads:
        other.start()
    await asyncio.gather(*(crowd(f"task {n}") for n in range(3)))
    for other in threads:
        await joined(other)
    await thread.call(int)
    spans = [entry for entry in log if "span" in entry]
    assert len(spans) == 4 * len(set(spans))
    for entry in set(spans):
        first = log.index(entry)
        assert log[first : first + 4] == [entry] * 4


async def test_what_would_wait_for_its_own_span_is_a_deadlock_error(thread: LoopThread) -> None:
    """Inside a span a call by the handle itself, a second span and closing raise instead of waiting for ever."""
    async with thread.exclusive() as span:
        for call in (thread.call, thread.submit, thread.options(timeout=1).call):
            with pytest.raises(DeadlockError):
                call(int)
        for calls in (thread, span):
            with pytest.raises(DeadlockError):
                async with calls.exclusive():
                    pass
        with pytest.raises(DeadlockError):
            await thread.aclose()
        with pytest.raises(DeadlockError):
            thread.close()
        assert await span.call(int, 3) == 3
    assert await thread.call(int, 4) == 4


async def test_coroutine_on_the_thread_cannot_take_a_span(thread: LoopThread) -> None:
    """A span waits for the thread's coroutines to end, so one that asked for a span would wait for itself."""

    async def ask() -> None:
        async with thread.exclusive():
            pass

    with pytest.raises(DeadlockError):
        await thread.run(ask)


async def test_coroutine_that_awaits_another_is_not_held_up_by_a_span_in_between(thread: LoopThread) -> None:
    """What a coroutine on the thread runs there begins at once, though a span stands in the queue."""
    waiter = Waiter()

    async def inner() -> int:
        return 7

    async def outer() -> int:
        await waiter()
        return await thread.run(inner)

    call = thread.run(outer)
    await waiter.begun()
    span = asyncio.create_task(use(thread))
    await turns()
    waiter.open()
    assert await call == 7
    await span


async def use(calls: Calls) -> None:
    async with calls.exclusive() as span:
        await span.call(int)


@pytest.mark.parametrize("when", ["behind a coroutine", "behind a span"])
async def test_cancelled_while_it_waits_for_its_turn_it_makes_way(thread: LoopThread, when: str) -> None:
    """A span that is given up before it began keeps nobody, not even those who waited behind it only."""
    waiter = Waiter()
    async with contextlib.AsyncExitStack() as stack:
        running = None
        if when == "behind a span":
            await stack.enter_async_context(thread.exclusive())
        else:
            running = thread.run(waiter)
            await waiter.begun()
        wanted = asyncio.create_task(use(thread))
        await turns()
        behind: list[Call[int]] = []

        async def call() -> None:
            behind.append(thread.call(int, 5))

        await asyncio.create_task(call())
        wanted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wanted
        if when == "behind a span":
            await stack.aclose()
        assert await behind[0] == 5  # while the coroutine still runs
        if running is not None:
            waiter.open()
            await running
    assert thread.stats().queued == 0


async def test_dropped_span_behind_a_coroutine_that_starts_late_makes_way(thread: LoopThread) -> None:
    """A span given up before the coroutine in front of it has started does not wait for that to end."""
    opened, waiter = threading.Event(), Waiter()
    thread.call(opened.wait)
    running = thread.run(waiter)
    wanted = asyncio.create_task(use(thread))
    await turns()
    behind = thread.call(int, 5)
    wanted.cancel()
    await turns()
    opened.set()
    assert await behind == 5
    waiter.open()
    await running


async def test_exception_inside_ends_the_span_and_its_calls_still_run(thread: LoopThread) -> None:
    """What the block raises comes out; calls it had made run before others."""
    log: list[int] = []
    kept: list[Calls] = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with thread.exclusive() as span:
            kept.append(span)
            span.call(log.append, 1)
            span.call(log.append, 2)
            raise ZeroDivisionError
    await thread.call(log.append, 3)
    assert log == [1, 2, 3]
    with pytest.raises(ClosedResourceError, match="span has ended"):
        kept[0].call(int)


@pytest.mark.parametrize("kind", ["call", "run"])
async def test_span_of_a_loop_that_was_closed_ends(thread: LoopThread, kind: str) -> None:
    """A loop that is closed inside a span does not keep the resource, for callers before and after."""
    loop = asyncio.new_event_loop()
    entered: ThreadFuture[None] = ThreadFuture()
    kept: list[object] = []

    async def hold() -> None:
        async with thread.exclusive():
            entered.set_result(None)
            await asyncio.Event().wait()

    def abrupt() -> None:
        with contextlib.suppress(RuntimeError):
            kept.append(loop.create_task(hold()))
            loop.run_forever()

    holder = threading.Thread(target=abrupt)
    holder.start()
    await asyncio.wrap_future(entered)

    async def coroutine() -> int:
        return 5

    before = thread.call(int, 5) if kind == "call" else thread.run(coroutine)
    loop.call_soon_threadsafe(loop.stop)
    await joined(holder)
    assert not before.done()
    loop.close()
    assert await before == 5
    assert await thread.call(int, 6) == 6
    task = kept.pop()
    assert isinstance(task, asyncio.Task)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coro = task.get_coro()
    assert coro is not None
    with contextlib.suppress(RuntimeError):
        coro.close()


async def test_close_during_a_span_lets_it_end(thread: LoopThread) -> None:
    """Closing refuses everybody else at once, and waits for the span's calls."""
    log: list[int] = []
    closing = None
    async with thread.exclusive() as span:
        closing = asyncio.create_task(thread.aclose())
        await turns()
        await span.call(log.append, 1)

        async def other() -> None:
            with pytest.raises(ClosedResourceError):
                thread.call(int)

        await asyncio.create_task(other())
        await span.call(log.append, 2)
        assert not closing.done()
    await closing
    assert log == [1, 2]


async def test_coroutines_in_and_around_a_span(thread: LoopThread) -> None:
    """It begins when coroutines before it have ended, ends when its own have, and others start after it."""
    log: list[str] = []
    called = asyncio.Event()  # on the thread

    async def work(name: str) -> None:
        log.append(f"{name} begins")
        await (called.wait() if name == "inside" else asyncio.sleep(0.002))
        log.append(f"{name} ends")

    before = thread.run(work, "before")
    async with thread.exclusive() as span:
        after: list[Call[None]] = []

        async def later() -> None:
            after.append(thread.run(work, "after"))
            after.append(thread.call(log.append, "after that"))

        await asyncio.create_task(later())
        span.run(work, "inside")
        await span.call(log.append, "call inside")
        await span.call(called.set)
    await asyncio.gather(before, *after)
    assert log == [
        *("before begins", "before ends", "inside begins", "call inside", "inside ends"),
        *("after begins", "after that", "after ends"),
    ]


async def test_nowait_counts_for_spans_too() -> None:
    """A span that asks not to wait is refused where a call would be."""
    opened = threading.Event()
    entered: ThreadFuture[None] = ThreadFuture()

    def block() -> None:
        entered.set_result(None)
        opened.wait()

    async with LoopThread(max_calls=1) as thread:
        blocked = thread.call(block)
        await asyncio.wrap_future(entered)
        queued = thread.call(int)
        with pytest.raises(QueueFullError):
            async with thread.options(nowait=True).exclusive():
                pass
        opened.set()
        await asyncio.gather(blocked, queued)


async def test_plain_threads_use_a_span_that_is_theirs(thread: LoopThread) -> None:
    """A span's calls may be made from another thread and another task."""
    async with thread.exclusive() as span:
        numbers: list[int] = []
        other = threading.Thread(target=lambda: numbers.append(span.submit(int, 4).result()))
        other.start()
        await joined(other)
        assert numbers == [4]


async def test_call_dropped_inside_makes_no_room_outside() -> None:
    """The bound counts the calls that wait in a queue, not those that were dropped in another."""
    gate = threading.Event()
    async with LoopThread("full", max_calls=1) as thread, LoopThread("other") as other:
        async with thread.exclusive() as span:
            busy, dropped = span.call(gate.wait), span.call(int)
            dropped.cancel()
            first = await other.call(thread.options(nowait=True).submit, int)
            with pytest.raises(QueueFullError, match="1 calls are queued, the bound is 1"):
                await other.call(thread.options(nowait=True).submit, int)
            gate.set()
            assert await busy
        assert await asyncio.wrap_future(first) == 0


async def test_post_inside_runs_inside() -> None:
    """What is posted by the span's own handle is one of its calls."""
    ran: list[str] = []
    async with LoopThread("posted") as thread, thread.exclusive() as span:
        span.post(lambda: ran.append("inside"))
        await span.call(int)
        assert ran == ["inside"]
