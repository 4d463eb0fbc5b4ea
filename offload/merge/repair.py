"""A damaged packet file written anew: everything in it that is valid, and what is lost stated.

Two reads of the original, which is not touched. The first finds where valid frames stand. The second writes them in
their order into a new file, each with the payload, time, source and place in its source that it had; what ties frames
to one another (lengths, COMMITs and their chain, places of SOURCE frames) is made anew. The result passes `verify`, and
`merge` can go on with it.

What is lost becomes GAP frames, reason DAMAGED: from where a source's last frame ended to where its next one begins,
with the lines that are missing between their numbers. A COMMIT behind the damage, or the SOURCE frame of the next
generation, says where a source stood, so a gap is known even if no frame of that generation comes any more. Lines keep
their numbers. Pieces of a line of which others are lost become lines of their own. What the sources themselves still
have need not be lost: `fill` gives it (`mend.py`).

    SOURCE lost    its path is taken from a later generation's; otherwise it is called `unknown-source-N`. Where the
                   generation before ended may not be known, and then is stated so.
    end lost       what no later frame tells of is not stated: the next merge reads it again, where the source has it.
    FILE lost      a new one is written.

Text that looks like frames (a packet file that was merged) comes to light if the header before it is damaged. It is
known by its place: the length that the next frame names reaches back over it to where the damage began, or it begins
with a FILE frame; and by numbers that do not go on. What is left out is told. INDEX and SEAL are left out always: the
one holds places that are no longer true, the other says that nothing was changed since.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from zlib import crc32

from ..errors import BusyResourceError, PacketError
from ..files.frame_source import FrameSource
from ..files.packet_file import COMMIT_BYTES
from ..packets.codec import (
    CommitEntry,
    CommitInfo,
    Damage,
    FileInfo,
    Frame,
    GapInfo,
    SourceInfo,
    pack_header,
    unpack_header,
)
from ..packets.format import (
    NONE_U64,
    Compression,
    EntryFlag,
    Flag,
    FrameType,
    GapReason,
)
from ..packets.ledger import Ledger, SourceState, line_ends
from .audit import Gap, Watcher, unwatched
from .names import Names
from .output import new_file

Fill = Callable[[SourceState, int, int], Iterator[bytes]]
"""(source, end, lines) -> whole lines from the source's `resume_off` on, up to `end`, which should be so many."""

_LIMIT = 1 << 16  # sources or generations of which nothing is left, one behind the other: more are no truth


@dataclass
class Repair:
    """What was done.

    Attributes:
        frames, lines: in the new file.
        damages: stretches of the original, in bytes, that hold no valid frame, and why.
        gaps: what the new file states as lost for them.
        left_out: valid frames that were not taken: where, and why.
        filled: lines that were lost and that their sources had.
        nameless: sources whose paths are lost.
    """

    frames: int = 0
    lines: int = 0
    filled: int = 0
    nameless: int = 0
    damages: list[Damage] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    left_out: list[tuple[int, str]] = field(default_factory=list)


def repair(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    watcher: Watcher = unwatched,
    fill: Fill | None = None,
    replace: bool = False,
) -> Repair:
    """Write all that is valid in a packet file into a new one; see the head of this module.

    Args:
        force: replace `out` if it is there.
        watcher: called with the bytes done of twice the file's size.
        fill: asked for what is lost before it is stated as a gap: with its source as it stands there, and the byte
            where it ends. Gives the bytes from there on, in pieces of whole lines, up to that byte or less.
        replace: `out` is another name of `path`, which the caller has locked and wants to go on with.

    Raises:
        BusyResourceError: the file is being written.
        PacketError: no valid frame is in it; with `replace`, also if a source's path is lost.
        FileExistsError: `out` is there.
        OSError: as `open` and `write`.
    """
    survey = _Survey()
    with FrameSource(path, alone=True) as source:
        if not replace and source.is_being_written():
            raise BusyResourceError(f"{os.fspath(path)} is being written; repair it when its writer has ended")
        names = Names(source)
        size = source.size()
    for frame in survey.look(path):
        watcher(frame.end, 2 * size)
    if not survey.chains:
        raise PacketError("no valid frame is in it", 0)
    foreign = survey.foreign()
    with new_file(out, made_of=None if replace else path, force=force or replace) as file:
        copy = _Copy(file, survey.paths(foreign), names, fill)
        copy.result.damages = survey.damages
        before: Frame | None = None
        chain = -1
        for frame in _frames(path, []):
            chain += not _follows(frame, before)
            if chain in foreign:
                copy.result.left_out.append((frame.offset, "it stands inside a frame of another run"))
            else:
                copy.take(frame)
            before = frame
            watcher(size + frame.end, 2 * size)
        if replace and copy.result.nameless:  # a merge that went on would read them again from their beginnings
            lost = (
                f"the paths of {copy.result.nameless} sources" if copy.result.nameless > 1 else "the path of a source"
            )
            raise PacketError(f"{lost} cannot be read any more", copy.result.damages[0].start)
        copy.commit()
    copy.result.lines = copy.ledger.total_lines
    return copy.result


def _frames(path: str | os.PathLike[str], damages: list[Damage]) -> Iterator[Frame]:
    with FrameSource(path, on_damage=damages.append, alone=True) as source:
        yield from source
        yield from source.end()


def _follows(frame: Frame, before: Frame | None) -> bool:
    """Whether this frame stands right behind the one before and knows it."""
    return before is not None and frame.offset == before.end and frame.header.prev_len == before.header.frame_len


@dataclass(slots=True)
class _Chain:
    """Frames that follow one another without damage."""

    first: Frame  # without its payload
    end: int


class _Survey:
    """Which frames are valid, and which of these stand inside others."""

    def __init__(self) -> None:
        self.damages: list[Damage] = []
        self.chains: list[_Chain] = []
        self._paths: list[tuple[int, int, bytes]] = []  # chain, source, its path

    def look(self, path: str | os.PathLike[str]) -> Iterator[Frame]:
        before: Frame | None = None
        for frame in _frames(path, self.damages):
            if not _follows(frame, before):
                self.chains.append(_Chain(Frame(frame.offset, frame.header, b""), frame.end))
            self.chains[-1].end = frame.end
            if frame.header.type is FrameType.SOURCE:
                with contextlib.suppress(PacketError):
                    place = len(self.chains) - 1, frame.header.source_id
                    self._paths.append((*place, SourceInfo.unpack(frame).path))
            before = frame
            yield frame

    def foreign(self) -> set[int]:
        """The chains that stand in a frame of which the header is lost, by their number."""
        starts = {damage.start for damage in self.damages}
        found: set[int] = set()
        for number, chain in enumerate(self.chains):
            header = chain.first.header
            if number and header.type is FrameType.FILE:
                found.add(number)
            start = chain.first.offset - header.prev_len
            if start not in starts:
                continue  # bytes are missing in between, and it tells nothing of what is there
            inside = number - 1
            while inside >= 0 and self.chains[inside].first.offset > start:
                if self.chains[inside].first.header.epoch != header.epoch:
                    found.add(inside)
                inside -= 1
        return found

    def paths(self, foreign: set[int]) -> dict[int, bytes]:
        """Each source's path, as far as a SOURCE frame is left."""
        return {source_id: path for chain, source_id, path in self._paths if chain not in foreign}


class _Copy:
    """The new file, and where each source stands in it."""

    def __init__(self, file: BinaryIO, paths: dict[int, bytes], names: Names, fill: Fill | None) -> None:
        self.result = Repair()
        self._fill = fill
        self.ledger = Ledger()
        self._file = file
        self._paths = paths
        self._names = names
        self._epoch = secrets.randbits(32)
        self._time_ns = 0
        self._committed = 0
        # What to add to a source's numbers for those of the original: a line that was counted there, in a piece that is
        # kept, may have a rest that is a line of its own here.
        self._shift: dict[int, int] = {}

    # --- frames of the original ---------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Write a frame of the original, and before it what is missing."""
        header = frame.header
        self._time_ns = header.time_ns
        try:
            if self.ledger.info is None:
                is_file = header.type is FrameType.FILE
                info = FileInfo(secrets.token_bytes(16), 0, bytes(32), "offload repair")
                self._put(FrameType.FILE, (FileInfo.unpack(frame) if is_file else info).pack())
                if is_file:
                    return
            match header.type:
                case FrameType.LINES | FrameType.PACKETS:
                    self._content(frame)
                case FrameType.GAP:
                    self._gap(frame)
                case FrameType.SOURCE:
                    self._source(frame)
                case FrameType.COMMIT:
                    for entry in CommitInfo.unpack(frame).entries:
                        self._reach(entry)
                    self.commit()
                case FrameType.NOTE:
                    self._put(FrameType.NOTE, frame.payload)
                case FrameType.FILE:
                    raise _Contradiction("a second FILE frame")
                case _:
                    pass
        except (_Contradiction, PacketError) as exc:
            self.result.left_out.append((frame.offset, str(exc)))

    def _content(self, frame: Frame) -> None:
        header, flags, count = frame.header, frame.header.flags, frame.header.count
        if frame.hole == 0 and header.type is FrameType.PACKETS:
            frame.packets()  # whether they can be read
        is_text = header.type is FrameType.LINES and not flags & Flag.HOLE
        goes_on = is_text and bool(flags & (Flag.MIDDLE | Flag.LAST))
        # Whether the line that goes on was counted in its piece before.
        counted = goes_on and count < frame.payload.count(b"\n") + bool(flags & Flag.UNTERMINATED)
        state = self._at(header.source_id, header.generation)
        self._advance(state, header.source_off, header.seq, counted=counted)
        if is_text:
            if state.open and not goes_on:  # what closed it is lost, and was of no length
                self._lost(state, state.resume_off, 0)
            if goes_on and not state.open:
                flags = {Flag.MIDDLE: Flag.FIRST, Flag.LAST: Flag.NONE}.get(flags, Flag.UNTERMINATED)
            elif flags == Flag.MIDDLE and state.open is EntryFlag.OPEN_LINE:
                flags |= Flag.UNTERMINATED
            count = line_ends(frame.payload, flags, state.open)
        self._put(header.type, frame.payload, state, flags=flags, count=count)
        self._shift[state.source_id] = header.seq + header.count - state.next_seq

    def _gap(self, frame: Frame) -> None:
        header, gap = frame.header, GapInfo.unpack(frame)
        if gap.end < gap.start or gap.start != header.source_off:
            raise _Contradiction(f"a gap from byte {gap.start} to {gap.end} at byte {header.source_off}")
        state = self._at(header.source_id, header.generation)
        self._advance(state, header.source_off, header.seq)
        self._put(FrameType.GAP, frame.payload, state)

    def _source(self, frame: Frame) -> None:
        header, info = frame.header, SourceInfo.unpack(frame)
        state = self.ledger.sources.get(header.source_id)
        if info.stands is not None:
            self._restated(header.source_id, info, info.stands)
            return
        if state is not None and header.generation <= state.generation:
            raise _Contradiction(f"generation {header.generation} of source {header.source_id} has begun already")
        if info.before is not None:
            self._reach(info.before)
            state = self._at(header.source_id, header.generation - 1)
        else:
            self._open_until(header.source_id)
        self._begin(header.source_id, info)
        self._shift[header.source_id] = header.seq - self.ledger.sources[header.source_id].next_seq

    def _restated(self, source_id: int, info: SourceInfo, stands: CommitEntry) -> None:
        """A segment states a source again, of which the beginning is in another one."""
        state = self.ledger.sources.get(source_id)
        if self.ledger.last_commit != NONE_U64:
            raise _Contradiction(f"source {source_id} is stated again behind the first COMMIT")
        if state is None:
            self._open_until(source_id)
        elif stands.generation != state.generation + 1:
            raise _Contradiction(
                f"generation {stands.generation} of source {source_id}, which is at {state.generation}"
            )
        before = info.before
        if before is not None:
            before = before._replace(source_frame=NONE_U64) if state is None else state.entry()
        again = info._replace(before=before, stands=stands._replace(source_frame=self.ledger.end))
        fields = {"source_id": source_id, "generation": stands.generation, "seq": stands.next_seq}
        self._put(FrameType.SOURCE, again.pack(), None, flags=Flag.RESTATED, source_off=stands.resume_off, **fields)

    def _reach(self, entry: CommitEntry) -> None:
        """A source stood there: what we lack before that is lost."""
        state = self.ledger.sources.get(entry.source_id)
        if state is not None:
            here, there = (state.generation, state.resume_off), (entry.generation, entry.resume_off)
            expected = state.next_seq + self._shift.get(state.source_id, 0)
            if here > there or (here == there and entry.next_seq < expected):
                return
        state = self._at(entry.source_id, entry.generation)
        self._advance(state, entry.resume_off, entry.next_seq)
        # What was known of the file itself, in case we do not have its bytes.
        state.size, state.mtime_ns = entry.size, entry.mtime_ns
        if entry.head_len > len(state.head):
            state.head_len, state.head_hash = entry.head_len, entry.head
        if not state.tail:
            state.guard_len, state.guard_hash = entry.guard_len, entry.guard

    # --- what is missing ----------------------------------------------------------------------------------------------

    def _at(self, source_id: int, generation: int) -> SourceState:
        """The source, at this generation; what leads there is made up if it is lost."""
        sources = self.ledger.sources
        begun = sources[source_id].generation if source_id in sources else 0
        if generation < begun:
            raise _Contradiction(f"generation {generation} of source {source_id}, which is at {begun}")
        if generation - begun > _LIMIT:
            raise _Contradiction(f"generation {generation} of source {source_id}, which is at {begun}")
        self._open_until(source_id + 1)
        while sources[source_id].generation < generation:
            state = sources[source_id]
            self._lost(state, NONE_U64, None)  # where that one ended is not known
            self._begin(source_id, _unknown(state.path))
        return sources[source_id]

    def _open_until(self, source_id: int) -> None:
        """Sources before this one, of which nothing is left, or not their beginning."""
        if source_id - len(self.ledger.sources) > _LIMIT:
            raise _Contradiction(f"source {source_id}, of {len(self.ledger.sources)}")
        while (missing := len(self.ledger.sources)) < source_id:
            self.result.nameless += missing not in self._paths
            self._begin(missing, _unknown(self._paths.get(missing, b"unknown-source-%d" % missing)))

    def _begin(self, source_id: int, info: SourceInfo) -> None:
        state = self.ledger.sources.get(source_id)
        generation, seq = (0, 0) if state is None else (state.generation + 1, state.next_seq)
        info = info._replace(before=None if state is None else state.entry(), stands=None)
        fields = {"source_id": source_id, "generation": generation, "seq": seq, "source_off": info.start_off}
        self._put(FrameType.SOURCE, info.pack(), None, **fields)

    def _advance(self, state: SourceState, source_off: int, seq: int, *, counted: bool = False) -> None:
        """Move on to this byte, and to the line of this number in the original; what is between is lost.

        Args:
            counted: the line before that one is what goes on there.
        """
        expected = state.next_seq + self._shift.get(state.source_id, 0)
        if source_off < state.resume_off or (source_off == state.resume_off and seq < expected):
            raise _Contradiction(f"source {state.source_id} is past its byte {source_off}, line {seq}")
        if source_off > state.resume_off or seq > expected:
            missing = max(0, seq - counted - expected)
            missing -= self._filled(state, source_off, missing)
            if source_off > state.resume_off or missing:
                self._lost(state, source_off, missing)
        self._shift[state.source_id] = seq - state.next_seq

    def _filled(self, state: SourceState, end: int, missing: int) -> int:
        """Write what is lost, as far as somebody else has it; returns how many lines that was."""
        lines = 0
        if self._fill is None or state.open or end <= state.resume_off:
            return 0
        for data in self._fill(state, end, missing):
            count = data.count(b"\n")
            assert data.endswith(b"\n"), "whole lines"
            assert state.resume_off + len(data) <= end, "no more than is lost"
            self._put(FrameType.LINES, data, state, count=count)
            lines += count
        self.result.filled += lines
        return lines

    def _lost(self, state: SourceState, end: int, lines: int | None) -> None:
        info = GapInfo(state.resume_off, end, NONE_U64 if lines is None else lines, GapReason.DAMAGED)
        name = self._names[state.source_id]
        if name == f"source {state.source_id}":
            name = os.fsdecode(state.path)
        upto = None if end == NONE_U64 else end
        self.result.gaps.append(Gap(name, state.resume_off, upto, "damaged", lines, state.generation))
        self._put(FrameType.GAP, info.pack(), state)

    # --- out ----------------------------------------------------------------------------------------------------------

    def _put(self, type: FrameType, payload: bytes, state: SourceState | None = None, **fields: int) -> None:
        ledger = self.ledger
        if state is not None:
            fields |= {"source_id": state.source_id, "generation": state.generation}
            fields |= {"seq": state.next_seq, "source_off": state.resume_off}
        raw = pack_header(
            type,
            len(payload),
            crc32(payload),
            prev_len=ledger.prev_len,
            epoch=self._epoch,
            time_ns=self._time_ns,
            **fields,
        )
        self._file.write(raw)
        self._file.write(payload)
        self.result.frames += 1
        ledger.apply(unpack_header(raw), payload, raw, ledger.end)
        if type is not FrameType.COMMIT and ledger.end - self._committed >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write a COMMIT if one is due. The file gets its name when all of it is on the disk: so it says."""
        if self.ledger.changed:
            self._put(FrameType.COMMIT, self.ledger.commit(self.ledger.end).pack())
            self._committed = self.ledger.end


class _Contradiction(Exception):
    """A frame that cannot be where it stands."""


def _unknown(path: bytes) -> SourceInfo:
    return SourceInfo(0, 0, 0, 0, Compression.NONE, path)
