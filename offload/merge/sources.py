"""Which files are meant by the paths, folders and globs of a merge; looked up again while it follows."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence


class Sources:
    """The files that some arguments name.

    Args:
        arguments: each a file; a folder, for all regular files in it and below; or a glob (`*`, `?`, `[…]`, `**` for
            folders below). A name that exists is taken as it is, whatever signs are in it. In folders, hidden files and
            links to folders are left out; in folders and globs, packet files (`.opk`).

    What an argument names is taken as an absolute path; a file that two arguments or links name is one source.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        if isinstance(arguments, str | bytes):
            raise TypeError(f"sources are {arguments!r}, expected a list of paths; write [{arguments!r}]")
        if not arguments or not all(arguments):
            raise ValueError("no sources given" if not arguments else "a source is an empty name, expected a path")
        self.arguments = [os.path.abspath(a) for a in arguments]

    def scan(self) -> tuple[dict[str, os.stat_result], dict[str, OSError]]:
        """Look now.

        Returns:
            The regular files with their status, in the order of the arguments and then by name; and the arguments that
            name nothing now, or nothing that can be merged, with the reason.
        """
        files: dict[str, os.stat_result] = {}
        missing: dict[str, OSError] = {}
        for argument in self.arguments:
            found = False
            for path, status in _named(argument, missing):
                found = True
                if stat.S_ISREG(status.st_mode):
                    files.setdefault(path, status)
                else:
                    missing[argument] = OSError(errno.EINVAL, "no regular file, folder or glob", argument)
            if not found and argument not in missing and not os.path.isdir(argument):
                missing[argument] = FileNotFoundError(errno.ENOENT, "no such file, and no file matches", argument)
        return files, missing

    def folders(self) -> Iterator[str]:
        """The folders in which such files may appear, as far as they exist."""
        seen: set[str] = set()
        for argument in self.arguments:
            for folder in _folders(argument):
                if folder not in seen and os.path.isdir(folder):
                    seen.add(folder)
                    yield folder


def _named(argument: str, missing: dict[str, OSError]) -> Iterator[tuple[str, os.stat_result]]:
    try:
        status = os.stat(argument)
    except (OSError, ValueError) as exc:
        if isinstance(exc, PermissionError):
            missing[argument] = exc  # which is not the same as "no such file"
        matches = sorted(glob.iglob(argument, recursive=True)) if glob.has_magic(argument) else ()
        yield from _regular(matches)
        return
    if not stat.S_ISDIR(status.st_mode):
        yield argument, status
        return
    for folder, folders, names in os.walk(argument, onerror=lambda exc: missing.update({exc.filename: exc})):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from _regular(os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _folders(argument: str) -> Iterator[str]:
    if os.path.isdir(argument):
        for folder, folders, _ in os.walk(argument):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield folder
        return
    folder = os.path.dirname(argument)
    if not glob.has_magic(folder):
        yield folder
        if "**" not in os.path.basename(argument):
            return
    yield from (path for path in glob.iglob(os.path.join(folder, ""), recursive=True))


def _regular(paths: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue  # it went between listing and looking
        # Packet files are left out: two merges in one folder would feed each other for ever.
        if stat.S_ISREG(status.st_mode) and not path.endswith(".opk"):
            yield path, status
