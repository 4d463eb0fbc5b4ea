"""One call across loops, as its caller sees it, and what waits for it.

    Call, CoroutineCall   a future of the caller's loop                                  (`call`, `run`)
    Submission            a concurrent future, for plain threads                         (`submit`)
    Post                  nobody waits for it
    Options               timeout, on_cancel, nowait: what a caller wants done with its calls

Promises:
    - A call cancelled while queued never runs. A running plain function is waited for; a running coroutine is
      cancelled on its own loop and its cleanup is waited for. The cancelled caller sees CancelledError either way.
      With `on_cancel="interrupt"` the resource is asked to end the running call, until it has; with "abandon" the
      caller goes on at once, and the call is counted. A timeout does the same and raises TimeoutError.
    - After Ctrl-C a cancelled caller waits for a running plain function for at most the resource's exit timeout; then
      it goes on, and a warning names the call that blocks and where it stands.
    - StopIteration, which no future can hold, arrives as RuntimeError with the original as its cause.
    - A caller's loop that is gone makes the outcome "abandoned"; nobody else notices.
    - Context variables of the caller hold inside the call.

`mailbox.py` takes calls to the resource's loop, `port.py` brings their outcomes back.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import signal as signals
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ..errors import OffloadError
from .port import Port, port_here

if TYPE_CHECKING:
    from .mailbox import Mailbox, Span

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


class CallState(enum.Enum):
    QUEUED = "queued"
    DROPPED = "dropped"  # cancelled while queued: it never ran
    RUNNING = "running"
    FINISHED = "finished"  # it returned or raised
    INTERRUPTED = "interrupted"  # it was asked to end and did, or its loop ended under it
    ABANDONED = "abandoned"  # nobody waits for its end: its caller went on, or the caller's loop was gone


# A member looked up on its class costs a tenth of a microsecond on Python 3.11, and a call needs six.
QUEUED = CallState.QUEUED
DROPPED = CallState.DROPPED
RUNNING = CallState.RUNNING
FINISHED = CallState.FINISHED
INTERRUPTED = CallState.INTERRUPTED
ABANDONED = CallState.ABANDONED

_AGAIN = 0.05  # seconds between interrupts of one call


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
        self.state = QUEUED

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
        port = self.port
        if port is not None:  # its caller may have gone on at this moment
            self._value, self._error = value, error
            port.send(self, hold=hold)

    def abandon(self) -> None:
        """The loop that asked is closed; from any thread."""
        self.state = ABANDONED
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
            if error is not None and self.state is FINISHED and self._options.on_cancel == "interrupt":
                self.state = INTERRUPTED
            self._give_up(self._cancelled, error)
            return
        if value.__class__ is CoroutineType:
            error = TypeError(f"{self.label()} is a coroutine function; use `run` for it")
            value.close()
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
        if self.state is not ABANDONED:  # that one still runs, and may be asked what it is
            self._forget()
        if self._timer is not None:
            self._timer.cancel()

    def _cancel_task(self) -> None:
        # On the resource's loop, where a call that runs has its task since the step in which it began to run. So each
        # `cancel` reaches the coroutine once; a second time would hit its cleanup.
        if self._task is not None:  # otherwise its loop was ended by force before it began
            self._task.cancel(self._message)


class CoroutineCall(Call[R]):
    """A Call whose function is a coroutine function."""

    __slots__ = ()

    coroutine = True

    def work(self) -> Any:
        # Its task has the caller's context already (`call_soon_threadsafe` copies it).
        assert self._function is not None, "a call runs once"
        awaitable = self._function(*self._args, **self._kwargs)
        if not isinstance(awaitable, Awaitable):
            raise TypeError(
                f"{self.label()} returned {awaitable!r}, expected a coroutine; use `call` for plain functions"
            )
        return awaitable

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
        self.state = QUEUED

    def work(self) -> R | None:
        if not self.future.set_running_or_notify_cancel():
            self.state = DROPPED
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
            self.future.set_running_or_notify_cancel()  # it never ran: `concurrent.futures.wait` waits to be told so


class Post:
    """An entry whose outcome nobody waits for."""

    __slots__ = ("_function", "since", "span", "state")

    coroutine = False
    port = None

    def __init__(self, function: Callable[[], object], span: Span | None = None) -> None:
        self._function = function
        self.span = span
        self.since = perf_counter()
        self.state = QUEUED

    def work(self) -> object:
        return self._function()

    def label(self) -> str:
        return _label(self._function)

    def settle_later(self, value: Any, error: BaseException | None, *, hold: bool = False) -> None:
        # An OffloadError says that the thread is gone, which everybody who waits for something is told as well.
        if error is not None and not isinstance(error, OffloadError):
            log.error("%s, which nobody waits for, raised", self.label(), exc_info=error)


def holdable(error: BaseException | None) -> BaseException | None:
    """The error as a future takes it: asyncio refuses StopIteration, and whoever waits would wait for ever."""
    if isinstance(error, StopIteration):
        wrapped = RuntimeError(f"the call raised StopIteration({error.value!r}), which no future can hold")
        wrapped.__cause__ = error
        return wrapped
    return error


async def outlast(future: asyncio.Future[Any], *, patience: Callable[[], float | None] = lambda: None) -> bool:
    """Wait for a future to the end even if cancelled meanwhile; then the cancellation goes on.

    Args:
        patience: asked at first and when cancelled: how many seconds to go on waiting; None: to the end.

    Returns:
        Whether it has ended; False: the patience is over. What the future raised is raised.
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
    if future.done():
        future.result()
    return future.done()


def signal() -> ThreadFuture[None]:
    """A concurrent future that its waiters cannot cancel."""
    future: ThreadFuture[None] = ThreadFuture()
    future.set_running_or_notify_cancel()
    return future


def unlock(future: ThreadFuture[Any]) -> None:
    """In a forked child: a thread that is not here may have held the future's lock, and nobody waits for it."""
    future._condition, future._waiters = threading.Condition(), []


def arrival(future: ThreadFuture[R]) -> asyncio.Future[R]:
    """The outcome of a concurrent future, on the running loop."""
    return asyncio.wrap_future(future)


def interrupted_by_user() -> bool:
    """Whether the program is on its way out by Ctrl-C or `sys.exit`; where it matters, in a `finally` or `__exit__`."""
    # asyncio.Runner handles SIGINT by a bound method of itself, and counts; there is no public way to ask.
    handler = getattr(signals.getsignal(signals.SIGINT), "func", None)
    if getattr(getattr(handler, "__self__", None), "_interrupt_count", 0):
        return True
    # That handler is gone when the tasks beside the main one are cancelled, and was never there in plain programs. Then
    # the interrupt, or `sys.exit` in a task, is what is being handled, or what the cancellation came in the midst of.
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__context__
    return error is not None


def _label(function: Any, args: tuple[Any, ...] = ()) -> str:
    if args and getattr(function, "runs_its_argument", False):
        function = args[0]
    return getattr(function, "__qualname__", None) or repr(function)
