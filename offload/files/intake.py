"""What files on threads of their own share: a life from `start` to `aclose`, and a way in for what is written.

    OnThread     PacketReader
       │         start, aclose, `async with` around a LoopThread that opens and closes the file
    Writing      FileSink, PacketWriter
                 an Intake in front of it, and the first error of the disk, which everybody is told from then on

Promises:
    - `start` returns once the file is open; it fails as opening does, and leaves no thread behind.
    - `aclose` takes what was accepted to its end; so does the interpreter's exit.
    - A block that raised BrokenResourceError itself is not told a second time at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from ..errors import BrokenResourceError, ClosedResourceError, OffloadError, QueueFullError
from ..loops import LoopThread

T = TypeVar("T")

# As many bytes may wait for the disk: enough to ride out a slow fsync, little enough not to be missed.
MAX_BYTES = 4 << 20


class Done:
    """An awaitable that is done: awaiting it does not give up the loop."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return _NOTHING  # type: ignore[return-value]


_NOTHING: Iterable[Any] = iter(())
DONE = Done()
DROPPED = Done()  # given instead, when the item was not accepted

Overflow = Literal["wait", "raise", "drop"]


class Intake(Generic[T]):
    """Items on their way to a LoopThread, in order, bounded in bytes; a wake and a call for each batch, not each item.

    Args:
        thread: its owner's thread.
        take: called on the thread with each batch, in order; must not raise.
        max_bytes: how much may wait before `put` asks its caller to wait too.

    Attributes:
        dropped: how many items `put` dropped.
    """

    def __init__(self, thread: LoopThread, take: Callable[[list[T]], None], max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, expected at least 1")
        self._thread = thread
        self._take = take
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._items: list[T] = []
        self._accepted = self._taken = 0  # bytes
        self._posted = False
        self.dropped = self._untold = 0
        self._refusal: Callable[[], OffloadError] | None = None
        _intakes.add(self)

    @property
    def waiting_bytes(self) -> int:
        """Bytes accepted that `take` has not finished with."""
        return self._accepted - self._taken

    def put(self, item: T, size: int, overflow: Overflow = "wait") -> Awaitable[None]:
        """Take the next place; from any thread, with or without a loop.

        Args:
            overflow: what happens to an item that would go over the bound while others wait: "wait" takes it and makes
                its caller wait, "raise" raises QueueFullError, "drop" counts it and gives DROPPED.

        Returns:
            DONE, or, over the bound, a Call that ends when this item has been taken. A thread without an event loop
            cannot await: there, `put` itself waits.

        Raises:
            OffloadError: as `refuse` was told, or the thread is gone; nothing was accepted.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if overflow != "wait" and 0 < self.waiting_bytes > self._max_bytes - size:
                if overflow == "raise":
                    raise QueueFullError(
                        f"{self.waiting_bytes} bytes wait for {self._thread.name!r}, {size} more would go over the "
                        f"bound of {self._max_bytes}; await a flush, or call later"
                    )
                self.dropped += 1
                self._untold += 1
                return DROPPED
            self._items.append(item)
            self._accepted += size
            posted, self._posted = self._posted, True
        try:
            if not posted:
                self._thread.post(self.take_all)
            if overflow == "wait" and self.waiting_bytes > self._max_bytes and not self._thread.is_here():
                return self._room()
        except ClosedResourceError:
            pass  # closing since we looked: the owner's on_close calls `finish`, which takes this item too
        except OffloadError as exc:
            # The thread is gone, and the next `put` would not notice: it would rely on what we did not post.
            kind, message, cause = type(exc), str(exc), exc.__cause__
            self.refuse(lambda: _from(kind(message), cause))
            raise
        return DONE

    def take_untold(self) -> int:
        """How many items were dropped since the last time, if there is room to say so; otherwise 0, and later."""
        with self._lock:
            if not self._untold or 2 * self.waiting_bytes > self._max_bytes:
                return 0
            untold, self._untold = self._untold, 0
            return untold

    def _room(self) -> Awaitable[None]:
        """Wait until the item has been taken: by the batch that was posted, or by us if its post is still to come."""
        if asyncio._get_running_loop() is not None:
            return self._thread.call(self.take_all)
        self._thread.submit(self.take_all).result()
        return DONE

    def take_all(self) -> None:
        """Hand what is there to `take`; on the thread."""
        with self._lock:
            self._posted = False
            items, self._items = self._items, []
            upto = self._accepted
        if items:
            self._take(items)
        self._taken = upto

    def finish(self, refusal: Callable[[], OffloadError]) -> None:
        """Accept nothing more and hand over what is there; on the thread."""
        if not isinstance(self._thread.refusal, BrokenResourceError):  # of that the next `put` hears from the thread
            self.refuse(refusal)
        self.take_all()

    def refuse(self, refusal: Callable[[], OffloadError]) -> None:
        """Accept nothing more; from any thread."""
        with self._lock:
            self._refusal = refusal

    def after_fork(self) -> None:
        """In a forked child: what was put in the parent is written there; who puts here is told that it cannot be."""
        self._lock = threading.RLock()
        self._items = []
        self._posted = False


def _from(error: OffloadError, cause: BaseException | None) -> OffloadError:
    error.__cause__ = cause
    return error


_intakes: weakref.WeakSet[Intake[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for intake in list(_intakes):
        intake.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class OnThread(ABC):
    """A file that only its own thread touches; see the head of this module.

    Args:
        path: of the file.
        kind: what the thread is called, before the file's name.
        exit_timeout: as for LoopThread.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, exit_timeout: float = 5.0) -> None:
        self.path = Path(path)
        self._thread = LoopThread(f"{kind} {self.path.name}", on_close=self._finish, exit_timeout=exit_timeout)

    @abstractmethod
    def _open(self) -> None:
        """Open the file; on the thread."""

    @abstractmethod
    def _finish(self) -> None:
        """End it, if it was opened; on the thread."""

    def _enter(self) -> None:
        """It was opened; on the caller's thread."""

    def _leave(self, exc: BaseException | None) -> None:
        """It is about to be closed, on purpose; `exc`: what its block raised. On the caller's thread."""

    async def start(self) -> Self:
        """Open the file, on its thread. Raises as opening does, and has ended the thread then."""
        await self._thread.start()
        try:
            await self._thread.call(self._open)
            self._enter()
        except BaseException as exc:
            self._leave(exc)
            await self._thread.aclose()
            raise
        return self

    async def aclose(self) -> None:
        """Take what was accepted to its end, close the file, end the thread. Cancelling does not shorten it.

        Raises:
            BrokenResourceError: the disk refused something that was accepted.
        """
        self._leave(None)
        await self._thread.aclose()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._leave(exc)
        with _knowing(exc):
            await self._thread.aclose()


@contextlib.contextmanager
def _knowing(exc: BaseException | None) -> Iterator[None]:
    """The end of a block that raised `exc`: what it knows already it is not told again."""
    try:
        yield
    except BrokenResourceError:
        if not isinstance(exc, BrokenResourceError):
            raise


class Writing(OnThread, Generic[T]):
    """A file that is written through an Intake; for plain threads also a `with` block.

    Args:
        title: how errors call it.
        max_bytes: as for Intake.
        exit_timeout: as for LoopThread.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, title: str, max_bytes: int, exit_timeout: float
    ) -> None:
        super().__init__(path, kind, exit_timeout)
        self._title = title
        self._opened = False
        self._error: OSError | None = None
        self._intake: Intake[T] = Intake(self._thread, self._take, max_bytes)

    @abstractmethod
    def _take(self, batch: list[T]) -> None:
        """Write a batch; on the thread. It breaks the file and does not raise."""

    def _put(self, item: T, size: int, overflow: Overflow = "wait") -> Awaitable[None]:
        if not self._opened:
            raise ClosedResourceError(f"{self._title} is not open; use it as `async with`, or await its start()")
        return self._intake.put(item, size, overflow)

    def close(self, timeout: float | None = None) -> None:
        """As `aclose`, for plain threads: blocks until the thread has ended; TimeoutError after `timeout` seconds."""
        self._leave(None)
        self._thread.close(timeout)

    def __enter__(self) -> Self:
        self._thread.__enter__()
        try:
            self._thread.submit(self._open).result()
            self._enter()
        except BaseException as exc:
            self._leave(exc)
            self._thread.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._leave(exc)
        with _knowing(exc):
            self._thread.close()

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """What the disk refuses in here breaks the file for everybody, from now on."""
        try:
            yield
        except OSError as exc:
            self._error = self._error or exc
            self._intake.refuse(self._broken)

    def _check(self) -> None:
        if self._error is not None:
            raise self._broken()

    def _closed(self) -> OffloadError:
        return ClosedResourceError(f"{self._title} is closed")

    def _broken(self) -> OffloadError:
        return _from(BrokenResourceError(f"{self._title} could not be written: {self._error}"), self._error)
