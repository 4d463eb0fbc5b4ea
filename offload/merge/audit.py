"""Whether all of a packet file is right: every checksum, every sequence. Reads it once, holds a few frames.

And what it says of itself: which bytes of its sources it does not have (`lost`), and its chain. The chain's head, kept
elsewhere, shows later that what stood in the file then still does, whatever came behind: it is one of the chains that
COMMITs state. It covers each frame's header, and of a payload its CRC-32: chance and carelessness cannot pass it, but
who works out other bytes with the same CRC can.

A file in segments is read as one. Each must follow the one before: its number, its chain, the states of its sources.
That the oldest are gone is no fault, as retention takes them (`gone`); one that is missing between others is.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..errors import PacketError
from ..files.frame_source import FrameSource
from ..files.series import Part
from ..packets.codec import Damage, Frame, GapInfo, SourceInfo
from ..packets.format import HEADER_BYTES, MAGIC, NONE_U64, Flag, FrameType
from ..packets.ledger import Ledger
from ..packets.restate import contradictions
from .names import Names

Watcher = Callable[[int, int], None]
"""Called now and then with the bytes read so far and the size of the file."""


def unwatched(done: int, size: int) -> None:
    """Nobody looks."""


NEVER_READ = "never read"  # the reason of a gap that no GAP frame states


class Gap(NamedTuple):
    """Bytes of a source, [start, end), that are not in the file; None: not known."""

    source: str
    start: int
    end: int | None
    reason: str
    lines: int | None
    generation: int


class Anchor(NamedTuple):
    """The COMMIT that states a chain: where it stands, and how many lines are before it."""

    offset: int
    lines: int


@dataclass
class Verification:
    """What reading the whole file found.

    Attributes:
        faults: where, and what is wrong there; empty if every checksum and every sequence holds. In a file of segments
            places are those of all of them as one, see `where`.
        torn: bytes of a last frame that is not whole.
        live: somebody is writing the file now, so a torn tail is the next frame.
        lost: what the file itself states as lost, and the beginnings of files that were never read.
        regressions: where a source was found shorter than what the file has of it, and nothing was lost by that: up to
            `end` the file has it.
        chain: hash over all frames up to the last COMMIT, in hex.
        chained: how many bytes that is.
        anchor: of the COMMIT that states the wanted chain; None: there is none, or a fault stands before it.
        segments: names of the segments that were read, the live one last.
        gone: how many segments there were before these.
    """

    size: int = 0
    frames: int = 0
    sources: int = 0
    lines: int = 0
    torn: int = 0
    live: bool = False
    chain: str = ""
    chained: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)
    lost: list[Gap] = field(default_factory=list)
    regressions: list[Gap] = field(default_factory=list)
    anchor: Anchor | None = None
    segments: list[str] = field(default_factory=list)
    gone: int = 0
    _bases: list[int] = field(default_factory=list)

    def where(self, offset: int) -> tuple[str, int]:
        """The segment's name that has this byte, and the byte's place in it; the name is "" if there is only one."""
        if len(self.segments) < 2:
            return "", offset
        number = max(0, bisect_right(self._bases, offset) - 1)
        return self.segments[number], offset - self._bases[number]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def gaps(self) -> list[tuple[str, int, int | None, str]]:
        """What the file itself states as lost: source, from, to (None: unknown), reason."""
        return [gap[:4] for gap in self.lost if gap.reason != NEVER_READ]

    @property
    def complete(self) -> bool:
        """Whether every byte of every source, up to where it was read, is there and right."""
        return not self.faults and not self.lost


def verify(path: str | os.PathLike[str], watcher: Watcher = unwatched, *, anchor: bytes | None = None) -> Verification:
    """Check every checksum and that every sequence goes on without a hole.

    Args:
        anchor: a chain's head that was kept elsewhere, to be looked for.

    Raises:
        OSError: as `open`.
        PacketError: it does not begin as a packet file.
    """
    found = Verification()
    damages: list[Damage] = []
    with FrameSource(path, on_damage=damages.append) as source:
        found.size = source.size()
        start = source.read_at(0, 4)
        if not MAGIC.startswith(start[:4]):
            raise PacketError(f"found {start.hex(' ')}, expected the magic {MAGIC.hex(' ')}", 0)
        audit = _Audit(source, found, damages, anchor)

        while (frames := source.read()) is not None:
            audit.check(frames)
            watcher(source.offset, found.size)
            if source.offset + source.pending >= found.size and source.is_being_written():
                break  # what was there when we began is checked; a busy writer would keep us for ever
        found.live = source.is_being_written()
        found.torn = source.pending
        end = source.offset + source.pending
        behind = source.end()
        if not found.live:
            audit.check(behind)
            found.torn = end - behind[-1].end if behind else found.torn
            found.faults += map(_told, damages)
        audit.end()
    return found


class _Audit:
    """The frames of all segments, one after the other, against a ledger of each."""

    def __init__(self, source: FrameSource, found: Verification, damages: list[Damage], anchor: bytes | None) -> None:
        self._source = source
        self._found = found
        self._damages = damages
        self._anchor = anchor
        self._names = Names(source)
        self._read: dict[int, dict[tuple[int, int], int]] = {}  # source -> device and inode -> up to where
        self._part: Part | None = None
        self._ledger = Ledger()
        self._before: Ledger | None = None  # of the segment before, until the present one's first COMMIT
        self._lines = 0  # in segments before
        self._chained = 0

    def check(self, frames: list[Frame]) -> None:
        found, read = self._found, self._read
        for frame in frames:
            while self._damages and self._damages[0].start < frame.offset:
                found.faults.append(_told(self._damages.pop(0)))
                self._ledger.prev_len = frame.header.prev_len  # one fault is told once
            part = self._source.series.part_at(frame.offset)
            if part is not self._part:
                self._begin(part)
            ledger = self._ledger
            if frame.header.type is FrameType.SOURCE:
                _begins(frame, ledger, self._names, read.setdefault(frame.header.source_id, {}), found)
            self._check(frame, part.base)
            if frame.header.type is FrameType.COMMIT and ledger.last_commit == frame.offset - part.base:
                self._chained = frame.offset
                before, self._before = self._before, None
                if before is not None:
                    found.faults += [(part.base, fault) for fault in contradictions(before, ledger)]
                if ledger.chain == self._anchor and not found.faults:
                    found.anchor = Anchor(frame.offset, self._lines + ledger.total_lines)

    def _begin(self, part: Part) -> None:
        found, before = self._found, self._part
        if before is None:
            found.gone = part.number
        elif part.number != before.number + 1:
            missing = f"segments {before.number + 1} to {part.number - 1} are"
            missing = f"segment {before.number + 1} is" if part.number == before.number + 2 else missing
            found.faults.append((part.base, f"{missing} missing between {before.name} and {part.name}"))
        found.segments.append(part.name)
        found._bases.append(part.base)
        self._lines += self._ledger.total_lines
        follows = before is not None and part.number == before.number + 1
        self._part, self._before, self._ledger = part, self._ledger if follows else None, Ledger()

    def end(self) -> None:
        found, ledger = self._found, self._ledger
        found.sources, found.lines = len(ledger.sources), self._lines + ledger.total_lines
        found.chain = ledger.chain.hex()
        found.chained = self._chained

    def _check(self, frame: Frame, base: int) -> None:
        found, ledger, local = self._found, self._ledger, replace(frame, offset=frame.offset - base)
        found.frames += 1
        try:
            found.faults += [(frame.offset, fault) for fault in ledger.faults(local)]
            if frame.header.type is FrameType.PACKETS:
                frame.packets()
            if frame.header.type is FrameType.GAP:
                gap = GapInfo.unpack(frame)
                (found.lost if gap.is_loss else found.regressions).append(
                    Gap(
                        self._names[frame.header.source_id],
                        gap.start,
                        None if gap.end == NONE_U64 else gap.end,
                        gap.reason.name.lower(),
                        None if gap.lines == NONE_U64 else gap.lines,
                        frame.header.generation,
                    )
                )
            raw = self._source.read_at(frame.offset, HEADER_BYTES)
            ledger.apply(frame.header, frame.payload, raw, local.offset)
        except PacketError as exc:
            found.faults.append((frame.offset, exc.message))


def _told(damage: Damage) -> tuple[int, str]:
    return damage.start, f"{damage.end - damage.start} bytes hold no valid frame: {damage.reason}"


def _begins(frame: Frame, ledger: Ledger, names: Names, read: dict[tuple[int, int], int], found: Verification) -> None:
    """A generation that begins behind its file's start, where none before has ended, lacks what is before.

    `read`: up to where each file of this source was read, by device and inode.
    """
    try:
        info = SourceInfo.unpack(frame)
    except PacketError:
        return  # `_check` says so
    names.see(frame)
    header = frame.header
    if header.flags & Flag.RESTATED:
        read[info.device, info.inode] = header.source_off
        return
    before = ledger.sources.get(header.source_id)
    if before is not None:
        read[before.info.device, before.info.inode] = before.resume_off
    upto = read.get((info.device, info.inode), 0)
    if info.start_off > upto:
        gap = Gap(names[header.source_id], upto, info.start_off, NEVER_READ, None, header.generation)
        found.lost.append(gap)
