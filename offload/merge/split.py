"""The sources of a packet file: what each has in it, and each written back as the file that it was."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from ..errors import PacketError
from ..files.frame_source import FrameSource
from ..packets.codec import GapInfo, SourceInfo
from ..packets.format import NONE_U64, Flag, FrameType
from .audit import Watcher, unwatched
from .names import safe_name, short_names

_BLOCK = 1 << 20
_OF_SOURCES = {FrameType.SOURCE, FrameType.LINES, FrameType.PACKETS, FrameType.GAP}
_Generation = tuple[int, int]  # of a source


@dataclass
class SourceStat:
    source_id: int
    path: str
    name: str = ""
    lines: int = 0
    bytes: int = 0
    generation: int = 0
    gaps: int = 0
    first_ns: int | None = None
    last_ns: int | None = None
    files: dict[int, int] = field(default_factory=dict)
    """Generation -> the first one that is of the same file: late lines go on with one that was left."""
    shared: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Generation -> one of these, and how many of its first bytes are its own too: the file had lost its end."""


@dataclass
class FileStat:
    """Counts from the frames' headers; payloads are not read."""

    first: int = 0  # number of the first segment that is there
    size: int = 0
    end: int = 0  # of the last whole frame
    frames: int = 0
    sources: list[SourceStat] = field(default_factory=list)

    @property
    def lines(self) -> int:
        return sum(s.lines for s in self.sources)

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.sources)


def stat(path: str | os.PathLike[str]) -> FileStat:
    """Count what each source has in the file, from the headers.

    Raises:
        OSError: as `open`.
        PacketError: no packet file, or a damaged header; `verify` says more.
    """
    report = FileStat()
    sources: dict[int, SourceStat] = {}
    ends: dict[tuple[int, int, int], tuple[int, int]] = {}  # source, device, inode -> end, first generation of the file
    at: dict[int, tuple[int, int, int]] = {}  # source -> the present one of these
    with FrameSource(path) as source:
        report.size = source.size()
        report.first = source.series.parts[0].number
        for frame in source.headers():
            report.frames += 1
            report.end = frame.end
            header = frame.header
            if header.type is FrameType.SOURCE:
                info = SourceInfo.unpack(frame)
                entry = sources.setdefault(header.source_id, SourceStat(header.source_id, os.fsdecode(info.path)))
                if header.flags & Flag.RESTATED:
                    if header.generation > entry.generation or not entry.files:
                        # Segments before are gone, and with them this generation's beginning and those before it.
                        entry.files = {header.generation: header.generation}
                        entry.generation = header.generation
                        at[header.source_id] = header.source_id, info.device, info.inode
                        ends[at[header.source_id]] = header.source_off, header.generation
                    continue
                entry.generation = header.generation
                file = at[header.source_id] = header.source_id, info.device, info.inode
                end, first = ends.get(file, (0, 0))
                if 0 < info.start_off < end:
                    entry.shared[header.generation] = first, info.start_off
                first = first if info.start_off and end == info.start_off else header.generation
                ends[file] = info.start_off, first
                entry.files[header.generation] = first
                continue
            known = sources.get(header.source_id)
            if known is None:
                continue
            if header.type is FrameType.GAP:
                known.gaps += GapInfo.unpack(frame).is_loss
            elif header.type in (FrameType.LINES, FrameType.PACKETS):
                known.lines += header.count
                table = 4 * header.count if header.flags & Flag.TABLE else 0
                length = frame.hole or header.payload_len - table
                known.bytes += length
                ends[at[header.source_id]] = header.source_off + length, ends[at[header.source_id]][1]
                known.first_ns = header.time_ns if known.first_ns is None else known.first_ns
                known.last_ns = header.time_ns
    report.sources = [sources[i] for i in sorted(sources)]
    _, names = short_names(os.fsencode(s.path) for s in report.sources)
    for entry, name in zip(report.sources, names, strict=True):
        entry.name = name
    return report


@dataclass
class Split:
    """Attributes: written: file -> bytes; incomplete: file -> why it is not all of its source."""

    written: dict[Path, int] = field(default_factory=dict)
    incomplete: dict[Path, str] = field(default_factory=dict)


def split(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], *, force: bool = False, watcher: Watcher = unwatched
) -> Split:
    """Write every source back, byte for byte, into files below `folder`.

    A source's last generation gets its short name; one before gets `.gen0`, `.gen1` … behind it. A source that lost its
    end and went on is two files: as it was, and as it is, which begins with what was kept of that.

    Raises:
        FileExistsError: a file is there already and `force` is not set; what was split before it stays.
        PacketError: the packet file is damaged; what stands before the damage has been written.
        OSError: as `open` and `write`.
    """
    root = Path(folder)
    report = stat(path)
    plan, firsts = _plan(report)
    result = Split()
    files: dict[_Generation, BinaryIO] = {}
    made: set[_Generation] = set()
    whole: Counter[_Generation] = Counter()  # bytes from the start of each file without a gap
    shared = {
        (s.source_id, g): ((s.source_id, old), size) for s in report.sources for g, (old, size) in s.shared.items()
    }

    def begin_with_shared(key: _Generation) -> bool:
        """Whether what is before a generation's start is there, in an earlier file."""
        old, size = shared.get(key, (key, 0))
        if not size or whole[old] < size:
            return False
        target(old).flush()
        with open(root / plan[old], "rb") as file:
            rest = size
            while rest:
                data = file.read(min(rest, _BLOCK))
                target(key).write(data)
                rest -= len(data)
        whole[key] = result.written[root / plan[key]] = size
        return True

    def target(key: _Generation) -> BinaryIO:
        if key not in files:
            if len(files) >= 128:
                files.pop(next(iter(files))).close()
            name = root / plan[key]
            if key not in made:
                name.parent.mkdir(parents=True, exist_ok=True)
            mode = "ab" if key in made else "wb" if force else "xb"
            files[key] = cast(BinaryIO, open(name, mode))  # noqa: SIM115 - closed below
            made.add(key)
            result.written.setdefault(name, 0)
        return files[key]

    try:
        with FrameSource(path) as source:
            size = source.size()
            if source.series.parts[0].number != report.first:
                what = f"segment {report.first} was removed while it was split; split it again"
                raise FileNotFoundError(errno.ENOENT, what, os.fspath(path))
            for frame in source:
                if frame.offset >= report.end:
                    break  # written since we looked
                header = frame.header
                key = firsts.get((header.source_id, header.generation), (header.source_id, header.generation))
                again = header.type is FrameType.SOURCE and bool(header.flags & Flag.RESTATED)
                if again and key not in plan:
                    continue  # of a generation that ended in a segment that is gone
                if header.type in _OF_SOURCES and key not in plan:
                    what = f"source {header.source_id} has no generation {header.generation}"
                    raise PacketError(f"{what}: no SOURCE frame begins it", frame.offset)
                if again:
                    if key not in made:
                        target(key)
                        result.incomplete[root / plan[key]] = f"begins at its byte {header.source_off}"
                elif header.type is FrameType.SOURCE:
                    target(key)
                    info = SourceInfo.unpack(frame)
                    if info.start_off and key[1] == header.generation and not begin_with_shared(key):
                        result.incomplete[root / plan[key]] = f"begins at its byte {info.start_off}"
                elif header.type in (FrameType.LINES, FrameType.PACKETS):
                    content, hole = frame.content(), frame.hole
                    file = target(key)
                    file.write(content)
                    if hole:  # as it was: no blocks on the disk, where the file system can
                        end_of_file = file.seek(0, os.SEEK_END) + hole
                        if end_of_file >= 1 << 63:
                            raise PacketError(f"hole of {hole} bytes ends behind 2**63", frame.offset)
                        file.truncate(end_of_file)
                        file.seek(0, os.SEEK_END)
                    result.written[root / plan[key]] += len(content) + hole
                    if whole[key] == header.source_off:
                        whole[key] += len(content) + hole
                elif header.type is FrameType.GAP and (gap := GapInfo.unpack(frame)).is_loss:
                    to = "its end" if gap.end == NONE_U64 else f"byte {gap.end}"
                    reason = gap.reason.name.lower()
                    result.incomplete[root / plan[key]] = f"from byte {gap.start} to {to}: {reason} before it was read"
                watcher(frame.end, size)
            if not source.is_being_written():
                source.end()
    finally:
        for file in files.values():
            file.close()
    return result


def _plan(report: FileStat) -> tuple[dict[_Generation, PurePath], dict[_Generation, _Generation]]:
    """A file name for each file of each source, no two the same, by its first generation; and the first generation of
    the file of each.
    """
    plan: dict[_Generation, PurePath] = {}
    firsts: dict[_Generation, _Generation] = {}
    files: set[PurePath] = set()
    folders: set[PurePath] = set()
    for source in report.sources:
        firsts |= {(source.source_id, g): (source.source_id, first) for g, first in source.files.items()}
        generations = sorted(set(source.files.values()), reverse=True)
        for generation in generations:
            name = safe_name(source.name)
            if generation < generations[0]:
                name = name.with_name(f"{name.name}.gen{generation}")
            unique = PurePath()
            for part in name.parts:
                # A file may stand where a folder is needed, and the other way round: `web` and `web/access.log`.
                last = len(unique.parts) + 1 == len(name.parts)
                step, number = unique / part, 1
                while step in files or (last and step in folders):
                    number += 1
                    step = unique / f"{part}.{number}"
                unique = step
            files.add(unique)
            folders.update(unique.parents)
            plan[source.source_id, generation] = unique
    return plan, firsts
