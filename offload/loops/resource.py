"""A blocking object that never leaves its thread.

    async with Resource(lambda: sqlite3.connect(path), interrupt=sqlite3.Connection.interrupt) as db:
        rows = await db.call(lambda c: c.execute("select 1").fetchall())    # one hop for three calls

    Resource ── makes ──► LoopThread ── runs ──► factory() ─► the object ─► close(object)
        │                                            ▲
        └─ gives ──► Handle.call(function, …) ───────┘ function(object, …), in the order made

Promises:
    - The factory, every call and the close run on one thread that nobody else has.
    - What the factory made is closed exactly once: at the end of the block, if entering it was cancelled, before it is
      made again, and at the interpreter's exit.
    - `interrupt` is called for the call that runs, never for the next one, again and again until that call has ended.
    - `exclusive()` holds the queue: nobody else's call runs between the calls of the span.
    - `iter` reads ahead in chunks, and closes the source on its thread when its consumer stops.
    - With `restart`, an object that broke is closed and made again before the next call, so often in a row at most;
      then every call gets BrokenResourceError. A call never runs twice: the one that broke it gets its own error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future as ThreadFuture
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from ..errors import BrokenResourceError, OffloadError
from .call import Call, OnCancel, outlast
from .calls import Calls, Stats
from .thread import LoopThread

if TYPE_CHECKING:
    import asyncio

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger("offload")

BROKEN = (OSError, EOFError)


class Handle(Generic[T]):
    """The way to an object on its thread; a Resource gives it. For any loop and thread, while that is open."""

    def __init__(self, target: _Target[T], calls: Calls) -> None:
        self._target = target
        self._calls = calls

    def call(self, function: Callable[Concatenate[T, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run `function(object, *args, **kwargs)` on the object's thread; as LoopThread.call."""
        return self._calls.call(self._target.apply, function, *args, **kwargs)

    def run(
        self, function: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Call[R]:
        """Run a coroutine function with the object on its thread's loop; as LoopThread.run."""
        return self._calls.run(self._target.apply_coroutine, function, *args, **kwargs)

    def submit(self, function: Callable[Concatenate[T, P], R], /, *args: P.args, **kwargs: P.kwargs) -> ThreadFuture[R]:
        """As `call`, for plain threads; as LoopThread.submit."""
        return self._calls.submit(self._target.apply, function, *args, **kwargs)

    async def iter(
        self, function: Callable[[T], Iterable[R]], /, *, chunk: int = 64, prefetch: int = 1
    ) -> AsyncGenerator[R, None]:
        """The items of `function(object)`, fetched on the object's thread, `chunk` of them a hop.

        Args:
            function: gives an iterable (a cursor, an open file, a generator); it and its items are made on the thread.
            chunk: items for one hop.
            prefetch: chunks that are fetched while the consumer works on one.

        Other calls get their turn between chunks. When the consumer stops (at the end, by `break`, an exception or
        cancellation) the iterator's own `close`, if it has one and is not the object itself, runs on the thread;
        `contextlib.aclosing` makes that happen at once, and not when the generator is collected. It runs too before the
        object is closed. If the object is made again meanwhile, the iteration ends with BrokenResourceError.
        """
        if chunk < 1 or prefetch < 0:
            raise ValueError(f"chunk is {chunk}, prefetch is {prefetch}; expected at least 1 and 0")

        source = _Chunks(self._target, function, chunk)  # made here, so that cancelling cannot lose what it opens
        ahead: deque[Call[list[R]]] = deque()
        try:
            await self.call(source.open)
            while True:
                while len(ahead) <= prefetch:
                    ahead.append(self.call(source.take))
                items = await ahead.popleft()
                for item in items:
                    yield item
                if not items:
                    return
        finally:
            for call in ahead:
                if not call.cancel() and not call.cancelled():
                    call.exception()  # seen: the consumer did not come so far
            with contextlib.suppress(OffloadError):  # closed or broken: the object took its sources along
                await outlast(self._calls.plain().call(source.close), patience=self._calls._mailbox.patience)

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Handle[T]]:
        """A span of calls that nobody else gets into.

            async with handle.exclusive() as tx:
                await tx.call(begin)
                await tx.call(commit)

        It begins when the calls made before it have ended; calls that others make meanwhile wait until it ends. Within
        the block use `tx`: a call by the handle itself would wait for the span, and raises DeadlockError, as closing
        there does. Of the options `nowait` counts; to wait for so long and no longer, use `asyncio.timeout`.
        """
        async with self._calls.exclusive() as calls:
            yield Handle(self._target, calls)

    def options(
        self, *, timeout: float | None = None, on_cancel: OnCancel | None = None, nowait: bool | None = None
    ) -> Handle[T]:
        """The same object, with other rules for the calls made through what this returns; as LoopThread.options."""
        return Handle(self._target, self._calls.options(timeout=timeout, on_cancel=on_cancel, nowait=nowait))

    def stats(self) -> Stats:
        """How the calls fare; as LoopThread.stats."""
        return self._calls.stats()


class Resource(Generic[T]):
    """An object that blocks, made, used and closed on a thread of its own.

    Args:
        factory: makes it, on its thread.
        close: closes it, on its thread; by default its `close` method, if it has one.
        interrupt: makes the call that runs return soon; called from the loop of whoever cancels a call that was made
            with `on_cancel="interrupt"` (which is then the default), so it must be safe from other threads and quick.
        restart: how often in a row it may be made again after it broke; 0: never.
        broken: the exceptions that mean that it is broken, raised by a call.
        backoff: seconds before it is made again, doubled each time in a row.
        name: of the thread; by default the factory's.
        loop_factory, max_calls, exit_timeout, debug: as for LoopThread.

    Use it as `async with`, which gives a Handle, or by `start()` and `aclose()`; or as `with`, for plain threads.
    """

    def __init__(
        self,
        factory: Callable[[], T],
        /,
        *,
        close: Callable[[T], object] | None = None,
        interrupt: Callable[[T], object] | None = None,
        restart: int = 0,
        broken: tuple[type[BaseException], ...] = BROKEN,
        backoff: float = 0.1,
        name: str | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        max_calls: int = 10_000,
        exit_timeout: float = 5.0,
        debug: bool | None = None,
    ) -> None:
        if restart < 0 or backoff < 0:
            raise ValueError(f"restart is {restart}, backoff is {backoff} s; expected at least 0")
        self.name = str(name or getattr(factory, "__name__", "resource"))
        self._target = _Target(self.name, factory, close, restart, broken, backoff)
        self._thread = LoopThread(
            self.name,
            loop_factory=loop_factory,
            on_close=self._target.close,
            max_calls=max_calls,
            exit_timeout=exit_timeout,
            debug=debug,
        )
        self._target.closing = self._thread.closing
        self._handle = Handle(self._target, self._thread)
        if interrupt is not None:
            self._thread.interrupter = lambda: self._target.interrupt(interrupt)
            self._handle = self._handle.options(on_cancel="interrupt")

    async def start(self) -> Handle[T]:
        """Start the thread and make the object there.

        Raises:
            whatever the factory raises; the thread has ended then.

        Cancelled, it waits until the object is made, closes it and ends the thread.
        """
        await self._thread.start()
        try:
            await self._thread.call(self._target.make)
        except BaseException:
            await self._thread.aclose()
            raise
        return self._handle

    async def aclose(self) -> None:
        """End the calls that are queued, close the object, end the thread; as LoopThread.aclose."""
        await self._thread.aclose()

    def close(self, timeout: float | None = None) -> None:
        """As `aclose`, for plain threads; as LoopThread.close."""
        self._thread.close(timeout)

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._thread.closed

    async def __aenter__(self) -> Handle[T]:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Handle[T]:
        self._thread.__enter__()
        try:
            self._thread.submit(self._target.make).result()
        except BaseException:
            self._thread.close()
            raise
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Target(Generic[T]):
    """The object and its life, on its thread."""

    def __init__(
        self,
        name: str,
        factory: Callable[[], T],
        close: Callable[[T], object] | None,
        restart: int,
        broken: tuple[type[BaseException], ...],
        backoff: float,
    ) -> None:
        self.name = name
        self.closing = threading.Event()  # the thread's own
        self.sources: list[_Chunks[T, Any]] = []  # that are open
        self._factory = factory
        self._close = close
        self._budget = restart
        self._broken = broken
        self._backoff = backoff
        self._object: list[T] = []  # it, or nothing: before it is made, and after it broke
        self._cause: BaseException | None = None  # of its last break
        self._restarts = 0  # in a row

    def make(self) -> None:
        self._object.append(self._factory())

    def apply(self, function: Callable[Concatenate[T, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call on the object, made again if it broke."""
        target = self._whole()
        try:
            result = function(target, *args, **kwargs)
        except self._broken as exc:
            self._break(target, exc)
            raise
        self._restarts = 0
        return result

    async def apply_coroutine(
        self, function: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        target = self._whole()
        try:
            result = await function(target, *args, **kwargs)
        except self._broken as exc:
            self._break(target, exc)
            raise
        self._restarts = 0
        return result

    # In messages a call is called by what it runs.
    apply.runs_its_argument = apply_coroutine.runs_its_argument = True  # type: ignore[attr-defined]

    def interrupt(self, interrupt: Callable[[T], object]) -> None:
        """From any thread, while a call runs: so the object does not change under it."""
        for target in self._object:
            interrupt(target)

    def close(self) -> None:
        """Close the object, if there is one, and before it what is read from it."""
        for source in list(self.sources):
            try:
                source.close()
            except Exception:
                log.warning("what is read from %r could not be closed", self.name, exc_info=True)
        if self._object:
            target = self._object.pop()
            if self._close is not None:
                self._close(target)
            else:
                close = getattr(target, "close", None)
                if close is not None:
                    close()

    def _break(self, target: T, cause: BaseException) -> None:
        if not self._budget or not self._object or self._object[0] is not target:
            return  # another coroutine had the broken one too
        self._cause = cause
        try:
            self.close()
        except Exception:
            log.warning("%r broke, and could not be closed either", self.name, exc_info=True)

    def _whole(self) -> T:
        while not self._object:
            if self._restarts >= self._budget or self.closing.is_set():
                again = f"was made again {self._restarts} of {self._budget} times in a row"
                if self.closing.is_set():
                    again = "is being closed"
                raise BrokenResourceError(f"{self.name!r} broke and {again}: {self._cause!r}") from self._cause
            # Not `time.sleep`: closing ends the wait.
            if self.closing.wait(self._backoff * 2**self._restarts):
                continue
            self._restarts += 1
            try:
                self.make()
            except Exception as exc:
                self._cause = exc
        return self._object[0]


class _Chunks(Generic[T, R]):
    """An iterable taken by the chunk; on the object's thread."""

    def __init__(self, owner: _Target[T], function: Callable[[T], Iterable[R]], size: int) -> None:
        self._owner = owner
        self._function = function
        self._size = size
        self._iterator: Iterator[R] | None = None
        self._error: Exception | None = None

    def open(self, target: T) -> None:
        self._iterator = iter(self._function(target))
        self._closes = self._iterator is not target  # a file is its own iterator, and is used further
        self._owner.sources.append(self)

    def take(self, target: T) -> list[R]:
        """Up to `size` items, none at the end. An error is raised when the items before it have been given out."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._iterator is None:
            raise BrokenResourceError(f"{self._owner.name!r} was made again while it was read from; begin again")
        items: list[R] = []
        try:
            items.extend(islice(self._iterator, self._size))
        except Exception as exc:
            if not items:
                raise
            self._error = exc
        return items

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            self._owner.sources.remove(self)
            close = getattr(iterator, "close", None)
            if close is not None and self._closes:
                close()
