"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..files.append import sync_folder


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], *, made_of: str | os.PathLike[str] | None, force: bool = False
) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends: then it is on the disk.

    Until then it is hidden (`.NAME.tmp-…`), in the same folder; if an exception leaves the block, it is removed.

    Args:
        made_of: what is read for it, which it never replaces; None: which has another name too, and loses this one.
        force: replace a file that is there.

    Raises:
        FileExistsError: the file is there and `force` is not set, or it is `made_of`.
        OSError: as `open`, `os.fsync` and `os.replace`.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    _check(target, made_of, force=force)
    beside = target.with_name(f".{target.name}.tmp-{os.urandom(4).hex()}")
    try:
        with open(beside, "xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check(target, made_of, force=force)  # somebody else may have made it meanwhile
        os.replace(beside, target)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(exc, OSError) and exc.filename == os.fspath(beside):
            exc.filename = os.fspath(path)
            exc.filename2 = None
        raise
    sync_folder(target.parent)


def _check(target: Path, made_of: str | os.PathLike[str] | None, *, force: bool) -> None:
    if not target.exists():
        return
    if made_of is not None and target.samefile(made_of):
        raise FileExistsError(errno.EEXIST, "is the file to read; give another name", os.fspath(target))
    if not force:
        raise FileExistsError(errno.EEXIST, "is there already; give another name, or --force", os.fspath(target))
    if not target.is_file():
        raise FileExistsError(errno.EEXIST, "is not a regular file, which another could replace", os.fspath(target))
