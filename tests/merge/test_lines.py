"""Lines out of a packet file: whole, in order, and never two run together."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.lines import LineReader, LineWriter, json_lines
from offload.packets.codec import GapInfo, SourceInfo, line_pieces, packets_payload
from offload.packets.format import NONE_U64, Compression, Flag, FrameType, GapReason

MB = 1 << 20
START = 1_700_000_000_000_000_000


class Writing:
    """A packet file in the making: what each source gives, a read at a time."""

    def __init__(self, file: PacketFile) -> None:
        self._file = file
        self._ids: dict[str, int] = {}

    def begin(self, name: str) -> None:
        """The source begins, or its next generation."""
        info = SourceInfo(1, 2, 0, 0, Compression.NONE, f"/logs/{name}".encode())
        self._ids[name] = self._file.open_source(info, self._ids.get(name))

    def read(self, name: str, data: bytes, *, ended: bool = False, limit: int = 16) -> None:
        """Its next bytes, in frames of at most `limit`; `ended`: nothing is known to come behind them."""
        if name not in self._ids:
            self.begin(name)
        source_id = self._ids[name]
        state = self._file.ledger.sources[source_id]
        for piece in line_pieces(data, 0, len(data), state.open, ended=ended, limit=limit):
            frame = Piece(source_id, data[piece.start : piece.end], state.resume_off, piece.count, piece.flags)
            self._file.append([frame])

    def packets(self, name: str, *packets: bytes) -> None:
        if name not in self._ids:
            self.begin(name)
        source_id = self._ids[name]
        payload, flags = packets_payload(packets)
        at = self._file.ledger.sources[source_id].resume_off
        self._file.append([Piece(source_id, payload, at, len(packets), flags, FrameType.PACKETS)])

    def gap(self, name: str) -> None:
        source_id = self._ids[name]
        at = self._file.ledger.sources[source_id].resume_off
        self._file.gap(source_id, GapInfo(at, NONE_U64, NONE_U64, GapReason.TRUNCATED))
        self._file.append([])


Make = Callable[..., Path]
"""Make a packet file by some functions that are given the Writing, one after another."""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*steps: Callable[[Writing], object]) -> Path:
        path = tmp_path / "made.opk"
        times = iter(range(START, START + 10**9))
        file = PacketFile(path, fsync="none", clock=lambda: next(times))
        writing = Writing(file)
        for step in steps:
            step(writing)
        file.close()
        return path

    return make


@contextmanager
def reading(path: Path, wanted: str | None = None) -> Iterator[tuple[FrameSource, LineReader]]:
    with FrameSource(path) as source:
        yield source, LineReader(source, wanted)


def cat(path: Path, wanted: str | None = None, *, prefix: bool = False) -> bytes:
    out = io.BytesIO()
    writer = LineWriter(out, prefix=prefix)
    with reading(path, wanted) as (source, reader):
        for frame in source:
            for lines in reader.feed(frame):
                writer.write(lines)
        for lines in reader.close():
            writer.write(lines)
    return out.getvalue()


def records(path: Path, wanted: str | None = None) -> list[dict[str, object]]:
    with reading(path, wanted) as (source, reader):
        found: list[dict[str, object]] = []
        for frame in source:
            found += [json.loads(line) for lines in reader.feed(frame) for line in json_lines(lines)]
        return found + [json.loads(line) for lines in reader.close() for line in json_lines(lines)]


def test_lines_come_as_they_were(make: Make) -> None:
    """CR LF, NUL and bytes that are no text come out untouched; nothing is put in where lines end."""
    path = make(
        lambda w: w.read("a", b"one\r\n\0\n\xff\n"), lambda w: w.read("b", b"two\n"), lambda w: w.read("a", b"\n")
    )
    assert cat(path) == b"one\r\n\0\n\xff\ntwo\n\n"
    assert cat(path, "a") == b"one\r\n\0\n\xff\n\n"


def test_fragments_of_a_long_line_come_out_as_one_line(make: Make) -> None:
    """A line longer than a frame is whole again, though other sources' frames stand between its pieces."""

    def write(w: Writing) -> None:
        w.read("a", b"x" * 16)
        w.read("b", b"between\n")
        w.read("a", b"y" * 16)
        w.read("a", b"z\nnext\n")

    path = make(write)
    assert cat(path) == b"between\n" + b"x" * 16 + b"y" * 16 + b"z\nnext\n"
    assert cat(path, prefix=True) == b"b: between\na: " + b"x" * 16 + b"y" * 16 + b"z\na: next\n"
    assert [(r["source"], r["seq"], len(str(r["text"]))) for r in records(path)] == [
        ("b", 0, 7),
        ("a", 0, 33),
        ("a", 1, 4),
    ]


def test_an_unterminated_line_that_goes_on_is_one_line(make: Make) -> None:
    """A last line read before its end, and then its rest: one line, with the number that it was counted by."""

    def write(w: Writing) -> None:
        w.read("a", b"one\ntw", ended=True)
        w.read("b", b"other\n")
        w.read("a", b"o", ended=True)
        w.read("a", b"!\nthree\n")

    path = make(write)
    assert cat(path) == b"one\nother\ntwo!\nthree\n"
    assert cat(path, prefix=True) == b"a: one\nb: other\na: two!\na: three\n"
    assert [(r["source"], r["seq"], r["text"], "unterminated" in r) for r in records(path)] == [
        ("a", 0, "one", False),
        ("b", 0, "other", False),
        ("a", 1, "two!", False),
        ("a", 2, "three", False),
    ]


def test_two_unterminated_lines_never_run_together(make: Make) -> None:
    """Between a line without its end and the next of another source, a line end is put in; behind the last, none."""

    def write(w: Writing) -> None:
        w.read("a", b"end of a", ended=True)
        w.read("b", b"end of b", ended=True)

    path = make(write)
    assert cat(path) == b"end of a\nend of b"
    assert cat(path, prefix=True) == b"a: end of a\nb: end of b"
    assert cat(path, "b") == b"end of b"
    assert [(r["text"], r["unterminated"]) for r in records(path)] == [("end of a", True), ("end of b", True)]


@pytest.mark.parametrize("ending", ["generation", "gap"])
def test_the_end_of_a_generation_ends_its_open_line(make: Make, ending: str) -> None:
    """A line that a truncation or rotation left open is a line of its own before what comes behind."""

    def write(w: Writing) -> None:
        w.read("a", b"torn", ended=True)
        if ending == "gap":
            w.gap("a")
        w.begin("a")
        w.read("a", b"anew\n")

    path = make(write)
    assert cat(path) == b"torn\nanew\n"
    assert cat(path, prefix=True) == b"a: torn\na: anew\n"
    assert [(r["seq"], r["text"]) for r in records(path)] == [(0, "torn"), (1, "anew")]


def test_open_fragments_at_the_end_come_out(make: Make) -> None:
    """Pieces of a line whose end has not come yet are not kept back at the end of all."""
    path = make(lambda w: w.read("a", b"x" * 40))
    assert cat(path) == b"x" * 32  # the last 8 bytes are no whole frame, and nobody said that the source has ended
    assert [r["unterminated"] for r in records(path)] == [True]


def test_packets_get_line_ends_and_never_run_into_lines(make: Make) -> None:
    """Each packet stands on a line of its own, also behind an open line; in JSON they are marked."""

    def write(w: Writing) -> None:
        w.read("a", b"open", ended=True)
        w.packets("p", b"one", b"two\n", b"")
        w.packets("p", b"\xff")

    path = make(write)
    assert cat(path) == b"one\ntwo\n\n\xff\nopen"
    assert cat(path, "p", prefix=True) == b"p: one\np: two\np: \np: \xff\n"
    assert [(r["packet"], r.get("text"), r.get("base64")) for r in records(path, "p")] == [
        (True, "one", None),
        (True, "two\n", None),
        (True, "", None),
        (True, None, base64.b64encode(b"\xff").decode()),
    ]


def test_only_a_line_feed_ends_a_line(make: Make) -> None:
    """CR, form feed and the like are content: no prefix and no JSON line begins there, in lines or in packets."""
    path = make(lambda w: w.read("a", b"one\rtwo\x0c\x85\n"), lambda w: w.packets("p", b"three\rfour\x0b"))
    assert cat(path, prefix=True) == b"a: one\rtwo\x0c\x85\np: three\rfour\x0b\n"
    assert len(records(path)) == 2


def test_json_gives_text_or_base64(make: Make) -> None:
    """A line that is UTF-8 is text without its LF, any other one is base64; number and time stand beside it."""
    path = make(lambda w: w.read("a", "größe\r\n".encode() + b"\xc3\x28\n\n"))
    found = records(path)
    assert [(r["seq"], r.get("text"), r.get("base64")) for r in found] == [
        (0, "größe\r", None),
        (1, None, base64.b64encode(b"\xc3\x28").decode()),
        (2, "", None),
    ]
    assert {r["source"] for r in found} == {"a"}
    assert all(isinstance(r["time_ns"], int) and r["time_ns"] >= START for r in found)


def test_an_empty_source_gives_nothing(make: Make) -> None:
    """A source without a byte, and a file without a source, give no line."""
    assert cat(make(lambda w: w.begin("a"))) == b""


@pytest.mark.parametrize(
    "wanted", ["below/app.log", "app.log", "/logs/below/app.log", "*.log", "below/*", "/logs/*/app*"]
)
def test_a_source_is_named_by_path_name_or_glob(make: Make, wanted: str) -> None:
    """`--source` takes the whole path, the short name, its last part, or a glob over one of these."""
    path = make(lambda w: w.read("below/app.log", b"yes\n"), lambda w: w.read("other", b"no\n"))
    assert cat(path, wanted) == b"yes\n"


@pytest.mark.parametrize("wanted", ["nope", "app", "APP.LOG", ""])
def test_what_no_source_is_called_matches_none(make: Make, wanted: str) -> None:
    """A part of a name, or the wrong case, is not the name."""
    path = make(lambda w: w.read("below/app.log", b"yes\n"), lambda w: w.read("other", b"no\n"))
    assert cat(path, wanted) == b""


def test_sources_of_one_short_name_keep_their_paths(make: Make) -> None:
    """Names tell sources apart."""
    path = make(lambda w: w.read("x/log", b"x\n"), lambda w: w.read("y/log", b"y\n"))
    assert cat(path, prefix=True) == b"x/log: x\ny/log: y\n"
    assert cat(path, "log") == b"x\ny\n"  # the last part of both


def test_a_line_over_many_frames_is_held_as_places(make: Make) -> None:
    """While it is not whole, a line is held as places in the file: memory does not grow with it."""

    def write(w: Writing) -> None:
        for _ in range(8):
            w.read("a", b"x" * MB, limit=MB)
        w.read("a", b"end\n")

    with reading(make(write)) as (source, reader):
        kept = []
        whole = b""
        for frame in source:
            for lines in reader.feed(frame):
                whole += lines.data
            kept.append(sum(length for places in reader._held.values() for _, length in places))
            assert all(isinstance(place, tuple) for places in reader._held.values() for place in places)
    assert max(kept) == 8 * MB
    assert whole == b"x" * 8 * MB + b"end\n"


def test_every_split_of_some_lines_gives_the_same_lines(make: Make) -> None:
    """Whatever the reads and frames were, cat gives the source's bytes and JSON its lines."""
    data = b"one\n\ntwo three\r\n" + b"long" * 9 + b"\nend"

    def pieces(cut: int, other: int) -> Iterable[bytes]:
        return data[:cut], data[cut:other], data[other:]

    for cut in range(0, len(data), 3):
        for other in range(cut, len(data), 7):

            def write(w: Writing, cut: int = cut, other: int = other) -> None:
                for piece in pieces(cut, other):
                    w.read("a", piece, ended=True)

            path = make(write)
            assert cat(path) == data, (cut, other)
            assert [r["seq"] for r in records(path)] == list(range(5))
            path.unlink()


def test_a_frame_that_is_marked_counts_its_lines_by_its_flags(make: Make) -> None:
    """The numbers that JSON gives agree with the frames' own counts."""
    path = make(lambda w: [w.read("a", piece, ended=True) for piece in (b"a", b"b", b"c\nd", b"\n", b"e\n")])
    with FrameSource(path) as source:
        counts = [(frame.header.count, frame.header.flags) for frame in source if frame.header.type is FrameType.LINES]
    assert counts == [
        (1, Flag.UNTERMINATED),
        (0, Flag.UNTERMINATED | Flag.MIDDLE),
        (1, Flag.UNTERMINATED | Flag.MIDDLE),
        (0, Flag.LAST),
        (1, Flag.NONE),
    ]
    assert [(r["seq"], r["text"]) for r in records(path)] == [(0, "abc"), (1, "d"), (2, "e")]
