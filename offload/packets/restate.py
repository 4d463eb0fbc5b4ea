"""What opens a segment: the sources of the one before, stated again. The layout is in `format.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .codec import CommitEntry, SourceInfo
from .format import NONE_U64
from .ledger import Ledger, SourceState, entry_faults

History = Callable[[SourceState], Iterator[tuple[SourceInfo, CommitEntry]]]
"""The earlier generations of a source, newest first."""

# Earlier generations of a source that are stated again in each segment. They are there so that a rotated file that a
# glob finds is known: few keep more than a month of files. All sources together get some 16 MiB of that.
HISTORY, LEAST_HISTORY, HISTORY_FRAMES = 32, 4, 1 << 15


def restate(ledger: Ledger, history: History, place: Callable[[], int]) -> Iterator[tuple[SourceState, SourceInfo]]:
    """The SOURCE frames that state the sources of a segment again in the next one, in their order.

    Args:
        ledger: at the end of the segment.
        place: where in the next segment the frame that is given out next will stand.

    Yields:
        The state that goes into the frame's header, and its payload.
    """
    most = max(LEAST_HISTORY, min(HISTORY, HISTORY_FRAMES // (len(ledger.sources) or 1)))
    for source_id in sorted(ledger.sources):
        state = ledger.sources[source_id]
        known = [(state.info, state.entry())]
        for former in history(state):
            if len(known) > most:
                break
            known.append(former)
        before: CommitEntry | None = None
        for info, entry in reversed(known):
            stands = entry._replace(source_frame=place())
            if info.before is not None and before is None:
                before = info.before._replace(source_frame=NONE_U64)
            again = info._replace(before=before, stands=stands)
            yield SourceState.of(again, stands), again
            before = stands


def contradictions(before: Ledger, after: Ledger) -> Iterator[str]:
    """What contradicts that a segment, as of its first COMMIT, comes right behind another, as of its end."""
    if before.info is None or after.info is None:
        yield "no FILE frame says of which packet file it is"
        return
    if not before.sealed:
        yield "the segment before has no SEAL"
    if after.info.file_id != before.info.file_id:
        yield "is of another packet file than the segment before"
    if after.info.segment != before.info.segment + 1:
        yield f"is segment {after.info.segment}, expected {before.info.segment + 1}"
    if after.info.previous_chain != before.next_chain():
        named, found = after.info.previous_chain.hex()[:16], before.next_chain().hex()[:16]
        yield f"names the chain {named}… before it, found {found}…"
    if len(after.sources) < len(before.sources):
        yield f"states {len(after.sources)} sources again, expected {len(before.sources)}"
    for source_id, state in after.sources.items():
        old = before.sources.get(source_id)
        if old is not None:
            yield from entry_faults(state.entry()._replace(source_frame=old.source_frame), old)
