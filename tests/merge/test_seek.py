"""Places in a packet file: found by reading little of it, whatever the lines hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.seek import SLACK, begin_at, begin_back
from offload.packets.codec import SourceInfo, packets_payload
from offload.packets.format import HEADER_BYTES, Compression, FrameType
from offload.packets.recover import last_commit, recover

SECOND = 10**9
START = 1_700_000_000 * SECOND


class Clock:
    """Nanoseconds that a test moves."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


class Reads:
    """A file's bytes, and how many were asked for."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self.size = len(self._data)
        self.bytes = 0

    def __call__(self, offset: int, length: int) -> bytes:
        data = self._data[offset : offset + length]
        self.bytes += len(data)
        return data


def build(path: Path, payload: Callable[[int], bytes], times: list[int]) -> list[int]:
    """A COMMIT behind each frame; the place of each frame of lines."""
    clock = Clock()
    clock.now = times[0]
    file = PacketFile(path, fsync="none", clock=clock)
    log = file.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/logs/a"))
    offset = 0
    for number, clock.now in enumerate(times):
        data = payload(number)
        file.append([Piece(log, data, offset, data.count(b"\n"))])
        offset += len(data)
        file.commit()
    file.close()
    with FrameSource(path) as source:
        return [frame.offset for frame in source if frame.header.type is FrameType.LINES]


def hours(count: int) -> list[int]:
    return [START + 3600 * SECOND * n for n in range(count)]


def test_a_time_is_found_by_reading_little(tmp_path: Path) -> None:
    """In a file of 32 MiB a time is found by reading less than 2 MiB, right before the first frame of that time."""
    path, times = tmp_path / "p.opk", hours(512)
    places = build(path, lambda n: b"%015d\n" % n * 4096, times)
    for wanted in (0, 1, 17, 255, 400, 511):
        reads = Reads(path)
        begin = begin_at(reads, reads.size, times[wanted])
        assert begin == 0 if not wanted else places[wanted - 1] < begin <= places[wanted]
        assert reads.bytes < 2 << 20, wanted
    reads = Reads(path)
    assert begin_at(reads, reads.size, times[-1] + 2 * SLACK) > places[-1]


def test_twice_the_file_is_one_more_look(tmp_path: Path) -> None:
    """What is read grows with the number of times that the file can be halved, not with the file."""
    took: list[int] = []
    for count in (64, 512):
        path, times = tmp_path / f"{count}.opk", hours(count)
        build(path, lambda n: b"%015d\n" % n * 4096, times)
        reads = Reads(path)
        begin_at(reads, reads.size, times[count // 3])
        took.append(reads.bytes)
    assert took[1] < 2.5 * took[0]  # eight times the file


def test_frames_in_a_line_do_not_mislead(tmp_path: Path) -> None:
    """A packet file that was merged as a log has frames in lines, with other times: they are not believed."""
    inner, outer, times = tmp_path / "inner.opk", tmp_path / "outer.opk", hours(60)
    build(inner, lambda n: b"inside %d\n" % n, [t - 10**17 for t in hours(300)])
    held = inner.read_bytes() + b"\n"
    places = build(outer, lambda n: held, times)
    for wanted in range(1, 60, 7):
        reads = Reads(outer)
        assert places[wanted - 1] < begin_at(reads, reads.size, times[wanted]) <= places[wanted]


def test_a_clock_set_back_by_less_than_the_slack_hides_nothing(tmp_path: Path) -> None:
    """Where times go back by less than SLACK again and again, everything of the wanted time is behind the place."""
    path = tmp_path / "p.opk"
    times = [START + n * SECOND - (n % 7) * (SLACK // 8) for n in range(900)]
    places = build(path, lambda n: b"%015d\n" % n * 64, times)
    for wanted in range(0, 900, 50):
        reads = Reads(path)
        begin = begin_at(reads, reads.size, times[wanted])
        assert all(times[n] < times[wanted] for n, place in enumerate(places) if place < begin)


def test_damage_is_looked_over(tmp_path: Path) -> None:
    """Damaged stretches are passed over: what is behind them is found."""
    path, times = tmp_path / "p.opk", hours(100)
    places = build(path, lambda n: b"%015d\n" % n * 512, times)
    data = bytearray(path.read_bytes())
    for n in (20, 49, 50, 51, 74):
        data[places[n] + 10 : places[n] + 20] = bytes(10)
    path.write_bytes(data)
    reads = Reads(path)
    assert begin_at(reads, reads.size, times[90]) > places[85]
    assert begin_at(reads, reads.size, times[60]) <= places[60]


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 7, 100])
def test_so_many_lines_from_the_end(tmp_path: Path, lines: int) -> None:
    """Walking back ends at the frame in which the line stands, reading headers only."""
    path = tmp_path / "p.opk"
    places = build(path, lambda n: b"%0500d\n" % n * 2, hours(40))
    reads = Reads(path)
    ledger = recover(reads, reads.size).ledger
    reads.bytes = 0
    back = begin_back(reads, ledger.end, ledger.prev_len, lines, wanted=lambda source_id: True)[:2]
    assert back == ((places[40 - (lines + 1) // 2], None) if lines <= 80 else (0, None))
    assert reads.bytes <= HEADER_BYTES * (lines + 3)


def test_lines_of_other_sources_do_not_count(tmp_path: Path) -> None:
    """Only lines and packets of the wanted sources count."""
    path = tmp_path / "p.opk"
    file = PacketFile(path, fsync="none")
    a, b = (file.open_source(SourceInfo(1, n, 0, 0, Compression.NONE, b"/logs/%d" % n)) for n in (1, 2))
    payload, flags = packets_payload([b"p", b"q"])
    file.append([Piece(a, payload, 0, 2, flags, FrameType.PACKETS)])
    for n in range(50):
        file.append([Piece(b, b"b\n", 2 * n, 1)])
    file.close()
    reads = Reads(path)
    ledger = recover(reads, reads.size).ledger
    with FrameSource(path) as source:
        place = next(f.offset for f in source if f.header.type is FrameType.PACKETS)
    assert begin_back(reads, ledger.end, ledger.prev_len, 2, wanted=lambda i: i == a).offset == place


def test_walking_back_ends_at_damage(tmp_path: Path) -> None:
    """Damage on the way back is told, and the place behind it."""
    path = tmp_path / "p.opk"
    places = build(path, lambda n: b"%d\n" % n, hours(40))
    data = bytearray(path.read_bytes())
    data[places[20]] ^= 1
    path.write_bytes(data)
    reads = Reads(path)
    commit = last_commit(reads, reads.size)
    assert commit is not None
    offset, error, _ = begin_back(reads, commit.end, commit.header.frame_len, 1000, wanted=lambda source_id: True)
    assert places[20] < offset < places[21]
    assert isinstance(error, PacketError)
