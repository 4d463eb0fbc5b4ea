"""The way into one resource's loop: an ordered queue of calls, one wake a burst.

    caller's loop                                   resource's loop, on its own thread
    ─────────────                                   ──────────────────────────────────
    call = thread.call(f, x)  ── Mailbox ─────────► f(x), in order, one at a time
        place taken now         one wake a burst        │
    await call  ◄───────────────── Port ────────────────┘
                                one wake a burst

Plain functions need no task and no concurrent future: an entry in a deque, a wake if none is under way, an entry in the
deque back. Coroutine functions cross by `asyncio.run_coroutine_threadsafe`, and leave a token in the mailbox so that
they start in the same order: the mailbox stops at a token until its task has taken it. A Span is a stretch of the queue
that belongs to one caller.

Promises:
    - A call's place in the queue is taken when it is made, not when it is awaited.
    - Every call ends: whatever ends the resource's loop resolves its calls with an error that says why.
    - What a function raises (SystemExit too) goes to its caller with both tracebacks and does not end the thread.
    - An interrupt reaches the call that it is meant for, never the next one.

`gate` guards the queue and each call's step from queued to running or dropped, so exactly one side wins. It is
re-entrant: a signal handler or a finalizer may make a call while the same thread makes one. Nothing blocks under it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, Protocol

from ..errors import ClosedResourceError, DeadlockError, OffloadError, QueueFullError
from .call import (
    ABANDONED,
    DROPPED,
    FINISHED,
    INTERRUPTED,
    QUEUED,
    RUNNING,
    CallState,
    CoroutineCall,
    Submission,
    holdable,
    interrupted_by_user,
    unlock,
)
from .port import Bell, Port, port_here, wake

log = logging.getLogger("offload")

_HOLD = 0.0005  # a hundred quick calls
_SPAN_LOOK = 0.5  # seconds after which we look whether the loop that holds a span is still there


class Entry(Protocol):
    """What the mailbox carries: a Call, a Submission from a plain thread, or a Post."""

    state: CallState
    coroutine: bool
    since: float

    @property
    def span(self) -> Span | None: ...
    @property
    def port(self) -> Port | None: ...

    def work(self) -> Any: ...
    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        """Hand the outcome to the caller, from any thread. `hold`: as for Port.send."""

    def label(self) -> str: ...


class Span:
    """A stretch of the queue that belongs to one caller: its calls run, all others wait behind it.

    It stands in the queue as an entry of its own. When its turn comes, and coroutines that began before have ended, it
    begins; `end` makes way for those that wait, once the span's own calls have run.
    """

    coroutine = False
    span = None

    def __init__(self, mailbox: Mailbox) -> None:
        self.port = port_here()
        self.since = perf_counter()
        self.state = QUEUED
        self.entries: deque[Entry] = deque()
        self.ending = False
        self.task = asyncio.current_task()  # which may not wait for a call outside of its own span
        self._mailbox = mailbox
        self._begun: asyncio.Future[None] = self.port.loop.create_future()

    async def begin(self, *, nowait: bool = False) -> None:
        """Wait for its turn; cancelled, it leaves the queue."""
        if self._mailbox.thread_id == threading.get_ident():
            raise DeadlockError("an exclusive span waits for the thread's coroutines to end, so none can take it")
        self._mailbox.put(self, nowait=nowait)
        try:
            await self._begun
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Make way; from any thread, any number of times."""
        if self._mailbox.drop(self):
            self._mailbox.wake(self._mailbox._run)  # it may be at the head, and those behind waited for it only
        else:
            self._mailbox.end_span(self)

    def label(self) -> str:
        return "an exclusive span"

    def work(self) -> None:
        raise AssertionError("a span is not run")

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        """It begins, or cannot; from any thread."""
        self.error = error
        self.port.send(self)

    def settle(self) -> None:
        if not self._begun.done():
            if self.error is None:
                self._begun.set_result(None)
            else:
                self._begun.set_exception(self.error)

    def abandon(self) -> None:
        """The loop that wanted it is closed, so nobody will end it."""
        self.end()


class Mailbox:
    """The way into one resource's loop: an ordered queue of calls, one wake a burst.

    Args:
        refusal: makes the error for calls that come while the mailbox is not open.
        max_calls: how many may be queued before a call with `nowait` is refused.
        exit_timeout: seconds that a caller waits for a running call after Ctrl-C.
    """

    def __init__(
        self, refusal: Callable[[], OffloadError], *, max_calls: int = 10_000, exit_timeout: float = 5.0
    ) -> None:
        self.max_calls = max_calls
        self.exit_timeout = exit_timeout
        self.interrupter: Callable[[], object] | None = None
        self.thread_id: int | None = None
        self.busy_time = 0.0  # seconds in plain calls
        self.running_since = self.opened = 0.0
        self.gate = threading.RLock()
        self.refusal: Callable[[], OffloadError] | None = refusal
        self.running: Entry | None = None  # the plain call that runs now
        self.submitted = self.failed = self.dropped = self.abandoned = 0
        self._queue: deque[Entry] = deque()  # what runs next: everybody's, or those of the span
        self._outer = self._queue  # everybody's
        self._span: Span | None = None
        self._dead = 0  # dropped calls that still stand in the queue
        self._deadline: float | None = None  # by perf_counter, of those who wait after Ctrl-C
        self._failed = False
        self._turns: dict[Entry, asyncio.Future[None]] = {}  # tasks that wait for their token's turn
        self._tasks: dict[Entry, None] = {}  # coroutine calls that have started, oldest first
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: Bell | None = None
        self.closing = threading.Event()
        self._drained: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        both = len(self._queue) + (len(self._outer) if self._outer is not self._queue else 0)
        return max(0, both - self._dead)

    @property
    def oldest(self) -> float | None:
        """When the call was made that has waited longest."""
        with self.gate:
            queues = (self._queue, self._outer)
            firsts = (next((e.since for e in queue if e.state is QUEUED), None) for queue in queues)
            return min((since for since in firsts if since is not None), default=None)

    def patience(self) -> float | None:
        """Seconds that callers go on waiting after Ctrl-C, all together `exit_timeout`; None: as long as it takes."""
        if not interrupted_by_user():
            self._deadline = None
            return None
        if self._deadline is None:
            self._deadline = perf_counter() + self.exit_timeout
        return max(0.0, self._deadline - perf_counter())

    def left_of_patience(self) -> float | None:
        """Seconds that are left of the patience after Ctrl-C, if what kept its callers waiting then still runs."""
        if self._deadline is None or self.running is None or self.running_since > self._deadline:
            return None
        return max(0.0, self._deadline - perf_counter())

    def stack(self) -> list[str]:
        """Where the resource's thread stands, and its coroutine; as lines of text, from any thread."""
        frame = sys._current_frames().get(self.thread_id or 0)
        lines = traceback.format_stack(frame) if frame is not None else []
        busy = self.busy
        if isinstance(busy, CoroutineCall):
            lines += ["the coroutine stands at\n", *busy.stack()]
        return lines

    @property
    def busy(self) -> Entry | None:
        """The call that keeps the resource: the plain one that runs, else the oldest coroutine, else the span."""
        return self.running or next(iter(list(self._tasks)), self._span)

    def is_mine(self) -> bool:
        """Whether the running task holds the span, and would wait for itself if it waited for the queue."""
        span = self._span
        return span is not None and not span.ending and span.task is not None and _is_current(span.task)

    def open(self, loop: asyncio.AbstractEventLoop, drained: Callable[[], None]) -> None:
        """Begin; on the resource's loop. `drained` is called there once the mailbox is closed and all calls ended."""
        with self.gate:
            self._loop, self._drained, self.opened = loop, drained, perf_counter()
            if not self.closing.is_set():
                self.refusal = None
        self._bell = Bell(loop, self._run)
        loop.call_soon(self._run)

    def close(self, refusal: Callable[[], OffloadError]) -> None:
        """Take no more calls, and end those that are here; from any thread, any number of times."""
        with self.gate:
            if self.closing.is_set():
                return
            self.refusal = refusal
            self.closing.set()
        self.wake(self._run)

    def fail(self, refusal: Callable[[], OffloadError]) -> None:
        """The loop has ended: resolve every call that is here or comes later with an error; from any thread."""
        with self.gate:
            self.refusal = refusal
            self.closing.set()
            left = self._left()
            self.running = self._span = None
            self._failed = True
            self._dead = 0
            self._tasks.clear()
            self._queue.clear()
            self._outer.clear()
            self._queue = self._outer
        for entry in left:
            if entry.state in (QUEUED, RUNNING):  # not one that has ended, with its outcome on the way
                entry.state = DROPPED if entry.state is QUEUED else INTERRUPTED
                self.failed += 1
                entry.settle_later(None, refusal())

    def hang_up(self) -> None:
        """The loop is closed. Not before: it would answer the last ring by a descriptor that is gone."""
        with self.gate:
            self._bell = None

    def renew(self) -> None:
        """In a forked child: any lock may have been held by a thread that is not here."""
        self.gate = threading.RLock()
        self.closing = threading.Event()
        for entry in self._left():
            if isinstance(entry, Submission):
                unlock(entry.future)
                if entry.state is FINISHED and not entry.future.done():  # whose outcome was on the way from that thread
                    entry.state = RUNNING

    def _left(self) -> list[Entry]:
        """Every call that is here: the one that runs, coroutines, and what is queued."""
        queued = [*self._queue, *(self._outer if self._outer is not self._queue else ())]
        return [e for e in (self.running, *self._tasks, *queued) if e is not None]

    def put(self, entry: Entry, *, nowait: bool = False) -> None:
        """Take the next place; from any thread.

        Raises:
            OffloadError: as `refusal` says; QueueFullError with `nowait`; nothing was queued.
        """
        with self.gate:
            queue = self._outer
            if self.refusal is not None and not (entry.span is not None and entry.span is self._span):
                raise self.refusal()
            inline = entry.coroutine and threading.get_ident() == self.thread_id
            if entry.span is not None:
                if entry.span is not self._span or entry.span.ending:
                    raise ClosedResourceError("the exclusive span has ended; use the handle itself, or begin another")
                queue = self._queue
            elif self._span is not None and self.is_mine():
                raise DeadlockError(
                    "called from inside an exclusive span, for which this call would wait; use the span's own handle"
                )
            # Dropped calls keep their place in the queue: counted only if it is long enough to matter.
            if (
                nowait
                and len(queue) >= self.max_calls
                and (waiting := sum(e.state is QUEUED for e in queue)) >= self.max_calls
            ):
                raise QueueFullError(f"{waiting} calls are queued, the bound is {self.max_calls}; wait, or call later")
            self.submitted += 1
            if not inline:  # a coroutine that waits for another would wait for a span that waits for it
                queue.append(entry)
            if entry.coroutine:
                # Under the gate, so that tasks arrive in the order of their tokens: each has its caller's context.
                assert self._loop is not None
                asyncio.run_coroutine_threadsafe(self._drive(entry, inline=inline), self._loop)
                return
            if self._woken:
                return
            self._woken = True
            bell = self._bell
        # Outside: the wake gives up the GIL, and the loop that it wakes would stop at the gate at once.
        if bell is not None:
            with suppress(RuntimeError):  # closed since: `fail` has resolved all calls, or will
                bell.ring()

    def wake(self, callback: Callable[..., object], *args: object) -> None:
        """Run a callback on the resource's loop; from any thread. Nothing happens if that loop is gone."""
        wake(self._loop, callback, *args)

    def drop(self, entry: Entry) -> bool:
        """Take a queued call out of the order; False if it has started."""
        with self.gate:
            if entry.state is not QUEUED:
                return False
            entry.state = DROPPED
            self.dropped += 1
            self._dead += 1
            return True

    def drop_all(self) -> None:
        """Drop what is queued by `submit`, as Executor.shutdown(cancel_futures=True) does; from any thread."""
        with self.gate:
            submissions = [entry for entry in self._outer if isinstance(entry, Submission)]
        for entry in submissions:
            entry.future.cancel()

    def abandon(self, entry: Entry) -> bool:
        """Let go of a running call: it goes on, its caller does too. False if it has ended."""
        with self.gate:
            if entry.state is not RUNNING:
                return False
            entry.state = ABANDONED
            self.abandoned += 1
            return True

    def interrupt(self, entry: Entry, *, quiet: bool = False) -> bool:
        """Ask the resource to end this call, if it is the one that runs; from any thread. True: that raised."""
        # Under the gate the next call cannot begin, so the interrupt cannot hit it.
        with self.gate:
            if self.running is entry and self.interrupter is not None:
                try:
                    self.interrupter()
                except Exception:
                    if not quiet:
                        log.exception("interrupting %s raised", entry.label())
                    return True
        return False

    def end_span(self, span: Span) -> None:
        """The span's caller is through with it; from any thread."""
        with self.gate:
            if span is not self._span or span.ending:
                return
            span.ending = True
        self.wake(self._run)

    def run_inline(self, entry: Entry) -> None:
        """Run a call that the resource's own thread made, at once: waiting for its turn could never end."""
        with self.gate:
            self.submitted += 1
        entry.state = RUNNING
        outer = self.running
        self.running = outer or entry  # the outer one is what its caller may interrupt
        self._execute(entry)
        self.running = outer

    def _run(self) -> None:
        """Run what stands in the queue now, and come again for the rest: timers and coroutines get their turn."""
        with self.gate:
            self._woken = False
            count = len(self._queue)
        # Held outcomes go out at the end, or as soon as the burst turns out not to be a quick one. A burst of two or
        # three may be a reader that asks ahead, who wants the first as soon as it is there.
        now = perf_counter()
        hold_until = now + _HOLD if count > 3 else 0.0
        held: set[Port] = set()
        for left in range(count - 1, -1, -1):
            with self.gate:
                if not self._queue or self._queue[0].coroutine:
                    break  # its task takes it, and calls us again
                if type(self._queue[0]) is Span and not self._begin_span():
                    break  # a coroutine that began before it has not ended, or the span has begun
                entry = self._queue.popleft()
                if entry.state is not QUEUED:
                    self._dead -= 1
                    continue
                entry.state = RUNNING
                self.running, self.running_since = entry, now
            hold = left > 0 and now < hold_until
            if hold and entry.port is not None:
                held.add(entry.port)
            self._execute(entry, hold=hold)
            self.running = None
            del entry  # see `_theirs`
            then, now = now, perf_counter()
            self.busy_time += now - then
        for port in held:
            port.flush()
        self._go_on()

    def _begin_span(self) -> bool:
        """Begin the span at the head of the queue; under the gate. True: it was dropped, and the head can go."""
        span = self._queue[0]
        assert isinstance(span, Span)
        if span.state is not QUEUED:
            return True
        if not self._tasks:
            self._queue.popleft()
            span.state = RUNNING
            self._span, self._queue = span, span.entries
            span.settle_later(None, None)
            self._watch(span)
        return False

    def _watch(self, span: Span) -> None:
        """A loop that is closed with its tasks unfinished tells nobody, and would never end its span."""
        if span is self._span and self._loop is not None:
            if span.port.loop.is_closed():
                self._go_on()
            else:
                self._loop.call_later(_SPAN_LOOK, self._watch, span)

    def _go_on(self) -> None:
        with self.gate:
            span = self._span
            if span is not None:
                if not span.ending and span.port.loop.is_closed():
                    span.ending = True
                if span.ending and not self._queue and not self._tasks:
                    span.state = FINISHED
                    self._span, self._queue = None, self._outer
                    span = None
            if self._queue:
                self._schedule()
                return
            ended = self.closing.is_set() and not self._tasks and self._span is None
        if ended:
            self._drained()

    def _execute(self, entry: Entry, *, hold: bool = False) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = entry.work()
        except BaseException as exc:
            error = _theirs(exc)
        self._end(entry, value, error, hold=hold)
        del entry, error

    def _end(self, entry: Entry, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        if error is not None:
            self.failed += 1
        # Without the gate, which costs a twentieth of a call: against `abandon` at the same moment the state may end
        # up as either, and the outcome finds that its caller has gone on.
        if entry.state is RUNNING:
            entry.state = FINISHED
        if entry.state is DROPPED:  # a Submission, by its future
            with self.gate:
                self.dropped += 1
        elif entry.state is not ABANDONED:
            entry.settle_later(value, error and holdable(error), hold=hold)

    async def _drive(self, entry: Entry, *, inline: bool) -> None:
        """The task of a coroutine call, in its caller's context: waits for its token's turn, then runs it."""
        assert self._loop is not None
        if self._failed:
            return
        if not inline and (not self._queue or self._queue[0] is not entry):
            turn = self._turns[entry] = self._loop.create_future()
            await turn
        with self.gate:
            if not inline:
                if not self._queue or self._queue[0] is not entry:
                    return  # `fail` was here meanwhile
                self._queue.popleft()
            started = entry.state is QUEUED
            if started:
                entry.state = RUNNING
                self._tasks[entry] = None
            else:
                self._dead -= 1
            self._schedule()
        if started:
            await self._await(entry)
        del entry
        self._go_on()

    def _schedule(self) -> None:
        """See that what stands at the head of the queue gets its turn; under the gate, on the resource's loop."""
        assert self._loop is not None
        if not self._queue:
            return
        head = self._queue[0]
        if head.coroutine:
            turn = self._turns.pop(head, None)  # its task waits, or is still to come and will find itself at the head
            if turn is not None and not turn.done():
                turn.set_result(None)
        elif not self._woken and not (type(head) is Span and head.state is QUEUED and self._tasks):
            # Behind the last of these tasks we are called again.
            self._woken = True
            self._loop.call_soon(self._run)

    async def _await(self, entry: Entry) -> None:
        task = asyncio.current_task()
        assert task is not None
        if isinstance(entry, CoroutineCall):
            entry.started(task)
        value: Any = None
        error: BaseException | None = None
        try:
            value = await entry.work()
        except BaseException as exc:
            error = _theirs(exc)
            with self.gate:
                if isinstance(exc, asyncio.CancelledError) and entry.state is RUNNING:
                    entry.state = INTERRUPTED
        if self._tasks.pop(entry, entry) is None:  # otherwise `fail` has resolved it
            self._end(entry, value, error)
        del entry, error


_OURS = (__name__, CoroutineCall.__module__)


def _theirs(error: BaseException) -> BaseException:
    """The error without our frames in its traceback, which tell its caller nothing.

    They refer to the call, and the call to the error: such a ring keeps all that the function had in hand until the
    next garbage collection. The function's own frame still leads back to ours, so those that are over are emptied here,
    and those that go on let the call go themselves.
    """
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_globals.get("__name__") in _OURS:
        with suppress(RuntimeError):
            tb.tb_frame.clear()
        tb = tb.tb_next
    return error.with_traceback(tb)


def _is_current(task: asyncio.Task[Any]) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False
