"""Places in a packet file: by time of arrival, and so many lines before the end. It is never read whole.

By time: bisection over bytes. Each look goes to the next COMMIT from a byte on, whose header has the time at which it
was written; one stands behind each 0.1 s of writing or 16 MiB. From any byte, the next magic with a header whose
checksum holds begins a walk from header to header. A line may hold what looks like frames (a packet file that was
merged), so a COMMIT counts only if the walk from the COMMIT that it names as the one before lands on it, as in
recovery. Of a file of n bytes about log2(n) looks are taken, and each reads the rest of a frame and some headers.

Times are those of the writer's clock, so they need not rise: it may have been set back. `begin_at` looks for SLACK
before the wanted time. So it is exact as long as no frame is older by more than SLACK than one before it. Where the
clock was set back further, it finds one of the places at which times pass the wanted one: lines of the wanted span that
stand before that place are not given, though never a line outside the span, for readers look at each one's time.

A file in segments is one of them after the other. Of these the one is looked for, by bisection too, that was begun last
before the wanted time. A sealed one has an INDEX of its COMMITs: the place of the last one before the wanted time, with
two reads where bisection takes a dozen. That counts where each look unpacks a block of some MiB: 12 ms against 42 ms in
a packed segment of 512 MiB. In one that is not packed both take 1 ms, so the live file has no INDEX until it is closed.

From the end: each frame names the length of the one before, and its own number of lines. Only headers are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import crc32

from ..errors import PacketError
from ..files.series import Series
from ..packets.codec import CommitInfo, Frame, Header, unpack_header
from ..packets.format import COMMIT_STRUCT, HEADER_BYTES, MAGIC, NONE_U64, SEAL_STRUCT, FrameType
from ..packets.recover import ReadAt
from ..packets.sealed import Place, SealInfo, unpack_index

SLACK = 60 * 10**9  # nanoseconds by which a clock may be set back unnoticed; NTP steps are fractions of a second
_WINDOW = 64 << 10  # bytes read at once while looking for a magic
_NEAR = 64 << 10  # bytes that are as well read as bisected


def begin_in_series(series: Series, time_ns: int) -> int:
    """As `begin_at`, for a packet file in segments; the place is one in all of them.

    Raises:
        OSError: a segment is gone, or cannot be unpacked.
    """
    parts, wanted = series.parts, time_ns - SLACK
    size = series.size()
    low, high = 0, len(parts) - 1  # the wanted place is in a segment from `low` to `high`
    while low < high:
        middle = (low + high + 1) // 2
        start = series.reader(parts[middle])(0, HEADER_BYTES)
        try:
            begun = unpack_header(start).time_ns
        except PacketError:
            begun = wanted  # damaged: from before it, then
        if begun < wanted:
            low = middle
        else:
            high = middle - 1
    part = parts[low]
    length = size - part.base if part is parts[-1] else part.size
    return part.base + begin_at(series.reader(part), length, time_ns)


class Commit(NamedTuple):
    """A COMMIT that the file's structure confirms."""

    offset: int
    end: int
    time_ns: int
    previous: int


def begin_at(read_at: ReadAt, size: int, time_ns: int) -> int:
    """Where to begin to read all that came at `time_ns` or later: the place of a frame.

    Args:
        size: of the file, in bytes.
        time_ns: Unix time in nanoseconds.

    Returns:
        An offset in bytes. Before it nothing is as late as `time_ns` (see the head of this module); behind it, up to a
        COMMIT's way and SLACK are earlier.
    """
    wanted = time_ns - SLACK
    begin, last, end = 0, NONE_U64, size
    for place in _index(read_at, size):
        if place.time_ns >= wanted:
            end = min(end, place.offset + HEADER_BYTES)
            break
        begin = place.offset
    if begin:
        header = _confirmed_at(read_at, begin)
        begin, last, end = (header.end, header.offset, end) if header is not None else (0, NONE_U64, size)
    while end - begin > _NEAR:
        middle = (begin + end) // 2
        commit = next_commit(read_at, middle, end)
        if commit is None:
            end = middle
        elif commit.time_ns < wanted:
            begin, last = commit.end, commit.offset
        elif commit.previous == last:
            break  # the very next one
        else:
            end = middle
    return begin


def _index(read_at: ReadAt, size: int) -> list[Place]:
    """The places in a sealed segment's INDEX; none where there is none that can be read."""
    at = size - HEADER_BYTES - SEAL_STRUCT.size
    places: list[Place] = []
    try:
        seal = _frame(read_at, at, FrameType.SEAL)
        at = SealInfo.unpack(seal).index_at
        while at < size:
            frame = _frame(read_at, at, FrameType.INDEX)
            places += unpack_index(frame)
            at = frame.end
    except PacketError:
        pass  # no SEAL, or behind the last INDEX
    return places


def _frame(read_at: ReadAt, at: int, type: FrameType) -> Frame:
    """Raises PacketError: there is no sound one of this type."""
    header = unpack_header(read_at(at, HEADER_BYTES) if 0 <= at < 1 << 62 else b"", offset=at)
    if header.type is not type:
        raise PacketError(f"found a {header.type.name} frame, expected {type.name}", at)
    payload = read_at(at + HEADER_BYTES, header.payload_len)
    if crc32(payload) != header.payload_crc:
        raise PacketError("payload checksum is wrong", at)
    return Frame(at, header, payload)


def _confirmed_at(read_at: ReadAt, at: int) -> Commit | None:
    """The COMMIT there, which an INDEX names: its frame is sound."""
    try:
        frame = _frame(read_at, at, FrameType.COMMIT)
        return Commit(at, frame.end, frame.header.time_ns, CommitInfo.unpack(frame).previous_commit)
    except PacketError:
        return None


def next_commit(read_at: ReadAt, at: int, end: int) -> Commit | None:
    """The first confirmed COMMIT that begins in [at, end)."""
    while True:
        found = _find_header(read_at, at, end)
        if found is None:
            return None
        offset = found
        for offset, header in _walk(read_at, found):
            if offset >= end:
                return None
            if header.type is FrameType.COMMIT:
                commit = _confirmed(read_at, offset, header)
                if commit is not None:
                    return commit
                break  # and so was every frame that led here: in a line, or behind damage
        # On from the last header of the walk: its own length may be what is wrong.
        at = offset + 1


def _find_header(read_at: ReadAt, at: int, end: int) -> int | None:
    """The first place from `at` on, before `end`, with a header whose checksum holds."""
    while at < end:
        data = read_at(at, min(_WINDOW, end - at) + HEADER_BYTES - 1)
        place = data.find(MAGIC)
        while 0 <= place <= len(data) - HEADER_BYTES:
            try:
                unpack_header(data, place)
            except PacketError:
                place = data.find(MAGIC, place + 1)
            else:
                return at + place
        at += _WINDOW
    return None


def _walk(read_at: ReadAt, at: int) -> Iterator[tuple[int, Header]]:
    """Headers one behind the other, from `at` to the first invalid one."""
    while True:
        try:
            header = unpack_header(read_at(at, HEADER_BYTES), offset=at)
        except PacketError:
            return
        yield at, header
        at += header.frame_len


def _confirmed(read_at: ReadAt, offset: int, header: Header) -> Commit | None:
    fixed = read_at(offset + HEADER_BYTES, COMMIT_STRUCT.size)
    if len(fixed) < COMMIT_STRUCT.size or header.payload_len < COMMIT_STRUCT.size:
        return None
    previous: int = COMMIT_STRUCT.unpack(fixed)[1]
    start = 0 if previous == NONE_U64 else previous
    if start >= offset:
        return None
    for at, other in _walk(read_at, start):
        if at == offset:
            return Commit(offset, offset + header.frame_len, header.time_ns, previous)
        if at > offset or (other.type is FrameType.COMMIT) != (at == previous):
            break
    return None


class Back(NamedTuple):
    """Where so many lines begin, what kept us from going further back, and how many are still wanted before."""

    offset: int
    error: PacketError | None = None
    lines: int = 0


def begin_back(
    read_at: ReadAt, end: int, prev_len: int, lines: int, *, wanted: Callable[[int], bool], floor: int = 0
) -> Back:
    """Walk back over at least `lines` lines that end between there and `end`.

    Args:
        end: where a frame ends, in bytes; `prev_len`: its length.
        wanted: whether a source, by its id, counts.
        floor: the place of a frame; not further back than that.
    """
    at = end
    while at > floor and lines > 0:
        offset = at - prev_len
        try:
            if not HEADER_BYTES <= prev_len <= at:
                raise PacketError(f"the frame here names one of {prev_len} bytes before it", at)
            header = unpack_header(read_at(offset, HEADER_BYTES), offset=offset)
            if header.frame_len != prev_len:
                raise PacketError(f"the frame here names one of {prev_len} bytes before it, not {header.frame_len}", at)
        except PacketError as exc:
            return Back(at, exc, lines)
        if header.type in (FrameType.LINES, FrameType.PACKETS) and wanted(header.source_id):
            lines -= header.count
        at, prev_len = offset, header.prev_len
    return Back(at, None, lines)
