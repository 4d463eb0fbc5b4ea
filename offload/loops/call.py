"""One call across loops, and the two mailboxes that carry it there and back.

    caller's loop                                   resource's loop, on its own thread
    ─────────────                                   ──────────────────────────────────
    call = thread.call(f, x)  ── Mailbox ─────────► f(x), in order, one at a time
        place taken now         one wake a burst        │
    await call  ◄───────────────── Port ────────────────┘
                                one wake a burst

Plain functions need no task and no concurrent future: an entry in a deque, a wake if none is under way, an entry in the
deque back. Coroutine functions cross by `asyncio.run_coroutine_threadsafe`, and leave a token in the mailbox so that
they start in the same order: the mailbox stops at a token until its task has taken it.

    options(…)            timeout, on_cancel, nowait: what a caller wants done with its calls
    Span                  a stretch of the queue that belongs to one caller

Promises:
    - A call's place in the queue is taken when it is made, not when it is awaited.
    - A call cancelled while queued never runs. A running plain function is waited for; a running coroutine is
      cancelled on its own loop and its cleanup is waited for. The cancelled caller sees CancelledError either way.
      With `on_cancel="interrupt"` the resource is asked to end the running call, until it has; with "abandon" the
      caller goes on at once, and the call is counted. A timeout does the same and raises TimeoutError.
    - After Ctrl-C a cancelled caller waits for a running plain function for at most the resource's exit timeout; then
      it goes on, and a warning names the call that blocks and where it stands.
    - Every call ends: whatever ends the resource's loop resolves its calls with an error that says why.
    - What a function raises (SystemExit too) goes to its caller with both tracebacks and does not end the thread.
      StopIteration, which no future can hold, arrives as RuntimeError with the original as its cause.
    - A caller's loop that is gone makes the outcome "abandoned"; nobody else notices.
    - Context variables of the caller hold inside the call.

`gate` guards the queue and each call's step from queued to running or dropped, so exactly one side wins. It is
re-entrant: a signal handler or a finalizer may make a call while the same thread makes one. Nothing blocks under it.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import os
import signal as signals
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Generic, Literal, Protocol, TypeVar

from ..errors import ClosedResourceError, DeadlockError, OffloadError, QueueFullError

R = TypeVar("R")

log = logging.getLogger("offload")


OnCancel = Literal["wait", "abandon", "interrupt"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller wants done with its calls.

    Attributes:
        timeout: seconds from making the call until it is given up with TimeoutError; None: as long as it takes.
        on_cancel: what happens to a call that runs when it is cancelled or given up: "wait" for its end, "abandon" it
            (the caller goes on, the call does too), or "interrupt" it and wait. One that is queued is always dropped.
        nowait: raise QueueFullError at once if the queue is at its bound.
    """

    timeout: float | None = None
    on_cancel: OnCancel = "wait"
    nowait: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and self.timeout < 0:
            raise ValueError(f"timeout is {self.timeout} s, expected at least 0, or None")
        if self.on_cancel not in ("wait", "abandon", "interrupt"):
            raise ValueError(f"on_cancel is {self.on_cancel!r}, expected 'wait', 'abandon' or 'interrupt'")


DEFAULT = Options()


class Bell:
    """Wakes a loop from any thread, for a third of what `call_soon_threadsafe` costs where there is an eventfd: one
    write there, one read here, no handle, no context, no self-pipe read until it is empty.

    Args:
        loop: whose `add_reader` takes the descriptor; a loop without it (Windows' proactor) is woken the usual way.
        answer: called on that loop after one or more rings.

    Whoever may ring holds the bell, and the descriptor is closed when nobody does: so its number cannot belong to
    another file when somebody writes to it.
    """

    __slots__ = ("__weakref__", "_answer", "_fd", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
        self._loop = loop
        self._answer = answer
        self._fd: int | None = None
        if hasattr(os, "eventfd"):
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                # In a context of its own: the loop keeps it, and would keep the variables of whoever came first.
                contextvars.Context().run(loop.add_reader, fd, _answered, fd, answer)
                self._fd = fd
            except NotImplementedError:
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise

    def ring(self) -> None:
        """Raises RuntimeError if the loop is closed."""
        if self._fd is None or self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answer)
        else:
            os.eventfd_write(self._fd, 1)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _answered(fd: int, answer: Callable[[], None]) -> None:
    # Given the number, not the bell: an error that a call raised may keep this frame, and would keep the descriptor.
    os.eventfd_read(fd)
    answer()


class CallState(enum.Enum):
    QUEUED = "queued"
    DROPPED = "dropped"  # cancelled while queued: it never ran
    RUNNING = "running"
    FINISHED = "finished"  # it returned or raised
    INTERRUPTED = "interrupted"  # it was asked to end and did, or its loop ended under it
    ABANDONED = "abandoned"  # nobody waits for its end: its caller went on, or the caller's loop was gone


# A member looked up on its class costs a tenth of a microsecond on Python 3.11, and a call needs six.
_QUEUED = CallState.QUEUED
_DROPPED = CallState.DROPPED
_RUNNING = CallState.RUNNING
_FINISHED = CallState.FINISHED
_INTERRUPTED = CallState.INTERRUPTED
_ABANDONED = CallState.ABANDONED


class _Entry(Protocol):
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


class Port:
    """The way back into one caller's loop: outcomes, in order, one wake a burst.

    A wake for each of a hundred quick calls costs more than the calls: the two threads take the GIL from each other
    each time (measured: 14 µs a call against 7). So while a burst is under way an outcome may be held until the burst's
    end. A held outcome is never at the mercy of a call behind it that blocks: as soon as two calls are under way the
    caller's loop looks by itself, after `_FIRST_LOOK` seconds, then half as often each time, at least every
    `_LAST_LOOK`.
    """

    __slots__ = ("__weakref__", "_bell", "_interval", "_looking", "_outbox", "_under_way", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outbox: deque[Call[Any] | Notice] = deque()
        self._woken = False
        self._under_way = 0  # calls made here and not settled
        self._looking = False
        self._interval = 0.0
        self._bell = Bell(loop, self._arrive)  # by which the loop keeps us until it is closed

    def made(self) -> None:
        """A call was queued; on the caller's loop."""
        self._under_way += 1
        if self._under_way > 1 and not self._looking:
            self._looking = True
            self._interval = _FIRST_LOOK
            self.loop.call_later(_FIRST_LOOK, self._look)

    def ended(self) -> None:
        """A call was settled or dropped; on the caller's loop."""
        self._under_way -= 1

    def send(self, call: Call[Any], *, hold: bool) -> None:
        """Let the caller's loop settle this call; from any thread. If that loop is closed, the call is abandoned.

        Args:
            hold: `flush` will be called soon, unless a call blocks first.
        """
        self._outbox.append(call)
        if not (hold and self._looking):
            self.flush()

    def post(self, notice: Notice) -> None:
        """Run a notice on the caller's loop, behind what was sent before; from any thread."""
        self._outbox.append(notice)
        self.flush()

    def flush(self) -> None:
        """Wake the caller's loop if outcomes wait for it; from any thread."""
        # `send` appends, then looks at the flag; `_arrive` clears the flag, then takes. So whoever misses the other's
        # step is seen by the other's next one: at worst one wake too many, never one too few.
        # A loop that closed after it was woken never clears the flag, so the flag alone would hide that it is gone.
        if self._outbox and (not self._woken or self.loop.is_closed()):
            self._woken = True
            try:
                self._bell.ring()
            except RuntimeError:
                with suppress(IndexError):  # two resources may find the loop closed at the same time
                    while True:
                        self._outbox.popleft().abandon()

    def _arrive(self) -> None:
        self._woken = False
        outbox = self._outbox
        for _ in range(len(outbox)):  # what comes meanwhile has a wake of its own, and the loop its turn
            outbox.popleft().settle()

    def _look(self) -> None:
        # Cleared before the outcomes are taken: who still sees it set has appended before we take, and who appends
        # later wakes us. Cleared after, an outcome held in between could wait for a call that blocks.
        self._looking = False
        self._arrive()
        if self._under_way > 1:
            self._looking = True
            self._interval = min(2 * self._interval, _LAST_LOOK)
            self.loop.call_later(self._interval, self._look)


class Notice:
    """A callback on its way to the loop that wants it; what it raises goes to that loop's exception handler."""

    __slots__ = ("_arguments", "_context", "_function", "_loop")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        function: Callable[..., object],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self._loop, self._context, self._function, self._arguments = loop, context, function, arguments

    def settle(self) -> None:
        # Not called from here: an error that is kept would keep our frames, and the port's descriptor with them.
        args, kwargs = self._arguments
        self._loop.call_soon(partial(self._function, *args, **kwargs), context=self._context)

    def abandon(self) -> None:
        """The loop that wanted it is closed."""


_FIRST_LOOK = 0.001
_LAST_LOOK = 0.05
_HOLD = 0.0005  # a hundred quick calls
_AGAIN = 0.05  # seconds between interrupts of one call
_SPAN_LOOK = 0.5  # seconds after which we look whether the loop that holds a span is still there


class _Local(threading.local):
    port: Callable[[], Port | None] = staticmethod(lambda: None)  # of the loop that this thread ran last


_local = _Local()
_ports: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Port] = weakref.WeakValueDictionary()


def port_here() -> Port:
    """The port of the running loop; a loop that has gone takes its port along."""
    loop = asyncio.get_running_loop()
    port = _local.port()
    if port is None or port.loop is not loop:
        port = _ports.get(loop)
        if port is None:
            port = _ports[loop] = Port(loop)
        _local.port = weakref.ref(port)
    return port


class Call(asyncio.Future[R]):
    """One call under way: a future of the caller's loop, so `await`, `gather`, `wait_for` and `shield` take it.

    It runs whether or not it is awaited. `cancel()` on a queued call drops it; on a running one it asks, and the call
    stays pending until the resource is free again, then it is cancelled.

    Attributes:
        state: a CallState; read it from any thread.
    """

    __slots__ = (
        "_args",
        "_cancelled",
        "_context",
        "_error",
        "_function",
        "_kwargs",
        "_mailbox",
        "_message",  # not `_cancel_message`: that is asyncio's own, and gather reads it
        "_options",
        "_task",
        "_timer",
        "_value",
        "port",
        "since",
        "span",
        "state",
    )

    coroutine = False

    def __init__(
        self,
        mailbox: Mailbox,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options = DEFAULT,
        span: Span | None = None,
    ) -> None:
        port = port_here()
        self.port: Port | None = port
        super().__init__(loop=port.loop)
        self._mailbox = mailbox
        self._context = contextvars.copy_context()
        self._function: Callable[..., Any] | None = function
        self._args, self._kwargs = args, kwargs
        self._task: asyncio.Task[Any] | None = None
        self._cancelled: type[BaseException] | None = None  # what its caller gets instead of its outcome
        self._options = options
        self._timer: asyncio.TimerHandle | None = None
        self.span = span
        self.since = perf_counter()
        self.state = _QUEUED

    def made(self) -> None:
        """The call was queued; on the caller's loop."""
        assert self.port is not None, "it has not ended"
        self.port.made()
        if self._options.timeout is not None:
            self._timer = self.get_loop().call_later(self._options.timeout, self._expire)

    def work(self) -> Any:
        return self._context.run(self._function, *self._args, **self._kwargs)  # type: ignore[arg-type]

    def label(self) -> str:
        return _label(self._function, self._args)

    def _forget(self) -> None:
        """Let go of what the call refers to: it lives as long as somebody holds the future, they need not."""
        self._function = None
        self._args, self._kwargs = (), {}

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        self._value, self._error = value, error
        assert self.port is not None, "it ends once"
        self.port.send(self, hold=hold)

    def abandon(self) -> None:
        """The loop that asked is closed; from any thread."""
        self.state = _ABANDONED
        del self._value, self._error
        self._forget()
        with self._mailbox.gate:
            self._mailbox.abandoned += 1

    def settle(self) -> None:
        """Become done; on the caller's loop."""
        if self.done():
            return
        value: Any = self._value
        error = self._error
        self._value = self._error = None
        if self._cancelled is not None:
            if error is not None and self.state is _FINISHED and self._options.on_cancel == "interrupt":
                self.state = _INTERRUPTED
            self._give_up(self._cancelled, error)
            return
        self._leave()
        if error is None:
            self.set_result(value)
        elif isinstance(error, asyncio.CancelledError):
            super().cancel(*error.args[:1])
        else:
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:
        """Drop the call if it is queued; if it runs, do as its `on_cancel` says. Call it on the caller's loop.

        Returns:
            False if the call was done already.
        """
        if self.done():
            return False
        self._message = msg
        self._stop(asyncio.CancelledError)
        return True

    def _expire(self) -> None:
        if not self.done():
            self._message = None
            self._stop(TimeoutError)

    def _stop(self, outcome: type[BaseException]) -> None:
        """End the call as its options say; its caller gets `outcome`."""
        again = self._cancelled is not None
        if not again or outcome is asyncio.CancelledError:  # who is cancelled hears of that, whatever came before
            self._cancelled = outcome
        if self._mailbox.drop(self):
            self._give_up(outcome)
            return
        if self.coroutine:
            self._mailbox.wake(self._cancel_task)
        if self._options.on_cancel == "abandon":
            if self._mailbox.abandon(self):
                self._give_up(outcome)
            return
        if self._options.on_cancel == "interrupt" and not again:
            self._interrupt()
        if outcome is asyncio.CancelledError and (patience := self._mailbox.patience()) is not None:
            self.get_loop().call_later(patience, self._leave_behind)

    def _interrupt(self, *, quiet: bool = False) -> None:
        """Ask the resource to end this call, and again until it has: one that begins to wait now may have missed it."""
        if not self.done():
            raised = self._mailbox.interrupt(self, quiet=quiet)
            self.get_loop().call_later(_AGAIN, partial(self._interrupt, quiet=quiet or raised))

    def _leave_behind(self) -> None:
        """The user wants the program to end, and the call does not."""
        if not self.done() and self._mailbox.abandon(self):
            log.critical(
                "%s still runs %.1f s after Ctrl-C and is left behind\n%s",
                self.label(),
                self._mailbox.exit_timeout,
                "".join(self._mailbox.stack()),
            )
            self._give_up(asyncio.CancelledError)

    def _give_up(self, outcome: type[BaseException], error: BaseException | None = None) -> None:
        label = self.label()
        self._leave()
        if outcome is asyncio.CancelledError:
            super().cancel(self._message)
            return
        waited = self._options.timeout
        expired = TimeoutError(f"{label} was given up after {waited} s ({self.state.value})")
        expired.__cause__ = error
        self.set_exception(expired)

    def _leave(self) -> None:
        port, self.port = self.port, None  # an error may keep the call for long, and would keep the port's descriptor
        assert port is not None, "it ends once"
        port.ended()
        if self.state is not _ABANDONED:  # that one still runs, and may be asked what it is
            self._forget()
        if self._timer is not None:
            self._timer.cancel()

    def _cancel_task(self) -> None:
        # On the resource's loop, where a call that runs has its task since the step in which it began to run. So each
        # `cancel` reaches the coroutine once; a second time would hit its cleanup.
        assert self._task is not None, "it runs"
        self._task.cancel(self._message)


class CoroutineCall(Call[R]):
    """A Call whose function is a coroutine function."""

    __slots__ = ()

    coroutine = True

    def work(self) -> Any:
        # Its task has the caller's context already (`call_soon_threadsafe` copies it).
        assert self._function is not None, "a call runs once"
        return self._function(*self._args, **self._kwargs)

    def started(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def stack(self) -> list[str]:
        """Where the coroutine stands, outermost first, as lines of text; from any thread."""
        lines: list[str] = []
        coroutine: Any = self._task and self._task.get_coro()
        while (frame := getattr(coroutine, "cr_frame", None)) is not None:
            lines += traceback.format_stack(frame, 1)
            coroutine = coroutine.cr_await
        return lines


class Submission(Generic[R]):
    """A call from a plain thread, with a concurrent future for its outcome."""

    __slots__ = ("_args", "_context", "_function", "_kwargs", "future", "since", "span", "state")

    coroutine = False
    port = None

    def __init__(
        self,
        function: Callable[..., R],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        span: Span | None = None,
    ) -> None:
        self.span = span
        self.since = perf_counter()
        self._context = contextvars.copy_context()
        self._function = function
        self._args, self._kwargs = args, kwargs
        self.future: ThreadFuture[R] = ThreadFuture()
        self.state = _QUEUED

    def work(self) -> R | None:
        if not self.future.set_running_or_notify_cancel():
            self.state = _DROPPED
            return None
        return self._context.run(self._function, *self._args, **self._kwargs)

    def label(self) -> str:
        return _label(self._function, self._args)

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        try:
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)
        except InvalidStateError:
            assert self.future.cancelled(), "nobody else settles it"


class Post:
    """An entry whose outcome nobody waits for."""

    __slots__ = ("_function", "since", "state")

    coroutine = False
    port = None
    span = None

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self.since = perf_counter()
        self.state = _QUEUED

    def work(self) -> object:
        return self._function()

    def label(self) -> str:
        return _label(self._function)

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        # An OffloadError says that the thread is gone, which everybody who waits for something is told as well.
        if error is not None and not isinstance(error, OffloadError):
            log.error("%s, which nobody waits for, raised", self.label(), exc_info=error)


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
        self.state = _QUEUED
        self.entries: deque[_Entry] = deque()
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
        self.port.post(self)  # type: ignore[arg-type]

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
        self.running: _Entry | None = None  # the plain call that runs now
        self.submitted = self.failed = self.dropped = self.abandoned = 0
        self._queue: deque[_Entry] = deque()  # what runs next: everybody's, or those of the span
        self._outer = self._queue  # everybody's
        self._span: Span | None = None
        self._dead = 0  # dropped calls that still stand in the queue
        self._deadline: float | None = None  # of those who wait after Ctrl-C
        self._failed = False
        self._turns: dict[_Entry, asyncio.Future[None]] = {}  # tasks that wait for their token's turn
        self._tasks: dict[_Entry, None] = {}  # coroutine calls that have started, oldest first
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
            firsts = (next((e.since for e in queue if e.state is _QUEUED), None) for queue in queues)
            return min((since for since in firsts if since is not None), default=None)

    def patience(self) -> float | None:
        """Seconds that callers go on waiting after Ctrl-C, all together `exit_timeout`; None: as long as it takes."""
        if not interrupted_by_user():
            self._deadline = None
            return None
        if self._deadline is None:
            self._deadline = perf_counter() + self.exit_timeout
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
    def busy(self) -> _Entry | None:
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
            self._bell = None
            queued = [*self._queue, *(self._outer if self._outer is not self._queue else ())]
            left = [e for e in (self.running, *self._tasks, *queued) if e is not None]
            self.running = self._span = None
            self._failed = True
            self._dead = 0
            self._tasks.clear()
            self._queue.clear()
            self._outer.clear()
            self._queue = self._outer
        for entry in left:
            if entry.state in (_QUEUED, _RUNNING):  # not one that has ended, with its outcome on the way
                entry.state = _DROPPED if entry.state is _QUEUED else _INTERRUPTED
                self.failed += 1
                entry.settle_later(None, refusal())

    def renew(self) -> None:
        """In a forked child: the gate may have been held by a thread that is not here."""
        self.gate = threading.RLock()
        self.closing = threading.Event()

    def put(self, entry: _Entry, *, nowait: bool = False) -> None:
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
            elif self.is_mine():
                raise DeadlockError(
                    "called from inside an exclusive span, for which this call would wait; use the span's own handle"
                )
            if nowait and (waiting := len(queue) - self._dead) >= self.max_calls:
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
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed since: `fail` has resolved all calls, or will
                loop.call_soon_threadsafe(callback, *args)

    def drop(self, entry: _Entry) -> bool:
        """Take a queued call out of the order; False if it has started."""
        with self.gate:
            if entry.state is not _QUEUED:
                return False
            entry.state = _DROPPED
            self.dropped += 1
            self._dead += 1
            return True

    def drop_all(self) -> None:
        """Drop what is queued by `submit`, as Executor.shutdown(cancel_futures=True) does; from any thread."""
        with self.gate:
            submissions = [entry for entry in self._outer if isinstance(entry, Submission)]
        for entry in submissions:
            entry.future.cancel()

    def abandon(self, entry: _Entry) -> bool:
        """Let go of a running call: it goes on, its caller does too. False if it has ended."""
        with self.gate:
            if entry.state is not _RUNNING:
                return False
            entry.state = _ABANDONED
            self.abandoned += 1
            return True

    def interrupt(self, entry: _Entry, *, quiet: bool = False) -> bool:
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

    def run_inline(self, entry: _Entry) -> None:
        """Run a call that the resource's own thread made, at once: waiting for its turn could never end."""
        with self.gate:
            self.submitted += 1
        entry.state = _RUNNING
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
                if entry.state is not _QUEUED:
                    self._dead -= 1
                    continue
                entry.state = _RUNNING
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
        if span.state is not _QUEUED:
            return True
        if not self._tasks:
            self._queue.popleft()
            span.state = _RUNNING
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
                    span.state = _FINISHED
                    self._span, self._queue = None, self._outer
                    span = None
            if self._queue:
                self._schedule()
                return
            ended = self.closing.is_set() and not self._tasks and self._span is None
        if ended:
            self._drained()

    def _execute(self, entry: _Entry, *, hold: bool = False) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = entry.work()
        except BaseException as exc:
            error = _theirs(exc)
        self._end(entry, value, error, hold=hold)
        del entry, error

    def _end(self, entry: _Entry, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        if error is not None:
            self.failed += 1
        with self.gate:  # against `abandon`
            if entry.state is _RUNNING:
                entry.state = _FINISHED
        if entry.state is _DROPPED:  # a Submission, by its future
            with self.gate:
                self.dropped += 1
        elif entry.state is not _ABANDONED:
            entry.settle_later(value, holdable(error), hold=hold)

    async def _drive(self, entry: _Entry, *, inline: bool) -> None:
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
            started = entry.state is _QUEUED
            if started:
                entry.state = _RUNNING
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
        elif not self._woken and not (type(head) is Span and head.state is _QUEUED and self._tasks):
            # Behind the last of these tasks we are called again.
            self._woken = True
            self._loop.call_soon(self._run)

    async def _await(self, entry: _Entry) -> None:
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
                if isinstance(exc, asyncio.CancelledError) and entry.state is _RUNNING:
                    entry.state = _INTERRUPTED
        if self._tasks.pop(entry, entry) is None:  # otherwise `fail` has resolved it
            self._end(entry, value, error)
        del entry, error


def _theirs(error: BaseException) -> BaseException:
    """The error without our frames in its traceback, which tell its caller nothing.

    They refer to the call, and the call to the error: such a ring keeps all that the function had in hand until the
    next garbage collection. The function's own frame still leads back to ours, so those that are over are emptied here,
    and those that go on let the call go themselves.
    """
    ours = globals()
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_globals is ours:
        with suppress(RuntimeError):
            tb.tb_frame.clear()
        tb = tb.tb_next
    return error.with_traceback(tb)


def holdable(error: BaseException | None) -> BaseException | None:
    """The error as a future takes it: asyncio refuses StopIteration, and whoever waits would wait for ever."""
    if isinstance(error, StopIteration):
        wrapped = RuntimeError(f"the call raised StopIteration({error.value!r}), which no future can hold")
        wrapped.__cause__ = error
        return wrapped
    return error


async def outlast(future: asyncio.Future[R], *, patience: Callable[[], float | None] = lambda: None) -> R:
    """Wait for a future to the end even if cancelled meanwhile; then the cancellation goes on.

    Args:
        patience: asked at first and when cancelled: how many seconds to go on waiting; None: to the end.

    Raises:
        TimeoutError: the patience is over.
    """
    cancelled: asyncio.CancelledError | None = None
    timeout = patience()
    while not future.done():
        try:
            await asyncio.wait([future], timeout=timeout)
            if timeout is not None:
                break
        except asyncio.CancelledError as exc:
            cancelled, timeout = exc, patience()
    if cancelled is not None:
        if future.done() and not future.cancelled():
            future.exception()  # seen: the cancellation is what the caller gets
        raise cancelled
    if not future.done():
        raise TimeoutError("it has not ended in time")
    return future.result()


def signal() -> ThreadFuture[None]:
    """A concurrent future that its waiters cannot cancel."""
    future: ThreadFuture[None] = ThreadFuture()
    future.set_running_or_notify_cancel()
    return future


def arrival(future: ThreadFuture[R]) -> asyncio.Future[R]:
    """The outcome of a concurrent future, on the running loop."""
    return asyncio.wrap_future(future)


def interrupted_by_user() -> bool:
    """Whether Ctrl-C was pressed in a program that `asyncio.run` runs: then it cancels, and all should end."""
    # asyncio.Runner handles SIGINT by a bound method of itself, and counts; there is no public way to ask.
    handler = getattr(signals.getsignal(signals.SIGINT), "func", None)
    return bool(getattr(getattr(handler, "__self__", None), "_interrupt_count", 0))


def _is_current(task: asyncio.Task[Any]) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False


def _label(function: Any, args: tuple[Any, ...] = ()) -> str:
    if args and getattr(function, "runs_its_argument", False):
        function = args[0]
    return getattr(function, "__qualname__", None) or repr(function)
