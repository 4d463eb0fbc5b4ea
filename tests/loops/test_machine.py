"""Random schedules of calls, cancels, closes, crashes, restarts and forks, each checked against a model.

    steps ──► World ── makes, cancels, releases ──► LoopThread or Resource ── writes ──► trace
                │                                                                          │
                └────── facts: gates open, calls dropped ──► Model ── must be ◄── equals ──┘

A step is a name and numbers, so a schedule can be printed, played again and shrunk. Functions that cross wait at gates
that the schedule opens, and callers' clocks go forward when it says so: nothing sleeps. The model does not follow time:
from the facts it computes what every call must have come to once nothing moves any more. Steps that find calls moving
may have one of two outcomes; the world looks which, and holds the product to it.

By environment variable: OFFLOAD_SCHEDULES, how many schedules (10,000); OFFLOAD_SCHEDULE, the number of one that
failed, to play that alone, a hundred times or as often as the other says, as threads never meet in the same way twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from offload import Call, CallState, LoopThread, Resource, Stats
from offload.errors import (
    BrokenResourceError,
    ClosedResourceError,
    DeadlockError,
    ForkedError,
    OffloadError,
    QueueFullError,
)

SCHEDULES = os.environ.get("OFFLOAD_SCHEDULES")
REPLAY = os.environ.get("OFFLOAD_SCHEDULE")
HANG = float(os.environ.get("OFFLOAD_TEST_HANG", "60"))
FORKS = hasattr(os, "fork")
DESCRIPTORS = Path("/proc/self/fd")

TIMEOUT = 1000.0  # seconds of a caller's own clock
QUEUED, DROPPED, RUNNING, FINISHED = CallState.QUEUED, CallState.DROPPED, CallState.RUNNING, CallState.FINISHED
INTERRUPTED, ABANDONED = CallState.INTERRUPTED, CallState.ABANDONED

Kind = Literal["call", "run", "submit", "post", "span"]
Event = tuple[str, int]
Refusals = list[type[OffloadError]]


class Boom(Exception):
    """Raised by a call: its own error, which breaks nothing."""


class Crash(OSError):
    """Raised by a call: the object is broken."""


class Interrupted(Exception):
    """Raised by a call that was interrupted."""


@dataclass(frozen=True)
class Setup:
    """What a schedule is played on."""

    resource: bool = False
    uvloop: bool = False
    debug: bool = False
    eager: bool = False  # threads take the GIL from each other as often as they can
    bound: int = 3  # of the queue, for calls that ask not to wait
    budget: int = 0  # of restarts
    failing: tuple[int, ...] = ()  # which of the factory's attempts fail
    ending: Literal["aclose", "close", "shutdown"] = "aclose"


@dataclass(eq=False)
class Op:
    """One call or span: what was asked, what happened to it, and what the model says."""

    number: int
    kind: Kind
    behaviour: str = "value"
    waits: bool = False  # at its gate
    sleeps: int = 0  # turns of the loop, for a coroutine
    cleans: bool = False  # a coroutine that, cancelled, waits at its gate before it ends
    who: str = "here"  # the caller: a loop, or a "thread"
    timed: bool = False
    on_cancel: Literal["wait", "abandon", "interrupt"] | None = None
    nowait: bool = False

    # what crosses
    future: Any = None
    gate: threading.Event = field(default_factory=threading.Event)
    async_gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    hit: bool = False  # by an interrupt
    how: str | None = None  # it left: its behaviour, "interrupted", or "left" by a coroutine that was cancelled
    error: BaseException | None = None
    # of a span
    commands: asyncio.Queue[Any] | None = None
    inner: Any = None  # the span's own handle, once it has begun
    ops: list[Op] = field(default_factory=list)

    # facts
    open: bool = False
    dropped: bool = False
    stopped: bool = False  # cancelled or given up after it had begun
    cancelled: bool = False
    expired: bool = False
    let_go: bool = False  # abandoned by its caller
    may_interrupt: bool = False
    late: bool = False  # stood in the queue when the resource was closed, or came later
    orphan: bool = False  # its caller's loop is closed
    ended: bool = False  # a span's owner has left, or will

    # the model
    state: CallState = QUEUED
    refused: bool = False  # the object is broken for good

    def crossed(self) -> bool:
        return isinstance(self.future, Call)


@dataclass
class Life:
    """The model of a Resource's object: when it is made, closed and made again."""

    budget: int
    failing: tuple[int, ...]
    whole: bool = True
    attempt: int = 0
    restarts: int = 0

    def begin(self, op: Op, events: list[Event]) -> bool:
        while not self.whole:
            if self.restarts >= self.budget or op.late:
                return False
            self.restarts += 1
            self.attempt += 1
            self.whole = self.attempt not in self.failing
            events.append(("make" if self.whole else "fail", self.attempt))
        return True

    def end(self, op: Op, events: list[Event]) -> None:
        how = op.how or op.behaviour
        if how == "crash" and self.budget:
            self.whole = False
            events.append(("close", self.attempt))
        elif how in ("value", "nested"):
            self.restarts = 0


class Model:
    """What every call has come to once nothing moves any more, given the facts."""

    def __init__(self, queue: list[Op], life: Life) -> None:
        self.life = life
        self.events: list[Event] = []
        self.tasks: list[Op] = []  # coroutines that have begun and not ended
        self.busy: Op | None = None  # the plain call that runs
        self.stuck = False
        self._walk(queue)

    def _walk(self, queue: list[Op]) -> None:
        for op in queue:
            op.refused = False
            if op.dropped:
                op.state = DROPPED
            elif self.stuck or (op.kind == "span" and self.tasks):
                op.state = QUEUED
                self.stuck = True
            elif op.kind == "span":
                op.state = RUNNING
                self._walk(op.ops)
                if op.ended and not self.stuck and not self.tasks:
                    op.state = FINISHED
                else:
                    self.stuck = True
            elif not self.life.begin(op, self.events):
                op.state, op.refused = FINISHED, True
            else:
                self.events.append(("start", op.number))
                if not op.waits or op.open or (op.kind == "run" and op.stopped and not op.cleans):
                    op.state = FINISHED
                    self.life.end(op, self.events)
                else:
                    op.state = RUNNING
                    if op.kind == "run":
                        self.tasks.append(op)
                    else:
                        self.busy, self.stuck = op, True

    def moves(self, op: Op) -> bool:
        """Whether a coroutine that could end may still stand, as a plain call keeps the loop."""
        return op.kind == "run" and (op.waits or op.sleeps > 0) and self.busy is not None


# --- callers ----------------------------------------------------------------------------------------------------------


class ClockLoop(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class Caller:
    """A loop that makes calls; it stands still between the steps of a schedule."""

    def __init__(self, complaints: list[str], debug: bool) -> None:
        self.loop = ClockLoop()
        self.loop.set_debug(debug)
        self.loop.slow_callback_duration = float("inf")
        self.loop.set_exception_handler(partial(complain, complaints))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def do(self, function: Callable[[], Any]) -> Any:
        async def doing() -> Any:
            return function()

        return self.run(doing())

    def put_forward(self) -> None:
        self.loop.ahead += 2 * TIMEOUT
        self.run(turns(3))

    def wait(self, futures: list[asyncio.Future[Any]]) -> None:
        if futures := [future for future in futures if not future.done()]:
            self.run(all_of(futures))

    def close(self) -> None:
        self.loop.close()


class Elsewhere(Caller):
    """A loop that makes calls from a thread of its own, where it always runs."""

    def __init__(self, complaints: list[str], debug: bool) -> None:
        super().__init__(complaints, debug)
        self._thread = threading.Thread(target=self.loop.run_forever, name="elsewhere", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        super().close()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def all_of(futures: list[asyncio.Future[Any]]) -> None:
    await asyncio.wait(futures)


def complain(complaints: list[str], loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    lines = traceback.format_exception(error) if error is not None else []
    complaints.append("\n".join([context["message"], *lines]))


def state_of(future: Any) -> CallState:
    state: CallState = future.state
    return state


# --- the world --------------------------------------------------------------------------------------------------------


class Thing:
    """What a Resource makes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False


class World:
    """One resource with its callers, and the steps of a schedule."""

    def __init__(self, setup: Setup, complaints: list[str]) -> None:
        self.setup = setup
        self.complaints = complaints
        self.said: list[Any] = [setup]  # the schedule so far
        self.trace: list[Event] = []  # written on the resource's thread only
        self.delivered: list[int] = []
        self.queue: list[Op] = []  # everybody's, in the order made
        self.ops: list[Op] = []  # those and the ones made in spans
        self.numbers = 0
        self.extra = 0  # calls that are no Op
        self.unsure_drops = self.unsure_ends = 0
        self.closing = self.broken = False
        self.closers: list[asyncio.Task[None]] = []
        self.threads: list[threading.Thread] = []  # that close
        self.inside: Op | None = None  # the plain call that runs
        self.under_way = 0  # coroutines that have begun and not ended
        self.ident: int | None = None
        self.attempts = 0
        self.things: list[Thing] = []
        self.loop: asyncio.AbstractEventLoop | None = None  # the resource's
        self.finished = False
        self.here = Caller(complaints, setup.debug)
        self.elsewhere: Elsewhere | None = None
        self.interval = sys.getswitchinterval()
        if setup.eager:
            sys.setswitchinterval(1e-6)
        self.base: LoopThread | Resource[Thing]
        self.target: Any  # a LoopThread or a Handle: with the same methods
        if setup.resource:
            self.base = Resource(
                self.factory,
                close=self.close_thing,
                interrupt=lambda thing: self.interrupt(),
                restart=setup.budget,
                broken=(Crash,),
                backoff=0,
                max_calls=setup.bound,
                loop_factory=self.new_loop,
                debug=setup.debug,
            )
        else:
            self.base = LoopThread(
                loop_factory=self.new_loop, on_close=self.on_close, max_calls=setup.bound, debug=setup.debug
            )
            self.base.interrupter = self.interrupt
        self.deliver: Callable[[int], None] = lambda number: None
        self.begin()

    def begin(self) -> None:
        try:
            self.target = self.here.run(self.base.start())
        except Boom:
            assert 0 in self.setup.failing, "the factory did not fail"
            self.closing = self.finished = True
            assert self.trace == [("fail", 0)]
            assert self.base.closed
            return
        assert 0 not in self.setup.failing, "the factory's error was lost"
        if isinstance(self.base, LoopThread):
            make = self.base.callback
            self.deliver = self.here.do(lambda: make(self.delivered.append))

    def new_loop(self) -> asyncio.AbstractEventLoop:
        if self.setup.uvloop:
            loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
        else:
            loop = asyncio.SelectorEventLoop()
        loop.set_exception_handler(partial(complain, self.complaints))
        self.loop = loop
        return loop

    # what runs on the resource's thread

    def factory(self) -> Thing:
        number = self.attempts
        self.attempts += 1
        self.check(all(thing.closed for thing in self.things), f"thing {number} is made before the last was closed")
        if number in self.setup.failing:
            self.trace.append(("fail", number))
            raise Boom("the factory fails")
        self.trace.append(("make", number))
        self.things.append(Thing(number))
        return self.things[-1]

    def close_thing(self, thing: Thing) -> None:
        self.check(not thing.closed, f"thing {thing.number} is closed twice")
        self.check(self.inside is None and (self.broken or not self.under_way), "closed under a call")
        thing.closed = True
        self.trace.append(("close", thing.number))

    def on_close(self) -> None:
        self.check(self.inside is None and (self.broken or not self.under_way), "closed under a call")
        self.trace.append(("close", 0))

    def enter(self, op: Op, thing: Thing | None) -> None:
        if self.ident is None:
            self.ident = threading.get_ident()
        self.check(self.ident == threading.get_ident(), f"{op.number} runs on another thread")
        self.check(thing is None or not thing.closed, f"{op.number} got a closed thing")
        self.check(not op.entered.is_set(), f"{op.number} runs twice")
        self.check(self.inside is None, f"{op.number} runs inside another call")
        self.trace.append(("start", op.number))
        self.deliver(op.number)
        op.entered.set()

    def leave(self, op: Op) -> int:
        if op.how is None:
            op.how = op.behaviour
        errors: dict[str, BaseException] = {
            "error": Boom(op.number),
            "exit": SystemExit(op.number),
            "stop_iteration": StopIteration(op.number),
            "cancels": asyncio.CancelledError(),
            "crash": Crash(op.number),
            "interrupted": Interrupted(op.number),
        }
        op.error = errors.get(op.how)
        if op.error is not None:
            raise op.error
        if op.how == "nested":
            with pytest.raises(DeadlockError):
                self.base.close()
            nested: ThreadFuture[int] = self.target.submit(lambda *thing: op.number)
            self.extra += 1
            return nested.result(0)
        if op.how == "stop":
            asyncio.get_running_loop().stop()
        return op.number

    def plain(self, op: Op, thing: Thing | None = None) -> int:
        self.enter(op, thing)
        self.inside = op
        try:
            if op.waits:
                op.gate.wait()
            if op.hit:
                op.how = "interrupted"
            return self.leave(op)
        finally:
            self.inside = None
            op.left.set()

    async def coroutine(self, op: Op, thing: Thing | None = None) -> int:
        self.enter(op, thing)
        self.under_way += 1
        try:
            try:
                await turns(op.sleeps)
                if op.waits:
                    await op.async_gate.wait()
            except asyncio.CancelledError:
                op.how = "left"
                if op.cleans and op.waits:
                    await op.async_gate.wait()
                raise
            return self.leave(op)
        finally:
            self.under_way -= 1
            op.left.set()

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.complaints.append(otherwise)

    def interrupt(self) -> None:
        """By the product, from a caller's loop, while a plain call runs."""
        op = self.inside
        if op is not None:
            self.check(op.may_interrupt, f"{op.number} was interrupted, and nobody asked")
            op.hit = True
            op.gate.set()

    # --- steps --------------------------------------------------------------------------------------------------------

    def caller(self, who: str) -> Caller:
        if who == "elsewhere":
            if self.elsewhere is None:
                self.elsewhere = Elsewhere(self.complaints, self.setup.debug)
            return self.elsewhere
        return self.here

    def make(self, kind: Kind, behaviour: str, count: int = 1, **asked: Any) -> None:
        """Calls, one after another, without a turn of the loop in between."""
        who = asked.get("who", "here")
        ops = [self.new_op(kind, behaviour, **asked) for _ in range(count)]

        def make() -> None:
            for op in ops:
                self.put(op, self.target, self.queue)

        if who == "thread":
            thread = threading.Thread(target=self.guarded, args=(make,), name="caller")
            thread.start()
            thread.join()
        elif kind in ("submit", "post"):
            make()
        else:
            self.caller(who).do(make)

    def guarded(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as exc:
            self.complaints.append("".join(traceback.format_exception(exc)))

    def new_op(self, kind: Kind, behaviour: str = "value", *, inside: bool = False, **asked: Any) -> Op:
        self.numbers += 1
        if kind == "post" and (self.setup.resource or inside):
            kind = "submit"  # handles have no post, and a post in a span is not the span's
        op = Op(self.numbers, kind, behaviour, **asked)
        op.late = self.closing
        if behaviour == "crash" and not self.setup.resource:
            op.behaviour = "error"
        if kind == "post":
            op.behaviour, op.nowait = "value", False  # it must not raise
        if kind in ("submit", "post"):
            op.timed, op.on_cancel = False, None
        op.timed &= not op.cleans  # a second cancel would hit its cleanup
        if kind == "run" and self.setup.resource:
            op.waits, op.sleeps = False, 0  # two with the same object would need a model of its own
        return op

    def put(self, op: Op, target: Any, queue: list[Op]) -> None:
        """Make the call; it is taken or refused as the model says."""
        must, may = self.refusals(op, queue)
        refusal: OffloadError | None = None
        try:
            op.future = self.cross(op, target)
        except OffloadError as exc:
            refusal = exc
        self.was_taken(op, queue, refusal, must, may)

    def was_taken(self, op: Op, queue: list[Op], refusal: BaseException | None, must: Refusals, may: Refusals) -> None:
        if refusal is None:
            self.ops.append(op)
            queue.append(op)
            assert not must, f"{op.number} was taken, expected {must}"
        else:
            assert type(refusal) in (*must, *may), f"{op.number} was refused: {refusal!r}"

    def refusals(self, op: Op, queue: list[Op]) -> tuple[Refusals, Refusals]:
        """How a call must be refused, and how it may be."""
        self.model()
        least = sum(other.state is QUEUED for other in queue)
        most = least + sum(other.state is not DROPPED and not other.entered.is_set() for other in queue)
        most += sum(other.dropped and other.kind == "submit" for other in queue)  # they stand until their turn
        if self.broken:
            return [], [BrokenResourceError, ClosedResourceError, QueueFullError]
        if self.closing and queue is self.queue:
            return [ClosedResourceError], []
        if op.nowait and least >= self.setup.bound:
            return [QueueFullError], []
        return [], [QueueFullError] if op.nowait and most >= self.setup.bound else []

    def cross(self, op: Op, target: Any) -> Any:
        if op.timed or op.on_cancel or op.nowait:
            timeout = TIMEOUT if op.timed else None
            target = target.options(timeout=timeout, on_cancel=op.on_cancel, nowait=op.nowait or None)
        if op.kind == "call":
            return target.call(partial(self.plain, op))
        if op.kind == "run":
            return target.run(partial(self.coroutine, op))
        if op.kind == "submit":
            return target.submit(partial(self.plain, op))
        return target.post(partial(self.plain, op))

    def pick(self, index: int, which: Callable[[Op], bool]) -> Op | None:
        ops = [op for op in self.ops if which(op)]
        return ops[index % len(ops)] if ops else None

    def release(self, index: int) -> None:
        """Open a gate."""
        op = self.pick(index, lambda op: op.waits and not op.open)
        if op is not None:
            self.open_gate(op)

    def open_gate(self, op: Op) -> None:
        op.open = True
        op.gate.set()
        if op.kind == "run" and self.loop is not None:
            with contextlib.suppress(RuntimeError):  # closed
                self.loop.call_soon_threadsafe(op.async_gate.set)

    def cancel(self, index: int) -> None:
        """Cancel a call or the task that holds a span, in whatever state it is."""
        op = self.pick(index, lambda op: op.future is not None and not (op.cleans and op.stopped))
        if op is None:
            return
        self.model()
        was, entered, done = op.state, op.entered.is_set(), op.future.done()
        if op.kind == "span":
            self.cancel_span(op)
        elif op.kind == "submit":
            said = op.future.cancel()
            if said and not op.dropped:
                op.dropped = True
                assert not entered or self.broken, f"{op.number} was dropped though it ran"
            elif not said:
                assert was is not QUEUED or done or self.broken, f"{op.number} could not be dropped"
        else:
            op.may_interrupt |= self.interrupts(op)
            said = self.caller(op.who).do(op.future.cancel)
            if done:
                assert not said
            elif said:
                op.cancelled = True
                self.was_stopped(op, was, entered)
            else:
                assert was is FINISHED or self.broken, f"{op.number} was over too early"

    def interrupts(self, op: Op) -> bool:
        return op.on_cancel == "interrupt" or (self.setup.resource and op.on_cancel is None)

    def was_stopped(self, op: Op, was: CallState, entered: bool) -> None:
        """A cancel or a timeout was taken: see whether the call was dropped, and hold it to that."""
        state = state_of(op.future)
        if state is DROPPED:
            op.dropped = True
            assert self.broken or (not entered and op.future.done()), f"{op.number} was dropped, and it ran"
            return
        assert was is not QUEUED or self.broken, f"{op.number} is {state}, expected to be dropped"
        assert state is not ABANDONED or op.on_cancel == "abandon", f"{op.number} was not waited for"
        op.stopped = True
        op.let_go |= state is ABANDONED
        self.unsure_ends += op.on_cancel == "abandon" and state is FINISHED  # abandoned, or over a moment before
        if op.kind == "call" and self.interrupts(op):
            op.open = True  # soon

    def cancel_span(self, op: Op) -> None:
        if op.future.done() or op.ended:
            return
        was = op.state
        op.future.cancel()
        self.here.run(turns(3))
        op.ended = True
        if op.inner is None and not self.broken:
            if was is QUEUED:
                op.dropped = True
            else:
                self.unsure_drops += 1

    def forward(self, who: str) -> None:
        """Put a caller's clock forward, past the timeouts of all its calls."""
        if who == "elsewhere" and self.elsewhere is None:
            return
        self.model()
        timed = [op for op in self.ops if op.timed and op.who == who and op.crossed() and not op.future.done()]
        before = [(op, op.state, op.entered.is_set()) for op in timed]
        unsure = any(op.state is not QUEUED for op in timed)
        for op in timed:
            op.may_interrupt |= self.interrupts(op)
        self.caller(who).put_forward()
        for op, was, entered in before:
            future = op.future
            if op.cancelled:
                continue
            if future.done() and (future.cancelled() or not isinstance(future.exception(), TimeoutError)):
                assert was is FINISHED or self.broken, f"{op.number} was over too early"
                continue
            op.expired = True
            if unsure:
                was = RUNNING  # one that was given up a moment before may have made way for it
            self.was_stopped(op, was, entered)

    def settle(self) -> None:
        """Wait until nothing moves any more, and compare."""
        if self.broken:
            return
        model = self.model()
        for op in list(self.ops):
            if op.may_interrupt and op.state is FINISHED and not op.refused and not model.moves(op):
                self.wait_until_over([op])  # it may have been quicker than its interrupt
                model = self.model()
        self.wait_until_over([op for op in self.ops if op.state in (DROPPED, FINISHED) and not model.moves(op)])
        self.wait_until_over([op for op in self.ops if op.let_go])
        for op in self.ops:
            if op.kind == "span":
                while op.state is RUNNING and op.inner is None:
                    self.here.run(turns(1))
            elif op.state in (RUNNING, FINISHED) and not op.refused:
                op.entered.wait()
                if op.state is FINISHED and not model.moves(op):
                    op.left.wait()
        self.wait_until_closed()
        self.compare(self.model())

    def wait_until_closed(self) -> None:
        """Nobody is told when a call that was let go is over: what it broke is closed after it has left."""
        events = self.model().events
        for op in self.ops:
            if op.let_go and op.how == "crash" and self.setup.budget:
                close = events[events.index(("start", op.number)) + 1]
                while close not in self.trace:
                    self.here.run(turns(1))

    def wait_until_over(self, ops: list[Op]) -> None:
        for caller in (self.here, self.elsewhere):
            if caller is not None:
                who = "here" if caller is self.here else "elsewhere"
                caller.wait([op.future for op in ops if op.who == who and isinstance(op.future, asyncio.Future)])
        wait_for_futures([op.future for op in ops if op.kind == "submit" and not op.future.cancelled()])

    def compare(self, model: Model) -> None:
        begun = [event for event in self.trace if event != ("make", 0)]
        if self.closing and not (model.stuck or model.tasks) and begun[len(model.events) :]:
            model.events += self.last_close(model.life)
        assert begun == model.events
        for op in self.ops:
            if op.future is None or op.kind == "span" or model.moves(op):
                continue
            over = op.state in (DROPPED, FINISHED) or op.let_go
            assert op.future.done() is over, f"{op.number} is {op.future}, expected {op.state}"
            if op.crossed():
                allowed = {FINISHED: {FINISHED, INTERRUPTED}}.get(op.state, {op.state})
                assert state_of(op.future) in ({ABANDONED, FINISHED} if op.let_go else allowed)
        stats = self.target.stats()
        assert stats.submitted == self.submitted()
        # Dropped ones stand in the queue until their turn, and that of a refused orphan cannot be waited for.
        if not any(op.dropped or (op.orphan and op.refused) for op in self.ops):
            assert stats.queued == sum(op.state is QUEUED for op in self.ops)
        if model.busy is not None:
            assert stats.running is not None

    def last_close(self, life: Life) -> list[Event]:
        return [("close", life.attempt)] if life.whole else []

    def submitted(self) -> int:
        return len(self.ops) + self.extra + self.setup.resource

    def model(self) -> Model:
        return Model(self.queue, Life(self.setup.budget, self.setup.failing))

    # spans

    def span(self, nowait: bool) -> None:
        """A task asks for an exclusive span, and holds it until it is told otherwise."""
        if self.broken:
            return
        op = self.new_op("span", nowait=nowait)
        op.commands = asyncio.Queue()
        must, may = self.refusals(op, self.queue)
        op.future = self.here.do(lambda: asyncio.create_task(self.own(op)))
        self.here.run(turns(1))
        self.was_taken(op, self.queue, op.future.exception() if op.future.done() else None, must, may)

    async def own(self, op: Op) -> None:
        assert op.commands is not None
        handle = self.target.options(nowait=True) if op.nowait else self.target
        async with handle.exclusive() as op.inner:
            while (command := await op.commands.get()) is not None:
                function, answer = command
                try:
                    answer.set_result(function())
                except BaseException as exc:
                    answer.set_exception(exc)

    def held(self, index: int) -> Op | None:
        return self.pick(index, lambda op: op.inner is not None and not op.ended)

    def by_owner(self, span: Op, function: Callable[[], Any]) -> Any:
        async def ask() -> Any:
            assert span.commands is not None
            answer = asyncio.get_running_loop().create_future()
            span.commands.put_nowait((function, answer))
            return await answer

        return self.here.run(ask())

    def make_inside(self, index: int, kind: Kind, behaviour: str, **asked: Any) -> None:
        """A call in a span, by the task that holds it."""
        span = self.held(index)
        if span is not None:
            op = self.new_op(kind, behaviour, inside=True, **asked)
            op.nowait |= span.nowait  # its options hold inside
            self.by_owner(span, lambda: self.put(op, span.inner, span.ops))

    def deadlock(self, index: int) -> None:
        """The task that holds a span calls by the resource's own handle, or closes it."""
        span = self.held(index)
        if span is None or self.broken:
            return

        def outside() -> None:
            for make in (self.target.call, self.target.run, self.target.submit):
                with pytest.raises(ClosedResourceError if self.closing else DeadlockError):
                    make(print)
            with pytest.raises(DeadlockError):
                self.base.close()

        self.by_owner(span, outside)

    def late(self, index: int) -> None:
        """A call in a span that has ended."""
        span = self.pick(index, lambda op: op.inner is not None and op.ended)
        if span is not None:
            self.call_late(span)

    def call_late(self, span: Op) -> None:
        with pytest.raises((BrokenResourceError, ClosedResourceError) if self.broken else ClosedResourceError):
            span.inner.submit(print)

    def end_span(self, index: int) -> None:
        span = self.held(index)
        if span is not None:
            self.tell_to_end(span)

    def tell_to_end(self, span: Op) -> None:
        assert span.commands is not None
        self.here.do(partial(span.commands.put_nowait, None))
        self.here.run(turns(3))
        span.ended = True
        if span.inner is not None:
            self.call_late(span)

    # ends

    def aclose(self) -> None:
        if self.setup.resource:
            self.settle()  # a call that begins after the close finds its object as it is, one before it whole
        self.model()
        self.closers.append(self.here.do(lambda: asyncio.create_task(self.base.aclose())))
        self.here.run(turns(1))
        self.close_model()

    def close(self) -> None:
        """From a plain thread, which waits for the end."""
        if isinstance(self.base, LoopThread):
            self.model()
            closer = threading.Thread(target=self.guarded, args=(self.base.close,), name="closer")
            closer.start()
            self.base.closing.wait()
            self.threads.append(closer)
            self.close_model()

    def shutdown(self, cancel_futures: bool) -> None:
        """As an Executor; it does not wait."""
        if not isinstance(self.base, LoopThread):
            return
        self.model()
        before = [(op, op.state, op.entered.is_set()) for op in self.queue if op.kind == "submit" and not op.dropped]
        self.base.shutdown(wait=False, cancel_futures=cancel_futures)
        for op, was, entered in before:
            if op.future.cancelled():
                op.dropped = True
                assert (cancel_futures and not entered) or self.broken, f"{op.number} was dropped"
            else:
                assert not cancel_futures or was is not QUEUED or self.broken, f"{op.number} was not dropped"
        self.close_model()

    def close_model(self) -> None:
        self.closing = True
        for op in self.ops:
            op.late |= op.state is QUEUED

    def cancel_close(self, index: int) -> None:
        """Who waits for the end is cancelled, and waits on."""
        if self.closers:
            closer = self.closers[index % len(self.closers)]
            closer.cancel()
            self.here.run(turns(2))
            model = self.model()
            assert not closer.done() or self.broken or not (model.stuck or model.tasks), "the end was not waited for"

    def orphan(self, kind: Kind) -> None:
        """A call whose loop is closed while it is under way: its outcome is nobody's."""
        if self.closing or self.broken:
            return
        op = self.new_op("call" if self.setup.resource else kind, waits=True, who="nowhere")
        op.orphan = True
        self.settle()
        self.queue.append(op)
        self.model()
        if op.refused:  # at once, so its loop would hear of it
            self.queue.pop()
            return
        orphan = Caller(self.complaints, self.setup.debug)
        orphan.do(partial(self.cross, op, self.target))
        orphan.close()
        self.ops.append(op)

    def stop(self, how: str) -> None:
        """End the resource's loop in a way that is not foreseen."""
        if self.broken or self.closing or self.loop is None:
            return
        self.broken = True
        if how == "call" and isinstance(self.base, LoopThread):
            self.make("submit", "stop")
        elif how == "exit":
            self.loop.call_soon_threadsafe(end_it)
        else:
            self.loop.call_soon_threadsafe(self.loop.stop)

    def fork(self) -> None:
        """A child finds all calls ended with ForkedError and takes no new ones; here all goes on."""
        if self.broken or not FORKS:
            return
        self.settle()
        # The child shares the descriptors that wake this loop, and must not find a wake there that is meant for us.
        self.here.run(turns(3))
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(int(HANG))
                self.in_child()
                os._exit(0)
            except BaseException:
                os.write(write, traceback.format_exc().encode()[-60_000:])
            finally:
                os._exit(1)
        os.close(write)
        with open(read) as pipe:
            report = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, f"the child ended with {status}: {report}"

    def in_child(self) -> None:
        pending = [
            op for op in self.ops if op.future is not None and op.who == "here" and op.state in (QUEUED, RUNNING)
        ]
        for op in pending:
            if op.kind == "span" and op.state is RUNNING:
                continue  # its owner has what it waited for
            self.wait_until_over([op])
            if op.cancelled or op.let_go:
                assert op.future.cancelled()
            elif op.expired:
                assert isinstance(op.future.exception(), TimeoutError)
            else:
                assert type(op.future.exception()) is ForkedError, f"{op.number} has {op.future}"
        # One that had ended is closed here too.
        refusal = (ForkedError, ClosedResourceError) if self.closing else ForkedError
        with pytest.raises(refusal):
            self.target.submit(print)
        for make in (self.target.call, self.target.run):
            with pytest.raises(refusal):
                self.here.do(partial(make, print))
        self.here.run(self.base.aclose())

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let all calls end, close, and compare what has come of everything."""
        if not self.finished:
            self.finished = True
            for op in self.ops:
                if op.waits and not op.open:
                    self.open_gate(op)
                if op.kind == "span" and not op.ended:
                    self.tell_to_end(op)
            self.settle()
            if not self.broken:
                self.settle_spans()
            self.end()
            self.verify()
            self.count()
        self.here.put_forward()  # timers refer to calls
        if self.elsewhere is not None:
            self.elsewhere.put_forward()
        assert self.delivered == [n for what, n in self.trace if what == "start" and isinstance(self.base, LoopThread)]
        assert not asyncio.all_tasks(self.here.loop)
        self.close_callers()

    def settle_spans(self) -> None:
        self.here.wait([op.future for op in self.ops if op.kind == "span"])

    def end(self) -> None:
        if self.broken:
            self.settle_spans()
        if self.setup.ending == "close":
            self.base.close()
        elif self.setup.ending == "shutdown" and isinstance(self.base, LoopThread):
            self.base.shutdown()
        self.here.run(self.base.aclose())  # again: it waits for the same end
        self.here.wait([*self.closers])
        for thread in self.threads:
            thread.join()
        for closer in self.closers:
            assert closer.cancelled() or closer.exception() is None
        assert self.base.closed
        self.wait_until_over(self.ops)
        wait_for_futures([op.future for op in self.ops if op.kind == "submit"])  # the cancelled ones are told too

    def verify(self) -> None:
        started = [number for what, number in self.trace if what == "start"]
        order = [op.number for op in self.queue for op in (op, *op.ops)]
        assert started == [number for number in order if number in started]
        lost = [op.number for op in self.ops if op.kind != "span" and op.number not in started and not op.dropped]
        if self.broken and lost:
            assert not [number for number in started if order.index(number) > min(map(order.index, lost))]
        for op in self.ops:
            if op.kind == "span":
                self.verify_span(op)
                continue
            ran = op.number in started
            assert ran == op.entered.is_set()
            assert not (ran and op.dropped), f"{op.number} was dropped, and it ran"
            assert ran or op.dropped or op.refused or self.broken, f"{op.number} never ran"
            if op.future is not None:
                assert op.future.done(), f"{op.number} has no end"
                self.verify_outcome(op, ran)

    def verify_span(self, op: Op) -> None:
        future = op.future
        error = None if future.cancelled() else future.exception()
        assert error is None or (self.broken and isinstance(error, BrokenResourceError)), error

    def verify_outcome(self, op: Op, ran: bool) -> None:
        future = op.future
        if op.cancelled or (op.kind == "submit" and op.dropped):
            assert future.cancelled(), f"{op.number} has {future}, expected to be cancelled"
            return
        natural = ran and not (op.kind == "run" and op.how == "left")
        if future.cancelled():
            assert (op.how, op.crossed()) == ("cancels", True), f"{op.number} was cancelled by nobody"
            return
        error = future.exception()
        if op.expired:
            assert isinstance(error, TimeoutError)
        elif not natural:
            assert isinstance(error, BrokenResourceError), f"{op.number} has {future}"
            assert op.refused or self.broken
        elif op.kind == "run" and self.broken and isinstance(error, BrokenResourceError):
            pass  # the loop ended when it had ended, and before its task had
        elif op.how == "stop_iteration":
            assert isinstance(error, RuntimeError)
            assert isinstance(error.__cause__, StopIteration)
        elif op.error is not None:
            assert error is op.error
        else:
            assert error is None
            assert future.result() == op.number
        if op.error is not None and error is op.error:
            functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(op.error.__traceback__)]
            assert "leave" in functions

    def count(self) -> None:
        """The counters add up: what was submitted has ended, in one way."""
        stats: Stats = self.target.stats()
        calls = [op for op in self.ops if op.kind != "span"]
        assert stats.submitted == self.submitted()
        assert (stats.queued, stats.running) == (0, None)
        dropped = sum(op.dropped for op in self.ops)
        failed = sum(op.error is not None or op.how == "left" for op in calls)  # they raised
        never = sum(not op.entered.is_set() and not op.dropped for op in calls)  # refused, or lost with the loop
        abandoned = sum(op.let_go or op.orphan for op in self.ops)
        if not self.broken:
            assert dropped <= stats.dropped <= dropped + self.unsure_drops
            assert stats.failed == failed + never
            assert 0 <= stats.abandoned - abandoned <= self.unsure_ends
            model = self.model()
            assert [event for event in self.trace if event != ("make", 0)] == model.events + self.last_close(model.life)
        else:
            # A span may have been lost too, a coroutine goes on to its end when its call has failed, and one that was
            # abandoned is not counted again.
            unsure = sum(op.kind == "span" or (op.kind == "run" and op.error is None) for op in self.ops)
            assert -abandoned <= stats.dropped + stats.failed - dropped - failed - never <= unsure
            assert all(thing.closed for thing in self.things), "the object was not closed"
            assert isinstance(self.base, Resource) or self.trace.count(("close", 0)) == 1

    def close_callers(self) -> None:
        sys.setswitchinterval(self.interval)
        self.here.close()
        if self.elsewhere is not None:
            self.elsewhere.close()
            self.elsewhere = None

    def give_up(self) -> None:
        """After a failure: leave as little behind as can be."""
        self.finished = True
        for op in self.ops:
            self.open_gate(op)
        with contextlib.suppress(BaseException):
            for task in asyncio.all_tasks(self.here.loop):
                task.cancel()
            self.here.run(turns(5))
            self.base.close(1.0)
        with contextlib.suppress(BaseException):
            self.close_callers()


def end_it() -> None:
    raise SystemExit("the loop is ended by force")


# --- schedules --------------------------------------------------------------------------------------------------------

Step = tuple[Any, ...]
BEHAVIOURS = ("value", "value", "value", "value", "error", "crash", "nested", "exit", "stop_iteration", "cancels")
KINDS: tuple[Kind, ...] = ("call", "call", "run", "submit", "post")


def random_setup(chance: random.Random) -> Setup:
    resource = chance.random() < 0.35
    budget = chance.choice((0, 1, 1, 2, 5)) if resource else 0
    failing = tuple(sorted(chance.sample(range(1, 6), chance.choice((0, 0, 1, 2)))))
    return Setup(
        resource=resource,
        uvloop=HAS_UVLOOP and chance.random() < 0.1,
        debug=chance.random() < 0.1,
        eager=chance.random() < 0.3,
        bound=chance.choice((1, 2, 3, 10)),
        budget=budget,
        failing=(0,) if resource and chance.random() < 0.03 else failing if resource else (),
        ending=chance.choice(("aclose", "close", "shutdown")),
    )


def random_call(chance: random.Random) -> dict[str, Any]:
    """What is asked of a call, besides its kind and behaviour."""
    asked: dict[str, Any] = {}
    if chance.random() < 0.4:
        asked["waits"] = True
    if chance.random() < 0.15:
        asked["sleeps"] = chance.randrange(1, 4)
    if chance.random() < 0.2:
        asked["cleans"] = True
    if chance.random() < 0.2:
        asked["timed"] = True
    if chance.random() < 0.3:
        asked["on_cancel"] = chance.choice(("wait", "abandon", "interrupt"))
    if chance.random() < 0.15:
        asked["nowait"] = True
    return asked


def random_step(chance: random.Random) -> Step:
    """One step: its name, and what to call it with."""
    index = chance.randrange(1000)
    name = chance.choices(NAMES, WEIGHTS)[0]
    if name in ("make", "make_inside"):
        kind = chance.choice(KINDS)
        behaviour = chance.choice(BEHAVIOURS)
        asked = random_call(chance)
        if name == "make_inside":
            return name, index, kind, behaviour, asked
        who = chance.random()
        if kind in ("submit", "post"):
            asked["who"] = "thread" if who < 0.3 else "here"
        elif who < 0.15:
            asked["who"] = "elsewhere"
        return name, kind, behaviour, chance.choice((1, 1, 1, 2, 5)), asked
    if name == "orphan":
        return name, chance.choice(("call", "run"))
    if name == "stop":
        return name, chance.choice(("call", "exit", "stop"))
    if name == "forward":
        return name, chance.choice(("here", "here", "elsewhere"))
    if name in ("span", "shutdown"):
        return name, index % 2 == 0
    if name in ("settle", "aclose", "close"):
        return (name,)
    return name, index


WEIGHTED = {
    "make": 30,
    "release": 14,
    "cancel": 16,
    "settle": 10,
    "forward": 4,
    "span": 4,
    "make_inside": 8,
    "end_span": 4,
    "deadlock": 1,
    "late": 1,
    "orphan": 1,
    "aclose": 1.5,
    "close": 0.7,
    "shutdown": 0.7,
    "cancel_close": 1,
    "stop": 0.7,
}
NAMES, WEIGHTS = list(WEIGHTED), list(WEIGHTED.values())
HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None


class Play:
    """Plays schedules, and knows what they leave behind."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.steps = 0  # so far: somebody watches
        self.played = 0
        self.world: World | None = None
        self.before = self.left()

    @staticmethod
    def left() -> tuple[int, int]:
        """Threads and descriptors."""
        return threading.active_count(), len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0

    def begin(self, setup: Setup) -> World:
        self.before = self.left()
        self.world = World(setup, self.complaints)
        return self.world

    def step(self, step: Step) -> None:
        assert self.world is not None
        name, *args = step
        asked = args.pop() if args and isinstance(args[-1], dict) else {}
        self.steps += 1
        self.world.said.append(step)
        if not self.world.finished:
            getattr(self.world, name)(*args, **asked)
        self.heard()

    def heard(self) -> None:
        assert not self.complaints, "\n".join(self.complaints)

    def finish(self) -> None:
        assert self.world is not None
        self.world.finish()
        self.world = None
        self.played += 1
        for generation in (0, 1, 2):  # a port and its bell refer to each other
            gc.collect(generation)
            if self.left() == self.before and self.played % 100:
                break
        self.heard()
        assert self.left() == self.before, f"{self.left()} threads and descriptors, {self.before} before"

    def give_up(self) -> None:
        world, self.world = self.world, None
        if world is not None:
            world.give_up()
            del world
            gc.collect()
        self.complaints.clear()

    def schedule(self, seed: int) -> None:
        """One random schedule."""
        chance = random.Random(seed)
        setup = random_setup(chance)
        steps = [random_step(chance) for _ in range(chance.randrange(4, 18))]
        if seed % 200 == 0:
            steps.insert(chance.randrange(len(steps) + 1), ("fork",))
        try:
            self.begin(setup)
            for step in steps:
                self.step(step)
            self.finish()
        except BaseException as exc:
            exc.add_note(f"OFFLOAD_SCHEDULE={seed} plays it again: {setup}\n" + "\n".join(map(str, steps)))
            self.give_up()
            raise


@contextlib.contextmanager
def complaints_of_the_interpreter(complaints: list[str]) -> Iterator[None]:
    """What no code can catch: errors in finalizers (warnings too) and in threads."""

    def in_finalizer(args: sys.UnraisableHookArgs) -> None:
        complaints.append(f"{args.err_msg}: {args.object!r}: {args.exc_value!r}")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        complaints.append("".join(lines))

    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = in_finalizer, in_thread
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def stacks() -> str:
    """Where every thread and every task stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines += [f"thread {names.get(ident, ident)!r}\n", *traceback.format_stack(frame)]
    for task in [thing for thing in gc.get_objects() if isinstance(thing, asyncio.Task) and not thing.done()]:
        lines += [f"{task!r}\n"]
    return "".join(lines)


def watched(work: Callable[[Play], None]) -> None:
    """Run it on a thread, and fail with all stacks when it makes no step for HANG seconds."""
    play = Play()
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            with complaints_of_the_interpreter(play.complaints):
                play.before = play.left()
                work(play)
                gc.collect()
                play.heard()
        except BaseException as exc:
            failures.append(exc)

    gc.collect()
    gc.freeze()  # what is here now need not be looked through after each schedule
    interval = sys.getswitchinterval()
    driver = threading.Thread(target=drive, name="driver", daemon=True)
    driver.start()
    try:
        steps = -1
        while driver.is_alive():
            driver.join(HANG)
            if driver.is_alive() and steps == play.steps:
                world = play.world
                said = "\n".join(map(str, world.said)) if world is not None else ""
                pytest.fail(f"no step for {HANG} s after\n{said}\n{stacks()}", pytrace=False)
            steps = play.steps
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)
    if failures:
        traceback.clear_frames(failures[0].__traceback__)  # they hold descriptors
        raise failures[0]


@pytest.fixture(autouse=True)
def watchdog() -> None:
    """Not the one for other tests, which a long test would not survive: `watched` looks for steps."""


def play_many(play: Play) -> None:
    if REPLAY is not None:
        for _ in range(int(SCHEDULES or 100)):
            play.schedule(int(REPLAY))
    else:
        for seed in range(int(SCHEDULES or 10_000)):
            play.schedule(seed)


INDEXES = st.integers(0, 15)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "waits": st.booleans(),
        "sleeps": st.integers(0, 3),
        "cleans": st.booleans(),
        "timed": st.booleans(),
        "on_cancel": st.sampled_from(["wait", "abandon", "interrupt"]),
        "nowait": st.booleans(),
    },
)
SETUPS = st.builds(
    Setup,
    resource=st.booleans(),
    bound=st.integers(1, 5),
    budget=st.integers(0, 3),
    failing=st.lists(st.integers(1, 5), max_size=2, unique=True).map(tuple),
    ending=st.sampled_from(["aclose", "close", "shutdown"]),
)


class Shrinking(RuleBasedStateMachine):
    """The same steps, chosen by Hypothesis, which looks for the fewest that fail.

    Everything comes to rest after each step: a failure that depends on who was quicker could not be shrunk.
    """

    play: Play

    def __init__(self) -> None:
        super().__init__()
        self.failed = False

    def take(self, *step: Any) -> None:
        try:
            self.play.step(step)
            self.play.step(("settle",))
        except BaseException:
            self.failed = True
            raise

    @initialize(setup=SETUPS)
    def begin(self, setup: Setup) -> None:
        self.play.begin(setup)

    @rule(
        kind=st.sampled_from(KINDS),
        behaviour=st.sampled_from(BEHAVIOURS),
        count=st.integers(1, 5),
        who=st.sampled_from(["here", "elsewhere"]),
        asked=ASKED,
    )
    def make(self, kind: Kind, behaviour: str, count: int, who: str, asked: dict[str, Any]) -> None:
        if kind in ("submit", "post") and who == "elsewhere":
            who = "thread"
        self.take("make", kind, behaviour, count, asked | {"who": who})

    @rule(index=INDEXES, kind=st.sampled_from(KINDS), behaviour=st.sampled_from(BEHAVIOURS), asked=ASKED)
    def make_inside(self, index: int, kind: Kind, behaviour: str, asked: dict[str, Any]) -> None:
        self.take("make_inside", index, kind, behaviour, asked)

    @rule(name=st.sampled_from(["release", "cancel", "end_span", "deadlock", "late", "cancel_close"]), index=INDEXES)
    def on_one(self, name: str, index: int) -> None:
        self.take(name, index)

    @rule(index=INDEXES)
    def release(self, index: int) -> None:
        self.take("release", index)

    @rule(index=INDEXES)
    def cancel(self, index: int) -> None:
        self.take("cancel", index)

    @rule(who=st.sampled_from(["here", "elsewhere"]))
    def forward(self, who: str) -> None:
        self.take("forward", who)

    @rule(nowait=st.booleans())
    def span(self, nowait: bool) -> None:
        self.take("span", nowait)

    @rule(
        step=st.sampled_from(
            [
                ("orphan", "call"),
                ("orphan", "run"),
                ("aclose",),
                ("close",),
                ("shutdown", True),
                ("shutdown", False),
                ("fork",),
            ]
            + [("stop", how) for how in ("call", "exit", "stop")]
        )
    )
    def seldom(self, step: Step) -> None:
        self.take(*step)

    def teardown(self) -> None:
        if self.play.world is None:
            return
        try:
            if not self.failed:
                self.play.finish()
        finally:
            self.play.give_up()


def shrink(play: Play) -> None:
    machine = type("Shrinking", (Shrinking,), {"play": play})
    examples = max(100, int(SCHEDULES or 0) // 100)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        ),
    )


forks_are_meant = pytest.mark.filterwarnings(r"ignore:This process \(pid=\d+\) is multi-threaded:DeprecationWarning")


@pytest.mark.slow
@forks_are_meant
def test_random_schedules_follow_the_model() -> None:
    """Schedules chosen by Hypothesis follow the model; one that does not is shrunk."""
    watched(shrink)


@pytest.mark.slow
@forks_are_meant
def test_ten_thousand_random_schedules_follow_the_model() -> None:
    """No schedule runs calls out of order or after they were dropped, hangs, or leaves anything behind or unsaid."""
    watched(play_many)
