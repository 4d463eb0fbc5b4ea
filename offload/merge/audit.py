"""Whether all of a packet file is right: every checksum, every sequence. Reads it once, holds a few frames."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import PacketError
from ..files.packet_file import FrameSource
from ..packets.codec import Damage, Frame, GapInfo
from ..packets.format import HEADER_BYTES, MAGIC, NONE_U64, FrameType
from ..packets.ledger import Ledger
from .names import Names

Watcher = Callable[[int, int], None]
"""Called now and then with the bytes read so far and the size of the file."""


def unwatched(done: int, size: int) -> None:
    """Nobody looks."""


@dataclass
class Verification:
    """What reading the whole file found.

    Attributes:
        faults: where, and what is wrong there; empty if every checksum and every sequence holds.
        torn: bytes of a last frame that is not whole.
        live: somebody is writing the file now, so a torn tail is the next frame.
        gaps: what the file itself states as lost: source, from, to (None: unknown), reason.
        chain: hash over all frames up to the last COMMIT, in hex.
    """

    size: int = 0
    frames: int = 0
    sources: int = 0
    lines: int = 0
    torn: int = 0
    live: bool = False
    chain: str = ""
    faults: list[tuple[int, str]] = field(default_factory=list)
    gaps: list[tuple[str, int, int | None, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(path: str | os.PathLike[str], watcher: Watcher = unwatched) -> Verification:
    """Check every checksum and that every sequence goes on without a hole.

    Raises:
        OSError: as `open`.
        PacketError: it does not begin as a packet file.
    """
    found = Verification()
    ledger = Ledger()
    damages: list[Damage] = []
    with FrameSource(path, on_damage=damages.append) as source:
        found.size = source.size()
        names = Names(source)
        start = source.read_at(0, 4)
        if not MAGIC.startswith(start[:4]):
            raise PacketError(f"found {start.hex(' ')}, expected the magic {MAGIC.hex(' ')}", 0)

        def check(frames: list[Frame]) -> None:
            for frame in frames:
                while damages and damages[0].start < frame.offset:
                    found.faults.append(_told(damages.pop(0)))
                    ledger.prev_len = frame.header.prev_len  # one fault is told once
                _check(frame, source, ledger, names, found)

        while (frames := source.read()) is not None:
            check(frames)
            watcher(source.offset, found.size)
            if source.offset + source.pending >= found.size and source.is_being_written():
                break  # what was there when we began is checked; a busy writer would keep us for ever
        found.live = source.is_being_written()
        found.torn = source.pending
        end = source.offset + source.pending
        behind = source.end()
        if not found.live:
            check(behind)
            found.torn = end - behind[-1].end if behind else found.torn
            found.faults += map(_told, damages)
    found.sources, found.lines = len(ledger.sources), ledger.total_lines
    found.chain = ledger.chain.hex()
    return found


def _told(damage: Damage) -> tuple[int, str]:
    return damage.start, f"{damage.end - damage.start} bytes hold no valid frame: {damage.reason}"


def _check(frame: Frame, source: FrameSource, ledger: Ledger, names: Names, found: Verification) -> None:
    found.frames += 1
    try:
        found.faults += [(frame.offset, fault) for fault in ledger.faults(frame)]
        if frame.header.type is FrameType.PACKETS:
            frame.packets()
        if frame.header.type is FrameType.SOURCE:
            names.see(frame)
        if frame.header.type is FrameType.GAP:
            gap = GapInfo.unpack(frame)
            end = None if gap.end == NONE_U64 else gap.end
            found.gaps.append((names[frame.header.source_id], gap.start, end, gap.reason.name.lower()))
        ledger.apply(frame.header, frame.payload, source.read_at(frame.offset, HEADER_BYTES), frame.offset)
    except PacketError as exc:
        found.faults.append((exc.offset, exc.message))
