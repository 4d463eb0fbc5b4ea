"""The command `offload status`. What it needs is imported when it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_text import (
    NOT_ALL,
    USAGE,
    Failure,
    JsonOption,
    PacketFileArgument,
    in_bytes,
    in_time,
    print_json,
    printable,
    reading,
    when,
)

if TYPE_CHECKING:
    from rich.console import Group


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command of this module."""
    app.command(epilog=epilog)(status)


def status(
    file: PacketFileArgument,
    where: Annotated[
        Path | None, typer.Option("--status", metavar="FILE", help="What merge was told as --status.")
    ] = None,
    as_json: JsonOption = False,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Text for Prometheus on stdout.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")] = False,
) -> None:
    """Say how far the merge into a packet file is: lag, bytes held, what is on the disk, gaps, problems, rates.

    Exit code 0: somebody writes it; 1: nobody does, and what is told is what the packet file itself says.
    """
    if as_json and prometheus:
        raise Failure("--json and --prometheus are both given, expected one of them", USAGE)
    while True:
        told = _read(file, where)
        if as_json:
            print_json(told)
        elif prometheus:
            from .merge.status import prometheus as as_text

            sys.stdout.buffer.write(as_text(told).encode())
            sys.stdout.flush()
        elif sys.stdout.isatty():
            if watch:
                _live(file, where)
                return
            from rich.console import Console

            Console().print(_page(told))
        else:
            for title, value in _facts(told):
                print(f"{title}\t{value}")
            for row in _rows(told):
                print("\t".join(row))
        if not watch:
            break
        time.sleep(1)
    if not told["running"]:
        raise typer.Exit(NOT_ALL)


def _read(file: Path, where: Path | None) -> dict[str, Any]:
    from .merge.status import read_status

    with reading(file):
        return read_status(file, where)


def _live(file: Path, where: Path | None) -> None:
    from rich.live import Live

    with Live(_page(_read(file, where)), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(1)
            live.update(_page(_read(file, where)), refresh=True)


def _page(told: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for title, value in _facts(told):
        bad = title in ("full disk", "not read") or (title == "gaps" and value != "0") or value.startswith("nobody")
        facts.add_row(Text(title, style="bold"), Text(value, style="red" if bad else ""))
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("source", "lag", "for", "held deleted", "")):
        table.add_column(title, justify="right" if 0 < number < 4 else "left", overflow="fold")
    for row in _rows(told):
        table.add_row(*(Text(cell, style="red" if n == 4 else "") for n, cell in enumerate(row)))
    return Group(facts, Text(), table) if told["sources"] or told["problems"] else Group(facts)


def _facts(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and value of what is to be said of the whole."""
    yield "packet file", printable(str(told["output"]))
    if not told["running"]:
        yield "writer", "nobody writes it now; what it says itself:"
    elif not told["current"]:
        yield "writer", "somebody writes it, and tells no status; what it says itself:"
    else:
        yield "writer", f"process {told['pid']}, for {in_time(told['time'] - told['began'])}"
    yield "lines in the segment" if told.get("segment") else "lines", f"{told['total_lines']:,}"
    durable = told["durable"] or {}
    if durable:
        lines = "" if durable["lines"] is None else f", {durable['lines']:,} lines"
        ago = "" if durable["time"] is None else f", {when(int(durable['time'] * 1e9))}"
        yield "on the disk", f"up to byte {durable['upto']:,}{lines}{ago}"
    yield "segment", str(told["segment"])
    yield "lag", in_bytes(told["lag_bytes"]) + (_for(told["lag_seconds"]) if told["current"] else "")
    if not told["current"]:
        return
    yield "this run", f"{told['lines']:,} lines, {in_bytes(told['bytes'])}"
    yield "at present", f"{told['lines_per_second']:,.0f} lines/s, {in_bytes(told['bytes_per_second'])}/s"
    yield "held deleted", in_bytes(told["held_bytes"])
    yield "gaps", str(told["gaps"])
    if told["late"] is not None:
        yield "late lines", f"{told['late']:,}"
    yield "waits for room", str(told["waits"])
    if told["full"] is not None:
        yield "full disk", f"{told['full']}; waits for room"
    if told["problems"]:
        yield "not read", str(len(told["problems"]))


def _rows(told: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Source, lag, for how long, bytes held, why it is not read; the worst first."""
    problems: dict[str, str] = dict(told["problems"])
    for source in sorted(told["sources"], key=lambda s: (-(s["lag_seconds"] or 0), -(s["lag_bytes"] or 0), s["path"])):
        lag, seconds, held = (source[key] for key in ("lag_bytes", "lag_seconds", "held_bytes"))
        yield (
            printable(source["path"]),
            "?" if lag is None else in_bytes(lag),
            in_time(seconds) if lag and seconds is not None else "",
            in_bytes(held) if held else "",
            printable(problems.pop(source["path"], "")),
        )
    for path, reason in problems.items():
        yield printable(path), "", "", "", printable(reason)


def _for(seconds: float) -> str:
    return f", for {in_time(seconds)}" if seconds else ""
