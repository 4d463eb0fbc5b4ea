"""Where a loop's thread stands, who it is that stands there, and which line to blame.

    thread's frames, innermost first        what is taken from them
    ────────────────────────────────        ─────────────────────────────────────────────────────────────
    select, recv_into, …                    `innermost`: whatever the thread is in
    requests.get, …
    handler ◄─────────────────────────────  `blamed`: the innermost line of the user's own
    main                                    coroutines among them: the await chain
    Handle._run
    BaseEventLoop._run_once ◄─────────────  its locals: the handle (so task, callback, context), how many callbacks this
    run_forever, …                          turn has, and which of them runs

The loop pays nothing for it: the handle is read from the frame of the loop while the loop is blocked in it.

Promises: frames are not kept; the text of a line is not looked up; nothing of the program is called but `str` on the
values of the context variables that were asked for.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import contextvars
import dis
import functools
import gc
import inspect
import os
import sysconfig
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import CodeType, FrameType
from typing import Any, NamedTuple

from .callee import called
from .record import Frame

RUN_ONCE: CodeType = asyncio.base_events.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]
RUN: CodeType = asyncio.events.Handle._run.__code__
_RESUME = dis.opmap["RESUME"]
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR

DEEPEST = 200  # frames kept of a stack, from the innermost; a recursion's thousands say no more
TEXT = 200  # characters of a context variable's value


class Who(NamedTuple):
    """Whose step or callback it is, as text."""

    label: str = ""  # what to call it in a list of contributors
    task: str | None = None
    coroutine: str | None = None
    callback: str | None = None
    parent: str | None = None
    context: Mapping[str, str] = {}
    chain: tuple[Frame, ...] = ()


@dataclass(slots=True)
class Look:
    """What one look at a loop's thread gave.

    Attributes:
        at: when, by the detector's clock.
        stack: above the loop's own frames, outermost first.
        turn, turns: which of the callbacks of this turn of the loop runs, from 0, and how many there are.
        ready: callbacks that wait for it to end.
        places: for each frame of the stack its code, and the instruction that runs.
        job: on a resource's loop: it is what the loop is there for.
        allowed: it may block.
        syscall, others, traced, collecting: see `cause.Sample`.
    """

    at: float
    stack: tuple[Frame, ...]
    who: Who
    turn: int = 0
    turns: int = 1
    ready: int = 0
    job: bool = False
    allowed: bool = False
    traced: bool = False
    collecting: bool = False
    syscall: str | None = None
    others: Mapping[int, Frame] = field(default_factory=dict)
    places: tuple[tuple[CodeType, int], ...] = ()

    def call_at(self, frame: Frame | None) -> str | None:
        """What a line of the stack calls, as its source spells it; None: nothing, or not known."""
        for (code, lasti), line in zip(reversed(self.places), reversed(self.stack), strict=False):
            if line == frame:
                return called(code, lasti)
        return None


def look(
    frame: FrameType,
    at: float,
    loop: asyncio.AbstractEventLoop | None,
    *,
    base: int = 0,
    jobs: frozenset[CodeType] | None = None,
    variables: Sequence[contextvars.ContextVar[Any]] = (),
) -> Look:
    """What a thread does whose innermost frame this is; from another thread.

    Args:
        base: id of the frame that runs the loop, where that is not asyncio's own.
        jobs: see `announce.Announced`; None: not a resource's loop. Empty: a resource whose callbacks are all its job,
            only the steps of tasks are not.
    """
    frames: list[FrameType] = []
    job = False
    at_frame: FrameType | None = frame
    while at_frame is not None and id(at_frame) != base:
        code = at_frame.f_code
        if code is RUN_ONCE:
            break
        if jobs and code in jobs:
            job = True
        if code is not RUN:
            frames.append(at_frame)
        at_frame = at_frame.f_back
    else:
        at_frame = None
    if len(frames) > 1 and _only_entered(frames[0]):
        del frames[0]
    kept = frames[DEEPEST - 1 :: -1]
    stack = tuple(_frame(f) for f in kept)
    turn, turns, handle = 0, 1, None
    if at_frame is not None:
        inside = at_frame.f_locals
        handle, turn, turns = inside.get("handle"), inside.get("i", 0), inside.get("ntodo", 1)
        if "ntodo" not in inside:  # it waits for the GIL, behind its selector: nobody's callback
            return Look(at, (), Who("the loop itself"))
    chain = tuple(_frame(f) for f in reversed(frames) if f.f_code.co_flags & _COROUTINE)
    who = _who(handle, loop, stack, chain, variables)
    if jobs is not None and not jobs:
        job = who.task is None
    places = tuple((f.f_code, f.f_lasti) for f in kept)
    return Look(at, stack, who, turn, turns, len(getattr(loop, "_ready", ())), job, places=places)


def _only_entered(frame: FrameType) -> bool:
    """Whether it stands at the beginning of its function, where threads give up the GIL, and nothing is done yet.

    The line is the `def` then, and what goes on is the caller's: its call.
    """
    code, at = frame.f_code.co_code, frame.f_lasti
    return 0 <= at < len(code) and code[at] == _RESUME and not code[at + 1] & 3  # else behind a yield or await


def program(frame: FrameType) -> FrameType:
    """The innermost frame, or the one below a callback of the garbage collector that is not the user's.

    Before 3.12 objects that are made in C set off collections at once; such callbacks, ours too, are then where a call
    in C gives up the GIL, and a thread is seen in them again and again.
    """
    callbacks = {code for c in gc.callbacks if (code := getattr(c, "__code__", None)) and not is_user(code.co_filename)}
    above: FrameType | None = frame
    for _ in range(3):
        if above is None:
            break
        if above.f_code in callbacks:
            return above.f_back or above
        above = above.f_back
    return frame


def below_loop(stack: Sequence[Frame]) -> tuple[Frame, ...]:
    """Of a whole stack, outermost first, what the loop has called."""
    loops = (asyncio.base_events.__file__, asyncio.events.__file__)
    first = max(
        (n + 1 for n, f in enumerate(stack) if f.file in loops and f.function in ("_run_once", "_run")), default=0
    )
    return tuple(stack[first:])


def named(stack: Sequence[Frame], known: Sequence[Frame]) -> tuple[Frame, ...]:
    """A stack with plain names, which get the qualified ones of a stack from nearby, as far as it goes."""
    full = {(frame.file, frame.function.rpartition(".")[2]): frame.function for frame in known}
    return tuple(f._replace(function=full.get((f.file, f.function), f.function)) for f in stack)


def lines(
    frames: Mapping[int, FrameType], without: Container[int], ours: Container[int] = (), most: int = 64
) -> dict[int, Frame]:
    """Where threads stand, by ident: the innermost line of the user's own, else the innermost.

    Args:
        without: threads that are left out.
        ours: threads that are left out unless they run something of the user's.
    """
    found: dict[int, Frame] = {}
    for ident, innermost in frames.items():
        if ident not in without and len(found) < most:
            frame: FrameType | None = innermost
            while frame is not None and not is_user(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is not None or ident not in ours:
                found[ident] = _frame(frame or innermost)
    return found


def running_task(loop: asyncio.AbstractEventLoop | None) -> asyncio.Task[Any] | None:
    """The task whose step runs on that loop; any thread."""
    return asyncio.current_task(loop) if loop is not None else None


def _frame(frame: FrameType) -> Frame:
    code = frame.f_code
    return Frame(code.co_filename, frame.f_lineno or code.co_firstlineno, code.co_qualname)


def _who(
    handle: asyncio.Handle | None,
    loop: asyncio.AbstractEventLoop | None,
    stack: Sequence[Frame],
    chain: tuple[Frame, ...],
    variables: Sequence[contextvars.ContextVar[Any]],
) -> Who:
    callback = getattr(handle, "_callback", None)
    owner = getattr(callback, "__self__", None)
    scheduled = owner if isinstance(owner, asyncio.Task) else None
    task = running_task(loop) or scheduled
    context = getattr(handle, "_context", None)
    if context is None:
        context = getattr(task, "get_context", lambda: None)()  # 3.12
    values = {v.name: _text(context[v]) for v in variables if context is not None and v in context}
    if task is None:
        # Of a socket's callback asyncio knows its own function only; the user's is what that called. And a handle that
        # was cancelled by its own callback has forgotten it.
        theirs = next((f for f in stack if is_user(f.file)), None)
        name = theirs.function if theirs is not None else _name(callback) or (stack[0].function if stack else "")
        return Who(name, callback=name or None, context=values)
    coroutine = _coroutine(task, chain)
    parent = scheduled.get_name() if scheduled is not None and scheduled is not task else None
    return Who(coroutine or task.get_name(), task.get_name(), coroutine, None, parent, values, chain)


def _coroutine(task: asyncio.Task[Any], chain: Sequence[Frame]) -> str | None:
    """The task's own coroutine; but not one of ours, that wraps the user's."""
    coroutine: Any = task.get_coro()
    code = getattr(coroutine, "cr_code", None)
    if code is not None and is_ours(code.co_filename):
        theirs = next((f.function for f in chain if not is_ours(f.file)), None)
        if theirs is not None:
            return theirs
    return getattr(coroutine, "__qualname__", None)


def _name(callback: Any) -> str:
    while isinstance(callback, functools.partial):
        callback = callback.func
    return getattr(callback, "__qualname__", None) or (type(callback).__qualname__ if callback is not None else "")


def _text(value: object) -> str:
    try:
        return str(value)[:TEXT]
    except Exception as exc:
        return f"<{type(exc).__name__}>"


# --- whose file it is -------------------------------------------------------------------------------------------------

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib") if paths.get(key)}
    found.add(os.path.dirname(os.__file__))
    return tuple({path + os.sep for folder in found for path in (folder, os.path.realpath(folder))})


_LIBRARIES = _library_folders()


@functools.lru_cache(maxsize=4096)
def is_user(file: str) -> bool:
    """Whether the file is of the program itself: not the standard library, not an installed package, not ours."""
    return not (file.startswith(("<frozen", *_LIBRARIES)) or is_ours(file) or _is_installed(file))


@functools.lru_cache(maxsize=4096)
def is_ours(file: str) -> bool:
    return file.startswith(_OURS)


def _is_installed(file: str) -> bool:
    parts = file.replace("\\", "/")
    return "/site-packages/" in parts or "/dist-packages/" in parts


def _has_lines(file: str) -> bool:
    """Whether it is of the program itself, and not made by `exec` of a string, as dataclasses' methods are."""
    return is_user(file) and file != "<string>"


def blamed(stack: Sequence[Frame]) -> Frame | None:
    """The innermost line of the user's own; without any, that of an installed package, else the innermost."""
    for mine in (_has_lines, is_user, _is_installed):
        for frame in reversed(stack):
            if mine(frame.file):
                return frame
    return stack[-1] if stack else None


# --- one callback, or many --------------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """Consecutive looks that saw the same callback."""

    looks: tuple[Look, ...]
    least: float  # seconds that it took for certain
    most: float  # seconds that it can have taken

    @property
    def middle(self) -> float:
        return (self.least + self.most) / 2


def stretches(looks: Sequence[Look], since: float, until: float) -> Iterator[Stretch]:
    """The looks by the callback that they saw. What passed between two looks may belong to either."""
    groups = [tuple(group) for _, group in groupby(looks, key=lambda one: (one.turn, one.turns, one.who.label))]
    for n, group in enumerate(groups):
        # Nothing runs before the first callback of a turn, nor after its last.
        begins = since if n == 0 and group[0].turn == 0 else group[0].at
        ends = until if n == len(groups) - 1 and group[0].turn == group[0].turns - 1 else group[-1].at
        before = groups[n - 1][-1].at if n else since
        after = groups[n + 1][0].at if n + 1 < len(groups) else until
        yield Stretch(group, ends - begins, after - before)


def contributors(looks: Sequence[Look], seconds: float, most: int = 10) -> tuple[tuple[str, float], ...]:
    """Whose callbacks took how much of so many seconds, by the looks, longest first."""
    counts: dict[str, int] = {}
    for one in looks:
        counts[one.who.label] = counts.get(one.who.label, 0) + 1
    shares = ((label, seconds * count / len(looks)) for label, count in counts.items())
    return tuple(sorted(shares, key=lambda pair: pair[1], reverse=True)[:most])
