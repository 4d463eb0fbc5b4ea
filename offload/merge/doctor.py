"""Why is a file not read? Looks at files, folders and globs as a merge would, and says of each what is in the way.

    diagnose(["/var/log/*.log"], "merged.opk") -> findings, of each file at least one

A finding is "ok", a "note" (it is read, but not as one may think) or "wrong" (it is not read, or not all of it, or not
soon), has a word for programs and a sentence that ends with the cure. Nothing is written, and no packet file locked.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import PacketError
from ..files.contents import Contents, open_contents, unpacked_name
from ..files.descriptor import open_regular, read_at
from ..files.frame_source import FrameSource
from ..files.rotated import Resume, best_match, holds, is_rotated, is_same, rotated_from
from ..files.series import is_segment_of, live_path
from ..packets.format import GUARD_BYTES, HEAD_BYTES
from . import machine
from .sources import Sources

NEARLY = 0.9  # of a limit in use: it is told
_SPARE = 64  # descriptors that a merge leaves to the rest of the program
_SOON = 5.0  # seconds in which a merge that runs has read what was written
_REST = 1 << 20  # bytes in which a line end is looked for

_MAGICS = {b"\x1f\x8b": ("gzip", ".gz"), b"\xfd7zXZ\x00": ("xz", ".xz"), b"\x28\xb5\x2f\xfd": ("zstd", ".zst")}
_OTHER_MAGICS = {b"BZh": "bzip2", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}


class Verdict(StrEnum):
    ok = "ok"
    note = "note"
    wrong = "wrong"


@dataclass(slots=True, frozen=True)
class Finding:
    """What is to be said of a path.

    Attributes:
        path: absolute; "": it is about the machine.
        kind: a word for programs, always the same for the same thing.
        text: a sentence for people.
        detail: numbers and names in the sentence, for programs.
    """

    path: str
    verdict: Verdict
    kind: str
    text: str
    detail: dict[str, int | str] = field(default_factory=dict)


def diagnose(
    arguments: Sequence[str],
    output: str | os.PathLike[str] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Finding]:
    """Look at everything now.

    Args:
        arguments: as for a merge: files, folders, globs.
        output: the packet file, to say how far each file was read.
        include, exclude: as for Sources, and refused as there.
    """
    sources = Sources(arguments, include=include, exclude=exclude)
    return list(_Doctor(output, sources).look(sources.arguments))


class _Doctor:
    def __init__(self, output: str | os.PathLike[str] | None, sources: Sources) -> None:
        self._sources = sources
        self._output = None if output is None else os.path.abspath(output)
        self._known: dict[str, Resume] = {}  # path -> how far the packet file has it
        self._live = False  # a merge writes it now
        self._files: dict[str, os.stat_result] = {}
        self._holders: dict[tuple[int, int], list[machine.Holder]] | None = None

    def look(self, arguments: Sequence[str]) -> Iterator[Finding]:
        if self._output is not None:
            yield from self._packet_file(self._output)
        for argument in arguments:
            yield from self._argument(argument)
        for path, status in self._files.items():
            found = list(self._file(path, status))
            yield from found or [Finding(path, Verdict.ok, "ok", f"can be read, {status.st_size:,} bytes")]
        yield from self._machine(arguments)

    def _packet_file(self, path: str) -> Iterator[Finding]:
        try:
            with FrameSource(path) as source:
                self._live = source.is_being_written()
                ledger = source.series.recover().ledger
        except FileNotFoundError:
            yield Finding(path, Verdict.wrong, "no-packet-file", "there is no packet file: no merge has begun")
        except OSError as exc:
            yield Finding(path, Verdict.wrong, "no-packet-file", f"the packet file cannot be read: {_reason(exc)}")
        except PacketError as exc:
            text = f"no packet file, or a damaged one: {exc}; see offload verify"
            yield Finding(path, Verdict.wrong, "damaged", text, {"offset": exc.offset})
        else:
            self._known = {os.fsdecode(s.path): Resume(s.info, s.entry()) for s in ledger.sources.values()}
            running = "a merge writes it now" if self._live else "no merge writes it now"
            yield Finding(path, Verdict.ok, "packet-file", f"packet file of {len(self._known)} sources; {running}")

    # --- what an argument names ---------------------------------------------------------------------------------------

    def _argument(self, path: str) -> Iterator[Finding]:
        try:
            status = os.stat(path)
        except PermissionError:
            yield self._no_permission(path)
        except OSError as exc:
            if glob.has_magic(path):
                yield from self._glob(path)
            elif isinstance(exc, FileNotFoundError | NotADirectoryError):
                yield from self._missing(path)
            else:
                yield Finding(path, Verdict.wrong, "unreadable", _reason(exc))
        else:
            if stat.S_ISDIR(status.st_mode):
                yield from self._folder(path)
            else:
                yield from self._named(path, status)

    def _named(self, path: str, status: os.stat_result) -> Iterator[Finding]:
        if stat.S_ISREG(status.st_mode):
            self._files.setdefault(path, status)
            return
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "no file")
        yield Finding(path, Verdict.wrong, "not-regular", f"is {kind}, expected a regular file, a folder or a glob")

    def _folder(self, path: str) -> Iterator[Finding]:
        files, missing = Sources([path]).scan()
        for each, exc in missing.items():
            yield (
                self._no_permission(each)
                if isinstance(exc, PermissionError)
                else Finding(each, Verdict.wrong, "unreadable", _reason(exc))
            )
        left_out = {each: why for each in files if (why := self._sources.left_out(each)) is not None}
        for each, why in left_out.items():
            if each not in self._sources.arguments:
                yield self._excluded(each, why)
        self._files = {each: status for each, status in files.items() if each not in left_out} | self._files
        if not files and not missing:
            yield Finding(path, Verdict.wrong, "no-match", "the folder has no files that are merged")
        hidden, links = [], []
        for folder, folders, names in os.walk(path):
            hidden += [os.path.join(folder, name) for name in sorted(names + folders) if name.startswith(".")]
            links += [each for name in sorted(folders) if os.path.islink(each := os.path.join(folder, name))]
            for name in sorted(names):
                if name.endswith((".opk", ".opk.zst")) and not name.startswith("."):
                    yield self._excluded(os.path.join(folder, name), "packet files are left out of folders and globs")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
        if hidden:
            yield self._excluded(path, f"hidden files and folders in it are left out: {_some(hidden)}")
        if links:
            yield self._excluded(path, f"links to folders in it are not followed: {_some(links)}")

    @staticmethod
    def _excluded(path: str, why: str) -> Finding:
        return Finding(path, Verdict.note, "excluded", f"{why}; name what is wanted itself")

    def _glob(self, pattern: str) -> Iterator[Finding]:
        matched = sorted(glob.iglob(pattern, recursive=True))
        for path in matched:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if path.endswith((".opk", ".opk.zst")):
                    yield self._excluded(path, "packet files are left out of folders and globs")
                elif stat.S_ISREG(status.st_mode):
                    why = self._sources.left_out(path)
                    if why is None:
                        self._files.setdefault(path, status)
                    elif path not in self._sources.arguments:
                        yield self._excluded(path, why)
        if matched:
            return
        folder = os.path.dirname(pattern)
        while glob.has_magic(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            yield from self._missing(folder, of=pattern)
        elif not os.access(folder, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            yield self._no_permission(folder, of=pattern)
        else:
            near = _nearest(folder, os.path.basename(pattern))
            yield Finding(pattern, Verdict.wrong, "no-match", f"no file matches{near}", {"folder": folder})

    def _missing(self, path: str, of: str = "") -> Iterator[Finding]:
        about, folder = of or path, os.path.dirname(path)
        if os.path.islink(path):
            text = f"is a link to {os.readlink(path)}, which is not there"
            yield Finding(about, Verdict.wrong, "missing", text)
            return
        if not os.path.isdir(folder) and folder != path:
            if os.path.exists(folder):
                yield Finding(about, Verdict.wrong, "missing", f"{folder} is a file, expected a folder")
            else:
                yield from self._missing(folder, of=about)
            return
        held = [h for h in self._all_holders() if h.deleted and h.path == path]
        if held:
            size = max(h.size for h in held)
            text = (
                f"deleted, but {held[0]} has it open: {size:,} bytes that only a merge which has it open too can "
                f"read; /proc/{held[0].pid}/fd leads to them as long as that process runs"
            )
            yield Finding(about, Verdict.wrong, "held-deleted", text, {"pid": held[0].pid, "size": size})
        known = self._known.get(path)
        if known is not None:
            yield from self._moved(path, known)
        rotated = [] if of else sorted(n for n in _listed(folder) if is_rotated(n, os.path.basename(path)))
        if rotated and known is None:
            text = f"is not there; rotation left {', '.join(rotated[:4])}, and nobody has made it anew"
            yield Finding(about, Verdict.wrong, "rotated", text)
        elif not held and known is None:
            what = f"folder {path} is not there" if of else "no such file"
            yield Finding(about, Verdict.wrong, "missing", what + _nearest(folder, os.path.basename(path)))

    def _no_permission(self, path: str, of: str = "") -> Finding:
        who, door = machine.user(), machine.locked_door(path)
        if door:
            text = f"{who} may not enter the folder {door} ({machine.rights(door)}); setfacl -m u:{who}:x {door}"
            return Finding(of or path, Verdict.wrong, "no-permission", text, {"folder": door})
        right = "rx" if os.path.isdir(path) else "r"
        text = f"{who} may not read {path} ({machine.rights(path)}); setfacl -m u:{who}:{right} {path}"
        return Finding(of or path, Verdict.wrong, "no-permission", text)

    # --- a file -------------------------------------------------------------------------------------------------------

    def _file(self, path: str, status: os.stat_result) -> Iterator[Finding]:
        same = next(p for p, s in self._files.items() if (s.st_dev, s.st_ino) == (status.st_dev, status.st_ino))
        if path == self._output:
            yield Finding(path, Verdict.note, "excluded", "is the packet file itself, which is never read")
            return
        if self._output is not None and is_segment_of(live_path(self._output), path):
            yield Finding(path, Verdict.note, "excluded", "is a segment of the packet file, which is never read")
            return
        if same != path:
            yield Finding(path, Verdict.note, "same", f"is the same file as {same}, and read once", {"other": same})
            return
        try:
            contents = open_contents(path)
        except PermissionError:
            yield self._no_permission(path)
            return
        except OSError as exc:
            yield Finding(path, Verdict.wrong, "unreadable", _reason(exc))
            return
        try:
            found = list(_packing(path))
            yield from found
            mount = machine.network_mount(os.path.realpath(path))
            if mount is not None:
                text = (
                    f"is on a network mount ({mount[1]} at {mount[0]}), which does not report what others write: "
                    "looked at by time"
                )
                yield Finding(path, Verdict.note, "network", text, {"mount": mount[0], "type": mount[1]})
            if any(f.verdict is Verdict.wrong for f in found):
                return
            size = contents.look()[0]
            if not size:
                yield Finding(path, Verdict.note, "empty", "is empty: there is nothing to read yet")
            elif path not in self._known and (of := self._copied_from(path, contents)):
                text = f"all of it stands at the beginning of {of}: a copy, read once it has something of its own"
                yield Finding(path, Verdict.note, "copy", text, {"other": of})
            elif self._output is not None:
                yield from self._position(path, contents, size)
        except OSError as exc:
            yield Finding(path, Verdict.wrong, "unreadable", _reason(exc))
        finally:
            contents.close()

    def _copied_from(self, path: str, contents: Contents) -> str | None:
        """Which log a merge takes this for a copy of: by its name a rotated one, by its bytes the beginning of it."""
        size = contents.look()[0]
        for name in rotated_from(os.path.basename(path)):
            other = os.path.join(os.path.dirname(path), name)
            with contextlib.suppress(OSError):
                log = open_contents(other)
                try:
                    places = (0, min(size, HEAD_BYTES)), (max(0, size - GUARD_BYTES), min(size, GUARD_BYTES))
                    if log.look()[0] >= size and all(log.read_at(*p) == contents.read_at(*p) for p in places):
                        return other
                finally:
                    log.close()
        return None

    def _position(self, path: str, contents: Contents, size: int) -> Iterator[Finding]:
        """How far the packet file has it."""
        known = self._known.get(path)
        if known is None:
            owner = next((p for p, r in self._known.items() if is_same(contents, r.info)), None)
            if owner is not None:
                yield self._behind(path, size, self._known[owner], f"is what {owner} was; ")
                return
            why = "though a merge runs: is it among its paths?" if self._live else "and no merge runs"
            yield Finding(path, Verdict.wrong, "not-merged", f"is not in the packet file, {why}", {"size": size})
        elif holds(contents, known.entry) is not None and (known.entry.resume_off or is_same(contents, known.info)):
            yield self._behind(path, size, known)
        elif is_same(contents, known.info):
            offset = known.entry.resume_off
            text = (
                f"was truncated or written anew, or lost its end: {size:,} bytes, and {offset:,} had been read; it is "
                "read from its start, or from where it differs from what was read; what nobody had read is looked for "
                "in a copy, else stated as lost"
            )
            yield Finding(path, self._later, "truncated", text, {"offset": offset, "size": size})
        else:
            yield from self._moved(path, known)
            text = f"is another file than the one that was read, with {size:,} bytes, none of them read yet"
            yield Finding(path, self._later, "new-file", text, {"size": size})

    @property
    def _later(self) -> Verdict:
        return Verdict.note if self._live else Verdict.wrong

    def _behind(self, path: str, size: int, known: Resume, prefix: str = "") -> Finding:
        offset = known.entry.resume_off
        detail: dict[str, int | str] = {"offset": offset, "size": size, "behind": size - offset}
        if size <= offset:
            return Finding(path, Verdict.ok, "read", f"{prefix}read to its end, byte {offset:,}", detail)
        text = f"{prefix}read up to byte {offset:,} of {size:,}, {size - offset:,} behind"
        if self._live and _has_no_line_end(path, offset, size):
            return Finding(path, Verdict.note, "unended", f"{text}: the last line has no end yet", detail)
        if not self._live:
            return Finding(path, Verdict.wrong, "behind", f"{text}; no merge runs", detail)
        if time.time() - os.stat(path).st_mtime < _SOON:
            return Finding(path, Verdict.ok, "behind", text, detail)
        return Finding(path, Verdict.wrong, "behind", f"{text}, and the merge that runs does not get on", detail)

    def _moved(self, path: str, known: Resume) -> Iterator[Finding]:
        """Where the file is that had this name when it was read."""
        offset, folder = known.entry.resume_off, os.path.dirname(path)
        for name in sorted(_listed(folder)):
            other = os.path.join(folder, name)
            if other == path or not (is_rotated(name, os.path.basename(path)) or _inode(other) == known.info.inode):
                continue
            with contextlib.suppress(OSError):
                contents = open_contents(other)
                try:
                    if best_match(contents, [known]) is None:
                        continue
                    size = contents.look()[0]
                finally:
                    contents.close()
                rest = f"{size - offset:,} bytes of it not read" if size > offset else "read to its end"
                writers = [h for h in self._all_holders() if h.path == other and h.writes]
                still = f"; {writers[0]} still writes to it" if writers else ""
                verdict = self._later if size > offset else Verdict.note
                text = f"rotated: what was read up to byte {offset:,} is {other} now, {rest}{still}"
                yield Finding(path, verdict, "rotated", text, {"other": other, "offset": offset, "size": size})
                return
        held = self._held_by(known.identity)
        if held:
            text = f"what was read up to byte {offset:,} is deleted; {held[0]} has it open, {held[0].size:,} bytes"
            yield Finding(path, Verdict.wrong, "held-deleted", text, {"pid": held[0].pid, "size": held[0].size})
        else:
            text = f"what was read up to byte {offset:,} is gone; what it had behind that is stated as lost"
            yield Finding(path, Verdict.wrong, "gone", text, {"offset": offset})

    def _held_by(self, identity: tuple[int, int]) -> list[machine.Holder]:
        self._all_holders()
        assert self._holders is not None
        return [h for h in self._holders.get(identity, []) if h.deleted]

    def _all_holders(self) -> Iterator[machine.Holder]:
        if self._holders is None:
            self._holders = {}
            for identity, holder in machine.holders():
                self._holders.setdefault(identity, []).append(holder)
        return (holder for held in self._holders.values() for holder in held)

    # --- the machine --------------------------------------------------------------------------------------------------

    def _machine(self, arguments: Sequence[str]) -> Iterator[Finding]:
        folders = len(list(Sources(arguments).folders())) if arguments else 0
        use = machine.inotify_use()
        if use is not None and not self._live:  # one that runs has what it needs, or looks by time
            limits = (
                ("watches", use.watches, folders, use.max_watches),
                ("instances", use.instances, 1, use.max_instances),
            )
            for what, used, more, most in limits:
                if used + more > NEARLY * most:
                    text = (
                        f"inotify: {used:,} of {most:,} {what} are in use, and {more:,} more are needed; without them "
                        f"changes are looked for by time: sysctl fs.inotify.max_user_{what}={max(2 * most, 8192)}"
                    )
                    yield Finding("", Verdict.wrong, "inotify", text, {"used": used, "limit": most, "needed": more})
        most_open = machine.descriptor_limit()
        if most_open is not None and len(self._files) > most_open - _SPARE:
            text = (
                f"{len(self._files):,} files, and a process may have {most_open:,} open: they are opened in turn, "
                "which is slower, and one that is deleted meanwhile may be lost; raise the limit (LimitNOFILE=)"
            )
            yield Finding("", Verdict.wrong, "descriptors", text, {"files": len(self._files), "limit": most_open})


def _packing(path: str) -> Iterator[Finding]:
    """Whether it is compressed, and what a merge makes of it."""
    fd, _ = open_regular(path)
    try:
        start = read_at(fd, 0, 6)
    finally:
        os.close(fd)
    for magic, other in _OTHER_MAGICS.items():
        if start.startswith(magic):
            text = f"is packed with {other}, which is not unpacked: its bytes would be merged as they are"
            yield Finding(path, Verdict.wrong, "compressed", text, {"packed": other})
    for magic, (kind, ending) in _MAGICS.items():
        if not start.startswith(magic):
            continue
        if unpacked_name(path) == path or not path.endswith(ending):
            text = (
                f"is packed with {kind}, but its name does not end in {ending}: its bytes would be merged as they are"
            )
            yield Finding(path, Verdict.wrong, "compressed", text, {"packed": kind})
            return
        contents = open_contents(path)
        try:
            size = contents.look()[0]
            text = f"is packed with {kind}, and read unpacked: {size:,} bytes"
            yield Finding(path, Verdict.note, "compressed", text, {"packed": kind, "size": size})
        except OSError as exc:
            yield Finding(path, Verdict.wrong, "compressed", _reason(exc), {"packed": kind})
        finally:
            contents.close()


def _has_no_line_end(path: str, offset: int, size: int) -> bool:
    if size - offset > _REST or unpacked_name(path) != path:
        return False
    with open(path, "rb") as file:
        file.seek(offset)
        return b"\n" not in file.read(size - offset)


def _nearest(folder: str, name: str) -> str:
    """The names there that look most like this one, as the end of a sentence."""
    plain = name.replace("*", "").replace("?", "") or name
    close = difflib.get_close_matches(plain, _listed(folder), n=3, cutoff=0.4)
    return f"; the nearest: {', '.join(os.path.join(folder, each) for each in close)}" if close else ""


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _inode(path: str) -> int:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return -1


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
