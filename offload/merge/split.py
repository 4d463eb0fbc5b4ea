"""The sources of a packet file: what each has in it, and each written back as the file that it was."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from ..files.packet_file import FrameSource
from ..packets.codec import GapInfo, SourceInfo
from ..packets.format import NONE_U64, Flag, FrameType
from .audit import Watcher, unwatched
from .names import safe_name, short_names


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


@dataclass
class FileStat:
    """Counts from the frames' headers; payloads are not read."""

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
    with FrameSource(path) as source:
        report.size = source.size()
        for frame in source.headers():
            report.frames += 1
            report.end = frame.end
            header = frame.header
            if header.type is FrameType.SOURCE:
                info = SourceInfo.unpack(frame)
                entry = sources.setdefault(header.source_id, SourceStat(header.source_id, os.fsdecode(info.path)))
                entry.generation = header.generation
                continue
            known = sources.get(header.source_id)
            if known is None:
                continue
            if header.type is FrameType.GAP:
                known.gaps += 1
            elif header.type in (FrameType.LINES, FrameType.PACKETS):
                known.lines += header.count
                known.bytes += header.payload_len - (4 * header.count if header.flags & Flag.TABLE else 0)
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

    A source's last generation gets its short name; one before gets `.gen0`, `.gen1` … behind it.

    Raises:
        FileExistsError: a file is there already and `force` is not set; what was split before it stays.
        PacketError: the packet file is damaged; what stands before the damage has been written.
        OSError: as `open` and `write`.
    """
    root = Path(folder)
    plan, end = _plan(path)
    result = Split()
    files: dict[tuple[int, int], BinaryIO] = {}
    made: set[tuple[int, int]] = set()

    def target(key: tuple[int, int]) -> BinaryIO:
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
            for frame in source:
                if frame.offset >= end:
                    break  # written since we looked
                header = frame.header
                key = (header.source_id, header.generation)
                if header.type is FrameType.SOURCE:
                    target(key)
                    info = SourceInfo.unpack(frame)
                    if info.start_off:
                        result.incomplete[root / plan[key]] = f"begins at its byte {info.start_off}"
                elif header.type in (FrameType.LINES, FrameType.PACKETS):
                    content = frame.content()
                    target(key).write(content)
                    result.written[root / plan[key]] += len(content)
                elif header.type is FrameType.GAP:
                    gap = GapInfo.unpack(frame)
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


def _plan(path: str | os.PathLike[str]) -> tuple[dict[tuple[int, int], PurePath], int]:
    """A file name for each generation of each source, no two the same; and the end of the frames that it knows."""
    report = stat(path)
    plan: dict[tuple[int, int], PurePath] = {}
    files: set[PurePath] = set()
    folders: set[PurePath] = set()
    for source in report.sources:
        for generation in range(source.generation, -1, -1):
            name = safe_name(source.name)
            if generation < source.generation:
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
    return plan, report.end
