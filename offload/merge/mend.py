"""What a merge does with a packet file that is damaged where it wants to go on (FORMAT.md, rule 2).

    behind the last COMMIT,      cut there and read again: `can_be_read_again`. A power cut takes any page behind the
    and the sources have it      last fsync and leaves others. Each frame there is of a source and a generation that are
                                 known before the hole, as their SOURCE frame is synced before (`settle` of PacketFile)
    there, and they have not,    written anew: `write_anew`. Both sides of the damage are kept; what is missing between
    or where its state stands    them is read from the sources that still have it, and stated as lost for the others.
                                 The damaged file stays beside it under another name
    before that                  left as it is; `verify` tells

A merge alone mends so, for it can look whether the sources have the bytes. `offload serve` keeps a damaged file as it
is, for `offload repair`, which drops nothing: what a peer without `offload send` sent is nowhere else; and what
`offload send` sent may have been acknowledged by the fsync behind the last COMMIT, so that its sender need not have it
any more. Nobody can ask it before the file is open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from ..errors import PacketError
from ..files.contents import Contents, open_contents
from ..files.descriptor import lock, open_regular
from ..files.rotated import Folders, Resume, best_match
from ..files.series import live_path
from ..packets.codec import Header
from ..packets.format import MAGIC, Flag
from ..packets.ledger import SourceState
from ..packets.recover import Recovery
from .repair import Repair, repair

_WINDOW = 1 << 20  # bytes of a source in one frame


def can_be_read_again(recovery: Recovery) -> bool:
    """Whether the sources, rotated or not, still hold everything that stands behind the damage."""
    for header in recovery.behind:
        state = recovery.ledger.sources.get(header.source_id)
        if state is None or state.generation != header.generation or not _is_there(state, header):
            return False
    return True


def write_anew(path: Path, why: PacketError) -> tuple[Path, Repair]:
    """Put a sound packet file in the place of a damaged one, which gets a name of its own: `merged.damaged-1.opk`.

    Nobody may be writing it. Readers that have it open keep it.

    Returns:
        The damaged file's new name, and what was done.

    Raises:
        PacketError: a source's path is lost, so that its lines would come in again under the one that it has; or `why`,
            if it is no packet file, or the file system has no hard links: then there would be a moment without a file
            of that name, and whoever started then would read all sources anew.
        BusyResourceError: somebody writes it.
        OSError: as `open`, `write` and `fsync`; the damaged file is where it was.
    """
    path = live_path(path)
    fd, status = open_regular(os.fspath(path))
    try:
        if os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise why
        lock(fd, path)
        kept = _keep(path, status, why)
        try:
            done = repair(kept, path, fill=from_sources, replace=True)
        except PacketError:
            kept.unlink()
            raise
        shutil.copymode(kept, path)
        with contextlib.suppress(OSError):  # who may not give it away keeps it
            os.chown(path, status.st_uid, status.st_gid)
    finally:
        os.close(fd)
    return kept, done


def _keep(path: Path, status: os.stat_result, why: PacketError) -> Path:
    """A second name for a file; the one that it has got already, if this was ended before it was done."""
    number = 1
    while True:
        kept = path.with_name(f"{path.stem}.damaged-{number}.opk")  # so that no folder or glob takes it for a log
        try:
            os.link(path, kept)
        except FileExistsError:
            there = os.stat(kept)
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                return kept
            number += 1
        except OSError as exc:
            if exc.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise why from exc
            raise
        else:
            return kept


def from_sources(state: SourceState, end: int, lines: int) -> Iterator[bytes]:
    """What a source's present generation has from where it stands up to `end`, in whole lines, if these are so many."""
    contents = _holding(state, end)
    if contents is None:
        return
    try:
        start = state.resume_off
        found = sum(part.count(b"\n") for part in _parts(contents, start, end))
        whole = contents.read_at(end - 1, 1) == b"\n"
        if found > lines or (whole and found < lines):
            return  # it is not what was read there
        for part in _parts(contents, start, end):
            cut = part.rfind(b"\n") + 1
            if cut:
                yield part[:cut]
            if cut < len(part):
                return  # the rest of a line that goes on, or of one that is very long
    finally:
        contents.close()


def _parts(contents: Contents, start: int, end: int) -> Iterator[bytes]:
    """Its bytes in windows that end at a line end where there is one."""
    while start < end:
        data = contents.read_at(start, min(_WINDOW, end - start))
        if not data:
            return
        cut = data.rfind(b"\n") + 1
        part = data[:cut] if cut and start + len(data) < end else data
        start += len(part)
        yield part


def _is_there(state: SourceState, header: Header) -> bool:
    """Whether a source still has what this frame holds, and so all before it: the power cut may have been its own."""
    contents = _holding(state, header.source_off + header.payload_len)
    if contents is None:
        return False
    with contextlib.closing(contents):
        if header.flags & Flag.HOLE:
            return not any(contents.read_at(header.source_off, min(header.payload_len, _WINDOW)))
        return crc32(contents.read_at(header.source_off, header.payload_len)) == header.payload_crc


def _holding(state: SourceState, end: int) -> Contents | None:
    """The file, open, that has the source's present generation up to this byte; None: there is none."""
    path, known = os.fsdecode(state.path), Resume(state.info, state.entry())
    names = [path]
    with contextlib.suppress(OSError):
        names += Folders().rotated(path)
    for name in names:
        try:
            contents = open_contents(name)
        except OSError:
            continue
        with contextlib.suppress(OSError):  # packed, and not whole
            if best_match(contents, [known]) is not None and contents.look()[0] >= end:
                return contents
        contents.close()
    return None
