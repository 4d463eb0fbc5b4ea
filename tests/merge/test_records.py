"""Records of several lines, and other orders, on read: the same as if all lines were looked at one by one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge import records
from offload.merge.export import export, unescape
from offload.merge.lines import Lines, json_lines
from offload.merge.pick import Picker, Wanted
from offload.merge.records import Record, Records
from offload.merge.reorder import By
from offload.packets.codec import SourceInfo, line_pieces, packets_payload
from offload.packets.format import Compression, EntryFlag, FrameType

SECOND = 10**9
START = 1_700_000_000 * SECOND
HEAD = re.compile(rb"^[0-9A]")


class Log:
    """A packet file of some sources, with a clock."""

    def __init__(self, path: Path, sources: int = 3) -> None:
        self.path, self.now = path, START
        self.file = PacketFile(path, fsync="none", clock=lambda: self.now)
        self.open = [EntryFlag.NONE] * sources
        self.infos = [SourceInfo(1, n, 0, 0, Compression.NONE, b"/logs/%d" % n) for n in range(sources)]
        for info in self.infos:
            self.file.open_source(info)

    def lines(self, number: int, data: bytes, limit: int = 1 << 20, arrived: int | None = None) -> None:
        state = self.file.ledger.sources[number]
        ended, start = not data.endswith(b"\n"), state.resume_off
        for piece in line_pieces(data, 0, len(data), self.open[number], ended=ended, limit=limit):
            part = data[piece.start : piece.end]
            one = Piece(number, part, start + piece.start, piece.count, piece.flags, time_ns=arrived)
            self.file.append([one])
            self.open[number] = piece.open

    def rotate(self, number: int) -> None:
        self.file.open_source(self.infos[number], number)
        self.open[number] = EntryFlag.NONE


def read(path: Path, wanted: Wanted) -> list[Lines]:
    with FrameSource(path) as frames:
        picker, found = Picker(frames, wanted), list[Lines]()
        while (batch := picker.read()) is not None:
            found += batch
        found += picker.close()
        if not picker.ended:
            frames.end()
        return found


def texts(path: Path, wanted: Wanted) -> list[bytes]:
    return [text for lines in read(path, wanted) for text in lines.each()]


def stamp(seconds: int) -> bytes:
    return f"{datetime.fromtimestamp(START // SECOND + seconds, UTC):%Y-%m-%dT%H:%M:%SZ}".encode()


# --- records ----------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("time"), st.integers(0, 300)),
        st.tuples(st.just("rotate"), st.integers(0, 2)),
        st.tuples(st.just("commit"), st.none()),
        st.tuples(
            st.just("lines"),
            st.tuples(
                st.integers(0, 2), st.lists(st.sampled_from([b"A1\n", b" x\n", b" b\r\n", b"A\n"])), st.integers(2, 9)
            ),
        ),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(
    steps,
    st.sampled_from([None, "0", "[12]"]),
    st.none() | st.integers(0, 1500),
    st.none() | st.integers(0, 1500),
    st.sampled_from([None, b"b", b"1$", b"^ x$"]),
    st.booleans(),
    st.none() | st.integers(0, 6),
)
def test_records_are_what_stands_between_two_beginnings(
    happens: list[tuple[str, Any]],
    source: str | None,
    since: int | None,
    until: int | None,
    matching: bytes | None,
    invert: bool,
    tail: int | None,
) -> None:
    """Joined over frames, rotation and other sources, in the order in which they end, then chosen as they should be."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.merge.seek._NEAR", 0)
        log = Log(Path(folder) / "p.opk")
        # Each source begins with a beginning: where reading begins later, what is before one is left out.
        model: list[tuple[str, int, list[bytes]]] = []
        ended: list[tuple[str, int, list[bytes]]] = []
        under_way: dict[int, tuple[str, int, list[bytes]]] = {}
        beginnings: list[tuple[str, Any]] = [("lines", (n, [b"A\n"], 9)) for n in range(3)]
        for what, value in beginnings + happens:
            if what == "time":
                log.now += value * SECOND
            elif what == "rotate":
                log.rotate(value)
            elif what == "commit":
                log.file.commit()
            else:
                number, parts, limit = value
                log.lines(number, b"".join(parts), limit)
                for line in parts:
                    if HEAD.search(line):
                        if number in under_way:
                            ended.append(under_way.pop(number))
                        under_way[number] = (str(number), log.now, [])
                    under_way[number][2].append(line)
        log.file.close()
        model = ended + list(under_way.values())
        wanted = Wanted(
            source=source,
            since=None if since is None else START + since * SECOND,
            until=None if until is None else START + until * SECOND,
            matching=None if matching is None else re.compile(matching),
            invert=invert and matching is not None,
            tail=tail,
            multiline=HEAD,
        )
        chosen = [
            b"".join(lines)
            for name, moment, lines in model
            if (source is None or name in source)
            and (wanted.since is None or moment >= wanted.since)
            and (wanted.until is None or moment < wanted.until)
            and (
                wanted.matching is None
                or any(wanted.matching.search(line[:-1]) is not None for line in lines) != wanted.invert
            )
        ]
        expected = chosen if tail is None else chosen[max(0, len(chosen) - tail) :]
        found = texts(log.path, wanted)
        if wanted.until is None:
            assert sorted(found) == sorted(expected) if tail is None else len(found) == len(expected)
            # Those that never ended come last, in the order in which they were begun.
            ends = len(ended) if tail is None and since is None and matching is None and source is None else 0
            assert found[:ends] == expected[:ends]
        else:
            # A record that goes on long after `until` is given, and chosen, as far as it had come then.
            assert len(found) == len(expected) or tail is not None or matching is not None
            assert all(any(e.startswith(f.rstrip()) for e in map(b"".join, (m[2] for m in model))) for f in found)


def test_the_last_records_are_the_last(tmp_path: Path) -> None:
    """`tail` counts records, and goes back far enough for their beginnings."""
    log = Log(tmp_path / "p.opk", 2)
    log.lines(1, b"A long\n")
    for number in range(200):
        log.lines(0, b"A%d\n at\n" % number, 5)
        log.lines(1, b" goes on\n")
        log.file.commit()
    log.file.close()
    found = texts(log.path, Wanted(tail=3, multiline=HEAD))
    # Those under way at the end come last, in the order in which they began; of them, the long one began first.
    assert found == [b"A198\n at\n", b"A long\n" + b" goes on\n" * 200, b"A199\n at\n"]


def test_a_record_that_is_too_long_comes_in_parts(tmp_path: Path) -> None:
    """Memory is bounded: parts, marked, that make the record when they are joined."""
    lines = Lines(0, "a", 5, START, b"A\n" + b" 1234567\n" * 10 + b"A\n", source_off=100)
    joiner = Records(HEAD, max_bytes=30)
    found = [*joiner.feed(lines), *joiner.close()]
    parts = [one for one in found if isinstance(one, Record)]
    assert b"".join(part.data for part in parts) == lines.data
    assert all(len(part.data) <= 30 for part in parts)
    assert [(part.rest, part.part) for part in parts] == [
        (False, True),
        *[(True, True)] * (len(parts) - 3),
        (True, False),
        (False, False),
    ]
    assert joiner.parts == 1
    for part in parts:
        assert lines.data[part.source_off - 100 :].startswith(part.data)
        assert lines.data[: part.source_off - 100].count(b"\n") == part.seq - 5


def test_all_that_is_open_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many sources' open records, the largest is given in parts when together they are too much."""
    monkeypatch.setattr(records, "ALL_BYTES", 1000)
    joiner = Records(HEAD, max_bytes=500)
    given = [
        record
        for number in range(20)
        for record in joiner.feed(Lines(number, str(number), 0, START, b"A\n" + b" " * 98 + b"\n"))
    ]
    assert len(given) >= 10
    assert all(isinstance(record, Record) and record.part for record in given)
    (rest,) = [*joiner.feed(Lines(given[0].source_id, "x", 2, START, b" more\nA\n"))]
    assert isinstance(rest, Record)
    assert (rest.rest, rest.headless, rest.data) == (True, False, b" more\n")


def test_a_quiet_moment_ends_a_record() -> None:
    """Nothing was added for a while: the record is given; what comes still is told to be the rest of it."""
    now = count().__next__
    joiner = Records(HEAD, clock=lambda: float(now()))
    assert not list(joiner.feed(Lines(0, "a", 0, START, b"A\n at\n")))
    assert not list(joiner.quiet(5.0))
    for _ in range(10):
        now()
    (record,) = joiner.quiet(5.0)
    assert record.data == b"A\n at\n"
    assert not list(joiner.feed(Lines(0, "a", 2, START, b" late\n")))
    (rest,) = joiner.close()
    assert isinstance(rest, Record)
    assert (rest.data, rest.rest) == (b" late\n", True)


def test_a_record_as_json(tmp_path: Path) -> None:
    """One object a record: its lines in one text, how many they are, number and time of the first."""
    log = Log(tmp_path / "p.opk", 1)
    log.lines(0, b"A\n x\n\xff\nA end")
    log.file.close()
    found = [json.loads(one) for lines in read(log.path, Wanted(multiline=HEAD)) for one in json_lines(lines)]
    assert [(one["seq"], one["lines"], one.get("text"), one.get("unterminated")) for one in found] == [
        (0, 3, None, None),
        (3, 1, "A end", True),
    ]
    export(log.path, tmp_path / "out.ndjson", "ndjson", wanted=Wanted(multiline=HEAD))
    rows = [json.loads(row) for row in (tmp_path / "out.ndjson").read_text().splitlines()]
    assert unescape(rows[0]["text"]) == b"A\n x\n\xff"
    assert [row["lines"] for row in rows] == [3, 1]


# --- order ------------------------------------------------------------------------------------------------------------

pieces = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.none() | st.integers(0, 20), max_size=5), st.integers(9, 80)), max_size=20
)


def text_of(number: int, moment: int | None, what: int) -> bytes:
    return (b"\tat %d %d" % (number, what)) if moment is None else stamp(moment) + b" %d %d" % (number, what)


@settings(max_examples=200, deadline=None)
@given(pieces, st.booleans(), st.none() | st.integers(0, 8))
def test_by_time_is_the_order_of_all_sources(
    parts: list[tuple[int, list[int | None], int]], unended: bool, tail: int | None
) -> None:
    """Whatever order the lines were merged in, they come by their times, each source in its own order."""
    with tempfile.TemporaryDirectory() as folder:
        log, numbers = Log(Path(folder) / "p.opk"), count()
        sources: dict[int, list[tuple[int, bytes]]] = {0: [], 1: [], 2: []}
        last = dict.fromkeys(sources, -1)
        for number, moments, limit in parts:
            log.now += 1
            lines = list[bytes]()
            for moment in moments:
                last[number] = last[number] if moment is None else moment
                lines.append(text_of(number, moment, next(numbers)) + b"\n")
                sources[number].append((last[number], lines[-1]))
            if lines:
                log.lines(number, b"".join(lines), limit)
        if unended:
            log.lines(1, b"no end")
            sources[1].append((last[1], b"no end"))
        log.file.close()
        found = read(log.path, Wanted(by="time", tail=tail))
        got = [(lines.source_id, text) for lines in found for text in lines.each()]
        whole = [
            (n, text) for lines in read(log.path, Wanted(by="time")) for n in [lines.source_id] for text in lines.each()
        ]
        assert got == (whole if tail is None else whole[max(0, len(whole) - tail) :])
        for number, written in sources.items():
            assert [text for n, text in whole if n == number] == [text for _, text in written]
        # Of the heads of all sources, the one that comes next is never later than another.
        rest = {number: [key for key, _ in written] for number, written in sources.items()}
        for number, _ in whole:
            key = rest[number].pop(0)
            assert all(key <= keys[0] for other, keys in rest.items() if keys and other != number)
        places = [(lines.source_id, lines.seq, lines.source_off) for lines in read(log.path, Wanted(by="time"))]
        for number, group in groupby(sorted(places), key=lambda place: place[0]):
            data = b"".join(text for _, text in sources[number])
            assert all(data[:off].count(b"\n") == seq for _, seq, off in group)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), max_size=30))
def test_by_arrival_is_the_order_in_which_they_came(frames: list[tuple[int, int]]) -> None:
    """Of a file whose frames were held back, each source in order, arrival's order is had back."""
    with tempfile.TemporaryDirectory() as folder:
        log, came = Log(Path(folder) / "p.opk"), list[tuple[int, bytes]]()
        latest = dict.fromkeys(range(3), 0)
        for what, (number, held) in enumerate(frames):
            log.now += 30 * SECOND
            moment = latest[number] = max(latest[number] + 1, log.now - held * SECOND)
            came.append((moment, b"%d\n" % what))
            log.lines(number, came[-1][1], arrived=moment)
        log.file.close()
        assert texts(log.path, Wanted(by="arrival")) == [text for _, text in sorted(came, key=lambda one: one[0])]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 29), st.integers(0, 40)), max_size=40),
    st.integers(0, 600),
    st.integers(1, 600),
)
def test_since_and_until_are_right_where_lines_were_held(
    frames: list[tuple[int, int, int]], since: int, span: int
) -> None:
    """Where arrival goes back by as much as a merge by time may hold lines, all that is wanted is found."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.merge.seek._NEAR", 0)
        log, came = Log(Path(folder) / "p.opk"), list[tuple[int, bytes]]()
        latest = dict.fromkeys(range(3), 0)
        for what, (number, held, passed) in enumerate(frames):
            log.now += passed * SECOND
            moment = latest[number] = max(latest[number], log.now - held * SECOND)
            came.append((moment, b"%d\n" % what))
            log.lines(number, came[-1][1], arrived=moment)
            if what % 3 == 0:
                log.file.commit()
        log.file.close()
        begin, end = START + since * SECOND, START + (since + span) * SECOND
        orders: tuple[By | None, ...] = (None, "arrival")
        for by in orders:
            wanted = Wanted(since=begin, until=end, by=by)
            expected = [(moment, text) for moment, text in came if begin <= moment < end]
            assert sorted(texts(log.path, wanted)) == sorted(text for _, text in expected)


def test_packets_go_by_their_times_too(tmp_path: Path) -> None:
    """A packet has its time where it begins, as a line has."""
    log = Log(tmp_path / "p.opk", 2)
    payload, flags = packets_payload([stamp(3) + b" c", b"with it\n", stamp(4) + b" d"])
    log.file.append([Piece(0, payload, 0, 3, flags, FrameType.PACKETS)])
    log.lines(1, stamp(1) + b" a\n" + stamp(3) + b" e\n")
    log.file.close()
    found = texts(log.path, Wanted(by="time"))
    assert [text[-2:] for text in found] == [b"a\n", b" c", b"t\n", b"e\n", b" d"]


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def packet(tmp_path: Path) -> Path:
    log = Log(tmp_path / "p.opk", 2)
    log.lines(0, stamp(0) + b" a\n\tat x\n" + stamp(2) + b" c\n")
    log.lines(1, stamp(1) + b" b\n\tat y\n")
    log.file.close()
    return log.path


def run(*arguments: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "offload", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, " ".join(done.stderr.split())


def test_cat_by_time_and_in_records(packet: Path) -> None:
    """The options do what the classes do."""
    assert [line[-2:] for line in run("cat", "--by-time", packet)[1].splitlines()] == [" a", " x", " b", " y", " c"]
    assert [line[-2:] for line in run("cat", "--by-arrival", packet)[1].splitlines()] == [" a", " x", " c", " b", " y"]
    found = run("cat", "--multiline", r"^\S", "--grep", "at y", "--prefix", packet)[1].splitlines()
    assert [line[:3] + line[-2:] for line in found] == ["1:  b", "1:  y"]
    last = run("cat", "--multiline", r"^\S", "--by-time", "--tail", "2", "--json", packet)[1].splitlines()
    assert [json.loads(one)["lines"] for one in last] == [2, 1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--by-time", "--by-arrival"], "two orders"),
        (["--time-format", "%Y-%m-%d %H"], "give that too"),
        (["--by-time", "--time-format", "%H"], "names no day"),
        (["--by-time", "-f"], "leave out --follow"),
        (["--multiline", "("], "--multiline: '(' is no regular expression"),
    ],
)
def test_wrong_usage(packet: Path, options: list[str], what: str) -> None:
    """What cannot be done is told, with 2."""
    code, _, told = run("cat", *options, packet)
    assert code == 2
    assert what in told


def test_following_gives_a_record_after_a_quiet_moment(packet: Path) -> None:
    """While following, the last record is given without waiting for the next."""
    with FrameSource(packet, follow=True) as frames:
        picker = Picker(frames, Wanted(multiline=re.compile(rb"^\S")), follow=True)

        def each() -> Iterator[Lines]:
            while (batch := picker.read()) is not None:
                yield from batch

        assert [lines.data[-3:] for lines in each()] == [b" x\n"]
        deadline = time.monotonic() + 60
        late: list[Lines] = []
        while len(late) < 2 and time.monotonic() < deadline:
            late += picker.quiet()
        assert sorted(lines.data[-3:] for lines in late) == [b" c\n", b" y\n"]


def test_what_grows_cannot_be_put_in_order(packet: Path) -> None:
    """To follow in another order is refused."""
    with FrameSource(packet) as frames, pytest.raises(ValueError, match="merge it by time instead"):
        Picker(frames, Wanted(by="time"), follow=True)
