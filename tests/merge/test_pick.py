"""The lines that are wanted: the same as if all had been read and looked at one by one."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.lines import Lines
from offload.merge.pick import Picker, Wanted, parse_regex, parse_time
from offload.packets.codec import SourceInfo, line_pieces, packets_payload
from offload.packets.format import HEADER_BYTES, Compression, EntryFlag, FrameType

SECOND = 10**9
START = 1_700_000_000 * SECOND


class Log:
    """Sources that grow, with a clock."""

    def __init__(self, path: Path, sources: int = 2) -> None:
        self.path, self.now = path, START
        self.file = PacketFile(path, fsync="none", clock=lambda: self.now)
        self.ids = [
            self.file.open_source(SourceInfo(1, n, 0, 0, Compression.NONE, b"/logs/%d" % n)) for n in range(sources)
        ]
        self.open = [EntryFlag.NONE] * sources

    def lines(self, number: int, data: bytes, limit: int = 1 << 20) -> None:
        state = self.file.ledger.sources[self.ids[number]]
        ended = not data.endswith(b"\n")
        pieces: list[Piece] = []
        for piece in line_pieces(data, 0, len(data), self.open[number], ended=ended, limit=limit):
            place = state.resume_off + piece.start
            pieces.append(Piece(self.ids[number], data[piece.start : piece.end], place, piece.count, piece.flags))
            self.open[number] = piece.open
        for one in pieces:
            self.file.append([one])

    def packets(self, number: int, packets: list[bytes]) -> None:
        if self.open[number]:
            return
        payload, flags = packets_payload(packets)
        state = self.file.ledger.sources[self.ids[number]]
        self.file.append([Piece(self.ids[number], payload, state.resume_off, len(packets), flags, FrameType.PACKETS)])


One = tuple[str, int, int, int, bytes, bool]
"""Source, number, time, place in its source, bytes, whether it is without an end."""


def each(lines: Lines) -> Iterator[One]:
    off = lines.source_off
    all_of = lines.each()
    for number, data in enumerate(all_of):
        torn = lines.unterminated and number == len(all_of) - 1
        yield lines.name, lines.seq + number, lines.time_ns, off, data, torn
        off += len(data)


def picked(path: Path, wanted: Wanted) -> list[One]:
    with FrameSource(path) as frames:
        picker, found = Picker(frames, wanted), list[One]()
        while (batch := picker.read()) is not None:
            found += [one for lines in batch for one in each(lines)]
        return found + [one for lines in picker.close() for one in each(lines)]


# What happens: time passes, some lines of a source, in frames of so many bytes, or packets.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("time"), st.integers(0, 400)),
        st.tuples(st.just("commit"), st.none()),
        st.tuples(
            st.just("lines"),
            st.tuples(
                st.integers(0, 1),
                st.lists(st.sampled_from([b"a", b"ab\n", b"\n", b"bbbbbbb", b"c\r\n"])),
                st.integers(2, 20),
            ),
        ),
        st.tuples(st.just("packets"), st.tuples(st.integers(0, 1), st.lists(st.binary(max_size=3), min_size=1))),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(
    steps,
    st.sampled_from([None, "0", "[01]"]),
    st.none() | st.integers(0, 2000),
    st.none() | st.integers(0, 2000),
    st.sampled_from([None, b"a", b"^$", b"b+$"]),
    st.booleans(),
    st.none() | st.integers(0, 12),
)
def test_the_same_as_looking_at_every_line(
    happens: list[tuple[str, Any]],
    source: str | None,
    since: int | None,
    until: int | None,
    matching: bytes | None,
    invert: bool,
    tail: int | None,
) -> None:
    """Whatever was written, seeking and walking back give what a look at every line gives."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.merge.seek._NEAR", 0)  # so that small files are bisected too
        log = Log(Path(folder) / "p.opk")
        for what, value in happens:
            if what == "time":
                log.now += value * SECOND
            elif what == "commit":
                log.file.commit()
            elif what == "lines":
                number, parts, limit = value
                # A line that ends long after `until` is given as far as it had come then: not here.
                log.lines(number, b"".join(parts) + (b"" if until is None else b"\n"), limit)
            else:
                log.packets(*value)
        for number in range(2):
            log.lines(number, b"end\n")  # what never ends comes last, wherever it began
        log.file.close()
        every = picked(log.path, Wanted())
        assert [len([o for o in every if o[0] == name]) for name in "01"] == [
            log.file.ledger.sources[i].next_seq for i in log.ids
        ]
        for name in "01":
            assert [o[1] for o in every if o[0] == name] == list(range(len([o for o in every if o[0] == name])))
        begin = None if since is None else START + since * SECOND
        end = None if until is None else START + until * SECOND
        pattern = None if matching is None else re.compile(matching)
        expected = [
            one
            for one in every
            if (source is None or one[0] in source)
            and (begin is None or one[2] >= begin)
            and (end is None or one[2] < end)
            and (pattern is None or (pattern.search(one[4].removesuffix(b"\n")) is None) == invert)
        ]
        if tail is not None:
            expected = expected[len(expected) - tail :] if tail < len(expected) else expected
        assert picked(log.path, Wanted(source, begin, end, pattern, invert, tail)) == expected


def test_the_last_lines_of_a_large_file_cost_little_memory_and_time(tmp_path: Path) -> None:
    """Three last lines behind 20,000 others are found without reading the others."""
    log = Log(tmp_path / "p.opk")
    for number in range(2_000):
        log.lines(0, b"%d\n" % number * 10)
    log.file.close()
    reads: list[int] = []

    class Counted(FrameSource):
        def read(self):  # type: ignore[no-untyped-def]
            frames = super().read()
            reads.append(len(frames or ()))
            return frames

    with Counted(tmp_path / "p.opk") as frames:
        kept = list(Picker(frames, Wanted(tail=3)).read() or ())
    assert [one[4] for lines in kept for one in each(lines)] == [b"1999\n"] * 3
    assert sum(reads) < 10


def test_lines_before_damage_come_and_then_it_is_told(tmp_path: Path) -> None:
    """With too few lines behind damage, these are given, and then the damage is an error."""
    log = Log(tmp_path / "p.opk", 1)
    for number in range(20):
        log.lines(0, b"%d\n" % number)
        log.file.commit()
    log.file.close()
    with FrameSource(tmp_path / "p.opk") as frames:
        places = [frame.offset for frame in frames if frame.header.type is FrameType.LINES]
    data = bytearray((tmp_path / "p.opk").read_bytes())
    data[places[10] + HEADER_BYTES] ^= 1
    data[places[15] + 20] ^= 1
    (tmp_path / "p.opk").write_bytes(data)
    with FrameSource(tmp_path / "p.opk") as frames:
        picker = Picker(frames, Wanted(tail=10))
        kept = [one[4] for lines in picker.read() or () for one in each(lines)]
        assert kept == [b"16\n", b"17\n", b"18\n", b"19\n"]
        with pytest.raises(PacketError, match=r"names one of|checksum"):
            picker.read()


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * SECOND


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T18:00:00Z", utc("2026-11-21T18:00:00")),
        ("2026-11-21T18:00:00+02:00", utc("2026-11-21T16:00:00")),
        ("2026-11-21 18:00:00", utc("2026-11-21T13:00:00")),
        ("2026-11-21T18:00:00.123456", utc("2026-11-21T13:00:00") + 123_456_000),
        ("2026-11-21", utc("2026-11-20T19:00:00")),
        ("10m", START - 600 * SECOND),
        ("90s", START - 90 * SECOND),
        ("1h30m", START - 5400 * SECOND),
        ("1.5h", START - 5400 * SECOND),
        ("2d", START - 172_800 * SECOND),
        ("1w", START - 604_800 * SECOND),
        ("9999999w", 0),
        ("1960-01-01T00:00:00Z", 0),
    ],
)
def test_times_as_people_write_them(text: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ISO 8601, dates and how long ago; without a zone it is local time, here five hours ahead of UTC."""
    monkeypatch.setenv("TZ", "UTC-5")
    time.tzset()
    try:
        assert parse_time(text, START) == expected
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "10", "m", "yesterday", "10 m", "-5m", "2026-13-01", "12:00"])
def test_what_is_no_time_is_told(text: str) -> None:
    """Anything else is refused, with what is expected."""
    with pytest.raises(ValueError, match="is no time; expected a date"):
        parse_time(text)


def test_what_is_no_regular_expression_is_told() -> None:
    """A pattern that cannot be compiled is refused with the reason; one of any bytes is taken."""
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: missing \)"):
        parse_regex("(")
    assert parse_regex("\udcff").pattern == b"\xff"
