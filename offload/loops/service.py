"""Your own class, its methods on its own thread.

    class Port(offload.Service):
        def on_open(self):                              # on the thread, before the first call
            self.serial = serial.Serial(self.path)
        def on_close(self):                             # on the thread, after the last call
            self.serial.close()
        @offload.method
        def read(self, size: int) -> bytes:             # runs on the thread
            return self.serial.read(size)

    async with Port() as port:
        data = await port.read(5)                       # typed: bytes; wrong arguments are type errors

Promises: those of LoopThread, for every `@method`, plain or `async def`. Within the thread, `self.read.direct(5)` is
the function itself. Attributes are yours: touch what belongs to the thread only in methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from ..errors import ClosedResourceError
from .call import Call, OnCancel
from .calls import Calls, Stats
from .thread import LoopThread

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Service")


class Bound(Generic[P, R]):
    """A method of one service: called, it crosses to the service's thread."""

    def __init__(self, calls: Calls, function: Callable[P, Any], *, coroutine: bool) -> None:
        self._calls = calls
        self._function = function
        self._coroutine = coroutine

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run it on the service's thread; as LoopThread.call, or LoopThread.run for an `async def`."""
        if self._coroutine:
            return self._calls.run(self._function, *args, **kwargs)
        return self._calls.call(self._function, *args, **kwargs)

    @property
    def direct(self) -> Callable[P, Any]:
        """The method itself, for code that is on the service's thread already; an `async def` gives its coroutine."""
        return self._function

    def options(
        self, *, timeout: float | None = None, on_cancel: OnCancel | None = None, nowait: bool | None = None
    ) -> Bound[P, R]:
        """The same method with other rules for its calls; as LoopThread.options."""
        calls = self._calls.options(timeout=timeout, on_cancel=on_cancel, nowait=nowait)
        return Bound(calls, self._function, coroutine=self._coroutine)


class method(Generic[S, P, R]):  # named as `property` and `classmethod` are
    """Marks a method of a Service that runs on the service's thread: callers await it."""

    @overload
    def __init__(self, function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]]) -> None: ...
    @overload
    def __init__(self, function: Callable[Concatenate[S, P], R]) -> None: ...
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._coroutine = inspect.iscoroutinefunction(function)
        self.__doc__ = function.__doc__
        self.__name__ = getattr(function, "__name__", "method")
        self.__wrapped__ = function

    @overload
    def __get__(self, instance: None, owner: type[S]) -> method[S, P, R]: ...
    @overload
    def __get__(self, instance: S, owner: type[S]) -> Bound[P, R]: ...
    def __get__(self, instance: S | None, owner: type[S]) -> method[S, P, R] | Bound[P, R]:
        if instance is None:
            return self
        function = self._function.__get__(instance, owner)
        return Bound(instance._calls(), function, coroutine=self._coroutine)


class Service:
    """The base of a class whose methods run on a thread of its own; see the head of this module.

    Class attributes that a subclass may set: `thread_name`, and `exit_timeout` in seconds (see LoopThread).
    Use it as `async with`, as `with`, or by `start()` and `aclose()`; once.
    """

    thread_name: str | None = None
    exit_timeout: float = 5.0
    _thread: LoopThread | None = None

    def on_open(self) -> object:
        """Called on the thread before the first call; what it raises is raised by `start`, and the thread ends."""

    def on_close(self) -> object:
        """Called on the thread after the last call, if `on_open` has returned; what it raises is raised by `aclose`."""

    async def start(self) -> Self:
        """Start the thread and call `on_open` there."""
        thread, opened = self._make()
        await thread.start()
        try:
            await thread.call(opened)
        except BaseException:
            await thread.aclose()
            raise
        return self

    async def aclose(self) -> None:
        """End the calls that are queued, call `on_close`, end the thread; as LoopThread.aclose."""
        if self._thread is not None:
            await self._thread.aclose()

    def close(self, timeout: float | None = None) -> None:
        """As `aclose`, for plain threads; as LoopThread.close."""
        if self._thread is not None:
            self._thread.close(timeout)

    @property
    def closed(self) -> bool:
        """Whether calls are refused: it was closed, or has not been started, or its thread is gone."""
        return self._thread is None or self._thread.closed

    def stats(self) -> Stats:
        """How the calls fare; as LoopThread.stats."""
        return self._calls().stats()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        thread, opened = self._make()
        thread.__enter__()
        try:
            thread.submit(opened).result()
        except BaseException:
            thread.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _make(self) -> tuple[LoopThread, Callable[[], None]]:
        name = self.thread_name or type(self).__name__
        if self._thread is not None:
            raise ClosedResourceError(f"{name!r} was started before; make a new one")
        is_open = False

        def opened() -> None:
            nonlocal is_open
            self.on_open()
            is_open = True

        def on_close() -> None:
            if is_open:
                self.on_close()

        self._thread = LoopThread(name, on_close=on_close, exit_timeout=self.exit_timeout)
        return self._thread, opened

    def _calls(self) -> Calls:
        if self._thread is None:
            name = self.thread_name or type(self).__name__
            raise ClosedResourceError(f"{name!r} is not started; use it as `async with`, or await its start()")
        return self._thread
