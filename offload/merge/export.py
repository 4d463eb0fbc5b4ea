"""Packets for other programs: NDJSON, text, Parquet, MCAP. For one thread; memory is that of a few MiB of lines.

One record for each line or packet, the same in every form but text:

    source        its short name (its path is what `stat --json` tells)
    generation    of the source: 0, 1, 2 …
    seq           number of the line in its source, over all generations
    time          of arrival: ISO 8601 in UTC with nanoseconds; a timestamp in Parquet, `log_time` too in MCAP
    time_ns       the same as Unix nanoseconds; not in Parquet
    offset        of the line's first byte in this generation of the source
    text          the line without its LF, or the packet
    escaped       only where it is not UTF-8: in `text`, `\\xHH` is a byte and `\\\\` a backslash (`unescape` undoes it)
    unterminated  the source ended in this line: it had no LF
    packet        it is a packet, not a line, and may hold LFs
    lines         of a record of several lines (`Wanted.multiline`): how many; the other fields are those of its first
    part, rest    it was too long to be given at once: it goes on in the next record, or goes on with the one before

These but `lines` are left out where they are false; Parquet has the first three always, and not the last. So every
line's bytes can be had back.

    ndjson   a JSON object a line (UTF-8)
    text     `TIME SOURCE: LINE` a line: the line's bytes as they are, but an LF inside a packet, which is written `\\n`
    parquet  zstd, a row group for some MiB of text; `source` as a dictionary. Needs pyarrow.
    mcap     a channel for each source, its messages the NDJSON objects (schema `offload.Line`); zstd. Needs mcap.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal, Protocol

from ..files.frame_source import FrameSource
from .audit import Watcher, unwatched
from .lines import Lines
from .output import new_file
from .pick import Picker, Wanted

Form = Literal["ndjson", "text", "parquet", "mcap"]
Record = dict[str, Any]

_GROUP_BYTES = 8 << 20  # of text in a row group of Parquet, held as Python objects until it is written
_GROUP_ROWS = 1 << 17
_CHUNK_BYTES = 1 << 20  # of MCAP; its index keeps some hundred bytes for each
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|\\)")
_SCHEMA = {
    "type": "object",
    "properties": {
        "source": {"type": "string"},
        "generation": {"type": "integer"},
        "seq": {"type": "integer"},
        "time": {"type": "string", "format": "date-time"},
        "time_ns": {"type": "integer"},
        "offset": {"type": "integer"},
        "text": {"type": "string"},
        "escaped": {"type": "boolean"},
        "unterminated": {"type": "boolean"},
        "packet": {"type": "boolean"},
        "lines": {"type": "integer"},
        "rest": {"type": "boolean"},
        "part": {"type": "boolean"},
    },
}


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: Form,
    *,
    wanted: Wanted | None = None,
    force: bool = False,
    watcher: Watcher = unwatched,
) -> int:
    """Write the lines of a packet file in another form; of one that grows, those that were there when it began.

    Args:
        out: appears when it is whole.
        wanted: which lines; None: all.
        force: replace `out` if it is there.

    Returns:
        How many lines and packets were written.

    Raises:
        ImportError: the form needs a package that is not installed; says which extra installs it.
        FileExistsError: `out` is there.
        PacketError: the file is damaged. Nothing is left of `out`.
        OSError: as `open` and `write`.
    """
    write = _FORMS[form]
    with FrameSource(path) as frames, new_file(out, made_of=path, force=force) as file:
        size, count = frames.size(), 0
        picker = Picker(frames, wanted or Wanted())
        with contextlib.closing(write(file)) as writer:
            while frames.offset < size and (batch := picker.read()) is not None:
                for lines in batch:
                    count += writer.write(lines)
                watcher(frames.offset, size)
            for lines in picker.close():
                count += writer.write(lines)
        if not picker.ended and not frames.is_being_written():
            frames.end()
    return count


def escape(data: bytes) -> tuple[str, bool]:
    """Bytes as text, and whether they had to be escaped as they are not UTF-8; see the head of this module."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.replace(b"\\", b"\\\\").decode(errors="backslashreplace"), True


def unescape(text: str) -> bytes:
    """The bytes of a text that is marked as escaped."""
    parts: list[bytes] = []
    at = 0
    for found in _ESCAPE.finditer(text):
        parts += (text[at : found.start()].encode(), b"\\" if found[1] is None else bytes.fromhex(found[1]))
        at = found.end()
    return b"".join((*parts, text[at:].encode()))


def iso_time(time_ns: int) -> str:
    """Unix nanoseconds as ISO 8601 in UTC, all nine digits."""
    seconds, rest = divmod(time_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def records(lines: Lines) -> Iterator[Record]:
    """A record for each line or packet."""
    time, offset = iso_time(lines.time_ns), lines.source_off
    is_packet = lines.packets is not None
    for number, data in enumerate(lines.each()):
        ended = not is_packet and data.endswith(b"\n")
        text, escaped = escape(data[:-1] if ended else data)
        record: Record = {
            "source": _name(lines),
            "generation": lines.generation,
            "seq": lines.seq + number,
            "time": time,
            "time_ns": lines.time_ns,
            "offset": offset,
            "text": text,
        }
        if escaped:
            record["escaped"] = True
        record |= lines.said()
        if is_packet:
            record["packet"] = True
        elif not ended:
            record["unterminated"] = True
        yield record
        offset += len(data)


def _name(lines: Lines) -> str:
    """A source's name as UTF-8 can say it."""
    return os.fsencode(lines.name).decode(errors="backslashreplace")


class _Writer(Protocol):
    def write(self, lines: Lines) -> int:
        """Write these; how many they are."""
        ...

    def close(self) -> None:
        """Write what is held, and the end. The file stays open."""
        ...


class _Ndjson:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, lines: Lines) -> int:
        found = [json.dumps(record, ensure_ascii=False) + "\n" for record in records(lines)]
        self._file.write("".join(found).encode())
        return len(found)

    def close(self) -> None:
        pass


class _Text:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, lines: Lines) -> int:
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _name(lines))
        prefix = f"{iso_time(lines.time_ns)} {name}: ".encode()
        each = lines.each()
        if lines.packets is not None:
            each = [packet.replace(b"\n", b"\\n") for packet in each]
        self._file.write(b"".join(prefix + data + (b"" if data.endswith(b"\n") else b"\n") for data in each))
        return len(each)

    def close(self) -> None:
        pass


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        self._arrow = pa = _module("pyarrow", "parquet")
        parquet = _module("pyarrow.parquet", "parquet")
        self._schema = pa.schema(
            [
                pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
                pa.field("generation", pa.uint32(), nullable=False),
                pa.field("seq", pa.uint64(), nullable=False),
                pa.field("time", pa.timestamp("ns", tz="UTC"), nullable=False),
                pa.field("offset", pa.uint64(), nullable=False),
                pa.field("text", pa.large_string(), nullable=False),
                pa.field("escaped", pa.bool_(), nullable=False),
                pa.field("unterminated", pa.bool_(), nullable=False),
                pa.field("packet", pa.bool_(), nullable=False),
            ]
        )
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Record] = []
        self._held = 0

    def write(self, lines: Lines) -> int:
        before = len(self._rows)
        written = 0
        for record in records(lines):
            row: Record = {"escaped": False, "unterminated": False, "packet": False} | record
            row["time"] = row.pop("time_ns")
            self._rows.append(row)
            self._held += len(row["text"])
            if self._held >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
                written += len(self._rows)
                self._flush()
        return written + len(self._rows) - before

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()
        self._held = 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


class _Mcap:
    def __init__(self, file: BinaryIO) -> None:
        writer = _module("mcap.writer", "mcap")
        self._writer = writer.Writer(file, chunk_size=_CHUNK_BYTES, compression=writer.CompressionType.ZSTD)
        self._writer.start(profile="", library="offload")
        schema = json.dumps(_SCHEMA).encode()
        self._schema = self._writer.register_schema(name="offload.Line", encoding="jsonschema", data=schema)
        self._channels: dict[int, int] = {}

    def write(self, lines: Lines) -> int:
        channel = self._channels.get(lines.source_id)
        if channel is None:
            channel = self._writer.register_channel(_name(lines), "json", self._schema)
            self._channels[lines.source_id] = channel
        count = 0
        for record in records(lines):
            self._writer.add_message(
                channel_id=channel,
                log_time=record["time_ns"],
                publish_time=record["time_ns"],
                sequence=record["seq"] & 0xFFFF_FFFF,
                data=json.dumps(record, ensure_ascii=False).encode(),
            )
            count += 1
        return count

    def close(self) -> None:
        self._writer.finish()


_FORMS: dict[Form, Callable[[BinaryIO], _Writer]] = {
    "ndjson": _Ndjson,
    "text": _Text,
    "parquet": _Parquet,
    "mcap": _Mcap,
}


def _module(name: str, form: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        package = name.partition(".")[0]
        message = f"{form} needs {package}, which is not installed; pip install 'offload[export]'"
        raise ImportError(message, name=package) from exc
