"""What stands in a packet file: the state of its sources after each frame.

`Ledger` is the one place that knows what a frame does to the state: the writer applies each frame it writes, recovery
each frame it replays, `verify` each frame it reads. `Ledger.faults` lists what is wrong about a frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import PacketError
from .codec import (
    CommitEntry,
    CommitInfo,
    FileInfo,
    Frame,
    GapInfo,
    Header,
    SourceInfo,
    hole_len,
)
from .format import (
    DIGEST_BYTES,
    FULL_COMMIT_BYTES,
    GUARD_BYTES,
    HEAD_BYTES,
    NONE_U64,
    EntryFlag,
    Flag,
    FrameType,
    GapReason,
)
from .sealed import SealInfo

# Of the flags that a frame of this type may have, those that may stand together.
_FLAGS = {
    FrameType.LINES: (
        Flag.NONE,
        Flag.FIRST,
        Flag.MIDDLE,
        Flag.LAST,
        Flag.UNTERMINATED,
        Flag.MIDDLE | Flag.UNTERMINATED,
        Flag.HOLE,
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

    @classmethod
    def of(cls, info: SourceInfo, entry: CommitEntry) -> SourceState:
        """As a COMMIT's entry has it, or a SOURCE frame that states it again."""
        return cls(
            entry.source_id,
            info._replace(stands=None),
            entry.generation,
            entry.source_frame,
            entry.resume_off,
            entry.next_seq,
            entry.flags,
            entry.size,
            entry.mtime_ns,
            head_len=entry.head_len,
            head_hash=entry.head,
            guard_len=entry.guard_len,
            guard_hash=entry.guard,
        )

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
        if header.flags & Flag.HOLE:
            self._pass_hole(hole_len(header, content))
            return
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

    def _pass_hole(self, length: int) -> None:
        if self.resume_off < HEAD_BYTES and self.resume_off == len(self.head):
            self.head += bytes(min(length, HEAD_BYTES - len(self.head)))
        if length:
            self.tail = (self.tail + bytes(min(length, GUARD_BYTES)))[-GUARD_BYTES:]
        self.resume_off += length


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
    sealed: bool = False  # a SEAL has closed this segment
    changed: set[int] = field(default_factory=set)  # sources since the last COMMIT
    # With the frames since. No part of what two ledgers compare: a hash object equals none but itself.
    _chain: hashlib._Hash = field(default_factory=lambda: hashlib.sha256(bytes(32)), compare=False)

    def next_chain(self) -> bytes:
        """The chain that a COMMIT written now must state."""
        return self._chain.digest()

    def commit(self, durable_upto: int, *, full: bool = False) -> CommitInfo:
        """The COMMIT that is due at `end`; `full`: it must list all sources."""
        full = full or self.last_full == NONE_U64 or self.end - self.last_full >= FULL_COMMIT_BYTES
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
        if self.sealed:
            yield "stands behind the SEAL, which is a segment's last frame"
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
            case FrameType.SOURCE if header.flags & Flag.RESTATED:
                yield from self._restated_faults(frame, state)
            case FrameType.SEAL if frame.payload:
                seal = SealInfo.unpack(frame)
                found_chain = self.next_chain()
                if seal.chain != found_chain:
                    yield f"chain is {seal.chain.hex()[:16]}…, found {found_chain.hex()[:16]}…: a frame was changed"
                if seal.lines != self.total_lines:
                    yield f"counts {seal.lines} lines in the segment, found {self.total_lines}"
                if self.changed:
                    yield "seals what no COMMIT lists"
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
                    yield from entry_faults(before, state)
            case FrameType.COMMIT:
                yield from self._commit_faults(frame)
            case _:
                pass

    def _restated_faults(self, frame: Frame, state: SourceState | None) -> Iterator[str]:
        header, info = frame.header, SourceInfo.unpack(frame)
        name, stands = f"source {header.source_id}", info.stands
        assert stands is not None
        if self.last_commit != NONE_U64:
            yield f"{name} is stated again behind the first COMMIT"
        if state is None and header.source_id != len(self.sources):
            yield f"states source {header.source_id} again, expected {len(self.sources)}"
        if state is not None and header.generation != state.generation + 1:
            yield f"{name} is stated again at generation {header.generation}, expected {state.generation + 1}"
        found = header.source_id, header.generation, header.seq, header.source_off
        if (stands.source_id, stands.generation, stands.next_seq, stands.resume_off) != found:
            yield f"{name} is stated again with an entry of another place"
        if state is not None and info.before is not None:
            yield from entry_faults(info.before, state)

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
        elif header.flags & Flag.HOLE:
            if header.count:
                yield f"{name} counts {header.count} lines in a hole, expected 0"
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
            found = line_ends(frame.payload, header.flags, state.open)
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
                yield from entry_faults(entry, state)

    def may_follow(self, header: Header) -> bool:
        """Whether a frame of this run, or the first of a new one, has this header; its payload may not be there."""
        new = header.type in (FrameType.FILE, FrameType.COMMIT)
        first = header.type is FrameType.FILE
        return first == (self.info is None) and header.prev_len == self.prev_len and (new or header.epoch == self.epoch)

    def apply(self, header: Header, payload: bytes | memoryview, header_bytes: bytes, offset: int) -> None:
        """Take in the frame at `offset`, whether or not it has faults.

        Raises:
            PacketError: the payload of a FILE, SOURCE, COMMIT, GAP or SEAL frame, or of a hole, cannot be read.
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
                if info.stands is not None:
                    state = SourceState.of(info, info.stands._replace(source_frame=offset))
                else:
                    state = SourceState(header.source_id, info, header.generation, offset, info.start_off, header.seq)
                self.sources[header.source_id] = state
                self.changed.add(header.source_id)
            case FrameType.GAP:
                gap = GapInfo.unpack(Frame(offset, header, bytes(payload)))
                state = self.sources.get(header.source_id)
                if state is not None and gap.reason is GapReason.DAMAGED and gap.lines != NONE_U64:
                    state.next_seq += gap.lines
                if state is not None and gap.end != NONE_U64:
                    if gap.end != state.resume_off:  # otherwise what stands before it is what stood there
                        state.tail, state.guard_len, state.guard_hash = b"", 0, bytes(DIGEST_BYTES)
                    state.resume_off = gap.end
                    state.open = EntryFlag.NONE
                self.changed.add(header.source_id)
            case FrameType.FILE:
                self.info = FileInfo.unpack(Frame(offset, header, bytes(payload)))
                self.chain = self.info.previous_chain
                self._chain = hashlib.sha256(self.chain)
            case FrameType.COMMIT:
                commit = CommitInfo.unpack(Frame(offset, header, bytes(payload)))
                self.chain, self.durable_upto = commit.chain, commit.durable_upto
                self._chain = hashlib.sha256(commit.chain)
                self.last_commit = offset
                for entry in commit.entries:  # what no other frame tells
                    if entry.source_id in self.sources:
                        state = self.sources[entry.source_id]
                        state.size, state.mtime_ns = entry.size, entry.mtime_ns
                if commit.full:
                    self.last_full = offset
                self.changed.clear()
            case FrameType.SEAL if payload:
                self.chain = SealInfo.unpack(Frame(offset, header, bytes(payload))).chain
                self._chain = hashlib.sha256(self.chain)
                self.sealed = True
            case _:
                pass
        self._chain.update(header_bytes)
        self.prev_len, self.epoch = header.frame_len, header.epoch
        self.end = offset + header.frame_len


def entry_faults(entry: CommitEntry, state: SourceState) -> Iterator[str]:
    """What contradicts that a source stands where this entry says."""
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
        case FrameType.SEAL if frame.payload:
            SealInfo.unpack(frame)
        case FrameType.PACKETS:
            frame.packets()
        case FrameType.LINES:
            hole_len(frame.header, frame.payload, frame.offset)
        case _:
            pass


def line_ends(payload: bytes, flags: Flag, before: EntryFlag) -> int:
    """How many lines a LINES frame with these flags must count, after what `before` says (see `format.py`)."""
    if flags & Flag.UNTERMINATED:
        # The last piece counts unless it goes on a line that an UNTERMINATED frame has counted already.
        goes_on = bool(flags & Flag.MIDDLE) and before is EntryFlag.OPEN_LINE
        return payload.count(b"\n") + (0 if goes_on else 1)
    if flags & Flag.LAST and before is EntryFlag.OPEN_LINE:
        return payload.count(b"\n") - 1
    return payload.count(b"\n")
