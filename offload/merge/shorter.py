"""How much of what was read does a log still have that became shorter? (FORMAT.md, rule 5.)

Its machine lost power: the log lost its end, which the packet file has, and its program wrote on. Its bytes are
compared with those, from the end back, as a power cut takes some seconds of a log and leaves gigabytes. Where a block
agrees, all before it is taken to agree, as with the tail guards of COMMITs.

    what agrees         start   why
    all agrees          all     the log holds nothing new; but where it ends inside a line, that may be the beginning
                                of a new one, as of the one that was read: it waits
    HEAD_BYTES agree    the     a line that begins there may begin alike by chance (a date)
                        line
    less                0       every file of a log may begin with the same lines, so it was truncated: what is there
                                comes again, rather than that lines are lost
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..files.contents import Contents, open_contents
from ..files.opened import Common, Shorter
from ..files.rotated import is_same
from ..packets.format import GUARD_BYTES, HEAD_BYTES

Held = Callable[[int, int], Awaitable[bytes | OSError]]
"""What was read, bytes [start, end) of the file; b"": nobody has all of them."""

_FIRST, _MOST = 64 << 10, 4 << 20  # bytes of a block: the last one, and those far from the end
_LINE = 1 << 20  # a line's beginning is looked for in so many bytes


async def start_of_new(question: Shorter, held: Held) -> Common:
    """Up to where the file that is asked about has what was read.

    Raises:
        OSError: the file, or what was read of it, cannot be read now.
    """
    contents = open_contents(question.path)
    try:
        if not is_same(contents, question.known.info):
            return Common(0)
        size = contents.look()[0]
        common = await common_prefix(contents, min(size, question.known.entry.resume_off), held)
        if common < size:
            if common < HEAD_BYTES:
                return Common(0)
            before = contents.read_at(max(0, common - _LINE), min(common, _LINE))
            line = before.rfind(b"\n") + 1
            common = common - len(before) + line if line else common
        elif common and contents.read_at(common - 1, 1) != b"\n":
            return Common(None)
        guard = min(common, GUARD_BYTES)
        return Common(common, contents.read_at(common - guard, guard))
    finally:
        contents.close()


async def common_prefix(contents: Contents, end: int, held: Held) -> int:
    """How many of a file's first `end` bytes are those that are held; 0 also if nobody knows.

    Raises:
        OSError: the file, or what was read of it, cannot be read now.
    """
    length, above = _FIRST, 0  # bytes that agree at the beginning of the block behind
    while end:
        start = max(0, end - length)
        wanted = await held(start, end)
        if isinstance(wanted, OSError):
            raise wanted
        if not wanted:
            return 0
        agree = _agree(contents.read_at(start, end - start), wanted)
        if agree == end - start:
            agree += above
        if agree >= GUARD_BYTES or not start:
            return start + agree
        end, above, length = start, agree, min(2 * length, _MOST)
    return 0


def _agree(one: bytes, other: bytes) -> int:
    """How many bytes at their beginnings are the same."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` agree, the first `high` do not
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
