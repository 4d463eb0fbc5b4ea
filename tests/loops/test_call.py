"""Calls across loops: order, cancellation, outcomes, context, and what becomes of them when a loop is gone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import importlib
import itertools
import logging
import random
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import CancelledError as ThreadCancelledError
from concurrent.futures import Future as ThreadFuture
from typing import Any, TypeVarTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from offload.errors import BrokenResourceError, ClosedResourceError
from offload.loops import Call, CallState, LoopThread
from offload.loops.port import _FIRST_LOOK, Bell, Port, port_here

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Ts = TypeVarTuple("Ts")


def uvloop_factory() -> LoopFactory:
    factory: LoopFactory = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop
    return factory


class Gate:
    """A function that says when it has begun, and returns when it may."""

    def __init__(self) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self._open = threading.Event()

    def __call__(self, value: int = 0) -> int:
        self.entered.set_result(None)
        self._open.wait()
        return value

    def open(self) -> None:
        self._open.set()

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)


class Waiter:
    """A coroutine function that says when it has begun, and whose cleanup ends when it may."""

    def __init__(self, thread: LoopThread) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self.cleaning: ThreadFuture[None] = ThreadFuture()
        self.ended = False
        self._thread = thread
        self._clean = asyncio.Event()

    async def __call__(self) -> None:
        self.entered.set_result(None)
        try:
            await asyncio.Event().wait()
        finally:
            self.cleaning.set_result(None)
            await self._clean.wait()
            self.ended = True

    def open(self) -> None:
        with contextlib.suppress(ClosedResourceError):
            self._thread.submit(self._clean.set).result()

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)


@pytest.fixture(name="thread", params=["asyncio", "uvloop"])
async def open_thread(request: pytest.FixtureRequest) -> AsyncIterator[LoopThread]:
    async with LoopThread("resource", loop_factory=uvloop_factory() if request.param == "uvloop" else None) as thread:
        yield thread


@pytest.fixture(name="gate")
def new_gate(thread: LoopThread) -> Iterator[Gate]:
    """Torn down before the thread, so that a test that fails does not hang as well."""
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(name="waiter")
def new_waiter(thread: LoopThread) -> Iterator[Waiter]:
    waiter = Waiter(thread)
    yield waiter
    waiter.open()


@pytest.fixture(name="elsewhere")
async def open_elsewhere() -> AsyncIterator[LoopThread]:
    """A second loop that makes calls."""
    async with LoopThread("elsewhere") as elsewhere:
        yield elsewhere


@contextlib.contextmanager
def eager_switches() -> Iterator[None]:
    """Threads take the GIL from each other as often as they can, so that races happen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def state_of(call: Call[Any]) -> CallState:
    return call.state  # through a function: type checkers do not know that others change it


async def outcome_of(call: Awaitable[Any]) -> Any:
    return await call


def as_coroutine(function: Callable[..., Any]) -> Callable[..., Any]:
    async def coroutine_function(*args: Any) -> Any:
        return function(*args)

    return coroutine_function


def make(thread: LoopThread, kind: str, function: Callable[..., Any], *args: Any) -> Any:
    """A call of one of the four kinds, on the running loop or, for submit and post, anywhere."""
    if kind == "call":
        return thread.call(function, *args)
    if kind == "run":
        return thread.run(as_coroutine(function), *args)
    if kind == "submit":
        return thread.submit(function, *args)
    thread.post(lambda: function(*args))
    return None


# --- order ------------------------------------------------------------------------------------------------------------


async def test_burst_of_calls_runs_in_the_order_made_on_one_thread(thread: LoopThread) -> None:
    """A hundred calls made at once run in their order, all on the resource's thread."""
    log: list[tuple[int, int]] = []

    def note(i: int) -> None:
        log.append((i, threading.get_ident()))

    calls = [thread.call(note, i) for i in range(100)]
    await asyncio.gather(*calls)
    assert [i for i, _ in log] == list(range(100))
    assert len({ident for _, ident in log}) == 1
    assert log[0][1] != threading.get_ident()


async def test_place_is_taken_when_the_call_is_made_not_when_it_is_awaited(thread: LoopThread) -> None:
    """Calls awaited in the opposite order, or never, run in the order they were made."""
    log: list[int] = []
    first, _never_awaited, third = (thread.call(log.append, i) for i in (1, 2, 3))
    await third
    assert log == [1, 2, 3]
    await first


@pytest.mark.parametrize("seed", range(5))
async def test_all_kinds_of_calls_share_one_queue(thread: LoopThread, gate: Gate, seed: int) -> None:
    """call, run, submit and post, mixed at random behind a blocked call, run in the order they were made."""
    kinds = random.Random(seed).choices(["call", "run", "submit", "post"], k=40)
    blocked = thread.call(gate)
    log: list[int] = []
    made = [make(thread, kind, log.append, i) for i, kind in enumerate(kinds)]
    assert log == []
    gate.open()
    await thread.call(int)
    assert log == list(range(40))
    assert await blocked == 0
    for kind, future in zip(kinds, made, strict=True):
        if kind != "post":
            await (asyncio.wrap_future(future) if kind == "submit" else future)


@pytest.mark.parametrize("seed", range(3))
async def test_all_kinds_of_calls_keep_their_order_while_the_resource_works(thread: LoopThread, seed: int) -> None:
    """The order holds as well when calls are made while earlier ones run, with wakes and tasks in every phase."""
    chance = random.Random(seed)
    log: list[int] = []
    for i in range(400):
        make(thread, chance.choice(["call", "run", "submit", "post"]), log.append, i)
        if chance.random() < 0.1:
            await turns(chance.randrange(3))
    await thread.call(int)
    assert log == list(range(400))


async def test_coroutines_interleave_at_their_awaits(thread: LoopThread) -> None:
    """A coroutine that waits lets later calls run, and goes on when they have woken it."""
    log: list[str] = []
    event = asyncio.Event()

    async def first() -> str:
        log.append("first starts")
        await event.wait()
        log.append("first ends")
        return "first"

    call = thread.run(first)
    await thread.call(log.append, "second")
    thread.post(event.set)
    assert await call == "first"
    assert log == ["first starts", "second", "first ends"]


async def test_order_between_callers_is_the_order_in_time(
    thread: LoopThread, elsewhere: LoopThread, gate: Gate
) -> None:
    """Calls made by turns in two loops and a plain thread, each after the one before, run in that order."""
    made: list[Any] = []
    log: list[int] = []
    blocked = thread.call(gate)

    def call_from_elsewhere(i: int) -> None:
        made.append(thread.call(log.append, i))

    def submit_from_plain(i: int) -> None:
        made.append(thread.submit(log.append, i))

    async with LoopThread("plain") as plain:
        for i in range(0, 60, 4):
            made.append(thread.call(log.append, i))
            await elsewhere.call(call_from_elsewhere, i + 1)
            await plain.call(submit_from_plain, i + 2)
            made.append(thread.run(as_coroutine(log.append), i + 3))
    gate.open()
    await blocked
    await thread.call(int)
    assert log == list(range(60))
    assert len(made) == 60


@eager_switches()
def test_callers_in_many_threads_each_keep_their_order() -> None:
    """Three loops and a plain thread at once: each caller's calls run in its order and context, one at a time."""
    log: list[tuple[int, int]] = []
    inside = threading.Lock()
    start = threading.Barrier(4)
    results: dict[int, list[Any]] = {}

    def work(caller: int, i: int) -> int:
        assert inside.acquire(blocking=False), "two calls at once"
        log.append((caller, i))
        assert request_id.get() == f"{caller} {i}"
        inside.release()
        return i

    def in_context(kind: str, caller: int, i: int) -> Any:
        request_id.set(f"{caller} {i}")
        return make(thread, kind, work, caller, i)

    async def in_a_loop(caller: int) -> None:
        start.wait()
        results[caller] = []
        for i in range(0, 200, 20):
            burst = [in_context("call" if j % 3 else "run", caller, j) for j in range(i, i + 20)]
            results[caller] += await asyncio.gather(*burst)

    def in_no_loop(caller: int) -> None:
        start.wait()
        results[caller] = [future.result() for future in [in_context("submit", caller, i) for i in range(200)]]

    def runner(caller: int, factory: LoopFactory | None) -> Callable[[], None]:
        def run() -> None:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(in_a_loop(caller))

        return run

    try:
        third: LoopFactory | None = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        third = None
    with LoopThread("resource") as thread:
        callers = [runner(0, None), runner(1, None), runner(2, third), lambda: in_no_loop(3)]
        threads = [threading.Thread(target=caller) for caller in callers]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(log) == 800
    for caller in range(4):
        assert [i for who, i in log if who == caller] == list(range(200))
        assert results[caller] == list(range(200))


async def test_a_queue_that_never_empties_leaves_timers_and_coroutines_their_turn(thread: LoopThread) -> None:
    """A call that always queues the next one does not starve a coroutine on the same loop."""
    going = True

    def again() -> None:
        if going:
            thread.post(again)

    async def stop() -> None:
        nonlocal going
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.sleep(0.0001)
        going = False

    thread.post(again)
    await thread.run(stop)
    await thread.call(int)
    assert thread.stats().queued == 0


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop that has no add_reader, as Windows' proactor has none."""

    def add_reader(self, fd: Any, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("eventfd", [True, False])
def test_a_burst_costs_the_resource_one_wake(eventfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred calls made while the resource is busy wake its loop once, with and without an eventfd."""
    wakes: list[object] = []
    ring = Bell.ring

    def counted(self: Bell) -> None:
        wakes.append(self)
        ring(self)

    monkeypatch.setattr(Bell, "ring", counted)
    gate = Gate()
    with LoopThread("resource", loop_factory=asyncio.SelectorEventLoop if eventfd else WithoutReaders) as thread:
        blocked = thread.submit(gate)
        gate.entered.result()
        wakes.clear()
        futures = [thread.submit(int, i) for i in range(100)]
        count = len(wakes)
        gate.open()
        assert count == 1
        assert [future.result() for future in futures] == list(range(100))
        assert blocked.result() == 0


@pytest.mark.parametrize("kind", ["run", "submit"])
async def test_call_in_the_middle_of_another_by_the_same_thread_gets_the_next_place(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer or signal handler that makes a call while its thread makes one neither hangs nor loses either."""
    log: list[str] = []
    interrupt: list[str] = []

    def interrupted() -> None:
        if interrupt:
            made.append(make(thread, interrupt.pop(), log.append, "finalizer's"))

    ring = Bell.ring

    def interrupted_ring(self: Bell) -> None:
        if self is not own:
            interrupted()
        ring(self)

    class Interrupted(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
            interrupted()
            return super().call_soon_threadsafe(callback, *args, context=context)

    own = port_here()._bell
    monkeypatch.setattr(Bell, "ring", interrupted_ring)
    async with LoopThread("resource", loop_factory=Interrupted) as thread:
        for outer in ("call", "run"):
            made: list[Any] = []
            interrupt.append(kind)
            made.append(make(thread, outer, log.append, outer))
            for future in made:
                await (asyncio.wrap_future(future) if isinstance(future, ThreadFuture) else future)
    assert sorted(log) == ["call", "finalizer's", "finalizer's", "run"]


# --- cancelling -------------------------------------------------------------------------------------------------------


async def cancel_itself(call: Call[Any]) -> None:
    call.cancel()
    await call


async def cancel_its_task(call: Call[Any]) -> None:
    task = asyncio.create_task(outcome_of(call))
    await asyncio.sleep(0)
    task.cancel()
    await task


async def cancel_by_wait_for(call: Call[Any]) -> None:
    await asyncio.wait_for(call, 0)


async def cancel_by_timeout(call: Call[Any]) -> None:
    async with asyncio.timeout(0):
        await call


async def cancel_by_gather(call: Call[Any]) -> None:
    together = asyncio.gather(call)
    await asyncio.sleep(0)
    together.cancel()
    await together


async def cancel_by_task_group(call: Call[Any]) -> None:
    async def fail() -> None:
        raise LookupError("a sibling")

    async with asyncio.TaskGroup() as group:
        group.create_task(outcome_of(call))
        group.create_task(fail())


ways = pytest.mark.parametrize(
    ("cancel", "seen"),
    [
        (cancel_itself, asyncio.CancelledError),
        (cancel_its_task, asyncio.CancelledError),
        (cancel_by_wait_for, TimeoutError),
        (cancel_by_timeout, TimeoutError),
        (cancel_by_gather, asyncio.CancelledError),
        (cancel_by_task_group, ExceptionGroup),
    ],
)
Way = Callable[[Call[Any]], Awaitable[None]]


@ways
@pytest.mark.parametrize("kind", ["call", "run"])
async def test_call_cancelled_while_queued_never_runs(
    thread: LoopThread, gate: Gate, kind: str, cancel: Way, seen: type[BaseException]
) -> None:
    """However its caller is cancelled, a queued call is done at once and never runs; its neighbours do."""
    log: list[int] = []
    blocked = thread.call(gate)
    before, call, after = (make(thread, kind, log.append, i) for i in range(3))
    with pytest.raises(seen):
        await cancel(call)
    assert state_of(call) is CallState.DROPPED
    assert call.cancelled()
    gate.open()
    await asyncio.gather(blocked, before, after)
    await thread.call(int)
    assert log == [0, 2]
    assert thread.stats().dropped == 1
    assert thread.stats().queued == 0


@ways
async def test_running_call_is_waited_for_when_its_caller_is_cancelled(
    thread: LoopThread, gate: Gate, cancel: Way, seen: type[BaseException]
) -> None:
    """However its caller is cancelled, a running plain function is waited for; then the cancellation goes on."""
    log: list[str] = []

    def work() -> None:
        gate()
        log.append("the call ends")

    async def caller() -> None:
        try:
            await cancel(call)
        finally:
            log.append("the caller goes on")

    call = thread.call(work)
    await gate.begun()
    task = asyncio.create_task(caller())
    await turns()
    assert not task.done()
    assert state_of(call) is CallState.RUNNING
    gate.open()
    with pytest.raises(seen):
        await task
    assert log == ["the call ends", "the caller goes on"]
    assert state_of(call) is CallState.FINISHED
    assert call.cancelled()


@ways
async def test_cleanup_of_a_cancelled_coroutine_is_waited_for(
    thread: LoopThread, waiter: Waiter, cancel: Way, seen: type[BaseException]
) -> None:
    """However its caller is cancelled, a running coroutine is cancelled, and the caller goes on after its cleanup."""
    call = thread.run(waiter)
    await waiter.begun()
    task = asyncio.create_task(outcome_of(cancel(call)))
    await asyncio.wrap_future(waiter.cleaning)
    await thread.call(int)
    await turns()
    assert not task.done()
    assert state_of(call) is CallState.RUNNING
    waiter.open()
    with pytest.raises(seen):
        await task
    assert waiter.ended
    assert state_of(call) is CallState.INTERRUPTED
    assert call.cancelled()


async def test_coroutine_that_suppresses_its_cancellation_is_waited_for(thread: LoopThread) -> None:
    """The caller of a coroutine that swallows the cancellation and returns sees CancelledError all the same."""
    entered: ThreadFuture[None] = ThreadFuture()

    async def stubborn() -> str:
        entered.set_result(None)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return "done nevertheless"

    call = thread.run(stubborn)
    await asyncio.wrap_future(entered)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert state_of(call) is CallState.FINISHED


@pytest.mark.parametrize("kind", ["call", "run"])
async def test_error_of_a_cancelled_call_gives_way_to_the_cancellation(
    thread: LoopThread, gate: Gate, kind: str
) -> None:
    """A cancelled caller sees CancelledError even if the call ends with an error of its own."""

    def fail() -> None:
        gate()
        raise LookupError("unheard")

    call = make(thread, kind, fail)
    await gate.begun()
    call.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert thread.stats().failed == 1


async def test_coroutine_is_cancelled_once_for_each_cancel(thread: LoopThread) -> None:
    """A coroutine gets one CancelledError for each `cancel()`, each on its own loop."""
    entered: ThreadFuture[None] = ThreadFuture()
    seen: list[tuple[object, ...]] = []

    async def patient() -> int:
        entered.set_result(None)
        while len(seen) < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as exc:
                seen.append((threading.get_ident(), *exc.args))
        return 3

    call = thread.run(patient)
    await asyncio.wrap_future(entered)
    for count in range(1, 4):
        assert call.cancel(f"number {count}")
        await thread.run(turns)
        assert len(seen) == count
    with pytest.raises(asyncio.CancelledError):
        await call
    ident = await thread.call(threading.get_ident)
    assert seen == [(ident, "number 1"), (ident, "number 2"), (ident, "number 3")]


async def test_cancel_that_races_with_the_start_either_drops_or_waits(thread: LoopThread) -> None:
    """A call cancelled about when it starts has either run to its end or never begun, and says which."""
    chance = random.Random(7)
    ran: set[int] = set()
    states = []
    with eager_switches():
        for i in range(300):
            call = thread.call(ran.add, i)
            for _ in range(chance.randrange(60)):
                call.done()
            expected = call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert call.cancelled() is expected
            states.append(call.state)
    assert ran == {i for i, state in enumerate(states) if state is CallState.FINISHED}
    assert set(states) <= {CallState.FINISHED, CallState.DROPPED}
    assert thread.stats().dropped == states.count(CallState.DROPPED)


async def test_cancel_that_races_with_a_coroutines_start_leaves_its_cleanup_alone(thread: LoopThread) -> None:
    """A coroutine cancelled about when it starts never begins, or its asynchronous cleanup runs to the end."""
    chance = random.Random(11)
    begun: list[int] = []
    cleaned: list[int] = []

    async def work(i: int) -> None:
        begun.append(i)
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(4):
                await asyncio.sleep(0)
            cleaned.append(i)

    dropped = 0
    with eager_switches():
        for i in range(300):
            call = thread.run(work, i)
            for _ in range(chance.randrange(200)):
                call.done()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            dropped += call.state is CallState.DROPPED
    assert begun == cleaned
    assert len(begun) == 300 - dropped


@pytest.mark.parametrize("step", range(1, 6))
@pytest.mark.parametrize("kind", ["call", "run"])
async def test_cancel_between_any_two_steps_of_the_start_drops_or_waits(
    thread: LoopThread, kind: str, step: int
) -> None:
    """Each time the resource's thread lets go of the gate, a cancel in that moment has one of the two outcomes."""
    resource = await thread.call(threading.get_ident)
    reached: ThreadFuture[None] = ThreadFuture()
    go_on = threading.Event()
    ran: list[int] = []

    class Stepping:
        """A gate that stops the resource's thread when it has let go for the nth time."""

        def __init__(self) -> None:
            self.lock = thread._mailbox.gate
            self.left = step

        def __enter__(self) -> None:
            self.lock.__enter__()

        def __exit__(self, *exc: Any) -> None:
            self.lock.__exit__(*exc)
            if threading.get_ident() == resource:
                self.left -= 1
                if self.left == 0:
                    reached.set_result(None)
                    go_on.wait()

    await thread.run(turns, 3)
    thread._mailbox.gate = Stepping()  # type: ignore[assignment]
    call = make(thread, kind, ran.append, 1)
    thread.post(lambda: None)
    thread.post(lambda: None)
    await asyncio.wrap_future(reached)
    asked = call.cancel()
    go_on.set()
    if asked:
        with pytest.raises(asyncio.CancelledError):
            await call
    await thread.call(int)
    assert state_of(call) is (CallState.FINISHED if ran else CallState.DROPPED)
    assert thread.stats().dropped == 1 - len(ran)


@pytest.mark.parametrize("begun", [False, True], ids=["queued", "running"])
async def test_gather_returns_the_cancellation_of_a_call(thread: LoopThread, gate: Gate, begun: bool) -> None:
    """gather(return_exceptions=True) ends when one of its calls was cancelled, queued or running."""
    first, second = thread.call(gate), thread.call(int)
    await gate.begun()
    (first if begun else second).cancel()
    gate.open()
    results = await asyncio.gather(first, second, return_exceptions=True)
    expected = [asyncio.CancelledError, int] if begun else [int, asyncio.CancelledError]
    assert [type(result) for result in results] == expected


async def test_cancelling_passes_the_message_on(thread: LoopThread, gate: Gate) -> None:
    """The text given to `cancel()` is in the CancelledError, for a queued call and a running one."""
    running, queued = thread.call(gate), thread.call(int)
    await gate.begun()
    assert running.cancel("no more need")
    assert queued.cancel("no more time")
    with pytest.raises(asyncio.CancelledError, match="no more time"):
        await queued
    gate.open()
    with pytest.raises(asyncio.CancelledError, match="no more need"):
        await running


async def test_cancelling_a_call_that_is_done_changes_nothing(thread: LoopThread) -> None:
    """`cancel()` of a call that has its outcome says False and leaves the outcome."""
    call = thread.call(int, 5)
    assert await call == 5
    assert call.cancel() is False
    assert call.result() == 5
    dropped = thread.call(int)
    if dropped.cancel():
        assert dropped.cancel() is (not dropped.done())


async def test_shield_keeps_a_running_call_from_cancellation(thread: LoopThread, gate: Gate) -> None:
    """A call under `asyncio.shield` is not touched when its caller is cancelled."""
    call = thread.call(gate, 3)
    task = asyncio.create_task(outcome_of(asyncio.shield(call)))
    await gate.begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    assert await call == 3


async def test_submission_cancelled_while_queued_never_runs(thread: LoopThread, gate: Gate) -> None:
    """A concurrent future cancelled while queued drops the call, and the drop is counted; a running one cannot be."""
    log: list[int] = []
    running = thread.submit(gate)
    await gate.begun()
    dropped, kept = thread.submit(log.append, 1), thread.submit(log.append, 2)
    assert dropped.cancel()
    assert not running.cancel()
    gate.open()
    await asyncio.wrap_future(kept)
    assert log == [2]
    assert thread.stats().dropped == 1
    assert thread.stats().failed == 0


async def test_coroutine_that_ends_cancelled_by_itself_is_interrupted(thread: LoopThread) -> None:
    """A CancelledError that the coroutine raised itself reaches its caller, who was not cancelled."""

    async def give_up() -> None:
        raise asyncio.CancelledError("the other end hung up")

    call = thread.run(give_up)
    with pytest.raises(asyncio.CancelledError, match="the other end hung up"):
        await call
    assert state_of(call) is CallState.INTERRUPTED
    assert await thread.call(int, 2) == 2


# --- context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["call", "run", "submit"])
async def test_context_of_each_caller_holds_inside_its_call(thread: LoopThread, gate: Gate, kind: str) -> None:
    """Each call of a burst sees the context variables as they were when it was made."""
    blocked = thread.call(gate)
    made = []
    for name in ("a", "b", "c"):
        request_id.set(name)
        made.append(make(thread, kind, request_id.get))
    request_id.set("later")
    gate.open()
    await blocked
    seen = [await (asyncio.wrap_future(call) if kind == "submit" else call) for call in made]
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["call", "run", "submit"])
async def test_context_set_inside_a_call_stays_there(thread: LoopThread, kind: str) -> None:
    """What a call sets is seen neither by its caller nor by the next call."""
    request_id.set("mine")
    call = make(thread, kind, request_id.set, "theirs")
    await (asyncio.wrap_future(call) if kind == "submit" else call)
    assert request_id.get() == "mine"
    assert await thread.call(request_id.get) == "mine"


async def test_context_holds_across_the_awaits_of_a_coroutine(thread: LoopThread) -> None:
    """A coroutine sees its caller's context after it has waited and other callers have been there."""
    event = asyncio.Event()

    async def work() -> str:
        await event.wait()
        return request_id.get()

    request_id.set("first")
    call = thread.run(work)
    request_id.set("second")
    thread.post(event.set)
    assert await call == "first"


async def test_contexts_of_two_callers_at_the_same_moment_are_not_mixed_up(
    thread: LoopThread, elsewhere: LoopThread
) -> None:
    """A coroutine call made elsewhere as soon as the queue is free has its own caller's context, not ours."""

    async def seen() -> str:
        return request_id.get()

    def call_from_elsewhere() -> Call[str]:
        request_id.set("theirs")
        return thread.run(seen)

    here = threading.get_ident()
    theirs: list[Call[str]] = []

    class Handing:
        """A gate that lets the other caller in when this one has let go of it."""

        def __init__(self) -> None:
            self.lock = thread._mailbox.gate

        def __enter__(self) -> None:
            self.lock.__enter__()

        def __exit__(self, *exc: Any) -> None:
            self.lock.__exit__(*exc)
            if threading.get_ident() == here and not theirs:
                theirs.append(elsewhere.submit(call_from_elsewhere).result())

    thread._mailbox.gate = Handing()  # type: ignore[assignment]
    request_id.set("mine")
    mine = thread.run(seen)
    assert await mine == "mine"
    assert await elsewhere.run(outcome_of, theirs[0]) == "theirs"


# --- errors -----------------------------------------------------------------------------------------------------------


def names_in_traceback(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("kind", ["call", "run", "submit"])
@pytest.mark.parametrize(
    "error", [ValueError("bad"), TimeoutError("late"), KeyError("k"), asyncio.InvalidStateError("i")], ids=repr
)
async def test_error_arrives_as_it_is_with_both_tracebacks(thread: LoopThread, kind: str, error: Exception) -> None:
    """The caller gets the very exception, with the frames of the function and its own in the traceback."""

    def fail_over_there() -> None:
        raise error

    caught: Exception | None = None
    error.__traceback__ = None
    call = make(thread, kind, fail_over_there)
    try:
        if kind == "submit":
            call.result()
        else:
            await call
    except Exception as exc:
        caught = exc
    assert caught is error
    names = names_in_traceback(error)
    assert names[0] == "test_error_arrives_as_it_is_with_both_tracebacks"
    assert names[-1] == "fail_over_there"


@pytest.mark.parametrize("kind", ["call", "submit"])
async def test_stop_iteration_crosses_as_a_runtime_error(thread: LoopThread, kind: str) -> None:
    """`next()` of an empty iterator arrives as RuntimeError that says so, with the original as its cause."""
    numbers = iter([7])
    assert await thread.call(next, numbers) == 7
    call = make(thread, kind, next, numbers)
    with pytest.raises(
        RuntimeError, match=r"^the call raised StopIteration\(None\), which no future can hold$"
    ) as caught:
        await (asyncio.wrap_future(call) if kind == "submit" else call)
    assert type(caught.value.__cause__) is StopIteration


async def test_stop_iteration_of_a_coroutine_is_a_runtime_error_too(thread: LoopThread) -> None:
    """A coroutine that raises StopIteration ends with RuntimeError, as everywhere."""
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        await make(thread, "run", next, iter(()))
    assert type(caught.value.__cause__) is StopIteration


async def test_coroutine_function_given_to_call_is_an_error_that_says_run(thread: LoopThread) -> None:
    """A coroutine that nobody would await is not handed over as a result."""

    async def fetch() -> None: ...

    with pytest.raises(TypeError, match=r"fetch is a coroutine function; use `run` for it$"):
        _ = await thread.call(fetch)


async def test_plain_function_given_to_run_is_an_error_that_says_call(thread: LoopThread) -> None:
    """The error names what came instead of a coroutine."""
    with pytest.raises(TypeError, match=r"^len returned 1, expected a coroutine; use `call` for plain functions$"):
        await thread.run(len, "x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["call", "run", "submit"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_thread_survives_what_ends_other_threads(
    thread: LoopThread, kind: str, error: type[BaseException]
) -> None:
    """SystemExit and its like go to the caller; the thread takes further calls."""
    ident = await thread.call(threading.get_ident)

    def leave() -> None:
        raise error("over there")

    call = make(thread, kind, leave)
    with pytest.raises(error, match="over there"):
        call.result() if kind == "submit" else await call
    assert await thread.call(threading.get_ident) == ident
    assert thread.stats().failed == 1


async def test_post_that_raises_is_logged_and_the_thread_goes_on(
    thread: LoopThread, complaints: list[logging.LogRecord]
) -> None:
    """A posted function has nobody to tell, so its error is logged with its name."""

    def forgotten() -> None:
        raise SystemExit(3)

    thread.post(forgotten)
    assert await thread.call(int, 1) == 1
    record = complaints.pop()
    assert record.getMessage().endswith("forgotten, which nobody waits for, raised")
    assert record.exc_info is not None
    assert record.exc_info[0] is SystemExit


@pytest.mark.parametrize("kind", ["call", "run", "submit"])
async def test_outcome_leaves_no_reference_cycle(thread: LoopThread, kind: str) -> None:
    """An error that its caller has dealt with goes at once, and with it what the call had in hand."""

    class Cursor:
        def fail(self) -> None:
            raise ValueError("bad")

    async def attempt() -> weakref.ref[Cursor]:
        cursor = Cursor()
        gone = weakref.ref(cursor)
        call = make(thread, kind, cursor.fail)
        try:
            await (asyncio.wrap_future(call) if kind == "submit" else call)
        except ValueError as exc:
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next  # the frame of this attempt
        finally:
            del call
        return gone

    gc.disable()
    try:
        gone = await attempt()
        await thread.call(int)
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["call", "run"])
async def test_call_that_is_over_lets_go_of_its_arguments(thread: LoopThread, gate: Gate, kind: str) -> None:
    """A call kept by its caller keeps neither function nor arguments, whether it ran or was dropped."""

    class Payload:
        pass

    async def attempt(cancel: bool) -> tuple[Call[Any], weakref.ref[Payload]]:
        payload = Payload()
        call = make(thread, kind, lambda _: None, payload)
        if cancel:
            call.cancel()
        gone = weakref.ref(payload)
        del payload
        if not cancel:
            gate.open()
            await call
        return call, gone

    blocked = thread.call(gate)
    await gate.begun()
    dropped, dropped_payload = await attempt(cancel=True)
    finished, finished_payload = await attempt(cancel=False)
    await blocked
    await thread.call(int)
    assert (dropped.state, finished.state) == (CallState.DROPPED, CallState.FINISHED)
    assert (dropped_payload(), finished_payload()) == (None, None)


# --- outcomes held during a burst -------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks", [0, 1, 3])
@pytest.mark.parametrize(("size", "blocks_at"), [(2, 1), (4, 1), (4, 3), (10, 1), (10, 9)])
async def test_outcome_is_delivered_while_a_later_call_of_the_burst_blocks(
    thread: LoopThread, gate: Gate, size: int, blocks_at: int, looks: int
) -> None:
    """Quick calls made together with one that blocks behind them have their outcomes while it blocks.

    Also when the caller's loop has looked for held outcomes before they came.
    """
    before, blocker = Gate(), gate
    first = thread.call(before)  # the burst is whole before it starts
    await before.begun()
    burst = [thread.call(blocker, i) if i == blocks_at else thread.call(int, i) for i in range(size)]
    port = burst[0].port
    assert port is not None
    while port._interval < looks * _FIRST_LOOK:
        await turns(1)  # until it has looked so often: the time to the next look doubles each time
    before.open()
    assert await first == 0
    assert await asyncio.gather(*burst[:blocks_at]) == list(range(blocks_at))
    assert not blocker._open.is_set()
    blocker.open()
    assert await asyncio.gather(*burst) == list(range(size))


async def test_outcome_is_delivered_while_another_callers_call_blocks(
    thread: LoopThread, elsewhere: LoopThread, gate: Gate
) -> None:
    """In a burst of two callers, one that blocks does not keep the outcomes of the other back."""
    before = Gate()
    first = thread.call(before)
    await before.begun()
    mine = [thread.call(int, i) for i in range(2)]
    theirs = await elsewhere.call(lambda: [thread.call(int, i) for i in range(5)])
    blocked = thread.call(gate)
    mine_after = thread.call(int, 9)
    before.open()
    await first
    assert await asyncio.gather(*mine) == [0, 1]
    assert await elsewhere.run(lambda: asyncio.wait_for(asyncio.gather(*theirs), None)) == [0, 1, 2, 3, 4]
    assert not mine_after.done()
    gate.open()
    assert await blocked == 0
    assert await mine_after == 9


class Outcome:
    """A call that a test sends itself, at the moment it wants."""

    def __init__(self, name: str, settled: list[str]) -> None:
        self.name, self.settled = name, settled

    def settle(self) -> None:
        self.settled.append(self.name)


async def test_outcome_held_just_after_the_last_look_is_not_forgotten() -> None:
    """An outcome that comes between a look at the outbox and the decision to look no more wakes the caller itself."""
    settled: list[str] = []

    class Slow(Port):
        """A port whose second outcome comes exactly then."""

        late = False

        def _arrive(self) -> None:
            super()._arrive()
            if self.late:
                self.late = False
                self.send(Outcome("second", settled), hold=True)  # type: ignore[arg-type]

    port = Slow(asyncio.get_running_loop())
    port._looking, port._under_way = True, 1
    port.send(Outcome("first", settled), hold=True)  # type: ignore[arg-type]
    assert settled == []
    port.late = True
    port._look()
    assert settled == ["first"]
    await turns(3)
    assert settled == ["first", "second"]


async def test_outcome_that_comes_just_after_the_last_was_taken_wakes_again() -> None:
    """An outcome that comes when the caller's loop has just counted them is not taken for one that was seen."""
    settled: list[str] = []

    class Slow(deque[Any]):
        """An outbox that gets the second outcome right after somebody has looked how many there are."""

        late = False

        def __len__(self) -> int:
            length = super().__len__()
            if self.late:
                self.late = False
                port.send(Outcome("second", settled), hold=False)  # type: ignore[arg-type]
            return length

    port = Port(asyncio.get_running_loop())
    port._outbox = outbox = Slow()
    port.send(Outcome("first", settled), hold=False)  # type: ignore[arg-type]
    outbox.late = True
    await turns(3)
    assert settled == ["first", "second"]


async def test_outcomes_of_a_burst_arrive_in_the_order_of_the_calls(thread: LoopThread) -> None:
    """Done callbacks of a burst run in the order in which its calls ran."""
    arrived: list[int] = []
    calls = [thread.call(int, i) for i in range(50)]
    for i, call in enumerate(calls):
        call.add_done_callback(lambda _, i=i: arrived.append(i))  # type: ignore[misc]
    await asyncio.gather(*calls)
    assert arrived == list(range(50))


# --- the caller's loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_outcomes_for_a_closed_loop_are_abandoned_and_counted(size: int) -> None:
    """Calls whose loop closed before they ran are each abandoned; the thread and other callers go on."""
    gate, log = Gate(), list[int]()

    async def leave() -> list[Call[Any]]:
        thread.submit(gate)
        return [thread.call(log.append, i) for i in range(size)]

    with LoopThread("resource") as thread:
        with asyncio.Runner() as runner:
            calls = runner.run(leave())
        other = thread.submit(int, 4)
        gate.open()
        assert other.result() == 4
        thread.submit(int).result()  # outcomes of a burst may be held until all of it has run, `other` too
        assert log == list(range(size))
        assert [call.state for call in calls] == [CallState.ABANDONED] * size
        assert thread.stats().abandoned == size
        assert asyncio.run(outcome_of_call(thread)) == 5
    assert thread.stats().abandoned == size


async def outcome_of_call(thread: LoopThread) -> int:
    return await thread.call(int, 5)


def test_outcomes_for_a_loop_that_closed_after_its_wake_are_abandoned_too() -> None:
    """A loop that was woken for one outcome and closed before it took it hides neither that one nor the next."""
    before, gate = Gate(), Gate()

    async def leave() -> list[Call[Any]]:
        return [thread.call(before), thread.call(int), thread.call(gate)]

    with LoopThread("resource") as thread:
        loop = asyncio.new_event_loop()
        calls = loop.run_until_complete(leave())
        before.open()
        gate.entered.result()
        loop.close()
        gate.open()
        thread.submit(int).result()
        assert [call.state for call in calls] == [CallState.ABANDONED] * 3
        assert thread.stats().abandoned == 3


def test_outcome_waits_for_a_loop_that_stands_still() -> None:
    """A loop that was stopped, not closed, gets its outcomes when it runs again, also after another loop ran here."""

    async def start() -> list[Call[int]]:
        return [thread.call(int, i) for i in range(6)]

    async def all_of(calls: list[Call[int]]) -> list[int]:
        return await asyncio.gather(*calls)

    with LoopThread("resource") as thread, asyncio.Runner() as one, asyncio.Runner() as two:
        first = one.run(start())
        second = two.run(start())
        thread.submit(int).result()
        assert two.run(all_of(second)) == list(range(6))
        assert one.run(all_of(first)) == list(range(6))
        assert thread.stats().abandoned == 0


def test_uvloop_as_the_callers_loop() -> None:
    """From a uvloop: outcomes, errors, a dropped call, a running one that is waited for, and bursts with a block."""

    async def main(thread: LoopThread) -> None:
        assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        assert await asyncio.gather(*[thread.call(int, i) for i in range(20)]) == list(range(20))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await thread.call(next, iter(()))
        assert await thread.run(asyncio.sleep, 0, "slept") == "slept"
        gate = Gate()
        quick, running, queued, last = thread.call(int), thread.call(gate), thread.call(int), thread.call(int, 3)
        assert await quick == 0
        await gate.begun()
        running.cancel()
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        await turns()
        assert not running.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await last == 3
        assert (queued.state, running.state) == (CallState.DROPPED, CallState.FINISHED)
        waiter = Waiter(thread)
        call = thread.run(waiter)
        await waiter.begun()
        call.cancel()
        await asyncio.wrap_future(waiter.cleaning)
        assert not call.done()
        thread.post(waiter._clean.set)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert waiter.ended

    with LoopThread("resource") as thread, asyncio.Runner(loop_factory=uvloop_factory()) as runner:
        runner.run(main(thread))
        gate = Gate()
        thread.submit(gate)
        abandoned = runner.run(call_once(thread))
        runner.close()
        gate.open()
        thread.submit(int).result()
        assert abandoned.state is CallState.ABANDONED


async def call_once(thread: LoopThread) -> Call[Any]:
    return thread.call(int)


# --- the resource's loop ends -----------------------------------------------------------------------------------------


async def test_stopped_loop_resolves_every_waiter(elsewhere: LoopThread) -> None:
    """When somebody stops the resource's loop, every call, queued or suspended, from any caller, hears why."""
    cleaned: list[bool] = []

    async def suspended() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    def stop() -> None:
        asyncio.get_running_loop().stop()
        stopping()

    stopping = Gate()
    async with LoopThread("resource") as thread:
        running = thread.run(suspended)
        stop_call = thread.call(stop)
        await stopping.begun()
        # The loop ends when `stop` has returned; what is queued now comes too late.
        queued: list[Call[Any]] = [thread.call(int), thread.run(suspended)]
        submitted = thread.submit(int)
        theirs = await elsewhere.call(lambda: thread.call(int))
        stopping.open()
        await stop_call
        message = r"^the thread of 'resource' has ended: RuntimeError\(.*stopped"
        for future in (running, *queued, asyncio.wrap_future(submitted)):
            with pytest.raises(BrokenResourceError, match=message) as caught:
                await future
            assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(BrokenResourceError):
            await elsewhere.run(outcome_of, theirs)
    assert cleaned == [True]
    assert running.state is CallState.INTERRUPTED
    assert [call.state for call in queued] == [CallState.DROPPED] * 2


async def stop_it() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.Event().wait()


async def exit_in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await asyncio.Event().wait()


async def cancel_all_tasks() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


@pytest.mark.parametrize(
    ("end", "cause"),
    [(stop_it, RuntimeError), (exit_in_a_callback, SystemExit), (cancel_all_tasks, asyncio.CancelledError)],
)
async def test_loop_that_is_ended_from_inside_is_broken(
    thread: LoopThread, end: Callable[[], Any], cause: type[BaseException]
) -> None:
    """A stopped loop, a callback that exits, a cancel of all tasks: who waits and who comes later hears of it."""
    waiting = thread.run(asyncio.Event().wait)
    ending = thread.run(end)
    await asyncio.wait([waiting, ending])
    for call in (waiting, ending):
        assert call.state in (CallState.INTERRUPTED, CallState.FINISHED)
        if cause is asyncio.CancelledError:
            assert call.cancelled() or call is ending
        else:
            assert isinstance(call.exception(), BrokenResourceError)
    await thread.aclose()
    for kind in ("call", "run", "submit", "post"):
        with pytest.raises(BrokenResourceError, match=r"^the thread of 'resource' has ended: ") as caught:
            make(thread, kind, int)
        assert isinstance(caught.value.__cause__, cause)


async def test_cancel_after_the_resources_loop_has_closed_is_only_a_cancel(thread: LoopThread) -> None:
    """A coroutine whose loop is gone already, before its caller could hear of it, can be cancelled as usual."""
    loop = await thread.call(asyncio.get_running_loop)
    call = thread.run(asyncio.Event().wait)
    await thread.call(int)
    loop.call_soon_threadsafe(loop.stop)
    thread._thread.join()
    assert not call.done()
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_call_made_while_a_stopped_loop_closes_is_refused() -> None:
    """Between the end of the resource's loop and the end of its thread no call is lost, and none is left un-awaited."""
    closing, may_close = Gate(), threading.Event()

    class SlowToClose(asyncio.SelectorEventLoop):
        def close(self) -> None:
            closing.entered.set_result(None)
            may_close.wait()
            super().close()

    async with LoopThread("resource", loop_factory=SlowToClose) as thread:
        thread.post(lambda: asyncio.get_running_loop().stop())
        await closing.begun()
        try:
            for kind in ("call", "run", "submit", "post"):
                with pytest.raises(BrokenResourceError):
                    make(thread, kind, int)
        finally:
            may_close.set()


# --- random schedules against a model ---------------------------------------------------------------------------------


class Boom(Exception):
    pass


class Operation:
    """One call of the machine, what the model expects of it, and the gates that steer it."""

    def __init__(self, number: int, kind: str, waits: bool, fails: bool, caller: int) -> None:
        self.number, self.kind, self.waits, self.fails, self.caller = number, kind, waits, fails, caller
        self.future: Any = None
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.coroutine_gate = asyncio.Event()
        self.state = CallState.QUEUED
        self.cancelled = False


class Machine(RuleBasedStateMachine):
    """Calls of all kinds from two loops against a model that knows which of them has run.

    The resource stands still whenever a plain call waits at its gate; so the model knows after each step exactly what
    has run, what has ended and whose future is done, and compares.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callers = [asyncio.Runner(), asyncio.Runner()]
        self.thread = LoopThread("machine")
        self.thread.__enter__()
        self.log: list[int] = []
        self.expected: list[int] = []
        self.operations: list[Operation] = []
        self.queue: list[Operation] = []
        self.busy: Operation | None = None
        self.suspended: list[Operation] = []
        self.closer: asyncio.Task[None] | None = None

    # what crosses

    def plain(self, op: Operation) -> int:
        self.log.append(op.number)
        op.entered.set()
        if op.waits:
            op.gate.wait()
        if op.fails:
            raise Boom
        return op.number

    async def coroutine(self, op: Operation) -> int:
        self.log.append(op.number)
        op.entered.set()
        if op.waits:
            await op.coroutine_gate.wait()
        if op.fails:
            raise Boom
        return op.number

    # the model

    def advance(self) -> None:
        while self.queue and self.busy is None:
            op = self.queue.pop(0)
            if op.state is not CallState.QUEUED:
                continue
            self.expected.append(op.number)
            op.state = CallState.RUNNING
            if not op.waits:
                op.state = CallState.FINISHED
            elif op.kind == "run":
                self.suspended.append(op)
            else:
                self.busy = op
        if self.busy is None:
            for op in [op for op in self.suspended if op.cancelled]:
                op.state = CallState.INTERRUPTED
                self.suspended.remove(op)

    def unknown(self, op: Operation) -> bool:
        """A coroutine that was cancelled while the resource was busy: it hears of it between two calls, or later."""
        return op.cancelled and op in self.suspended

    def catch_up(self) -> None:
        """Let the resource and the callers come to where the model is."""
        self.advance()
        for op in self.operations:
            if op.state not in (CallState.QUEUED, CallState.DROPPED):
                op.entered.wait()
        if self.busy is None and self.closer is None:
            self.thread.submit(int).result()
        over = (CallState.FINISHED, CallState.INTERRUPTED, CallState.DROPPED)
        for number, runner in enumerate(self.callers):
            mine = [op.future for op in self.operations if op.caller == number and op.state in over]
            calls = [future for future in mine if isinstance(future, Call)]
            if calls:
                runner.run(asyncio.wait_for(self.all_of(calls), None))
        for op in self.operations:
            if op.kind == "submit" and op.state in over and not op.future.cancelled():
                op.future.exception()

    @staticmethod
    async def all_of(calls: list[Call[Any]]) -> None:
        await asyncio.wait(calls)

    # the steps

    @rule(
        kinds=st.lists(
            st.tuples(
                st.sampled_from(["call", "run", "submit", "post"]), st.sampled_from([False, False, True]), st.booleans()
            ),
            min_size=1,
            max_size=6,
        ),
        caller=st.integers(0, 1),
    )
    def make(self, kinds: list[tuple[str, bool, bool]], caller: int) -> None:
        async def burst() -> None:
            for kind, waits, fails in kinds:
                op = Operation(len(self.operations), kind, waits, fails and kind != "post", caller)
                if self.closer is not None:
                    with pytest.raises(ClosedResourceError):
                        self.cross(op)
                    continue
                self.cross(op)
                self.operations.append(op)
                self.queue.append(op)

        self.callers[caller].run(burst())
        self.catch_up()

    def cross(self, op: Operation) -> None:
        if op.kind == "call":
            op.future = self.thread.call(self.plain, op)
        elif op.kind == "run":
            op.future = self.thread.run(self.coroutine, op)
        elif op.kind == "submit":
            op.future = self.thread.submit(self.plain, op)
        else:
            self.thread.post(lambda: self.plain(op))

    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        under_way = (CallState.QUEUED, CallState.RUNNING)
        live = [op for op in self.operations if op.kind != "post" and op.state in under_way and not self.unknown(op)]
        if not live:
            return
        op = live[pick % len(live)]

        async def cancel() -> bool:
            return bool(op.future.cancel())

        said = self.callers[op.caller].run(cancel())
        if op.state is CallState.QUEUED:
            assert said
            assert op.future.cancelled()
            op.state, op.cancelled = CallState.DROPPED, True
        elif op.kind == "submit":
            assert not said
        else:
            assert said
            op.cancelled = True
        self.catch_up()

    @precondition(lambda self: self.busy is not None)
    @rule()
    def release(self) -> None:
        assert self.busy is not None
        op, self.busy = self.busy, None
        op.gate.set()
        op.state = CallState.FINISHED
        self.catch_up()

    @precondition(lambda self: self.suspended and self.busy is None)
    @rule(pick=st.integers(0, 1000))
    def resume(self, pick: int) -> None:
        op = self.suspended.pop(pick % len(self.suspended))
        loop = self.thread._mailbox._loop
        assert loop is not None
        loop.call_soon_threadsafe(op.coroutine_gate.set)
        op.state = CallState.FINISHED
        self.catch_up()

    @precondition(lambda self: self.closer is None)
    @rule()
    def close(self) -> None:
        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(self.thread.aclose())
            await asyncio.sleep(0)
            return task

        self.closer = self.callers[0].run(begin())
        assert not (self.closer.done() and (self.busy or self.suspended))
        self.catch_up()

    @invariant()
    def what_ran_is_what_should_have(self) -> None:
        assert self.log == self.expected
        for op in self.operations:
            if op.future is None or self.unknown(op):
                continue
            running = op.state in (CallState.QUEUED, CallState.RUNNING)
            assert op.future.done() is not running
            if isinstance(op.future, Call) and not running:
                assert op.future.state is op.state
            if running:
                continue
            if op.cancelled:
                assert op.future.cancelled()
            elif op.fails:
                assert isinstance(op.future.exception(), Boom)
            else:
                assert op.future.result() == op.number

    def teardown(self) -> None:
        while self.busy or self.suspended:
            if self.busy:
                self.release()
            else:
                self.resume(0)
        if self.closer is None:
            self.close()
        assert self.closer is not None
        self.callers[0].run(asyncio.wait_for(self.closer, None))
        self.what_ran_is_what_should_have()
        assert not self.thread._thread.is_alive()
        assert self.thread.stats().dropped == sum(op.state is CallState.DROPPED for op in self.operations)
        assert self.thread.stats().abandoned == 0
        for runner in self.callers:
            runner.close()


@pytest.mark.slow
def test_random_schedules_follow_the_model() -> None:
    """No order of calls, cancels and a close makes a call run out of order, run when dropped, or stay without end."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # a race that was lost once is not found again by shrinking
        ),
    )


@eager_switches()
@pytest.mark.parametrize("seed", range(12))
def test_random_races_keep_the_promises(seed: int) -> None:
    """Three loops and a plain thread call, cancel and wait at random while one closes: order holds, all calls end."""
    chance = random.Random(seed)
    seeds = [chance.random() for _ in range(4)]
    log: list[tuple[int, int]] = []
    made: dict[tuple[int, int], Any] = {}
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    async def step(key: tuple[int, int]) -> tuple[int, int]:
        log.append(key)
        await asyncio.sleep(0)
        return key

    def note(key: tuple[int, int]) -> tuple[int, int]:
        log.append(key)
        return key

    async def in_a_loop(caller: int) -> None:
        chance = random.Random(seeds[caller])
        mine: list[Call[tuple[int, int]]] = []
        start.wait()
        with contextlib.suppress(ClosedResourceError):
            for i in itertools.count():
                key = (caller, i)
                made[key] = thread.run(step, key) if chance.random() < 0.3 else thread.call(note, key)
                mine.append(made[key])
                if chance.random() < 0.2:
                    chance.choice(mine).cancel()
                if chance.random() < 0.1:
                    await asyncio.wait([chance.choice(mine)])
                if caller == 0 and i == 120:
                    await thread.aclose()
        if mine:
            await asyncio.wait(mine)

    def in_no_loop(caller: int) -> None:
        chance = random.Random(seeds[caller])
        mine: list[ThreadFuture[tuple[int, int]]] = []
        start.wait()
        with contextlib.suppress(ClosedResourceError):
            for i in itertools.count():
                made[caller, i] = thread.submit(note, (caller, i))
                mine.append(made[caller, i])
                if chance.random() < 0.2:
                    chance.choice(mine).cancel()
                if chance.random() < 0.1:
                    with contextlib.suppress(ThreadCancelledError):
                        chance.choice(mine).result()

    def guarded(caller: int) -> None:
        try:
            if caller == 3:
                in_no_loop(caller)
            else:
                asyncio.run(in_a_loop(caller))
        except BaseException as exc:
            failures.append(exc)
            raise

    with LoopThread("resource") as thread:
        threads = [threading.Thread(target=guarded, args=(caller,)) for caller in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not failures
    for caller in range(4):
        ran = [i for who, i in log if who == caller]
        assert ran == sorted(set(ran))
    ran_keys = set(log)
    stats = thread.stats()
    for key, future in made.items():
        assert future.done()
        if isinstance(future, Call):
            assert (future.state is CallState.DROPPED) is (key not in ran_keys)
        else:
            assert future.cancelled() is (key not in ran_keys)
        if not future.cancelled():
            assert future.result() == key
    assert stats.submitted == len(made)
    assert stats.dropped == len(made) - len(ran_keys)
    assert (stats.failed - sum(future.cancelled() for future in made.values())) <= 0
    assert (stats.abandoned, stats.queued) == (0, 0)
