"""What callers ask of their calls: timeouts, interrupts, leaving them, not waiting; callbacks; the Executor's seam."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future as ThreadFuture
from contextlib import suppress

import pytest

from offload import Call, CallState, LoopThread, QueueFullError, Resource
from offload.loops.call import OnCancel

EVERY: list[OnCancel] = ["wait", "abandon", "interrupt"]


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

    def begun_before_any_timer(self) -> None:
        """The loop stands still until then: a timeout that is over meanwhile finds the call running."""
        self.entered.result()


@pytest.fixture(name="thread")
async def open_thread() -> AsyncIterator[LoopThread]:
    async with LoopThread("resource", max_calls=3) as thread:
        yield thread


@pytest.fixture(name="gate")
def new_gate(thread: LoopThread) -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def state_of(call: Call[int]) -> CallState:
    return call.state


@pytest.mark.parametrize("on_cancel", EVERY)
async def test_queued_call_that_expires_never_runs(thread: LoopThread, gate: Gate, on_cancel: OnCancel) -> None:
    """A timeout drops a call that is queued, whatever its on_cancel, and says so."""
    blocked = thread.call(gate)
    ran: list[int] = []
    call = thread.options(timeout=0.01, on_cancel=on_cancel).call(ran.append, 1)
    with pytest.raises(TimeoutError, match=r"append was given up after 0\.01 s \(dropped\)"):
        await call
    gate.opened.set()
    await blocked
    await thread.call(int)
    assert ran == []
    assert (call.state, thread.stats().dropped) == (CallState.DROPPED, 1)


async def test_running_call_that_expires_is_waited_for(thread: LoopThread, gate: Gate) -> None:
    """With "wait" the TimeoutError comes when the function has returned."""
    call = thread.options(timeout=0.01).call(gate)
    gate.begun_before_any_timer()
    await asyncio.sleep(0.02)  # a timer behind that of the call
    assert not call.done()
    gate.opened.set()
    with pytest.raises(TimeoutError, match="finished"):
        await call


async def test_running_call_that_is_abandoned_is_left_and_others_wait_behind(thread: LoopThread, gate: Gate) -> None:
    """With "abandon" the caller goes on at once, the call is counted, and the next still waits for its end."""
    call = thread.options(timeout=0.01, on_cancel="abandon").call(gate)
    gate.begun_before_any_timer()
    with pytest.raises(TimeoutError, match="abandoned"):
        await call
    behind = thread.call(int)
    await asyncio.sleep(0)
    assert (thread.stats().abandoned, thread.stats().running) == (1, repr(gate))
    assert not behind.done()
    gate.opened.set()
    assert await behind == 0
    assert call.state is CallState.ABANDONED


async def test_abandoned_coroutine_ends_and_the_thread_closes() -> None:
    """A coroutine whose caller has left is cancelled, cleans up in its own time, and closing waits for that."""
    log: list[str] = []
    async with LoopThread() as thread:
        begun, clean = asyncio.Event(), Gate()
        entered: ThreadFuture[None] = ThreadFuture()

        async def stay() -> None:
            entered.set_result(None)
            try:
                await asyncio.Event().wait()
            finally:
                clean.opened.wait()
                log.append("cleaned up")

        call = thread.options(on_cancel="abandon").run(stay)
        await asyncio.wrap_future(entered)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert log == []
        clean.opened.set()
        assert not begun.is_set()
    assert log == ["cleaned up"]
    assert call.state is CallState.ABANDONED


async def test_cancelled_after_it_expired_is_cancelled(thread: LoopThread, gate: Gate) -> None:
    """Who is cancelled while a call that has expired still runs gets CancelledError, not TimeoutError."""
    call = thread.options(timeout=0.01).call(gate)
    task = asyncio.ensure_future(asyncio.wait([call]))
    gate.begun_before_any_timer()
    await asyncio.sleep(0.02)  # a timer behind that of the call

    async def wait() -> int:
        return await call

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    gate.opened.set()
    await task
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert waiter.cancelled()


async def test_interrupt_is_sent_again_until_the_call_ends() -> None:
    """An interrupt that comes too early for the function to notice is followed by others."""
    sent = 0
    enough = threading.Event()

    def interrupt(_: object) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            enough.set()

    async with Resource(object, interrupt=interrupt) as thing:
        gate = Gate()
        gate.opened = enough
        call = thing.call(lambda _: gate(7))
        await gate.begun()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        at_end = sent  # more than three, if the call was slow to end
        await asyncio.sleep(0.12)  # two more would have come
    assert sent == at_end >= 3


async def test_interrupt_that_raises_is_logged_once_and_hurts_nobody(complaints: list[logging.LogRecord]) -> None:
    """A raising interrupt is asked again, logged once, and the call ends as it would have."""
    sent = threading.Semaphore(0)

    def interrupt(_: object) -> None:
        sent.release()
        raise ValueError("cannot")

    def work(_: object) -> None:
        gate(0)
        for _i in range(3):
            sent.acquire()

    gate = Gate()
    async with Resource(object, interrupt=interrupt) as thing:
        call = thing.call(work)
        gate.opened.set()
        await gate.begun()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert [record.getMessage() for record in complaints] == [f"interrupting {work.__qualname__} raised"]
    complaints.clear()


async def test_interrupt_never_hits_the_next_call() -> None:
    """Hundreds of queries cancelled at all moments: the interrupt comes only while a cancelled one runs."""
    slow = (
        "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from (select i from n limit ?)"
    )
    current: list[Call[list[int]]] = []
    cancelled: set[Call[list[int]]] = set()
    wrong: list[object] = []
    hits = 0

    def interrupt(db: sqlite3.Connection) -> None:
        nonlocal hits
        hits += 1
        if not cancelled:
            wrong.append("nobody is cancelled")
        db.interrupt()

    def query(db: sqlite3.Connection, rows: int) -> list[int]:
        return list(db.execute(slow, (rows,)).fetchone())

    async with Resource(lambda: sqlite3.connect(":memory:"), interrupt=interrupt) as db:
        for n in range(300):
            first, second = db.call(query, 20_000), db.options(on_cancel="wait").call(query, 500)
            current[:] = [first]
            await asyncio.sleep(n % 20 / 10_000)
            cancelled.add(first)
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            assert await second == [500]  # OperationalError: interrupted, if it was hit
            cancelled.clear()
    assert hits
    assert wrong == []


async def test_cancelling_a_call_that_has_just_ended_does_not_interrupt_the_next() -> None:
    """A call that ended on its thread, but not yet here, is cancelled without an interrupt: the next one runs."""
    sent: list[object] = []
    gate = Gate()
    async with Resource(object, interrupt=sent.append) as thing:
        first, second = thing.call(lambda _: None), thing.call(lambda _: gate(3))
        gate.entered.result()  # this loop stands still: the first has not been settled
        first.cancel()
        assert sent == []
        gate.opened.set()
        assert await second == 3


async def test_interrupted_query_is_called_interrupted() -> None:
    """A call that its interrupt ended says so, and the resource goes on."""
    endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n"
    gate = Gate()
    gate.opened.set()

    def query(db: sqlite3.Connection) -> object:
        gate()
        return db.execute(endless).fetchone()

    async with Resource(lambda: sqlite3.connect(":memory:"), interrupt=sqlite3.Connection.interrupt) as db:
        call = db.options(timeout=0.02).call(query)
        gate.begun_before_any_timer()
        with pytest.raises(TimeoutError) as caught:
            await call
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert call.state is CallState.INTERRUPTED
        assert await db.call(lambda c: c.execute("select 1").fetchone()) == (1,)


async def test_nowait_is_refused_at_the_bound_and_dropped_calls_do_not_count(thread: LoopThread, gate: Gate) -> None:
    """At max_calls a call with nowait gets QueueFullError, one without keeps its place; dropped ones make room."""
    blocked = thread.call(gate)
    await gate.begun()
    eager = thread.options(nowait=True)
    queued = [eager.call(int) for _ in range(3)]
    for make in (eager.call, eager.submit):
        with pytest.raises(QueueFullError, match="3 calls are queued"):
            make(int)
    patient = thread.call(int, 5)
    for call in queued[:2]:
        call.cancel()
    assert thread.stats().queued == 2
    last = eager.call(int, 6)
    gate.opened.set()
    assert list(await asyncio.gather(blocked, queued[2], patient, last)) == [0, 0, 5, 6]
    assert thread.stats().queued == 0


@pytest.mark.parametrize("bad", [{"timeout": -1}, {"on_cancel": "kill"}])
async def test_senseless_options_are_refused(thread: LoopThread, bad: dict[str, object]) -> None:
    """Options that mean nothing are a ValueError that says what was expected."""
    with pytest.raises(ValueError, match="expected"):
        thread.options(**bad)  # type: ignore[arg-type]


async def test_callbacks_come_in_order_from_foreign_threads_in_the_callers_context(
    complaints: list[logging.LogRecord],
) -> None:
    """An SDK's calls run on the loop, in order, with its context; one that raises reaches only the loop's handler."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[tuple[int, str, int]] = []
    done = asyncio.Event()

    def receive(number: int) -> None:
        seen.append((number, variable.get(), threading.get_ident()))
        if number == 5:
            raise ValueError("five")
        if number == 99:
            done.set()

    async with LoopThread() as thread:
        variable.set("caller")
        callback = thread.callback(receive)
        variable.set("later")
        sdk = threading.Thread(target=lambda: [callback(n) for n in range(100)])
        sdk.start()
        await done.wait()
        sdk.join()
    assert seen == [(n, "caller", threading.get_ident()) for n in range(100)]
    assert ["receive" in record.getMessage() for record in complaints] == [True]
    complaints.clear()


async def test_callbacks_without_end_leave_the_loop_its_turn() -> None:
    """An SDK that calls faster than its callbacks run does not keep the loop from other work."""
    async with LoopThread() as thread:
        going = True

        def again() -> None:
            if going:
                callback()  # while it is delivered: there is always one more

        callback = thread.callback(again)
        callback()
        for _ in range(50):
            await asyncio.sleep(0)
        going = False


def test_callback_for_a_loop_that_is_closed_is_dropped() -> None:
    """After the loop is gone an SDK may go on to call."""
    seen: list[int] = []

    async def main() -> Callable[[int], None]:
        return thread.callback(seen.append)

    with LoopThread() as thread:
        callback = asyncio.run(main())
        callback(1)
        thread.submit(callback, 2).result()
    assert seen == []


async def test_shutdown_can_cancel_and_need_not_wait(thread: LoopThread, gate: Gate) -> None:
    """As an Executor: cancel_futures drops what is queued; without wait it returns at once, there too."""
    blocked = thread.submit(gate, 1)
    queued = [thread.submit(int) for _ in range(2)]
    await gate.begun()
    assert list(map(type, queued)) == [ThreadFuture] * 2
    thread.shutdown(wait=False, cancel_futures=True)
    assert [future.cancelled() for future in queued] == [True, True]
    gate.opened.set()
    assert await asyncio.wrap_future(blocked) == 1
    async with LoopThread() as other:
        await other.call(other.shutdown, wait=False)
        assert other.closed


def test_map_and_run_in_executor_go_through_the_thread() -> None:
    """Executor.map keeps order; loop.run_in_executor takes the thread."""

    async def main() -> str:
        return await asyncio.get_running_loop().run_in_executor(thread, lambda: threading.current_thread().name)

    with LoopThread("pool") as thread:
        assert list(thread.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
        assert asyncio.run(main()) == "pool"


CTRL_C = '''
import asyncio, contextlib, os, signal, threading
from offload import LoopThread, Resource

def blocks_for_ever():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Event().wait()

async def until_it_runs(make):
    """A call that has not begun when its time is over is dropped: then make another."""
    while True:
        with contextlib.suppress(TimeoutError):
            await make()

async def main():
    async with LoopThread("serial", exit_timeout=0.3) as thread:
        {what}

asyncio.run(main())
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "await thread.call(blocks_for_ever)",
        "thread.submit(blocks_for_ever)",
        "await until_it_runs(lambda: asyncio.wait_for(thread.call(blocks_for_ever), 0.1))",
        "await until_it_runs(lambda: thread.options(timeout=0.1).call(blocks_for_ever))",
        "await thread.options(on_cancel='interrupt').call(blocks_for_ever)",
    ],
)
def test_ctrl_c_once_ends_a_program_whose_resource_blocks(what: str) -> None:
    """One SIGINT ends it, in whichever way it waits, and says which call blocks and where it stands."""
    source = textwrap.dedent(CTRL_C.format(what=what))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert "KeyboardInterrupt" in done.stderr
    assert "blocks_for_ever" in done.stderr
    assert "still works 0.3 s after Ctrl-C" in done.stderr
    assert os.path.basename(threading.__file__) in done.stderr  # the stack
