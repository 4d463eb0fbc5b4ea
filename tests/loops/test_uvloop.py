"""The promises with uvloop: as the caller's loop, as the thread's, and as both.

Everything here runs in each of the three crosses; asyncio with asyncio is what the other tests of this folder run with.
`test_call.py` runs most of its tests on a thread with uvloop, too; programs that end on a uvloop are in `test_exit.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future as ThreadFuture
from functools import partial
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
    QueueFullError,
    Resource,
    Service,
)

uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
FACTORIES: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Cross:
    """The loop that calls and the loop that is called."""

    def __init__(self, caller: str, thread: str) -> None:
        self.caller, self.factory = FACTORIES[caller], FACTORIES[thread]

    def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # Without debug mode: there uvloop walks the stack, which ends CPython 3.12.1 if an async generator is on it.
        with asyncio.Runner(debug=False, loop_factory=self.caller) as runner:
            runner.run(main())

    def thread(self, name: str = "resource", **options: Any) -> LoopThread:
        return LoopThread(name, loop_factory=self.factory, **options)


@pytest.fixture(
    name="cross", params=[("uvloop", "asyncio"), ("asyncio", "uvloop"), ("uvloop", "uvloop")], ids=" calls ".join
)
def new_cross(request: pytest.FixtureRequest) -> Cross:
    return Cross(*request.param)


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


def test_each_loop_is_what_was_asked_for(cross: Cross) -> None:
    """The caller's loop and the thread's are those of their factories, and two loops."""

    async def main() -> None:
        async with cross.thread() as thread:

            async def where() -> asyncio.AbstractEventLoop:
                return asyncio.get_running_loop()

            there, here = await thread.run(where), asyncio.get_running_loop()
            assert there is not here
            assert [isinstance(loop, uvloop.Loop) for loop in (here, there)] == [
                factory is uvloop.new_event_loop for factory in (cross.caller, cross.factory)
            ]

    cross.run(main)


def test_calls_of_all_kinds_run_in_the_order_made(cross: Cross, gate: Gate) -> None:
    """call, run, submit and post keep the order in which they were made, awaited or not."""
    log: list[int] = []

    async def note(n: int) -> None:
        log.append(n)

    async def main() -> None:
        async with cross.thread() as thread:
            blocked = thread.call(gate)
            await gate.begun()
            for n in range(0, 400, 4):
                thread.call(log.append, n)
                thread.run(note, n + 1)
                thread.submit(log.append, n + 2)
                thread.post(partial(log.append, n + 3))
            assert thread.stats().queued == 400
            gate.opened.set()
            assert await blocked == 0

    cross.run(main)
    assert log == list(range(400))


def test_burst_has_its_outcomes_in_order(cross: Cross) -> None:
    """Hundreds of calls at once, again and again, each with its own outcome."""

    async def main() -> None:
        async with cross.thread() as thread:
            for _ in range(3):
                assert await asyncio.gather(*(thread.call(int, n) for n in range(300))) == list(range(300))

    cross.run(main)


def test_quick_outcome_is_not_held_up_by_a_call_that_blocks(cross: Cross, gate: Gate) -> None:
    """Calls made in one burst with one that blocks behind them have their outcomes while it blocks."""
    first = Gate()

    async def main() -> None:
        async with cross.thread() as thread:
            thread.post(first)  # not a call, whose own outcome would bring the others along
            await first.begun()
            calls = [thread.call(int, n) for n in range(10)]
            blocked = thread.call(gate)
            first.opened.set()
            assert await asyncio.gather(*calls) == list(range(10))
            assert not blocked.done()
            gate.opened.set()
            await blocked

    cross.run(main)


def test_cancelled_while_queued_never_runs_and_while_running_is_waited_for(cross: Cross, gate: Gate) -> None:
    """The queued call is dropped at once; the running one stays pending until it has returned."""
    ran: list[int] = []

    async def main() -> None:
        async with cross.thread() as thread:
            running, queued = thread.call(gate), thread.call(ran.append, 1)
            await gate.begun()
            assert running.cancel()
            assert queued.cancel()
            await asyncio.sleep(0)
            assert (running.done(), queued.cancelled(), queued.state) == (False, True, CallState.DROPPED)
            gate.opened.set()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert running.state is CallState.FINISHED

    cross.run(main)
    assert ran == []


def test_cancelled_coroutine_cleans_up_before_its_caller_goes_on(cross: Cross) -> None:
    """The coroutine gets CancelledError on its own loop, and its caller waits for its cleanup."""
    log: list[str] = []

    async def work(entered: ThreadFuture[None]) -> None:
        entered.set_result(None)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            log.append("cleaned up")

    async def main() -> None:
        entered: ThreadFuture[None] = ThreadFuture()
        async with cross.thread() as thread:
            call = thread.run(work, entered)
            await asyncio.wrap_future(entered)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await call
            assert log == ["cleaned up"]
            assert call.state is CallState.INTERRUPTED

    cross.run(main)


def test_timeout_interrupts_or_abandons_as_told(cross: Cross) -> None:
    """A timeout interrupts the running call and waits, or leaves it; the next call works."""

    entered = threading.Semaphore(0)

    def wait(event: threading.Event) -> None:
        entered.release()
        event.wait()

    async def main() -> None:
        resource: Resource[threading.Event] = Resource(
            threading.Event, interrupt=threading.Event.set, loop_factory=cross.factory
        )
        async with resource as event:
            hit = event.options(timeout=0.01).call(wait)
            entered.acquire()  # here, on the loop: so its timer finds the call running
            with pytest.raises(TimeoutError, match=r"\.wait was given up after 0\.01 s \((finished|interrupted)\)"):
                await hit
            await event.call(threading.Event.clear)
            left = event.options(timeout=0.01, on_cancel="abandon").call(wait)
            entered.acquire()
            with pytest.raises(TimeoutError):
                await left
            assert left.state is CallState.ABANDONED
            event._target._object[0].set()
            assert await event.call(threading.Event.is_set)
            assert event.stats().abandoned == 1

    cross.run(main)


def test_context_goes_in_and_errors_come_back_with_both_tracebacks(cross: Cross) -> None:
    """Context variables hold inside the call; its error has the frames of both sides; StopIteration is RuntimeError."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    def over_there() -> None:
        raise LookupError(variable.get())

    async def awaited(call: Call[None]) -> None:
        await call

    async def main() -> None:
        async with cross.thread() as thread:
            variable.set("mine")
            with pytest.raises(LookupError, match="mine") as info:
                await awaited(thread.call(over_there))
            names = [frame.name for frame in traceback.extract_tb(info.value.__traceback__)]
            assert (names[0], names[-1]) == ("main", "over_there")
            assert "awaited" in names
            with pytest.raises(RuntimeError, match="StopIteration"):
                await thread.call(next, iter(()))

    cross.run(main)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_thread_survives_what_ends_other_threads(cross: Cross, error: type[BaseException]) -> None:
    """SystemExit and its like go to the caller of `submit`, and the thread takes further calls."""

    def fail() -> None:
        raise error

    async def main() -> None:
        async with cross.thread() as thread:
            future = thread.submit(fail)
            await thread.call(int)
            assert type(future.exception()) is error
            assert await thread.call(int, 3) == 3

    cross.run(main)


def test_stopped_loop_fails_every_call(cross: Cross) -> None:
    """Somebody stops the thread's loop: who waits, and who comes later, gets BrokenResourceError."""

    async def stop() -> None:
        asyncio.get_running_loop().stop()
        await asyncio.Event().wait()

    async def main() -> None:
        thread = await cross.thread().start()
        waits = thread.run(asyncio.Event().wait)
        for call in (waits, thread.run(stop)):
            with pytest.raises(BrokenResourceError, match="'resource' has ended"):
                await call
        makes: list[Callable[[Any], object]] = [thread.call, thread.run, thread.submit]
        for make in makes:
            with pytest.raises(BrokenResourceError):
                make(int)
        await thread.aclose()

    cross.run(main)


def test_closing_runs_what_is_queued_and_outlasts_a_cancellation(cross: Cross, gate: Gate) -> None:
    """aclose() takes no more calls, runs those that are here, then on_close; cancelled, it waits all the same."""
    log: list[object] = []

    async def main() -> None:
        thread = await cross.thread(on_close=lambda: log.append("on_close")).start()
        calls: list[Call[Any]] = [thread.call(gate, 5), thread.call(log.append, 1), thread.run(asyncio.sleep, 0, 7)]
        closing = asyncio.create_task(thread.aclose())
        await gate.begun()
        closing.cancel()
        await asyncio.sleep(0)
        assert not closing.done()
        with pytest.raises(ClosedResourceError):
            thread.call(int)
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert [thread.name for thread in threading.enumerate() if thread.name == "resource"] == []
        assert await asyncio.gather(*calls) == [5, None, 7]
        assert log == [1, "on_close"]

    cross.run(main)


def test_caller_whose_loop_is_gone_is_counted_and_hurts_nobody(cross: Cross, gate: Gate) -> None:
    """Calls whose loop has closed run and are counted as abandoned; another loop goes on with the thread."""
    ran: list[int] = []

    async def leave() -> None:
        thread.call(gate)
        for n in range(10):
            thread.call(ran.append, n)
        thread.run(asyncio.sleep, 0)
        await gate.begun()

    async def later() -> None:
        gate.opened.set()
        assert await thread.call(int, 5) == 5

    with cross.thread() as thread:
        cross.run(leave)
        cross.run(later)
        cross.run(later)
        assert (ran, thread.stats().abandoned) == (list(range(10)), 12)


def test_call_from_the_thread_itself_runs_at_once(cross: Cross) -> None:
    """A coroutine on the thread calls it inline, a plain function too; waiting for oneself is DeadlockError."""

    async def within() -> int:
        call = thread.call(int, 3)
        assert call.done()
        return await call + await thread.run(asyncio.sleep, 0, 4)

    async def main() -> None:
        async with thread:
            assert await thread.run(within) == 7
            assert await thread.call(lambda: thread.submit(int, 8).result()) == 8
            with pytest.raises(DeadlockError):
                await thread.call(thread.close)
            with pytest.raises(DeadlockError):
                await thread.run(thread.aclose)

    thread = cross.thread()
    cross.run(main)


def test_bound_refuses_who_cannot_wait(cross: Cross, gate: Gate) -> None:
    """At max_calls a call with nowait gets QueueFullError; one without keeps its place."""

    async def main() -> None:
        async with cross.thread(max_calls=2) as thread:
            blocked = thread.call(gate)
            await gate.begun()
            calls = [thread.options(nowait=True).call(int, n) for n in range(2)]
            with pytest.raises(QueueFullError):
                thread.options(nowait=True).call(int)
            calls.append(thread.call(int, 2))
            gate.opened.set()
            assert await asyncio.gather(blocked, *calls) == [0, 0, 1, 2]

    cross.run(main)


def test_nobody_gets_into_an_exclusive_span(cross: Cross) -> None:
    """Between the calls of a span, none of two loops and a plain thread gets in."""
    log: list[str] = []

    async def main() -> None:
        async with Resource(lambda: log, loop_factory=cross.factory, close=lambda log: None) as handle:
            stop = threading.Event()

            def intrude() -> None:
                while not stop.is_set():
                    handle.submit(list.append, "thread").result()

            async def intrude_here() -> None:
                while not stop.is_set():
                    await handle.call(list.append, "loop")

            thread = threading.Thread(target=intrude)
            thread.start()
            here = asyncio.create_task(intrude_here())
            for _ in range(20):
                async with handle.exclusive() as tx:
                    for n in range(5):
                        await tx.call(list.append, f"mine {n}")
                        await asyncio.sleep(0)
            stop.set()
            await here
            async with LoopThread("joins") as joins:
                await joins.call(thread.join)

    cross.run(main)
    first = [n for n, entry in enumerate(log) if entry == "mine 0"]
    assert len(first) == 20
    assert all(log[n : n + 5] == [f"mine {k}" for k in range(5)] for n in first)


def test_iteration_reads_ahead_and_closes_its_source(cross: Cross) -> None:
    """Items come in order; a consumer that stops has the source closed on its thread."""
    closed: list[int] = []

    def source(_: object) -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(threading.get_ident())

    async def main() -> None:
        async with Resource(object, loop_factory=cross.factory) as handle:
            assert [n async for n in handle.iter(source, chunk=7, prefetch=2)] == list(range(1000))
            async with contextlib.aclosing(handle.iter(source, chunk=7)) as items:
                async for n in items:
                    if n == 100:
                        break
            assert closed == 2 * [await handle.call(lambda _: threading.get_ident())]

    cross.run(main)


def test_callbacks_come_to_the_callers_loop_in_order(cross: Cross) -> None:
    """What a vendor's thread calls runs on the caller's loop, in order; one that raises reaches the loop's handler."""
    log: list[int] = []
    errors: list[object] = []

    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda _, context: errors.append(context.get("exception")))

        def seen(n: int) -> None:
            assert asyncio.get_running_loop() is loop
            log.append(n)
            if n == 500:
                raise LookupError
            if n == 999:
                done.set()

        async with cross.thread() as thread:
            deliver = thread.callback(seen)
            vendor = threading.Thread(target=lambda: [deliver(n) for n in range(1000)])
            vendor.start()
            await done.wait()
            await thread.call(vendor.join)

    cross.run(main)
    assert log == list(range(1000))
    assert [type(error) for error in errors] == [LookupError]


def test_thread_serves_run_in_executor(cross: Cross) -> None:
    """The caller's loop takes the thread as an executor: results, errors and a dropped call."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with cross.thread() as thread:
            executor: Any = thread
            ident = await loop.run_in_executor(executor, threading.get_ident)
            assert ident == await thread.call(threading.get_ident)
            with pytest.raises(ZeroDivisionError):
                await loop.run_in_executor(executor, lambda: 1 // 0)

    cross.run(main)


def test_service_runs_both_kinds_of_methods(cross: Cross) -> None:
    """Plain and async methods of a Service, and its two ends, run on its thread; its caller may be any loop."""

    class Port(Service):
        def on_open(self) -> None:
            self.idents = [threading.get_ident()]

        @offload.method
        def read(self, size: int) -> bytes:
            self.idents.append(threading.get_ident())
            return b"x" * size

        @offload.method
        async def line(self, number: int) -> bytes:
            self.idents.append(threading.get_ident())
            return await self.read(number)

        def on_close(self) -> None:
            self.idents.append(threading.get_ident())

    async def main() -> None:
        async with Port() as port:
            assert [*await asyncio.gather(port.read(2), port.line(3))] == [b"xx", b"xxx"]
        assert (len(port.idents), len(set(port.idents))) == (5, 1)
        assert threading.get_ident() not in port.idents

    cross.run(main)


def test_two_loops_and_a_plain_thread_share_one_resource(cross: Cross) -> None:
    """Callers on an asyncio loop, on a uvloop and in a plain thread, at once: each has its outcomes, in its order."""
    log: list[tuple[str, int]] = []

    def note(who: str, n: int) -> int:
        log.append((who, n))
        return n

    def plain() -> None:
        assert [thread.submit(note, "plain", n).result() for n in range(200)] == list(range(200))

    def caller(who: str) -> None:
        async def main() -> None:
            assert await asyncio.gather(*(thread.call(note, who, n) for n in range(100))) == list(range(100))
            for n in range(100, 200):
                assert await thread.call(note, who, n) == n

        with asyncio.Runner(loop_factory=FACTORIES[who]) as runner:
            runner.run(main())

    failed: list[BaseException] = []

    def guarded(function: Callable[..., None], *args: str) -> None:
        try:
            function(*args)
        except BaseException as exc:
            failed.append(exc)

    with cross.thread() as thread:
        works = [(plain,), (caller, "asyncio"), (caller, "uvloop")]
        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert failed == []
    for who in ("plain", "asyncio", "uvloop"):
        assert [n for name, n in log if name == who] == list(range(200))


def test_sink_and_file_work_for_the_callers_loop(cross: Cross, tmp_path: Path) -> None:
    """A FileSink with hardly any room, its commits, and a file of offload.open are the same from any loop."""

    async def main() -> None:
        async with FileSink(tmp_path / "sink", max_bytes=100) as sink:
            for n in range(500):
                await sink.write(f"{n}\n")
            await asyncio.gather(*(sink.commit() for _ in range(20)))
            assert sink.stats().written_bytes == len("".join(f"{n}\n" for n in range(500)))
        async with offload.open(tmp_path / "sink") as file:
            assert [int(line) async for line in file] == list(range(500))
        async with cross.thread() as thread, offload.open(tmp_path / "sink", executor=thread) as file:
            assert await file.readline() == "0\n"

    cross.run(main)


def test_cancels_at_any_moment_either_drop_or_wait(cross: Cross) -> None:
    """A call cancelled after any number of turns of the loop has run or has not, says which, and the next one works."""
    ran: list[int] = []

    async def main() -> None:
        async with cross.thread() as thread:
            calls = []
            for n in range(300):
                call = thread.call(ran.append, n)
                for _ in range(n % 5):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.wait([call])
                calls.append(call)
            assert await thread.call(int, 1) == 1
            dropped = [n for n, call in enumerate(calls) if call.state is CallState.DROPPED]
            assert sorted({*range(300)} - {*dropped}) == ran
            assert thread.stats().dropped == len(dropped)

    cross.run(main)
