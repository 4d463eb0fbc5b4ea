"""The report as one HTML page that needs nothing else: no network, no other file, no server.

Beside this module lie its template (page.html), its looks (page.css) and its behaviour (page.js); `page` puts them
together with the report as JSON, from which the page draws itself.

Promises: nothing that a report holds (a task's name, a line of source) can become markup or script: the data cannot
end its element, the script only ever sets text, and the page's own policy lets the browser run that one script and load
nothing. Frames and stacks are stored once each, so that a thousand stalls stay a page of a few hundred kilobytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from string import Template
from typing import Any, TypeVar

from .record import Cause, Frame, Report, Stall
from .summary import (
    WORDS,
    below_loop,
    culprit,
    final,
    headline,
    merged,
    offenders,
    short,
    source,
    source_line,
    weighted,
    why,
)

T = TypeVar("T", bound=Hashable)

# A stall's stacks beyond the most frequent ones add to the size and next to nothing to the picture.
STACKS_A_STALL = 8
LINES_AROUND = 2


class _Once(dict[T, int]):
    """Numbers things from 0, the same thing always alike."""

    def number(self, thing: T) -> int:
        return self.setdefault(thing, len(self))


def page(report: Report) -> str:
    """The page's HTML, to be stored as UTF-8. Reads the source files of the frames that it shows."""
    here = resources.files("offload.debug")
    script, style, template = (
        here.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = headline(report)
    return Template(template).substitute(
        TITLE=html.escape(f"{report.verdict}: {title} · offload"),
        HEADLINE=html.escape(title[:1].upper() + title[1:]),
        STYLE=style,
        SCRIPT=script,
        SCRIPT_HASH=f"sha256-{digest}",
        DATA=embedded(contents(report)),
    )


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: pure ASCII, without a character that HTML would see."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def contents(report: Report) -> dict[str, Any]:
    """What the page is drawn from. Frames and stacks are given as indices into `frames` and `stacks`."""
    frames: _Once[Frame] = _Once()
    stacks: _Once[tuple[int, ...]] = _Once()
    found = offenders(report)
    stalls = [_stall(stall, report, frames, stacks) for stall in final(report.stalls)]
    groups = [
        {
            "worst": offender.worst.number,
            "stalls": [stall.number for stall in offender.stalls],
            "total": _rounded(offender.total),
            "p50": _rounded(offender.p50),
            "p99": _rounded(offender.p99),
            "verdict": offender.verdict,
            "source": source(offender.worst.frame, LINES_AROUND) if offender.worst.frame else [],
        }
        for offender in found
    ]
    loops = [
        {
            **asdict(loop),
            "timeline": [(round(at, 3), round(share, 3)) for at, share in loop.timeline],
        }
        for loop in merged(report.loops)
    ]
    return {
        "verdict": report.verdict,
        "began": report.began,
        "duration": report.duration,
        "threshold": report.threshold,
        "python": report.python,
        "platform": report.platform,
        "lost": report.lost,
        "causes": {cause: (*WORDS[cause], cause.by_code) for cause in Cause},
        "loops": loops,
        "stalls": stalls,
        "offenders": groups,
        "stacks": list(stacks),
        "frames": [(short(frame.file), frame.line, frame.function, source_line(frame)) for frame in frames],
    }


def _stall(stall: Stall, report: Report, frames: _Once[Frame], stacks: _Once[tuple[int, ...]]) -> dict[str, Any]:
    def numbered(stack: Iterable[Frame | None]) -> list[int]:
        return [frames.number(frame) for frame in stack if frame]

    def stored(stack: Sequence[Frame]) -> int:
        return stacks.number(tuple(numbered(stack)))

    most = sorted(weighted(stall), key=lambda pair: pair[1], reverse=True)[:STACKS_A_STALL]
    scale = stall.duration / (sum(share for _, share in most) or 1.0)
    full = stall.stack or (most[0][0] if most else ())
    shown: dict[str, Any] = {
        "n": stall.number,
        "loop": stall.loop,
        "kind": stall.kind,
        "cause": stall.cause,
        "verdict": stall.verdict,
        "at": _rounded(stall.began - report.began),
        "for": _rounded(stall.duration),
        "limit": stall.threshold,
        "frame": frames.number(stall.frame) if stall.frame else None,
        "where": culprit(stall),
        "why": why(stall),
        "stack": stored(full),
        "outside": len(full) - len(below_loop(full)),
        "stacks": [(stored(stack), _rounded(share * scale)) for stack, share in most],
        "task": stall.task,
        "coroutine": stall.coroutine,
        "callback": stall.callback,
        "parent": stall.parent,
        "chain": numbered(stall.chain),
        "context": dict(stall.context),
        "holder": frames.number(stall.holder) if stall.holder else None,
        "contributors": [(name, _rounded(value)) for name, value in stall.contributors],
        "callbacks": stall.callbacks,
        "waited": stall.waited,
        "samples": stall.samples,
        "precision": stall.precision,
        "ongoing": stall.ongoing,
        "numbers": {key: _rounded(value) for key, value in asdict(stall.numbers).items() if value is not None},
        "advice": stall.advice,
    }
    return {key: value for key, value in shown.items() if value is not False and value not in (None, "", [], {})}


def _rounded(value: float) -> float:
    return round(value, 6)
