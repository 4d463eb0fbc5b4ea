"""What `offload cat` and `offload export` share of records and order: options, and what they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_text import USAGE, Failure, plural, say

if TYPE_CHECKING:
    from .merge.pick import Wanted

MultilineOption = Annotated[
    str | None,
    typer.Option(
        "--multiline",
        "-m",
        metavar="REGEX",
        help="Records instead of lines: one begins with each line in which this is found, as ^\\d{4}- or ^\\S.",
    ),
]
ByTimeOption = Annotated[
    bool, typer.Option("--by-time", help="In the order of the times in the lines, over all sources.")
]
ByArrivalOption = Annotated[
    bool, typer.Option("--by-arrival", help="In the order in which they came, of a file that was merged by time.")
]
TimeFormatOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORMAT",
        help="For --by-time: how times are written where lines begin, as for strptime; else the common ones are found.",
    ),
]


def tell_parts(parts: int) -> None:
    """Say so if records were too long to be held."""
    if parts:
        say(f"{plural(parts, 'record')} too long to be held {'was' if parts == 1 else 'were'} given in parts")


def ordered(wanted: Wanted, formats: list[str] | None, *, by_time: bool, by_arrival: bool) -> Wanted:
    """The same lines in the order that the options ask for."""
    from .merge.times import check_formats

    if by_time and by_arrival:
        raise Failure("--by-time and --by-arrival are two orders; give one", USAGE)
    if formats and not by_time:
        raise Failure("--time-format is for --by-time; give that too", USAGE)
    try:
        check_formats(formats or ())
    except ValueError as exc:
        raise Failure(f"--time-format: {exc}", USAGE) from exc
    return replace(wanted, by="time" if by_time else "arrival" if by_arrival else None, formats=tuple(formats or ()))
