"""What the detector records: stalls, and how each loop fared. Plain data, no threads, no I/O, no clock.

A stall is one stretch in which a loop could not turn: one slow callback, many short ones (saturation), or, on a
resource's loop, calls that waited too long in its queue. `Report` is a session of them; `to_json` and `from_json` are
its documented form, whose version is SCHEMA.

JSON, version 1 (seconds are floats; times are seconds since 1970, UTC; keys are only ever added within a version):

    {"schema": 1, "verdict": "pass" | "fail" | "unmeasured",
     "began": …, "duration": …, "threshold": …, "python": "3.12.1", "platform": "Linux-…", "lost": 0,
     "loops":  [{"name": "main", "thread": "MainThread", "resource": false, "precision": "exact" | "heartbeat",
                 "iterations": …, "busy": …, "watched": …, "longest": …,
                 "histogram": [count of busy stretches below 2**n ns and not counted before, for each n],
                 "timeline": [[seconds since began, busy share], …]}],
     "stalls": [{"number": 1, "loop": "main", "began": …, "duration": …, "threshold": …,
                 "cause": "cpu-python" | "cpu-c" | "wait" | "lock" | "gil" | "gc" | "descheduled" | "stopped"
                          | "suspended" | "debugger" | "unknown",
                 "kind": "slow" | "saturated" | "queue", "verdict": "pass" | "fail" | "unmeasured",
                 "file": …, "line": …, "function": …,         the line to blame; null: no sample was taken
                 "call": "time.sleep" | null,                 what that line had called, as its source spells it
                 "innermost": FRAME | null, "stack": [FRAME, …], "stacks": [{"stack": [FRAME, …], "samples": 3}],
                 "task": … | null, "coroutine": … | null, "chain": [FRAME, …], "callback": … | null,
                 "parent": … | null,
                 "context": {"request": "…"}, "syscall": "fsync(7)" | null, "holder": FRAME | null,
                 "contributors": [{"callback": …, "seconds": …}], "callbacks": 1, "waited": 0, "samples": 4,
                 "precision": …, "resource": …, "ongoing": false, "advice": "…",
                 "numbers": {"cpu", "runqueue", "others_cpu", "gc", "late", "gil", "wait", "stopped"}}]}

A FRAME is {"file": …, "line": …, "function": …}. More about each in the classes' docstrings: a key is the attribute of
that name. Of `numbers`, null is what could not be measured.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

SCHEMA = 1


class Cause(enum.StrEnum):
    """Why the loop did not turn."""

    PYTHON = "cpu-python"  # its thread computed, in Python
    C = "cpu-c"  # its thread computed, in C, the GIL released or held
    WAIT = "wait"  # its thread waited in a system call: Stall.syscall
    LOCK = "lock"  # its thread waited for a lock (futex)
    GIL = "gil"  # another thread held the GIL: Stall.holder
    GC = "gc"  # a collection of the garbage collector
    DESCHEDULED = "descheduled"  # ready to run, but the machine gave the processor to others
    STOPPED = "stopped"  # the process was stopped (SIGSTOP, job control)
    SUSPENDED = "suspended"  # the machine slept
    DEBUGGER = "debugger"  # somebody stepped through the code
    UNKNOWN = "unknown"  # not enough could be measured

    @property
    def by_code(self) -> bool:
        """Whether the program itself is to blame, so that changing it helps."""
        return self in _BY_CODE


_BY_CODE = frozenset({Cause.PYTHON, Cause.C, Cause.WAIT, Cause.LOCK, Cause.GIL, Cause.GC, Cause.UNKNOWN})


class Kind(enum.StrEnum):
    SLOW = "slow"  # one callback, or one step of a task
    SATURATED = "saturated"  # many short callbacks in one turn of the loop: Stall.contributors
    QUEUE = "queue"  # on a resource's loop: a call waited in the queue


class Verdict(enum.StrEnum):
    PASS = "pass"  # allowed, or none
    FAIL = "fail"  # the program blocked its loop
    UNMEASURED = "unmeasured"  # the machine was starved, a debugger was attached, or a clock was patched


class Frame(NamedTuple):
    """One line of a stack. Its text is looked up when a report is rendered, never while the loop stalls."""

    file: str
    line: int
    function: str  # qualified name


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the time of a stall went, in seconds; None: could not be measured here."""

    cpu: float | None = None  # of the loop's own thread
    runqueue: float | None = None  # ready to run, without a processor
    others_cpu: float | None = None  # of the process's other threads
    gc: float | None = None  # in collections
    late: float = 0.0  # how late the watchdog itself woke, at most: the GIL was held, or the machine was starved
    gil: float | None = None  # of the loop's own thread, waiting for the GIL
    wait: float | None = None  # of the loop's own thread, waiting in system calls and for locks
    stopped: float | None = None  # the whole process


@dataclass(frozen=True, slots=True)
class Stall:
    """One stretch in which a loop could not turn.

    Attributes:
        loop: name of the loop: "main", or that of its thread or resource.
        began: seconds since 1970, UTC.
        duration: seconds; exact for asyncio's own loops, plus or minus a quarter of the threshold where `precision` is
            "heartbeat".
        frame: the line to blame: the innermost that is the user's own; None: no sample was taken.
        call: what `frame`'s line had called, as its source spells it ("time.sleep"); also for functions in C, which
            have no line of their own; None: it computed, or it is not known.
        innermost: the innermost line of all, also of libraries and the standard library.
        stack: the whole stack of the first sample over the threshold, outermost first.
        stacks: every stack that was sampled during the stall, with its number of samples.
        task: name of the task whose step it was; None: a plain callback.
        coroutine: qualified name of the task's coroutine.
        chain: the await chain of the task from its coroutine inwards, as lines.
        callback: the function that the loop had called, qualified, for what is not a task's step.
        parent: name of the task whose step started this one eagerly, and waits below it on the stack.
        context: the request's context variables by name, as text (see `SlowCallbackDetector`'s `context`).
        syscall: the system call that the thread waited in, with its descriptor, "fsync(7)"; None: none, or not known.
        holder: line of the other thread that held the GIL or seemed to.
        contributors: for a saturated turn the callbacks that took longest, with seconds, longest first.
        callbacks: how many callbacks that turn of the loop had to run.
        waited: how many others were ready and had to wait.
        samples: how many samples were taken.
        ongoing: reported while it lasts; the same stall comes again when it ends, with the same `number`.
        number: counts the stalls of a session from 1.
        advice: what would fix it, one line; "": nothing is known.
    """

    number: int
    loop: str
    began: float
    duration: float
    threshold: float
    cause: Cause = Cause.UNKNOWN
    kind: Kind = Kind.SLOW
    verdict: Verdict = Verdict.FAIL
    frame: Frame | None = None
    call: str | None = None
    innermost: Frame | None = None
    stack: tuple[Frame, ...] = ()
    stacks: tuple[tuple[tuple[Frame, ...], int], ...] = ()
    task: str | None = None
    coroutine: str | None = None
    chain: tuple[Frame, ...] = ()
    callback: str | None = None
    parent: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    syscall: str | None = None
    holder: Frame | None = None
    contributors: tuple[tuple[str, float], ...] = ()
    callbacks: int = 1
    waited: int = 0
    samples: int = 0
    precision: str = "exact"
    resource: bool = False
    ongoing: bool = False
    numbers: Numbers = Numbers()
    advice: str = ""

    @property
    def fingerprint(self) -> tuple[str, str, Frame | None, str, str]:
        """Stalls with the same one are the same offence: loop, kind, blamed line, innermost function, cause."""
        innermost = self.innermost.function if self.innermost else ""
        return (self.loop, self.kind, self.frame, innermost, self.cause)


@dataclass(frozen=True, slots=True)
class LoopRecord:
    """How one watched loop fared.

    Attributes:
        iterations: turns of the loop.
        busy: seconds in which it ran callbacks.
        watched: seconds for which it was watched.
        longest: longest busy stretch in seconds.
        histogram: at index n the count of busy stretches shorter than 2**n ns and not counted before; () in
            heartbeat mode, or if not asked for.
        timeline: pairs of seconds since the session began, and the busy share (0.0 to 1.0) of the stretch that ends
            there; at most 600 of them.
    """

    name: str
    thread: str
    resource: bool = False
    precision: str = "exact"
    iterations: int = 0
    busy: float = 0.0
    watched: float = 0.0
    longest: float = 0.0
    histogram: tuple[int, ...] = ()
    timeline: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A session of the detector.

    Attributes:
        began: seconds since 1970, UTC.
        lost: stalls that are not in `stalls`, because only so many are kept.
    """

    began: float
    duration: float
    threshold: float
    python: str  # its version
    platform: str
    stalls: tuple[Stall, ...] = ()
    loops: tuple[LoopRecord, ...] = ()
    lost: int = 0

    @property
    def verdict(self) -> Verdict:
        """FAIL if any stall failed; else UNMEASURED if any could not be measured; else PASS."""
        verdicts = {stall.verdict for stall in self.stalls}
        return next((v for v in (Verdict.FAIL, Verdict.UNMEASURED) if v in verdicts), Verdict.PASS)


def to_json(report: Report) -> dict[str, Any]:
    """The report as what `json.dumps` takes; the schema is in this module's docstring."""
    return {
        "schema": SCHEMA,
        "verdict": str(report.verdict),
        **{f.name: _plain(getattr(report, f.name)) for f in fields(report) if f.name not in ("stalls", "loops")},
        "loops": [_plain(loop) for loop in report.loops],
        "stalls": [_stall_to_json(stall) for stall in report.stalls],
    }


def from_json(data: Mapping[str, Any]) -> Report:
    """The report again; unknown keys are ignored, missing ones get their defaults.

    Raises:
        ValueError: it is not of schema 1; says what was found.
    """
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        found = f"schema {data['schema']!r}" if isinstance(data, Mapping) and "schema" in data else "no schema"
        raise ValueError(f"expected a report of schema {SCHEMA}, found {found}")
    try:
        return Report(
            **_known(Report, data, "stalls", "loops"),
            stalls=tuple(_stall_from_json(stall) for stall in data.get("stalls", ())),
            loops=tuple(
                LoopRecord(
                    **_known(LoopRecord, loop, "histogram", "timeline"),
                    histogram=tuple(loop.get("histogram", ())),
                    timeline=tuple((at, share) for at, share in loop.get("timeline", ())),
                )
                for loop in data.get("loops", ())
            ),
        )
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise ValueError(f"not a report of schema {SCHEMA}: {exc}") from exc


def _stall_to_json(stall: Stall) -> dict[str, Any]:
    frame = stall.frame
    return {
        "file": frame.file if frame else None,
        "line": frame.line if frame else None,
        "function": frame.function if frame else None,
        **{f.name: _plain(getattr(stall, f.name)) for f in fields(stall) if f.name not in _APART},
        "contributors": [{"callback": name, "seconds": seconds} for name, seconds in stall.contributors],
        "stacks": [{"stack": _plain(stack), "samples": count} for stack, count in stall.stacks],
    }


def _stall_from_json(data: Mapping[str, Any]) -> Stall:
    return Stall(
        **_known(Stall, data, "cause", "kind", "verdict", *_FRAMES, "numbers", "context", "contributors", "stacks"),
        cause=Cause(data.get("cause", Cause.UNKNOWN)),
        kind=Kind(data.get("kind", Kind.SLOW)),
        verdict=Verdict(data.get("verdict", Verdict.FAIL)),
        frame=_frame(data),
        innermost=_frame(data.get("innermost")),
        holder=_frame(data.get("holder")),
        stack=_frames(data.get("stack", ())),
        chain=_frames(data.get("chain", ())),
        stacks=tuple((_frames(s["stack"]), s["samples"]) for s in data.get("stacks", ())),
        context=dict(data.get("context", {})),
        contributors=tuple((c["callback"], c["seconds"]) for c in data.get("contributors", ())),
        numbers=Numbers(**_known(Numbers, data.get("numbers", {}))),
    )


_APART = ("frame", "contributors", "stacks")
_FRAMES = ("frame", "innermost", "holder", "stack", "chain")


def _plain(value: Any) -> Any:
    """Dataclasses and frames as mappings, tuples as lists."""
    if isinstance(value, Frame):
        return value._asdict()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _known(kind: type[Any], data: Mapping[str, Any], *apart: str) -> dict[str, Any]:
    """The keys that are fields of `kind`, but for those that are converted apart."""
    return {f.name: data[f.name] for f in fields(kind) if f.name in data and f.name not in apart}


def _frame(data: Mapping[str, Any] | None) -> Frame | None:
    return Frame(data["file"], data["line"], data["function"]) if data and data.get("file") is not None else None


def _frames(data: Iterable[Mapping[str, Any]]) -> tuple[Frame, ...]:
    return tuple(Frame(item["file"], item["line"], item["function"]) for item in data)
