"""Loop threads from start to end: closing, calls from inside, broken starts, executors, forks, the end of a program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future as ThreadFuture
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BrokenResourceError, ClosedResourceError, DeadlockError, OffloadError
from offload.loops import LoopThread

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def uvloop_factory() -> LoopFactory:
    factory: LoopFactory = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop
    return factory


class Gate:
    """A function that says when it has begun, and returns when it may."""

    def __init__(self) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.entered.set_result(None)
        self._open.wait()

    def open(self) -> None:
        self._open.set()

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)


@pytest.fixture(name="gate")
def new_gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(name="log")
def new_log() -> list[str]:
    return []


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


async def nothing() -> None: ...


# Each way of making a call; the last needs no loop.
makers: list[Callable[[LoopThread], Any]] = [
    lambda thread: thread.call(int),
    lambda thread: thread.run(nothing),
    lambda thread: thread.submit(int),
    lambda thread: thread.post(int),
]


def assert_refuses(thread: LoopThread, error: type[OffloadError], message: str) -> None:
    for make in makers:
        with pytest.raises(error, match=message) as caught:
            make(thread)
        assert type(caught.value) is error


# --- start ------------------------------------------------------------------------------------------------------------


async def test_start_returns_when_the_loop_runs() -> None:
    """After start() the thread has its name, is a daemon, runs a loop of its own, and takes calls."""
    thread = LoopThread("db")
    assert repr(thread) == "<LoopThread 'db' new, 0 queued>"
    assert await thread.start() is thread
    assert repr(thread) == "<LoopThread 'db' open, 0 queued>"
    assert "db" in names()
    here = await thread.call(threading.current_thread)
    assert (here.name, here.daemon) == ("db", True)
    assert await thread.call(asyncio.get_running_loop) is not asyncio.get_running_loop()
    await thread.aclose()
    assert not here.is_alive()
    assert repr(thread) == "<LoopThread 'db' ended, 0 queued>"


async def test_thread_that_is_not_started_refuses_calls_and_closes_at_once(log: list[str]) -> None:
    """Before start() every call is refused; closing needs no thread, runs nothing, and ends it for good."""
    for close in (LoopThread.close, LoopThread.aclose):
        thread = LoopThread("db", on_close=lambda: log.append("on_close"))
        assert_refuses(
            thread, ClosedResourceError, r"^'db' is not started; use it as `async with`, or await its start\(\)$"
        )
        for _ in range(2):
            closed = close(thread)
            if closed is not None:
                await closed
        assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")
        with pytest.raises(ClosedResourceError, match=r"^'db' was closed before; make a new one$"):
            await thread.start()
        assert "db" not in names()
    assert log == []


async def test_second_start_is_refused_and_changes_nothing() -> None:
    """A thread that is open, being started, or ended cannot be started again; an open one goes on."""
    thread = LoopThread("db")
    first, second = await asyncio.gather(thread.start(), thread.start(), return_exceptions=True)
    assert first is thread
    assert isinstance(second, ClosedResourceError)
    with pytest.raises(ClosedResourceError, match=r"^'db' was started before; make a new one$"):
        thread.__enter__()
    assert await thread.call(int, "4") == 4
    await thread.aclose()
    with pytest.raises(ClosedResourceError, match="was started before"):
        await thread.start()


@pytest.mark.parametrize("error", [OSError("no descriptors"), SystemExit(2), StopIteration()], ids=repr)
async def test_loop_factory_that_raises_breaks_the_start_and_leaves_no_thread(error: BaseException) -> None:
    """start(), `async with` and `with` raise BrokenResourceError with the cause; the thread has ended by then."""

    def factory() -> asyncio.AbstractEventLoop:
        raise error

    async def enter(thread: LoopThread) -> None:
        async with thread:
            pytest.fail("entered")

    async def enter_plainly(thread: LoopThread) -> None:
        with thread:
            pytest.fail("entered")

    for way in (LoopThread.start, enter, enter_plainly):
        thread = LoopThread("db", loop_factory=factory)
        with pytest.raises(BrokenResourceError, match=r"^the thread of 'db' has ended: ") as caught:
            await way(thread)
        assert caught.value.__cause__ is error
        assert not thread._thread.is_alive()
        assert_refuses(thread, BrokenResourceError, r"^the thread of 'db' has ended: ")
        await thread.aclose()
        thread.close()


@pytest.mark.parametrize("how", ["start", "async with"])
async def test_cancelled_start_leaves_no_thread(gate: Gate, how: str) -> None:
    """A start that is cancelled waits for the loop, closes it again, and then raises CancelledError."""

    def slow_factory() -> asyncio.AbstractEventLoop:
        gate()
        return asyncio.SelectorEventLoop()

    async def enter() -> None:
        async with thread:
            pytest.fail("entered")

    thread = LoopThread("db", loop_factory=slow_factory)
    task = asyncio.create_task(thread.start() if how == "start" else enter())
    await gate.begun()
    for _ in range(2):
        task.cancel()
        await turns()
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not thread._thread.is_alive()
    assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")


async def test_close_during_the_start_lets_no_call_in(gate: Gate, log: list[str]) -> None:
    """A thread that is closed while its loop is being made comes up, takes no call, runs on_close and ends."""

    def slow_factory() -> asyncio.AbstractEventLoop:
        gate()
        return asyncio.SelectorEventLoop()

    def on_close() -> None:
        log.append("on_close")
        may_end.wait()

    may_end = threading.Event()
    thread = LoopThread("db", loop_factory=slow_factory, on_close=on_close)
    starting = asyncio.create_task(thread.start())
    await gate.begun()
    closing = asyncio.create_task(thread.aclose())
    await turns()
    assert not closing.done()
    gate.open()
    assert await starting is thread
    try:
        assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")
    finally:
        may_end.set()
    await closing
    assert log == ["on_close"]


async def test_system_that_has_no_more_threads_breaks_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the system refuses a thread, start() says so, and closing afterwards does nothing."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = LoopThread("db")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await thread.start()
    await thread.aclose()
    thread.close()
    assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")


async def test_uvloop_runs_the_thread(log: list[str]) -> None:
    """With uvloop's factory the calls run on a uvloop, and closing drains it in the same way."""
    thread = LoopThread("db", loop_factory=uvloop_factory(), on_close=lambda: log.append("on_close"))
    async with thread:
        loop = await thread.call(asyncio.get_running_loop)
        assert type(loop).__module__.startswith("uvloop")
        thread.call(log.append, "queued")
    assert log == ["queued", "on_close"]
    assert loop.is_closed()


@pytest.mark.parametrize("debug", [True, False])
async def test_debug_is_the_loops_debug_mode(debug: bool) -> None:
    """`debug` reaches the thread's loop."""
    async with LoopThread("db", debug=debug) as thread:
        assert (await thread.call(asyncio.get_running_loop)).get_debug() is debug


# --- close ------------------------------------------------------------------------------------------------------------


async def test_close_takes_no_more_calls_and_ends_those_that_are_here(gate: Gate, log: list[str]) -> None:
    """Queued calls of all kinds run, a running coroutine is waited for, on_close comes last, on the thread."""
    idents: set[int] = set()

    def note(what: str) -> None:
        log.append(what)
        idents.add(threading.get_ident())

    async def slow() -> None:
        await event.wait()
        note("coroutine ends")

    event = asyncio.Event()
    thread = await LoopThread("db", on_close=lambda: note("on_close")).start()
    coroutine = thread.run(slow)
    running = thread.call(gate)
    await gate.begun()
    calls = [thread.call(note, "call"), thread.run(slow), thread.call(event.set)]
    future = thread.submit(note, "submit")
    thread.post(lambda: note("post"))
    closing = asyncio.create_task(thread.aclose())
    await turns()
    assert not closing.done()
    assert repr(thread) == "<LoopThread 'db' closing, 5 queued>"
    assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")
    gate.open()
    await closing
    await asyncio.gather(coroutine, running, *calls)
    assert future.result() is None
    assert log[:3] == ["call", "submit", "post"]
    assert log[3:] == ["coroutine ends", "coroutine ends", "on_close"]
    assert len(idents) == 1
    assert thread.stats().submitted == 7


async def test_coroutine_that_runs_while_closing_may_still_call_inline(log: list[str]) -> None:
    """A coroutine that close waits for can make calls on its own thread to the end."""
    entered: ThreadFuture[None] = ThreadFuture()
    event = asyncio.Event()

    async def work() -> None:
        entered.set_result(None)
        await event.wait()
        await thread.call(log.append, "inline")
        with pytest.raises(ClosedResourceError):
            thread.run(nothing)
        log.append("work ends")

    thread = await LoopThread("db", on_close=lambda: log.append("on_close")).start()
    call = thread.run(work)
    loop = await thread.call(asyncio.get_running_loop)
    await asyncio.wrap_future(entered)
    closing = asyncio.create_task(thread.aclose())
    await turns()
    loop.call_soon_threadsafe(event.set)
    await closing
    await call
    assert log == ["inline", "work ends", "on_close"]


async def test_cancelled_close_waits_to_the_end(gate: Gate) -> None:
    """aclose() cancelled again and again goes on waiting; the cancellation comes when the thread has ended."""
    thread = await LoopThread("db").start()
    call = thread.call(gate)
    await gate.begun()
    closing = asyncio.create_task(thread.aclose())
    for _ in range(4):
        await turns()
        closing.cancel()
    await turns()
    assert not closing.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not thread._thread.is_alive()
    await call


async def test_close_under_a_timeout_waits_to_the_end(gate: Gate) -> None:
    """A timeout around aclose() is raised once the thread has ended."""

    async def close_soon() -> None:
        async with asyncio.timeout(0):
            await thread.aclose()

    thread = await LoopThread("db").start()
    thread.post(gate)
    await gate.begun()
    task = asyncio.create_task(close_soon())
    await turns()
    assert not task.done()
    gate.open()
    with pytest.raises(TimeoutError):
        await task
    assert not thread._thread.is_alive()


async def test_async_with_that_is_cancelled_does_not_leave_its_thread(gate: Gate, log: list[str]) -> None:
    """The body's cancellation, and one during the close, pass on only when the running call and on_close have ended."""

    async def body() -> None:
        async with LoopThread("db", on_close=lambda: log.append("on_close")) as thread:
            await thread.call(gate)

    task = asyncio.create_task(body())
    await gate.begun()
    for _ in range(3):
        task.cancel()
        await turns()
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["on_close"]
    assert "db" not in names()


async def test_everybody_who_closes_waits_for_the_same_end(gate: Gate, log: list[str]) -> None:
    """Closers in this loop, another loop and plain threads all return after on_close, which runs once."""
    thread = await LoopThread("db", on_close=lambda: log.append("on_close")).start()
    thread.post(gate)
    await gate.begun()

    def close_plainly() -> None:
        thread.close()
        log.append("closed")

    async def close_here() -> None:
        await thread.aclose()
        log.append("closed")

    plain = [threading.Thread(target=close_plainly), threading.Thread(target=lambda: asyncio.run(close_here()))]
    for each in plain:
        each.start()
    here = [asyncio.create_task(close_here()) for _ in range(2)]
    await turns()
    assert log == []
    gate.open()
    await asyncio.gather(*here)
    for each in plain:
        each.join()
    assert log == ["on_close"] + 4 * ["closed"]
    await thread.aclose()
    thread.close()


@pytest.mark.parametrize("how", ["returns", "raises", "cancelled"])
async def test_close_joins_the_thread(gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """aclose() comes back after the thread's last step, be it by itself, with on_close's error, or cancelled."""

    def fail() -> None:
        raise LookupError("on_close")

    def join_at_last(timeout: float | None = None) -> None:
        last_step.set()
        join(timeout)

    last_step = threading.Event()
    thread = await LoopThread("db", on_close=fail if how == "raises" else None).start()
    join = thread._thread.join
    monkeypatch.setattr(thread._thread, "join", join_at_last)
    thread.post(gate)
    await gate.begun()
    closing = asyncio.create_task(thread.aclose())
    await turns()
    # After the callback that tells `aclose`: the thread has said that it ends, and does not get to it before the join.
    thread._ended.add_done_callback(lambda _: last_step.wait())
    if how == "cancelled":
        closing.cancel()
    gate.open()
    try:
        with contextlib.suppress(LookupError, asyncio.CancelledError):
            await closing
        assert not thread._thread.is_alive()
    finally:
        join_at_last()


@pytest.mark.parametrize(
    ("error", "seen"),
    [(LookupError("disk"), LookupError), (SystemExit(4), SystemExit), (StopIteration(), RuntimeError)],
    ids=["error", "exit", "stop"],
)
async def test_error_of_on_close_reaches_everybody_who_closes(error: BaseException, seen: type[BaseException]) -> None:
    """What on_close raises is raised by aclose(), close(), `async with` and `with`, after the thread has ended."""

    def fail() -> None:
        raise error

    thread = await LoopThread("db", on_close=fail).start()
    with pytest.raises(seen):
        await thread.aclose()
    assert not thread._thread.is_alive()
    with pytest.raises(seen):
        await thread.aclose()
    with pytest.raises(seen):
        thread.close()
    with pytest.raises(seen):
        async with LoopThread("db", on_close=fail):
            pass
    with pytest.raises(seen), LoopThread("db", on_close=fail):
        pass
    assert_refuses(thread, ClosedResourceError, r"^'db' is closed$")


async def test_loop_is_still_there_when_on_close_runs(log: list[str]) -> None:
    """on_close runs on the thread, inside its loop, and calls from there run at once."""

    def on_close() -> None:
        assert asyncio.get_running_loop() is loop
        log.append(f"answer {thread.call(int, 42).result()}")

    thread = await LoopThread("db", on_close=on_close).start()
    loop = await thread.call(asyncio.get_running_loop)
    await thread.aclose()
    assert log == ["answer 42"]
    assert loop.is_closed()


def test_with_opens_and_closes_from_plain_code(log: list[str]) -> None:
    """`with` needs no loop: calls by submit, and the thread is drained and gone at the end, also after an error."""

    def body() -> None:
        with thread:
            assert thread.submit(int, "7").result() == 7
            thread.submit(log.append, "queued")
            raise LookupError

    thread = LoopThread("db", on_close=lambda: log.append("on_close"))
    with pytest.raises(LookupError):
        body()
    assert log == ["queued", "on_close"]
    assert not thread._thread.is_alive()


def test_call_and_run_need_a_running_loop() -> None:
    """From code without a loop, call and run raise RuntimeError and queue nothing."""
    with LoopThread("db") as thread:
        for make in makers[:2]:
            with pytest.raises(RuntimeError, match="no running event loop"):
                make(thread)
        assert thread.stats().submitted == 0


async def test_closed_thread_is_not_mistaken_for_the_one_with_its_number() -> None:
    """The system gives a thread's number to the next thread; calls from there to the ended one are refused."""
    for _ in range(50):
        ended = await LoopThread("ended").start()
        number = await ended.call(threading.get_ident)
        await ended.aclose()
        async with LoopThread("next") as thread:
            if await thread.call(threading.get_ident) != number:
                continue
            with pytest.raises(ClosedResourceError):
                await thread.call(ended.submit, int)
            await thread.run(ended.aclose)
            return
    pytest.skip("this system does not give a thread's number again")


# --- from the thread itself -------------------------------------------------------------------------------------------


async def test_call_from_the_thread_itself_runs_at_once(log: list[str]) -> None:
    """A call inside a call jumps the queue and is done when it is made, by call and by submit, also when nested."""

    def outer() -> str:
        thread.post(lambda: log.append("posted later"))
        call = thread.call(inner)
        log.append("outer")
        return call.result()

    def inner() -> str:
        assert thread.submit(log.append, "innermost").result() is None
        log.append("inner")
        return "result"

    async with LoopThread("db") as thread:
        first = thread.call(outer)
        after = thread.call(log.append, "after")
        assert await first == "result"
        await after
        await thread.call(int)
        assert sorted(log[3:]) == ["after", "posted later"]
        assert log[:3] == ["innermost", "inner", "outer"]
        assert counts(thread) == (0, 6, 0, 0, 0)


async def test_error_of_a_call_from_the_thread_itself_is_in_its_future() -> None:
    """An inline call that raises, SystemExit included, does so where its outcome is asked for, not where it is made."""

    def fail(error: BaseException) -> None:
        raise error

    def outer() -> None:
        for error in (LookupError("one"), SystemExit(2)):
            call, future = thread.call(fail, error), thread.submit(fail, error)
            assert call.exception() is error
            assert future.exception() is error

    async with LoopThread("db") as thread:
        await thread.call(outer)
        assert await thread.call(int) == 0


async def test_coroutine_calls_its_own_thread() -> None:
    """A coroutine on the thread may await calls and coroutines on it: the first inline, the second in turn."""

    async def work() -> tuple[int, int]:
        call = thread.call(threading.get_ident)
        assert call.done()
        return await call, await thread.run(asyncio.sleep, 0, 5)

    async with LoopThread("db") as thread:
        assert await thread.run(work) == (await thread.call(threading.get_ident), 5)


async def test_blocking_wait_for_oneself_is_a_deadlock_error() -> None:
    """close() and aclose() from the thread itself raise DeadlockError, and the thread goes on."""
    async with LoopThread("db") as thread:
        message = "^'db' cannot be closed from its own thread; close it where it was opened$"
        with pytest.raises(DeadlockError, match=message):
            await thread.call(thread.close)
        with pytest.raises(DeadlockError, match=message):
            await thread.run(thread.aclose)
        assert await thread.call(int, 3) == 3


# --- as an executor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
def test_thread_is_an_executor(factory: str, log: list[str]) -> None:
    """run_in_executor takes a LoopThread: results, errors, order, and a queued call that is cancelled never runs."""

    def fail() -> None:
        raise LookupError("over there")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor: Any = thread
        assert await loop.run_in_executor(executor, threading.get_ident) == await thread.call(threading.get_ident)
        with pytest.raises(LookupError, match="over there"):
            await loop.run_in_executor(executor, fail)
        blocked = loop.run_in_executor(executor, gate)
        futures = [loop.run_in_executor(executor, log.append, name) for name in "abc"]
        await gate.begun()
        futures[1].cancel()
        await turns()  # asyncio tells the concurrent future in a callback
        gate.open()
        await asyncio.gather(blocked, futures[0], futures[2])
        assert log == ["a", "c"]
        assert thread.stats().dropped == 1

    gate = Gate()
    make_loop = uvloop_factory() if factory == "uvloop" else None
    with LoopThread("db") as thread, asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main())
        thread.close()
        with pytest.raises(ClosedResourceError):
            runner.run(refused(thread))


async def refused(thread: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(thread, int)


# --- counts -----------------------------------------------------------------------------------------------------------


def counts(thread: LoopThread) -> tuple[int, int, int, int, int]:
    """Queued, submitted, failed, dropped, abandoned."""
    stats = thread.stats()
    return stats.queued, stats.submitted, stats.failed, stats.dropped, stats.abandoned


async def test_stats_count_what_became_of_the_calls(gate: Gate) -> None:
    """Queued, running by name, submitted, failed and dropped are what happened."""

    def fail() -> None:
        raise LookupError

    def blocking() -> None:
        gate()

    async with LoopThread("db") as thread:
        running = thread.call(blocking)
        await gate.begun()
        failing, dropped = thread.call(fail), thread.call(int)
        stats = thread.stats()
        assert stats.running is not None
        assert stats.running.endswith("blocking")
        assert counts(thread) == (2, 3, 0, 0, 0)
        assert stats.running_for > 0
        assert stats.oldest_wait > 0
        assert 0 < stats.busy <= 1
        dropped.cancel()
        gate.open()
        with pytest.raises(LookupError):
            await failing
        await running
        await thread.call(int)
        assert counts(thread) == (0, 4, 1, 1, 0)


# --- fork and exit: programs of their own -----------------------------------------------------------------------------


def run_program(source: str, *, timeout: float = 50) -> tuple[int, str, str]:
    """Run a script with warnings as errors; exit code, stdout, stderr."""
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c"]
    done = subprocess.run(
        [*command, PRELUDE + textwrap.dedent(source)], capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout, done.stderr


PRELUDE = """
import asyncio, atexit, os, signal, sys, threading, time
os.register_at_fork(after_in_child=lambda: signal.alarm(15))  # before ours run, which may be what hangs

from offload.errors import *
from offload.loops import LoopThread
from offload.loops import thread as module

def at_exit_wait(seconds):
    LoopThread.__init__.__kwdefaults__["exit_timeout"] = seconds

def try_all(thread):
    async def in_a_loop():
        for make in (thread.call, thread.run):
            try:
                make(int)
            except ForkedError as exc:
                print(exc)
        await thread.aclose()
    for make in (thread.submit, thread.post):
        try:
            make(int)
        except ForkedError as exc:
            print(exc)
    asyncio.run(in_a_loop())
    thread.close()

def in_child(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit(7)
    print("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@forking
def test_forked_child_is_told_and_the_parent_goes_on() -> None:
    """In the child every call raises ForkedError and closing returns; it opens its own; the parent works on."""
    code, out, err = run_program("""
        def child():
            try_all(thread)
            with LoopThread("own") as own:
                print(own.submit(lambda: "the child's own works").result())

        with LoopThread("db") as thread:
            print(os.getpid())
            in_child(child)
            print(thread.submit(lambda: "the parent goes on").result())
    """)
    parent, *lines = out.splitlines()
    refusal = f"'db' belongs to the parent process {parent}; open one in this process"
    assert lines == [*4 * [refusal], "the child's own works", "child ended with 7", "the parent goes on"]
    assert (code, err) == (0, "")


@forking
def test_calls_under_way_at_a_fork_end_in_the_child_and_go_on_in_the_parent() -> None:
    """A future queued or running at the fork holds ForkedError in the child, and its result in the parent."""
    code, out, err = run_program("""
        entered, gate = threading.Event(), threading.Event()

        def block():
            entered.set()
            gate.wait()
            return "ran"

        def child():
            for future in (running, queued):
                print(type(future.exception()).__name__)

        with LoopThread("db") as thread:
            running, queued = thread.submit(block), thread.submit(lambda: "ran too")
            entered.wait()
            in_child(child)
            gate.set()
            print(running.result(), queued.result())
    """)
    assert out.splitlines() == ["ForkedError", "ForkedError", "child ended with 7", "ran ran too"]
    assert (code, err) == (0, "")


@forking
def test_fork_while_a_thread_makes_a_call_leaves_no_lock_in_the_child() -> None:
    """A fork at the moment when another thread holds the queue's lock does not hang the child."""
    code, out, err = run_program("""
        held, release = threading.Event(), threading.Event()

        def hold():
            with thread._mailbox.gate:
                held.set()
                release.wait()

        with LoopThread("db") as thread:
            holder = threading.Thread(target=hold)
            holder.start()
            held.wait()
            in_child(lambda: try_all(thread))
            release.set()
            holder.join()
            print(thread.submit(lambda: "the parent goes on").result())
    """)
    *refusals, ended, last = out.splitlines()
    assert len(refusals) == 4
    assert (ended, last) == ("child ended with 7", "the parent goes on")
    assert (code, err) == (0, "")


@forking
def test_fork_while_a_thread_is_inside_a_future_leaves_no_lock_in_the_child() -> None:
    """A fork while others hold the locks of futures, and the outcome of one is on its way, does not hang the child."""
    code, out, err = run_program("""
        entered, gate, held, release = (threading.Event() for _ in range(4))

        def block():
            entered.set()
            gate.wait()
            return "ran"

        def hold():
            with running._condition, queued._condition, thread._ready._condition, thread._ended._condition:
                held.set()
                release.wait()

        def child():
            for future in (running, queued):
                print(type(future.exception()).__name__)
            try_all(thread)

        with LoopThread("db") as thread:
            running, queued = thread.submit(block), thread.submit(lambda: "ran too")
            entered.wait()
            holder = threading.Thread(target=hold)
            holder.start()
            held.wait()
            gate.set()
            while thread._mailbox.running.state.name == "RUNNING":
                time.sleep(0.001)
            in_child(child)
            release.set()
            print(running.result(), queued.result())
    """)
    first, second, *refusals, ended, last = out.splitlines()
    assert (first, second, len(refusals)) == ("ForkedError", "ForkedError", 4)
    assert (ended, last) == ("child ended with 7", "ran ran too")
    assert (code, err) == (0, "")


@forking
def test_fork_inside_a_running_loop_and_inside_a_call() -> None:
    """A fork by a coroutine of the caller, or by a call on the thread itself, gives a child that is told as well."""
    code, out, err = run_program("""
        def child():
            try:
                thread.submit(int)
            except ForkedError:
                print("told")
            os._exit(print(end="", flush=True) or 7)

        async def main():
            in_child(child)
            await thread.call(in_child, child)
            print(await thread.call(lambda: "the parent goes on"))

        with LoopThread("db") as thread:
            asyncio.run(main())
    """)
    assert out.splitlines() == 2 * ["told", "child ended with 7"] + ["the parent goes on"]
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("raise SystemExit(4)", 4), ("1 / 0", 1), ("os.kill(os.getpid(), 2)", -2)],
)
def test_thread_left_open_is_drained_at_exit(tmp_path: Path, end: str, code: int) -> None:
    """However the program ends, what is queued runs, then on_close, and the exit code stays."""
    path = tmp_path / "file"
    status, out, err = run_program(f"""
        file = open({str(path)!r}, "w")
        gate = threading.Event()

        def close():
            file.write("closed")
            file.close()

        thread = LoopThread("db", on_close=close).__enter__()
        thread.post(gate.wait)
        for i in range(100):
            thread.submit(file.write, f"{{i}} ")
        atexit.register(gate.set)
        {end}
    """)
    assert path.read_text() == " ".join(map(str, range(100))) + " closed"
    assert (status, out) == (code, "")
    assert "offload" not in err


def test_thread_left_open_in_a_loop_that_ended_is_drained_at_exit() -> None:
    """Calls and coroutines whose loop is over run to their end at exit, though nobody hears of them."""
    code, out, err = run_program("""
        async def coroutine():
            await asyncio.sleep(0)
            print("coroutine")

        async def main():
            thread = await LoopThread("db", on_close=lambda: print("on_close", stats().abandoned)).start()
            global gate, stats
            gate, stats = threading.Event(), thread.stats
            thread.call(gate.wait)
            thread.call(print, "call")
            thread.run(coroutine)

        asyncio.run(main())
        print("main ends")
        atexit.register(lambda: gate.set())
    """)
    assert out.splitlines() == ["main ends", "call", "coroutine", "on_close 3"]
    assert (code, err) == (0, "")


BLOCKED = {
    "call": """
        def read_the_port():
            entered.set()
            threading.Event().wait()

        thread = LoopThread("port").__enter__()
        thread.submit(read_the_port)
        thread.submit(int)
        thread.submit(int)
        entered.wait()
    """,
    "coroutine": """
        async def read_the_port():
            entered.set()
            await asyncio.Event().wait()

        async def main():
            thread = await LoopThread("port").start()
            thread.run(read_the_port)

        asyncio.run(main())
        entered.wait()
    """,
    "on_close": """
        def read_the_port():
            entered.set()
            threading.Event().wait()

        thread = LoopThread("port", on_close=read_the_port).__enter__()
        atexit.register(lambda: (thread.shutdown(wait=False), entered.wait()))  # before the thread is drained
    """,
}


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("call", "2 calls behind read_the_port"),
        ("coroutine", "0 calls behind read_the_port"),
        ("on_close", "behind on_close"),
    ],
)
def test_thread_that_blocks_at_exit_is_named_and_left(what: str, named: str) -> None:
    """A call, a coroutine or an on_close that never ends: the program ends, and says which, where, and what is lost."""
    code, out, err = run_program(f"""
        at_exit_wait(0.1)
        entered = threading.Event()
        {textwrap.indent(textwrap.dedent(BLOCKED[what]), "        ").strip()}
        print("main ends")
    """)
    assert (code, out) == (0, "main ends\n")
    assert "'port' still works 0.1 s after the program's end; it is left, and what is queued behind is lost" in err
    assert named in err
    assert "in read_the_port" in err
    assert ", in wait" in err


@pytest.mark.slow
def test_thread_that_blocks_at_exit_does_not_keep_others_from_draining() -> None:
    """With six that block and six that do not, the one half is drained, the other is named, in one deadline."""
    code, out, err = run_program("""
        def wait_for_the_others(thread, timeout):
            for other in threads[::2]:
                other._thread.join()  # however long they take: the deadline is for those that block
            return wait(thread, timeout)

        wait, LoopThread._wait = LoopThread._wait, wait_for_the_others
        at_exit_wait(0.3)
        threads = []
        for i in range(12):
            thread = LoopThread(f"number {i}", on_close=lambda i=i: sys.stdout.write(f"closed {i}\\n"))
            threads.append(thread.__enter__())
            thread.submit(threading.Event().wait if i % 2 else int)
    """)
    assert sorted(out.splitlines()) == sorted(f"closed {i}" for i in range(0, 12, 2))
    assert [f"'number {i}' still works" in err for i in range(12)] == 6 * [False, True]
    assert code == 0


def test_idle_thread_without_patience_ends_in_silence() -> None:
    """With nothing to wait for, an exit timeout of zero is no reason to complain."""
    assert run_program("LoopThread('idle', exit_timeout=0).__enter__().submit(int).result()") == (0, "", "")


def test_thread_that_has_just_given_its_last_outcome_ends_in_silence() -> None:
    """It has not come to look for the next call yet: nothing runs any more that could block."""
    done = run_program("""
        from offload.loops.mailbox import Mailbox

        execute = Mailbox._execute

        def slow(self, entry, *, hold):
            execute(self, entry, hold=hold)
            time.sleep(0.3)

        Mailbox._execute = slow
        LoopThread("idle", exit_timeout=0).__enter__().submit(int).result()
    """)
    assert done == (0, "", "")


def test_close_in_time_says_what_it_waited_for(gate: Gate) -> None:
    """A call that has not begun is not one that runs; nor is on_close."""
    thread = LoopThread(on_close=gate).__enter__()
    busy = Gate()  # no call: a callback of its loop
    thread.submit(asyncio.get_running_loop).result().call_soon_threadsafe(busy)
    busy.entered.result()
    call = thread.submit(int)
    with pytest.raises(TimeoutError, match=r"has not ended after 0.01 s; calls that have not begun: 1$"):
        thread.close(0.01)
    busy.open()
    assert call.result() == 0
    gate.entered.result()
    with pytest.raises(TimeoutError, match=r"has not ended after 0.01 s; on_close still runs$"):
        thread.close(0.01)
    gate.open()
    thread.close()


def test_on_close_that_raises_at_exit_is_reported() -> None:
    """An error of on_close that has nobody left to go to is logged with its traceback."""
    code, _, err = run_program("""
        def close_the_disk():
            raise OSError("no space left")

        thread = LoopThread("disk", on_close=close_the_disk).__enter__()
    """)
    assert code == 0
    assert "'disk' could not be closed at the program's end" in err
    assert "in close_the_disk" in err
    assert "OSError: no space left" in err
