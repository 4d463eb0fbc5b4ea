"""Code that may block its loop: by a pattern, or because it says so itself.

    SlowCallbackDetector(allow=["app/startup.py:load_*"])
    with offload.may_block("reads its settings once"): ...
    @offload.may_block("runs before the server listens")

Whoever says so says it for all that the code calls, and for nobody else: `may_block` holds for the task that is inside,
also while it awaits, and other tasks of the loop are judged as ever.
"""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from .record import Frame

P = ParamSpec("P")
R = TypeVar("R")

# By thread: who is inside now, once for each time; None: a plain callback. Appended and taken by that thread only.
_inside: dict[int, list[asyncio.Task[Any] | None]] = {}


class may_block:
    """Lets the code inside block its loop: a detector gives what it finds there the verdict "pass".

    Args:
        reason: why; for whoever reads the code.

    A context manager, and a decorator for functions and coroutine functions. Costs half a microsecond, also if no
    detector runs. It can be used again, and inside itself.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._entered: list[asyncio.Task[Any] | None] = []

    def __enter__(self) -> Self:
        task = _current()
        self._entered.append(task)
        _inside.setdefault(get_ident(), []).append(task)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        task = self._entered.pop()
        inside = _inside[get_ident()]
        inside.remove(task)
        if not inside:
            del _inside[get_ident()]

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]:
        reason = self.reason
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with may_block(reason):
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with may_block(reason):
                return function(*args, **kwargs)

        return called


def _current() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_inside(ident: int, task: asyncio.Task[Any] | None) -> bool:
    """Whether that task, or plain callback, on that thread is inside a `may_block` now; any thread."""
    return task in list(_inside.get(ident, ()))


class Allowed:
    """What may block, as the user gave it: "glob-of-file:function", the function's name or qualified name a glob too.

    Raises:
        ValueError: there is no colon in one of them.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns: list[tuple[str, str]] = []
        for pattern in patterns:
            file, colon, function = pattern.rpartition(":")
            if not (colon and file and function):
                raise ValueError(f"allow has {pattern!r}, expected 'glob-of-file:function'")
            self._patterns.append((file, function))
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, stack: Sequence[Frame]) -> bool:
        """Whether one of these lines is of a function that may block, with all that it calls."""
        return bool(self._patterns) and any(self._has(frame.file, frame.function) for frame in stack)

    def _has(self, file: str, function: str) -> bool:
        known = self._known.get((file, function))
        if known is None:
            path = file.replace("\\", "/")
            names = (function, function.rpartition(".")[2])
            known = any(
                (fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"*/{glob}"))
                and any(fnmatch.fnmatchcase(name, wanted) for name in names)
                for glob, wanted in self._patterns
            )
            if len(self._known) < 10_000:
                self._known[(file, function)] = known
        return known
