"""What stands in a packet file: the state after each frame, and how a writer finds it again after any end.

`Ledger` is the one place that knows what a frame does to the state: the writer applies each frame it writes,
recovery each frame it replays, `verify` each frame it reads. `Ledger.faults` lists what is wrong about a frame.

`recover` finds the last COMMIT from the end, goes back to the last one that lists all sources, takes
the entries from there on, and replays the frames after the last COMMIT. It reads those, never the whole file. The
caller gives it `read_at`; nothing here opens a file.

    ── frames ── COMMIT(full) ── frames ── COMMIT ── frames ── COMMIT ── frames ── torn
                      ▲ entries of all       ▲ changed            ▲ changed  ▲ replayed ▲ cut
                      └──────────────────────┴── previous_commit ─┘

A log line may hold bytes that look like a COMMIT. One is believed only if walking frame by frame from the COMMIT that
it names as the one before lands on it, and such a walk jumps over payloads. Lines full of them cost recovery one walk
over all headers and little more. (Who can read the packet file and write into a log can still forge a whole chain of
them in one line; `verify`, which reads from the start, is not misled.)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from zlib import crc32

from ..errors import PacketError
from .codec import (
    CommitEntry,
    CommitInfo,
    FileInfo,
    Frame,
    GapInfo,
    Header,
    PacketDecoder,
    SourceInfo,
    unpack_header,
)
from .format import (
    COMMIT_STRUCT,
    DIGEST_BYTES,
    ENTRY_STRUCT,
    FULL_COMMIT_BYTES,
    GUARD_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    MAGIC,
    NONE_U64,
    EntryFlag,
    Flag,
    FrameType,
)

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> at most that many bytes; fewer only at the end of the file."""

_WINDOW = 1 << 20  # bytes read at once while scanning
_COMMIT_BYTES = HEADER_BYTES + COMMIT_STRUCT.size  # of a COMMIT without entries
# What looking for the last COMMIT may spend on walks, in headers read or 4 KiB of a payload; some seconds. Twice what a
# true COMMIT can need, for the writer puts one behind 16 MiB, which hold half as many frames if all are empty.
_EFFORT = 1 << 19

# Of the flags that a frame of this type may have, those that may stand together.
_FLAGS = {
    FrameType.LINES: (
        Flag.NONE,
        Flag.FIRST,
        Flag.MIDDLE,
        Flag.LAST,
        Flag.UNTERMINATED,
        Flag.MIDDLE | Flag.UNTERMINATED,
    ),
    FrameType.PACKETS: (Flag.NONE, Flag.TABLE),
}


def digest(data: bytes) -> bytes:
    """BLAKE2b-128, the hash of heads and tail guards (RFC 7693)."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@dataclass(slots=True)
class SourceState:
    """Where one source stands: all that a writer needs to go on, and a reader to check the next frame."""

    source_id: int
    info: SourceInfo
    generation: int
    source_frame: int  # offset of the generation's SOURCE frame
    resume_off: int  # of the next byte wanted, in this generation of the source
    next_seq: int
    open: EntryFlag = EntryFlag.NONE  # whether the last line goes on
    size: int = 0
    mtime_ns: int = 0
    head: bytes = b""  # the first bytes, as far as known and at most HEAD_BYTES; empty after recovery from a COMMIT
    head_len: int = 0
    head_hash: bytes = bytes(DIGEST_BYTES)
    tail: bytes = b""  # the last bytes, at most GUARD_BYTES; empty after recovery from a COMMIT
    guard_len: int = 0
    guard_hash: bytes = bytes(DIGEST_BYTES)

    @property
    def path(self) -> bytes:
        return self.info.path

    def entry(self) -> CommitEntry:
        """The entry that a COMMIT written now holds for this source."""
        if len(self.head) > self.head_len:
            self.head_len, self.head_hash = len(self.head), digest(self.head)
        if self.tail:
            self.guard_len, self.guard_hash = len(self.tail), digest(self.tail)
        return CommitEntry(
            self.source_id,
            self.generation,
            self.source_frame,
            self.resume_off,
            self.next_seq,
            self.size,
            self.mtime_ns,
            self.head_len,
            self.guard_len,
            self.open,
            self.head_hash,
            self.guard_hash,
        )

    def advance(self, header: Header, content: bytes | memoryview) -> None:
        """Take in a LINES or PACKETS frame with these source bytes."""
        if header.source_off < HEAD_BYTES and header.source_off == len(self.head):
            self.head += bytes(content[: HEAD_BYTES - len(self.head)])
        last = bytes(content[-GUARD_BYTES:])
        self.tail = last if len(last) == GUARD_BYTES else (self.tail + last)[-GUARD_BYTES:]
        self.resume_off += len(content)
        self.next_seq += header.count
        if header.flags & Flag.UNTERMINATED:
            self.open = EntryFlag.OPEN_LINE
        elif header.flags & (Flag.FIRST | Flag.MIDDLE):
            self.open = EntryFlag.OPEN_FRAGMENT
        else:
            self.open = EntryFlag.NONE


@dataclass(slots=True)
class Ledger:
    """The state of a packet file up to `end`."""

    end: int = 0
    prev_len: int = 0
    epoch: int | None = None
    info: FileInfo | None = None
    sources: dict[int, SourceState] = field(default_factory=dict)
    total_lines: int = 0
    chain: bytes = bytes(32)  # as of the last COMMIT
    last_commit: int = NONE_U64
    last_full: int = NONE_U64
    durable_upto: int = 0
    changed: set[int] = field(default_factory=set)  # sources since the last COMMIT
    # With the frames since. No part of what two ledgers compare: a hash object equals none but itself.
    _chain: hashlib._Hash = field(default_factory=lambda: hashlib.sha256(bytes(32)), compare=False)

    def next_chain(self) -> bytes:
        """The chain that a COMMIT written now must state."""
        return self._chain.digest()

    def commit(self, durable_upto: int) -> CommitInfo:
        """The COMMIT that is due at `end`."""
        full = self.last_full == NONE_U64 or self.end - self.last_full >= FULL_COMMIT_BYTES
        listed = self.sources if full else sorted(self.changed)
        return CommitInfo(
            durable_upto,
            self.last_commit,
            self.total_lines,
            self.next_chain(),
            full,
            tuple(self.sources[i].entry() for i in listed),
        )

    def faults(self, frame: Frame) -> Iterator[str]:
        """What contradicts the frames before, a sentence each; nothing if the frame may follow."""
        header = frame.header
        if (self.info is None) != (header.type is FrameType.FILE):
            yield "no FILE frame at the start" if self.info is None else "a second FILE frame"
        if header.prev_len != self.prev_len:
            yield f"names a frame of {header.prev_len} bytes before it, found one of {self.prev_len}"
        if header.epoch != self.epoch and header.type not in (FrameType.FILE, FrameType.COMMIT):
            yield f"epoch is {header.epoch:08x}, expected {self.epoch or 0:08x}: bytes of another run"
        try:
            _read_payload(frame)
        except PacketError as exc:
            yield exc.message
            return
        state = self.sources.get(header.source_id)
        match header.type:
            case FrameType.LINES | FrameType.PACKETS | FrameType.GAP:
                yield from self._source_faults(frame, state)
            case FrameType.SOURCE:
                expected = 0 if state is None else state.generation + 1
                if state is None and header.source_id != len(self.sources):
                    yield f"defines source {header.source_id}, expected {len(self.sources)}"
                if header.generation != expected:
                    yield f"source {header.source_id} begins generation {header.generation}, expected {expected}"
                next_seq = 0 if state is None else state.next_seq
                if header.seq != next_seq:
                    yield f"source {header.source_id} begins at line {header.seq}, expected {next_seq}"
                before = SourceInfo.unpack(frame).before
                if before is not None and before.source_id != header.source_id:
                    yield f"source {header.source_id} has the end of source {before.source_id} before it"
                elif before is not None and state is not None:
                    yield from _entry_faults(before, state)
            case FrameType.COMMIT:
                yield from self._commit_faults(frame)
            case _:
                pass

    def _source_faults(self, frame: Frame, state: SourceState | None) -> Iterator[str]:
        header = frame.header
        if state is None:
            yield f"source {header.source_id} has no SOURCE frame"
            return
        name = f"source {header.source_id}"
        if header.generation != state.generation:
            yield f"{name} is at generation {header.generation}, expected {state.generation}"
        if header.seq != state.next_seq:
            yield f"{name} is at line {header.seq}, expected {state.next_seq}"
        if header.source_off != state.resume_off:
            yield f"{name} is at its byte {header.source_off}, expected {state.resume_off}"
        if header.flags not in _FLAGS.get(header.type, (header.flags,)):
            yield f"{name} has {header.type.name} with flags {int(header.flags):#x}, which do not stand together"
        elif header.type is FrameType.LINES:
            goes_on = bool(header.flags & (Flag.MIDDLE | Flag.LAST))
            if goes_on and not state.open:
                yield f"{name} goes on a line that is not open"
            elif goes_on and state.open is EntryFlag.OPEN_LINE and not header.flags & (Flag.LAST | Flag.UNTERMINATED):
                yield f"{name} goes on a counted line, expected UNTERMINATED or LAST"
            elif not goes_on and state.open is EntryFlag.OPEN_FRAGMENT:
                yield f"{name} begins a line inside another"
            elif not goes_on and state.open is EntryFlag.OPEN_LINE:
                yield f"{name} begins a line inside one that was counted, expected MIDDLE or LAST"
            found = _line_ends(frame.payload, header.flags, state.open)
            if header.count != found:
                yield f"{name} counts {header.count} lines, found {found}"
        elif header.type is FrameType.PACKETS and not header.flags and header.count != 1:
            yield f"{name} counts {header.count} packets, found 1"
        elif header.type is FrameType.GAP:
            gap = GapInfo.unpack(frame)
            if gap.start != header.source_off:
                yield f"{name} has a gap from its byte {gap.start}, expected {header.source_off}"
            if gap.end < gap.start:
                yield f"{name} has a gap from its byte {gap.start} back to {gap.end}"

    def _commit_faults(self, frame: Frame) -> Iterator[str]:
        info = CommitInfo.unpack(frame)
        if info.chain != self.next_chain():
            yield f"chain is {info.chain.hex()[:16]}…, found {self.next_chain().hex()[:16]}…: a frame was changed"
        if info.previous_commit != self.last_commit:
            yield f"names a COMMIT at byte {info.previous_commit} before it, found {self.last_commit}"
        if info.total_lines != self.total_lines:
            yield f"counts {info.total_lines} lines in the file, found {self.total_lines}"
        if info.durable_upto > frame.offset:
            yield f"says that the file is on the disk up to byte {info.durable_upto}, expected {frame.offset} at most"
        if not info.full and self.last_full == NONE_U64:
            yield "lists changed sources only, expected all in the first COMMIT"
        listed = {e.source_id for e in info.entries}
        if info.full and not listed >= self.sources.keys():
            yield "does not list all sources"
        elif not self.changed <= listed:
            yield "does not list all changed sources"
        for entry in info.entries:
            state = self.sources.get(entry.source_id)
            if state is None:
                yield f"lists source {entry.source_id}, which has no SOURCE frame"
            else:
                yield from _entry_faults(entry, state)

    def may_follow(self, header: Header) -> bool:
        """Whether a frame of this run, or the first of a new one, has this header; its payload may not be there."""
        new = header.type in (FrameType.FILE, FrameType.COMMIT)
        first = header.type is FrameType.FILE
        return first == (self.info is None) and header.prev_len == self.prev_len and (new or header.epoch == self.epoch)

    def apply(self, header: Header, payload: bytes | memoryview, header_bytes: bytes, offset: int) -> None:
        """Take in the frame at `offset`, whether or not it has faults.

        Raises:
            PacketError: the payload of a FILE, SOURCE, COMMIT or GAP frame cannot be read.
        """
        match header.type:
            case FrameType.LINES | FrameType.PACKETS:
                state = self.sources.get(header.source_id)
                if state is not None:
                    # As the frame says, so that one fault is told once and not again for each frame after it.
                    state.generation, state.next_seq = header.generation, header.seq
                    state.resume_off = header.source_off
                    state.advance(header, payload[4 * header.count :] if header.flags & Flag.TABLE else payload)
                self.total_lines += header.count
                self.changed.add(header.source_id)
            case FrameType.SOURCE:
                info = SourceInfo.unpack(Frame(offset, header, bytes(payload)))
                self.sources[header.source_id] = SourceState(
                    header.source_id, info, header.generation, offset, info.start_off, header.seq
                )
                self.changed.add(header.source_id)
            case FrameType.GAP:
                gap = GapInfo.unpack(Frame(offset, header, bytes(payload)))
                state = self.sources.get(header.source_id)
                if state is not None and gap.end != NONE_U64:
                    state.resume_off = gap.end
                    state.tail, state.guard_len, state.guard_hash = b"", 0, bytes(DIGEST_BYTES)
                    state.open = EntryFlag.NONE
                self.changed.add(header.source_id)
            case FrameType.FILE:
                self.info = FileInfo.unpack(Frame(offset, header, bytes(payload)))
            case FrameType.COMMIT:
                commit = CommitInfo.unpack(Frame(offset, header, bytes(payload)))
                self.chain, self.durable_upto = commit.chain, commit.durable_upto
                self._chain = hashlib.sha256(commit.chain)
                self.last_commit = offset
                if commit.full:
                    self.last_full = offset
                self.changed.clear()
            case _:
                pass
        self._chain.update(header_bytes)
        self.prev_len, self.epoch = header.frame_len, header.epoch
        self.end = offset + header.frame_len


def _entry_faults(entry: CommitEntry, state: SourceState) -> Iterator[str]:
    found = state.generation, state.resume_off, state.next_seq
    if (entry.generation, entry.resume_off, entry.next_seq) != found:
        yield (
            f"puts source {entry.source_id} at generation {entry.generation}, byte {entry.resume_off}, line "
            f"{entry.next_seq}; found {state.generation}, {state.resume_off}, {state.next_seq}"
        )
    elif (entry.source_frame, entry.flags) != (state.source_frame, state.open):
        yield (
            f"states source {entry.source_id} with SOURCE at byte {entry.source_frame} and flags "
            f"{int(entry.flags)}; found {state.source_frame}, {int(state.open)}"
        )


def _read_payload(frame: Frame) -> None:
    """Raise PacketError where `Ledger.apply` or a reader of the packets would."""
    match frame.header.type:
        case FrameType.FILE:
            FileInfo.unpack(frame)
        case FrameType.SOURCE:
            SourceInfo.unpack(frame)
        case FrameType.COMMIT:
            CommitInfo.unpack(frame)
        case FrameType.GAP:
            GapInfo.unpack(frame)
        case FrameType.PACKETS:
            frame.packets()
        case _:
            pass


def _line_ends(payload: bytes, flags: Flag, before: EntryFlag) -> int:
    """How many lines a LINES frame with these flags must count, after what `before` says (see `format.py`)."""
    if flags & Flag.UNTERMINATED:
        # The last piece counts unless it goes on a line that an UNTERMINATED frame has counted already.
        goes_on = bool(flags & Flag.MIDDLE) and before is EntryFlag.OPEN_LINE
        return payload.count(b"\n") + (0 if goes_on else 1)
    if flags & Flag.LAST and before is EntryFlag.OPEN_LINE:
        return payload.count(b"\n") - 1
    return payload.count(b"\n")


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
        behind: the LINES and PACKETS headers found behind the hole, in order.
    """

    ledger: Ledger
    torn: int
    hole: Hole | None = None
    behind: tuple[Header, ...] = ()


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
    first = unpack_header(start)
    if first.type is not FrameType.FILE:
        raise PacketError(f"found a {first.type.name} frame, expected FILE: no packet file, or not its start", 0)
    commit = _Search(read_at, size).run()
    if commit is not None:
        _restore(ledger, commit, read_at, size)
    behind: list[Header] = []
    hole_end = 0
    for frame, raw in _replay(read_at, ledger, size):
        if not hole_end and frame.offset == ledger.end and not any(ledger.faults(frame)):
            ledger.apply(frame.header, frame.payload, raw, frame.offset)
            continue
        hole_end = hole_end or frame.offset
        if frame.header.type in (FrameType.LINES, FrameType.PACKETS):
            behind.append(frame.header)
    if not hole_end:
        return Recovery(ledger, size - ledger.end)
    return Recovery(ledger, size - ledger.end, Hole(ledger.end, hole_end), tuple(behind))


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
        yield info, before
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
        ledger.sources[source_id] = SourceState(
            source_id,
            SourceInfo.unpack(source),
            e.generation,
            e.source_frame,
            e.resume_off,
            e.next_seq,
            e.flags,
            e.size,
            e.mtime_ns,
            head_len=e.head_len,
            head_hash=e.head,
            guard_len=e.guard_len,
            guard_hash=e.guard,
        )
    file_frame = _frame_at(read_at, 0, size, FrameType.FILE)
    if file_frame is None:
        raise PacketError("the FILE frame is damaged", 0)
    ledger.info = FileInfo.unpack(file_frame)
    ledger.total_lines, ledger.chain, ledger.durable_upto = total, chain, durable
    ledger.last_commit = last.offset
    ledger.prev_len, ledger.epoch = last.header.frame_len, last.header.epoch
    ledger.end = last.offset + last.header.frame_len
    ledger._chain = hashlib.sha256(chain + read_at(last.offset, HEADER_BYTES))
