"""From one segment of a packet file to the next, so that no moment of it loses or doubles anything.

    the live file A   … frames │ COMMIT of all │ INDEX │ SEAL │ fsync
    .merged.opk.next            locked │ FILE │ SOURCEs again │ COMMIT of all │ fsync                    it is B
    names                        link A as merged.000007.opk │ folder │ rename B to merged.opk │ folder  A is let go of

Killed before the SEAL is whole, the live file is one that goes on as ever. Killed behind it, the live file ends in a
SEAL: the next run makes B anew, from A, and whatever is left of another B is removed. So B has the live name only when
it is whole and on the disk, and A has one of its own before it loses the live one; the folder is synced between the
two, or a power cut could keep the second alone. That A has both names is no harm: readers take it for the live one.

Under every fsync policy all of this is synced: B alone says where each source stands.

Where a file cannot have two names (FAT, some network mounts), A is renamed instead, and until B has its name there is
no live file. Whoever looks for it then finds the segments, and the next run goes on from the newest of them.

A writer has A's lock until it has B's, and B's from before B has a name that anybody looks for. Who waits for A's lock,
or opens it before it loses its name, finds that the name leads to another file, and looks again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ..errors import BusyResourceError, PacketError
from ..packets.codec import unpack_header
from ..packets.format import HEADER_BYTES, INDEX_STEP, NONE_U64, FrameType
from ..packets.ledger import Ledger
from ..packets.recover import ReadAt, recover
from ..packets.sealed import INDEX_PLACES, Place, SealInfo, pack_index
from .append import AppendFile, sync_folder
from .descriptor import lock, read_at
from .series import PACKED, Plain, file_info, next_path, sealed_segments, segment_path

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL)
_TRIES = 100


class Index:
    """Places of COMMITs that this run wrote in the present segment. Those of runs before are found without it."""

    def __init__(self) -> None:
        self._places: list[Place] = []

    def note(self, offset: int, time_ns: int, lines: int) -> None:
        if not self._places or offset - self._places[-1].offset >= INDEX_STEP:
            self._places.append(Place(offset, time_ns, lines))

    def frames(self) -> list[bytes]:
        """Payloads of INDEX frames."""
        places = self._places
        return [pack_index(places[at : at + INDEX_PLACES]) for at in range(0, len(places), INDEX_PLACES)]


def seal_of(ledger: Ledger, index: int | None, begun_ns: int) -> SealInfo:
    """The SEAL that stands at the ledger's end."""
    return SealInfo(NONE_U64 if index is None else index, ledger.total_lines, begun_ns, ledger.next_chain())


def begun(read_at: ReadAt) -> int:
    """When a segment was begun, in Unix nanoseconds; 0: it holds nothing yet."""
    try:
        return unpack_header(read_at(0, HEADER_BYTES)).time_ns
    except PacketError:
        return 0


def opening(read_at: ReadAt) -> int:
    """Where a segment's own content begins: behind its first COMMIT."""
    at = 0
    with contextlib.suppress(PacketError):
        while True:
            header = unpack_header(read_at(at, HEADER_BYTES), offset=at)
            at += header.frame_len
            if header.type is FrameType.COMMIT:
                break
    return at


def on_the_disk(live: Path) -> int:
    """Up to which byte nothing can take from the live file what a roll has put there: it was synced before the name."""
    file = Plain(live)
    try:
        if file.status.st_nlink > 1 and sealed_segments(live):
            return file.size()  # it has its name as a segment already
        info = file_info(file.read_at)
        return opening(file.read_at) if info is not None and info.segment else 0
    finally:
        file.close()


def open_live(live: Path) -> AppendFile:
    """Open the live file for writing, made if it is not there, and lock it.

    Raises:
        BusyResourceError: somebody else writes it.
        OSError: as `os.open`, or no regular file.
    """
    for _ in range(_TRIES):
        file = AppendFile(live, readable=True)
        try:
            if not file.regular:
                raise OSError(errno.EINVAL, "no regular file; a packet file cannot be written there", os.fspath(live))
            lock(file.fd, live)
            status, named = os.fstat(file.fd), os.stat(live)
            if (status.st_dev, status.st_ino) == (named.st_dev, named.st_ino):
                file.end = status.st_size  # it may have grown until we had the lock
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # it was closed as a segment while we opened it
    raise BusyResourceError(f"{live} is being written by somebody else; wait for it or write elsewhere")


def take_back(live: Path) -> None:
    """Where there is no live file but segments, give the newest its name again: it ends in a SEAL, and is gone on from.

    Raises:
        BusyResourceError: a writer is at it now.
        OSError: as `os.rename`; the newest segment is packed.
    """
    if os.path.lexists(live):
        return
    try:
        segments = sealed_segments(live)
    except FileNotFoundError:
        return  # nor is there a folder; opening says so
    if not segments:
        return
    number = max(segments)
    newest = segments[number]
    if newest.name.endswith(PACKED):
        raise FileNotFoundError(
            errno.ENOENT,
            f"is gone, and with it the end of what its segments hold; unpack {newest.name} (zstd -d), or move them all "
            "away to begin anew",
            os.fspath(live),
        )
    file = AppendFile(newest, readable=True)
    try:
        with contextlib.suppress(PacketError):  # something else has that name
            ledger = recover(lambda offset, length: read_at(file.fd, offset, length), file.end).ledger
            if not ledger.sealed or ledger.info is None or ledger.info.segment != number:
                return
            lock(file.fd, newest)
            if os.path.lexists(live):
                return
            os.rename(newest, live)
            sync_folder(live.parent)
    finally:
        file.close()


def begin_next(live: Path, like: int) -> AppendFile:
    """The file of the next segment, empty and locked, under a name that nobody looks for; with the rights of `like`.

    Raises:
        OSError: as `os.open`.
    """
    temporary = next_path(live)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    file = AppendFile(temporary, readable=True)
    try:
        status = os.fstat(like)
        with contextlib.suppress(OSError, AttributeError):
            os.fchmod(file.fd, status.st_mode & 0o7777)
            os.fchown(file.fd, status.st_uid, status.st_gid)
        lock(file.fd, temporary)
    except BaseException:
        file.close()
        raise
    return file


def hand_over(live: Path, number: int, file: int) -> Path:
    """Give the live file its name as a segment, and the next one, which is whole and synced, the live name.

    Args:
        number: of the live file, open as `file`.

    Returns:
        The name that it has now.

    Raises:
        FileExistsError: another file has that name.
        OSError: as `os.link`, `os.rename`, `os.fsync`. Trying again goes on where it was.
    """
    sealed = segment_path(live, number)
    status = os.fstat(file)
    try:
        os.link(live, sealed)
    except FileExistsError:
        there = os.stat(sealed)
        if (there.st_dev, there.st_ino) != (status.st_dev, status.st_ino):
            what = "is there already, and no segment of this file; move it away"
            raise FileExistsError(errno.EEXIST, what, os.fspath(sealed)) from None
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        if sealed.exists():
            raise FileExistsError(errno.EEXIST, "is there already; move it away", os.fspath(sealed)) from None
        os.rename(live, sealed)
    sync_folder(live.parent)
    os.replace(next_path(live), live)
    sync_folder(live.parent)
    return sealed
