"""The commands that read a packet file: `offload cat | verify | split | stat | export | repair`.

What they need is imported when they run.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .cli_order import ByArrivalOption, ByTimeOption, MultilineOption, TimeFormatOption, ordered, tell_parts
from .cli_text import (
    BAD_FILE,
    NO_OUTPUT,
    NOT_ALL,
    USAGE,
    Failure,
    JsonOption,
    PacketFileArgument,
    QuietOption,
    bad_file,
    bar,
    check_packet_file,
    in_bytes,
    iso,
    plural,
    print_json,
    printable,
    reading,
    say,
    sentence,
    when,
)
from .errors import PacketError

if TYPE_CHECKING:
    from .merge.audit import Gap, Verification
    from .merge.names import Names
    from .merge.pick import Picker, Wanted

SourceOption = Annotated[
    str | None, typer.Option("--source", "-s", metavar="NAME", help="This source only: its path, name or a glob.")
]
SinceOption = Annotated[str | None, typer.Option(metavar="TIME", help="Only what came then or later.")]
UntilOption = Annotated[str | None, typer.Option(metavar="TIME", help="Only what came before.")]
GrepOption = Annotated[
    str | None, typer.Option("--grep", "-g", metavar="REGEX", help="Only lines in which this is found, byte by byte.")
]
InvertOption = Annotated[bool, typer.Option("--invert-match", "-v", help="Only lines in which it is not found.")]

_ANCHOR = 64  # hex digits
_LATE = 10**9  # nanoseconds that a line may take from its arrival to the packet file
_HEX = re.compile(r"[0-9a-fA-F]{16,}")  # what behind `--chain` is no file's name


class FormChoice(StrEnum):
    ndjson = "ndjson"
    text = "text"
    parquet = "parquet"
    mcap = "mcap"


def register(app: typer.Typer, epilog: str) -> None:
    """Add the commands of this module."""
    app.command(epilog=epilog)(cat)
    app.command(epilog=epilog, cls=_Verify)(verify)
    for command in (split, stat, export, repair):
        app.command(epilog=epilog)(command)


def cat(
    file: PacketFileArgument,
    source: SourceOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    grep: GrepOption = None,
    invert: InvertOption = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last N of these lines.")
    ] = None,
    multiline: MultilineOption = None,
    by_time: ByTimeOption = False,
    by_arrival: ByArrivalOption = False,
    time_format: TimeFormatOption = None,
    prefix: Annotated[bool, typer.Option("--prefix", "-p", help="Each line behind its source's name.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more at the end, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the lines in the order in which they stand, whole and as they were.

    That is the order in which they came, or by time if they were merged so. Times for --since and --until are those of
    arrival: ISO 8601 (local time without a zone), a date, or how long ago: 90s, 10m, 2h, 1d.
    """
    from .files.frame_source import FrameSource
    from .merge.lines import Lines, LineWriter, json_lines
    from .merge.pick import Picker

    wanted = _wanted(source, since, until, grep, invert=invert, tail=tail, multiline=multiline)
    wanted = ordered(wanted, time_format, by_time=by_time, by_arrival=by_arrival)
    if follow and wanted.by is not None:
        raise Failure("what comes cannot be put in order as it is printed; leave out --follow, or merge by time", USAGE)
    with contextlib.suppress(AttributeError, ValueError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `offload cat … | head` ends as `cat … | head` does
    out = sys.stdout.buffer
    writer = LineWriter(out, prefix=prefix)

    def put(batch: Iterable[Lines]) -> None:
        for lines in batch:
            if as_json:
                out.writelines(f"{line}\n".encode(errors="backslashreplace") for line in json_lines(lines))
            else:
                writer.write(lines)

    # What is cut off amid lines ends there, as with `cat`: what was held back has no place behind it.
    amid = False
    with reading(file), FrameSource(file, follow=follow) as frames:
        picker = Picker(frames, wanted, follow=follow)
        if not follow:
            _check_source(file, picker.names, source)
        try:
            while (batch := picker.read()) is not None or (follow and not _over(picker, wanted)):
                if batch is not None:
                    amid = True
                    put(batch)
                    amid = False
                else:
                    put(picker.quiet())
                    out.flush()
                    time.sleep(0.05)
        except KeyboardInterrupt:
            if not follow:
                raise
        if not amid:
            put(picker.close())
        out.flush()
        tell_parts(picker.parts)
        if not follow and not picker.ended and not frames.is_being_written():
            frames.end()


def _over(picker: Picker, wanted: Wanted) -> bool:
    """Whether what comes from now on is too late to be wanted."""
    return picker.ended or (wanted.until is not None and time.time_ns() >= wanted.until + _LATE)


def _wanted(
    source: str | None,
    since: str | None,
    until: str | None,
    grep: str | None = None,
    *,
    invert: bool = False,
    tail: int | None = None,
    multiline: str | None = None,
) -> Wanted:
    """What the options ask for; a value that cannot be read is wrong usage."""
    from .merge.pick import Wanted, parse_regex, parse_time

    option = ""
    try:
        option, now = "--since", time.time_ns()
        begin = None if since is None else parse_time(since, now)
        option = "--until"
        end = None if until is None else parse_time(until, now)
        option = "--grep"
        matching = None if grep is None else parse_regex(grep)
        option = "--multiline"
        beginning = None if multiline is None else parse_regex(multiline)
    except ValueError as exc:
        raise Failure(f"{option}: {exc}", USAGE) from exc
    if invert and matching is None:
        raise Failure("--invert-match has nothing to turn round; give --grep too", USAGE)
    if begin is not None and end is not None and begin >= end:
        raise Failure("--since is not before --until, so there can be no lines; exchange them", USAGE)
    return Wanted(source, begin, end, matching, invert, tail, beginning)


def _check_source(file: Path, names: Names, source: str | None) -> None:
    if source is not None and not any(names.matches(i, source) for i in names):
        known = ", ".join(sorted(names.all())[:8])
        raise Failure(f"no source {source!r} in {file}; there are {len(names)}: {known}", USAGE)


class _Verify(TyperCommand):
    """Takes `--chain` alone and with an anchor behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for arg in args:
            if given[-1:] == ["--chain="] and _HEX.fullmatch(arg):
                given[-1] += arg
            else:
                given.append("--chain=" if arg == "--chain" else arg)
        return super().parse_args(ctx, given)


def verify(
    file: PacketFileArgument,
    complete: Annotated[
        bool, typer.Option("--complete", help="Fail if bytes of a source are stated as lost; tell which.")
    ] = False,
    chain: Annotated[
        str | None,
        typer.Option(
            metavar="[ANCHOR]",
            help="Print the hash over the whole file, an anchor to keep elsewhere; or compare with one that was kept: "
            "everything before it is as it was then.",
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum, and that every sequence goes on without a hole; say where not."""
    from .merge.audit import NEVER_READ
    from .merge.audit import verify as check

    if chain and not _HEX.fullmatch(chain):
        raise Failure(f"--chain is {chain!r}, expected an anchor of {_ANCHOR} hex digits, as --chain prints it", USAGE)
    if chain and len(chain) != _ANCHOR:
        raise Failure(f"--chain has {len(chain)} hex digits, expected {_ANCHOR}, as --chain prints them", USAGE)
    anchor = bytes.fromhex(chain) if chain else None
    with reading(file), bar("verifying", quiet=quiet) as watcher:
        found = check(file, watcher, anchor=anchor)
    if as_json:
        report: dict[str, Any] = {
            "file": os.fspath(file),
            "ok": found.ok,
            "complete": found.complete,
            "size": found.size,
            "frames": found.frames,
            "sources": found.sources,
            "lines": found.lines,
            "torn_bytes": found.torn,
            "being_written": found.live,
            "segments": found.segments,
            "segments_gone": found.gone,
            "chain": found.chain,
            "faults": [_fault_json(found, offset, fault) for offset, fault in found.faults],
            "gaps": [_as_json(gap) for gap in found.lost],
            "regressions": [_as_json(gap) for gap in found.regressions],
        }
        if anchor is not None:
            report["anchor"] = None if found.anchor is None else found.anchor._asdict()
        print_json(report)
    else:
        for offset, fault in found.faults:
            name, offset = found.where(offset)
            print(f"{file.with_name(name) if name else file}: byte {offset}: {fault}")
        for gap in found.lost:
            what = "not in the file" if gap.reason == NEVER_READ else "stated as lost"
            print(f"{file}: {what}: {_told(gap)}")
        if not quiet:
            for gap in found.regressions:
                print(f"{file}: {gap.source} had lost an end that is kept here, up to its byte {gap.end}")
            _tell_verified(file, found, complete=complete)
        if chain is not None:
            _tell_chain(file, found, chain, quiet=quiet)
    if not found.ok or (complete and found.lost) or (anchor is not None and found.anchor is None):
        raise typer.Exit(NOT_ALL)


def _tell_verified(file: Path, found: Verification, *, complete: bool) -> None:
    frames = f"{plural(found.frames, 'frame')}, {plural(found.lines, 'line')}, {plural(found.sources, 'source')}"
    verdict = "every checksum and every sequence holds" if found.ok else plural(len(found.faults), "fault")
    if len(found.segments) > 1 or found.gone:
        frames += f", {plural(len(found.segments), 'segment')}"
    print(f"{file}: {verdict} ({frames})")
    if found.gone:
        are = "is" if found.gone == 1 else "are"
        print(f"{file}: {plural(found.gone, 'segment')} before {found.segments[0]} {are} gone, as retention does")
    if found.live and found.torn:
        print(f"{file}: it is being written; {found.torn} bytes at the end are a frame under way")
    if complete and found.complete:
        print(f"{file}: complete: every byte of every source, up to where it was read")
    elif complete:
        damage = "" if found.ok else "; what the faults cost, `offload repair` works out"
        print(f"{file}: not complete: {plural(len(found.lost), 'gap')}{damage}")


def _tell_chain(file: Path, found: Verification, anchor: str, *, quiet: bool) -> None:
    if anchor and found.anchor is None:
        why = "a fault stands before it" if found.faults else "what stood before it was changed or cut off"
        print(f"{file}: the anchor does not hold: {why}")
    elif found.anchor is not None:
        if not quiet:
            offset, lines = found.anchor
            print(f"{file}: the anchor holds: the first {offset:,} bytes, {plural(lines, 'line')}, are as they were")
    elif found.faults:
        say(f"{file}: no anchor for a file with faults")
    elif not found.chained:
        say(f"{file}: no anchor for a file without a COMMIT")
    else:
        print(found.chain)
        if not quiet:
            say(f"{file}: this anchor covers the first {found.chained:,} of {found.size:,} bytes")


def _fault_json(found: Verification, offset: int, fault: str) -> dict[str, Any]:
    name, offset = found.where(offset)
    return ({"segment": name} if name else {}) | {"offset": offset, "fault": fault}


def _as_json(gap: Gap) -> dict[str, Any]:
    ends = {"from": gap.start, "to": gap.end, "lines": gap.lines, "reason": gap.reason}
    return {"source": gap.source, "generation": gap.generation, **ends}


def _told(gap: Gap) -> str:
    to = "its end" if gap.end is None else f"byte {gap.end}"
    lines = "lines unknown" if gap.lines is None else plural(gap.lines, "line")
    reason = gap.reason.replace("_", " ")
    return f"{gap.source} from byte {gap.start} to {to}: {reason} (generation {gap.generation}, {lines})"


def split(
    file: PacketFileArgument,
    directory: Annotated[Path, typer.Option("--directory", "-d", metavar="DIR", help="Where the files go.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write every source back as a file, byte for byte."""
    from .merge.split import split as take_apart

    with reading(file):
        check_packet_file(file)
        try:
            with bar("splitting", quiet=quiet) as watcher:
                done = take_apart(file, directory, force=force, watcher=watcher)
        except FileExistsError as exc:
            raise Failure(f"{exc.filename} is there already; give an empty folder, or --force", NO_OUTPUT) from exc
        except PacketError as exc:
            raise Failure(f"{file}: {exc}; what stands before it was written to {directory}", BAD_FILE) from exc
        except OSError as exc:
            raise Failure(sentence(exc), NO_OUTPUT) from exc
    if as_json:
        report = {
            "files": {os.fspath(path): size for path, size in done.written.items()},
            "incomplete": {os.fspath(path): why for path, why in done.incomplete.items()},
        }
        print_json(report)
    else:
        for path, why in done.incomplete.items():
            say(f"{path} is not all of its source: {why}")
        if not quiet:
            total = in_bytes(sum(done.written.values()))
            print(f"{directory}: {plural(len(done.written), 'file')}, {total}", file=sys.stderr)
    if done.incomplete:
        raise typer.Exit(NOT_ALL)


def stat(file: PacketFileArgument, as_json: JsonOption = False) -> None:
    """What each source has in the file: lines, bytes, generation, first and last time of arrival."""
    from .merge.split import stat as count

    with reading(file):
        check_packet_file(file)
        report = count(file)
    if as_json:
        sources = [
            {
                "name": s.name,
                "path": s.path,
                "lines": s.lines,
                "bytes": s.bytes,
                "generation": s.generation,
                "gaps": s.gaps,
                "first_time": iso(s.first_ns),
                "last_time": iso(s.last_ns),
            }
            for s in report.sources
        ]
        print_json({"file": os.fspath(file), "size": report.size, "sources": sources})
        return
    head = ("source", "lines", "bytes", "generation", "first", "last")
    rows = [
        (printable(s.name), f"{s.lines:,}", f"{s.bytes:,}", str(s.generation), when(s.first_ns), when(s.last_ns))
        for s in report.sources
    ]
    total = (f"{len(rows)} sources", f"{report.lines:,}", f"{report.bytes:,}", "", "", "")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_footer=True)
        for title, foot in zip(head, total, strict=True):
            right = title in ("lines", "bytes", "generation")
            table.add_column(title, foot, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        for row in (head, *rows):
            print("\t".join(row))


def export(
    file: PacketFileArgument,
    form: Annotated[FormChoice, typer.Option("--to", help="Parquet and MCAP need the extra `offload[export]`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.")],
    source: SourceOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    grep: GrepOption = None,
    invert: InvertOption = False,
    multiline: MultilineOption = None,
    by_time: ByTimeOption = False,
    by_arrival: ByArrivalOption = False,
    time_format: TimeFormatOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write the lines for other programs, each with its source, number, time and place in its source.

    OUT appears when it is whole. Times are as for cat.
    """
    from .files.frame_source import FrameSource
    from .merge.export import export as write
    from .merge.names import Names

    wanted = _wanted(source, since, until, grep, invert=invert, multiline=multiline)
    wanted = ordered(wanted, time_format, by_time=by_time, by_arrival=by_arrival)
    with reading(file):
        check_packet_file(file)
        if source is not None:
            with FrameSource(file) as frames:
                _check_source(file, Names(frames), source)
        try:
            with bar("exporting", quiet=quiet) as watcher:
                count = write(file, output, form.value, wanted=wanted, force=force, watcher=watcher)
        except ImportError as exc:
            raise Failure(str(exc), USAGE) from exc
        except PacketError as exc:
            cure = f"`offload repair {file} -o NEW` first"
            raise Failure(f"{bad_file(file, exc)}; nothing was written, {cure}", BAD_FILE) from exc
        except OSError as exc:
            raise Failure(sentence(exc, output), NO_OUTPUT) from exc
    if not quiet:
        size = in_bytes(output.stat().st_size)
        print(f"{output}: {plural(count, 'line')}, {size}", file=sys.stderr)


def repair(
    file: PacketFileArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NEW", help="The packet file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace NEW if it is there.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a new packet file with all that is valid in a damaged one, and what is lost stated as gaps.

    What stands behind the damage is kept. FILE is not touched. `offload merge` can go on with NEW.
    """
    from .files.frame_source import FrameSource
    from .merge.repair import repair as mend

    with reading(file):
        FrameSource(file).close()  # whether it is there
        try:
            with bar("repairing", quiet=quiet) as watcher:
                done = mend(file, output, force=force, watcher=watcher)
        except OSError as exc:
            raise Failure(sentence(exc, output), NO_OUTPUT) from exc
    if as_json:
        report = {
            "file": os.fspath(file),
            "output": os.fspath(output),
            "frames": done.frames,
            "lines": done.lines,
            "damages": [{"from": d.start, "to": d.end, "reason": d.reason} for d in done.damages],
            "gaps": [_as_json(gap) for gap in done.gaps],
            "left_out": [{"offset": offset, "reason": reason} for offset, reason in done.left_out],
        }
        print_json(report)
        return
    for damage in done.damages:
        print(f"{file}: byte {damage.start}: {damage.end - damage.start} bytes hold no valid frame: {damage.reason}")
    for offset, reason in done.left_out:
        print(f"{file}: byte {offset}: a frame is left out: {reason}")
    for gap in done.gaps:
        print(f"{output}: stated as lost: {_told(gap)}")
    if not quiet:
        kept = f"{plural(done.frames, 'frame')}, {plural(done.lines, 'line')}, {plural(len(done.gaps), 'new gap')}"
        print(f"{output}: {kept}", file=sys.stderr)
