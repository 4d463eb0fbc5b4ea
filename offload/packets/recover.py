"""How a writer finds the state of a packet file again, after any end.

`recover` finds the last COMMIT from the end, goes back to the last one that lists all sources, takes
the entries from there on, and replays the frames after the last COMMIT. It reads those, never the whole file. The
caller gives it `read_at`; nothing here opens a file.

    ── frames ── COMMIT(full) ── frames ── COMMIT ── frames ── COMMIT ── frames ── torn
                      ▲ entries of all       ▲ changed            ▲ changed  ▲ replayed ▲ cut
                      └──────────────────────┴── previous_commit ─┘

A COMMIT is good for that if all that stands before it was on the disk when the last one was written, which says so in
`durable_upto`: a power cut may take any page behind and keep the COMMIT. Otherwise it is one of the frames that are
replayed, behind an earlier one. As a writer that syncs at all never has more than 64 MiB unsynced, one that stands over
_CHECKED bytes before the end is good too; so a file that was never synced is not read whole.

A log line may hold bytes that look like a COMMIT. One is believed only if walking frame by frame from the COMMIT that
it names as the one before lands on it, and such a walk jumps over payloads. Lines full of them cost recovery one walk
over all headers and little more. (Who can read the packet file and write into a log can still forge a whole chain of
them in one line; `verify`, which reads from the start, is not misled.)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from zlib import crc32

from ..errors import PacketError
from .codec import (
    CommitEntry,
    CommitInfo,
    FileInfo,
    Frame,
    Header,
    PacketDecoder,
    SourceInfo,
    unpack_header,
)
from .format import (
    COMMIT_STRUCT,
    ENTRY_STRUCT,
    HEADER_BYTES,
    MAGIC,
    NONE_U64,
    Flag,
    FrameType,
)
from .ledger import Ledger, SourceState

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> at most that many bytes; fewer only at the end of the file."""

_WINDOW = 1 << 20  # bytes read at once while scanning
_COMMIT_BYTES = HEADER_BYTES + COMMIT_STRUCT.size  # of a COMMIT without entries
# What looking for the last COMMIT may spend on walks, in headers read or 4 KiB of a payload; some seconds. Twice what a
# true COMMIT can need, for the writer puts one behind 16 MiB, which hold half as many frames if all are empty.
_EFFORT = 1 << 19
_CHECKED = 128 << 20  # bytes from the end that may be replayed, although COMMITs are among them
_FIRST_BYTES = 512  # the first frame of a file, which is synced alone


@dataclass(slots=True, frozen=True)
class Hole:
    """Damage after the last COMMIT with valid frames behind it: [start, end) holds no valid frame."""

    start: int
    end: int


@dataclass(slots=True, frozen=True)
class Recovery:
    """What `recover` found.

    Attributes:
        ledger: the state at `ledger.end`, the end of the last frame before any damage. Cutting the file there and
            going on from that state is always right if the sources still have what stood behind.
        torn: bytes behind `ledger.end`; without a hole they hold no whole frame and can only be cut (a torn tail).
        hole: set if valid frames stand behind a damaged stretch.
        behind: of the LINES and PACKETS headers found behind the hole, for each source the one that ends farthest in
            it; and the first of those that are of no generation known before the hole, if there is one. So there are no
            more than sources, whatever the file holds. The payload_len of a hole is the hole's.
        checked: the COMMIT before the replay. From there on every frame up to `ledger.end` was read and is sound.
    """

    ledger: Ledger
    torn: int
    hole: Hole | None = None
    behind: tuple[Header, ...] = ()
    checked: int = 0


def recover(read_at: ReadAt, size: int) -> Recovery:
    """Find the state of a packet file of `size` bytes, reading from its end.

    Raises:
        PacketError: it does not begin as a packet file; the caller must not touch it. A file whose first frame was
            torn while it was made (only a beginning of one) is an empty packet file.
        PacketError: a COMMIT, SOURCE or FILE frame that the state needs is damaged; `offset` is where it stands.
    """
    ledger = Ledger()
    start = read_at(0, HEADER_BYTES)
    if not start or (size < HEADER_BYTES and MAGIC.startswith(start[: len(MAGIC)])):
        return Recovery(ledger, size)
    if size <= _FIRST_BYTES and not any(read_at(0, size)):
        return Recovery(ledger, size)  # a power cut left its size and not its bytes
    first = unpack_header(start)
    if first.type is not FrameType.FILE:
        raise PacketError(f"found a {first.type.name} frame, expected FILE: no packet file, or not its start", 0)
    commit = _Search(read_at, size).run()
    durable = 0 if commit is None else CommitInfo.unpack(commit).durable_upto
    while commit is not None and commit.offset > durable and size - commit.offset < _CHECKED:
        commit = _Search(read_at, commit.offset).run()
    if commit is not None:
        _restore(ledger, commit, read_at, size)
    checked = 0 if commit is None else commit.offset
    behind: dict[int, Header] = {}
    hole_end = 0
    for frame, raw in _replay(read_at, ledger, size):
        if not hole_end and frame.offset == ledger.end and not any(ledger.faults(frame)):
            ledger.apply(frame.header, frame.payload, raw, frame.offset)
            continue
        hole_end = hole_end or frame.offset
        if frame.header.type in (FrameType.LINES, FrameType.PACKETS):
            _put(behind, frame, ledger)
    if not hole_end:
        return Recovery(ledger, size - ledger.end, checked=checked)
    return Recovery(ledger, size - ledger.end, Hole(ledger.end, hole_end), tuple(behind.values()), checked)


def _put(behind: dict[int, Header], frame: Frame, ledger: Ledger) -> None:
    header = frame.header
    if header.flags & Flag.HOLE:
        header = replace(header, payload_len=frame.hole)
    state = ledger.sources.get(header.source_id)
    key = header.source_id if state is not None and state.generation == header.generation else -1
    before = behind.get(key)
    if before is None or (key >= 0 and _end(header) > _end(before)):
        behind[key] = header


def _end(header: Header) -> int:
    """Behind which byte of its source a frame ends."""
    return header.source_off + header.payload_len


def _replay(read_at: ReadAt, ledger: Ledger, size: int) -> Iterator[tuple[Frame, bytes]]:
    """Every valid frame behind the ledger's end, over any damage, with its header's bytes."""
    at = ledger.end
    decoder = PacketDecoder(offset=at, on_damage=lambda damage: None)
    while at < size:
        data = read_at(at, min(_WINDOW, size - at))
        if not data:
            break
        at += len(data)
        for frame in decoder.feed(data):
            yield frame, read_at(frame.offset, HEADER_BYTES)
    torn = decoder.offset == ledger.end and decoder.pending >= HEADER_BYTES
    if torn and ledger.may_follow(unpack_header(read_at(ledger.end, HEADER_BYTES))):
        # The next frame: what looks like frames in it is its own payload, such as a packet file that is merged. Nothing
        # else can stand behind its header, as a file that is only ever appended to ends where it was torn.
        return
    for frame in decoder.close():
        yield frame, read_at(frame.offset, HEADER_BYTES)


def last_commit(read_at: ReadAt, size: int) -> Frame | None:
    """The last COMMIT that the file's structure confirms, whatever stands behind it; None: there is none."""
    return _Search(read_at, size).run()


def generations(read_at: ReadAt, size: int, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
    """The earlier generations of a source, newest first: which file it was, and how far it was read.

    A generation whose SOURCE frame is damaged ends the walk, as nothing leads to those before it.
    """
    info, at = state.info, state.source_frame
    generation = state.generation
    while info.before is not None:
        before = info.before
        if (before.source_id, before.generation) != (state.source_id, generation - 1) or before.source_frame >= at:
            return
        frame = _frame_at(read_at, before.source_frame, size, FrameType.SOURCE)
        if frame is None or (frame.header.source_id, frame.header.generation) != (state.source_id, generation - 1):
            return
        try:
            info = SourceInfo.unpack(frame)
        except PacketError:
            return
        yield info._replace(stands=None), before
        at, generation = frame.offset, generation - 1


def _frame_at(read_at: ReadAt, offset: int, size: int, type: FrameType) -> Frame | None:
    """The valid frame of this type at `offset`, or None."""
    if offset + HEADER_BYTES > size:  # may come from a payload, and be more than the caller's seek takes
        return None
    try:
        header = unpack_header(read_at(offset, HEADER_BYTES), offset=offset)
    except PacketError:
        return None
    if header.type is not type or offset + header.frame_len > size:
        return None
    payload = read_at(offset + HEADER_BYTES, header.payload_len)
    return Frame(offset, header, payload) if crc32(payload) == header.payload_crc else None


class _Search:
    """For the last COMMIT that the file's own structure confirms, from the end.

    A COMMIT is confirmed by a walk over headers from the COMMIT before it, as most need a few steps that way. Text that
    looks like COMMITs could ask for such a walk every 128 bytes, and for a payload of 16 MiB to be read at its end. So
    _EFFORT bounds what is spent on that in all. Where it is used up, and where a COMMIT says that it is the first, one
    walk from the file's start reads each header once and answers for every COMMIT that it comes over.
    """

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at = read_at
        self._size = size
        self._effort = _EFFORT
        self._border = 0  # which frames there are before this byte is known from the walk from the start
        self._commits = array("Q")  # those that it came over

    def run(self) -> Frame | None:
        end = self._size
        while end > 0:
            start = max(0, end - _WINDOW)
            data = self._read_at(start, min(end + _COMMIT_BYTES, self._size) - start)
            at = data.rfind(MAGIC, 0, end - start + len(MAGIC) - 1)
            while at >= 0:
                frame = self._confirm(data, at, start + at)
                if frame is not None:
                    return frame
                if start + at < self._border:
                    return self._from_start()
                at = data.rfind(MAGIC, 0, at + len(MAGIC) - 1)
            end = start
        return None

    def _confirm(self, data: bytes, at: int, offset: int) -> Frame | None:
        """The frame at `data[at:]` if it is a COMMIT; what costs least to look at comes first."""
        if data[at + 5 : at + 6] != bytes([FrameType.COMMIT]):
            return None
        try:
            header = unpack_header(data, at, offset=offset)
        except PacketError:
            return None
        if header.payload_len < COMMIT_STRUCT.size or offset + header.frame_len > self._size:
            return None
        _, previous, _, _, count, _ = COMMIT_STRUCT.unpack_from(data, at + HEADER_BYTES)
        if header.payload_len != COMMIT_STRUCT.size + count * ENTRY_STRUCT.size:
            return None
        if previous == NONE_U64:
            self._walk_from_start()
            return None
        if not self._lands_on(previous, offset) or not self._spend(1 + header.payload_len // 4096):
            return None
        return _frame_at(self._read_at, offset, self._size, FrameType.COMMIT)

    def _lands_on(self, previous: int, offset: int) -> bool:
        """Whether the first COMMIT behind the one at `previous` is at `offset`."""
        at = previous
        while at < offset and self._spend(1):
            try:
                header = unpack_header(self._read_at(at, HEADER_BYTES), offset=at)
            except PacketError:
                return False
            if (header.type is FrameType.COMMIT) != (at == previous):
                return False
            at += header.frame_len
        return at == offset > previous  # a frame that names itself has landed before it walked

    def _spend(self, effort: int) -> bool:
        self._effort -= effort
        if self._effort < 0:
            self._walk_from_start()
        return self._effort >= 0

    def _walk_from_start(self) -> None:
        """Once: find the COMMITs that a walk over all headers comes over, up to the end or the first invalid one."""
        if self._border:
            return
        at = 0
        while at < self._size:
            try:
                header = unpack_header(self._read_at(at, HEADER_BYTES), offset=at)
            except PacketError:
                break
            if header.type is FrameType.COMMIT:
                self._commits.append(at)
            at += header.frame_len
        self._border = at

    def _from_start(self) -> Frame | None:
        """The last sound COMMIT that the walk from the start came over."""
        for number in range(len(self._commits) - 1, -1, -1):
            frame = _frame_at(self._read_at, self._commits[number], self._size, FrameType.COMMIT)
            if frame is None:
                continue
            try:
                info = CommitInfo.unpack(frame)
            except PacketError:
                continue
            if info.previous_commit == (self._commits[number - 1] if number else NONE_U64):
                return frame
        return None


def _restore(ledger: Ledger, last: Frame, read_at: ReadAt, size: int) -> None:
    """Set the state as of this COMMIT: entries from the last full one on, the newest of each source wins.

    Raises:
        PacketError: a COMMIT, SOURCE or FILE frame that the state needs is damaged.
    """
    entries: dict[int, CommitEntry] = {}
    frame, info = last, CommitInfo.unpack(last)
    total, chain, durable = info.total_lines, info.chain, info.durable_upto
    while True:
        for entry in info.entries:
            entries.setdefault(entry.source_id, entry)
        if info.full:
            break
        before = _frame_at(read_at, info.previous_commit, size, FrameType.COMMIT)
        if before is None or before.offset >= frame.offset:
            raise PacketError("the COMMIT here is damaged and holds sources' states", info.previous_commit)
        frame, info = before, CommitInfo.unpack(before)
    ledger.last_full = frame.offset
    for source_id in sorted(entries):
        e = entries[source_id]
        source = _frame_at(read_at, e.source_frame, size, FrameType.SOURCE)
        if source is None or (source.header.source_id, source.header.generation) != (source_id, e.generation):
            raise PacketError(f"the SOURCE frame of source {source_id} is damaged", e.source_frame)
        ledger.sources[source_id] = SourceState.of(SourceInfo.unpack(source), e)
    file_frame = _frame_at(read_at, 0, size, FrameType.FILE)
    if file_frame is None:
        raise PacketError("the FILE frame is damaged", 0)
    ledger.info = FileInfo.unpack(file_frame)
    ledger.total_lines, ledger.chain, ledger.durable_upto = total, chain, durable
    ledger.last_commit = last.offset
    ledger.prev_len, ledger.epoch = last.header.frame_len, last.header.epoch
    ledger.end = last.offset + last.header.frame_len
    ledger._chain = hashlib.sha256(chain + read_at(last.offset, HEADER_BYTES))
