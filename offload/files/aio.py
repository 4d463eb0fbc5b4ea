"""aiofiles, on a thread of the file's own.

    async with offload.open("big.log", "rb") as file:
        async for line in file: ...

aiofiles sends each call to a thread pool that the whole program shares, so a slow disk here delays a name lookup there.
What `open` gives is aiofiles' own object with its whole API; only its calls run on one LoopThread that nobody else has.

Promises:
    - Calls on one file run in the order made; a blocked file blocks only itself. The default executor is never used.
    - The file is opened and closed on its thread too (aiofiles' context manager closes on the shared pool), and the
      thread has ended when `close()` or the block has. A file that is dropped unclosed, or still open when the
      interpreter exits, is closed there as well; if that fails, it is logged.
    - Cancelled while it opens, closes, or does what it was called for, it waits until that has ended, so nothing stays
      open; a call that has not begun never runs, but closing always does.
    - A call on a closed file raises ClosedResourceError, which is the ValueError that `io` raises.
    - With `executor=` the calls run there, as with aiofiles, and no thread is made.

`tempfile` has aiofiles' temporary files in the same form (a spooled one works in memory, on your loop, until it grows
out of it). `os` and `ospath` have aiofiles' functions; these have no file of their own, so each call gets a thread for
itself (0.4 to 0.9 ms), or runs on the LoopThread given as `executor=`. `stdin`, `stdout` and `stderr`, as text and as
`_bytes`, have one thread a stream, started when it is first used. A cancelled read of stdin is abandoned, for nobody
knows when somebody will type.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os as _os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Executor
from os import PathLike, fsdecode
from tempfile import TemporaryDirectory, _TemporaryFileWrapper
from types import ModuleType, SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import aiofiles
import aiofiles.os
import aiofiles.ospath
import aiofiles.tempfile
from aiofiles.threadpool.binary import AsyncIndirectBufferedIOBase
from aiofiles.threadpool.text import AsyncTextIndirectIOWrapper

from ..errors import ClosedResourceError, ForkedError
from ..loops import LoopThread, outlast
from ..loops.call import OnCancel, interrupted_by_user
from ..loops.calls import Calls

if TYPE_CHECKING:
    from _typeshed import (
        FileDescriptorOrPath,
        OpenBinaryMode,
        OpenBinaryModeReading,
        OpenBinaryModeUpdating,
        OpenBinaryModeWriting,
        OpenTextMode,
    )
    from aiofiles.threadpool.binary import AsyncBufferedIOBase, AsyncBufferedReader, AsyncFileIO
    from aiofiles.threadpool.text import AsyncTextIOWrapper

T = TypeVar("T")

log = logging.getLogger("offload")

_UNHEARD = "%r was left unclosed, and could not be closed"
_PATIENCE = 5.0  # seconds after Ctrl-C, as a LoopThread's exit_timeout


class _Hop:
    """Stands where aiofiles expects the event loop, of which it wants `run_in_executor` only.

    A Call answers on whichever loop awaits it, is waited for if it is cancelled while it runs, carries context
    variables, and costs less than the concurrent future with a wrapper that an event loop makes for an executor.
    """

    def run_in_executor(self, executor: Executor, function: Callable[[], Any]) -> asyncio.Future[Any]:
        if not isinstance(executor, LoopThread):
            return asyncio.get_running_loop().run_in_executor(executor, function)
        if isinstance(function, functools.partial):  # so that a warning names `read`, not the partial with all its data
            return executor.call(function.func, *function.args, **function.keywords)
        return executor.call(function)


class _Keeper(_Hop):
    """Sees that one file is closed, whatever happens.

    It knows the file proper, not aiofiles' object around it, which may be dropped. All ways to close lead to `_end`,
    which its thread calls as its last act.
    """

    def __init__(self, name: str, executor: Executor | None) -> None:
        self.name = name
        self._own = LoopThread(name, on_close=self._end) if executor is None else None
        self.executor: Executor = self._own or executor  # type: ignore[assignment]  # one of them is
        self._gate = threading.Lock()
        self._raw: Any = None
        self._opened = False
        self._wanted = True
        self._closing = False
        self._close: Callable[[Any], object] = _leave

    def run_in_executor(self, executor: Executor, function: Callable[[], Any]) -> asyncio.Future[Any]:
        if self._opened:
            return super().run_in_executor(executor, function)
        self._opened = True
        if isinstance(function, functools.partial):
            opening = functools.partial(self._make, function.func, *function.args, **function.keywords)
        else:
            opening = functools.partial(self._make, function)
        return super().run_in_executor(executor, opening)

    def _make(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Open the file; on its thread."""
        raw = function(*args, **kwargs)
        with self._gate:
            if self._wanted:
                self._raw = raw
                return raw
        return _leave(raw)  # another kind of executor's future was cancelled while this ran

    # In messages a call is called by what it runs.
    _make.runs_its_argument = True  # type: ignore[attr-defined]

    async def start(self) -> None:
        if self._own is not None:
            await self._own.start()

    def keep(self, file: Any) -> None:
        """The file is open: from now on its thread ends with it."""
        if self._own is None:
            return
        file.close = self.close
        if hasattr(file, "cleanup"):  # a folder's other name for it
            file.cleanup = self.close
        weakref.finalize(file, self._drop).atexit = False  # at exit the thread closes it by itself

    async def close(self) -> None:
        """In place of the file's own `close`, when it has a thread of its own; closing twice is allowed."""
        await self._end_thread(_close)

    async def leave(self) -> None:
        """At the end of the block."""
        if self._own is None:
            # Cancelled while it waits its turn, it would be dropped, and the file left to the garbage collector.
            leaving = super().run_in_executor(self.executor, functools.partial(_leave, self._raw))
            await outlast(leaving, patience=self._patience)
            return
        closed_before = self._closing
        await self._end_thread(_leave)
        if closed_before and isinstance(self._raw, _TemporaryFileWrapper):
            # Closing has left the file on disk if it is one with delete_on_close=False; leaving deletes it.
            async with LoopThread(self.name, on_close=functools.partial(_leave, self._raw)):
                pass

    def _patience(self) -> float | None:
        if isinstance(self.executor, LoopThread):
            return self.executor._mailbox.patience()
        return _PATIENCE if interrupted_by_user() else None

    async def give_up(self) -> None:
        """Nobody wants the file any more: opening it failed or was cancelled."""
        with self._gate:
            self._wanted = False
        if self._own is not None:
            await self._own.aclose()
        elif self._raw is not None:
            try:
                await self.leave()
            except Exception:
                log.exception(_UNHEARD, self.name)

    async def _end_thread(self, close: Callable[[Any], object]) -> None:
        assert self._own is not None
        first = not self._closing
        if first:
            self._closing, self._close = True, close
        try:
            await self._own.aclose()
        except Exception:
            if first:
                raise

    def _drop(self) -> None:
        """The file was dropped; on any thread, at any time."""
        assert self._own is not None
        self._own.shutdown(wait=False)

    def _end(self) -> None:
        """Close the file; on its thread, after its last call."""
        if self._raw is None:
            return
        try:
            self._close(self._raw)
        except Exception:
            if self._closing:
                raise
            log.exception(_UNHEARD, self.name)


def _leave(raw: Any) -> None:
    raw.__exit__(None, None, None)


def _close(raw: Any) -> None:
    if isinstance(raw, TemporaryDirectory):
        raw.cleanup()
    else:
        raw.close()


class Opening(Generic[T]):
    """A file on its way: await it, or use it as `async with`."""

    def __init__(self, name: str, make: Callable[..., Awaitable[Any]], executor: Executor | None) -> None:
        self._make = make
        self._keeper = _Keeper(name, executor)
        self._begun = False
        self._obj: Any = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def __aenter__(self) -> T:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._obj = None
        await self._keeper.leave()

    async def _open(self) -> T:
        if self._obj is None:
            if self._begun:
                raise ClosedResourceError(f"{self._keeper.name!r} was opened before; open it anew")
            self._begun = True
            await self._keeper.start()
            try:
                file = await self._make(loop=self._keeper, executor=self._keeper.executor)
            except BaseException:
                await self._keeper.give_up()
                raise
            self._keeper.keep(file)
            self._obj = file
        file_: T = self._obj
        return file_


class OpeningFolder(Opening[Any]):
    """A temporary folder on its way; the block gets its path, as with `tempfile.TemporaryDirectory`."""

    async def __aenter__(self) -> str:
        name: str = (await self._open()).name
        return name


@overload
def open(
    file: FileDescriptorOrPath,
    mode: OpenTextMode = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[AsyncTextIOWrapper]: ...
@overload
def open(
    file: FileDescriptorOrPath,
    mode: OpenBinaryMode,
    buffering: Literal[0],
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[AsyncFileIO]: ...
@overload
def open(
    file: FileDescriptorOrPath,
    mode: OpenBinaryModeReading | OpenBinaryModeUpdating,
    buffering: Literal[-1, 1] = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[AsyncBufferedReader]: ...
@overload
def open(
    file: FileDescriptorOrPath,
    mode: OpenBinaryModeWriting,
    buffering: Literal[-1, 1] = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[AsyncBufferedIOBase]: ...
@overload
def open(
    file: FileDescriptorOrPath,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[Any]: ...
def open(
    file: FileDescriptorOrPath,
    mode: OpenTextMode | OpenBinaryMode | str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    executor: Executor | None = None,
) -> Opening[Any]:
    """Open a file as the built-in `open` does, on a thread of its own; use it as `async with`, or await it.

    Args:
        file … opener: as for the built-in `open`.
        loop: taken for aiofiles' sake; a call answers on whichever loop awaits it.
        executor: where the calls run instead; a LoopThread keeps their order.

    Raises (when awaited or entered):
        OSError: as `open`; the thread has ended then.

    Its methods are aiofiles' coroutines: they take their place when they are awaited.
    """
    name = fsdecode(file) if isinstance(file, str | bytes | PathLike) else repr(file)
    arguments: tuple[Any, ...] = (file, mode, buffering, encoding, errors, newline, closefd, opener)
    return Opening(f"file {name}", functools.partial(aiofiles.open, *arguments), executor)


# --- temporary files -------------------------------------------------------------------------------------------


def _temporary(function: Callable[..., Any], kind: Callable[..., Opening[Any]] = Opening) -> Callable[..., Any]:
    @functools.wraps(function)
    def temporary(*args: Any, loop: Any = None, executor: Executor | None = None, **kwargs: Any) -> Opening[Any]:
        return kind(f"file {function.__name__}", functools.partial(function, *args, **kwargs), executor)

    return temporary


# --- functions -------------------------------------------------------------------------------------------------

_hop: Any = _Hop()


def _alone(function: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """The same with a thread for each call."""

    @functools.wraps(function)
    async def alone(*args: Any, loop: Any = None, executor: Executor | None = None, **kwargs: Any) -> Any:
        if executor is not None:
            return await function(*args, loop=_hop, executor=executor, **kwargs)
        async with LoopThread(function.__name__) as thread:
            return await function(*args, loop=_hop, executor=thread, **kwargs)

    return alone


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a blocking function one to await, in the form of the others here."""
    return _alone(aiofiles.os.wrap(function))


def _all_alone(module: ModuleType, **others: Any) -> SimpleNamespace:
    functions = {name: _alone(getattr(module, name)) for name in module.__all__ if name not in ("path", "wrap")}
    return SimpleNamespace(**functions, **others)


# --- the standard streams --------------------------------------------------------------------------------------


class _Standard(_Hop):
    """The thread of one standard stream, started when it is first used."""

    def __init__(self, name: str, on_cancel: OnCancel, exit_timeout: float) -> None:
        self._name = name
        self._on_cancel: OnCancel = on_cancel
        self._exit_timeout = exit_timeout
        self._thread: LoopThread | None = None
        self._renew()
        if hasattr(_os, "register_at_fork"):
            _os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._gate = threading.Lock()  # in a forked child: a thread that is not here may have held it

    def run_in_executor(self, executor: Executor | None, function: Callable[[], Any]) -> asyncio.Future[Any]:
        try:
            return self._started(None).call(function)
        except ForkedError:
            return self._started(self._thread).call(function)

    def _started(self, not_this: LoopThread | None) -> Calls:
        with self._gate:
            if self._thread is None or self._thread is not_this:
                # Blocks the loop until the thread runs, once: an await here would let a later call overtake this one.
                self._thread = LoopThread(self._name, exit_timeout=self._exit_timeout).__enter__()
            return self._thread.options(on_cancel=self._on_cancel)


_stdin: Any = _Standard("stdin", "abandon", 0.5)  # at exit nobody waits long for somebody to type
_stdout: Any = _Standard("stdout", "wait", _PATIENCE)
_stderr: Any = _Standard("stderr", "wait", _PATIENCE)

stdin = AsyncTextIndirectIOWrapper("sys.stdin", _stdin, None, indirect=lambda: sys.stdin)
stdout = AsyncTextIndirectIOWrapper("sys.stdout", _stdout, None, indirect=lambda: sys.stdout)
stderr = AsyncTextIndirectIOWrapper("sys.stderr", _stderr, None, indirect=lambda: sys.stderr)
stdin_bytes = AsyncIndirectBufferedIOBase("sys.stdin.buffer", _stdin, None, indirect=lambda: sys.stdin.buffer)
stdout_bytes = AsyncIndirectBufferedIOBase("sys.stdout.buffer", _stdout, None, indirect=lambda: sys.stdout.buffer)
stderr_bytes = AsyncIndirectBufferedIOBase("sys.stderr.buffer", _stderr, None, indirect=lambda: sys.stderr.buffer)


if TYPE_CHECKING:  # what they take and give is what aiofiles' stubs say
    from aiofiles import os as os
    from aiofiles import ospath as ospath
    from aiofiles import tempfile as tempfile
else:
    tempfile = SimpleNamespace(
        NamedTemporaryFile=_temporary(aiofiles.tempfile.NamedTemporaryFile),
        TemporaryFile=_temporary(aiofiles.tempfile.TemporaryFile),
        SpooledTemporaryFile=_temporary(aiofiles.tempfile.SpooledTemporaryFile),
        TemporaryDirectory=_temporary(aiofiles.tempfile.TemporaryDirectory, OpeningFolder),
    )
    ospath = _all_alone(aiofiles.ospath)
    os = _all_alone(aiofiles.os, path=ospath, wrap=_wrap)
