"""`export`: what other programs read is what the sources held, to the byte."""

from __future__ import annotations

import importlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.export import Form, escape, export, iso_time, unescape
from offload.merge.pick import Wanted
from offload.packets.codec import SourceInfo, packets_payload
from offload.packets.format import HEADER_BYTES, Compression, Flag, FrameType

TIME = 1_700_000_000_123_456_789
FORMS: list[Form] = ["ndjson", "text", "parquet", "mcap"]


def begin(file: PacketFile, name: bytes, source_id: int | None = None) -> int:
    return file.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/logs/" + name), source_id)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two sources, two generations; text, other bytes, packets, a line in pieces, one without an end."""
    file = PacketFile(tmp_path / "made.opk", fsync="none", clock=lambda: TIME)
    a, b = begin(file, b"a"), begin(file, b"b\xff")
    file.append([Piece(a, "größe\n\n".encode(), 0, 2), Piece(a, b"lo", 9, 0, Flag.FIRST)])
    payload, flags = packets_payload([b"p\nq", b"\xff\\"])
    file.append([Piece(b, payload, 0, 2, flags, FrameType.PACKETS), Piece(a, b"ng\r\nx\n", 11, 2, Flag.LAST)])
    begin(file, b"a", a)
    file.append([Piece(a, b"\x00\xfe\\\nend", 0, 2, Flag.UNTERMINATED)])
    file.close()
    return tmp_path / "made.opk"


EXPECTED: list[dict[str, Any]] = [
    {"source": "a", "generation": 0, "seq": 0, "offset": 0, "text": "größe"},
    {"source": "a", "generation": 0, "seq": 1, "offset": 8, "text": ""},
    {"source": "b\\xff", "generation": 0, "seq": 0, "offset": 0, "text": "p\nq", "packet": True},
    {"source": "b\\xff", "generation": 0, "seq": 1, "offset": 3, "text": "\\xff\\\\", "escaped": True, "packet": True},
    {"source": "a", "generation": 0, "seq": 2, "offset": 9, "text": "long\r"},
    {"source": "a", "generation": 0, "seq": 3, "offset": 15, "text": "x"},
    {"source": "a", "generation": 1, "seq": 4, "offset": 0, "text": "\x00\\xfe\\\\", "escaped": True},
    {"source": "a", "generation": 1, "seq": 5, "offset": 4, "text": "end", "unterminated": True},
]
TIMED = [e | {"time": "2023-11-14T22:13:20.123456789Z", "time_ns": TIME} for e in EXPECTED]


def test_ndjson_is_an_object_a_line(made: Path, tmp_path: Path) -> None:
    """Each line and packet is one JSON object with its source, number, time, place and text."""
    assert export(made, tmp_path / "out", "ndjson") == len(EXPECTED)
    assert [json.loads(line) for line in (tmp_path / "out").read_bytes().split(b"\n")[:-1]] == TIMED


def test_text_is_a_line_behind_time_and_source(made: Path, tmp_path: Path) -> None:
    """Each line stands as it was behind its time and source; a packet's LF is written so that it stays one line."""
    assert export(made, tmp_path / "out", "text") == len(EXPECTED)
    lines = (tmp_path / "out").read_bytes().split(b"\n")
    prefix = b"2023-11-14T22:13:20.123456789Z "
    assert all(line.startswith(prefix) for line in lines[:-1])
    assert [line.removeprefix(prefix) for line in lines] == [
        "a: größe".encode(),
        b"a: ",
        b"b\\xff: p\\nq",
        b"b\\xff: \xff\\",
        b"a: long\r",
        b"a: x",
        b"a: \x00\xfe\\",
        b"a: end",
        b"",
    ]


def test_parquet_is_read_back_by_pyarrow(made: Path, tmp_path: Path) -> None:
    """pyarrow finds the same records, the time as nanoseconds in UTC, the source as a dictionary."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    assert export(made, tmp_path / "out", "parquet") == len(EXPECTED)
    table = parquet.read_table(tmp_path / "out")
    assert table.schema.field("time").type == arrow.timestamp("ns", tz="UTC")
    assert table.schema.field("source").type == arrow.dictionary(arrow.int32(), arrow.string())
    rows = table.set_column(3, "time_ns", table["time"].cast(arrow.int64())).to_pylist()
    plain = {"escaped": False, "unterminated": False, "packet": False, "time_ns": TIME}
    assert rows == [plain | e for e in EXPECTED]


def test_mcap_is_read_back_by_its_reader(made: Path, tmp_path: Path) -> None:
    """The mcap package's reader, checking every CRC, finds a channel for each source and the same records."""
    reader = importlib.import_module("mcap.reader")
    assert export(made, tmp_path / "out", "mcap") == len(EXPECTED)
    with (tmp_path / "out").open("rb") as file:
        found = list(reader.make_reader(file, validate_crcs=True).iter_messages(log_time_order=False))
    assert [json.loads(message.data) for _, _, message in found] == TIMED
    assert [channel.topic for _, channel, _ in found] == [e["source"] for e in EXPECTED]
    assert {(m.log_time, m.publish_time) for _, _, m in found} == {(TIME, TIME)}
    assert [m.sequence for _, _, m in found] == [e["seq"] for e in EXPECTED]
    assert {(schema.name, schema.encoding) for schema, _, _ in found} == {("offload.Line", "jsonschema")}


@given(st.binary() | st.text().map(str.encode))
@example(b"\\xff")
@example(b"\\\\xff\xff")
@example("\u20ac\\".encode() + b"\xe2\x82")
def test_any_bytes_go_there_and_back(data: bytes) -> None:
    """What is no UTF-8 is escaped so that its bytes can be had back; what is, stays as it is."""
    text, escaped = escape(data)
    text.encode()  # no surrogates: any JSON or Parquet reader takes it
    assert (unescape(text) if escaped else text.encode()) == data
    assert escaped == (data.decode(errors="replace").encode() != data)


@pytest.mark.parametrize(("time_ns", "text"), [(0, "1970-01-01T00:00:00.000000000Z"), (TIME, TIMED[0]["time"])])
def test_times_have_all_their_digits(time_ns: int, text: str) -> None:
    """No nanosecond is rounded away."""
    assert iso_time(time_ns) == text


def test_what_is_wanted_only(made: Path, tmp_path: Path) -> None:
    """The same choice of lines as for cat."""
    import re

    wanted = Wanted(source="a", matching=re.compile(b"n"), since=TIME)
    assert export(made, tmp_path / "out", "ndjson", wanted=wanted) == 2
    assert [json.loads(line)["seq"] for line in (tmp_path / "out").read_text().splitlines()] == [2, 5]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_of_a_damaged_file(made: Path, tmp_path: Path, form: Form) -> None:
    """Where the packet file is damaged, no half of an export gets a name, and what was there stays."""
    with FrameSource(made) as source:
        last = list(source)[-2]
    data = bytearray(made.read_bytes())
    data[last.offset + HEADER_BYTES] ^= 1
    made.write_bytes(data)
    (tmp_path / "out").write_bytes(b"kept")
    with pytest.raises(PacketError, match="payload checksum"):
        export(made, tmp_path / "out", form, force=True)
    assert (tmp_path / "out").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["made.opk", "out"]


def test_nothing_is_overwritten_unasked(made: Path, tmp_path: Path) -> None:
    """A file that is there stays, unless it is asked for; the packet file stays whatever is asked."""
    (tmp_path / "out").write_bytes(b"kept")
    with pytest.raises(FileExistsError, match="is there already; give another name, or --force"):
        export(made, tmp_path / "out", "ndjson")
    assert (tmp_path / "out").read_bytes() == b"kept"
    export(made, tmp_path / "out", "ndjson", force=True)
    assert (tmp_path / "out").read_bytes().startswith(b'{"source"')
    before = made.read_bytes()
    with pytest.raises(FileExistsError, match="is the file to read; give another name"):
        export(made, made, "ndjson", force=True)
    assert made.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["made.opk", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the lines take no more memory."""
    monkeypatch.setattr("offload.merge.export._GROUP_BYTES", 1 << 20)
    peaks: list[int] = []
    for count in (1, 3):
        file = PacketFile(tmp_path / f"{count}.opk", fsync="none", clock=lambda: TIME)
        a = begin(file, b"a")
        data = b"".join(b"%01000d\n" % n for n in range(200))
        for n in range(40 * count):
            file.append([Piece(a, data, n * len(data), 200)])
        file.close()
        tracemalloc.start()
        export(tmp_path / f"{count}.opk", tmp_path / f"{count}.out", form)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + (1 << 20), peaks
