"""What users of libraries with worker threads complain of; each complaint is a test here, by its number.

Complaint 21 (proxies that a type checker sees as Any) is in `tests/typing`. Of complaint 25 two parts cannot apply: a
thread inherits its starter's context from Python 3.14 on, and uvloop is not supported on builds without the GIL.
"""

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
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import offload
from offload import (
    BrokenResourceError,
    Call,
    CallState,
    ClosedResourceError,
    DeadlockError,
    FileSink,
    LoopThread,
    PacketReader,
    PacketWriter,
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
    flags = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]  # of forks, from Python 3.12
    return subprocess.run(
        [sys.executable, *flags, "-c", source], capture_output=True, text=True, timeout=50, check=False
    )


OPEN = "import asyncio, threading, sys, os\nfrom offload import LoopThread\n"


def test_01_process_ends_with_a_connection_left_open() -> None:
    """Complaint 1: the process never ended, or lost its writes; here what is queued runs, and it ends."""
    done = run_program(OPEN + "t = LoopThread().__enter__()\nfor n in range(100): t.submit(print, n)\n")
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [str(n) for n in range(100)])


def test_02_exit_has_a_deadline_that_is_an_option() -> None:
    """Complaint 2: users set `.daemon` on the thread; here exit_timeout is an argument, and the blocker is named."""
    done = run_program(
        OPEN + "t = LoopThread('stuck', exit_timeout=0.1).__enter__()\nt.submit(threading.Event().wait)\n"
    )
    assert done.returncode == 0
    assert "'stuck' still works 0.1 s after the program's end" in done.stderr
    assert not isinstance(LoopThread(), threading.Thread)


def test_03_whether_it_lives_is_public() -> None:
    """Complaint 3: users poked at the thread to see whether it lives; here `closed`, `stats()` and `close(timeout)`."""
    thread = LoopThread()
    assert thread.closed
    with thread:
        assert not thread.closed
        assert thread.stats().queued == 0
        gate = Gate()
        thread.submit(gate)
        gate.entered.result()
        try:
            with pytest.raises(TimeoutError, match=r"has not ended after 0.01 s; .*Gate.* still runs"):
                thread.close(0.01)
            assert thread.closed
        finally:
            gate.opened.set()
        thread.close(5.0)


async def test_04_caller_whose_loop_is_gone_hurts_nobody(gate: Gate) -> None:
    """Complaint 4: the worker raised "Event loop is closed"; here the call is abandoned and counted."""

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


@pytest.mark.parametrize("kind", ["thread", "resource", "sink"])
async def test_05_close_from_outside_the_loop(kind: str, tmp_path: Path) -> None:
    """Complaint 5: it could be closed by its loop only; here from any thread, with a timeout, whatever it is."""
    makes: dict[str, Callable[[], LoopThread | Resource[socket.socket] | FileSink]] = {
        "thread": LoopThread,
        "resource": lambda: Resource(socket.socket),
        "sink": lambda: FileSink(tmp_path / "sink"),
    }
    made = makes[kind]()
    async with LoopThread("closer") as closer:
        await made.start()
        await closer.call(made.close, 5.0)
        assert isinstance(made, FileSink) or made.closed
        await made.aclose()  # once more, from its loop


async def test_06_cancelled_call_keeps_its_slot_while_it_runs(gate: Gate) -> None:
    """Complaint 6: a cancelled call freed its slot while it worked, or ran though cancelled; here neither."""
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
    """Complaint 7: the task went on, or its caller returned too early; here cleanup comes first."""
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
    """Complaint 8: races of cancel and outcome swallowed one of them; here either is seen, and the next call works."""
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
    """Complaint 9: a call to a stopped loop hung for ever; here it has an error that says why."""
    thread = await LoopThread().start()
    waiting = thread.run(asyncio.Event().wait)
    for call in (waiting, thread.run(stop_and_wait)):
        with pytest.raises(BrokenResourceError, match="loop stopped before"):
            await call
    makes: list[Callable[[Any], object]] = [thread.call, thread.run, thread.submit, thread.post]
    for make in makes:
        with pytest.raises(BrokenResourceError):
            make(int)
    await thread.aclose()


async def stop_and_wait() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.Event().wait()


async def test_10_async_close_leaves_the_loop_free(gate: Gate) -> None:
    """Complaint 10: an async close joined the thread on the loop; here the loop runs until the thread has ended."""
    thread = await LoopThread().start()
    running = thread.call(gate)
    closing = asyncio.create_task(thread.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()
    gate.opened.set()
    await closing
    assert await running == 0


async def test_11_call_from_the_thread_itself_does_not_deadlock() -> None:
    """Complaint 11: "would deadlock" by guess; here a call from the thread runs at once, and waiting there raises."""
    async with LoopThread() as thread:

        def nested() -> int:
            with pytest.raises(DeadlockError):
                thread.close()
            return thread.submit(lambda: thread.submit(int, 7).result()).result()

        assert await asyncio.wait_for(thread.call(nested), 5) == 7


async def test_11_thread_is_chosen_by_the_object() -> None:
    """Complaint 11: the thread hung on the context of the task; here any task, and a task of a task, has the same."""

    async def ident() -> int:
        return await asyncio.wait_for(thread.call(threading.get_ident), 5)

    async with LoopThread() as thread, LoopThread("other") as other:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ident()) for _ in range(10)]
        here = contextvars.Context().run(asyncio.create_task, ident())
        elsewhere = other.run(ident)
        assert len({await here, await elsewhere, *(task.result() for task in tasks)}) == 1


async def test_12_default_executor_is_never_used(tmp_path: Path) -> None:
    """Complaint 12: the shared pool was full, so name look-ups timed out; here it may be full."""
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(1)
    gate = Gate()
    loop.set_default_executor(pool)
    full = loop.run_in_executor(None, gate)
    async with Resource(lambda: sqlite3.connect(":memory:")) as db:
        assert await db.call(lambda c: c.execute("select 1").fetchall()) == [(1,)]
    async with FileSink(tmp_path / "sink") as sink:
        await sink.write("line\n")
        await sink.flush(fsync=True)
    async with offload.open(tmp_path / "sink") as file:
        assert await file.read() == "line\n"
    async with PacketWriter(tmp_path / "packets") as packets:
        await packets.write("line\n")
    async with PacketReader(tmp_path / "packets") as reader:
        assert [packet async for frame in reader for packet in frame.packets()] == [b"line\n"]
    assert not full.done()
    gate.opened.set()
    await full


async def test_13_blocked_resource_blocks_only_itself(gate: Gate) -> None:
    """Complaint 13: one bad integration took the whole pool; here a hundred others go on."""
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
    """Complaint 14: it took three presses; here one, even where the resource has no interrupt."""
    done = run_program(
        OPEN
        + """
import signal
def block():
    threading.Event().wait(0.2)  # the main thread waits by then: just before, it would not notice
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
    """Complaint 15: "can't create new thread at interpreter shutdown"; here closing at exit makes none."""
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
    """Complaint 16: a forked child waited for its parent's loop; here it is told, and opens its own."""
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
    """Complaint 17: producers slept on when a queue closed; here a call has its outcome or an error, always."""
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


async def test_17_close_wakes_those_who_wait_for_room(tmp_path: Path, gate: Gate) -> None:
    """Complaint 17: producers that waited for room slept on; here a close lets each go, and has what it was given."""
    sink = await FileSink(tmp_path / "sink", max_bytes=1).start()
    sink._thread.post(gate)
    await gate.begun()

    async def produce(n: int) -> None:
        await sink.write(f"task {n}\n")

    tasks = [asyncio.create_task(produce(n)) for n in range(4)]
    threads = [threading.Thread(target=sink.write, args=(f"thread {n}\n",)) for n in range(4)]
    for thread in threads:
        thread.start()
    # The threads have no other way to say that they wait.
    while sink.stats().waiting_bytes < len("task 0\n" + "thread 0\n") * 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    closing = asyncio.create_task(sink.aclose())
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(closing, *tasks)
    async with LoopThread() as joins:
        for thread in threads:
            await joins.call(thread.join)
    async with offload.open(tmp_path / "sink") as file:
        lines = sorted(await file.readlines())
    assert lines == [f"{kind} {n}\n" for kind in ("task", "thread") for n in range(4)]


async def test_18_many_things_cost_one_hop() -> None:
    """Complaint 18: a row a hop made reading fifteen times slower; here a thousand rows are four hops and the ends."""
    async with Resource(lambda: sqlite3.connect(":memory:")) as db:
        await db.call(lambda c: c.execute("create table t (n)"))
        await db.call(lambda c: c.executemany("insert into t values (?)", [(n,) for n in range(1000)]))
        before = db.stats().submitted
        rows = [n async for (n,) in db.iter(lambda c: c.execute("select n from t"), chunk=250, prefetch=0)]
        assert rows == [*range(1000)]
        assert db.stats().submitted - before == 7  # open, four chunks, the empty one, close


async def test_19_plain_call_makes_no_task_and_no_concurrent_future(monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 19: a hop cost a task and two futures; here a plain call makes neither."""
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
    """Complaint 20: a wake-up for each call drowned the loop; here one a burst."""
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
    """Complaint 22: a cancelled open leaked its file; here whatever was made is closed, at every moment."""
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


async def test_22_cancelled_open_of_a_file_leaks_no_descriptor(tmp_path: Path) -> None:
    """Complaint 22: nor does the cancelled open of a file or a sink, at every moment (the end of each test counts)."""
    for n in range(40):
        opening: Coroutine[Any, Any, Any]
        opening = FileSink(tmp_path / "sink").start() if n % 2 else opened(tmp_path / "file")
        task = asyncio.create_task(opening)
        for _ in range(n % 16):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            file = await task
            await (file.aclose() if isinstance(file, FileSink) else file.close())  # it was quicker


async def opened(path: Path) -> Any:
    return await offload.open(path, "w")


async def test_23_no_exception_is_thrown_into_a_thread() -> None:
    """Complaint 23: a late asynchronous raise hit idle threads; here a cancelled call leaves its thread as it was."""
    async with LoopThread() as thread:
        ident = await thread.call(threading.get_ident)
        for _ in range(100):
            thread.call(sum, range(1000)).cancel()
        assert await thread.call(threading.get_ident) == ident


class Device:
    """Says which of its calls an interrupt has hit."""

    def __init__(self) -> None:
        self.running: int | None = None
        self.hits: list[int | None] = []
        self.blocked, self.woken = threading.Event(), threading.Event()

    def use(self, number: int, *, block: bool = False) -> None:
        self.running = number
        if block:
            self.blocked.set()
            self.woken.wait()
        self.running = None

    def interrupt(self) -> None:
        self.hits.append(self.running)
        self.woken.set()


async def test_23_interrupt_reaches_the_call_that_is_cancelled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 23: an interrupt that came late hit the next call, or an idle thread; here it is scoped to its call."""
    monkeypatch.setattr("offload.loops.call._AGAIN", 600)  # a call that is slow to end would be hit again
    async with Resource(Device, interrupt=Device.interrupt) as handle:
        device = await handle.call(lambda device: device)
        over, blocked = handle.call(Device.use, 1), handle.call(Device.use, 2, block=True)
        device.blocked.wait()  # here, on the loop: so the first has ended, and we have not heard of it
        assert over.cancel()
        assert device.hits == []
        assert blocked.cancel()
        await asyncio.wait([over, blocked])
        assert device.hits == [2]
        assert (over.state, blocked.state) == (CallState.FINISHED, CallState.FINISHED)
        idle = handle.call(Device.use, 3)
        await asyncio.wait([idle])
        assert not idle.cancel()
        assert device.hits == [2]


@pytest.mark.parametrize("make", ["call", "run", "submit"])
async def test_24_stop_iteration_does_not_hang(make: str) -> None:
    """Complaint 24: StopIteration from a thread hung its caller; here it is a RuntimeError with its cause."""

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
    """Complaint 25: a thread kept its starter's context; here calls have their caller's, and the thread none of it."""
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


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks are of Python 3.12")
async def test_25_eager_tasks_keep_their_order_and_their_loop() -> None:
    """Complaint 25: an eager task made off its loop took over `current_task`; here each begins on its own, in order."""

    def factory() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        eager: Any = vars(asyncio)["eager_task_factory"]
        loop.set_task_factory(eager)
        return loop

    async def work(number: int) -> None:
        log.append(number)
        assert asyncio.current_task() is not mine
        task = asyncio.current_task()
        await asyncio.sleep(0)
        assert asyncio.current_task() is task

    log: list[int] = []
    mine = asyncio.current_task()
    async with LoopThread(loop_factory=factory) as thread:
        calls = []
        for number in range(100):
            calls.append(thread.run(work, number) if number % 3 else thread.call(log.append, number))
            assert asyncio.current_task() is mine
        await asyncio.gather(*calls)
        async with thread.exclusive() as span:
            await span.run(work, 100)
    assert log == list(range(101))
