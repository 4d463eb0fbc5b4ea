"""What users of libraries with worker threads complain of; each complaint is a test here, by its number."""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from offload import (
    BrokenResourceError,
    Call,
    CallState,
    ClosedResourceError,
    DeadlockError,
    LoopThread,
    Resource,
)
from offload.loops.port import Bell


class Gate:
    """A function that says when it has begun, and returns when it may."""

    def __init__(self) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self.opened = threading.Event()

    def __call__(self, value: int = 0) -> int:
        self.entered.set_result(None)
        self.opened.wait()
        return value

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)


@pytest.fixture(name="gate")
def new_gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def run_program(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=20, check=False)


OPEN = "import asyncio, threading, sys, os\nfrom offload import LoopThread\n"


def test_01_process_ends_with_a_connection_left_open() -> None:
    """complaint 1: the process never ended, or lost its writes; here what is queued runs, and it ends."""
    done = run_program(OPEN + "t = LoopThread().__enter__()\nfor n in range(100): t.submit(print, n)\n")
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [str(n) for n in range(100)])


def test_02_exit_has_a_deadline_that_is_an_option() -> None:
    """complaint 2: users set `.daemon` on the thread; here exit_timeout is an argument, and the blocker is named."""
    done = run_program(
        OPEN + "t = LoopThread('stuck', exit_timeout=0.1).__enter__()\nt.submit(threading.Event().wait)\n"
    )
    assert done.returncode == 0
    assert "'stuck' still works 0.1 s after the program's end" in done.stderr
    assert not isinstance(LoopThread(), threading.Thread)


def test_03_whether_it_lives_is_public() -> None:
    """complaint 3: users poked at the thread to see whether it lives; here `closed`, `stats()` and `close(timeout)`."""
    thread = LoopThread()
    assert thread.closed
    with thread:
        assert not thread.closed
        assert thread.stats().queued == 0
        thread.close(5.0)
        assert thread.closed


async def test_04_caller_whose_loop_is_gone_hurts_nobody(gate: Gate) -> None:
    """complaint 4: the worker raised "Event loop is closed"; here the call is abandoned and counted."""

    async def leave() -> None:
        calls.append(thread.call(gate))
        await gate.begun()
        asyncio.get_running_loop().stop()

    calls: list[Call[int]] = []
    loop = asyncio.new_event_loop()
    async with LoopThread() as thread:

        def other() -> None:
            task = loop.create_task(leave())
            loop.run_forever()
            task.exception() if task.done() else task.cancel()
            loop.close()

        async with LoopThread("other") as helper:
            await helper.run(asyncio.sleep, 0)
            caller = threading.Thread(target=other)
            caller.start()
            await helper.call(caller.join)
        gate.opened.set()
        assert await thread.call(int, 5) == 5
        assert thread.stats().abandoned == 1
    assert calls[0].state is CallState.ABANDONED


async def test_05_close_from_outside_the_loop() -> None:
    """complaint 5: it could be closed by its loop only; here from any thread, with a timeout."""
    async with LoopThread("closer") as closer:
        thread = await LoopThread().start()
        await closer.call(thread.close, 5.0)
        assert thread.closed


async def test_06_cancelled_call_keeps_its_slot_while_it_runs(gate: Gate) -> None:
    """complaint 6: a cancelled call freed its slot while it worked, or ran though cancelled; here neither."""
    ran: list[int] = []
    async with LoopThread() as thread:
        running, queued, last = thread.call(gate), thread.call(ran.append, 1), thread.call(ran.append, 2)
        await gate.begun()
        running.cancel()
        queued.cancel()
        await asyncio.sleep(0)
        assert (ran, running.done(), queued.cancelled()) == ([], False, True)
        gate.opened.set()
        await last
    assert ran == [2]


async def test_07_cancelled_caller_returns_after_the_coroutine_has_ended() -> None:
    """complaint 7: the task went on, or its caller returned too early; here cleanup comes first."""
    entered: ThreadFuture[None] = ThreadFuture()
    log: list[str] = []

    async def work() -> None:
        entered.set_result(None)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            log.append("cleaned up")

    async with LoopThread() as thread:
        call = thread.run(work)
        await asyncio.wrap_future(entered)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert log == ["cleaned up"]


async def test_08_cancelled_caller_always_sees_it() -> None:
    """complaint 8: races of cancel and outcome swallowed one of them; here either is seen, and the next call works."""
    async with LoopThread() as thread:
        for n in range(500):
            task = asyncio.ensure_future(asyncio.wait([thread.call(int, 1)]))
            waiter = asyncio.create_task(outcome(thread))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            if waiter.cancel():
                await asyncio.wait([waiter])
                assert waiter.cancelled()
            await task


async def outcome(thread: LoopThread) -> int:
    return await thread.call(int, 1)


async def test_09_stopped_loop_fails_its_calls() -> None:
    """complaint 9: a call to a stopped loop hung for ever; here it has an error that says why."""
    thread = await LoopThread().start()
    with pytest.raises(BrokenResourceError):
        await thread.run(stop_and_wait)
    with pytest.raises(BrokenResourceError):
        thread.call(int)
    await thread.aclose()


async def stop_and_wait() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.Event().wait()


async def test_10_async_close_leaves_the_loop_free(gate: Gate) -> None:
    """complaint 10: an async close joined the thread on the loop; here the loop runs until the thread has ended."""
    thread = await LoopThread().start()
    running = thread.call(gate)
    closing = asyncio.create_task(thread.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()
    gate.opened.set()
    await closing
    assert await running == 0


async def test_11_call_from_the_thread_itself_does_not_deadlock() -> None:
    """complaint 11: "would deadlock" by guess; here a call from the thread runs at once, and waiting there raises."""
    async with LoopThread() as thread:

        def nested() -> int:
            with pytest.raises(DeadlockError):
                thread.close()
            return thread.submit(lambda: thread.submit(int, 7).result()).result()

        assert await asyncio.wait_for(thread.call(nested), 5) == 7


async def test_12_default_executor_is_never_used() -> None:
    """complaint 12: the shared pool was full, so name look-ups timed out; here it may be full."""
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(1)
    gate = Gate()
    loop.set_default_executor(pool)
    full = loop.run_in_executor(None, gate)
    async with Resource(lambda: sqlite3.connect(":memory:")) as db:
        assert await db.call(lambda c: c.execute("select 1").fetchall()) == [(1,)]
    gate.opened.set()
    await full


async def test_13_blocked_resource_blocks_only_itself(gate: Gate) -> None:
    """complaint 13: one bad integration took the whole pool; here a hundred others go on."""
    async with LoopThread("bad") as bad:
        blocked = bad.call(gate)
        await gate.begun()
        async with asyncio.TaskGroup() as group:
            for n in range(100):
                group.create_task(one(n))
        assert not blocked.done()
        gate.opened.set()
        await blocked


async def one(n: int) -> None:
    async with LoopThread(f"good {n}") as thread:
        assert await thread.call(int, n) == n


@pytest.mark.slow
def test_14_ctrl_c_once_is_enough() -> None:
    """complaint 14: it took three presses; here one, even where the resource has no interrupt."""
    done = run_program(
        OPEN
        + """
import signal
def block():
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
async def main():
    async with LoopThread('stuck', exit_timeout=0.2) as t:
        await t.call(block)
asyncio.run(main())
"""
    )
    assert "KeyboardInterrupt" in done.stderr
    assert "'stuck' still works 0.2 s after Ctrl-C" in done.stderr
    assert "block" in done.stderr


def test_15_closing_at_exit_needs_no_new_thread() -> None:
    """complaint 15: "can't create new thread at interpreter shutdown"; here closing at exit makes none."""
    done = run_program(
        OPEN
        + """
import atexit
def refuse(*a): raise RuntimeError("can't create new thread at interpreter shutdown")
t = LoopThread(on_close=lambda: print("closed")).__enter__()
atexit.register(lambda: setattr(threading.Thread, "start", refuse))
"""
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "closed\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_16_forked_child_does_not_hang() -> None:
    """complaint 16: a forked child waited for its parent's loop; here it is told, and opens its own."""
    done = run_program(
        OPEN
        + """
from offload import ForkedError
with LoopThread() as t:
    if os.fork() == 0:
        try: t.submit(int)
        except ForkedError: pass
        else: os._exit(1)
        with LoopThread() as own: os._exit(own.submit(int, 7).result())
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    assert t.submit(int, 3).result() == 3
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_17_close_wakes_everybody_who_waits() -> None:
    """complaint 17: producers slept on when a queue closed; here a call has its outcome or an error, always."""
    thread = await LoopThread().start()
    outcomes: list[object] = []

    def produce() -> None:
        with suppress(ClosedResourceError):
            while True:
                outcomes.append(thread.submit(int).result())

    producers = [threading.Thread(target=produce) for _ in range(4)]
    for producer in producers:
        producer.start()
    await thread.aclose()
    async with LoopThread() as joins:
        for producer in producers:
            await joins.call(producer.join)


async def test_18_many_things_cost_one_hop() -> None:
    """complaint 18: a row a hop made reading fifteen times slower; here a thousand rows are four hops and the ends."""
    async with Resource(lambda: sqlite3.connect(":memory:")) as db:
        await db.call(lambda c: c.execute("create table t (n)"))
        await db.call(lambda c: c.executemany("insert into t values (?)", [(n,) for n in range(1000)]))
        before = db.stats().submitted
        rows = [n async for (n,) in db.iter(lambda c: c.execute("select n from t"), chunk=250, prefetch=0)]
        assert rows == [*range(1000)]
        assert db.stats().submitted - before == 7  # open, four chunks, the empty one, close


async def test_19_plain_call_makes_no_task_and_no_concurrent_future(monkeypatch: pytest.MonkeyPatch) -> None:
    """complaint 19: a hop cost a task and two futures; here a plain call makes neither."""
    async with LoopThread() as thread:
        made: list[str] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(ThreadFuture, "__init__", lambda self: made.append("future"))

        def factory(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
            made.append("task")
            return asyncio.Task(coro, loop=loop, **kwargs)

        loop.set_task_factory(factory)
        assert await thread.call(int, 3) == 3
        monkeypatch.undo()
        loop.set_task_factory(None)
    assert made == []


async def test_20_burst_costs_one_wake(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """complaint 20: a wake-up for each call drowned the loop; here one a burst."""
    wakes: list[Bell] = []
    ring = Bell.ring
    async with LoopThread() as thread:
        blocked = thread.call(gate)
        await gate.begun()

        def counted(bell: Bell) -> None:
            wakes.append(bell)
            ring(bell)

        monkeypatch.setattr(Bell, "ring", counted)
        calls = [thread.call(int) for _ in range(100)]
        assert len(wakes) <= 1
        gate.opened.set()
        await asyncio.gather(blocked, *calls)


async def test_22_cancelled_open_leaks_no_descriptor() -> None:
    """complaint 22: a cancelled open leaked its file; here whatever was made is closed, at every moment."""
    made: list[socket.socket] = []

    def factory() -> socket.socket:
        made.append(socket.socket())
        return made[-1]

    for n in range(40):
        resource = Resource(factory)
        task = asyncio.create_task(resource.start())
        for _ in range(n % 8):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
            await resource.aclose()  # it was quicker
        assert resource.closed
    assert [s.fileno() for s in made] == [-1] * len(made)


async def test_23_no_exception_is_thrown_into_a_thread() -> None:
    """complaint 23: a late asynchronous raise hit idle threads; here a cancelled call leaves its thread as it was."""
    async with LoopThread() as thread:
        ident = await thread.call(threading.get_ident)
        for _ in range(100):
            thread.call(sum, range(1000)).cancel()
        assert await thread.call(threading.get_ident) == ident


@pytest.mark.parametrize("make", ["call", "run", "submit"])
async def test_24_stop_iteration_does_not_hang(make: str) -> None:
    """complaint 24: StopIteration from a thread hung its caller; here it is a RuntimeError with its cause."""

    async def coroutine() -> None:
        next(iter(()))

    def plain() -> None:
        next(iter(()))

    async with LoopThread() as thread:
        awaitable: asyncio.Future[None]
        if make == "submit":
            awaitable = asyncio.wrap_future(thread.submit(plain))
        else:
            awaitable = thread.call(plain) if make == "call" else thread.run(coroutine)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(awaitable, 5)


async def test_25_thread_keeps_nothing_of_whoever_started_it() -> None:
    """complaint 25: a thread kept its starter's context; here calls have their caller's, and the thread none of it."""
    variable: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("variable", default=None)

    async def start() -> weakref.ref[object]:
        def mine() -> None: ...

        variable.set(mine)
        await thread.start()
        assert await thread.call(variable.get) is mine
        return weakref.ref(mine)

    thread = LoopThread()
    reference = await asyncio.create_task(start())
    try:
        assert await thread.call(variable.get) is None
        assert reference() is None
    finally:
        await thread.aclose()
