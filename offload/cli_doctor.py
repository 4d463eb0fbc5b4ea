"""The command `offload doctor`. What it needs is imported when it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .merge.doctor import Finding

NOT_ALL = 1


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command of this module."""
    app.command(epilog=epilog)(doctor)


def doctor(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders and globs, as for merge.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The packet file: how far has it each of them?"),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="As for merge: of folders and globs, only such files.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="As for merge: of folders and globs, no such files.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")] = False,
) -> None:
    """Say why a file is not read: missing, not allowed, rotated, a copy, packed, behind, limits of the system …

    Nothing is changed. Exit code 0: all is well; 1: something is not.
    """
    from .merge.doctor import Verdict, diagnose

    if not all(paths):
        raise typer.BadParameter("a path is empty, expected a file, folder or glob; is a variable unset?")
    try:
        found = diagnose(paths, output, include=include or (), exclude=exclude or ())
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    if as_json:
        text = json.dumps([dataclasses.asdict(finding) for finding in found], ensure_ascii=False)
        sys.stdout.buffer.write(text.encode(errors="backslashreplace") + b"\n")
        sys.stdout.flush()
    else:
        _table(found)
    if any(finding.verdict is Verdict.wrong for finding in found):
        raise typer.Exit(NOT_ALL)


def _table(found: list[Finding]) -> None:
    rows = [(_printable(f.path) or "this machine", f.verdict.value, _printable(f.text)) for f in found]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    table = Table(box=None, pad_edge=False)
    for title in ("file", "", "what is to be said"):
        table.add_column(title, overflow="fold")
    for path, verdict, text in rows:
        table.add_row(Text(path), Text(verdict, style=colours[verdict]), Text(text))
    Console().print(table)


def _printable(text: str) -> str:
    """A path for a terminal: no control characters, no surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
