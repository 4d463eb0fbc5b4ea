"""Which files are meant by the paths, folders and globs of a merge; looked up again while it follows."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

_OURS = (".opk", ".opk.zst", ".opk.status")  # names that are never taken out of folders and globs


class Sources:
    """The files that some arguments name.

    Args:
        arguments: each a file; a folder, for all regular files in it and below; or a glob (`*`, `?`, `[…]`, `**` for
            folders below). A name that exists is taken as it is, whatever signs are in it. In folders, hidden files and
            links to folders are left out; in folders and globs, packet files (`.opk`, `.opk.zst`) and their `.status`.

        include, exclude: which of the files that folders and globs name: shell patterns (`*`, `?`, `[…]`) for the last
            part of a path, or, with a slash in it, for all of it or its end (`nginx/*.log`; there `*` also stands for
            slashes). With `include`, one of those must match; with `exclude`, none may. A file that an argument names
            itself is always taken. What rotation makes of a source is followed whatever its new name is.

    What an argument names is taken as an absolute path; a file that two arguments or links name is one source.

    Raises:
        TypeError, ValueError: no arguments, or a pattern that can never match; says why.
    """

    def __init__(self, arguments: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        if isinstance(arguments, str | bytes):
            raise TypeError(f"sources are {arguments!r}, expected a list of paths; write [{arguments!r}]")
        if not arguments or not all(arguments):
            raise ValueError("no sources given" if not arguments else "a source is an empty name, expected a path")
        self.arguments = [os.path.abspath(a) for a in arguments]
        self._include = [_pattern(p, "include", include, self.arguments) for p in include]
        self._exclude = [_pattern(p, "exclude", exclude, self.arguments) for p in exclude]

    def left_out(self, path: str) -> str | None:
        """Why a file that no argument names itself is not taken, as the end of a sentence; None: it is."""
        for pattern in self._exclude:
            if _matches(path, pattern):
                return f"--exclude {pattern!r} matches it"
        if self._include and not any(_matches(path, pattern) for pattern in self._include):
            return f"no --include matches it: {', '.join(map(repr, self._include))}"
        return None

    def covers(self, path: str) -> bool:
        """Whether a file would be a source if it had this absolute path, as far as names can tell."""
        return path in self.arguments or (
            self.left_out(path) is None and any(_covers(argument, path) for argument in self.arguments)
        )

    def scan(self) -> tuple[dict[str, os.stat_result], dict[str, OSError]]:
        """Look now.

        Returns:
            The regular files with their status, in the order of the arguments and then by name; and the arguments that
            name nothing now, or nothing that can be merged, with the reason.
        """
        files: dict[str, os.stat_result] = {}
        missing: dict[str, OSError] = {}
        for argument in self.arguments:
            found = left_out = False
            for path, status in _named(argument, missing):
                if path != argument and self.left_out(path) is not None:
                    left_out = True
                    continue
                found = True
                if stat.S_ISREG(status.st_mode):
                    files.setdefault(path, status)
                else:
                    missing[argument] = OSError(errno.EINVAL, "no regular file, folder or glob", argument)
            if not found and argument not in missing and not os.path.isdir(argument):
                why = "no such file, and no file matches" if not left_out else "include and exclude leave out all of it"
                missing[argument] = FileNotFoundError(errno.ENOENT, why, argument)
        return files, missing

    def folders(self) -> Iterator[str]:
        """The folders in which such files may appear, as far as they exist."""
        seen: set[str] = set()
        for argument in self.arguments:
            for folder in _folders(argument):
                if folder not in seen and os.path.isdir(folder):
                    seen.add(folder)
                    yield folder


def _pattern(pattern: str, name: str, given: Sequence[str], arguments: Sequence[str]) -> str:
    """The pattern, if it can match anything."""
    if isinstance(given, str | bytes):
        raise TypeError(f"{name} is {given!r}, expected a list of patterns; write [{given!r}]")
    what = f"{name} pattern {pattern!r} can never match"
    if not pattern or "\0" in pattern:
        raise ValueError(f"{what}: it is empty" if not pattern else f"{what}: it has a NUL in it")
    if pattern.endswith("/"):
        raise ValueError(
            f"{what}: it ends in a slash, and only files are matched; for all below write {pattern + '*'!r}"
        )
    if any(part in ("", ".", "..") for part in pattern.split("/")[1:]) or pattern.startswith(("./", "../")):
        raise ValueError(f"{what}: paths are absolute and plain, without //, . and ..")
    if name == "include" and pattern.endswith(".opk"):
        raise ValueError(f"{what}: packet files (.opk) are only taken if they are named themselves")
    if pattern.startswith("/") and not any(_may_be_below(pattern, argument) for argument in arguments):
        raise ValueError(f"{what}: it is below none of the sources: {', '.join(arguments)}")
    return pattern


def _may_be_below(pattern: str, argument: str) -> bool:
    one, other = _plain_beginning(pattern), _plain_beginning(argument)
    return one.startswith(other) or other.startswith(one)


def _plain_beginning(pattern: str) -> str:
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def _matches(path: str, pattern: str) -> bool:
    if "/" not in pattern:
        return fnmatchcase(os.path.basename(path), pattern)
    return fnmatchcase(path, pattern if pattern.startswith("/") else f"*/{pattern}")


def _covers(argument: str, path: str) -> bool:
    if path.endswith(_OURS):
        return False
    inside = path.removeprefix(argument.rstrip("/") + "/")
    if inside != path and os.path.isdir(argument):
        return not any(part.startswith(".") for part in inside.split("/"))
    return glob.has_magic(argument) and _fits(path.split("/"), argument.split("/"))


def _fits(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a glob, part by part."""
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**" and len(patterns) > 1:
        down = not parts[0].startswith(".") and _fits(parts[1:], patterns)
        return down or _fits(parts, patterns[1:])
    hidden = parts[0].startswith(".") and not patterns[0].startswith(".")
    return not hidden and fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


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
        if stat.S_ISREG(status.st_mode) and not path.endswith(_OURS):
            yield path, status
