"""On which mount a path is, and whether changes that others make there are reported to us.

inotify(7) tells of what goes through this machine's kernel. What another machine writes to a network file system, and
what a FUSE server changes by itself, nobody reports. Read from /proc/self/mountinfo, as proc(5) describes it; where
there is none, every path counts as local.

An overlay (the root of a container) is left to inotify: what goes through it is reported, and to change the layers
below it is undefined anyway.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

MOUNTINFO = "/proc/self/mountinfo"

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|ncpfs|9p|afs|openafs|coda|ceph|glusterfs|lustre|beegfs|fhgfs|gpfs|pvfs2|orangefs|panfs|"
    r"virtiofs|vboxsf|vmhgfs|prl_fs|drvfs|ocfs2|gfs2?|davfs|fuse(\..*)?"
)


def network_mount(path: str, mountinfo: str = MOUNTINFO) -> tuple[str, str] | None:
    """Mount point and kind of the file system that a path (no links in it) is on, if others may change it unseen."""
    found = "", ""
    for point, kind in mounts(mountinfo):
        below = path == point or path.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(found[0]):  # the last one hides those before it
            found = point, kind
    return found if _NETWORK.fullmatch(found[1]) else None


def mounts(mountinfo: str = MOUNTINFO) -> Iterator[tuple[str, str]]:
    """Mount points and the kinds of their file systems, in the order in which they were mounted."""
    with (
        contextlib.suppress(OSError),
        open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file,
    ):
        for line in file:
            fields, _, rest = line.rstrip("\n").partition(" - ")
            if rest and len(parts := fields.split(" ")) > 4:
                # Space, tab, line end and backslash are written as octal numbers.
                point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), parts[4])
                yield point, rest.split(" ")[0]
