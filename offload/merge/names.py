"""Short names for sources: what people type and read instead of absolute paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import PurePath

from ..errors import PacketError
from ..files.frame_source import FrameSource
from ..packets.codec import Frame, SourceInfo


def short_names(paths: Iterable[bytes]) -> tuple[str, list[str]]:
    """The folder that these sources have in common, and a name for each: its path below that, unique among them."""
    texts = [os.fsdecode(p) for p in paths]
    rooted = [os.path.dirname(t) for t in texts if os.path.isabs(t)]
    common = os.path.commonpath(rooted) if rooted else ""
    names = [below(t, common) for t in texts]
    counts = Counter(names)
    return common, [n if counts[n] == 1 else t for n, t in zip(names, texts, strict=True)]


def below(path: str, folder: str) -> str:
    """The path relative to a folder that it is in, else as it is."""
    return path[len(folder) :].lstrip(os.sep) if folder and path.startswith(folder.rstrip(os.sep) + os.sep) else path


def safe_name(name: str) -> PurePath:
    """A relative path without a way out of its folder, whatever a source is called."""
    parts = [p for p in name.replace("\0", "_").split("/") if p not in ("", ".")]
    return PurePath(*["__" if p == ".." else p for p in parts] or ["_"])


class Names:
    """Short names of a packet file's sources; those that come while it is read are named in the same way."""

    def __init__(self, source: FrameSource) -> None:
        try:
            states = source.series.recover().ledger.sources
        except PacketError:
            states = {}  # damaged: from the frames, then, as they come
        self._paths = {i: os.fsdecode(state.path) for i, state in states.items()}
        self._folder, names = short_names(state.path for state in states.values())
        self._names = dict(zip(states, names, strict=True))

    def see(self, frame: Frame) -> None:
        """Take in a SOURCE frame."""
        source_id = frame.header.source_id
        if source_id not in self._names:
            path = os.fsdecode(SourceInfo.unpack(frame).path)
            name = below(path, self._folder)
            self._paths[source_id] = path
            self._names[source_id] = path if name in self._names.values() else name

    def __getitem__(self, source_id: int) -> str:
        return self._names.get(source_id) or f"source {source_id}"

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def all(self) -> list[str]:
        return list(self._names.values())

    def matches(self, source_id: int, wanted: str) -> bool:
        """Whether this source is meant: by its path, its short name, its last part, or a glob over one of these."""
        path = self._paths.get(source_id, "")
        return any(n == wanted or fnmatchcase(n, wanted) for n in (path, self[source_id], os.path.basename(path)))
