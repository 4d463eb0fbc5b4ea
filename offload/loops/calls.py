"""The ways to call into a thread: awaited, from plain threads, by callback, in a span of one's own; and how calls fare.

Every method takes the call's place in the queue before it returns. What the caller may rely on is written in `call.py`
(cancelling, timeouts, context) and `mailbox.py` (order, no hang).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future as ThreadFuture
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .call import DEFAULT, Call, CoroutineCall, OnCancel, Options, Post, Submission
from .mailbox import Mailbox, Span
from .port import Notice, port_here

P = ParamSpec("P")
R = TypeVar("R")


class Stats(NamedTuple):
    """How the calls of one resource fare.

    Attributes:
        queued: calls that wait now.
        running: the plain call that runs now, by name; None: none does.
        running_for: seconds since it began; 0.0 if none runs.
        oldest_wait: seconds that the call at the head of the queue has waited; 0.0 if none waits.
        submitted, failed, dropped, abandoned: counts since the start; a failed call raised, a dropped one never ran, of
            an abandoned one nobody took the outcome.
        busy: share of the time since the start in which a plain call ran, 0.0 to 1.0.
    """

    queued: int
    running: str | None
    running_for: float
    oldest_wait: float
    submitted: int
    failed: int
    dropped: int
    abandoned: int
    busy: float


class Calls:
    """The calls that cross to one thread, all with the same options. LoopThread is one; `options` makes others."""

    def __init__(self, mailbox: Mailbox, options: Options = DEFAULT, span: Span | None = None) -> None:
        self._mailbox = mailbox
        self._options = options
        self._span = span

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a plain function on the thread; the place in its queue is taken now, awaiting is optional.

        Returns:
            A future of the running loop, with the function's result or exception. Cancelling it drops the call if it
            is queued; if it runs, `on_cancel` says what happens: by default the future stays pending until the function
            has returned, then it is cancelled.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError: nothing was queued.
            QueueFullError: the queue is at its bound, and the call asked not to wait.
            RuntimeError: no event loop runs here; plain threads use `submit`.
        """
        mailbox = self._mailbox
        call: Call[R] = Call(mailbox, function, args, kwargs, self._options, self._span)
        if get_ident() == mailbox.thread_id:
            call.made()
            mailbox.run_inline(call)
            call.settle()
        else:
            mailbox.put(call, nowait=self._options.nowait)
            call.made()
        return call

    def run(self, function: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a coroutine function on the thread's loop; it starts in its place among all calls.

        Cancelling the returned future drops the call if it is queued; if it runs, the coroutine gets CancelledError on
        its own loop, and the future stays pending until its cleanup has ended. Errors as for `call`.
        """
        call: Call[R] = CoroutineCall(self._mailbox, function, args, kwargs, self._options, self._span)
        self._mailbox.put(call, nowait=self._options.nowait)
        call.made()
        return call

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ThreadFuture[R]:
        """Run a plain function on the thread, from any thread, with or without a loop, as an Executor would.

        Of the options `nowait` counts; to wait for so long and no longer, use `result(timeout)`.

        Returns:
            A concurrent future: `result(timeout)` waits for the outcome, `cancel()` drops the call if it is queued.
            Made on the thread itself, the call has run when this returns.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError, QueueFullError: nothing was queued.
        """
        entry = Submission(fn, args, kwargs, self._span)
        if get_ident() == self._mailbox.thread_id:
            self._mailbox.run_inline(entry)
        else:
            self._mailbox.put(entry, nowait=self._options.nowait)
        return entry.future

    def post(self, function: Callable[[], object]) -> None:
        """Queue a function whose outcome nobody waits for; it must not raise. Errors as for `submit`."""
        self._mailbox.put(Post(function, self._span), nowait=self._options.nowait)

    def callback(self, function: Callable[P, object], /) -> Callable[P, None]:
        """A function for a vendor's SDK to call, from any thread; each call runs `function` on the loop that runs now.

        The calls come in the order made, in this caller's context variables, a wake-up a burst. What `function`
        raises goes to the loop's exception handler, never into the SDK. Once the loop is closed, calls are dropped.
        """
        port, context = port_here(), contextvars.copy_context()

        def deliver(*args: P.args, **kwargs: P.kwargs) -> None:
            port.send(Notice(port.loop, context, function, (args, kwargs)))

        return deliver

    def options(
        self, *, timeout: float | None = None, on_cancel: OnCancel | None = None, nowait: bool | None = None
    ) -> Calls:
        """The same thread, with other rules for the calls made through what this returns; what is None stays as it is.

        Args:
            timeout: seconds from making a call until it is given up with TimeoutError.
            on_cancel: what happens to a call that runs when it is cancelled or given up: "wait" until it ends (the
                default), "interrupt" it and wait (see Resource), or "abandon" it: its caller goes on at once, the
                function does too, and its outcome is nobody's. A call that is queued is always dropped.
            nowait: raise QueueFullError if the queue is at its bound.
        """
        old = self._options
        new = Options(
            old.timeout if timeout is None else timeout,
            old.on_cancel if on_cancel is None else on_cancel,
            old.nowait if nowait is None else nowait,
        )
        return Calls(self._mailbox, new, self._span)

    def plain(self) -> Calls:
        """The same thread, without options; inside a span, while it lasts."""
        return Calls(self._mailbox, span=self._span)

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Calls]:
        """A span of calls that nobody else gets into; see Handle.exclusive."""
        span = Span(self._mailbox)
        await span.begin(nowait=self._options.nowait)
        try:
            yield Calls(self._mailbox, self._options, span)
        finally:
            span.end()

    def is_here(self) -> bool:
        """Whether the calling code runs on this thread."""
        return get_ident() == self._mailbox.thread_id

    def stats(self) -> Stats:
        """How the calls fare; from any thread."""
        box, now = self._mailbox, perf_counter()
        running, oldest = box.running, box.oldest
        running_for = now - box.running_since if running else 0.0
        return Stats(
            len(box),
            running.label() if running else None,
            running_for,
            now - oldest if oldest is not None else 0.0,
            box.submitted,
            box.failed,
            box.dropped,
            box.abandoned,
            min(1.0, (box.busy_time + running_for) / (now - box.opened)) if box.opened else 0.0,
        )
