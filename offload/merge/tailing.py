"""`offload.tail`: whole lines of growing logs, as an async iterator, with a position to go on from.

    Merge ── steps ──► _Desk (a thread of its own) ── batches of one read ──► async for ──► the block
      ▲                  waits until they are taken                                          │
      └── nothing more is read than its arenas hold ◄───────────────────────────── batch.position ──► the user's keeping

It is the merge, with another thing in the packet file's place: all that `Merge` promises of rotation, truncation, order
and bounded memory holds here. What a packet file keeps of a source, to go on exactly where it was, is what
`batch.position` holds: which file it was (device, inode, birth time), hashes of its head and of the bytes before the
offset, the offset, the number of the next line, and the same of the files that had the name before.

Promises:
    - Each source's lines come in order and once, from whatever files it becomes, packed ones too; batches of different
      sources come in the order in which they were read.
    - A batch holds whole lines. Only a line of more than `max_line` bytes comes in pieces, and one whose file ended
      without its line end goes on in a later batch if the file does: `open` and `continues` say so.
    - Who gives the positions of the last batches that were dealt with to `resume` gets what comes behind them: nothing
      twice, nothing left out, as long as the sources still have it. Bytes that nobody has any more are told as a gap.
    - Nothing is read ahead but some MiB, however slowly the block takes it.
    - However the loop is left (end, break, an exception, cancellation), the files are closed and the threads have
      ended when `aclose()` returns. A `break` without `aclosing` leaves that to asyncio, which does it soon.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from zlib import crc32

from ..errors import OffloadError
from ..files.packet_file import Piece
from ..loops import Call, LoopThread, outlast
from ..packets.codec import CommitEntry, GapInfo, Header, SourceInfo
from ..packets.format import (
    ENTRY_STRUCT,
    NONE_U64,
    SOURCE_STRUCT,
    Compression,
    EntryFlag,
    Flag,
    FrameType,
    GapReason,
)
from ..packets.ledger import Ledger, SourceState
from .engine import LINGER, Merge, Target
from .progress import Progress
from .sources import Sources

R = TypeVar("R")

MAX_LINE = 16 << 20
_FORMER = 32  # files that had the name before, in a position: more than rotation leaves beside most logs
_FIXED = struct.Struct("<BBI")  # version, files, CRC-32 of what follows
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a source that nobody can read any more.

    Attributes:
        start, end: in this generation of the source; `end` is None where nobody knows it.
        reason: in one word.
    """

    start: int
    end: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Lines of one source that stand behind one another.

    Attributes:
        source: absolute path.
        data: their bytes, as they are in the file; empty for a gap.
        seq: number of the first line in its source, over all its files.
        offset: byte of its file at which `data` begins.
        generation: 0, 1, 2 …: of the files that the source was; another file is another generation.
        position: for `resume`, once this batch is dealt with: text (ASCII) that only `tail` understands, some 200
            characters and as many for each file that had the name before.
        continues: the first line goes on with the last one of the batch before of this source.
        open: the last line has no end yet: its file ended there, or it is longer than `max_line`.
        gap: what is lost before the next batch of this source.
    """

    source: str
    data: bytes
    seq: int
    offset: int
    generation: int
    position: str
    continues: bool = False
    open: bool = False
    gap: Gap | None = None

    @property
    def lines(self) -> list[bytes]:
        """The lines, each with its LF where it has one; CR, NUL and all else as it is."""
        *whole, rest = self.data.split(b"\n")
        return [line + b"\n" for line in whole] + ([rest] if rest else [])


def tail(
    paths: Sources | Sequence[str],
    *,
    follow: bool = False,
    resume: Iterable[str] | Mapping[str, str] = (),
    poll: bool = False,
    linger: float = LINGER,
    max_line: int = MAX_LINE,
) -> AsyncGenerator[Batch, None]:
    """Lines of many files, in order for each.

        positions: dict[str, str] = {}
        async with aclosing(offload.tail(["logs/"], follow=True, resume=positions)) as batches:
            async for batch in batches:
                deal_with(batch.lines)
                positions[batch.source] = batch.position

    Args:
        paths, follow, poll, linger: as for Merge.
        resume: positions of the last batches that were dealt with, one for each source, or a mapping that has them as
            values. Sources without one begin at their start.
        max_line: bytes of a line that are held until it is whole; a longer one comes in pieces.

    Raises:
        ValueError: at once: no paths, or something that is no position.
        OSError: behind the last batch, without `follow`: something could not be read. With it, it may come yet.

    Reading runs on threads of its own; use it on one loop. Cancelling a wait for the next batch ends the iterator, as
    with any generator: go on from the positions.
    """
    sources = paths if isinstance(paths, Sources) else Sources(paths)
    if max_line < 1:
        raise ValueError(f"max_line is {max_line}, expected at least 1 byte")
    known = [unpack_position(p) for p in (resume.values() if isinstance(resume, Mapping) else resume)]
    times = Counter(path for path, _ in known).most_common(1)
    if times and times[0][1] > 1:
        raise ValueError(f"{os.fsdecode(times[0][0])!r} has two positions, expected the last one of each source")
    return _tail(sources, _Desk(known, max_line), follow=follow, poll=poll, linger=linger)


async def _tail(
    sources: Sources, desk: _Desk, *, follow: bool, poll: bool, linger: float
) -> AsyncGenerator[Batch, None]:
    merge = Merge(sources, desk, follow=follow, poll=poll, linger=linger)
    await merge.start()
    running = asyncio.ensure_future(_run(merge, desk))
    try:
        while (batches := await desk.take()) is not None:
            for batch in batches:
                yield batch
        progress = await running
        if not follow:
            for error in progress.problems.values():
                raise error
    finally:
        desk.leave()
        running.cancel()
        try:
            await merge.aclose()  # to its end, also if cancelled meanwhile
        finally:
            with contextlib.suppress(OffloadError, asyncio.CancelledError):  # told already, or ours
                await outlast(running)


async def _run(merge: Merge, desk: _Desk) -> Progress:
    try:
        return await merge.run()
    finally:
        await desk.end()


class _Desk:
    """Where a merge lays down what it reads, and somebody takes it; used by a Merge as its PacketWriter is."""

    def __init__(self, known: Sequence[Position], max_line: int) -> None:
        self._target = _Lines(known, max_line)
        self._thread = LoopThread("tail")
        self._order = asyncio.Lock()
        self._change = asyncio.Condition()
        self._ready: list[Batch] = []
        self._ended = False  # nothing more comes
        self._left = False  # nobody takes any more

    async def start(self) -> _Desk:
        await self._thread.start()
        return self

    def use(self, function: Callable[[Target], R], /) -> Call[R]:
        """Run a function with what stands for the packet file; what it read has been taken when the next one runs."""
        return self._thread.run(self._use, function)

    def held(self, source_id: int, start: int, end: int, generation: int | None = None) -> Call[bytes | OSError]:
        """Nothing: what was read has gone to whoever took it."""
        return self.use(lambda target: b"")

    def take(self) -> Call[list[Batch] | None]:
        """What was read, as soon as there is something; None: that was all."""
        return self._thread.run(self._take)

    def end(self) -> Call[None]:
        """Nothing more comes."""
        return self._thread.run(self._set, ended=True)

    def leave(self) -> None:
        """Nobody takes any more: whoever waits for that goes on."""
        with contextlib.suppress(OffloadError):  # it is closed
            self._thread.run(self._set, left=True)

    async def aclose(self) -> None:
        await self._thread.aclose()

    # --- on its thread ------------------------------------------------------------------------------------------------

    async def _use(self, function: Callable[[Target], R]) -> R:
        async with self._order:
            result = function(self._target)
            batches, self._target.batches = self._target.batches, []
            if batches:
                async with self._change:
                    await self._change.wait_for(lambda: self._left or not self._ready)
                    self._ready = batches
                    self._change.notify_all()
            return result

    async def _take(self) -> list[Batch] | None:
        async with self._change:
            await self._change.wait_for(lambda: self._ready or self._ended)
            batches, self._ready = self._ready, []
            self._change.notify_all()
            return batches or None

    async def _set(self, *, ended: bool = False, left: bool = False) -> None:
        async with self._change:
            self._ended, self._left = self._ended or ended, self._left or left
            self._change.notify_all()


class _Lines:
    """What stands for the packet file: the state of the sources, and what was read as batches.

    Attributes:
        batches: that nobody has taken.
    """

    identity = (-1, -1)  # of no file that could be a source

    def __init__(self, known: Sequence[Position], max_line: int) -> None:
        self.ledger = Ledger()
        self.batches: list[Batch] = []
        self._drafts: list[_Draft] = []
        self._max_line = max_line
        self._former: dict[int, list[tuple[SourceInfo, CommitEntry]]] = {}  # the newest first
        self._held: dict[int, _Held] = {}  # of a line that is not whole yet
        for source_id, (_, generations) in enumerate(known):
            (info, entry), *former = generations
            state = SourceState(source_id, info, entry.generation, 0, entry.resume_off, entry.next_seq, entry.flags)
            state.size, state.mtime_ns = entry.size, entry.mtime_ns
            state.head_len, state.head_hash = entry.head_len, entry.head
            state.guard_len, state.guard_hash = entry.guard_len, entry.guard
            self.ledger.sources[source_id] = state
            self._former[source_id] = former

    def generations(self, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
        return iter(self._former.get(state.source_id, ()))

    def open_source(self, info: SourceInfo, source_id: int | None = None) -> int:
        sources = self.ledger.sources
        generation = seq = 0
        if source_id is None:
            source_id = len(sources)
        else:
            state = sources[source_id]
            self._give_held(state)
            generation, seq = state.generation + 1, state.next_seq
            former = self._former.setdefault(source_id, [])
            former.insert(0, (state.info, state.entry()))
            del former[_FORMER:]
        sources[source_id] = SourceState(source_id, info, generation, 0, info.start_off, seq)
        return source_id

    def gap(self, source_id: int, info: GapInfo) -> None:
        state = self.ledger.sources[source_id]
        self._give_held(state)
        start = state.resume_off
        if info.end != NONE_U64:
            if info.end != state.resume_off:
                state.tail, state.guard_len = b"", 0
            state.resume_off, state.open = info.end, EntryFlag.NONE
        told = Gap(info.start, None if info.end == NONE_U64 else info.end, GapReason(info.reason).name.lower())
        self._give(state, b"", state.next_seq, start, gap=told)

    def append(self, pieces: Iterable[Piece], stats: Mapping[int, tuple[int, int]] | None = None) -> None:
        for piece in pieces:
            state = self.ledger.sources[piece.source_id]
            assert piece.source_off == state.resume_off, "a piece that does not follow the one before"
            self._take_in(state, piece)
        for source_id, (size, mtime_ns) in (stats or {}).items():
            state = self.ledger.sources[source_id]
            state.size, state.mtime_ns = size, mtime_ns
        drafts, self._drafts = self._drafts, []
        self.batches += map(self._batch, drafts)

    def _batch(self, draft: _Draft) -> Batch:
        # What is there of its file is known only now: of an earlier one at least what was read by now.
        state = draft.state
        entry = draft.entry._replace(size=max(state.size, state.resume_off), mtime_ns=state.mtime_ns)
        position = pack_position([(state.info, entry), *draft.former])
        return Batch(os.fsdecode(state.path), *draft.place, state.generation, position, *draft.more)

    def _take_in(self, state: SourceState, piece: Piece) -> None:
        goes_on = bool(piece.flags & (Flag.MIDDLE | Flag.LAST))
        # A line that was given out without its end has been counted then.
        seq = state.next_seq - (goes_on and state.open is EntryFlag.OPEN_LINE)
        payload = bytes(piece.payload)  # its arena is read into again before anybody takes it
        fields = dict.fromkeys(("time_ns", "prev_len", "epoch", "payload_crc"), 0)
        header = Header(
            type=FrameType.LINES,
            flags=piece.flags,
            payload_len=len(payload),
            source_id=state.source_id,
            seq=state.next_seq,
            source_off=piece.source_off,
            count=piece.count,
            generation=state.generation,
            **fields,
        )
        state.advance(header, payload)
        if piece.flags & Flag.HOLE:
            return  # NULs of no line
        held = self._held.pop(state.source_id, None)
        if held is None:
            held = _Held([], 0, seq, piece.source_off, goes_on)
        held.parts.append(payload)
        held.size += len(payload)
        if state.open is EntryFlag.OPEN_FRAGMENT and held.size < self._max_line:
            self._held[state.source_id] = held
            return
        self._give(state, b"".join(held.parts), held.seq, held.offset, continues=held.continues)

    def _give_held(self, state: SourceState) -> None:
        """The line whose end will not come from this file."""
        held = self._held.pop(state.source_id, None)
        if held is not None:
            self._give(state, b"".join(held.parts), held.seq, held.offset, continues=held.continues)

    def _give(
        self,
        state: SourceState,
        data: bytes,
        seq: int,
        offset: int,
        *,
        continues: bool = False,
        gap: Gap | None = None,
    ) -> None:
        former = tuple(self._former.get(state.source_id, ()))
        more = continues, bool(data) and not data.endswith(b"\n"), gap
        self._drafts.append(_Draft(state, state.entry(), former, (data, seq, offset), more))


class _Draft(NamedTuple):
    """A batch, but for its position: where its source stood behind it."""

    state: SourceState
    entry: CommitEntry
    former: tuple[tuple[SourceInfo, CommitEntry], ...]
    place: tuple[bytes, int, int]
    more: tuple[bool, bool, Gap | None]


@dataclass(slots=True)
class _Held:
    parts: list[bytes]
    size: int
    seq: int
    offset: int
    continues: bool


# --- positions --------------------------------------------------------------------------------------------------------

Position = tuple[bytes, list[tuple[SourceInfo, CommitEntry]]]
"""Path of a source; which files it was and how far each was read, the newest first."""


def pack_position(generations: Sequence[tuple[SourceInfo, CommitEntry]]) -> str:
    """As text; the layout of each file is that of the packet file's SOURCE and COMMIT frames."""
    files = [SOURCE_STRUCT.pack(*info[:5]) + ENTRY_STRUCT.pack(*entry) for info, entry in generations]
    body = b"".join(files) + generations[0][0].path
    return base64.urlsafe_b64encode(_FIXED.pack(_VERSION, len(files), crc32(body)) + body).decode()


def unpack_position(text: str) -> Position:
    """Raises ValueError: this is no position."""
    wrong = ValueError(f"found {text[:40]!r} as a position, expected what `batch.position` of offload.tail was")
    try:
        data = base64.b64decode(text, altchars=b"-_", validate=True)
        version, count, crc = _FIXED.unpack_from(data)
    except (binascii.Error, ValueError, TypeError, struct.error):
        raise wrong from None
    size, body = SOURCE_STRUCT.size + ENTRY_STRUCT.size, memoryview(data)[_FIXED.size :]
    if crc32(body) != crc or not count or len(body) <= count * size:
        raise wrong
    if version != _VERSION:
        raise ValueError(f"the position is of version {version}, expected {_VERSION}; it was made by another offload")
    path, generations = bytes(body[count * size :]), []
    for at in range(0, count * size, size):
        device, inode, birth, start, compression = SOURCE_STRUCT.unpack_from(body, at)
        entry = CommitEntry.make(ENTRY_STRUCT.unpack_from(body, at + SOURCE_STRUCT.size))
        generations.append((SourceInfo(device, inode, birth, start, Compression(compression), path), entry))
    return path, generations
