"""`repair`: whatever is damaged, all that is not is in the new file, which verifies, and what is lost is stated."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BusyResourceError, PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.audit import Gap, verify
from offload.merge.repair import Repair, repair
from offload.packets.codec import Frame, GapInfo, SourceInfo, line_pieces, packets_payload
from offload.packets.format import (
    HOLE_STRUCT,
    NONE_U64,
    Compression,
    EntryFlag,
    Flag,
    FrameType,
    GapReason,
)

CONTENT = (FrameType.LINES, FrameType.PACKETS)


class Writer:
    """Writes what a test names, in as many runs as it likes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[int, EntryFlag] = {}
        self.file = PacketFile(path, fsync="none")

    def source(self, name: bytes = b"a") -> int:
        return self.file.open_source(SourceInfo(1, len(name), 0, 0, Compression.NONE, b"/logs/" + name))

    def again(self) -> None:
        """Another run."""
        self.file.close()
        self.file = PacketFile(self.path, fsync="none")

    def lines(self, source: int, data: bytes, limit: int = 1 << 20) -> None:
        ended, state = not data.endswith(b"\n"), self.file.ledger.sources[source]
        start, before = state.resume_off, self.open.get(source, EntryFlag.NONE)
        for piece in line_pieces(data, 0, len(data), before, ended=ended, limit=limit):
            place = Piece(source, data[piece.start : piece.end], start + piece.start, piece.count, piece.flags)
            self.file.append([place])
            self.open[source] = piece.open

    def packets(self, source: int, packets: list[bytes]) -> None:
        if not self.open.get(source):
            payload, flags = packets_payload(packets)
            place = self.file.ledger.sources[source].resume_off
            self.file.append([Piece(source, payload, place, len(packets), flags, FrameType.PACKETS)])

    def hole(self, source: int, length: int) -> None:
        place = self.file.ledger.sources[source].resume_off
        self.file.append([Piece(source, HOLE_STRUCT.pack(length), place, 0, Flag.HOLE)])

    def next_generation(self, source: int, *, lost: int | None = None) -> None:
        state = self.file.ledger.sources[source]
        if lost is not None:
            end = state.resume_off + lost if lost else NONE_U64
            self.file.gap(source, GapInfo(state.resume_off, end, NONE_U64, GapReason.TRUNCATED))
        self.file.open_source(SourceInfo(1, 99, 0, 0, Compression.NONE, state.path), source)
        self.open[source] = EntryFlag.NONE


def frames(path: Path) -> list[Frame]:
    with FrameSource(path) as source:
        return list(source)


def content(path: Path) -> list[tuple[int, int, int, bytes]]:
    """Source, generation, place and bytes of each frame of lines, packets or a hole."""
    return [
        (f.header.source_id, f.header.generation, f.header.source_off, f.payload)
        for f in frames(path)
        if f.header.type in CONTENT
    ]


def repaired(path: Path) -> Repair:
    out = path.with_suffix(".new")
    before = path.read_bytes()
    done = repair(path, out, force=True)
    assert path.read_bytes() == before
    found = verify(out)
    assert found.faults == []
    assert (found.frames, found.lines) == (done.frames, done.lines)
    assert [gap[1:] for gap in found.lost if gap.reason == "damaged"] == [gap[1:] for gap in done.gaps]
    assert os.listdir(path.parent).count(out.name) == 1
    assert not [name for name in os.listdir(path.parent) if ".tmp-" in name]
    return done


def new(path: Path) -> Path:
    return path.with_suffix(".new")


def spoil(path: Path, *frames: Frame, at: int = 20) -> None:
    data = bytearray(path.read_bytes())
    for frame in frames:
        data[frame.offset + at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def log(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "p.opk")


def of(path: Path, text: bytes) -> Frame:
    return next(f for f in frames(path) if f.header.type in CONTENT and f.payload == text)


# --- what is lost is stated -------------------------------------------------------------------------------------------


def test_a_file_without_damage_comes_out_the_same(log: Writer) -> None:
    """Every frame's content, number and time is as before, with nothing lost."""
    a, b = log.source(b"a"), log.source(b"b")
    log.lines(a, b"one\ntwo\nrest")
    log.again()
    log.lines(a, b" and end\n")
    log.packets(b, [b"p", b"q"])
    log.hole(b, 5000)
    log.next_generation(a, lost=0)
    log.lines(a, b"x" * 50, limit=20)
    log.file.close()
    done = repaired(log.path)
    assert (done.gaps, done.damages, done.left_out) == ([], [], [])
    assert content(new(log.path)) == content(log.path)

    def told(path: Path) -> list[tuple[int, int, int]]:
        return [(f.header.seq, f.header.count, f.header.time_ns) for f in frames(path) if f.header.type in CONTENT]

    assert told(new(log.path)) == told(log.path)


def test_lines_lost_in_the_middle_are_stated_with_bytes_and_number(log: Writer) -> None:
    """Between the neighbours of a damaged frame stands a GAP of just its bytes and lines; lines keep their numbers."""
    a, b = log.source(b"a"), log.source(b"b")
    for text in (b"one\n", b"two\nthree\n", b"four\n"):
        log.lines(a, text)
        log.lines(b, b"beside " + text)
    log.file.close()
    spoil(log.path, of(log.path, b"two\nthree\n"))
    done = repaired(log.path)
    assert done.gaps == [Gap("a", 4, 14, "damaged", 2, 0)]
    assert [d.end - d.start for d in done.damages] == [74]
    kept = [(f.header.seq, f.payload) for f in frames(new(log.path)) if f.header.type in CONTENT]
    assert (3, b"four\n") in kept
    assert verify(new(log.path)).complete is False


def test_the_last_lines_of_a_source_are_stated_by_the_commit_behind(log: Writer) -> None:
    """Where no frame of the source follows, the COMMIT says how far it was read."""
    a = log.source()
    log.lines(a, b"one\n")
    log.lines(a, b"two\n")
    log.file.close()
    spoil(log.path, of(log.path, b"two\n"))
    assert repaired(log.path).gaps == [Gap("a", 4, 8, "damaged", 1, 0)]


def test_the_last_lines_of_a_generation_are_stated_by_the_next_one(log: Writer) -> None:
    """Where no frame of the generation follows, the SOURCE frame of the next one says how far it was read."""
    a = log.source()
    log.lines(a, b"one\n")
    log.lines(a, b"two\n")
    log.next_generation(a)
    log.lines(a, b"three\n")
    log.file.close()
    spoil(log.path, of(log.path, b"two\n"))
    assert repaired(log.path).gaps == [Gap("a", 4, 8, "damaged", 1, 0)]


def test_a_frame_between_damages_is_kept_though_a_cut_makes_it_seem_held(log: Writer) -> None:
    """The length that a frame names says nothing of what is before it where bytes are missing in between."""
    a = log.source()
    for text in (b"one\n", b"two\n", b"three\n"):
        log.lines(a, text)
    log.file.close()
    os.truncate(log.path, of(log.path, b"three\n").end)  # killed before its COMMIT
    log.file = PacketFile(log.path, fsync="none")
    log.lines(a, b"four\n")
    log.file.close()
    two, three, four = (of(log.path, text) for text in (b"two\n", b"three\n", b"four\n"))
    held = four.header.prev_len
    assert held > 150
    spoil(log.path, two)
    data = log.path.read_bytes()
    log.path.write_bytes(data[: three.end] + data[four.offset - 60 :])
    assert four.header.epoch != three.header.epoch
    assert three.end + 60 - held < three.offset
    repaired(log.path)
    assert [c[3] for c in content(new(log.path))] == [b"one\n", b"three\n", b"four\n"]


def test_what_nothing_behind_tells_of_is_left_to_the_next_merge(log: Writer) -> None:
    """A damaged end is cut, and the source stands before it."""
    a = log.source()
    log.lines(a, b"one\n")
    log.file.commit()
    log.lines(a, b"two\n")
    log.file.close()
    two = of(log.path, b"two\n")
    os.truncate(log.path, two.end)
    spoil(log.path, two)
    done = repaired(log.path)
    assert done.gaps == []
    assert len(done.damages) == 1
    again = PacketFile(new(log.path), fsync="none")
    state = again.source_named(b"/logs/a")
    assert state is not None
    assert (state.resume_off, state.next_seq) == (4, 1)
    again.append([Piece(a, b"two\n", 4, 1)])
    again.close()
    assert verify(new(log.path)).complete


@pytest.mark.parametrize("kind", ["FIRST", "MIDDLE", "LAST"])
def test_the_rest_of_a_line_of_which_a_piece_is_lost_is_kept(log: Writer, kind: str) -> None:
    """What is left of a long line becomes lines of its own, and what is lost of it is stated."""
    a = log.source()
    log.lines(a, b"before\n" + b"1" * 20 + b"2" * 20 + b"3" * 20 + b"\n", limit=20)
    log.lines(a, b"behind\n")
    log.file.close()
    flag = Flag[kind]
    lost = next(f for f in frames(log.path) if f.header.flags & flag)
    spoil(log.path, lost)
    done = repaired(log.path)
    assert [(gap.start, gap.end) for gap in done.gaps] == [
        (lost.header.source_off, lost.header.source_off + len(lost.payload))
    ]
    left = content(new(log.path))
    assert b"behind\n" in [c[3] for c in left]
    assert sum(len(c[3]) for c in left) == 7 + 61 + 7 - len(lost.payload)
    assert next(f.header.seq for f in frames(new(log.path)) if f.payload == b"behind\n") == 2


def test_the_rest_of_a_line_that_was_counted_is_a_line_of_its_own(log: Writer) -> None:
    """A line that had no end when it was read counts where it began: with that piece lost, or one behind it."""
    a, b = log.source(b"a"), log.source(b"b")
    log.lines(a, b"one")
    log.lines(a, b" end\nnext\n")
    for text in (b"two", b" lost", b" end\nnext\n"):
        log.lines(b, text)
    log.file.close()
    spoil(log.path, of(log.path, b"one"), of(log.path, b" lost"))
    done = repaired(log.path)
    assert [(gap.source, gap.start, gap.end, gap.lines) for gap in done.gaps] == [("a", 0, 3, 0), ("b", 3, 8, 0)]
    kept = [
        (f.header.source_id, f.header.seq, f.header.count, f.payload)
        for f in frames(new(log.path))
        if f.header.type is FrameType.LINES
    ]
    assert kept == [(a, 0, 2, b" end\nnext\n"), (b, 0, 1, b"two"), (b, 1, 2, b" end\nnext\n")]


def test_lost_source_frames_are_made_up(log: Writer) -> None:
    """Without its SOURCE frame a source keeps its lines; a later generation's tells its path."""
    a, b = log.source(b"a"), log.source(b"b")
    log.lines(a, b"one\n")
    log.lines(b, b"two\n")
    log.next_generation(b)
    log.lines(b, b"three\n")
    log.file.close()
    sources = [f for f in frames(log.path) if f.header.type is FrameType.SOURCE]
    spoil(log.path, *sources[:2])
    repaired(log.path)
    assert content(new(log.path)) == [(a, 0, 0, b"one\n"), (b, 0, 0, b"two\n"), (b, 1, 0, b"three\n")]
    paths = [SourceInfo.unpack(f).path for f in frames(new(log.path)) if f.header.type is FrameType.SOURCE]
    assert paths == [b"unknown-source-0", b"/logs/b", b"/logs/b"]


def test_a_lost_generation_is_made_up_and_its_end_unknown(log: Writer) -> None:
    """Lines of a generation whose SOURCE frame is lost stay in it; where the one before ended is stated as unknown."""
    a = log.source()
    log.lines(a, b"one\n")
    log.next_generation(a)
    log.lines(a, b"two\nthree\n")
    log.file.close()
    spoil(log.path, [f for f in frames(log.path) if f.header.type is FrameType.SOURCE][1])
    done = repaired(log.path)
    assert done.gaps == [Gap("a", 4, None, "damaged", None, 0)]
    assert content(new(log.path)) == [(a, 0, 0, b"one\n"), (a, 1, 0, b"two\nthree\n")]


def test_a_lost_file_frame_is_made_up(log: Writer) -> None:
    """The first frame's loss costs nothing but itself."""
    a = log.source()
    log.lines(a, b"one\n")
    log.file.close()
    spoil(log.path, frames(log.path)[0])
    assert repaired(log.path).gaps == []
    assert content(new(log.path)) == [(a, 0, 0, b"one\n")]


def test_a_merged_packet_file_does_not_come_to_life(log: Writer, tmp_path: Path) -> None:
    """Frames inside a line, bare when the header before them is damaged, are left out and told."""
    inner = Writer(tmp_path / "inner.opk")
    for name in (b"x", b"y", b"z"):
        inner.lines(inner.source(name), b"foreign\n" * 9)
    inner.file.close()
    held = (tmp_path / "inner.opk").read_bytes() + b"\n"
    for at in (20, 61):  # its header; and its payload, with a sound header
        writer = Writer(tmp_path / f"{at}.opk")
        a = writer.source()
        for text in (b"one\n", held, b"two\n"):
            writer.file.append([Piece(a, text, writer.file.ledger.sources[a].resume_off, text.count(b"\n"))])
        writer.file.close()
        spoil(writer.path, of(writer.path, held), at=at + (at > 60) * 200)
        done = repaired(writer.path)
        assert [c[3] for c in content(new(writer.path))] == [b"one\n", b"two\n"]
        assert [(gap.start, gap.end) for gap in done.gaps] == [(4, 4 + len(held))]
        assert len(done.left_out) >= 5
        assert {why for _, why in done.left_out} == {"it stands inside a frame of another run"}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_packet_file_is_refused(tmp_path: Path) -> None:
    """A file without any valid frame is an error, and nothing is written."""
    (tmp_path / "text").write_bytes(b"a line\n" * 100)
    with pytest.raises(PacketError, match="no valid frame is in it"):
        repair(tmp_path / "text", tmp_path / "out")
    assert os.listdir(tmp_path) == ["text"]


def test_the_file_itself_and_others_are_not_overwritten(log: Writer) -> None:
    """Neither the original, whatever is said, nor another file without `force`."""
    log.lines(log.source(), b"one\n")
    log.file.close()
    with pytest.raises(FileExistsError, match="is the file to read"):
        repair(log.path, log.path, force=True)
    new(log.path).write_bytes(b"kept")
    with pytest.raises(FileExistsError, match="is there already; give another name, or --force"):
        repair(log.path, new(log.path))
    assert new(log.path).read_bytes() == b"kept"


def test_a_file_that_is_being_written_is_refused(log: Writer) -> None:
    """While somebody writes it, what looks torn may be the next frame."""
    log.lines(log.source(), b"one\n")
    with pytest.raises(BusyResourceError, match="is being written; repair it when its writer has ended"):
        repair(log.path, new(log.path))
    log.file.close()


# --- any damage -------------------------------------------------------------------------------------------------------

_texts = st.lists(st.sampled_from([b"a", b"ab\n", b"\n", b"bbbbbbbbbbbb", b"\xff\xff\n"]), max_size=6).map(b"".join)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("lines"), st.integers(0, 2), _texts, st.integers(4, 40)),
        st.tuples(st.just("lines"), st.integers(0, 2), _texts, st.integers(4, 40)),
        st.tuples(st.just("packets"), st.integers(0, 2), st.lists(st.binary(max_size=3), min_size=1, max_size=3)),
        st.tuples(st.just("hole"), st.integers(0, 2), st.integers(1, 9000)),
        st.tuples(st.just("next_generation"), st.integers(0, 2)),
        st.tuples(st.just("gap"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("commit")),
        st.tuples(st.just("again")),
    ),
    max_size=25,
)


def build(path: Path, happens: Iterable[tuple[Any, ...]]) -> None:
    writer = Writer(path)
    ids = {0: writer.source(b"0"), 1: writer.source(b"1")}
    for what, *values in happens:
        if values:
            values[0] = ids.setdefault(values[0], -1)
            if values[0] < 0:
                values[0] = ids[2] = writer.source(b"2")
        if what == "commit":
            writer.file.commit()
        elif what == "gap":
            writer.next_generation(values[0], lost=values[1])
        elif what != "lines" or values[1]:
            getattr(writer, what)(*values)
    writer.file.close()


@settings(max_examples=200, deadline=None)
@given(
    _steps,
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(st.just(0), st.integers(1, 300)),
            st.one_of(st.just(b""), st.binary(min_size=1, max_size=90)),
        ),
        max_size=4,
    ),
)
def test_whatever_is_damaged_all_else_is_there(
    happens: list[tuple[Any, ...]], damages: list[tuple[float, int, bytes]]
) -> None:
    """Any flipped, cut and foreign bytes: the new file verifies and has every frame that was not hit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.opk"
        build(path, happens)
        whole = frames(path)
        data = path.read_bytes()
        hit: list[tuple[int, int]] = []
        end = len(data)
        for at, length, instead in sorted(((int(w * end), n, more) for w, n, more in damages), reverse=True):
            length = min(length, end - at)
            if not length and not instead and at < end:
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                hit.append((at, at + 1))
            else:
                data = data[:at] + instead + data[at + length :]
                # Put in between two frames, it hits neither.
                hit.append((at, at + length) if length or any(f.offset == at for f in whole) else (at - 1, at + 1))
            end = at
        path.write_bytes(data)
        intact = [f for f in whole if not any(a < f.end and f.offset < b for a, b in hit)]
        if not intact:
            return
        done = repaired(path)
        left = content(new(path))
        expected = [
            (f.header.source_id, f.header.generation, f.header.source_off, f.payload)
            for f in intact
            if f.header.type in CONTENT
        ]
        assert [one for one in left if one in set(expected)] == expected, done
        known = {(f.header.source_id, f.header.generation, f.header.source_off, f.payload) for f in whole}
        assert set(left) <= known
