"""Which call a frame is in the middle of, as its source spells it: "time.sleep", "self.lock.acquire", "with lock".

A function written in C has no frame of its own, so a stack ends at the line that called it, and says no more. The byte
code does: the instruction that runs is a call, and the instructions before it, of the same place in the source, loaded
what is called. No source is read.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType

LONGEST = 60  # characters

_LOADS = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_CLOSURE"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX"}
_WITH = {"BEFORE_WITH", "LOAD_SPECIAL"}  # the latter since 3.14


@functools.lru_cache(maxsize=512)
def called(code: CodeType, lasti: int) -> str | None:
    """What the instruction at byte `lasti` of `code` (`frame.f_lasti`) calls; None: it is no call, or has no name.

    Any thread; some 100 µs the first time for each place, 1 ms for a function of a thousand lines.
    """
    instructions = [i for i in dis.get_instructions(code) if i.offset <= lasti and i.opname != "CACHE"]
    if not instructions:
        return None
    running, before = instructions[-1], instructions[:-1]
    if running.opname in _WITH:
        return _shortened(_loaded(before), "with ")
    if running.opname not in _CALLS and running.opname != "PRECALL":  # where 3.11 stands once a call is specialised
        return None
    return _shortened(_spelt([i for i in before if _begin(i) == _begin(running)]))


def _spelt(same: list[dis.Instruction]) -> list[str]:
    """The names that instructions of one place loaded, of the call's own expression; not of its arguments."""
    parts: list[str] = []
    for instruction in same:
        if instruction.opname in _LOADS:
            parts = [instruction.argval]  # the same place may be compiled twice, as a `finally` is
        elif instruction.opname in _ATTRIBUTES:
            parts.append(instruction.argval)  # the first of them: of an expression that began on another line
        elif instruction.opname in _CALLS and parts:
            parts[-1] += "()"
    return parts


def _loaded(before: list[dis.Instruction]) -> list[str]:
    """The name that was loaded last, with its attributes: of a `with`, whose place differs between versions."""
    parts: list[str] = []
    for instruction in reversed(before):
        if instruction.opname in _LOADS:
            return [instruction.argval, *parts]
        if instruction.opname not in _ATTRIBUTES:
            break
        parts.insert(0, instruction.argval)
    return []


def _begin(instruction: dis.Instruction) -> tuple[int, int]:
    place = instruction.positions
    if place is None or place.lineno is None:  # -X no_debug_ranges
        return -1, instruction.offset
    return place.lineno, place.col_offset or 0


def _shortened(parts: list[str], prefix: str = "") -> str | None:
    return (prefix + ".".join(parts))[:LONGEST] if parts else None
