"""A report for people and files: the log line, the terminal's table, and `write` for a file of any form.

`write` picks the form by the file's ending; what each holds is told where it is made: `record` (JSON), `page` (HTML),
`forms` (JUnit, SARIF, folded stacks, GitHub annotations), `metrics` (Prometheus, OpenTelemetry).

Nothing here prints: the table is a renderable of `rich`, the log line a string. `rich` is imported by the table only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import forms, record
from .record import Kind, Numbers, Report, Stall, Verdict
from .summary import Offender, culprit, final, headline, offenders, quantile, seconds, source_line, times, why

if TYPE_CHECKING:
    from rich.console import RenderableType


def _json(report: Report) -> str:
    return json.dumps(record.to_json(report), indent=1) + "\n"


def _page(report: Report) -> str:
    from .page import page  # its template is read when a page is wanted

    return page(report)


FORMS: dict[str, Callable[[Report], str]] = {
    ".json": _json,
    ".html": _page,
    ".xml": forms.junit,
    ".sarif": forms.sarif,
    ".folded": forms.folded,
}


def check_ending(path: str | os.PathLike[str]) -> str:
    """The path's ending, if `write` knows its form; for telling a wrong one before the program runs.

    Raises:
        ValueError: it is none of them; says what was found and which endings exist.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMS:
        found = f"the ending {ending!r}" if ending else "no ending"
        raise ValueError(f"report {os.fspath(path)!r} has {found}; known are {', '.join(FORMS)}")
    return ending


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report to the file at `path`, replacing it, in the form that the path's ending names.

    .json (schema in `record`), .html (one self-contained page), .xml (JUnit), .sarif (SARIF 2.1.0), .folded (stacks
    for flame graphs, in microseconds).

    Raises:
        ValueError: the ending is none of these; nothing was written.
        OSError: the file could not be written.
    """
    text = FORMS[check_ending(path)](report)
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def log_line(stall: Stall, durations: Sequence[float] = ()) -> str:
    """A stall in one line of a log; also what is said of all stalls of its fingerprint since the last line.

    Args:
        stall: one of them, or the only one.
        durations: in seconds, of all stalls of that fingerprint since the last line.
    """
    if stall.kind is Kind.QUEUE:
        subject = f"{stall.loop}: a call {'has been waiting' if stall.ongoing else 'waited'} in the queue for"
    else:
        subject = f"{stall.loop}: {'has been blocked' if stall.ongoing else 'blocked'} for"
    line = f"{subject} {seconds(stall.duration)} (limit {seconds(stall.threshold)}){', and still is,' * stall.ongoing}"
    line += f" at {culprit(stall)}: {why(stall)}"
    if stall.contributors:
        line += "; longest " + ", ".join(f"{name} {seconds(value)}" for name, value in stall.contributors[:3])
    if stall.task:
        line += f"; task {stall.task}"
    line += "".join(f"; {name}={value}" for name, value in stall.context.items())
    if measured := numbers(stall.numbers, stall.duration):
        line += f"; {measured}"
    if len(durations) > 1:
        line += (
            f"; {len(durations)} times, p50 {seconds(quantile(durations, 0.5))}, "
            f"p99 {seconds(quantile(durations, 0.99))}, max {seconds(max(durations))}"
        )
    if stall.precision != "exact":
        line += f"; precision: {stall.precision}"
    if stall.advice:
        line += f"; fix: {stall.advice}"
    return " ".join(line.split())  # a task's name may hold line breaks


def numbers(values: Numbers, duration: float) -> str:
    """Where the time went, as shares of the duration: "own CPU 3%, waiting 96%"; "" if nothing could be measured."""
    named = {
        "own CPU": values.cpu,
        "no processor": values.runqueue,
        "GIL": values.gil,
        "waiting": values.wait,
        "stopped": values.stopped,
        "other threads' CPU": values.others_cpu,
        "GC": values.gc,
    }
    shares = {name: value / duration for name, value in named.items() if value is not None and duration > 0}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)


def table(report: Report, *, most: int = 10) -> RenderableType:
    """The session as a table for the terminal: the verdict, the offenders that cost most, each loop.

    Args:
        report: of one session.
        most: how many offenders are shown.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNMEASURED: "yellow"}[report.verdict]
    parts: list[RenderableType] = [
        Text.assemble((f" {report.verdict.upper()} ", f"bold reverse {colour}"), " ", headline(report))
    ]
    found = offenders(report)
    if found:
        stalls = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        stalls.add_column("what blocked", ratio=1, overflow="fold")
        for name in ("times", "total", "p50", "longest"):
            stalls.add_column(name, justify="right", no_wrap=True)
        for offender in found[:most]:
            stalls.add_row(
                _offence(offender),
                str(offender.count),
                *map(seconds, (offender.total, offender.p50, offender.worst.duration)),
            )
        parts += ["", stalls]
    if len(found) > most:
        parts.append(Text(f"and {times(len(found) - most, 'other offender')}", "dim"))
    if report.loops:
        loops = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        loops.add_column("loop", overflow="fold")
        for name in ("busy", "turns", "longest turn", "stalls"):
            loops.add_column(name, justify="right", no_wrap=True)
        stalled = [stall.loop for stall in final(report.stalls)]
        for loop in report.loops:
            share = f"{loop.busy / loop.watched:.0%}" if loop.watched else "–"
            loops.add_row(
                Text(loop.name), share, f"{loop.iterations:,}", seconds(loop.longest), str(stalled.count(loop.name))
            )
        parts += ["", loops]
    return Group(*parts)


def _offence(offender: Offender) -> RenderableType:
    from rich.text import Text

    stall = offender.worst
    text = Text(culprit(stall), style="bold")
    text.append(f"\n{why(stall)}, loop {stall.loop}", "not bold")
    if line := source_line(stall.frame):
        text.append(f"\n{line}", "not bold cyan")
    if stall.advice:
        text.append("\nfix: ", "not bold green")
        for index, part in enumerate(stall.advice.split("`")):  # `code`
            text.append(part, "bold green" if index % 2 else "not bold green")
    if offender.verdict is not Verdict.FAIL:
        text.append(f"\n{'allowed' if offender.verdict is Verdict.PASS else 'not counted: unmeasured'}", "not bold dim")
    text.append("\n")
    return text
