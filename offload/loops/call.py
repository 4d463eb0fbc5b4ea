"""One call across loops, and the two mailboxes that carry it there and back.

    caller's loop                                   resource's loop, on its own thread
    ─────────────                                   ──────────────────────────────────
    call = thread.call(f, x)  ── Mailbox ─────────► f(x), in order, one at a time
        place taken now         one wake a burst        │
    await call  ◄───────────────── Port ────────────────┘
                                one wake a burst

Plain functions need no task and no concurrent future: an entry in a deque, a wake if none is under way, an entry in the
deque back. Coroutine functions cross by `asyncio.run_coroutine_threadsafe`, and leave a token in the mailbox so that
they start in the same order: the mailbox stops at a token until its task is there, and the task's first step runs what
stands before its token.

Promises:
    - A call's place in the queue is taken when it is made, not when it is awaited.
    - A call cancelled while queued never runs. A running plain function is waited for; a running coroutine is
      cancelled on its own loop and its cleanup is waited for. The cancelled caller sees CancelledError either way.
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
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import InvalidStateError
from contextlib import suppress
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

from ..errors import OffloadError

R = TypeVar("R")

log = logging.getLogger("offload")


class CallState(enum.Enum):
    QUEUED = "queued"
    DROPPED = "dropped"  # cancelled while queued: it never ran
    RUNNING = "running"
    FINISHED = "finished"  # it returned or raised
    INTERRUPTED = "interrupted"  # its coroutine was cancelled, or its loop ended under it
    ABANDONED = "abandoned"  # it ended, and the loop that asked for it was gone


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

    __slots__ = ("_interval", "_looking", "_outbox", "_under_way", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outbox: deque[Call[Any]] = deque()
        self._woken = False
        self._under_way = 0  # calls made here and not settled
        self._looking = False
        self._interval = 0.0

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

    def flush(self) -> None:
        """Wake the caller's loop if outcomes wait for it; from any thread."""
        # `send` appends, then looks at the flag; `_arrive` clears the flag, then takes. So whoever misses the other's
        # step is seen by the other's next one: at worst one wake too many, never one too few.
        # A loop that closed after it was woken never clears the flag, so the flag alone would hide that it is gone.
        if self._outbox and (not self._woken or self.loop.is_closed()):
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._arrive)
            except RuntimeError:
                with suppress(IndexError):  # two resources may find the loop closed at the same time
                    while True:
                        self._outbox.popleft().abandon()

    def _arrive(self) -> None:
        self._woken = False
        outbox = self._outbox
        while outbox:
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


_FIRST_LOOK = 0.001
_LAST_LOOK = 0.05
_HOLD = 0.0005  # a hundred quick calls


class _Local(threading.local):
    port: Port | None = None


_local = _Local()  # the port of the loop that this thread ran last


def _port_here() -> Port:
    loop = asyncio.get_running_loop()
    port = _local.port
    if port is None or port.loop is not loop:
        port = _local.port = Port(loop)
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
        "_task",
        "_value",
        "port",
        "state",
    )

    coroutine = False

    def __init__(
        self, mailbox: Mailbox, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.port = port = _port_here()
        super().__init__(loop=port.loop)
        self._mailbox = mailbox
        self._context = contextvars.copy_context()
        self._function: Callable[..., Any] | None = function
        self._args, self._kwargs = args, kwargs
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False
        self.state = _QUEUED

    def work(self) -> Any:
        return self._context.run(self._function, *self._args, **self._kwargs)  # type: ignore[arg-type]

    def label(self) -> str:
        return _label(self._function)

    def _forget(self) -> None:
        """Let go of what the call refers to: it lives as long as somebody holds the future, they need not."""
        self._function = None
        self._args, self._kwargs = (), {}

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        self._value, self._error = value, error
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
        self.port.ended()
        value: Any = self._value
        error = self._error
        self._value = self._error = None
        self._forget()
        if self._cancelled:
            super().cancel(self._message)
        elif error is None:
            self.set_result(value)
        elif isinstance(error, asyncio.CancelledError):
            super().cancel(*error.args[:1])
        else:
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:
        """Drop the call if it is queued, else ask; call it on the caller's loop.

        Returns:
            False if the call was done already.
        """
        if self.done():
            return False
        if self._mailbox.drop(self):
            self._forget()
            self.port.ended()
            return super().cancel(msg)
        self._message = msg
        self._cancelled = True
        if self.coroutine:
            self._mailbox.wake(self._cancel_task)
        return True

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

    __slots__ = ("_args", "_context", "_function", "_kwargs", "future", "state")

    coroutine = False
    port = None

    def __init__(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        return _label(self._function)

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

    __slots__ = ("_function", "state")

    coroutine = False
    port = None

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self.state = _QUEUED

    def work(self) -> object:
        return self._function()

    def label(self) -> str:
        return _label(self._function)

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        # An OffloadError says that the thread is gone, which everybody who waits for something is told as well.
        if error is not None and not isinstance(error, OffloadError):
            log.error("%s, which nobody waits for, raised", self.label(), exc_info=error)


class Mailbox:
    """The way into one resource's loop: an ordered queue of calls, one wake a burst.

    Args:
        refusal: makes the error for calls that come while the mailbox is not open.
    """

    def __init__(self, refusal: Callable[[], OffloadError]) -> None:
        self.gate = threading.RLock()
        self.refusal: Callable[[], OffloadError] | None = refusal
        self.running: _Entry | None = None  # the plain call that runs now
        self.submitted = self.failed = self.dropped = self.abandoned = 0
        self._queue: deque[_Entry] = deque()
        self._tasks: dict[_Entry, None] = {}  # coroutine calls that have started, oldest first
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._drained: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def busy(self) -> _Entry | None:
        """The call that keeps the resource: the plain one that runs, else the oldest coroutine."""
        return self.running or next(iter(list(self._tasks)), None)

    def open(self, loop: asyncio.AbstractEventLoop, drained: Callable[[], None]) -> None:
        """Begin; on the resource's loop. `drained` is called there once the mailbox is closed and all calls ended."""
        with self.gate:
            self._loop, self._drained = loop, drained
            if not self._closing:
                self.refusal = None
        loop.call_soon(self._run)

    def close(self, refusal: Callable[[], OffloadError]) -> None:
        """Take no more calls, and end those that are here; from any thread, any number of times."""
        with self.gate:
            if self._closing:
                return
            self._closing, self.refusal = True, refusal
        self.wake(self._run)

    def fail(self, refusal: Callable[[], OffloadError]) -> None:
        """The loop has ended: resolve every call that is here or comes later with an error; from any thread."""
        with self.gate:
            self._closing, self.refusal = True, refusal
            left = [e for e in (self.running, *self._tasks, *self._queue) if e is not None]
            self.running = None
            self._tasks.clear()
            self._queue.clear()
        for entry in left:
            if entry.state is not _DROPPED:
                entry.state = _DROPPED if entry.state is _QUEUED else _INTERRUPTED
                self.failed += 1
                entry.settle_later(None, refusal())

    def renew(self) -> None:
        """In a forked child: the gate may have been held by a thread that is not here."""
        self.gate = threading.RLock()

    def put(self, entry: _Entry) -> None:
        """Take the next place; from any thread.

        Raises:
            OffloadError: as `refusal` says; nothing was queued.
        """
        with self.gate:
            if self.refusal is not None:
                raise self.refusal()
            self.submitted += 1
            self._queue.append(entry)
            if entry.coroutine:
                # Under the gate, so that tasks arrive in the order of their tokens: each has its caller's context.
                assert self._loop is not None
                asyncio.run_coroutine_threadsafe(self._drive(), self._loop)
                return
            if self._woken:
                return
            self._woken = True
        # Outside: the wake gives up the GIL, and the loop that it wakes would stop at the gate at once.
        self.wake(self._run)

    def wake(self, callback: Callable[..., object], *args: object) -> None:
        """Run a callback on the resource's loop; from any thread. Nothing happens if that loop is gone."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                # Closed since we looked: `fail` has resolved all calls, or will.
                return

    def drop(self, entry: _Entry) -> bool:
        """Take a queued call out of the order; False if it has started."""
        with self.gate:
            if entry.state is not _QUEUED:
                return False
            entry.state = _DROPPED
            self.dropped += 1
            return True

    def run_inline(self, entry: _Entry) -> None:
        """Run a call that the resource's own thread made, at once: waiting for its turn could never end."""
        with self.gate:
            self.submitted += 1
        entry.state = _RUNNING
        outer, self.running = self.running, entry
        self._execute(entry)
        self.running = outer

    def _run(self) -> None:
        """Run what stands in the queue now, and come again for the rest: timers and coroutines get their turn."""
        with self.gate:
            self._woken = False
            count = len(self._queue)
        # Held outcomes go out at the end, or as soon as the burst turns out not to be a quick one. A burst of two or
        # three may be a reader that asks ahead, who wants the first as soon as it is there.
        hold_until = perf_counter() + _HOLD if count > 3 else 0.0
        held: set[Port] = set()
        for left in range(count - 1, -1, -1):
            with self.gate:
                if not self._queue or self._queue[0].coroutine:
                    break  # its task will come, run what stands before it, and call us again
                entry = self._queue.popleft()
                if entry.state is not _QUEUED:
                    continue
                entry.state = _RUNNING
                self.running = entry
            hold = left > 0 and perf_counter() < hold_until
            if hold and entry.port is not None:
                held.add(entry.port)
            self._execute(entry, hold=hold)
            self.running = None
            del entry  # see `_theirs`
        for port in held:
            port.flush()
        self._go_on()

    def _go_on(self) -> None:
        with self.gate:
            if self._queue:
                if not self._queue[0].coroutine and not self._woken:
                    self._woken = True
                    assert self._loop is not None
                    self._loop.call_soon(self._run)
                return
            ended = self._closing and not self._tasks
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
        if entry.state is _RUNNING:
            entry.state = _FINISHED
        elif entry.state is _DROPPED:  # a Submission, by its future
            with self.gate:
                self.dropped += 1
            return
        entry.settle_later(value, holdable(error), hold=hold)

    async def _drive(self) -> None:
        """The task of a coroutine call: runs what stands before the first token, then the coroutine of that token.

        There is a task for each token, and they take the tokens in the order of the queue. That is each its own, except
        when a finalizer made a call in the middle of `put`: then the later token's task may come first.
        """
        while True:
            with self.gate:
                if not self._queue:
                    return  # `fail` was here
                entry = self._queue.popleft()
                started = entry.state is _QUEUED
                if started:
                    entry.state = _RUNNING
                    if entry.coroutine:
                        self._tasks[entry] = None
                    else:
                        self.running = entry
            if entry.coroutine:
                break
            if started:
                self._execute(entry)
                self.running = None
        with self.gate:
            if self._queue and not self._woken:
                self._woken = True
                assert self._loop is not None
                self._loop.call_soon(self._run)
        if started:
            await self._await(entry)
        del entry
        self._go_on()

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
            if isinstance(exc, asyncio.CancelledError):
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


async def outlast(future: asyncio.Future[R]) -> R:
    """Wait for a future to the end even if cancelled meanwhile; then the cancellation goes on."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what the caller gets
        raise cancelled
    return future.result()


def signal() -> ThreadFuture[None]:
    """A concurrent future that its waiters cannot cancel."""
    future: ThreadFuture[None] = ThreadFuture()
    future.set_running_or_notify_cancel()
    return future


def arrival(future: ThreadFuture[R]) -> asyncio.Future[R]:
    """The outcome of a concurrent future, on the running loop."""
    return asyncio.wrap_future(future)


def _label(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
